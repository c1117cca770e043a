"""Fetch bytes from untrusted URLs: public addresses only, bounded in bytes, redirects and wall time.

Each name is resolved once, all its addresses are checked, and the connection goes to a checked address. So an unusual
spelling of an internal address, a redirect, or a name server that changes its answer cannot bypass the check.

Every request, including redirects, obeys the host's robots.txt and its limit of concurrent requests. Hosts in `allow_hosts`
belong to the operator: they need not be public, and neither rule applies to them. Opt-outs that a server declares for the
image itself (`tasks.untrusted.opt_outs`) apply to all hosts.
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

_CHUNK_BYTES = 1 << 16
_RETRIED = re.compile(r"dns_error|connect_error|short_body|http_429|http_5\d\d")
_OPT_OUTS = ("x-robots-tag", "tdm-reservation", "content-usage", "content-signal")
_REDIRECTS = (301, 302, 303, 307, 308)
_ADDRESSES_LAST_SECONDS = 30.0  # a long list overloads name servers first
_NO_ADDRESS_LASTS_SECONDS = 60.0
_MAX_ADDRESSES = 100_000
_BACKOFF_SECONDS = 0.2  # before the first retry; doubles

# Python 3.11 treats some of these as global: two clouds' metadata services (192.0.0.192, 168.63.129.16), 6to4 relays,
# site-local IPv6. The list is complete, so it does not depend on the Python version.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
            "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
            "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7",
            "fe80::/10", "fec0::/10", "ff00::/8",
        ),
    )
)  # fmt: skip
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return True for an address of the public internet. An IPv4 address embedded in an IPv6 address decides for it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(str(carried))
    return ip.is_global and not any(ip.version == network.version and ip in network for network in _NOT_PUBLIC)


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


def _sites_of(urls: Iterable[str]) -> set[str]:
    found = set()
    for url in urls:
        with contextlib.suppress(RowFault):
            found.add(_Target.parse(url).site)
    return found


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
    dns_timeout_seconds: float = 5.0
    """For one look-up."""
    site_seconds: float = 60.0
    """Time that a site's requests may take without an answer; see `budgets.Sites`."""
    resolve: Callable[..., Any] = socket.getaddrinfo
    _robots: robots.Robots = dataclasses.field(default_factory=robots.Robots, init=False, repr=False, compare=False)
    _addresses: dict[tuple[str, int], tuple[float, list[Any] | str]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Host and port -> expiry (monotonic time) and checked addresses, or the reason why there are none."""
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
        return self._try(url, for_robots=False)

    def take_budgets(self, urls: Iterable[str], spent: Mapping[str, budgets.Spent]) -> None:
        """Take over the budgets of the sites of some URLs from another process."""
        if spent or not self._sites.are_full():
            self._sites.set(_sites_of(urls), spent)

    def hand_on_budgets(self, urls: Iterable[str], spent: Mapping[str, budgets.Spent]) -> Mapping[str, budgets.Spent]:
        """Return budgets for another process: those of the sites of some URLs, and `spent` for all other sites."""
        if not spent and self._sites.are_full():
            return {}
        sites = _sites_of(urls)
        return {site: left for site, left in spent.items() if site not in sites} | self._sites.get(sites)

    def _try(self, url: str, for_robots: bool) -> bytes:
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

    def _follow(self, url: str, deadline: _Deadline, for_robots: bool) -> bytes:
        for _ in range(self.max_redirects + 1):
            try:
                answer = self._get(url, deadline, for_robots)
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
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise RowFault("redirect_limit")

    def _get(self, url: str, deadline: _Deadline, for_robots: bool) -> bytes | str:
        """Return the body, or the URL of a redirect."""
        target = _Target.parse(url)
        self._sites.check(target.site)
        addresses = self._resolve_checked(target, deadline)
        with self._admission(target, deadline, for_robots), self._sites.request(target.site):
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = self._connect(target, addresses, deadline)
            with contextlib.closing(connection):
                headers = {"Host": target.host_header, "User-Agent": self.user_agent}
                headers |= {"Accept": "text/plain,*/*;q=0.5" if for_robots else "image/*,*/*;q=0.5"}
                connection.request("GET", target.path, headers=headers | {"Accept-Encoding": "identity"})
                with connection.getresponse() as response:
                    return self._read_answer(target, response, for_robots)

    @contextlib.contextmanager
    def _admission(self, target: "_Target", deadline: _Deadline, for_robots: bool) -> Iterator[None]:
        """Wait until the host's crawl delay and request limit allow a request. Waiting extends the deadline."""
        if target.is_in(self.allow_hosts):
            yield
            return
        started = time.monotonic()
        if self.respect_robots and not for_robots:
            load = functools.partial(self._try, for_robots=True)
            time.sleep(self._robots.admit(target.url, self.agent, load, self.max_crawl_delay_seconds))
        with self._host_limits.of(target, self.requests_per_host):
            deadline.at += time.monotonic() - started
            yield

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
            url: str = urllib.parse.urljoin(target.url, location)
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
        known = self._addresses.get((target.host, target.port))
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
        if not target.is_in(self.allow_hosts) and not all(is_public(address[0]) for *_, address in found):
            raise RowFault("blocked_address")
        self._remember(target, found, _ADDRESSES_LAST_SECONDS)
        return found

    def _remember(self, target: "_Target", found: list[Any] | str, seconds: float) -> None:
        if len(self._addresses) >= _MAX_ADDRESSES:
            self._addresses.clear()
        self._addresses[target.host, target.port] = time.monotonic() + seconds, found

    def _connect(self, target: "_Target", addresses: Sequence[Any], deadline: _Deadline) -> socket.socket:
        """Connect to the first address that answers."""
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            sock = _Socket(family, kind, protocol)
            try:
                sock.settimeout(min(self.connect_timeout_seconds, deadline.remaining()))
                sock.connect(address)
                sock.settimeout(deadline.remaining())
                if target.tls:
                    sock = _tls().wrap_socket(sock, server_hostname=target.host)  # type: ignore[assignment]
                sock.deadline = deadline
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure


def _is_plain(codings: Iterable[str], harmless: str) -> bool:
    return all(coding.strip().lower() in ("", harmless) for value in codings for coding in value.split(","))


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    announced, body = response.length, bytearray()
    if announced is not None and announced > max_bytes:
        raise RowFault("too_large")
    while chunk := response.read(_CHUNK_BYTES):
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

    @classmethod
    def parse(cls, url: str) -> "_Target":
        if re.search(r"[\x00-\x1f\x7f]", url):  # urlsplit would silently remove some of them
            raise RowFault("bad_url")
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode().removesuffix(".")
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise RowFault("bad_url") from None
        if not host or "@" in parts.netloc or parts.port == 0:
            raise RowFault("bad_url")
        path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=?~") for part in (parts.path or "/", parts.query))
        return cls(parts.scheme == "https", host, port, f"{path}?{query}" if query else path)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Normalised URL without the fragment."""
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.path}"

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
        self.settimeout(self.deadline.remaining())
        return super().recv_into(*args, **kwargs)


class _TLSSocket(ssl.SSLSocket):
    deadline: _Deadline

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(self.deadline.remaining())
        return super().recv_into(*args, **kwargs)


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    return context
