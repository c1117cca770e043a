"""Stage `download`: fetch the images that no earlier run has fetched, with img2dataset, into the table `images/<recipe>`.

All pairs of a site are in one lane, and a lane runs one shard at a time. So no two tasks send requests to the same host at
once, and the limit within a task is the limit of the cluster.

img2dataset's `Downloader` runs the threads, statistics and hashes of one shard. Its fetcher, resizer and writer are replaced
by our own: the originals would read local files and internal addresses, have no limit on bytes or time, ignore EXIF
orientation, and lose rows they cannot write.
"""

import contextlib
import dataclasses
import functools
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
from tasks.lanes import Pair, Shard, plan_lanes, run_in_lanes
from tasks.progress import Progress
from tasks.stage import Artifact, Output, Pinning, Run, StageContext, stage
from tasks.store import Store
from tasks.tombstones import load_tombstones
from tasks.untrusted import decode, fetch
from unclip import files
from unclip.config import fingerprint, require
from unclip.errors import StageError, StorageError
from unclip.files import sha256

IMAGES = pa.schema(
    {
        "key": pa.string(),  # key of the pair
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),  # ok, failed
        "reason": pa.string(),  # see tasks.rows; null if ok. If failed, all columns below are null
        "width": pa.int32(),  # as stored
        "height": pa.int32(),
        "original_width": pa.int32(),  # after EXIF rotation
        "original_height": pa.int32(),
        "sha256": pa.string(),  # of the bytes sent by the server
        "phash": pa.string(),  # 64-bit perceptual hash, hex; null for an image of one colour
        "colour": pa.string(),  # mean colour of the stored image: rrggbb, hex; null in rows from before there was this column
        "jpg": pa.binary(),
        "jpg_sha256": pa.string(),
    }
)

TRANSIENT = re.compile(r"dns_error|connect_error|timeout|short_body|robots_unreachable|http_429|http_5\d\d")
"""Reasons that may be transient."""


@dataclasses.dataclass(frozen=True)
class DownloadConfig:
    image_size: int = 64
    """Shorter side of the stored image in pixels; keeps the aspect ratio and never enlarges. By default a pipeline stores more
    if the last of its models samples at a higher resolution."""
    jpeg_quality: int = 95
    """Quality of the stored JPEG, 1 to 100."""
    chroma_subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4"
    """Chroma subsampling of the stored JPEG. 4:2:0 stores colour at half the resolution, in about 70 % of the bytes."""
    shard_size: int = 1000
    """Rows in one task and one Parquet file: the unit that is repeated after a crash."""
    num_threads: int = 16
    """URLs that one task fetches concurrently."""
    stall_seconds: float = 300.0
    """A task that completes no row for this long is killed and restarted, at most twice."""
    tasks_in_flight: int = 0
    """Concurrent tasks; 0 means the number of CPUs of the cluster."""
    num_lanes: int = 16
    """Lanes; all URLs of a site (registrable domain) are in one lane, and each lane runs one task at a time."""
    requests_per_host: int = 4
    """Concurrent requests to one host; a different port counts as a different host."""
    respect_robots: bool = True
    """Obey every host's robots.txt; one that cannot be fetched or parsed forbids everything."""
    max_crawl_delay_seconds: float = 2.0
    """Largest respected Crawl-delay of a robots.txt; a longer one is cut to this."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "none")
    """X-Robots-Tag directives that forbid an image. The other signals of `opt_outs` are always respected."""
    timeout_seconds: float = 10.0
    """Wall time for one URL, including redirects and retries, excluding waits for robots.txt and for a free slot of the host."""
    connect_timeout_seconds: float = 5.0
    """Wall time to open one connection."""
    max_bytes: int = 20_000_000
    """Largest response body."""
    max_pixels: int = 50_000_000
    """Largest image, width times height."""
    retries: int = 1
    """Retries after a failed DNS lookup or connection, a short body, an HTTP 429 or 5xx; Retry-After is respected."""
    max_redirects: int = 5
    """Redirects followed for one URL."""
    allow_hosts: tuple[str, ...] = ()
    """`host` or `host:port` of your own servers, such as "127.0.0.1:8765". They may be on private networks; all tasks send
    requests at full speed and ignore robots.txt."""
    attempt: int = 0
    """Attempt number; a higher one than before retries rows with transient failures. `--retry-failed` increases it."""
    user_agent: str = "unclip/0.1 (image-text pairs for training)"
    """User-Agent header. The part before the slash is the robot's name for robots.txt and X-Robots-Tag."""

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
        longest_row = self.timeout_seconds + self.max_crawl_delay_seconds  # for one row
        require(self.stall_seconds > longest_row, "stall_seconds", self.stall_seconds, f"more than {longest_row:g}")
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
        """Name of the table: a fingerprint of the settings that affect the stored images."""
        return fingerprint(decode.VERSION, self.image_size, self.jpeg_quality, self.chroma_subsampling)[:16]


