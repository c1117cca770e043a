"""Download: every pair whose picture no earlier run has, through img2dataset, into the table `images/<recipe>`.

All pairs of one site are in one lane, and of a lane one shard runs at a time, so that no two tasks ask the same host at
once and the limit inside a task is the limit of the cluster.

img2dataset's `Downloader` runs the threads, the accounting and the hashes of one shard. What it fetches with, decodes with
and writes to is ours, through the places it leaves for that: it would read local files and internal addresses, has no limit
on bytes or time, ignores EXIF orientation, and loses rows it cannot write.
"""

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import importlib
import importlib.util
import io
import math
import os
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray

from tasks import rows, tables
from tasks.progress import Progress
from tasks.stage import Artifact, Output, Pinning, Run, StageContext, stage
from tasks.store import Store
from tasks.tombstones import load_tombstones
from tasks.untrusted import decode, domains, fetch
from unclip import files
from unclip.config import fingerprint, require
from unclip.errors import StageError, StorageError
from unclip.files import sha256

IMAGES = pa.schema(
    {
        "key": pa.string(),  # of the pair
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),  # ok, failed
        "reason": pa.string(),  # see tasks.rows; null when ok, as all below is null when failed
        "width": pa.int32(),  # as stored
        "height": pa.int32(),
        "original_width": pa.int32(),  # held upright
        "original_height": pa.int32(),
        "sha256": pa.string(),  # of the bytes that the server sent
        "phash": pa.string(),  # 64-bit perceptual hash, hex; null for a picture of one colour
        "jpg": pa.binary(),
        "jpg_sha256": pa.string(),
    }
)

PASSING = re.compile(r"dns_error|connect_error|timeout|short_body|robots_unreachable|http_429|http_5\d\d")
"""Reasons that may be gone tomorrow."""


