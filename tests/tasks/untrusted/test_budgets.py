"""Sites and name servers that do not answer: they cost their own rows, in bounded time."""

import collections
import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tasks import rows
from tasks.untrusted import budgets, fetch, robots
from tasks.untrusted.budgets import Lookups, Sites
from tests.tasks.untrusted.test_fetch import fetcher, outcome, outcomes, raw_server, serve

pytestmark = pytest.mark.timeout(120)


def answer(host: str, port: int, address: str = "127.0.0.1") -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


class NameServer:
    """Look-ups of `*.slow*` do not return before the end of the test, those of `*.gone` fail."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.asked: list[str] = []

    def resolve(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        if ".slow" in host:
            self.closing.wait()
        if ".slow" in host or host.endswith(".gone"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        if host.endswith(".busy"):
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return answer(host, port)


@pytest.fixture
def names() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.closing.set()


def test_f62_a_hundred_slow_names_do_not_hold_up_other_hosts(names: NameServer) -> None:
    """Each has a name server of its own, so nothing but their time tells them from the others."""
    with serve(host="127.0.0.1") as server:
        port = server.server_port
        client = fetcher(
            resolve=names.resolve, allow_hosts=tuple(f"host{number}.example:{port}" for number in range(20)),
            timeout_seconds=5.0, dns_timeout_seconds=1.5,
        )  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            slow = [pool.submit(outcome, f"http://a.slow{number}.example/", client) for number in range(100)]
            started = time.monotonic()
            while len(names.asked) < 100 and time.monotonic() - started < 1:
                time.sleep(0.01)
            found = outcomes([f"http://host{number}.example:{port}/a.jpg" for number in range(20)], client)
            assert found == ["ok"] * 20 and sum(row.done() for row in slow) < 50, "they waited for the slow names"
            assert {row.result() for row in slow} == {"dns_timeout"}


def test_f62_one_name_server_that_hangs_holds_a_few_look_ups_only(names: NameServer) -> None:
    lookups = Lookups()

    def look_up(host: str) -> str:
        try:
            lookups.find(names.resolve, host, 80, seconds=0.3)
        except TimeoutError:
            return "late"
        return "found"

    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        started = time.monotonic()
        late = pool.map(look_up, [f"a{number}.slow.example" for number in range(40)] + ["a1.slow.example"] * 10)
        assert set(late) == {"late"} and time.monotonic() - started < 5, "one after the other they take 15 s"
        assert len(names.asked) == budgets._LOOKUPS_PER_DOMAIN
        assert look_up("other.example.org") == "found"
        names.closing.set()
        while lookups._pending:
            time.sleep(0.01)
        assert not lookups._of_domain and look_up("www.example.com") == "found"


def test_f62_a_name_is_looked_up_once_by_all_threads_and_failures_are_remembered(names: NameServer) -> None:
    client = fetcher(resolve=names.resolve, retries=1, dns_timeout_seconds=0.2)
    for host, reason, most in (
        ("a.gone", "dns_error", 16),
        ("b.slow.example", "dns_timeout", 1),
        ("c.busy", "dns_error", 64),
    ):
        names.asked.clear()
        assert outcomes([f"http://{host}/{number}" for number in range(16)], client) == [reason] * 16
        num_asked = len(names.asked)
        assert 1 <= num_asked <= most
        assert outcome(f"http://{host}/again", client) == reason
        assert (len(names.asked) == num_asked) == (host != "c.busy"), (
            "only what may pass at once is asked again at once"
        )


def test_f62_a_look_up_that_hangs_ends_with_the_url(names: NameServer) -> None:
    started = time.monotonic()
    assert outcome("http://a.slow.example/", fetcher(resolve=names.resolve, timeout_seconds=0.3)) == "dns_timeout"
    assert time.monotonic() - started < 20


@contextlib.contextmanager
def tarpit() -> Iterator[tuple[str, list[bytes], threading.Event]]:
    """Address of a server that answers only once the event is set, and its requests."""
    is_well, closing, waiting = threading.Event(), threading.Event(), []

    def hang(connection: socket.socket) -> None:
        if is_well.is_set():
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody")
        else:
            waiting.append(connection.dup())

    with raw_server(hang) as (address, requests):
        yield address, requests, is_well
    closing.set()
    for connection in waiting:
        connection.close()


def test_f63_a_site_that_stalls_costs_its_budget_and_no_more() -> None:
    with tarpit() as (address, requests, _):
        client = fetcher(allow_hosts=(address,), timeout_seconds=0.5, site_seconds=3.0)
        started = time.monotonic()
        found = collections.Counter(
            outcomes([f"http://{address}/{number}" for number in range(400)], client, threads=4)
        )
        assert time.monotonic() - started < 10, "all time-outs together take 50 s"
    # Each request counts as a second at least; four are under way when the budget ends.
    assert 3 <= found["timeout"] <= 6 and len(requests) == found["timeout"]
    assert found["site_unreachable"] == 400 - found["timeout"]


def test_f63_requests_under_way_count_so_that_none_starts_just_before_the_budget_ends() -> None:
    with tarpit() as (address, requests, _):
        client = fetcher(allow_hosts=(address,), timeout_seconds=1.0, site_seconds=6.5)
        found = collections.Counter(outcomes([f"http://{address}/{number}" for number in range(40)], client, threads=4))
    # Two rounds of four. Once the first of the second round has failed, the other three have all but spent the rest.
    assert len(requests) == found["timeout"] == 8 and found["site_unreachable"] == 32


def test_f63_all_hosts_of_a_site_share_its_budget_and_other_sites_have_their_own(names: NameServer) -> None:
    with serve(host="127.0.0.1") as server:
        port = server.server_port
        client = fetcher(
            resolve=names.resolve, allow_hosts=(f"www.example.org:{port}",), dns_timeout_seconds=0.1, site_seconds=5.0
        )
        urls = [f"http://a{number}.slow.example.com/" for number in range(100)]
        found = collections.Counter(outcomes(urls, client, threads=4))
        assert found["site_unreachable"] >= 90 and found["dns_timeout"] == 100 - found["site_unreachable"]
        assert outcome(f"http://www.example.org:{port}/a.jpg", client) == "ok"


def test_f63_refused_connections_close_a_site_and_http_errors_do_not() -> None:
    with raw_server(lambda _: None) as (address, _):
        pass
    client = fetcher(allow_hosts=(address,), site_seconds=5.0)
    found = outcomes([f"http://{address}/{number}" for number in range(20)], client, threads=1)
    assert found == ["connect_error"] * 5 + ["site_unreachable"] * 15
    with serve({"/a": (503, {}, b"")}) as server:
        client = fetcher(allow_hosts=(server.address,), site_seconds=5.0)
        assert outcomes([f"http://{server.address}/a"] * 20, client) == ["http_503"] * 20


def test_f64_a_site_that_answers_again_is_open_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_FIRST_PAUSE_SECONDS", 0.4)
    with tarpit() as (address, requests, is_well):
        client = fetcher(allow_hosts=(address,), timeout_seconds=0.3, site_seconds=4.0)
        while outcome(f"http://{address}/a", client) != "site_unreachable":
            pass
        num_requests = len(requests)
        is_well.set()
        assert outcomes([f"http://{address}/{number}" for number in range(50)], client) == ["site_unreachable"] * 50
        assert len(requests) == num_requests
        time.sleep(0.5)
        assert outcome(f"http://{address}/probe", client) == "ok"
        assert outcomes([f"http://{address}/{number}" for number in range(50)], client) == ["ok"] * 50


def test_f64_a_closed_site_gets_one_probe_at_a_time_with_pauses_that_double(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: clock[0])
    sites = Sites(budget_seconds=5.0, timeout_seconds=2.0)
    for _ in range(3):
        sites.check("a")
        sites.failed("a", 2.0)
    probes = []
    for second in range(0, 1000, 10):
        clock[0] = 1000.0 + second
        passed = [may_ask(sites, "a", number) for number in range(4)]
        assert sum(passed) <= 1
        if any(passed):
            probes.append(second)
    assert probes == [30, 90, 210, 450, 930]
    sites.answered("a")
    sites.check("a")
    sites.answered("unknown")
    for _ in range(9):
        sites.answered("a")
    assert not sites._sites, "sites that answer take no memory"


def may_ask(sites: Sites, site: str, _: int) -> bool:
    """Ask in a thread of its own."""
    found = []

    def ask() -> None:
        with contextlib.suppress(rows.RowFault):
            sites.check(site)
            found.append(True)
            sites.failed(site, 2.0)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return bool(found)


def test_f63_a_site_that_answers_now_and_then_spends_its_budget_too() -> None:
    sites = Sites(budget_seconds=60.0, timeout_seconds=10.0)
    for share, closes in ((0.1, False), (0.5, True)):
        site = f"{share}"
        with contextlib.suppress(rows.RowFault):
            for number in range(1000):
                sites.check(site)
                if int((number + 1) * share) > int(number * share):
                    sites.failed(site, 10.0)
                else:
                    sites.answered(site)
            number += 1
        assert (number < 1000) == closes, (share, number)


def test_f64_an_answer_to_a_probe_for_robots_txt_does_not_open_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    waiting = []

    def answer_about_robots(connection: socket.socket) -> None:
        if b".jpg" in requests[-1]:
            waiting.append(connection.dup())
        else:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with raw_server(answer_about_robots) as (address, requests):
        client = fetcher(respect_robots=True, timeout_seconds=0.3, site_seconds=3.0)
        urls = [f"http://{address}/{number}.jpg" for number in range(5)]
        client.take_budgets(urls, {address: budgets.Spent(3.0, 30.0, next_probe=time.time())})
        assert outcomes(urls, client, threads=1) == ["timeout"] + ["site_unreachable"] * 4
        assert len(waiting) == 1 and len(requests) == 3
    waiting[0].close()


def test_f64_a_robots_txt_that_forbids_the_images_opens_a_site_since_no_image_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    with serve({"/robots.txt": (200, {}, b"User-agent: *\nDisallow: /")}) as server:
        client = fetcher(respect_robots=True, site_seconds=3.0)
        urls = [f"http://{server.address}/{number}.jpg" for number in range(5)]
        client.take_budgets(urls, {server.address: budgets.Spent(3.0, 30.0, next_probe=time.time())})
        assert outcomes(urls, client, threads=1) == ["robots_disallowed"] * 5
        # Rules that are known are no answer: rows of one host do not pay for those of another host of the site.
        closed = {server.address: budgets.Spent(3.0, 30.0, next_probe=time.time())}
        client.take_budgets(urls, closed)
        assert outcomes(urls, client, threads=1) == ["robots_disallowed"] * 5
        assert client.hand_on_budgets(urls, {})[server.address].seconds == 3.0


def test_f63_only_failures_of_the_next_hosts_are_taken_over_and_few_are_handed_on() -> None:
    client, later = fetcher(respect_robots=True), time.time() + 100
    count = budgets.MOST_HANDED_ON + 5
    spent: fetch.Spent = {
        f"http://host{number}": robots.Unreached("timeout", later + number) for number in range(count)
    }
    client.take_budgets(["http://host7/a.jpg"], spent)
    assert client._robots.unreached(spent) == {"http://host7": robots.Unreached("timeout", pytest.approx(later + 7))}
    left = client.hand_on_budgets(["http://host7/a.jpg"], spent)
    assert len(left) == budgets.MOST_HANDED_ON and "http://host0" not in left and "http://host7" in left


def test_f63_the_next_process_takes_over_what_a_site_has_spent() -> None:
    with tarpit() as (address, requests, is_well), serve(host="127.0.0.1") as server:
        urls = [f"http://{address}/{number}" for number in range(8)] + [f"http://{server.address}/a.jpg", "nonsense"]
        settings: dict[str, Any] = {
            "allow_hosts": (address, server.address),
            "timeout_seconds": 0.3,
            "site_seconds": 3.0,
        }
        first, second = fetcher(**settings), fetcher(**settings)
        assert outcomes(urls, first, threads=1) == ["timeout"] * 3 + ["site_unreachable"] * 5 + ["ok", "bad_url"]
        elsewhere = {"other.example:80": budgets.Spent(5.0, 30.0, time.time())}
        spent = first.hand_on_budgets(urls, elsewhere)
        assert spent.keys() == {address, "other.example:80"}
        second.take_budgets(urls, spent)
        assert outcomes(urls, second, threads=1) == ["site_unreachable"] * 8 + ["ok", "bad_url"]
        assert len(requests) == 3
        # Of the sites of its URLs it knows what it was told, and no more.
        is_well.set()
        second.take_budgets(urls, {})
        assert outcomes(urls[:2], second, threads=1) == ["ok"] * 2


def test_a_hostile_list_of_sites_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_MAX_SITES", 100)
    sites = Sites(60.0, 10.0)
    for number in range(1000):
        sites.failed(f"site{number}.example", 1.0)
    assert len(sites._sites) <= 100


def test_robots_txt_of_a_host_that_stalls_has_the_reason_of_its_images(
    names: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    with tarpit() as (address, requests, _):
        client = fetcher(respect_robots=True, timeout_seconds=0.3)
        assert outcomes([f"http://{address}/{number}" for number in range(8)], client) == ["timeout"] * 8
        assert len(requests) == 1


def test_f63_the_next_process_knows_whose_robots_txt_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    with tarpit() as (address, requests, is_well):
        first, second, later = (fetcher(respect_robots=True, timeout_seconds=0.3) for _ in range(3))
        urls = [f"http://{address}/{number}" for number in range(4)]
        assert outcomes(urls, first) == ["timeout"] * 4
        spent = first.hand_on_budgets(urls, {})
        second.take_budgets(urls, spent)
        assert outcomes(urls, second) == ["timeout"] * 4 and len(requests) == 1
        assert second.hand_on_budgets(["http://other.example/"], spent) == spent, (
            "it is kept for the shards that need it"
        )
        is_well.set()
        clock = time.time() + robots._FAILURE_LASTS_SECONDS
        monkeypatch.setattr(robots.time, "time", lambda: clock)
        assert second.hand_on_budgets(["http://other.example/"], spent).keys() == {address}
        later.take_budgets(urls, spent)
        assert outcomes(urls, later) == ["opted_out"] * 4, "its tdmrep.json is no JSON"