def _pin(config: DownloadConfig, pinning: Pinning) -> DownloadConfig:
    return pin_attempt(pinning.store, config, pinning.retry_failed)


@stage("download", version=2, pin=_pin)
def download(context: StageContext, config: DownloadConfig, pairs: Artifact) -> Output:
    """Fetch the images that no earlier run has tried, shrink them and add them to the images table."""
    table_uri = context.store.uri("images", config.recipe)
    listed = tables.read_file(pairs.uri)
    usable = pc.equal(listed.column("status"), rows.KEPT)
    wanted = listed.filter(usable).select(["key", "url", "caption", "expected_sha256"])

    final_keys, to_retry = _known_keys(context.store, table_uri, config)
    to_fetch = wanted.filter(pc.invert(pc.is_in(wanted.column("key"), value_set=final_keys)))
    to_fetch = to_fetch.append_column("seen_sha256", _seen_elsewhere(context.store, table_uri, to_fetch.column("key")))
    parts = _download_shards(
        table_uri,
        to_fetch.to_pylist(),
        config,
        context.run,
        load_tombstones(context.store).sha256s,
        context.progress(to_fetch.num_rows, "images").start(),
    )
    note = {"unclip.run": context.run.id, "unclip.fingerprint": context.fingerprint}
    version = tables.append_files(table_uri, parts, IMAGES, note, replaced=to_retry)
    context.store.write_json(config.attempt, *_attempt_record(config))

    columns = ["key", "status", "reason", "sha256", "jpg_sha256"]
    images = tables.read(table_uri, version, columns)
    images = images.filter(pc.is_in(images.column("key"), value_set=wanted.column("key")))
    if images.column("key").to_pylist() != wanted.column("key").to_pylist():
        raise StageError(
            f"download: {table_uri} has {images.num_rows:,} rows for {wanted.num_rows:,} pairs. Remove the table and rerun."
        )
    images_digest = tables.content_digest(images)
    outcomes = [listed.filter(pc.invert(usable)), images.set_column(1, "status", _as_outcome(images.column("status")))]
    facts = rows.count(pa.concat_tables(table.select(["status", "reason"]) for table in outcomes))
    facts |= {"fetched_now": to_fetch.num_rows, "pairs": pairs.uri, "images": table_uri, "images_version": version}
    facts |= {"images_digest": images_digest, "images_recipe": config.recipe}
    context.tracker.metrics({**facts["rows"], "fetched_now": to_fetch.num_rows})
    # The digest covers the list, since later stages count its other rows as well.
    return Output(table_uri, fingerprint(images_digest, pairs.digest), facts)


def pin_attempt(store: Store, config: DownloadConfig, retry_failed: bool) -> DownloadConfig:
    """Set the number of the last attempt, or of a new one."""
    record = _attempt_record(config)
    last = store.read_json(*record) if store.exists(*record) else 0
    return dataclasses.replace(config, attempt=max(config.attempt, last + retry_failed))


def _attempt_record(config: DownloadConfig) -> tuple[str, str]:
    return "attempts", f"{config.recipe}.json"


