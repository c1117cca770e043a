"""Lanes: every row once, a site in one lane, shards that depend on the rows alone, and one task at a time in a lane."""

import collections
import hashlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tasks import lanes as lanes_module
from tasks import ranges, tables
from tasks.lanes import WAITING_PER_TASK, Shard, hashed_lane, list_rows, plan_shards, run_in_lanes, shard_uri, sites
from tasks.untrusted import domains
from unclip.errors import StageError

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.timeout(120)]

OWN = "127.0.0.1:8765"


def rows_of(*urls: str) -> pa.Table:
    keys = [hashlib.sha256(url.encode()).hexdigest()[:32] for url in urls]
    return pa.table({"key": keys, "url": list(urls), "caption": ["an image"] * len(urls)}).sort_by("key")


def many_sites(num_sites: int = 60, num_pages: int = 12) -> pa.Table:
    """Pages of sites with several hosts and ports each; the site's number is in the path."""
    suffixes = ("com", "co.uk", "unknown", "xn--p1ai")
    return rows_of(
        *(
            f"http{'s' * (page % 2)}://{('', 'www.', 'a.b.', 'IMG.')[page % 4]}site{site}.{suffixes[site % 4]}"
            f"{('', ':8080', '.')[page % 3]}/{site}/{page}.jpg"
            for page in range(num_pages)
            for site in range(num_sites)
        )
    )


def plan(
    folder: Path, table: pa.Table, shard_size: int, num_lanes: int, allow_hosts: Sequence[str] = (), count: int = 1
) -> list[list[Shard]]:
    listed = [
        list_rows(f"{folder}/rows/{number}.parquet", part, num_lanes, allow_hosts)
        for number, part in enumerate(ranges.split_by_key(table, count))
    ]
    return plan_shards(listed, f"{folder}/plan", shard_size=shard_size, num_lanes=num_lanes)


def read_shards(folder: Path, lane: Sequence[Shard]) -> list[pa.Table]:
    shards = [tables.read_file(shard_uri(f"{folder}/plan", shard)) for shard in lane]
    assert [shard.rows for shard in lane] == [table.num_rows for table in shards]
    return shards


def read_lanes(folder: Path, lanes: Sequence[Sequence[Shard]]) -> list[pa.Table]:
    return [pa.concat_tables(read_shards(folder, lane)) for lane in lanes]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("rows_per_output", [1 << 17, 100])
