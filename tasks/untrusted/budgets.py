"""Limits on the time that a site or a name server may cost, so that one that does not answer delays its own rows only."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tasks.rows import RowFault
from tasks.untrusted import domains

_LOOKUPS_PER_DOMAIN = 8
_MAX_LOOKUPS = 512  # of a process; those whose callers gave up count until the system's resolver gives up as well
_LEAST_COST_SECONDS = 1.0  # of a failed request, however soon it fails
_FIRST_PAUSE_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 3600.0
_MAX_SITES = 100_000
MOST_HANDED_ON = 1000
"""Limit on what one task leaves to the next, of each kind."""


class Lookups:
    """Name look-ups with a time limit; thread-safe.

    The system's resolver can be neither timed nor cancelled, so each look-up has a thread, which its callers may leave behind.
    A domain whose name servers hang holds a few of these threads, and other domains get others.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: dict[tuple[str, int], concurrent.futures.Future[list[Any]]] = {}
        self._of_domain: collections.Counter[str] = collections.Counter()

    def find(self, resolve: Callable[..., Any], host: str, port: int, seconds: float) -> list[Any]:
        """Return what `resolve` returns, `socket.getaddrinfo` or one like it; threads that ask for the same host share a look-up.

        Raises:
            TimeoutError: no answer within `seconds`.
            OSError, UnicodeError: from `resolve`.
        """
        if _is_numeric(host):  # asks no name server
            found: list[Any] = resolve(host, port, type=socket.SOCK_STREAM)
            return found
        deadline, domain = time.monotonic() + seconds, domains.registrable_domain(host)

        def may_go_on() -> bool:
            has_room = len(self._pending) < _MAX_LOOKUPS and self._of_domain[domain] < _LOOKUPS_PER_DOMAIN
            return has_room or (host, port) in self._pending

        with self._changed:
            if not self._changed.wait_for(may_go_on, seconds):
                raise TimeoutError
            lookup = self._pending.get((host, port))
            if lookup is None:
                lookup = concurrent.futures.Future()
                thread = threading.Thread(
                    target=self._run, args=(lookup, domain, resolve, host, port), name="resolve", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads
                    raise TimeoutError from None
                self._pending[host, port] = lookup
                self._of_domain[domain] += 1
        return lookup.result(max(0.0, deadline - time.monotonic()))

    def _run(
        self,
        lookup: concurrent.futures.Future[list[Any]],
        domain: str,
        resolve: Callable[..., Any],
        host: str,
        port: int,
    ) -> None:
        found: list[Any] = []
        failure: Exception | None = None
        try:
            found = resolve(host, port, type=socket.SOCK_STREAM)
        except Exception as error:
            failure = error
        with self._changed:  # before the answer is known, so that no later caller joins a look-up that is over
            del self._pending[host, port]
            self._of_domain[domain] -= 1
            if not self._of_domain[domain]:
                del self._of_domain[domain]
            self._changed.notify_all()
        if failure is None:
            lookup.set_result(found)
        else:
            lookup.set_exception(failure)


def _is_numeric(host: str) -> bool:
    """Return True for an address in any spelling that the system reads."""
    try:
        socket.inet_aton(host)
    except OSError:
        return ":" in host
    return True


@dataclasses.dataclass
class _Site:
    pause: float
    """Seconds until the next probe; doubles."""
    spent: float = 0.0
    """Seconds of its failed requests that no answer has paid for."""
    next_probe: float = 0.0
    """Monotonic time."""
    prober: tuple[int, float] = (0, 0.0)
    """Thread that probes the site, and the monotonic time until which it may."""


@dataclasses.dataclass
class _UnderWay:
    """Requests to a site that have not ended."""

    number: int = 0
    starts: float = 0.0
    """Sum of the monotonic times at which they started."""


class Spent(NamedTuple):
    """Budget of a site as one process leaves it to the next."""

    seconds: float
    pause: float
    next_probe: float
    """Unix time."""


class Sites:
    """Budgets of the sites whose requests failed lately; thread-safe.

    Requests that time out or cannot connect spend a site's budget, answers of any kind refill it. When it is spent, the site is
    closed: its requests fail at once, but for a probe now and then. Sites that answer take no memory.
    """

    def __init__(self, budget_seconds: float, timeout_seconds: float) -> None:
        """Start with every site open.

        Args:
            budget_seconds: time that the failed requests of a site may take.
            timeout_seconds: limit on one request; an answer pays for a quarter of it.
        """
        self._budget, self._timeout = budget_seconds, timeout_seconds
        self._lock = threading.Condition()
        self._sites: dict[str, _Site] = {}
        self._under_way: dict[str, _UnderWay] = collections.defaultdict(_UnderWay)

    def check(self, site: str) -> None:
        """Raise `RowFault` (site_unreachable) if the site is closed and it is not time for a probe."""
        if site not in self._sites:
            return
        with self._lock:
            state = self._sites.get(site)
            if state is None or state.spent < self._budget:
                return
            now, (prober, until) = time.monotonic(), state.prober
            if prober == threading.get_ident() and now < until:
                return
            if now < state.next_probe:
                raise RowFault("site_unreachable")
            state.prober = threading.get_ident(), now + self._timeout
            state.pause = min(2 * state.pause, _LONGEST_PAUSE_SECONDS)
            state.next_probe = now + state.pause

    @contextlib.contextmanager
    def request(self, site: str, refills: bool = True) -> Iterator[None]:
        """Check the site, then measure a request to it.

        Args:
            refills: an answer counts; one to a request for robots.txt does not say that images arrive.
        """
        self.check(site)
        started = time.monotonic()
        with self._lock:
            self._under_way[site].number += 1
            self._under_way[site].starts += started
        try:
            yield
        except OSError:  # no answer; timeouts are among them
            self.failed(site, time.monotonic() - started)
            raise
        except BaseException:
            if refills:
                self.answered(site)
            raise
        else:
            if refills:
                self.answered(site)
        finally:
            with self._lock:
                under_way = self._under_way[site]
                under_way.number -= 1
                under_way.starts -= started
                if not under_way.number:
                    del self._under_way[site]
                self._lock.notify_all()

    def wait(self, site: str) -> None:
        """Wait while the requests under way would spend the rest of the site's budget if they failed now."""
        if site in self._sites:
            with self._lock:
                self._lock.wait_for(lambda: self._has_budget(site), self._timeout)

    def _has_budget(self, site: str) -> bool:
        state, under_way = self._sites.get(site), self._under_way.get(site)
        if state is None or under_way is None or state.spent >= self._budget:  # of a closed site, `check` decides
            return True
        return state.spent + under_way.number * time.monotonic() - under_way.starts < self._budget

    def failed(self, site: str, seconds: float) -> None:
        """Charge a request that got no answer."""
        with self._lock:
            if len(self._sites) >= _MAX_SITES and site not in self._sites:
                self._sites.clear()
            state = self._sites.setdefault(site, _Site(_FIRST_PAUSE_SECONDS))
            was_open = state.spent < self._budget
            state.spent = min(state.spent + max(seconds, _LEAST_COST_SECONDS), self._budget)
            if was_open and state.spent >= self._budget:
                state.next_probe = time.monotonic() + state.pause
            if state.prober[0] == threading.get_ident():
                state.prober = (0, 0.0)

    def answered(self, site: str) -> None:
        """Refill the budget; a closed site is open again, with half of it."""
        if site not in self._sites:
            return
        with self._lock:
            state = self._sites.get(site)
            if state is None:
                return
            if state.spent >= self._budget:
                state.spent, state.pause = self._budget / 2, _FIRST_PAUSE_SECONDS
            else:
                state.spent -= self._timeout / 4
            if state.spent <= 0:
                del self._sites[site]

    def are_full(self) -> bool:
        """Return True if no site has spent anything."""
        return not self._sites

    def set(self, sites: Iterable[str], spent: Mapping[str, Spent]) -> None:
        """Take over budgets from another process; all others of these sites are full."""
        now, clock = time.monotonic(), time.time()
        with self._lock:
            for site in sites:
                self._sites.pop(site, None)
                if site in spent:
                    seconds, pause, next_probe = spent[site]
                    wait = min(max(0.0, next_probe - clock), pause)
                    self._sites[site] = _Site(pause, seconds, now + wait)

    def get(self, sites: Iterable[str]) -> dict[str, Spent]:
        """Budgets of these sites that are not full; the most spent if there are many."""
        offset = time.time() - time.monotonic()
        with self._lock:
            found = {
                site: Spent(state.spent, state.pause, offset + state.next_probe)
                for site in sites
                if (state := self._sites.get(site)) is not None
            }
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds)[:MOST_HANDED_ON])
