"""What a hostile or broken server, name server or URL can do, and the one reason that comes of it."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tasks import rows
from tasks.fetch import Fetcher, is_public, opted_out

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
    "64:ff9c::1",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
    "2002:808:808::",
]


def fetcher(**settings: Any) -> Fetcher:
    defaults: dict[str, Any] = {
        "user_agent": "unclip/0.1", "timeout_seconds": 2.0, "connect_timeout_seconds": 1.0, "max_bytes": 100_000,
        "max_redirects": 3, "retries": 0, "requests_per_host": 4, "respect_robots": False, "max_crawl_delay_seconds": 1.0,
        "opt_out_directives": DIRECTIVES,
    }  # fmt: skip
    return Fetcher(**(defaults | settings))


def reason(url: str, **settings: Any) -> str:
    with pytest.raises(rows.RowFault) as fault:
        fetcher(**settings).fetch(url)
    assert rows.is_reason(fault.value.reason)
    return fault.value.reason


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that hands each connection to `answer` after reading the request."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                requests.append(connection.recv(65536))
                answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def fetch_from(answer: bytes | Callable[[socket.socket], None], **settings: Any) -> str:
    """The reason that comes of one raw answer."""
    send = (lambda connection: connection.sendall(answer)) if isinstance(answer, bytes) else answer
    with raw_server(send) as (address, _):
        return reason(f"http://{address}/a.jpg", allow_hosts=(address,), **settings)


def test_the_tables_are_large_enough() -> None:
    assert len(INTERNAL) >= 60 and len(PUBLIC) >= 20


@pytest.mark.parametrize("host", INTERNAL)
def test_internal_addresses_are_refused_however_they_are_spelled(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[Any] = []
    monkeypatch.setattr("tasks.fetch._Socket.connect", lambda self, address: dialled.append(address))
    assert reason(f"http://{host}/latest/meta-data") == "blocked_address"
    assert not dialled


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(address)


def test_addresses_are_checked_all_and_resolved_once() -> None:
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
     "http://user:secret@8.8.8.8/", "http://8.8.8.8:0/", "http://8.8.8.8:99999/", "http://[::1/", "http://a..b/", ""],
)  # fmt: skip
def test_what_is_no_web_address_is_refused(url: str) -> None:
    assert reason(url) == "bad_url"


def test_a_sound_answer_is_fetched_with_an_honest_request() -> None:
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
    assert fetch_from(answer) == expected


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
def test_dripping_bytes_do_not_hold_a_thread(start: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(40):
            time.sleep(0.1)
            connection.sendall(b"1")

    started = time.monotonic()
    assert fetch_from(drip, timeout_seconds=0.6) == "timeout"
    assert time.monotonic() - started < 1.2


def test_a_name_server_that_hangs_does_not_hold_a_thread() -> None:
    started = time.monotonic()
    assert reason("http://slow.example/", resolve=lambda *_, **__: time.sleep(3), timeout_seconds=0.3) == "timeout"
    assert time.monotonic() - started < 1


def test_no_address_and_no_listener() -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("unknown")

    assert reason("http://nowhere.example/", resolve=unknown) == "dns_error"
    with raw_server(lambda _: None) as (address, _):
        pass
    assert reason(f"http://{address}/", allow_hosts=(address,)) == "connect_error"


def test_server_errors_are_tried_again_and_missing_pages_are_not() -> None:
    for status, attempts in (("503 Busy", 3), ("404 Not Found", 1)):
        with raw_server(lambda c, s=status: c.sendall(f"HTTP/1.1 {s}\r\n\r\n".encode())) as (address, requests):  # type: ignore[misc]
            assert reason(f"http://{address}/", allow_hosts=(address,), retries=2) == f"http_{status[:3]}"
        assert len(requests) == attempts


def test_an_untrusted_certificate_is_refused() -> None:
    with raw_server(lambda c: c.sendall(b"not TLS at all")) as (address, _):
        assert reason(f"https://{address}/", allow_hosts=(address,)) == "connect_error"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("noai", True),
        ("NoImageAI", True),
        ("noindex, noai", True),
        ("unclip: noai", True),
        ("*: noimageai", True),
        ("otherbot: noai", False),
        ("otherbot: noindex, noai", False),
        ("otherbot: noindex, unclip: noai", True),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noimageai", True),
        ("max-snippet: 20, noai", True),
        ("some bot: noai", True),
        (": noai", True),
        ("noai;", True),
        ("index, follow", False),
        ("noindex", False),
        ("", False),
    ],
)
def test_robots_headers(value: str, expected: bool) -> None:
    assert opted_out([value], "unclip", DIRECTIVES) is expected
    assert opted_out(["all", value], "unclip", DIRECTIVES) is expected
