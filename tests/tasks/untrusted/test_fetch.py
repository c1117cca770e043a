"""Hostile or broken servers, name servers and URLs: each fails with exactly one reason."""

import collections
import concurrent.futures
import contextlib
import datetime
import email.utils
import gzip
import http.server
import ipaddress
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tasks import rows
from tasks.untrusted import fetch, opt_outs, robots
from tasks.untrusted.fetch import Fetcher, is_public, retry_after_seconds
from tasks.untrusted.opt_outs import opted_out

pytestmark = pytest.mark.timeout(120)

DIRECTIVES = ("noai", "noimageai", "none")

INTERNAL = [
    "127.0.0.1",
    "127.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0177.0.1",
    "0",
    "0.0.0.0",
    "00.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "0x0a000001",
    "167772161",
    "012.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.255.255",
    "192.168.257",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.255",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.0.1",
    "168.63.129.16",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::7f00:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:192.168.1.1]",
    "[::ffff:168.63.129.16]",
    "[::ffff:192.0.0.192]",
    "[64:ff9b::168.63.129.16]",
    "[2002:a83f:8110::1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::10.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:a00:1::1]",
    "[2002:c0a8:101::]",
    "[2001::1]",
    "[2001:0:4136:e378:8000:63bf:f5ff:fffe]",
    "[100::1]",
    "[2001:db8::1]",
    "[2001:2::1]",
    "[3fff::1]",
    "[5f00::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[febf::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[::ffff:0:127.0.0.1]",
    "[::ffff:0:7f00:1]",
    "[::ffff:0:a9fe:a9fe]",
    "[64:ff9c::1]",
    "[1::1]",
    "[200::1]",
    "[1fff::1]",
    "[4000::1]",
    "[8000::1]",
    "[e000::1]",
    "[2002::1]",
]

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.254",
    "100.128.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "191.255.255.255",
    "192.0.1.1",
    "192.167.255.255",
    "192.169.0.1",
    "198.17.255.255",
    "198.20.0.1",
    "203.0.112.1",
    "223.255.255.254",
    "2606:4700::1111",
    "2001:4860:4860::8888",
    "2a00:1450:4001::1",
    "64:ff9b::8.8.8.8",
    "::ffff:0:8.8.8.8",
    "3000::1",
    "::ffff:8.8.8.8",
    "2002:808:808::",
    "1.0.0.1",
    "2.2.2.2",
    "9.9.9.9",
    "11.255.255.255",
    "64.233.160.1",
    "99.255.255.255",
    "100.0.0.1",
    "101.0.0.1",
    "151.101.1.1",
    "162.159.200.1",
    "168.62.255.255",
    "168.64.0.0",
    "169.0.0.1",
    "171.255.255.255",
    "172.0.0.1",
    "172.67.1.1",
    "185.199.108.153",
    "191.0.0.1",
    "192.0.3.1",
    "192.1.0.1",
    "192.88.98.255",
    "192.88.100.1",
    "193.0.0.1",
    "198.51.99.255",
    "198.51.101.1",
    "199.0.0.1",
    "203.0.114.1",
    "204.0.0.1",
    "208.67.222.222",
    "2001:200::1",
    "2001:db7:ffff::1",
    "2001:db9::1",
    "2400:cb00::1",
    "2a04:4e42::1",
    "2c0f:fb50::1",
    "3ffe::1",
    "64:ff9b::101:101",
    "::ffff:1.1.1.1",
    "2002:101:101::1",
]


def fetcher(**settings: Any) -> Fetcher:
    defaults: dict[str, Any] = {
        "user_agent": "unclip/0.1", "timeout_seconds": 2.0, "connect_timeout_seconds": 1.0, "max_bytes": 100_000,
        "max_redirects": 3, "retries": 0, "requests_per_host": 4, "respect_robots": False, "max_crawl_delay_seconds": 1.0,
        "opt_out_directives": DIRECTIVES, "allow_ports": range(65536),
    }  # fmt: skip
    return Fetcher(**(defaults | settings))


def reason(url: str, **settings: Any) -> str:
    with pytest.raises(rows.RowFault) as fault:
        fetcher(**settings).fetch(url)
    assert rows.is_reason(fault.value.reason)
    return fault.value.reason