def _known_keys(store: Store, table_uri: str, config: DownloadConfig) -> tuple[pa.Array, pa.Array]:
    """Keys in the table whose rows are final, and keys in the table that are retried."""
    if tables.version(table_uri) is None:
        return pa.array([], pa.string()), pa.array([], pa.string())
    table = tables.read(table_uri, columns=["key", "reason"]).combine_chunks()
    keys = table.column("key").combine_chunks()
    if config.attempt <= pin_attempt(store, dataclasses.replace(config, attempt=0), False).attempt:
        return keys, keys[:0]
    is_transient = pa.array(
        [TRANSIENT.fullmatch(reason or "") is not None for reason in table.column("reason").to_pylist()]
    )
    return keys.filter(pc.invert(is_transient)), keys.filter(is_transient)


def _seen_elsewhere(store: Store, table_uri: str, keys: pa.ChunkedArray) -> pa.Array:
    """For each key, sha256 of the image from an earlier fetch with other settings; null if there was none."""
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


def plan_shards(pairs: Sequence[Pair], config: DownloadConfig) -> list[list[Shard]]:
    """Lanes of shards; the shards of a lane must run one after another. Equal arguments give equal shards.

    Pairs of `allow_hosts` need no politeness: each of their shards is a lane of its own.
    """

    def cut(members: Sequence[Pair]) -> list[Shard]:
        return [members[start : start + config.shard_size] for start in range(0, len(members), config.shard_size)]

    named = [fetch.is_allowed_host(pair["url"], config.allow_hosts) for pair in pairs]
    own_pairs = [pair for pair, is_own in zip(pairs, named, strict=True) if is_own]
    others = [pair for pair, is_own in zip(pairs, named, strict=True) if not is_own]
    # A short list in many lanes would give many tiny files.
    num_lanes = min(config.num_lanes, max(1, len(others) // config.shard_size))
    lanes = [cut(lane) for lane in plan_lanes(others, num_lanes) if lane]
    return [[shard] for shard in cut(own_pairs)] + lanes


def _download_shards(
    table_uri: str,
    pairs: Sequence[Pair],
    config: DownloadConfig,
    run: Run,
    taken_down: frozenset[str],
    progress: Progress,
) -> list[tables.Part]:
    if not pairs:
        return []
    num_cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    limit = config.tasks_in_flight or max(1, int(num_cpus))
    heartbeats = Store(run.storage).uri("runs", run.id, "shards")

    def heartbeat_uri(shard: Shard) -> str:
        return f"{heartbeats}/{_part_name(shard, config)}.json"

    def start(shard: Shard) -> ray.ObjectRef[tables.Part]:
        files.delete(heartbeat_uri(shard))
        return _download_shard.remote(table_uri, shard, config, run, taken_down, heartbeat_uri(shard))

    try:
        return run_in_lanes(
            plan_shards(pairs, config),
            limit,
            start,
            on_done=lambda shard: progress.update(len(shard)),
            heartbeat=lambda shard: (
                files.read_json(heartbeat_uri(shard)) if files.exists(heartbeat_uri(shard)) else None
            ),
            stall_seconds=config.stall_seconds,
        )
    finally:
        files.delete(heartbeats)


def _part_name(pairs: Shard, config: DownloadConfig) -> str:
    return fingerprint([pair["key"] for pair in pairs], config.attempt)[:32]


@ray.remote(num_cpus=1, max_retries=2, retry_exceptions=True)
def _download_shard(
    table_uri: str, pairs: Shard, config: DownloadConfig, run: Run, taken_down: frozenset[str], heartbeat_uri: str
) -> tables.Part:
    """Return the part that an earlier attempt wrote for this shard, or fetch the shard and write it."""
    name = _part_name(pairs, config)
    part = tables.find_part(table_uri, name)
    if part is None:
        table = fetch_pairs(pairs, config, taken_down, _heartbeat(heartbeat_uri, config.stall_seconds / 10))
        if run.is_abandoned():  # failures caused by the shutdown must not become permanent
            raise StageError("download: the run was stopped, so this shard is left to the next run.")
        part = tables.write_part(table_uri, name, table)
    return part


def _heartbeat(uri: str, seconds: float) -> Callable[[int], None]:
    """Create a function that writes a number to a file, at most once in `seconds`."""
    written = -math.inf

    def beat(number: int) -> None:
        nonlocal written
        if time.monotonic() - written >= seconds:
            written = time.monotonic()
            with contextlib.suppress(StorageError):  # a failed heartbeat must not fail the shard
                files.write_json(uri, number)

    beat(0)
    return beat


def fetch_pairs(
    pairs: Shard,
    config: DownloadConfig,
    taken_down: frozenset[str] = frozenset(),
    beat: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Run img2dataset's Downloader on pairs; returns exactly one row of `IMAGES` per pair, in the same order.

    Args:
        taken_down: sha256 of images that were taken down; their bytes are not kept.
        beat: called with the number of completed rows after each row.

    Raises:
        StageError: img2dataset lost a row.
    """
    img2dataset = _import_img2dataset()

    writer = _Writer({pair["key"]: pair for pair in pairs}, taken_down, beat)
    img2dataset.download_image_with_retry = _fetch_with(config)
    with tempfile.TemporaryDirectory(prefix="unclip-shard-") as scratch:
        shard = f"{scratch}/shard.arrow"
        columns = ["url", "caption", "pair"]  # img2dataset uses "key" itself, for a position
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
    """Import only `img2dataset.downloader`: the rest of the package costs every worker 6 s and 700 MB."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # they access the network when imported
    if "img2dataset" not in sys.modules:
        spec = importlib.util.find_spec("img2dataset")
        assert spec is not None and spec.submodule_search_locations is not None
        package = types.ModuleType("img2dataset")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["img2dataset"] = package
    return importlib.import_module("img2dataset.downloader")


class _Writer:
    """Collects img2dataset's samples in memory, in the order in which they were fetched."""

    def __init__(self, pairs: Mapping[str, Pair], taken_down: frozenset[str], beat: Callable[[int], None]) -> None:
        self.pairs, self.taken_down, self.beat = pairs, taken_down, beat
        self.rows: dict[str, dict[str, Any]] = {}

    def write(self, image: decode.DecodedImage | None, _key: str, caption: str, sample: Mapping[str, Any]) -> None:
        row = {"key": sample["pair"], "url": sample["url"], "caption": caption}
        reason = sample["error_message"] if image is None else self._fault(row["key"], sample["sha256"])
        if image is None or reason:
            row |= {"status": rows.FAILED, "reason": reason}
        else:
            row |= {"status": "ok", "sha256": sample["sha256"], "jpg_sha256": sha256(image.jpg)}
            row |= dataclasses.asdict(image)
        self.rows[row["key"]] = row
        self.beat(len(self.rows))

    def _fault(self, key: str, digest: str) -> str | None:
        """Reason to reject a valid image, or None: the content of a URL may have changed since the list was made."""
        if digest in self.taken_down:
            return "taken_down"
        for name, reason in (("expected_sha256", "hash_mismatch"), ("seen_sha256", "content_changed")):
            if self.pairs[key].get(name) not in (None, digest):
                return reason
        return None

    def close(self) -> None:
        pass


def _fetch_with(config: DownloadConfig) -> Any:
    """Create a replacement for `img2dataset.downloader.download_image_with_retry`."""
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
    """One fetcher for all shards of a process, so that its knowledge of hosts is reused."""
    names = [field.name for field in dataclasses.fields(fetch.Fetcher) if field.init and field.name != "resolve"]
    return fetch.Fetcher(**{name: getattr(config, name) for name in names})


@functools.cache
def _decoding_pool(image_size: int, jpeg_quality: int, max_pixels: int, chroma_subsampling: str) -> decode.DecodingPool:
    """One pool for all shards of a process; its child processes end with the process, whose pipe they read."""
    return decode.DecodingPool(image_size, jpeg_quality, max_pixels, chroma_subsampling)


def _decode_with(pool: decode.DecodingPool) -> Any:
    """Create a replacement for img2dataset's resizer; it passes the decoded image to the writer unchanged."""

    def resize(stream: io.BytesIO, _boxes: Any = None) -> tuple[Any, ...]:
        try:
            image = pool.decode(stream.getvalue())
        except rows.RowFault as fault:
            return None, None, None, None, None, fault.reason
        sizes = (image.width, image.height, image.original_width, image.original_height)
        return image, *sizes, None

    return resize