def test_a_site_is_in_one_lane_and_no_row_is_lost(
    tmp_path: Path, count: int, rows_per_output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With outputs of 100 rows, the lanes are written by several tasks, and the lanes of large sites by several each."""
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", rows_per_output)
    table = pa.concat_tables([many_sites(), rows_of(*(f"http://large.example/{page}" for page in range(400)))])
    lanes = read_lanes(tmp_path, plan(tmp_path, table.sort_by("key"), 20, 16, count=count))
    assert pa.concat_tables(lanes).sort_by("key").equals(table.sort_by("key"))
    lanes_of_site = collections.defaultdict(set)
    for number, lane in enumerate(lanes):
        assert lane.equals(lane.sort_by("key")) or rows_per_output == 100
        for site in sites(lane["url"]).to_pylist():
            lanes_of_site[site].add(number)
    assert len(lanes_of_site) == 61 and all(len(found) == 1 for found in lanes_of_site.values())
    assert len(set().union(*lanes_of_site.values())) > 8, "sites are spread over too few lanes"
    [large] = lanes_of_site["large.example"]
    assert lanes[large].num_rows == 400, "a large site has a lane of its own"


@pytest.mark.parametrize(
    ("urls", "num_sites"),
    [
        (("http://127.0.0.1:1/a", "https://127.0.0.1:2/b"), 1),
        (("http://[2606:4700::1]/a", "http://[2606:4700::1]:81/b"), 1),
        (("http://localhost/a", "http://LOCALHOST:99/b", "HTTP://localhost?a"), 1),
        (("http://bücher.de/a", "http://xn--bcher-kva.de/b", "http://www.bücher.de/c"), 1),
        (("ftp://example.com/a", "http://", "nonsense", "http://user:password@a.com/"), 1),
        (("http://a.shop.unlisted/a", "http://b.shop.unlisted/b"), 1),
        (tuple(f"http://8.8.8.{number}/a" for number in range(100)), 100),
        (tuple(f"http://host{number}/a" for number in range(100)), 100),
        (tuple(f"http://shop{number}.co.uk/a" for number in range(100)), 100),
    ],
)
def test_urls_are_grouped_by_site(urls: tuple[str, ...], num_sites: int) -> None:
    found = set(sites(pa.chunked_array([urls])).to_pylist())
    assert len(found) == num_sites
    filled = len({hashed_lane(site, 1000) for site in found})
    assert filled == 1 if num_sites == 1 else filled >= num_sites / 2


def test_lanes_are_the_same_in_every_process_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_use(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", fail_on_use)
    monkeypatch.setattr(socket, "getaddrinfo", fail_on_use)
    domains.suffixes.cache_clear()
    domains.registrable_domain.cache_clear()
    urls = ["http://example.com/a", "http://www.example.org/b", "http://1.1.1.1/c"]
    found = sites(pa.chunked_array([urls])).to_pylist()
    lanes = {url[-1]: hashed_lane(site, 16) for url, site in zip(urls, found, strict=True)}
    assert lanes == {"a": 7, "b": 5, "c": 9}


def test_shards_are_cut_within_lanes_and_own_servers_need_no_lane(tmp_path: Path) -> None:
    own = rows_of(*(f"http://{OWN}/{number}.jpg" for number in range(250)))
    table = pa.concat_tables([many_sites(), own]).sort_by("key")
    lanes = plan(tmp_path, table, 100, 5, (OWN,))
    assert lanes == plan(tmp_path, table, 100, 5, (OWN,))
    assert [[shard.rows for shard in lane] for lane in lanes[:3]] == [[100], [100], [50]]
    assert pa.concat_tables(read_lanes(tmp_path, lanes[:3])).equals(own)
    assert len(lanes) <= 3 + 5 and all(shard.rows <= 100 for lane in lanes for shard in lane)
    for lane in lanes[3:]:
        assert all(shard.rows == 100 for shard in lane[:-1]), "only the last shard of a lane is small"
    assert pa.concat_tables(read_lanes(tmp_path, lanes[3:])).sort_by("key").equals(many_sites())
    few = plan(tmp_path, many_sites().slice(0, 90), 100, 5)
    assert [[shard.rows for shard in lane] for lane in few] == [[90]], "a short list is one file"
    giant = rows_of(*(f"https://cdn{number % 9}.example.com/{number}" for number in range(1000)))
    assert [[shard.rows for shard in lane] for lane in plan(tmp_path, giant, 100, 5)] == [[100] * 10]


@pytest.mark.parametrize("rows_per_output", [1 << 17, 100])
def test_f61_the_rows_of_a_url_are_in_one_shard(
    tmp_path: Path, rows_per_output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each URL has several captions; a URL with more rows than a shard has a shard to itself."""
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", rows_per_output)
    urls = [f"http://site{number % 3}.example/{number}" for number in range(150)]
    pairs = [(url, f"{caption}") for url in urls for caption in range(5)]
    pairs += [("http://giant.example/1", f"{caption}") for caption in range(45)]
    keys = [hashlib.sha256(repr(pair).encode()).hexdigest()[:32] for pair in pairs]
    table = pa.table([keys, *map(list, zip(*pairs, strict=True))], ["key", "url", "caption"]).sort_by("key")
    lanes = plan(tmp_path, table, 20, 4, count=4)
    shards_of = collections.defaultdict(set)
    for shard in (shard for lane in lanes for shard in lane):
        urls = tables.read_file(shard_uri(f"{tmp_path}/plan", shard))["url"].to_pylist()
        assert shard.rows <= 20 or set(urls) == {"http://giant.example/1"}
        for url in urls:
            shards_of[url].add(shard)
    assert len(shards_of) == 151 and all(len(found) == 1 for found in shards_of.values())
    assert pa.concat_tables(read_lanes(tmp_path, lanes)).sort_by("key").equals(table)


def test_f97_a_url_with_thousands_of_captions_is_cut_into_shards_that_fit_in_memory(tmp_path: Path) -> None:
    keys = sorted(hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(2300))
    table = pa.table({"key": keys, "url": ["http://one.example/1"] * 2300, "caption": keys})
    assert [[shard.rows for shard in lane] for lane in plan(tmp_path, table, 20, 4)] == [[1000, 1000, 300]]
    assert [[shard.rows for shard in lane] for lane in plan(tmp_path, table, 1200, 4)] == [[1200, 1100]]


def test_the_driver_holds_no_rows(tmp_path: Path) -> None:
    """The description of a plan grows by a name for each shard, whatever its rows; counts of sites are bounded."""
    table = many_sites(600, 12)
    listed = list_rows(f"{tmp_path}/rows.parquet", table, 16)
    assert len(listed.large_sites) <= 2 * 16
    lanes = plan_shards([listed], f"{tmp_path}/plan", shard_size=100, num_lanes=16)
    assert sum(map(len, lanes)) <= 7200 / 100 + 16
    known = {value for lane in lanes for shard in lane for value in (shard.name, shard.rows)}
    assert not known & {value for column in table.columns for value in column.to_pylist()}
    assert all(isinstance(shard.rows, int) and len(shard.name) == 32 for lane in lanes for shard in lane)


@ray.remote(num_cpus=0)
def count(shard: Shard) -> int:
    time.sleep(0.01)
    return shard.rows


def test_a_lane_runs_one_shard_at_a_time(tmp_path: Path) -> None:
    table = rows_of(*(f"http://site{site}.example/{page}" for page in range(40) for site in range(12)))
    lanes = plan(tmp_path, table, 10, 6)
    lane_of = {shard: number for number, lane in enumerate(lanes) for shard in lane}
    running: list[int] = []
    order: list[int] = []
    results: list[int] = []
    highest = 0

    def start(shard: Shard) -> ray.ObjectRef[int]:
        nonlocal highest
        assert lane_of[shard] not in running
        running.append(lane_of[shard])
        order.append(lane_of[shard])
        highest = max(highest, len(running))
        return count.remote(shard)

    def on_done(shard: Shard, result: int) -> None:
        running.remove(lane_of[shard])
        results.append(result)

    run_in_lanes(lanes, 3, start, on_done)
    assert sum(results) == table.num_rows and sorted(results) == sorted(shard.rows for shard in lane_of)
    assert highest == 3 and not running
    longest = max(range(len(lanes)), key=lambda number: sum(shard.rows for shard in lanes[number]))
    assert order[0] == longest


@pytest.mark.parametrize("count_of_ranges", [1, 4])
def test_a_site_of_90_percent_of_the_rows_does_not_hold_the_others_back(tmp_path: Path, count_of_ranges: int) -> None:
    large = [f"http://img{page % 7}.large.example/{page}" for page in range(1800)]
    small = [f"http://site{page % 40}.example/{page}" for page in range(200)]
    table = rows_of(*large, *small)
    lanes = plan(tmp_path, table, 20, 8, count=count_of_ranges)
    found = [set(sites(lane["url"]).to_pylist()) for lane in read_lanes(tmp_path, lanes)]
    assert [site for site in found if "large.example" in site] == [{"large.example"}], "no site waits for the large one"
    assert len(lanes) > 5
    lane_of = {shard: number for number, lane in enumerate(lanes) for shard in lane}
    large_lane = found.index({"large.example"})
    left = collections.Counter(lane_of.values())  # unfinished shards of each lane
    running: list[int] = []
    num_checked = 0
    has_started = False

    def start(shard: Shard) -> ray.ObjectRef[int]:
        nonlocal has_started
        running.append(lane_of[shard])
        has_started = True
        return count.remote(shard)

    def on_done(shard: Shard, _: int) -> None:
        nonlocal has_started, num_checked
        if has_started:  # the first call after all free slots were filled
            others_left = sum(number > 0 for lane, number in left.items() if lane != large_lane)
            others_running = sum(lane != large_lane for lane in running)
            assert others_running >= min(2, others_left), "the large site takes more than one of three slots"
            num_checked += others_left >= 2
        has_started = False
        running.remove(lane_of[shard])
        left[lane_of[shard]] -= 1

    run_in_lanes(lanes, 3, start, on_done)
    assert num_checked > 3 and not left.total()


def shards_of(num_lanes: int, num_shards: int) -> list[list[Shard]]:
    return [[Shard(f"{lane}-{number}", 1) for number in range(num_shards)] for lane in range(num_lanes)]


@ray.remote(num_cpus=0, max_retries=0)
def fail_first(shard: Shard) -> int:
    if shard.name == "0-0":
        raise ValueError("no space left")
    time.sleep(0.5)
    return shard.rows


def test_after_a_failure_running_tasks_finish_and_no_task_starts() -> None:
    started: list[Shard] = []
    finished: list[Shard] = []

    def start(shard: Shard) -> ray.ObjectRef[int]:
        started.append(shard)
        return fail_first.remote(shard)

    with pytest.raises(StageError, match=r"no space left.* 2 finished shards are kept"):
        run_in_lanes(shards_of(3, 3), 3, start, lambda shard, _: finished.append(shard))
    assert len(started) == 3 and {shard.name for shard in finished} == {"1-0", "2-0"}


def test_after_a_failed_commit_running_tasks_finish_and_no_task_starts() -> None:
    started: list[Shard] = []
    finished: list[Shard] = []

    def start(shard: Shard) -> ray.ObjectRef[int]:
        started.append(shard)
        return count.remote(shard)

    def on_done(shard: Shard, _: int) -> None:
        finished.append(shard)
        if len(finished) == 1:
            raise OSError("no space left")

    with pytest.raises(StageError, match=r"cannot be committed: no space left.*run the same command again"):
        run_in_lanes(shards_of(3, 3), 3, start, on_done)
    assert len(started) == 3 and set(finished) == set(started)


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def wait_for_others(shard: Shard, folder: str, others: Sequence[str]) -> Iterator[int | None]:
    """Say that it only waits, then wait until other shards are done."""
    yield None
    deadline = time.monotonic() + 20
    while not all(Path(folder, name).exists() for name in others):
        assert time.monotonic() < deadline, f"{others} never ran"
        time.sleep(0.02)
    yield shard.rows


def test_f65_tasks_that_only_wait_give_their_slot_to_another_lane(tmp_path: Path) -> None:
    """One slot, and the first tasks end only after a shard of another lane."""
    slow = [f"slow{number}" for number in range(WAITING_PER_TASK)]
    lanes = [[Shard(name, 3)] for name in slow] + [[Shard("quick", 2), Shard("last", 1)]]
    others = {name: ["quick"] for name in slow} | {"quick": [], "last": [*slow, "quick"]}
    started: list[str] = []
    results: list[int] = []

    def start(shard: Shard) -> Any:
        started.append(shard.name)
        assert len(started) - len(results) <= 1 + WAITING_PER_TASK
        return wait_for_others.remote(shard, str(tmp_path), others[shard.name])

    def on_done(shard: Shard, result: int) -> None:
        results.append(result)
        (tmp_path / shard.name).touch()

    run_in_lanes(lanes, 1, start, on_done)
    assert sorted(results) == [1, 2, *[3] * len(slow)] and started[: len(slow) + 1] == [*slow, "quick"]


@ray.remote(num_cpus=0, max_retries=0)
def work_until(shard: Shard, path: str) -> int:
    """Work until a file is there."""
    deadline = time.monotonic() + 20
    while path and not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return shard.rows


def test_f65_a_lane_whose_shards_wait_for_long_goes_on_before_larger_lanes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "_LONG_WAIT_SECONDS", 0.0)
    lanes = [[Shard("slow1", 30), Shard("slow2", 1)], [Shard(f"quick{number}", 10) for number in (1, 2, 3)]]
    started: list[str] = []

    def start(shard: Shard) -> Any:
        started.append(shard.name)
        if shard.name.startswith("slow"):
            return wait_for_others.remote(shard, str(tmp_path), ["quick1"])
        return work_until.remote(shard, str(tmp_path / "slow1") if shard.name == "quick2" else "")

    # One slot: quick2 holds it until slow1 is done, then slow2 and quick3 are left.
    run_in_lanes(lanes, 1, start, lambda shard, _: (tmp_path / shard.name).touch())
    assert started == ["slow1", "quick1", "quick2", "slow2", "quick3"]


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def hang_after_waiting(path: str) -> Iterator[int | None]:
    yield None
    if not Path(path).exists():
        Path(path).touch()
        time.sleep(60)
    yield 1


