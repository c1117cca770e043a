"""robots.txt (RFC 9309): what a host lets a robot fetch. What cannot be had or read forbids everything."""

import collections
import concurrent.futures
import dataclasses
import re
import threading
import time
import urllib.parse
from collections.abc import Callable

from protego import Protego

from tasks.rows import RowFault
from tasks.untrusted import opt_outs

MAX_BYTES = 500_000
_ABSENT = re.compile(r"empty_body|http_4(?!01|03|29)\d\d")
_VERSION = re.compile(r"^(\s*user-agent\s*:\s*[\w.-]+)/.*$", re.IGNORECASE | re.MULTILINE)
_RULES_LAST_SECONDS = 24 * 3600.0
_FAILURE_LASTS_SECONDS = 300.0
_CACHED_BYTES = 4_000_000  # of text; the rules made of it take up to fifty times as much
_HOST_BYTES = 1000  # what a host with an empty robots.txt counts for


@dataclasses.dataclass
class _Host:
    """What one scheme, host and port said."""

    rules: "Rules | None"
    """None forbids everything, because of `reason`."""
    reason: str
    size_bytes: int
    expires: float
    """Monotonic time."""
    next_request: float = 0.0
    """Monotonic time before which its crawl delay wants no request."""


class Robots:
    """The rules of the hosts that were met lately, for one robot; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: collections.OrderedDict[str, concurrent.futures.Future[_Host]] = collections.OrderedDict()
        self._size_bytes = 0  # of those that are known

    def admit(self, url: str, agent: str, load: Callable[[str], bytes], max_delay_seconds: float) -> float:
        """Ask whether a URL may be fetched, and count it as fetched when it may.

        Args:
            agent: the robot's name, without its version.
            load: gets the body behind a URL, or raises `RowFault`; called once for each host, whatever many threads ask.
            max_delay_seconds: a longer crawl delay is taken for this one.

        Returns:
            Seconds to wait before the request, for the host's crawl delay.

        Raises:
            RowFault: robots_disallowed, robots_unreachable, opted_out (Content-Usage, Content-Signal), or why no connection
                was made.
        """
        parts = urllib.parse.urlsplit(url)
        host = self._host(f"{parts.scheme}://{parts.netloc}", agent, load)
        if host.rules is None:
            raise RowFault(host.reason)
        if not host.rules.fetching.can_fetch(url, agent):
            raise RowFault("robots_disallowed")
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        if opt_outs.training_refused(host.rules.preferences, path):
            raise RowFault("opted_out")
        delay = min(host.rules.fetching.crawl_delay(agent) or 0.0, max_delay_seconds)
        with self._lock:
            now = time.monotonic()
            turn = max(now, host.next_request)
            host.next_request = turn + delay
        return turn - now

    def _host(self, origin: str, agent: str, load: Callable[[str], bytes]) -> _Host:
        with self._lock:
            known = self._hosts.get(origin)
            if known is not None and known.done() and known.result().expires <= time.monotonic():
                self._forget(origin)
                known = None
            if known is None:
                mine = self._hosts[origin] = concurrent.futures.Future()
            else:
                self._hosts.move_to_end(origin)
        if known is not None:
            return known.result()
        host = _ask(origin, agent, load)
        with self._lock:
            mine.set_result(host)
            if self._hosts.get(origin) is mine:
                self._size_bytes += host.size_bytes
            while self._size_bytes > _CACHED_BYTES:
                self._forget(next(iter(self._hosts)))
        return host

    def _forget(self, origin: str) -> None:
        future = self._hosts.pop(origin)
        if future.done():
            self._size_bytes -= future.result().size_bytes


def _ask(origin: str, agent: str, load: Callable[[str], bytes]) -> _Host:
    body: bytes | None
    reason = "robots_unreachable"
    try:
        body = load(f"{origin}/robots.txt")
    except RowFault as fault:
        body = b"" if _ABSENT.fullmatch(fault.reason) else None
        if fault.reason in ("connect_error", "timeout"):  # the picture would have ended in the same way
            reason = fault.reason
    rules = None if body is None else parse(body, agent)
    lasts = _FAILURE_LASTS_SECONDS if rules is None else _RULES_LAST_SECONDS
    return _Host(rules, reason, _HOST_BYTES + len(body or b""), time.monotonic() + lasts)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A robots.txt that could be read."""

    fetching: Protego
    preferences: list[opt_outs.Preference]
    """What it says about usage."""


def parse(body: bytes, agent: str) -> Rules | None:
    """The rules of a robots.txt for a robot; None when it is none, such as a page of HTML in its place, or not UTF-8."""
    try:
        text = body.decode("utf-8-sig")
        if text.lstrip().startswith("<") or "\0" in text:
            return None
        return Rules(Protego.parse(_VERSION.sub(r"\1", text)), opt_outs.preferences(text, agent))
    except Exception:  # what its author meant to forbid is unknown
        return None
