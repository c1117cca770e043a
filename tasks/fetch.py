"""Fetch bytes from URLs that nobody vouched for: public addresses only, bounded in bytes, redirects and wall time.

The name is resolved once, every address it has is checked, and the connection goes to a checked address: so neither
another spelling of an internal address, nor a redirect, nor a name server that changes its answer gets around the check.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from tasks.rows import RowFault

_CHUNK_BYTES = 1 << 16
_RETRIED = re.compile(r"dns_error|connect_error|short_body|http_5\d\d")
_REDIRECTS = (301, 302, 303, 307, 308)

# Python 3.11 calls some of these global: a cloud's metadata service (192.0.0.192), another's (168.63.129.16), 6to4 relays,
# site-local IPv6. The list is whole, so that it does not depend on the version.
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
    """Whether an IP address belongs to the open internet; of an IPv6 address that carries an IPv4 one, that one counts."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(str(carried))
    return ip.is_global and not any(ip.version == network.version and ip in network for network in _NOT_PUBLIC)


def opted_out(values: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers forbid use for AI to everyone, or to `agent` (lower case, without its version).

    A value is a list of directives, each perhaps with a value of its own, which apply to the robot named before them. What
    cannot be parsed counts as said to us.
    """
    for value in values:
        robot = "*"
        for item in value.lower().split(","):
            name, colon, rest = item.rpartition(":")
            name = name.strip()
            if colon and re.fullmatch(r"unavailable_after.*|max-[a-z-]+", name):
                rest = ""  # a directive with a value, such as a date
            elif colon:
                robot = name if re.fullmatch(r"[a-z0-9_.*-]+", name) else "*"
            if re.search(r"\bno(image)?ai\b", rest) and robot in ("*", agent):
                return True
    return False


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """How URLs are fetched; safe to share between threads."""

    user_agent: str
    timeout_seconds: float
    """For one URL, with its redirects and retries."""
    connect_timeout_seconds: float
    """For one address."""
    max_bytes: int
    max_redirects: int
    retries: int
    allow_hosts: tuple[str, ...] = ()
    """`host` or `host:port` that may be fetched although they are not public."""
    resolve: Callable[..., Any] = socket.getaddrinfo

    def fetch(self, url: str) -> bytes:
        """The body behind a URL.

        Raises:
            RowFault: one of the reasons of `tasks.rows`; nothing else.
        """
        deadline = time.monotonic() + self.timeout_seconds
        for pause in (*(0.2 * 2**attempt for attempt in range(self.retries)), None):
            try:
                return self._follow(url, deadline)
            except RowFault as fault:
                worth = _RETRIED.fullmatch(fault.reason) and pause is not None
                if not worth or time.monotonic() + pause >= deadline:
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, url: str, deadline: float) -> bytes:
        for _ in range(self.max_redirects + 1):
            try:
                answer = self._get(url, deadline)
            except RowFault:
                raise
            except TimeoutError:
                raise RowFault("timeout") from None
            except (OSError, http.client.RemoteDisconnected):
                raise RowFault("connect_error") from None
            except http.client.IncompleteRead:
                raise RowFault("short_body") from None
            except Exception:  # whatever a hostile server makes of HTTP, it costs this row only
                raise RowFault("fetch_error") from None
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise RowFault("redirect_limit")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """The body, or the URL to which the server redirects."""
        target = _Target.parse(url)
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = self._dial(target, deadline)
        with contextlib.closing(connection):
            headers = {"Host": target.host_header, "User-Agent": self.user_agent}
            headers |= {"Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
            connection.request("GET", target.path, headers=headers)
            with connection.getresponse() as response:
                if response.status in _REDIRECTS and response.headers["Location"]:
                    return urllib.parse.urljoin(url, response.headers["Location"])
                if response.status != 200:
                    raise RowFault(f"http_{response.status}")
                agent = self.user_agent.partition("/")[0].lower()
                if opted_out(response.headers.get_all("X-Robots-Tag", []), agent):
                    raise RowFault("opted_out")
                return self._read(response)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        announced, body = response.length, bytearray()
        if announced is not None and announced > self.max_bytes:
            raise RowFault("too_large")
        while chunk := response.read(_CHUNK_BYTES):
            body += chunk
            if len(body) > self.max_bytes:
                raise RowFault("too_large")
        if announced is not None and len(body) != announced:
            raise RowFault("short_body")
        if not body:
            raise RowFault("empty_body")
        return bytes(body)

    def _dial(self, target: "_Target", deadline: float) -> socket.socket:
        """Connect to one of the host's addresses, after checking all of them."""
        lookup = _resolvers().submit(self.resolve, target.host, target.port, type=socket.SOCK_STREAM)
        try:
            found = lookup.result(_left(deadline))
        except (socket.gaierror, UnicodeError):
            raise RowFault("dns_error") from None
        allowed = target.host in self.allow_hosts or f"{target.host}:{target.port}" in self.allow_hosts
        if not allowed and not all(is_public(address[0]) for *_, address in found):
            raise RowFault("blocked_address")
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in found:
            sock = _Socket(family, kind, protocol)
            try:
                sock.settimeout(min(self.connect_timeout_seconds, _left(deadline)))
                sock.connect(address)
                sock.settimeout(_left(deadline))
                if target.tls:
                    sock = _tls().wrap_socket(sock, server_hostname=target.host)  # type: ignore[assignment]
                sock.deadline = deadline
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure


@dataclasses.dataclass(frozen=True)
class _Target:
    tls: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "_Target":
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode()
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


class _Socket(socket.socket):
    """A socket whose every read ends at one deadline, however slowly the bytes drip."""

    deadline: float

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*args, **kwargs)


class _TLSSocket(ssl.SSLSocket):
    deadline: float

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*args, **kwargs)


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    return context


@functools.cache
def _resolvers() -> concurrent.futures.ThreadPoolExecutor:
    # The system's resolver knows no timeout, so it is waited for from outside.
    return concurrent.futures.ThreadPoolExecutor(max_workers=32, thread_name_prefix="resolve")