def test_f38_a_task_that_hangs_while_it_waits_is_started_again(tmp_path: Path) -> None:
    results: list[int] = []
    run_in_lanes(
        shards_of(1, 1),
        1,
        lambda _: hang_after_waiting.remote(str(tmp_path / "started")),
        lambda _, result: results.append(result),
        heartbeat=lambda _: 1,
        stall_seconds=1.0,
    )
    assert results == [1]


@ray.remote(num_cpus=0, max_retries=1, num_returns="streaming")
def die_after_waiting(folder: str) -> Iterator[int | None]:
    """Say that it waits, and die when that was read; when Ray runs it again, do not wait."""
    waits, was_read = Path(folder, "waits"), Path(folder, "read")
    if not waits.exists():
        yield None
        waits.touch()
        while not was_read.exists():
            time.sleep(0.01)
        os._exit(1)
    yield 1


def test_f29_a_task_that_died_while_it_waited_and_then_need_not_wait_is_started_again(tmp_path: Path) -> None:
    started: list[Shard] = []
    results: list[int] = []
    has_waited = False

    def start(shard: Shard) -> ray.ObjectRefGenerator:
        started.append(shard)
        return die_after_waiting.remote(str(tmp_path))

    def heartbeat(_: Shard) -> float:
        nonlocal has_waited
        if has_waited:  # at the look before, so the word was read since
            (tmp_path / "read").touch()
        has_waited = (tmp_path / "waits").exists()
        return time.monotonic()

    run_in_lanes(
        shards_of(1, 1), 1, start, lambda _, result: results.append(result), heartbeat=heartbeat, stall_seconds=2.0
    )
    assert results == [1] and len(started) == 2


@ray.remote(num_cpus=0, max_retries=0)
def hang() -> None:
    time.sleep(60)


def test_f38_a_shard_that_hangs_every_time_ends_the_stage() -> None:
    started: list[Shard] = []

    def start(shard: Shard) -> ray.ObjectRef[None]:
        started.append(shard)
        return hang.remote()

    lanes = shards_of(1, 2)
    with pytest.raises(StageError, match=r"no row was completed for 0.2 s, 3 times.*run the same command again"):
        run_in_lanes(lanes, 2, start, lambda *_: None, heartbeat=lambda _: 1, stall_seconds=0.2)
    assert started == lanes[0][:1] * 3
