"""robots.txt (RFC 9309): the URLs that a host lets a robot fetch. A file that cannot be fetched or read forbids all of them.

With it comes the host's `/.well-known/tdmrep.json`, if there is one: the URLs whose rights to data mining are reserved.
"""

import collections
import concurrent.futures
import dataclasses
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from protego import Protego

from tasks.rows import RowFault
from tasks.untrusted import opt_outs

MAX_BYTES = 500_000
_ABSENT = re.compile(r"empty_body|http_4(?!01|03|29)\d\d")
_UNANSWERED = re.compile(r"dns_error|dns_timeout|connect_error|timeout|site_unreachable|short_body|http_429|http_5\d\d")
_ALSO_OF_IMAGES = ("connect_error", "timeout", "dns_timeout", "site_unreachable")  # they would fail in the same way
_VERSION = re.compile(r"^([ \t]*+user-agent[ \t]*+:[ \t]*+[\w.-]++)/.*$", re.IGNORECASE | re.MULTILINE)
_RULES_LAST_SECONDS = 24 * 3600.0
_FAILURE_LASTS_SECONDS = 300.0
_CACHED_BYTES = 4_000_000  # of text; the parsed rules take up to fifty times as much
_HOST_BYTES = 1000  # assumed size of a host with an empty robots.txt


@dataclasses.dataclass
class _Host:
    """Cached rules of one scheme, host and port."""

    rules: "Rules | None"
    """None forbids everything, for `reason`."""
    reservations: list[opt_outs.Reservation]
    reason: str
    size_bytes: int
    expires: float
    """Monotonic time."""
    next_request: float = 0.0
    """Monotonic time before which its crawl delay allows no request."""


class Unreached(NamedTuple):
    """Failure to load the rules of a host, as one process leaves it to the next."""

    reason: str
    until: float
    """Unix time until which it lasts."""


class Robots:
    """Cache of the rules of recently visited hosts, for one robot; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: collections.OrderedDict[str, concurrent.futures.Future[_Host]] = collections.OrderedDict()
        self._size_bytes = 0  # of the hosts whose rules have arrived

    def admit(self, url: str, agent: str, load: Callable[[str], bytes], max_delay_seconds: float) -> float:
        """Check that a URL may be fetched and, if so, reserve its turn under the crawl delay.

        Args:
            agent: the robot's name, without its version.
            load: returns the body behind a URL or raises `RowFault`; called once per host for each file, however many threads
                ask.
            max_delay_seconds: upper limit on the crawl delay.

        Returns:
            Seconds to wait before the request, for the host's crawl delay.

        Raises:
            RowFault: robots_disallowed, robots_unreachable, opted_out (Content-Usage, Content-Signal, tdmrep.json), or the
                reason why the connection failed.
        """
        parts = urllib.parse.urlsplit(url)
        host = self._host(f"{parts.scheme}://{parts.netloc}", agent, load)
        if host.rules is None:
            raise RowFault(host.reason)
        if not host.rules.fetching.can_fetch(url, agent):
            raise RowFault("robots_disallowed")
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        refused = opt_outs.training_refused(host.rules.preferences, path)
        if refused or opt_outs.path_reserved(host.reservations, path):
            raise RowFault("opted_out")
        delay = min(host.rules.fetching.crawl_delay(agent) or 0.0, max_delay_seconds)
        with self._lock:
            now = time.monotonic()
            turn = max(now, host.next_request)
            host.next_request = turn + delay
        return turn - now

    def unreached(self, origins: Iterable[str]) -> dict[str, Unreached]:
        """Known failures of some hosts."""
        offset = time.time() - time.monotonic()
        with self._lock:
            known = {origin: self._hosts[origin] for origin in origins if origin in self._hosts}
        hosts = {origin: future.result() for origin, future in known.items() if future.done()}
        return {
            name: Unreached(host.reason, offset + host.expires) for name, host in hosts.items() if host.rules is None
        }

    def set_unreached(self, unreached: Mapping[str, Unreached]) -> None:
        """Take over failures from another process."""
        offset = time.monotonic() - time.time()
        with self._lock:
            for origin, (reason, until) in unreached.items():
                if origin not in self._hosts:
                    self._hosts[origin] = concurrent.futures.Future()
                    self._hosts[origin].set_result(_Host(None, [], reason, _HOST_BYTES, offset + until))
                    self._size_bytes += _HOST_BYTES

    def _host(self, origin: str, agent: str, load: Callable[[str], bytes]) -> _Host:
        with self._lock:
            known = self._hosts.get(origin)
            if known is not None and known.done() and known.result().expires <= time.monotonic():
                self._forget(origin)
                known = None
            if known is None:
                pending = self._hosts[origin] = concurrent.futures.Future()
            else:
                self._hosts.move_to_end(origin)
        if known is not None:
            return known.result()
        host = _load_host(origin, agent, load)
        with self._lock:
            pending.set_result(host)
            if self._hosts.get(origin) is pending:
                self._size_bytes += host.size_bytes
            while self._size_bytes > _CACHED_BYTES:
                self._forget(next(iter(self._hosts)))
        return host

    def _forget(self, origin: str) -> None:
        future = self._hosts.pop(origin)
        if future.done():
            self._size_bytes -= future.result().size_bytes


def _load_host(origin: str, agent: str, load: Callable[[str], bytes]) -> _Host:
    body: bytes | None
    size_bytes, reason = 0, "robots_unreachable"
    try:
        body = load(f"{origin}/robots.txt")
    except RowFault as fault:
        body = b"" if _ABSENT.fullmatch(fault.reason) else None
        if fault.reason in _ALSO_OF_IMAGES:
            reason = fault.reason
    rules = None if body is None else parse(body, agent)
    reserved: list[opt_outs.Reservation] | None = []
    if rules is not None:
        reserved, size_bytes = _load_reservations(origin, load)
        rules = None if reserved is None else rules
    lasts = _FAILURE_LASTS_SECONDS if rules is None else _RULES_LAST_SECONDS
    return _Host(rules, reserved or [], reason, _HOST_BYTES + len(body or b"") + size_bytes, time.monotonic() + lasts)


def _load_reservations(origin: str, load: Callable[[str], bytes]) -> tuple[list[opt_outs.Reservation] | None, int]:
    """Rules of the host's tdmrep.json and their size; None if the host did not answer, so that they are unknown."""
    try:
        body = load(f"{origin}/.well-known/tdmrep.json")
    except RowFault as fault:
        if _UNANSWERED.fullmatch(fault.reason):
            return None, 0
        return opt_outs.EVERYTHING_RESERVED if fault.reason in ("too_large", "bad_encoding") else [], 0
    return opt_outs.reservations(body), len(body)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A parsed robots.txt."""

    fetching: Protego
    preferences: list[opt_outs.Preference]
    """Its usage lines."""


def parse(body: bytes, agent: str) -> Rules | None:
    """Return the rules of a robots.txt for a robot; None if the body is something else, such as HTML, or not UTF-8."""
    try:
        text = body.decode("utf-8-sig")
        if text.lstrip().startswith("<") or "\0" in text:
            return None
        return Rules(Protego.parse(_VERSION.sub(r"\1", text)), opt_outs.preferences(text, agent))
    except Exception:  # unknown what its author meant to forbid
        return None