@contextlib.contextmanager
def raw_server(
    answer: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> Iterator[tuple[str, list[bytes]]]:
    """Run a server that hands each connection to `answer` after reading the request."""
    requests: list[bytes] = []
    listener = socket.create_server((host, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                if tls:
                    connection = tls.wrap_socket(connection, server_side=True)
                with connection:
                    requests.append(connection.recv(65536))
                    answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"{host}:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


TDMREP = "/.well-known/tdmrep.json"
Answer = tuple[int, Mapping[str, str], bytes]
IMAGE: Answer = (200, {}, b"body")


class Server(http.server.ThreadingHTTPServer):
    """A server that answers paths, counts requests by path, and records the highest number of concurrent requests."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, answers: Mapping[str, Answer], seconds: float) -> None:
        self.answers, self.seconds = answers, seconds
        self.lock = threading.Lock()
        self.requests: collections.Counter[str] = collections.Counter()
        self.times: list[float] = []
        self.connections = self.in_flight = self.max_in_flight = 0
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        return f"{self.server_address[0]!s}:{self.server_port}"

    def verify_request(self, *_: Any) -> bool:
        self.connections += 1
        return True

    def handle_error(self, *_: Any) -> None:
        pass  # clients may hang up


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 10

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests[self.path] += 1
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        time.sleep(server.seconds)
        with server.lock:
            server.in_flight -= 1
        status, headers, body = server.answers.get(self.path, IMAGE)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(
    answers: Mapping[str, Answer] | None = None, host: str = "127.0.0.3", port: int = 0, seconds: float = 0.0
) -> Iterator[Server]:
    absent = dict.fromkeys(("/robots.txt", TDMREP), (404, {}, b""))
    server = Server(host, port, absent | dict(answers or {}), seconds)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def public_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 127.0.0.3 count as a public address; 127.0.0.2 stays internal."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.3" or is_public(address))


def outcome(url: str, client: Fetcher) -> str:
    """Return "ok" or the reason."""
    try:
        client.fetch(url)
    except rows.RowFault as fault:
        assert rows.is_reason(fault.reason)
        return fault.reason
    return "ok"


def outcomes(urls: list[str], client: Fetcher, threads: int = 16) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda url: outcome(url, client), urls))


def fetch_from(answer: bytes | Callable[[socket.socket], None], **settings: Any) -> str:
    """Return the reason for failing on one raw answer."""
    send = (lambda connection: connection.sendall(answer)) if isinstance(answer, bytes) else answer
    with raw_server(send) as (address, _):
        return reason(f"http://{address}/a.jpg", allow_hosts=(address,), **settings)


def test_the_tables_are_large_enough() -> None:
    assert len(INTERNAL) >= 60 and len(set(PUBLIC)) >= 60 and len(HEADERS) >= 60


@pytest.mark.parametrize("host", INTERNAL)
def test_f55_internal_addresses_are_refused_in_every_spelling(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[Any] = []
    monkeypatch.setattr("tasks.untrusted.fetch._Socket.connect", lambda self, address: dialled.append(address))
    assert reason(f"http://{host}/latest/meta-data") == "blocked_address"
    assert not dialled


@pytest.mark.parametrize("address", PUBLIC)
def test_f55_public_addresses_are_allowed(address: str) -> None:
    assert is_public(address)


def test_f55_only_routable_blocks_are_public() -> None:
    """Python's own list knows what is special, not what is routable."""
    for number in [*range(0, 0x10000, 0x3F), 0x1FFF, 0x2000, 0x3FFE, 0x4000]:
        address = str(ipaddress.IPv6Address(number << 112 | 1))
        special = number in (0x2001, 0x2002, 0x3FFF)  # blocks within, or that carry IPv4
        assert special or is_public(address) == (0x2000 <= number < 0x4000)


@pytest.mark.parametrize("port", [1, 21, 22, 25, 6379, 8265, 9200, 65535])
def test_f55_ports_of_other_services_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[Any] = []
    monkeypatch.setattr("tasks.untrusted.fetch._Socket.connect", lambda self, address: dialled.append(address))
    assert reason(f"http://8.8.8.8:{port}/", allow_ports=(80, 443, 8080, 8443)) == "blocked_port"
    assert not dialled
    assert reason(f"http://127.0.0.1:{port}/", allow_ports=(port,)) == "blocked_address"
    assert Fetcher.allow_ports == (80, 443, 8080, 8443)


def test_f55_a_redirect_to_a_port_of_another_service_is_refused(public_loopback: None) -> None:
    with serve() as server, serve() as other:
        server.answers = {"/a": (302, {"Location": f"http://{other.address}/a"}, b"")}
        ports = (server.server_port,)
        assert reason(f"http://{server.address}/a", allow_ports=ports) == "blocked_port"
        assert server.connections == 1 and not other.connections
        client = fetcher(allow_hosts=(server.address,), allow_ports=())
        assert outcome(f"http://{server.address}/", client) == "ok", "an own host:port needs no other setting"


@pytest.mark.parametrize("entry", ["{}", "127.0.0.2"])
def test_f56_only_the_list_itself_gives_the_rights_of_an_own_host(entry: str, public_loopback: None) -> None:
    """A stranger's redirect to an own server is refused, whether its addresses are cached already or not."""
    with serve(host="127.0.0.2") as own, serve() as stranger:
        aims = {"/in": f"http://{own.address}/secret", "/out": f"http://{stranger.address}/b"}
        aims["/there"] = f"http://{stranger.address}/in"
        stranger.answers |= {path: (302, {"Location": aim}, b"") for path, aim in aims.items()}  # type: ignore[operator]
        own.answers |= {path: (302, {"Location": aim}, b"") for path, aim in aims.items()}  # type: ignore[operator]
        client = fetcher(allow_hosts=(entry.format(own.address),), respect_robots=True)
        for _ in range(2):
            assert outcome(f"http://{stranger.address}/in", client) == "blocked_address"
            assert "/secret" not in own.requests
            assert outcome(f"http://{own.address}/out", client) == "ok", "an own server may send elsewhere"
            assert outcome(f"http://{own.address}/there", client) == "blocked_address", "but not from there to itself"
        assert outcome(f"http://{own.address}/in", client) == "ok", "its own redirect to itself is fine"
        assert own.requests["/robots.txt"] == 0


def test_f9_t4_all_addresses_are_checked_and_resolved_once() -> None:
    answers = [["8.8.8.8", "127.0.0.1"], ["127.0.0.1"]]
    calls: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        calls.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers[len(calls) - 1]]

    assert reason("http://rebinding.example/a.jpg", resolve=resolve) == "blocked_address"
    assert calls == ["rebinding.example"]


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://8.8.8.8/a", "data:image/png;base64,aa", "gopher://8.8.8.8/", "http://", "http:///a",
     "http://user:secret@8.8.8.8/", "http://8.8.8.8:0/", "http://8.8.8.8:99999/", "http://[::1/", "http://a..b/", "",
     "http://8.8.8.8/a\r\nHost: b", "http://8.8\t.8.8/", "\x00http://8.8.8.8/", "http://8.8.8.8/\x7f"],
)  # fmt: skip
def test_f12_t1_invalid_urls_are_refused(url: str) -> None:
    assert reason(url) == "bad_url"


