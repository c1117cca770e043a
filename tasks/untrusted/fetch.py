"""Fetch bytes from untrusted URLs: public addresses only, bounded in bytes, redirects and wall time.

Each name is resolved once, all its addresses are checked, and the connection goes to a checked address. So an unusual
spelling of an internal address, a redirect, or a name server that changes its answer cannot bypass the check. Through a proxy,
which resolves names itself, a request is sent only after the same check.

Every request, including redirects, obeys the host's robots.txt and its limit of concurrent requests. Hosts in `allow_hosts`
belong to the operator: they need not be public, and neither rule applies to them. A redirect has these rights only from the
host that the list names to itself. Opt-outs that a server declares for the image itself (`tasks.untrusted.opt_outs`) apply to
all hosts.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import functools
import http.client
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tasks.rows import RowFault
from tasks.untrusted import budgets, domains, opt_outs, robots

_BUFFER_BYTES = 1 << 16  # the head of an answer and much of its body in one read
_TIMER_SECONDS = 0.01
_CHUNK_BYTES = 1 << 20  # most images in one piece
_RETRIED = re.compile(r"dns_error|connect_error|short_body|http_429|http_5\d\d")
_OPT_OUTS = ("x-robots-tag", "tdm-reservation", "content-usage", "content-signal")
_REDIRECTS = (301, 302, 303, 307, 308)
_ADDRESSES_LAST_SECONDS = 30.0  # a long list overloads name servers first
_NO_ADDRESS_LASTS_SECONDS = 60.0
_MAX_ADDRESSES = 100_000
_BACKOFF_SECONDS = 0.2  # before the first retry; doubles
_MAX_INTERIM = 200  # responses such as 103 Early Hints before the final one

# Addresses that are globally routable: all of these blocks but the special ones within. Both lists are complete, so they do not
# depend on the Python version, which treats two clouds' metadata services (192.0.0.192, 168.63.129.16) as global, and others.
_ROUTABLE = ("0.0.0.0/0", "2000::/3")
_SPECIAL = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "224.0.0.0/3",
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)  # fmt: skip
_CARRIERS = (("::ffff:0:0/96", 0), ("::ffff:0:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
"""Blocks whose addresses carry an IPv4 address, and its distance from the last bit: mapped, translated, NAT64 and 6to4."""


def _networks(blocks: Iterable[str]) -> tuple[Any, ...]:
    return tuple(map(ipaddress.ip_network, blocks))


_ROUTABLE_NETWORKS, _SPECIAL_NETWORKS = _networks(_ROUTABLE), _networks(_SPECIAL)
_CARRIER_NETWORKS = tuple((ipaddress.IPv6Network(block), shift) for block, shift in _CARRIERS)


def is_public(address: str) -> bool:
    """Return True for a globally routable address. An IPv4 address carried by an IPv6 address decides for it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        for network, shift in _CARRIER_NETWORKS:
            if ip in network:
                return is_public(str(ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
    is_routable, is_special = (
        any(ip.version == network.version and ip in network for network in networks)
        for networks in (_ROUTABLE_NETWORKS, _SPECIAL_NETWORKS)
    )
    return is_routable and not is_special


def retry_after_seconds(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or an HTTP date; None if it is absent or invalid."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


def host_of(url: str) -> str:
    """Return the host of a URL as it is looked up: lower case, IDNA, without brackets.

    Raises:
        RowFault: bad_url.
    """
    return _Target.parse(url).host


def is_allowed_host(url: str, allow_hosts: Sequence[str]) -> bool:
    """Return True if the host of a URL is in `allow_hosts`; False if the URL is invalid."""
    try:
        return _Target.parse(url).is_in(allow_hosts)
    except RowFault:
        return False


def _targets(urls: Iterable[str]) -> set["_Target"]:
    """One target of each origin; invalid URLs have none."""
    found = set()
    for url in urls:
        with contextlib.suppress(RowFault):
            found.add(dataclasses.replace(_Target.parse(url), path="/"))
    return found


def _is_over(left: budgets.Spent | robots.Unreached) -> bool:
    return isinstance(left, robots.Unreached) and left.until < time.time()


Spent = Mapping[str, budgets.Spent | robots.Unreached]
"""Budgets by site, and failures to load robots.txt by origin, as one process leaves them to the next."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """An answer, and the way to it."""

    body: bytes
    final_url: str | None = None
    """URL that answered, if there were redirects."""
    redirect_hosts: tuple[str, ...] = ()
    """Hosts of the redirects in their order, each once, without that of the URL that was asked for."""


class _Busy(RowFault):
    """A server that asked clients to wait."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclasses.dataclass
class _Deadline:
    at: float
    """Monotonic time."""

    def remaining(self) -> float:
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """A client with the settings for fetching; thread-safe. Threads that share it also share its caches and limits."""

    user_agent: str
    timeout_seconds: float
    """For one URL with redirects and retries, excluding waits for robots.txt and for the host's request limit."""
    connect_timeout_seconds: float
    """For one address."""
    max_bytes: int
    max_redirects: int
    retries: int
    requests_per_host: int
    """Concurrent requests per host and port."""
    respect_robots: bool
    max_crawl_delay_seconds: float
    """Upper limit on the crawl delay of a robots.txt."""
    opt_out_directives: tuple[str, ...]
    """X-Robots-Tag directives that forbid the use of an image."""
    allow_hosts: tuple[str, ...] = ()
    """`host` or `host:port` entries that may be fetched even if not public, with neither robots.txt nor limits."""
    allow_ports: Sequence[int] = (80, 443, 8080, 8443)
    """Ports of all other hosts."""
    proxy: str | None = None
    """`http://host:port` of a proxy that all requests to other hosts go through; None connects directly."""
    dns_timeout_seconds: float = 5.0
    """For one look-up."""
    site_seconds: float = 60.0
    """Time that a site's requests may take without an answer; see `budgets.Sites`."""
    resolve: Callable[..., Any] = socket.getaddrinfo
    _robots: robots.Robots = dataclasses.field(default_factory=robots.Robots, init=False, repr=False, compare=False)
    _addresses: dict[tuple[str, int, bool], tuple[float, list[Any] | str]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Host, port and whether they are the operator's -> expiry (monotonic time) and checked addresses, or the reason why
    there are none."""
    _lookups: budgets.Lookups = dataclasses.field(
        default_factory=budgets.Lookups, init=False, repr=False, compare=False
    )
    _host_limits: "_HostLimits" = dataclasses.field(
        default_factory=lambda: _HostLimits(), init=False, repr=False, compare=False
    )
    _sites: budgets.Sites = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        domains.registrable_domain("example.com")  # reads the list of suffixes, here in one thread
        object.__setattr__(self, "_sites", budgets.Sites(self.site_seconds, self.timeout_seconds))

    @property
    def agent(self) -> str:
        """The robot's name in lower case, without its version."""
        return self.user_agent.partition("/")[0].strip().lower()

    def fetch(self, url: str) -> bytes:
        """Return the body behind a URL.

        Raises:
            RowFault: with one of the reasons of `tasks.rows`; no other exception.
        """
        return self.get(url).body

    def get(self, url: str) -> Fetched:
        """Like `fetch`, with the way to the body."""
        return self._try(url, for_robots=False)

    def take_budgets(self, urls: Iterable[str], spent: Spent) -> None:
        """Take over the budgets of the sites of some URLs from another process."""
        if spent or not self._sites.are_full():
            targets = _targets(urls)
            of_sites = {name: left for name, left in spent.items() if isinstance(left, budgets.Spent)}
            self._sites.set({target.site for target in targets}, of_sites)
            origins = {target.origin for target in targets}
            failed = {name: left for name, left in spent.items() if isinstance(left, robots.Unreached)}
            self._robots.set_unreached({name: left for name, left in failed.items() if name in origins})

    def hand_on_budgets(self, urls: Iterable[str], spent: Spent) -> Spent:
        """Return budgets for another process: those of the sites of some URLs, and `spent` for all other sites."""
        if not spent and self._sites.are_full():  # a robots.txt that does not arrive spends a budget as well
            return {}
        targets = _targets(urls)
        sites, origins = {target.site for target in targets}, {target.origin for target in targets}
        others = {name: left for name, left in spent.items() if name not in sites and not _is_over(left)}
        left = others | self._sites.get(sites) | self._robots.unreached(origins)
        unreached = sorted((each.until, name) for name, each in left.items() if isinstance(each, robots.Unreached))
        oldest = {name for _, name in unreached[: -budgets.MOST_HANDED_ON]}
        return {name: each for name, each in left.items() if name not in oldest}

    def _try(self, url: str, for_robots: bool) -> Fetched:
        deadline = _Deadline(time.monotonic() + self.timeout_seconds)
        for attempt in range(self.retries + 1):
            try:
                return self._follow(url, deadline, for_robots)
            except RowFault as fault:
                pause = _BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1.5)
                if isinstance(fault, _Busy):
                    pause = max(pause, fault.seconds)
                last = attempt == self.retries or time.monotonic() + pause >= deadline.at
                if last or not _RETRIED.fullmatch(fault.reason):
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, url: str, deadline: _Deadline, for_robots: bool) -> Fetched:
        target = _Target.parse(url)
        first = target.host
        hosts: dict[str, None] = {}  # in order, each once
        for redirects in range(self.max_redirects + 1):
            try:
                target = self._with_rights(_Target.parse(url) if redirects else target, None if hosts else first)
                answer = self._get(target, deadline, for_robots)
            except RowFault:
                raise
            except TimeoutError:
                raise RowFault("timeout") from None
            except (OSError, http.client.RemoteDisconnected):
                raise RowFault("connect_error") from None
            except http.client.IncompleteRead:
                raise RowFault("short_body") from None
            except Exception:  # a hostile server costs only this row, however it breaks HTTP
                raise RowFault("fetch_error") from None
            if target.host != first:
                hosts[target.host] = None
            if isinstance(answer, bytes):
                return Fetched(answer, target.url if redirects else None, tuple(hosts))
            url = answer
        raise RowFault("redirect_limit")

    def _with_rights(self, target: "_Target", own: str | None) -> "_Target":
        """Set `is_own`; `own` is the host that the list names, unless redirects have left it."""
        is_own = target.host == own and target.is_in(self.allow_hosts)
        return dataclasses.replace(target, is_own=True) if is_own else target

    def _get(self, target: "_Target", deadline: _Deadline, for_robots: bool) -> bytes | str:
        """Return the body, or the URL of a redirect."""
        self._sites.check(target.site)
        addresses = self._resolve_checked(target, deadline)
        if not target.is_own and target.port not in self.allow_ports:
            raise RowFault("blocked_port")
        proxy = None if self.proxy is None or target.is_own else _Target.parse(self.proxy)
        if proxy is not None:
            addresses = self._resolve_checked(dataclasses.replace(proxy, is_own=True), deadline)
        with self._admission(target, deadline, for_robots), self._sites.request(target.site, refills=not for_robots):
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.response_class = _Response
            connection.sock = self._connect(target, addresses, deadline, proxy)
            with contextlib.closing(connection):
                path = target.path if proxy is None or target.tls else target.url
                headers = {"Host": target.host_header, "User-Agent": self.user_agent}
                headers |= {"Accept": "text/plain,*/*;q=0.5" if for_robots else "image/*,*/*;q=0.5"}
                connection.request("GET", path, headers=headers | {"Accept-Encoding": "identity"})
                with connection.getresponse() as response:
                    return self._read_answer(target, response, for_robots)

    @contextlib.contextmanager
    def _admission(self, target: "_Target", deadline: _Deadline, for_robots: bool) -> Iterator[None]:
        """Wait until the host's crawl delay, request limit and budget allow a request. Waiting extends the deadline."""
        started = time.monotonic()
        if self.respect_robots and not for_robots and not target.is_own:
            has_answered = False

            def load_rules(url: str) -> bytes:
                nonlocal has_answered
                body = self._load_rules(url)
                has_answered = True
                return body

            try:
                delay = self._robots.admit(target.url, self.agent, load_rules, self.max_crawl_delay_seconds)
            except RowFault as fault:
                if has_answered and fault.reason in ("robots_disallowed", "opted_out"):
                    self._sites.answered(target.site)  # its rules arrived, and no image will tell more
                raise
            time.sleep(delay)
        with contextlib.nullcontext() if target.is_own else self._host_limits.of(target, self.requests_per_host):
            self._sites.wait(target.site)
            deadline.at += time.monotonic() - started
            yield

    def _load_rules(self, url: str) -> bytes:
        return self._try(url, for_robots=True).body

    def _read_answer(self, target: "_Target", response: http.client.HTTPResponse, for_robots: bool) -> bytes | str:
        headers, status = response.headers, response.status
        location = headers["Location"] if status in _REDIRECTS else None
        if status != 200 and not location:
            pause = retry_after_seconds(headers["Retry-After"]) if status in (429, 503) else None
            raise RowFault(f"http_{status}") if pause is None else _Busy(f"http_{status}", pause)
        if not for_robots:
            lines = {name: headers.get_all(name, []) for name in _OPT_OUTS}
            tags, reservations = lines["x-robots-tag"], lines["tdm-reservation"]
            tagged = opt_outs.opted_out(tags, self.agent, self.opt_out_directives)
            if tagged or opt_outs.rights_reserved(reservations) or opt_outs.headers_refuse(lines):
                raise RowFault("opted_out")
        if location:
            url: str = urllib.parse.urljoin(target.url, _as_utf8(location))
            if target.tls and url.lower().startswith("http:"):
                raise RowFault("insecure_redirect")
            return url
        if not _is_plain(headers.get_all("Content-Encoding", []), "identity"):
            raise RowFault("bad_encoding")
        if not _is_plain(headers.get_all("Transfer-Encoding", []), "chunked"):
            raise RowFault("bad_encoding")
        return _read(response, robots.MAX_BYTES if for_robots else self.max_bytes)

    def _resolve_checked(self, target: "_Target", deadline: _Deadline) -> list[Any]:
        """Return all addresses of the host, as `getaddrinfo` lists them, after checking each."""
        known = self._addresses.get((target.host, target.port, target.is_own))
        if known is not None and time.monotonic() < known[0]:
            if isinstance(known[1], str):
                raise RowFault(known[1])
            return known[1]
        started = time.monotonic()
        seconds = min(self.dns_timeout_seconds, deadline.remaining())
        try:
            found = self._lookups.find(self.resolve, target.host, target.port, seconds)
        except TimeoutError:
            self._sites.failed(target.site, time.monotonic() - started)
            if seconds == self.dns_timeout_seconds:  # else the URL's own time was over
                self._remember(target, "dns_timeout", _NO_ADDRESS_LASTS_SECONDS)
            raise RowFault("dns_timeout") from None
        except (socket.gaierror, UnicodeError) as error:
            if getattr(error, "errno", None) != socket.EAI_AGAIN:  # that one is retried
                self._remember(target, "dns_error", _NO_ADDRESS_LASTS_SECONDS)
            raise RowFault("dns_error") from None
        if not target.is_own and not all(is_public(address[0]) for *_, address in found):
            raise RowFault("blocked_address")
        self._remember(target, found, _ADDRESSES_LAST_SECONDS)
        return found

    def _remember(self, target: "_Target", found: list[Any] | str, seconds: float) -> None:
        if len(self._addresses) >= _MAX_ADDRESSES:
            self._addresses.clear()
        self._addresses[target.host, target.port, target.is_own] = time.monotonic() + seconds, found

    def _connect(
        self, target: "_Target", addresses: Sequence[Any], deadline: _Deadline, proxy: "_Target | None" = None
    ) -> socket.socket:
        """Connect to the first address, of the target or of the proxy, that answers."""
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            sock = _Socket(family, kind, protocol)
            try:
                sock.settimeout(min(self.connect_timeout_seconds, deadline.remaining()))
                sock.connect(address)
                sock.settimeout(deadline.remaining())
                if proxy is not None and target.tls:
                    sock.deadline = deadline
                    self._open_tunnel(sock, target)
                if target.tls:
                    sock = _tls().wrap_socket(sock, server_hostname=target.host)  # type: ignore[assignment]
                sock.deadline = deadline
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def _open_tunnel(self, sock: socket.socket, target: "_Target") -> None:
        """Ask the proxy at the other end to pass everything on to the target.

        Raises:
            OSError: it refuses.
        """
        authority = f"{target.bracketed_host}:{target.port}"
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: {self.user_agent}\r\n\r\n"
        sock.sendall(head.encode("latin-1", "replace"))
        with contextlib.closing(_Response(sock, method="CONNECT")) as response:
            try:
                response.begin()
            except http.client.HTTPException as error:
                raise ConnectionRefusedError(f"proxy: {error!r}") from None
            if response.status != 200:
                raise ConnectionRefusedError(f"proxy: status {response.status}")


class _Response(http.client.HTTPResponse):
    """A response without the interim ones (1xx) before it, of which the standard library skips only 100."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(_MAX_INTERIM):
            status_line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= status_line[1] < 200 or status_line[1] == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return status_line
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {_MAX_INTERIM} interim responses")


def _as_utf8(location: str) -> str:
    """Location header in UTF-8, which the standard library reads as Latin-1; other bytes are escaped."""
    raw = location.encode("latin-1", "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return urllib.parse.quote(raw, safe="".join(map(chr, range(33, 127))))


def _is_plain(codings: Iterable[str], harmless: str) -> bool:
    return all(coding.strip().lower() in ("", harmless) for value in codings for coding in value.split(","))


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    announced, body = response.length, bytearray()
    if announced is not None and announced > max_bytes:
        raise RowFault("too_large")
    while chunk := response.read(min(_CHUNK_BYTES, max_bytes + 1)):
        body += chunk
        if len(body) > max_bytes:
            raise RowFault("too_large")
    if announced is not None and len(body) != announced:
        raise RowFault("short_body")
    if not body:
        raise RowFault("empty_body")
    return bytes(body)


@dataclasses.dataclass(frozen=True)
class _Target:
    tls: bool
    host: str
    port: int
    path: str
    is_own: bool = False
    """The operator's, with the rights of `allow_hosts`."""

    @classmethod
    def parse(cls, url: str) -> "_Target":
        if re.search(r"[\x00-\x1f\x7f]", url):  # urlsplit would silently remove some of them
            raise RowFault("bad_url")
        try:
            parts = urllib.parse.urlsplit(url)
            host = domains.ascii_host(parts.hostname) if parts.hostname else ""
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise RowFault("bad_url") from None
        if not host or "@" in parts.netloc or parts.port == 0:
            raise RowFault("bad_url")
        path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=?~") for part in (parts.path or "/", parts.query))
        return cls(parts.scheme == "https", host, port, f"{path}?{query}" if query else path)

    @property
    def bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def host_header(self) -> str:
        host = self.bracketed_host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Normalised URL without the fragment."""
        return f"{self.origin}{self.path}"

    @property
    def origin(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host_header}"

    @property
    def site(self) -> str:
        """Registrable domain, or the address, and the port."""
        return f"{domains.registrable_domain(self.host)}:{self.port}"

    def is_in(self, allow_hosts: Sequence[str]) -> bool:
        return self.host in allow_hosts or f"{self.host}:{self.port}" in allow_hosts


class _HostLimits:
    """Semaphores of the hosts with requests in flight; idle hosts have none, since a list may contain millions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: weakref.WeakValueDictionary[tuple[str, int], threading.Semaphore] = weakref.WeakValueDictionary()

    def of(self, target: _Target, limit: int) -> threading.Semaphore:
        with self._lock:
            limiter = self._hosts.get((target.host, target.port))
            if limiter is None:
                limiter = self._hosts[target.host, target.port] = threading.Semaphore(limit)
            return limiter


class _Socket(socket.socket):
    """A socket whose reads all end at one deadline, however slowly bytes arrive."""

    deadline: _Deadline

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _end_at(self, self.deadline)
        return super().recv_into(*args, **kwargs)

    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        return super().makefile(*args, **{"buffering": _BUFFER_BYTES, **kwargs})


class _TLSSocket(ssl.SSLSocket):
    deadline: _Deadline

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _end_at(self, self.deadline)
        return super().recv_into(*args, **kwargs)


def _end_at(sock: socket.socket, deadline: _Deadline) -> None:
    """Let the next read end at the deadline. A new timeout is a system call, so it is not set for a hundredth of a second."""
    seconds = deadline.remaining()
    if abs((sock.gettimeout() or 0.0) - seconds) > _TIMER_SECONDS:
        sock.settimeout(seconds)


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    return context