@dataclasses.dataclass(frozen=True)
class DownloadConfig:
    image_size: int = 64
    """Pixels of the smaller side as stored; the ratio is kept and nothing is enlarged. A pipeline that is not told stores
    more where the last of its models draws more."""
    jpeg_quality: int = 95
    """Of the stored JPEG, 1 to 100."""
    chroma_subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4"
    """Of the stored JPEG. 4:2:0 stores colours at half the resolution, as most programs do, in some 70 % of the bytes."""
    shard_size: int = 1000
    """Rows in one task and one Parquet file: the unit that is redone after a crash."""
    num_threads: int = 16
    """URLs fetched at the same time by one task."""
    stall_seconds: float = 300.0
    """A task that gets no further row done for so long is ended and started again, twice at most."""
    tasks_in_flight: int = 0
    """Tasks at the same time; 0 is as many as the cluster has CPUs."""
    num_lanes: int = 16
    """A site (registrable domain) is in one lane, and one task at a time works on a lane: so at most this many tasks in all."""
    requests_per_host: int = 4
    """Requests to one host at the same time; another port is another host."""
    respect_robots: bool = True
    """Ask every host's robots.txt first; one that cannot be had or read forbids everything."""
    max_crawl_delay_seconds: float = 2.0
    """A robots.txt that wants more time than this between two requests gets this much."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "none")
    """What in an X-Robots-Tag header forbids a picture. The other ways of `opt_outs` are respected whatever is here."""
    timeout_seconds: float = 10.0
    """Wall time for one URL, redirects and retries included, waiting for robots.txt and for a place at the host not."""
    connect_timeout_seconds: float = 5.0
    """Wall time for one connection to be made."""
    max_bytes: int = 20_000_000
    """Largest body."""
    max_pixels: int = 50_000_000
    """Largest picture, width times height."""
    retries: int = 1
    """Further attempts after a failed look-up or connection, a short body, an HTTP 429 or 5xx; Retry-After is respected."""
    max_redirects: int = 5
    """Redirects followed for one URL."""
    allow_hosts: tuple[str, ...] = ()
    """`host` or `host:port` of your own servers, such as "127.0.0.1:8765": they need not be on the public internet, and are
    asked as fast as they answer, from all tasks at once, without robots.txt."""
    attempt: int = 0
    """A higher number than before fetches again what failed for reasons that may have passed; `--retry-failed` raises it."""
    user_agent: str = "unclip/0.1 (image-text pairs for training)"
    """Says who asks. The part before the slash is the robot's name for robots.txt and X-Robots-Tag."""

    def __post_init__(self) -> None:
        positive = (
            "image_size",
            "shard_size",
            "num_threads",
            "max_bytes",
            "max_pixels",
            "num_lanes",
            "requests_per_host",
        )
        for name in positive:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("tasks_in_flight", "retries", "max_redirects", "attempt"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("timeout_seconds", "connect_timeout_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")
        longest = self.timeout_seconds + self.max_crawl_delay_seconds  # that one row may take a thread
        require(self.stall_seconds > longest, "stall_seconds", self.stall_seconds, f"more than {longest:g}")
        require(
            self.max_crawl_delay_seconds >= 0, "max_crawl_delay_seconds", self.max_crawl_delay_seconds, "at least 0"
        )
        for directive in self.opt_out_directives:
            require(re.fullmatch(r"[a-z0-9_-]+", directive) is not None, "opt_out_directives", directive, "lower case")
        require(1 <= self.jpeg_quality <= 100, "jpeg_quality", self.jpeg_quality, "1 to 100")
        named = self.user_agent.isprintable() and self.user_agent.partition("/")[0].strip() != ""
        require(named, "user_agent", self.user_agent, "one line that starts with the robot's name")

    @property
    def recipe(self) -> str:
        """Names the table: what changes the stored pictures, and nothing else."""
        return fingerprint(decode.VERSION, self.image_size, self.jpeg_quality, self.chroma_subsampling)[:16]


def _pin(config: DownloadConfig, pinning: Pinning) -> DownloadConfig:
    return pin_attempt(pinning.store, config, pinning.retry_failed)


@stage("download", version=2, pin=_pin)
def download(context: StageContext, config: DownloadConfig, pairs: Artifact) -> Output:
    """Fetch the pictures that no earlier run has tried, shrink them and add them to the images table."""
    table_uri = context.store.uri("images", config.recipe)
    listed = tables.read_file(pairs.uri)
    usable = pc.equal(listed.column("status"), rows.KEPT)
    wanted = listed.filter(usable).select(["key", "url", "caption", "expected_sha256"])

    known, again = _known_keys(context.store, table_uri, config)
    missing = wanted.filter(pc.invert(pc.is_in(wanted.column("key"), value_set=known)))
    missing = missing.append_column("seen_sha256", _seen_elsewhere(context.store, table_uri, missing.column("key")))
    parts = _download_shards(
        table_uri,
        missing.to_pylist(),
        config,
        context.run,
        load_tombstones(context.store).sha256s,
        context.progress(missing.num_rows, "pictures").start(),
    )
    note = {"unclip.run": context.run.id, "unclip.fingerprint": context.fingerprint}
    version = tables.append_files(table_uri, parts, IMAGES, note, replaced=again)
    context.store.write_json(config.attempt, *_attempt_record(config))

    columns = ["key", "status", "reason", "sha256", "jpg_sha256"]
    images = tables.read(table_uri, version, columns)
    images = images.filter(pc.is_in(images.column("key"), value_set=wanted.column("key")))
    if images.column("key").to_pylist() != wanted.column("key").to_pylist():
        raise StageError(
            f"download: {table_uri} holds {images.num_rows:,} rows for {wanted.num_rows:,} pairs. Remove the table and rerun."
        )
    images_digest = tables.content_digest(images)
    outcomes = [listed.filter(pc.invert(usable)), images.set_column(1, "status", _as_outcome(images.column("status")))]
    facts = rows.count(pa.concat_tables(table.select(["status", "reason"]) for table in outcomes))
    facts |= {"fetched_now": missing.num_rows, "pairs": pairs.uri, "images": table_uri, "images_version": version}
    facts |= {"images_digest": images_digest, "images_recipe": config.recipe}
    context.tracker.metrics({**facts["rows"], "fetched_now": missing.num_rows})
    # The list belongs to the result, since later stages count its other rows as well.
    return Output(table_uri, fingerprint(images_digest, pairs.digest), facts)


def pin_attempt(store: Store, config: DownloadConfig, retry_failed: bool) -> DownloadConfig:
    """The configuration with the number of the last attempt, or of a new one."""
    record = _attempt_record(config)
    last = store.read_json(*record) if store.exists(*record) else 0
    return dataclasses.replace(config, attempt=max(config.attempt, last + retry_failed))


def _attempt_record(config: DownloadConfig) -> tuple[str, str]:
    return "attempts", f"{config.recipe}.json"


def _known_keys(store: Store, table_uri: str, config: DownloadConfig) -> tuple[pa.Array, pa.Array]:
    """Keys whose rows stay as they are, and keys that are in the table and are tried again."""
    if tables.version(table_uri) is None:
        return pa.array([], pa.string()), pa.array([], pa.string())
    table = tables.read(table_uri, columns=["key", "reason"]).combine_chunks()
    keys = table.column("key").combine_chunks()
    if config.attempt <= pin_attempt(store, dataclasses.replace(config, attempt=0), False).attempt:
        return keys, keys[:0]
    passing = pa.array([PASSING.fullmatch(reason or "") is not None for reason in table.column("reason").to_pylist()])
    return keys.filter(pc.invert(passing)), keys.filter(passing)


def _seen_elsewhere(store: Store, table_uri: str, keys: pa.ChunkedArray) -> pa.Array:
    """For each key the sha256 of the picture when it was first fetched, with other settings; null where it was not."""
    seen: dict[str, str] = {}
    for name in store.list("images"):
        uri = store.uri("images", name)
        if uri != table_uri and tables.version(uri) is not None:
            table = tables.read(uri, columns=["key", "sha256"])
            found = table.filter(pc.and_(pc.is_in(table["key"], value_set=keys), pc.is_valid(table["sha256"])))
            seen |= dict(zip(found["key"].to_pylist(), found["sha256"].to_pylist(), strict=True))
    return pa.array([seen.get(key) for key in keys.to_pylist()], pa.string())


def _as_outcome(status: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(status, "ok"), rows.KEPT, rows.FAILED)


Pair = Mapping[str, Any]
"""With `key`, `url`, `caption`, and perhaps `expected_sha256` (by the list) and `seen_sha256` (when it was first fetched)."""
Shard = Sequence[Pair]

ATTEMPTS = 3
"""For a shard whose task hangs. Ray itself starts a task again, twice, whose process dies or which raises."""
_LONGEST_WAIT_SECONDS = 30.0  # between two looks at the pulses


def plan_lanes(pairs: Sequence[Pair], num_lanes: int) -> list[list[Pair]]:
    """Deal pairs to lanes by the hash of their site, each lane in the order of the list.

    A site is the registrable domain, by the public suffix list that comes with tldextract, or else the host: an IP address,
    a name without dots. All that is no URL is one site.
    """
    lanes: list[list[Pair]] = [[] for _ in range(num_lanes)]
    for pair in pairs:
        lanes[int(hashlib.sha256(_site(pair["url"]).encode()).hexdigest(), 16) % num_lanes].append(pair)
    return lanes


def _site(url: str) -> str:
    try:
        host = fetch.host_of(url)
    except rows.RowFault:
        return ""
    return domains.registrable_domain(host)


def plan_shards(pairs: Sequence[Pair], config: DownloadConfig) -> list[list[Shard]]:
    """Shards, by the lanes in which they have to run one after another. Equal arguments give equal shards.

    Pairs from `allow_hosts` need no lane: each of their shards is alone in its own.
    """

    def cut(of: Sequence[Pair]) -> list[Shard]:
        return [of[start : start + config.shard_size] for start in range(0, len(of), config.shard_size)]

    named = [fetch.is_named(pair["url"], config.allow_hosts) for pair in pairs]
    own = [pair for pair, is_own in zip(pairs, named, strict=True) if is_own]
    others = [pair for pair, is_own in zip(pairs, named, strict=True) if not is_own]
    # A short list in many lanes would be many tiny files.
    num_lanes = min(config.num_lanes, max(1, len(others) // config.shard_size))
    lanes = [cut(lane) for lane in plan_lanes(others, num_lanes) if lane]
    return [[shard] for shard in cut(own)] + lanes


def _download_shards(
    table_uri: str,
    pairs: Sequence[Pair],
    config: DownloadConfig,
    run: Run,
    refused: frozenset[str],
    progress: Progress,
) -> list[tables.Part]:
    if not pairs:
        return []
    num_cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    limit = config.tasks_in_flight or max(1, int(num_cpus))
    pulses = Store(run.storage).uri("runs", run.id, "shards")

    def pulse_of(shard: Shard) -> str:
        return f"{pulses}/{_part_name(shard, config)}.json"

    def start(shard: Shard) -> ray.ObjectRef[tables.Part]:
        files.delete(pulse_of(shard))
        return _download_shard.remote(table_uri, shard, config, run, refused, pulse_of(shard))

    try:
        return run_in_lanes(
            plan_shards(pairs, config),
            limit,
            start,
            on_done=lambda shard: progress.update(len(shard)),
            pulse=lambda shard: files.read_json(pulse_of(shard)) if files.exists(pulse_of(shard)) else None,
            stall_seconds=config.stall_seconds,
        )
    finally:
        files.delete(pulses)


@dataclasses.dataclass
class _Attempt:
    """A task that runs."""

    place: tuple[int, int, int]
    """Rows left in its lane, negative; number of the lane; position in it."""
    number: int
    pulse: Any = None
    since: float = math.inf
    """Monotonic time since which its pulse is the same; from its first on."""
    is_ended: bool = False
    """Whether it was told to end."""


def run_in_lanes(
    lanes: Sequence[Sequence[Shard]],
    limit: int,
    start: Callable[[Shard], ray.ObjectRef[Any]],
    on_done: Callable[[Shard], None] = lambda _: None,
    pulse: Callable[[Shard], Any] = lambda _: None,
    stall_seconds: float = math.inf,
) -> list[Any]:
    """Start a task for each shard, `limit` at a time and one at a time of each lane, and return what they made.

    The lane with the most rows left goes first, since it takes longest. A task whose process or node hangs is killed and
    its shard started again; should it wake up, what it makes is not used.

    Args:
        pulse: what changes while a shard's task gets on; None before it has begun.
        stall_seconds: a task whose pulse stays the same for longer hangs.

    Raises:
        StageError: a task failed, or hung `ATTEMPTS` times. No other starts then, but those that run still finish: work is
            kept.
    """
    waiting = [((-sum(map(len, lane)), number, 0), 1) for number, lane in enumerate(lanes) if lane]
    heapq.heapify(waiting)
    running: dict[ray.ObjectRef[Any], _Attempt] = {}
    made: list[Any] = []
    failure: Exception | None = None
    next_look = time.monotonic()
    while True:
        while failure is None and len(running) < limit and waiting:
            place, attempt_number = heapq.heappop(waiting)
            running[start(lanes[place[1]][place[2]])] = _Attempt(place, attempt_number)
        if not running:
            break
        done, others = ray.wait(list(running), timeout=max(0.0, next_look - time.monotonic()))
        hung: list[ray.ObjectRef[Any]] = []
        if time.monotonic() >= next_look:
            hung = [task for task in others if _hangs(running[task], lanes, pulse, stall_seconds)]
            next_look = time.monotonic() + min(stall_seconds / 4, _LONGEST_WAIT_SECONDS)
        for task in hung:
            if not running[task].is_ended:
                running[task].is_ended = True
                ray.cancel(task, force=True)
        for task in [*done, *(task for task in hung if time.monotonic() - running[task].since > 2 * stall_seconds)]:
            attempt = running.pop(task)
            rows_left, number, position = attempt.place
            shard = lanes[number][position]
            try:
                made.append(ray.get(task, timeout=0))
            except (ray.exceptions.RayError, TimeoutError) as error:
                if not attempt.is_ended:
                    failure = error
                elif attempt.number == ATTEMPTS:
                    failure = StageError(f"no row was done for {stall_seconds:g} s, {ATTEMPTS} times")
                else:
                    heapq.heappush(waiting, (attempt.place, attempt.number + 1))
                continue
            on_done(shard)
            if position + 1 < len(lanes[number]):
                heapq.heappush(waiting, ((rows_left + len(shard), number, position + 1), 1))
    if failure is not None:
        cause = str(getattr(failure, "cause", failure)).strip().splitlines()[-1]
        raise StageError(
            f"download: a shard failed after its retries: {cause}. "
            f"{len(made)} finished shards are kept; run the same command again."
        ) from None
    return made


def _hangs(
    attempt: _Attempt, lanes: Sequence[Sequence[Shard]], pulse: Callable[[Shard], Any], stall_seconds: float
) -> bool:
    """Take a task's pulse."""
    now, before = time.monotonic(), attempt.pulse
    if not attempt.is_ended:
        attempt.pulse = pulse(lanes[attempt.place[1]][attempt.place[2]])
    if attempt.pulse != before:
        attempt.since = now
    return attempt.pulse is not None and now - attempt.since > stall_seconds


def _part_name(pairs: Shard, config: DownloadConfig) -> str:
    return fingerprint([pair["key"] for pair in pairs], config.attempt)[:32]


@ray.remote(num_cpus=1, max_retries=2, retry_exceptions=True)
def _download_shard(
    table_uri: str, pairs: Shard, config: DownloadConfig, run: Run, refused: frozenset[str], pulse_uri: str
) -> tables.Part:
    """The shard's part: the one an earlier attempt wrote, or else one row for each pair, fetched now."""
    name = _part_name(pairs, config)
    part = tables.find_part(table_uri, name)
    if part is None:
        table = fetch_pairs(pairs, config, refused, _pulse(pulse_uri, config.stall_seconds / 10))
        if run.is_abandoned():  # a server or network that went away with the driver would leave failures for good
            raise StageError("download: the run was stopped meanwhile, so this shard is left to the next one.")
        part = tables.write_part(table_uri, name, table)
    return part


def _pulse(uri: str, seconds: float) -> Callable[[int], None]:
    """Writes a number to a file, but not sooner than some seconds after the last one."""
    written = -math.inf

    def beat(number: int) -> None:
        nonlocal written
        if time.monotonic() - written >= seconds:
            written = time.monotonic()
            with contextlib.suppress(StorageError):  # the shard is worth more than its pulse
                files.write_json(uri, number)

    beat(0)
    return beat


def fetch_pairs(
    pairs: Shard,
    config: DownloadConfig,
    refused: frozenset[str] = frozenset(),
    beat: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Run img2dataset's Downloader over pairs: exactly one row of `IMAGES` for each, in their order.

    Args:
        refused: sha256 of pictures that were taken down; their bytes are not kept.
        beat: told how many rows are done, after each.

    Raises:
        StageError: img2dataset lost a row.
    """
    img2dataset = _import_img2dataset()

    writer = _Writer({pair["key"]: pair for pair in pairs}, refused, beat)
    img2dataset.download_image_with_retry = _fetch_with(config)
    with tempfile.TemporaryDirectory(prefix="unclip-shard-") as scratch:
        shard = f"{scratch}/shard.arrow"
        columns = ["url", "caption", "pair"]  # "key" is img2dataset's own: a position
        values = [[pair[name] for pair in pairs] for name in ("url", "caption", "key")]
        table = pa.table(dict(zip(columns, values, strict=True)))
        with pa.ipc.new_file(shard, table.schema) as file:
            file.write_table(table)
        downloader = img2dataset.Downloader(
            sample_writer_class=lambda *_: writer,
            resizer=_decode_with(
                _decoding_pool(config.image_size, config.jpeg_quality, config.max_pixels, config.chroma_subsampling)
            ),
            thread_count=config.num_threads,
            save_caption=True,
            extract_exif=False,
            output_folder=scratch,
            column_list=columns,
            timeout=config.timeout_seconds,
            number_sample_per_shard=len(pairs),
            oom_shard_count=1,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=config.retries,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        succeeded, _ = downloader((0, shard))
    keys = [pair["key"] for pair in pairs]
    if not succeeded or sorted(writer.rows) != sorted(keys):
        raise StageError(f"download: img2dataset returned {len(writer.rows)} of {len(keys)} rows; see its log above.")
    return pa.Table.from_pylist([writer.rows[key] for key in keys], schema=IMAGES)


@functools.cache
def _import_img2dataset() -> Any:
    """The module `img2dataset.downloader` alone: the rest of the package costs every worker 6 s and 700 MB."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # they call out when imported
    if "img2dataset" not in sys.modules:
        spec = importlib.util.find_spec("img2dataset")
        assert spec is not None and spec.submodule_search_locations is not None
        package = types.ModuleType("img2dataset")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["img2dataset"] = package
    return importlib.import_module("img2dataset.downloader")


class _Writer:
    """Takes img2dataset's samples in memory; they come in the order in which they were fetched."""

    def __init__(self, pairs: Mapping[str, Pair], refused: frozenset[str], beat: Callable[[int], None]) -> None:
        self.pairs, self.refused, self.beat = pairs, refused, beat
        self.rows: dict[str, dict[str, Any]] = {}

    def write(self, picture: decode.Picture | None, _key: str, caption: str, sample: Mapping[str, Any]) -> None:
        row = {"key": sample["pair"], "url": sample["url"], "caption": caption}
        reason = sample["error_message"] if picture is None else self._fault(row["key"], sample["sha256"])
        if picture is None or reason:
            row |= {"status": rows.FAILED, "reason": reason}
        else:
            row |= {"status": "ok", "sha256": sample["sha256"], "jpg_sha256": sha256(picture.jpg)}
            row |= dataclasses.asdict(picture)
        self.rows[row["key"]] = row
        self.beat(len(self.rows))

    def _fault(self, key: str, digest: str) -> str | None:
        """What is wrong with a sound picture: whoever holds a URL now need not be who held it when the list was made."""
        if digest in self.refused:
            return "taken_down"
        for name, reason in (("expected_sha256", "hash_mismatch"), ("seen_sha256", "content_changed")):
            if self.pairs[key].get(name) not in (None, digest):
                return reason
        return None

    def close(self) -> None:
        pass


def _fetch_with(config: DownloadConfig) -> Any:
    """Stands in for `img2dataset.downloader.download_image_with_retry`."""
    fetcher = _fetcher(config)

    def fetch_row(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        index, url = row
        try:
            return index, io.BytesIO(fetcher.fetch(url)), None
        except rows.RowFault as fault:
            return index, None, fault.reason

    return fetch_row


@functools.lru_cache(maxsize=1)
def _fetcher(config: DownloadConfig) -> fetch.Fetcher:
    """One for all shards of a process, so that what it learnt of hosts is not asked again."""
    names = [field.name for field in dataclasses.fields(fetch.Fetcher) if field.init and field.name != "resolve"]
    return fetch.Fetcher(**{name: getattr(config, name) for name in names})


@functools.cache
def _decoding_pool(image_size: int, jpeg_quality: int, max_pixels: int, chroma_subsampling: str) -> decode.DecodingPool:
    """One for all shards of a process; its child ends with the process, whose pipe it reads."""
    return decode.DecodingPool(image_size, jpeg_quality, max_pixels, chroma_subsampling)


def _decode_with(pool: decode.DecodingPool) -> Any:
    """Stands in for img2dataset's resizer; the picture goes through to the writer as it is."""

    def resize(stream: io.BytesIO, _boxes: Any = None) -> tuple[Any, ...]:
        try:
            picture = pool.decode(stream.getvalue())
        except rows.RowFault as fault:
            return None, None, None, None, None, fault.reason
        sizes = (picture.width, picture.height, picture.original_width, picture.original_height)
        return picture, *sizes, None

    return resize