def test_a_valid_answer_is_fetched_with_an_honest_request() -> None:
    with raw_server(lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")) as (address, requests):
        url = f"http://{address}/a b/ü.jpg?q=1 2"
        assert fetcher(allow_hosts=(address,)).fetch(url) == b"body"
        assert fetcher(allow_hosts=("127.0.0.1",)).fetch(url) == b"body"
        assert reason(url, allow_hosts=("127.0.0.1:1",)) == "blocked_address"
    head = requests[0].decode()
    assert head.startswith("GET /a%20b/%C3%BC.jpg?q=1%202 HTTP/1.1\r\n")
    assert f"Host: {address}\r\n" in head and "User-Agent: unclip/0.1\r\n" in head and "identity" in head


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "http_404"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "http_204"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "http_302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "empty_body"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "short_body"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nshort", "short_body"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n", "too_large"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(200_000), "too_large"),
        (b"HTTP/1.1 200 OK\r\nX-Robots-Tag: noai\r\n\r\nbody", "opted_out"),
        (b"\x00\xffnonsense\r\n\r\n", "fetch_error"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\nbody", "fetch_error"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\nbody", "fetch_error"),
        (b"", "connect_error"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2/latest\r\n\r\n", "blocked_address"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1]/\r\n\r\n", "blocked_address"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "bad_url"),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", "redirect_limit"),
    ],
)
def test_a_broken_answer_has_its_reason(answer: bytes, expected: str) -> None:
    """F4, F6, F8, F12, F14."""
    assert fetch_from(answer) == expected


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
def test_f2_dripping_bytes_do_not_hold_a_thread(start: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(400):
            time.sleep(0.1)
            connection.sendall(b"1")

    started = time.monotonic()
    assert fetch_from(drip, timeout_seconds=0.6) == "timeout"
    assert time.monotonic() - started < 20


def test_f9_a_name_server_that_hangs_does_not_hold_a_thread() -> None:
    is_over, started = threading.Event(), time.monotonic()
    found = reason("http://slow.example/", resolve=lambda *_, **__: is_over.wait(60), timeout_seconds=0.3)
    assert found == "dns_timeout" and time.monotonic() - started < 20
    is_over.set()


def test_f9_no_address_and_no_listener() -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("unknown")

    assert reason("http://nowhere.example/", resolve=unknown) == "dns_error"
    with raw_server(lambda _: None) as (address, _):
        pass
    assert reason(f"http://{address}/", allow_hosts=(address,)) == "connect_error"


def test_f10_server_errors_are_retried_and_missing_pages_are_not() -> None:
    for status, attempts in (("503 Busy", 3), ("404 Not Found", 1)):
        with raw_server(lambda c, s=status: c.sendall(f"HTTP/1.1 {s}\r\n\r\n".encode())) as (address, requests):  # type: ignore[misc]
            assert reason(f"http://{address}/", allow_hosts=(address,), retries=2) == f"http_{status[:3]}"
        assert len(requests) == attempts


def test_f11_a_server_without_tls_is_refused() -> None:
    with raw_server(lambda c: c.sendall(b"not TLS at all")) as (address, _):
        assert reason(f"https://{address}/", allow_hosts=(address,)) == "connect_error"


TAG, TDM = "X-Robots-Tag: ", "TDM-Reservation: "
USAGE, SIGNAL = "Content-Usage: ", "Content-Signal: "
HEADERS = {
    TAG + "noai": True,
    TAG + "NoAI": True,
    TAG + "noimageai": True,
    TAG + "NOIMAGEAI": True,
    TAG + "none": True,
    TAG + "None": True,
    TAG + "noindex, noai": True,
    TAG + "noindex,noai": True,
    TAG + "noindex ,\tnoai": True,
    TAG + "noai, index": True,
    TAG + "noai;": True,
    TAG + "noai; noindex": True,
    TAG + "noindex; noai": True,
    TAG + "noai noindex": True,
    TAG + '"noai"': True,
    TAG + "noai=true": True,
    TAG + "noai: 1": True,
    TAG + "all, noai": True,
    TAG + "noindex\r\n" + TAG + "noai": True,
    TAG + "noai\r\n" + TAG + "all": True,
    TAG + "otherbot: noindex\r\n" + TAG + "noai": True,
    TAG + "noindex,\r\n noai": True,
    "x-robots-tag:noai": True,
    "X-ROBOTS-TAG: noai": True,
    TAG + "unclip: noai": True,
    TAG + "UnCLIP: noai": True,
    TAG + "unclip : noai": True,
    TAG + "unclip:noai": True,
    TAG + "unclip/0.1: noai": True,
    TAG + "*: noimageai": True,
    TAG + "otherbot: noindex, unclip: noai": True,
    TAG + "unclip: noindex, noai": True,
    TAG + "unclip: noindex, otherbot: index, unclip: none": True,
    TAG + "some bot: noai": True,
    TAG + "un*: noai": True,
    TAG + ": noai": True,
    TAG + ":: noai": True,
    TAG + "otherbot: x: noai": True,
    TAG + "unavailable_after: 25 Jun 2010 15:00:00 PST, noai": True,
    TAG + "unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noimageai": True,
    TAG + "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, none": True,
    TAG + "unavailable_after: 2010-06-25T15:00:00+02:00, noai": True,
    TAG + "unavailable_after: 25 Jun 2010 15:00:00 PST noai": True,
    TAG + "unavailable_after: Fri, 25 Jun 2010 noai": True,
    TAG + "unclip: unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai": True,
    TAG + "max-snippet: 20, noai": True,
    TAG + "max-image-preview: none, noai": True,
    TAG + "max-image-preview:none,none": True,
    TDM + "1": True,
    TDM + " 1 ": True,
    TDM + "true": True,
    TDM + "yes": True,
    TDM + "2": True,
    TDM + "": True,
    TDM + "0, 1": True,
    TDM + "0.0": True,
    TDM + "0\r\n" + TDM + "1": True,
    TDM + "0\r\n" + TAG + "noai": True,
    "tdm-reservation: 1\r\nTDM-Policy: https://example.com/policy.json": True,
    TDM + "0": False,
    TDM + " 0 ": False,
    "TDM-Policy: https://example.com/policy.json": False,
    TAG + "": False,
    TAG + "all": False,
    TAG + "index, follow": False,
    TAG + "noindex": False,
    TAG + "noindex, nofollow": False,
    TAG + "noarchive, nosnippet, notranslate": False,
    TAG + "noaim": False,
    TAG + "nonesuch": False,
    TAG + "max-image-preview: none": False,
    TAG + "max-image-preview:none, max-snippet:-1": False,
    TAG + "otherbot: max-image-preview: none": False,
    TAG + "unavailable_after: 25 Jun 2010 15:00:00 PST": False,
    TAG + "unavailable_after: Friday, 25-Jun-10 15:00:00 PST": False,
    TAG + "otherbot: noai": False,
    TAG + "otherbot: none": False,
    TAG + "otherbot/2.1: noai": False,
    TAG + "otherbot: noindex, noai": False,
    TAG + "unclip: noindex, otherbot: noai": False,
    TAG + "otherbot: unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai": False,
    USAGE + "train-ai=n": True,
    USAGE + "ai=n": True,
    USAGE + "bots=n": True,
    USAGE + "search=y, train-ai=n": True,
    USAGE + "train-ai=n;exact;since=2025, search=y": True,
    USAGE + "train-ai=y, train-ai=n": True,
    USAGE + "train-ai=n, train-ai=y": True,
    USAGE + "train-ai=y\r\n" + USAGE + "ai=n": True,
    USAGE + "search=y,\r\n train-ai=n": True,
    USAGE + "train-ai": True,
    USAGE + "train-ai=?0": True,
    USAGE + 'train-ai="y"': True,
    USAGE + "train-ai=Y": True,
    USAGE + "train-ai=no": True,
    USAGE + "train-ai=(y n)": True,
    USAGE + "Train-AI=n": True,
    USAGE + "train-ai = n": True,
    USAGE + "search=y train-ai=n": True,
    USAGE + "search=y;": True,
    USAGE + 'search="y': True,
    USAGE + "search=y,": True,
    USAGE + "<none>": True,
    "content-usage:train-ai=n": True,
    USAGE + "": False,
    USAGE + "train-ai=y": False,
    USAGE + "ai=y;exact, search=n": False,
    USAGE + "search=n": False,
    USAGE + 'note="a, train-ai=n", train-ai=y': False,
    USAGE + 'other=(a "b" 1);q=0.5, new=?1, date=@1700000000, bytes=:YQ==:, flag': False,
    SIGNAL + "ai-train=no": True,
    SIGNAL + "search=yes,ai-train=no": True,
    SIGNAL + "search=yes, ai-train = no , use=reference": True,
    SIGNAL + "AI-Train=No": True,
    SIGNAL + "ai-train=yes\r\n" + SIGNAL + "ai-train=no": True,
    SIGNAL + "ai-train=maybe": True,
    SIGNAL + "ai-train": True,
    SIGNAL + "search=yes; ai-train=no": True,
    SIGNAL + "search=yes ai-train=no": True,
    SIGNAL + "search=yes,": True,
    SIGNAL + "": False,
    SIGNAL + "ai-train=yes": False,
    SIGNAL + "search=no, ai-input=no, ai-train=yes": False,
    SIGNAL + "search=no": False,
    "Content-Signals: ai-train=no": False,
    "X-Robots: noai": False,
    "Robots: noai": False,
}
"""Header lines of an answer -> True if they forbid `unclip` to use the image."""


@pytest.mark.parametrize("headers", HEADERS)
def test_t12_opt_out_headers_are_respected(headers: str) -> None:
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n{headers}\r\n\r\nbody".encode()
    with raw_server(lambda connection: connection.sendall(answer)) as (address, _):
        found = outcome(f"http://{address}/", fetcher(allow_hosts=(address,)))
    assert found == ("opted_out" if HEADERS[headers] else "ok")


def test_t12_hostile_preferences_take_no_time() -> None:
    for text in (
        "a" * 60_000,
        "a=(" * 20_000,
        "a;" * 30_000,
        'a="' + "\\" * 60_000,
        "a=1 ," * 12_000,
        "a=" + "9" * 60_000 + ".",
    ):
        started = time.process_time()
        opt_outs.usage_refused(text), opt_outs.signal_refused(text)
        opt_outs.preferences(f"User-agent: *\nContent-Usage: /{text} train-ai=n\n" * 5, "unclip")
        assert time.process_time() - started < 5


def test_t12_hostile_headers_and_robots_txt_take_no_time() -> None:
    started = time.process_time()
    assert not opted_out(["max-" * 16_000, "max-a" + " " * 60_000, "max-a:" * 12_000], "unclip", ("noai",))
    for line in ("\n", " ", "user-agent: ", "user-agent:\n", "\t \r\n"):
        assert robots.parse(line.encode() * (robots.MAX_BYTES // len(line)), "unclip") is not None
    assert time.process_time() - started < 30
    rules = robots.parse(b" User-Agent : unclip/1.0 \nDisallow: /a\n", "unclip")
    assert rules is not None and not rules.fetching.can_fetch("http://a.example/a", "unclip")
    assert not opted_out(["max-image-preview: none, max-snippet:-1"], "unclip", ("none",))


def test_t12_directives_are_a_setting() -> None:
    assert opted_out(["noindex"], "unclip", ("noindex",)) and not opted_out(["noai"], "unclip", ("noindex",))
    assert not opted_out(["noai", ""], "unclip", ())


def test_t12_a_redirect_may_opt_out() -> None:
    assert fetch_from(b"HTTP/1.1 302 Found\r\nX-Robots-Tag: noai\r\nLocation: /a\r\n\r\n") == "opted_out"


RULE = '{"location": "%s", "tdm-reservation": %s}'
TDM_FILES = {
    b"[]": "ok",
    b"": "ok",
    b"<!doctype html><title>Home</title>": "ok",
    b"\xef\xbb\xbf\n<html>": "ok",
    f"[{RULE % ('/', 1)}]".encode(): "opted_out",
    f"[{RULE % ('/*', 1)}]".encode(): "opted_out",
    f"[{RULE % ('/pictures/*.jpg', 1)}]".encode(): "opted_out",
    f"[{RULE % ('/*.jpg$', 1)}]".encode(): "opted_out",
    f"[{RULE % ('/', 0)}]".encode(): "ok",
    f"[{RULE % ('/private', 1)}]".encode(): "ok",
    f"[{RULE % ('/pictures/', 0)}, {RULE % ('/', 1)}]".encode(): "ok",
    f"[{RULE % ('/pictures/', 1)}, {RULE % ('/', 0)}]".encode(): "opted_out",
    f"[{RULE % ('/', 0)}, {RULE % ('/', 1)}]".encode(): "opted_out",
    f"[{RULE % ('/', chr(34) + '0' + chr(34))}]".encode(): "ok",
    f"[{RULE % ('/', 'true')}]".encode(): "opted_out",
    f"[{RULE % ('/', 'null')}]".encode(): "opted_out",
    f"[{RULE % ('/', 1)}".encode(): "opted_out",
    b'[{"location": "/private"}]': "opted_out",
    b'[{"location": 1, "tdm-reservation": 0}]': "opted_out",
    b'{"location": "/private", "tdm-reservation": 1}': "opted_out",
    b"[" * 100_000: "opted_out",
    b"nonsense": "opted_out",
    "[]".encode("utf-16"): "opted_out",
    b"7": "opted_out",
    b" " * 500_001: "opted_out",
}
"""Bodies of tdmrep.json -> what becomes of /pictures/a.jpg."""


@pytest.mark.parametrize("body", TDM_FILES, ids=lambda body: repr(body[:60]))
def test_f60_t12_tdmrep_json_is_obeyed_and_asked_for_once(body: bytes, public_loopback: None) -> None:
    with serve({TDMREP: (200, {}, body)}) as server:
        client = fetcher(respect_robots=True)
        found = outcomes([f"http://{server.address}/pictures/a.jpg"] * 4, client)
        assert found == [TDM_FILES[body]] * 4 and server.requests[TDMREP] == 1
        assert server.requests["/pictures/a.jpg"] == (4 if found[0] == "ok" else 0)
        assert outcome(f"http://{server.address}/pictures/a.jpg", fetcher(respect_robots=False)) == "ok"
        assert server.requests[TDMREP] == 1


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        *((status, {}, "ok") for status in (204, 401, 403, 404, 410)),
        *((status, {}, "robots_unreachable") for status in (429, 500, 503)),
        (302, {"Location": TDMREP}, "ok"),
        (302, {"Location": "/home"}, "ok"),
        (302, {"Location": "http://127.0.0.2/"}, "ok"),
        (200, {"Content-Encoding": "gzip"}, "opted_out"),
        (200, {"Content-Length": "99"}, "robots_unreachable"),
    ],
)
def test_f60_a_tdmrep_json_that_is_not_there_reserves_nothing(
    status: int, headers: dict[str, str], expected: str, public_loopback: None
) -> None:
    """Many servers refuse all paths with a dot, or answer them with a page; one that is down may have it."""
    answers = {TDMREP: (status, headers, b"" if status == 204 else b"[]"), "/home": (200, {}, b"<html>")}
    with serve(answers) as server:
        assert outcome(f"http://{server.address}/a.jpg", fetcher(respect_robots=True)) == expected


ROBOTS = {
    b"": "ok",
    b"# nothing\n": "ok",
    b"User-agent: *\nDisallow:\n": "ok",
    b"User-agent: *\nDisallow: /private\n": "ok",
    b"User-agent: *\nDisallow: /\n": "robots_disallowed",
    b"User-agent: *\nDisallow: /pictures\n": "robots_disallowed",
    b"User-agent: *\nDisallow: /*.jpg$\n": "robots_disallowed",
    b"User-agent: *\nDisallow: /\nAllow: /pictures/\n": "ok",
    b"\xef\xbb\xbfUser-agent: *\r\nDisallow: /\r\n": "robots_disallowed",
    b"User-agent: otherbot\nDisallow: /\n": "ok",
    b"User-agent: otherbot\nUser-agent: unclip\nDisallow: /\n": "robots_disallowed",
    b"user-agent: UNCLIP\ndisallow: /\n": "robots_disallowed",
    b"User-agent: unclip/2.0\nDisallow: /\n": "robots_disallowed",
    b"User-agent: *\nDisallow: /\n\nUser-agent: unclip\nAllow: /\n": "ok",
    b"<!doctype html><title>Home</title>": "robots_unreachable",
    b"\n <html>User-agent: *\nAllow: /": "robots_unreachable",
    b"User-agent: *\nDisallow: /\xe9t\xe9\n": "robots_unreachable",
    b"User-agent: *\nAllow: /\n\0": "robots_unreachable",
    "User-agent: *\nAllow: /\n".encode("utf-16"): "robots_unreachable",
    b"#" * 499_999: "ok",
    b"#" * 500_001: "robots_unreachable",
    b"User-agent: *\nDisallow: /" + b"*a" * 5000 + b"*b$\n": "ok",
    b"User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /\n": "opted_out",
    b"User-agent: *\nContent-Usage: train-ai=n\n": "opted_out",
    b"User-agent: *\nContent-Usage train-ai=n\n": "opted_out",
    b"User-agent: *\nContent-Usage: unreadable;\n": "opted_out",
    b"User-agent: *\nContent-Usage: *.jpg train-ai=n\n": "opted_out",
    b"CONTENT-SIGNAL: ai-train=no # everywhere\nUser-agent: unclip\nAllow: /": "opted_out",
    b"User-agent: a\nUser-agent: unclip\nContent-Signal: ai-train=no\n\nUser-agent: b\nAllow: /\n": "opted_out",
    b"User-agent: UnCLIP/2.0\nContent-Usage: ai=n": "opted_out",
    b"User-agent: unclip\nAllow: /\n\nUser-agent: *\nDisallow:\n\nUser-agent: unclip\nContent-Usage: ai=n": "opted_out",
    b"User-agent: *\nContent-Usage: /pictures/ train-ai=n\nContent-Usage: train-ai=y": "opted_out",
    b"User-agent: *\nContent-Usage: train-ai=y\nContent-Usage: ai=n": "opted_out",
    b"User-agent: *\nContent-Usage: /*.jpg$ train-ai=n": "opted_out",
    b"User-agent: *\nContent-Signal: /pic%74ures ai-train=no": "opted_out",
    b"User-agent: *\nContent-Usage: /" + b"*a" * 5000 + b"*b$ train-ai=n\n": "ok",
    b"User-agent: *\nContent-Usage: /pictures/ train-ai=y\nContent-Usage: train-ai=n": "ok",
    b"User-agent: *\nContent-Signal: /private ai-train=no": "ok",
    b"User-agent: *\nContent-Usage: /*.png$ train-ai=n": "ok",
    b"User-agent: *\nContent-Usage: /pictures$ train-ai=n": "ok",
    b"User-agent: *\nContent-Signal: search=no,ai-train=yes": "ok",
    b"User-agent: otherbot\nContent-Signal: ai-train=no\n\nUser-agent: *\nAllow: /": "ok",
    b"User-agent: *\nContent-Signal: ai-train=no\n\nUser-agent: unclip\nAllow: /": "ok",
    b"# Content-Signal: ai-train=no\nUser-agent: *\nAllow: /": "ok",
}


@pytest.mark.parametrize("body", ROBOTS, ids=lambda body: repr(body[:60]))
def test_t12_robots_txt_is_obeyed(body: bytes, public_loopback: None) -> None:
    with serve({"/robots.txt": (200, {}, body)}) as server:
        found = outcome(f"http://{server.address}/pictures/a.jpg", fetcher(respect_robots=True))
        assert server.requests["/robots.txt"] == 1
        assert server.requests["/pictures/a.jpg"] == (found == "ok")
        assert found == ROBOTS[body]
        assert outcome(f"http://{server.address}/pictures/a.jpg", fetcher(respect_robots=False)) == "ok"
        assert server.requests["/robots.txt"] == 1


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        *((status, {}, "ok") for status in (400, 404, 405, 410, 418, 451)),
        *((status, {}, "robots_unreachable") for status in (204, 304, 401, 403, 429, 500, 502, 503)),
        (301, {"Location": "/moved.txt"}, "ok"),
        (302, {"Location": "/robots.txt"}, "robots_unreachable"),
        (302, {"Location": "file:///etc/passwd"}, "robots_unreachable"),
        (302, {"Location": "http://127.0.0.2/robots.txt"}, "robots_unreachable"),
        (200, {"X-Robots-Tag": "noai, none"}, "ok"),  # applies to robots.txt itself, not to images
        (200, {"Content-Encoding": "gzip"}, "robots_unreachable"),
        (200, {"Content-Length": "99"}, "robots_unreachable"),
    ],
)
def test_robots_txt_that_cannot_be_fetched_forbids_everything(
    status: int, headers: dict[str, str], expected: str, public_loopback: None
) -> None:
    answers = {"/robots.txt": (status, headers, b"" if status in (204, 304) else b"#"), "/moved.txt": (200, {}, b"#")}
    with serve(answers) as server:
        url = f"http://{server.address}/a.jpg"
        assert outcome(url, fetcher(respect_robots=True)) == expected
        assert outcome(url, fetcher(respect_robots=True, allow_hosts=(server.address,))) == "ok"


def test_robots_txt_of_a_host_that_does_not_answer(public_loopback: None) -> None:
    with serve() as server:
        pass
    assert reason(f"http://{server.address}/a.jpg", respect_robots=True) == "connect_error"


def test_robots_txt_is_requested_once_by_all_threads_and_obeyed_after_redirects(public_loopback: None) -> None:
    forbidding = {"/robots.txt": (200, {}, b"User-agent: *\nDisallow: /secret")}
    with serve(forbidding, seconds=0.02) as other, serve(seconds=0.02) as server:
        server.answers = {**server.answers, "/away": (302, {"Location": f"http://{other.address}/secret"}, b"")}
        client = fetcher(respect_robots=True)
        assert set(outcomes([f"http://{server.address}/{number}" for number in range(40)], client)) == {"ok"}
        assert set(outcomes([f"http://{server.address}/away"] * 8, client)) == {"robots_disallowed"}
        assert server.requests["/robots.txt"] == other.requests["/robots.txt"] == 1
        assert server.requests["/away"] == 8 and "/secret" not in other.requests


def test_robots_txt_is_requested_again_after_it_expires(public_loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        client = fetcher(respect_robots=True)
        monkeypatch.setattr(robots, "_RULES_LAST_SECONDS", 0.0)
        for _ in range(3):
            client.fetch(f"http://{server.address}/a.jpg")
        assert server.requests["/robots.txt"] == 3


def test_a_hostile_list_of_hosts_does_not_fill_the_memory() -> None:
    loaded: list[str] = []

    def load(url: str) -> bytes:
        if url.endswith(TDMREP):
            raise rows.RowFault("http_404")
        loaded.append(url)
        return b"#" * 400_000

    known = robots.Robots()
    for number in [*range(30), 29, 0]:
        assert known.admit(f"http://host-{number}.example/a", "unclip", load, 1.0) == 0
    assert len(loaded) == 31 and loaded[-1] == "http://host-0.example/robots.txt"
    assert 1 <= len(known._hosts) <= 10


@pytest.mark.parametrize(
    ("delay", "longest", "expected"), [("0.15", 9.0, 0.15), ("86400", 0.15, 0.15), ("nan", 9.0, 0)]
)
def test_crawl_delay_spaces_requests_without_using_up_their_timeout(
    delay: str, longest: float, expected: float, public_loopback: None
) -> None:
    with serve({"/robots.txt": (200, {}, f"User-agent: *\nCrawl-delay: {delay}".encode())}) as server:
        client = fetcher(respect_robots=True, max_crawl_delay_seconds=longest, timeout_seconds=1.0)
        assert outcomes([f"http://{server.address}/{number}" for number in range(10)], client) == ["ok"] * 10
        gaps = [after - before for before, after in itertools.pairwise(server.times[2:])]  # the first two are for rules
        assert sum(gaps) >= 9 * expected * 0.9


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrent_requests_per_host_are_limited(limit: int, public_loopback: None) -> None:
    with serve(seconds=0.02) as server, serve(seconds=0.02) as other_port:
        urls = [f"http://{each.address}/{number}" for number in range(30) for each in (server, other_port)]
        client = fetcher(requests_per_host=limit, respect_robots=True, timeout_seconds=1.0)
        assert outcomes(urls, client) == ["ok"] * 60
        assert server.max_in_flight == other_port.max_in_flight == limit


def test_an_allowed_host_has_no_limit() -> None:
    with serve(seconds=0.1) as server:
        client = fetcher(requests_per_host=1, respect_robots=True, allow_hosts=(server.address,), timeout_seconds=10.0)
        assert outcomes([f"http://{server.address}/{number}" for number in range(32)], client) == ["ok"] * 32
        assert server.max_in_flight > 1 and "/robots.txt" not in server.requests


def test_hosts_that_redirect_to_each_other_do_not_deadlock(public_loopback: None) -> None:
    with serve() as one, serve() as two:
        one.answers = {**one.answers, "/a": (302, {"Location": f"http://{two.address}/b"}, b"")}
        two.answers = {**two.answers, "/a": (302, {"Location": f"http://{one.address}/b"}, b"")}
        urls = [f"http://{server.address}/a" for server in (one, two)] * 16
        client = fetcher(requests_per_host=1, respect_robots=True, timeout_seconds=10.0)
        assert outcomes(urls, client) == ["ok"] * 32
        assert one.max_in_flight == two.max_in_flight == 1


CANARY = "127.0.0.2"
SPELLINGS = [
    "127.0.0.2", "127.2", "127.0.2", "2130706434", "0x7f000002", "0X7F000002", "0x7f.0.0.2", "0x7f.0x0.0x0.0x2", "0x7f.2",
    "0177.0.0.2", "0177.0.0.02", "0177.0x0.0.2", "017700000002", "0177.2", "00177.0.0.2", "127.0x2", "127.0.0.2.",
    "127。0。0。2", "127．0．0．2", "１２７.0.0.2", "①②⑦.0.0.2", "%31%32%37.0.0.2", "127.0.0.2%00",
    "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "[0:0:0:0:0:ffff:7f00:2]", "[::FFFF:7F00:2]", "[::127.0.0.2]", "[::7f00:2]",
    "[64:ff9b::127.0.0.2]", "[64:ff9b::7f00:2]", "[64:ff9b:1::7f00:2]", "[2002:7f00:2::]", "[2002:7f00:2::1]",
    "[::ffff:127.0.0.2%25lo]", "[::1]",
    "internal.example", "INTERNAL.example.", "both.example", "mapped.example", "ünicode.example", "metadata.internal",
]  # fmt: skip
NAMES = {
    "internal.example": [CANARY],
    "both.example": ["8.8.8.8", CANARY],
    "mapped.example": [f"::ffff:{CANARY}"],
    "xn--nicode-2ya.example": [CANARY],
    "metadata.internal": ["169.254.169.254", CANARY],
}
FRAMES = [
    "http://{}:{}/", "https://{}:{}/", "HTTP://{}:{}/a.jpg?from=http://8.8.8.8/", "http://{}:{}/#@8.8.8.8/",
    "http://{}:{}//8.8.8.8/a.jpg", "http://8.8.8.8@{}:{}/", "http://user:secret@{}:{}/", "http://8.8.8.8\\@{}:{}/",
    "http://8.8.8.8%40{}:{}/", "http://{}:{}\r\nHost: 8.8.8.8/", "ht\ttp://{}:{}/", "http:\\\\{}:{}\\", "http:{}:{}/",
    "//{}:{}/", "ftp://{}:{}/", "gopher://{}:{}/", "file://{}:{}/", "dict://{}:{}/", "jar:http://{}:{}!/", "ws://{}:{}/",
]  # fmt: skip


def resolve_offline(host: str, port: int, **_: Any) -> list[Any]:
    """Resolve numeric addresses as the system reads them, and `NAMES`, without network access."""
    numbers = NAMES.get(host, [host])
    found = [
        answer
        for number in numbers
        for answer in socket.getaddrinfo(number, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    ]
    if all(is_public(address[0]) for *_, address in found):
        raise socket.gaierror("offline")
    return found


def ssrf_corpus(port: int) -> list[str]:
    framed = [frame.format(host, port) for host in SPELLINGS for frame in FRAMES]
    return framed + [f"http://{host}:{port}/latest/meta-data" for host in INTERNAL]


def test_t1_t2_no_url_reaches_an_internal_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(host=CANARY) as canary:
        corpus = ssrf_corpus(canary.server_port)
        assert len(set(corpus)) >= 400
        client = fetcher(resolve=resolve_offline, respect_robots=True, timeout_seconds=5.0)
        found = collections.Counter(outcome(url, client) for url in corpus)
        assert canary.connections == 0
        assert set(found) == {"blocked_address", "bad_url", "dns_error"}
        # Without the check, the same list reaches the canary: so it is the check that kept it from being reached.
        monkeypatch.setattr(fetch, "is_public", lambda _: True)
        unchecked = fetcher(resolve=resolve_offline, connect_timeout_seconds=0.05, timeout_seconds=0.2)
        for host in SPELLINGS:
            outcome(f"http://{host}:{canary.server_port}/", unchecked)
        assert canary.connections >= 15


def test_t3_no_redirect_reaches_an_internal_address() -> None:
    with serve(host=CANARY) as canary, serve(host="127.0.0.1") as server:
        targets = [target for target in ssrf_corpus(canary.server_port) if target.isascii() and target.isprintable()]
        targets = [target for target in targets if not target.startswith(("http:\\", "http:127", "http:[", "http:0"))]
        statuses = itertools.cycle((301, 302, 303, 307, 308))
        server.answers = {
            f"/{number}": (status, {"Location": target}, b"")
            for number, (status, target) in enumerate(zip(statuses, targets, strict=False))
        }
        client = fetcher(resolve=resolve_offline, allow_hosts=(server.address,), timeout_seconds=5.0)
        paths = list(server.answers)
        assert len(paths) >= 400
        found = collections.Counter(outcome(f"http://{server.address}{path}", client) for path in paths)
        assert canary.connections == 0
        assert found["blocked_address"] >= 150 and "connect_error" not in found and "timeout" not in found
        assert outcome(f"http://{canary.address}/", fetcher(allow_hosts=(CANARY,))) == "ok" and canary.connections == 1


def test_public_addresses_are_cached_and_refused_ones_are_looked_up_every_time(public_loopback: None) -> None:
    lookups: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        lookups.append(host)
        address = CANARY if host == "inside.example" else "127.0.0.3"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    with serve() as public:
        client = fetcher(resolve=resolve)
        for _ in range(3):
            assert outcome(f"http://outside.example:{public.server_port}/a.jpg", client) == "ok"
            assert outcome(f"http://inside.example:{public.server_port}/a.jpg", client) == "blocked_address"
    assert collections.Counter(lookups) == {"outside.example": 1, "inside.example": 3}


def test_t4_dns_rebinding_never_gets_through(public_loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ADDRESSES_LAST_SECONDS", 0.0)
    with serve() as public, serve(host=CANARY, port=public.server_port) as canary:
        answers = itertools.cycle(["127.0.0.3", CANARY])

        def alternate(host: str, port: int, **_: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

        url = f"http://rebinding.example:{public.server_port}/a.jpg"
        client = fetcher(resolve=alternate, timeout_seconds=10.0)
        found = collections.Counter(outcome(url, client) for _ in range(1000))
        assert found == {"ok": 500, "blocked_address": 500}
        # Here the name also changes between the image and its robots.txt.
        found = collections.Counter(
            outcome(url, fetcher(resolve=alternate, respect_robots=True, timeout_seconds=10.0)) for _ in range(99)
        )
        assert set(found) <= {"robots_unreachable", "blocked_address"}
        assert canary.connections == 0 and public.connections == 500


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5), (" 120 ", 120), ("0", 0), (None, None), ("", None), ("soon", None), ("-1", None), ("1.5", None), ("²", None),
     ("Fri, 31 Dec 1999 23:59:59 GMT", 0), ("Fri, 99 Dec 1999 23:59:59 GMT", None)],
)  # fmt: skip
def test_f10_retry_after_is_parsed(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value) == seconds


def test_f10_retry_after_as_a_date() -> None:
    date = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1), usegmt=True)
    seconds = retry_after_seconds(date)
    assert seconds is not None and 3500 < seconds <= 3600


@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Busy"])
def test_f10_retries_wait_as_long_as_a_busy_server_asks(status: str, as_date: bool) -> None:
    times: list[float] = []

    def answer(connection: socket.socket) -> None:
        times.append(time.time())
        soon = email.utils.formatdate(times[0] + 2, usegmt=True) if as_date else "1"
        busy = f"HTTP/1.1 {status}\r\nRetry-After: {soon}\r\n\r\n"
        connection.sendall(busy.encode() if len(times) == 1 else b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")

    with raw_server(answer) as (address, _):
        client = fetcher(allow_hosts=(address,), retries=1, timeout_seconds=20.0)
        assert client.fetch(f"http://{address}/") == b"body"
    assert times[1] - times[0] >= 0.95


def test_f10_a_server_busy_beyond_the_deadline_is_requested_once() -> None:
    busy = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3600\r\n\r\n"
    with raw_server(lambda connection: connection.sendall(busy)) as (address, requests):
        started = time.monotonic()
        assert reason(f"http://{address}/", allow_hosts=(address,), retries=3, timeout_seconds=60) == "http_429"
        assert len(requests) == 1 and time.monotonic() - started < 20


def test_f10_transient_errors_are_retried() -> None:
    answers = itertools.chain(
        [
            b"HTTP/1.1 500 Oops\r\n\r\n",
            b"HTTP/1.1 429 Slow\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
            b"",
        ],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"],
    )
    with raw_server(lambda connection: connection.sendall(next(answers))) as (address, requests):
        client = fetcher(allow_hosts=(address,), retries=4, timeout_seconds=60.0)
        assert client.fetch(f"http://{address}/") == b"body"
        assert len(requests) == 5


def test_f10_an_unresponsive_host_costs_one_deadline_for_all_its_rows(public_loopback: None) -> None:
    """Its robots.txt is requested once in five minutes, and the result holds for all rows."""
    with serve(seconds=1.0) as silent, serve() as other:
        client = fetcher(respect_robots=True, timeout_seconds=0.4)
        urls = [f"http://{silent.address}/{number}" for number in range(60)]
        found = outcomes([*urls, f"http://{other.address}/"], client, threads=4)
        assert found == ["timeout"] * 60 + ["ok"]
        assert silent.connections == 1


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_after(data: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(data)
        reset(connection)

    return answer


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def endless_informational(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


BOMB = gzip.compress(bytes(10_000_000), mtime=0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(lambda _: time.sleep(0.8), "timeout", id="F1 no answer"),
        pytest.param(reset, "connect_error", id="F3 reset before the headers"),
        pytest.param(reset_after(b"HTTP/1.1 200 OK\r\n"), "connect_error", id="F3 reset in the headers"),
        pytest.param(reset_after(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"), "connect_error", id="F3 in the body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbody", "short_body", id="F4 short"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nbody", "ok", id="F5 no length: decoding decides"),
        pytest.param(endless, "too_large", id="F6 endless"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + BOMB, "bad_encoding", id="F7 bomb"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2/latest/meta-data\r\n\r\n", "blocked_address", id="F8"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: http://[fd00:ec2::254]/\r\n\r\n", "blocked_address", id="F8 IPv6"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "bad_url", id="F8 file"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: /a.jpg\r\n\r\n", "redirect_limit", id="F8 loop"),
        pytest.param(b"nonsense\r\n\r\n", "fetch_error", id="F12 status line"),
        pytest.param(b"HTTP/0.9 200 OK\r\n\r\nbody", "ok", id="F12 HTTP/0.9"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 65536 + b"\r\n\r\nbody", "fetch_error", id="F12 64 KB header"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + b"HTTP/1.1 200 OK\r\n\r\nbody", "ok", id="F12 100 x 100"),
        pytest.param(endless_informational, "timeout", id="F12 endless 100"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nbody", "ok", id="F12 negative length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nbody", "short_body", id="F12 chunk size"),
    ],
)  # fmt: skip
def test_each_server_fault_has_its_reason(answer: bytes | Callable[[socket.socket], None], expected: str) -> None:
    send = (lambda connection: connection.sendall(answer)) if isinstance(answer, bytes) else answer
    with raw_server(send) as (address, _):
        found = outcome(f"http://{address}/a.jpg", fetcher(allow_hosts=(address,), timeout_seconds=0.6))
    assert found == expected


@pytest.mark.parametrize(
    ("coding", "expected"),
    [("gzip", "bad_encoding"), ("GZIP", "bad_encoding"), ("x-gzip", "bad_encoding"), ("deflate", "bad_encoding"),
     ("br", "bad_encoding"), ("zstd", "bad_encoding"), ("identity, gzip", "bad_encoding"), ("aws-chunked", "bad_encoding"),
     ("identity", "ok"), ("Identity", "ok"), ("", "ok")],
)  # fmt: skip
def test_f7_only_unencoded_bodies_are_accepted(coding: str, expected: str) -> None:
    with serve({"/a": (200, {"Content-Encoding": coding}, b"body")}) as server:
        assert outcome(f"http://{server.address}/a", fetcher(allow_hosts=(server.address,))) == expected


EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "expected"),
    [(EARLY, "ok"), (EARLY * 3 + b"HTTP/1.1 100 Continue\r\n\r\n" + EARLY, "ok"), (b"HTTP/1.1 102 Processing\r\n\r\n", "ok"),
     (EARLY * 1000, "fetch_error"), (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "http_101")],
)  # fmt: skip
def test_f59_interim_responses_are_skipped_up_to_a_bound(before: bytes, expected: str) -> None:
    answer = before + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    with raw_server(lambda connection: connection.sendall(answer)) as (address, _):
        assert outcome(f"http://{address}/a", fetcher(allow_hosts=(address,))) == expected


@pytest.mark.parametrize(
    ("location", "path"),
    [("/bücher/Å.jpg".encode(), "/b%C3%BCcher/%C3%85.jpg"), ("/日本?ü".encode(), "/%E6%97%A5%E6%9C%AC?%C3%BC"),
     (b"/caf\xe9.jpg", "/caf%E9.jpg"), (b"/%C3%BC b", "/%C3%BC%20b")],
)  # fmt: skip
def test_f59_a_location_may_hold_raw_bytes(location: bytes, path: str) -> None:
    answers = iter([b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody"])
    with raw_server(lambda connection: connection.sendall(next(answers))) as (address, requests):
        assert outcome(f"http://{address}/a", fetcher(allow_hosts=(address,))) == "ok"
    assert requests[1].decode().startswith(f"GET {path} HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("faß.de", "xn--fa-hia.de"), ("FAẞ.de", "xn--fa-hia.de"), ("βόλος.com", "xn--nxasmm1c.com"),
     ("MÜNCHEN.de", "xn--mnchen-3ya.de"), ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"), ("ｅxample。com", "example.com"),
     ("example.com.", "example.com"), ("a_b.bücher.de", "a_b.xn--bcher-kva.de"), ("１２７.0.0.1", "127.0.0.1"),
     ("i❤.ws", None), ("a..ü.de", None), ("ü" * 60 + ".de", None)],
)  # fmt: skip
def test_f59_international_names_are_looked_up_as_browsers_do(host: str, expected: str | None) -> None:
    """IDNA 2008 with UTS #46: faß.de is not fass.de."""
    if expected is None:
        assert reason(f"http://{host}/") == "bad_url"
    else:
        assert fetch.host_of(f"http://{host}/") == expected


def test_f58_an_answer_names_the_url_and_hosts_of_its_redirects(public_loopback: None) -> None:
    with serve() as server, serve(host="127.0.0.1") as own:
        aims = {"/a": "/b", "/b": f"http://127.0.0.3:{own.server_port}/c", "/out": f"http://{server.address}/b"}
        server.answers |= {path: (302, {"Location": aim}, b"") for path, aim in aims.items()}  # type: ignore[operator]
        own.answers |= {path: (302, {"Location": aim}, b"") for path, aim in aims.items()}  # type: ignore[operator]
        aims["/b"] = f"http://{server.address}/d"
        server.answers |= {"/b": (302, {"Location": "/d"}, b"")}  # type: ignore[operator]
        client = fetcher(allow_hosts=(own.address,))
        assert client.get(f"http://{server.address}/d") == fetch.Fetched(b"body")
        assert client.get(f"http://{server.address}/a") == fetch.Fetched(b"body", f"http://{server.address}/d")
        found = client.get(f"http://{own.address}/out")
        assert found == fetch.Fetched(b"body", f"http://{server.address}/d", ("127.0.0.3",))


@contextlib.contextmanager
def forwarding_proxy(status: bytes = b"200 OK") -> Iterator[tuple[str, list[bytes]]]:
    """Run a proxy that sends plain requests and tunnels for any name to the port that is asked for, on 127.0.0.3."""

    def answer(connection: socket.socket, request: bytes) -> None:
        method, target, _ = request.split(b"\r\n")[0].decode().split(" ")
        authority = target if method == "CONNECT" else target.split("/")[2]
        if status != b"200 OK":
            return connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
        with socket.create_connection(("127.0.0.3", int(authority.rpartition(":")[2]))) as upstream:
            if method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                upstream.sendall(request)
            threading.Thread(target=pump, args=(connection, upstream), daemon=True).start()
            pump(upstream, connection)

    requests: list[bytes] = []
    with raw_server(lambda connection: answer(connection, requests[-1])) as (address, seen):
        requests = seen
        yield address, seen


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def resolve_public(host: str, port: int, **_: Any) -> list[Any]:
    """Every name has a public address, except those of the proxy and of an internal host."""
    numbers = {"internal.example": "10.0.0.1", "127.0.0.1": "127.0.0.1"}
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (numbers.get(host, "8.8.8.8"), port))]


def test_f57_a_proxy_gets_only_requests_whose_target_was_checked(public_loopback: None) -> None:
    with serve() as server, serve(host="127.0.0.1") as own, forwarding_proxy() as (proxy, requests):
        server.answers |= {"/in": (302, {"Location": "http://internal.example/"}, b"")}  # type: ignore[operator]
        settings = {"proxy": f"http://{proxy}", "resolve": resolve_public, "allow_hosts": (own.address,)}
        client = fetcher(**settings)
        name = f"pictures.example:{server.server_port}"
        assert client.get(f"http://{name}/a b.jpg").body == b"body"
        assert requests[0].startswith(f"GET http://{name}/a%20b.jpg HTTP/1.1\r\nHost: {name}\r\n".encode())
        assert server.requests["http://" + name + "/a%20b.jpg"] == 1
        assert outcome("http://internal.example/", client) == "blocked_address"
        assert outcome("http://pictures.example:22/", fetcher(**settings, allow_ports=(80,))) == "blocked_port"
        assert outcome("http://127.0.0.1/", client) == "blocked_address"
        assert outcome(f"http://{own.address}/a.jpg", client) == "ok", "own hosts are reached directly"
        assert len(requests) == 1
    assert reason("http://pictures.example/", **settings) == "connect_error", "the proxy is gone"


def test_f57_https_goes_through_a_tunnel(certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    with forwarding_proxy() as (proxy, requests):
        settings = {"proxy": f"http://{proxy}", "allow_hosts": (), "resolve": resolve_public}
        found, _ = fetch_over_tls("valid", answer, certificates, monkeypatch, host="127.0.0.3", **settings)
        assert found == "ok" and requests[0].startswith(b"CONNECT pictures.example:")
        found, _ = fetch_over_tls("wrong_host", answer, certificates, monkeypatch, host="127.0.0.3", **settings)
        assert found == "connect_error"
    with forwarding_proxy(b"403 Forbidden") as (proxy, requests):
        assert reason("https://pictures.example/", **settings | {"proxy": f"http://{proxy}"}) == "connect_error"
        assert reason("http://pictures.example/", **settings | {"proxy": f"http://{proxy}"}) == "http_403"


def test_f57_the_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server, forwarding_proxy() as (proxy, requests):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy}")
        assert outcome(f"http://{server.address}/", fetcher(allow_hosts=(server.address,))) == "ok" and not requests


@pytest.mark.parametrize("kind", ["text/html", "application/json", "image/png", "", "\xff", "image/svg+xml"])
def test_f13_the_content_type_does_not_matter(kind: str) -> None:
    with serve({"/a": (200, {"Content-Type": kind}, b"body")}) as server:
        assert outcome(f"http://{server.address}/a", fetcher(allow_hosts=(server.address,))) == "ok"


def test_f1_an_unresponsive_server_delays_no_other_row() -> None:
    is_over = threading.Event()

    def wait(_: socket.socket) -> None:
        is_over.wait(60)

    with raw_server(wait) as (silent, _), serve() as server:
        client = fetcher(allow_hosts=(silent, server.address), timeout_seconds=0.5)
        started = time.monotonic()
        found = outcomes(
            [f"http://{silent}/", *(f"http://{server.address}/{number}" for number in range(30))], client, 4
        )
        assert found == ["timeout"] + ["ok"] * 30
        assert time.monotonic() - started < 20
        is_over.set()


def test_f9_each_name_server_fault_has_its_reason() -> None:
    def fails(code: int) -> Callable[..., Any]:
        def resolve(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(code, "no")

        return resolve

    def many(host: str, port: int, **_: Any) -> list[Any]:
        addresses = [ipaddress.ip_address("8.8.0.0") + number for number in range(999)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (str(ip), port)) for ip in [*addresses, CANARY]]

    assert reason("http://missing.example/", resolve=fails(socket.EAI_NONAME)) == "dns_error"
    assert reason("http://broken.example/", resolve=fails(socket.EAI_AGAIN)) == "dns_error"
    assert reason("http://many.example/", resolve=many) == "blocked_address"
    assert reason("http://none.example/", resolve=lambda *_, **__: []) == "connect_error"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return kind -> file of key and certificate; `trusted` lists all certificates except the self-signed one."""
    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    files = {}
    for kind, host, until in (
        ("valid", "pictures.example", now + day),
        ("wrong_host", "other.example", now + day),
        ("expired", "pictures.example", now - day),
        ("self_signed", "pictures.example", now + day),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, kind)])
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - 2 * day, until)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files[kind] = folder / f"{kind}.pem"
        files[kind].write_bytes(private + certificate.public_bytes(pem))
        if kind != "self_signed":
            with open(folder / "trusted.pem", "ab") as trusted:
                trusted.write(certificate.public_bytes(pem))
    return files | {"trusted": folder / "trusted.pem"}


def fetch_over_tls(
    kind: str,
    answer: bytes,
    certificates: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    host: str = "127.0.0.1",
    **settings: Any,
) -> tuple[str, list[bytes]]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates["trusted"]))
    fetch._tls.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates[kind])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    try:
        with raw_server(lambda connection: connection.sendall(answer), context, host) as (address, requests):
            given = {"allow_hosts": ("pictures.example",), "resolve": resolve, "timeout_seconds": 10.0} | settings
            client = fetcher(**given)
            return outcome(f"https://pictures.example:{address.rpartition(':')[2]}/a.jpg", client), requests
    finally:
        fetch._tls.cache_clear()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("valid", "ok"), ("wrong_host", "connect_error"), ("expired", "connect_error"), ("self_signed", "connect_error")],
)
def test_f11_only_a_valid_certificate_is_accepted(
    kind: str, expected: str, certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    found, requests = fetch_over_tls(kind, answer, certificates, monkeypatch)
    assert found == expected and len(requests) == (expected == "ok")


@pytest.mark.parametrize("location", ["http://pictures.example/a.jpg", "HTTP://8.8.8.8/", "http:/a.jpg"])
def test_t3_https_does_not_become_http(
    location: str, certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode()
    found, requests = fetch_over_tls("valid", answer, certificates, monkeypatch)
    assert found == "insecure_redirect" and len(requests) == 1
