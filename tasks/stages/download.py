"""Stage `download`: fetch the images that no earlier run has fetched, with img2dataset, into the table `images/<recipe>`.

All pairs of a site are in one lane, and a lane runs one shard at a time. So no two tasks send requests to the same host at
once, and the limit within a task is the limit of the cluster.

The list is compared with the table's index range by range, and what is missing is cut into shards by tasks; the driver knows
only the names of shards. It commits their parts as they finish, so a killed run leaves a table, and the next one continues.

img2dataset's `Downloader` runs the threads, statistics and hashes of one shard. Its fetcher, resizer and writer are replaced
by our own: the originals would read local files and internal addresses, have no limit on bytes or time, ignore EXIF
orientation, and lose rows they cannot write.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import logging
import math
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray

from tasks import generations, ranges, rows, tables
from tasks.dataflow import run_all
from tasks.generations import Generation, Sums
from tasks.index import index_files, index_identity, index_uri, read_index, update_index
from tasks.lanes import WAITING_PER_TASK, Listed, Shard, list_rows, plan_shards, run_in_lanes, shard_uri
from tasks.nodes import with_egress
from tasks.ranges import KeyRange
from tasks.stage import Artifact, Output, Pinning, Run, StageContext, stage
from tasks.store import Store
from tasks.tombstones import Tombstones, load_tombstones, refuse_if_recorded, withhold, withhold_part
from tasks.untrusted import decode, fetch, local_files
from tasks.untrusted.normalise import MAX_URL_CHARACTERS
from unclip import files
from unclip.config import fingerprint, require
from unclip.errors import StageError, StorageError
from unclip.files import sha256
from unclip.scratch import scratch_folder

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
        "final_url": pa.string(),  # where redirects led; null without any, as in rows from before there was this column
        "redirect_hosts": pa.string(),  # other hosts on the way, separated by spaces; null if there are none
    }
)

UNREACHED = ("dns_error", "dns_timeout", "connect_error", "timeout", "site_unreachable")
"""Reasons of rows whose server was not reached."""
TRANSIENT = re.compile(
    "|".join(
        (*UNREACHED, "short_body", "robots_unreachable", "decode_budget", "http_429", r"http_5\d\d", "blocked_port")
    )
)
"""Reasons that may be transient, or that a setting may remove."""
Pair = Mapping[str, Any]
"""`key`, `url`, `caption`, and optionally `expected_sha256` (from the list) and `seen_sha256` (from an earlier fetch)."""
LANES_PER_TASK = 4
"""Least number of lanes for each concurrent task."""
LEAST_JUDGED = 100
"""Rows of an attempt from which on `max_unreached` applies; fewer may well be on one server."""
WAITING_SECONDS = 0.5
"""A task that completes no row for this long only waits."""
PARTS_PER_COMMIT = 256
SECONDS_PER_COMMIT = 30.0
_PLAN_NOTE = "unclip.plan"
log = logging.getLogger(__name__)


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
    """Concurrent tasks that work; three times as many may only wait for servers. 0 means the number of CPUs of the cluster."""
    num_lanes: int = 16
    """Least number of lanes; four for each concurrent task if that is more, and fewer if a lane would have fewer rows than a
    shard. All URLs of a site (registrable domain) are in one lane, and each lane runs one task at a time. A site with more
    rows than a lane's fair share has a lane of its own."""
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
    dns_timeout_seconds: float = 5.0
    """Wall time for one name look-up; it counts towards `timeout_seconds`."""
    site_seconds: float = 60.0
    """Time that requests to one site (registrable domain) may take without an answer, in each process: each that times out or
    cannot connect adds its time, at least a second, and each answer pays for a quarter of `timeout_seconds`. Beyond it, its
    rows fail with site_unreachable without a request, but for a probe after 30 seconds, then after pauses that double."""
    max_unreached: float = 0.5
    """Share of the rows of one attempt that may fail with dns_error, dns_timeout, connect_error, timeout or site_unreachable.
    Beyond it the network is at fault: the stage fails, and these rows are tried again by the next run. It applies to 100 rows
    or more, not counting those that failed before and are retried."""
    max_bytes: int = 20_000_000
    """Largest response body."""
    max_pixels: int = 50_000_000
    """Largest image, width times height."""
    site_decode_seconds: float = 60.0
    """Decoding time beyond one second an image that a process grants each site; the site's other images then fail with
    decode_budget."""
    retries: int = 1
    """Retries after a failed DNS lookup or connection, a short body, an HTTP 429 or 5xx; Retry-After is respected."""
    max_redirects: int = 5
    """Redirects followed for one URL."""
    allow_hosts: tuple[str, ...] = ()
    """`host` or `host:port` of your own servers, such as "127.0.0.1:8765". They may be on private networks; all tasks send
    requests at full speed and ignore robots.txt. A redirect from another host gives none of these rights."""
    allow_ports: tuple[int, ...] = (80, 443, 8080, 8443)
    """Ports of all other hosts."""
    proxy: str | None = None
    """`http://host:port` of an egress proxy, which may be on a private network, for all other hosts; https goes through CONNECT.
    None connects directly: HTTP_PROXY and its like in the environment are not read."""
    local_root: str | None = None
    """Folder below which `file://` URLs are read; filled in by the pipeline from `ingest.local_root`."""
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
        seconds = (
            "timeout_seconds",
            "connect_timeout_seconds",
            "dns_timeout_seconds",
            "site_seconds",
            "site_decode_seconds",
        )
        for name in seconds:
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")
        require(0 <= self.max_unreached <= 1, "max_unreached", self.max_unreached, "0 to 1")
        longest_row = self.timeout_seconds + self.max_crawl_delay_seconds  # for one row
        require(self.stall_seconds > longest_row, "stall_seconds", self.stall_seconds, f"more than {longest_row:g}")
        require(
            self.max_crawl_delay_seconds >= 0, "max_crawl_delay_seconds", self.max_crawl_delay_seconds, "at least 0"
        )
        for directive in self.opt_out_directives:
            require(re.fullmatch(r"[a-z0-9_-]+", directive) is not None, "opt_out_directives", directive, "lower case")
        for port in self.allow_ports:
            require(1 <= port <= 65535, "allow_ports", port, "ports from 1 to 65535")
        if self.proxy is not None:
            is_proxy = re.fullmatch(r"http://([^/@:\s]+|\[[0-9a-f:]+\]):[1-9][0-9]{0,4}/?", self.proxy) is not None
            require(is_proxy, "proxy", self.proxy, "http://host:port, without a password")
        require(1 <= self.jpeg_quality <= 100, "jpeg_quality", self.jpeg_quality, "1 to 100")
        named = self.user_agent.isprintable() and self.user_agent.partition("/")[0].strip() != ""
        require(named, "user_agent", self.user_agent, "one line that starts with the robot's name")

    @property
    def recipe(self) -> str:
        """Name of the table: a fingerprint of the settings that affect the stored images."""
        return fingerprint(decode.VERSION, self.image_size, self.jpeg_quality, self.chroma_subsampling)[:16]


def _pin(config: DownloadConfig, pinning: Pinning) -> DownloadConfig:
    config = dataclasses.replace(config, local_root=pinning.config.ingest.local_root)
    return pin_attempt(pinning.store, config, pinning.retry_failed)


@stage("download", version=3, pin=_pin)
def download(context: StageContext, config: DownloadConfig, pairs: Artifact) -> Output:
    """Fetch the images that no earlier run has tried, shrink them and add them to the images table."""
    table_uri = context.store.uri("images", config.recipe)
    plan = _plan(context, config, pairs.uri, table_uri)
    note = {"unclip.run": context.run.id, "unclip.fingerprint": context.fingerprint, _PLAN_NOTE: plan.id}
    plan_folder = f"{context.folder}/plan" if plan.retries else None
    commits = _Commits(table_uri, note, context.run, plan_folder, load_tombstones(context.store))
    unreached = _download_shards(table_uri, plan, config, context, commits)
    version = commits.commit()
    if unreached.too_many:
        _forget_unreached(table_uri, plan, context, commits)
        raise StageError(unreached.explain())
    index_version = update_index(table_uri, version)
    context.store.write_json({"attempt": config.attempt}, *_attempt_record(config))

    key_ranges = ranges.ranges(ranges.range_count(pairs.uri))
    changes = _find_changes(context.store, pairs.uri, table_uri, index_version)
    sums = None if changes is None else _sums_of_changes(pairs.uri, index_files(table_uri, index_version), changes)
    if sums is None:
        outcomes = run_all(functools.partial(_outcome, pairs.uri, index_files(table_uri, index_version)), key_ranges)
        if any(part.missing for part in outcomes):
            version = _remove_repeats(table_uri, note, index_files(table_uri, index_version), key_ranges)
            index_version = update_index(table_uri, version)
            outcome = functools.partial(_outcome, pairs.uri, index_files(table_uri, index_version))
            outcomes = run_all(outcome, key_ranges)
        if missing := sum(part.missing for part in outcomes):
            raise StageError(
                f"download: {table_uri} lacks or repeats the rows of {missing:,} pairs. Remove the table and rerun."
            )
        sums = Sums.total(part.sums for part in outcomes)
    read = {"pairs": pairs.uri, "index_version": index_version}
    others = {"pairs": pairs.facts["rows"][rows.KEPT]}
    settings, identities = _settings(table_uri), [index_identity(table_uri)]
    generations.save(context, Generation(context.folder, settings, pairs.uri, read, sums, 0, others, identities))
    images_digest, facts = sums.hex_digest, dict(sums.counts)
    facts |= {"fetched_now": plan.rows, "pairs": pairs.uri, "images": table_uri, "images_version": version}
    facts |= {"index_version": index_version, "images_digest": images_digest, "images_recipe": config.recipe}
    context.tracker.metrics({**facts["rows"], "fetched_now": plan.rows})
    files.delete(f"{context.folder}/plan")
    # The digest covers the list, since later stages count its other rows as well.
    return Output(table_uri, fingerprint(images_digest, pairs.digest), facts)


def _remove_repeats(
    table_uri: str, note: Mapping[str, str], index: Sequence[str], key_ranges: Sequence[KeyRange]
) -> int:
    """Repair a table with keys that stand in several files; returns its version."""
    repeats = pa.concat_tables(run_all(functools.partial(_repeats, index), key_ranges))
    if repeats.num_rows:
        log.warning("download: %s repeats rows; those that were committed first are kept", table_uri)
    return tables.remove_repeats(table_uri, repeats, IMAGES, note)


def _repeats(index: Sequence[str], key_range: KeyRange) -> pa.Table:
    return tables.repeats(read_index(index, key_range, ["key", "part"]))


def pin_attempt(store: Store, config: DownloadConfig, retry_failed: bool) -> DownloadConfig:
    """Set the number of the last attempt, or of a new one."""
    record = _attempt_record(config)
    last = store.read_json(*record) if store.exists(*record) else 0
    last = last["attempt"] if isinstance(last, dict) else last  # a number alone in earlier versions
    return dataclasses.replace(config, attempt=max(config.attempt, last + retry_failed))


def _attempt_record(config: DownloadConfig) -> tuple[str, str]:
    return "attempts", f"{config.recipe}.json"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Shards to fetch; their rows are in files in the folder `plan` of the stage."""

    id: str
    """Names the plan in the commits of its parts."""
    lanes: Sequence[Sequence[Shard]]
    retries: bool
    """Some rows may replace rows of the table."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for lane in self.lanes for shard in lane)


def _plan(context: StageContext, config: DownloadConfig, pairs: str, table_uri: str) -> _Plan:
    """Return the plan of an earlier attempt, if only its own parts have been committed since, or make a plan.

    So a restarted run finds its finished parts, and a row that failed again in a retry is not retried once more.
    """
    record, version = f"{context.folder}/plan.json", tables.version(table_uri)
    if files.exists(record):
        plan = _read_plan(files.read_json(record))
        last_plan = None if version is None else tables.last_note(table_uri).get(_PLAN_NOTE)
        has_rows = bool(files.names(f"{context.folder}/plan"))  # they are deleted when all is done
        if plan.id in (_plan_id(context, version), last_plan) and (has_rows or not _uncommitted(table_uri, plan)):
            return plan
        files.delete(record)
    plan = _make_plan(context, config, pairs, table_uri, version)
    lanes = [[[shard.name, shard.rows] for shard in lane] for lane in plan.lanes]
    files.write_json(record, {"id": plan.id, "retries": plan.retries, "lanes": lanes})
    return plan


def _make_plan(context: StageContext, config: DownloadConfig, pairs: str, table_uri: str, version: int | None) -> _Plan:
    folder, uris = (
        f"{context.folder}/plan",
        [context.store.uri("images", name) for name in context.store.list("images")],
    )
    files.delete(folder)
    if version is None:
        files.delete(index_uri(table_uri))
    index_versions = {}
    for uri in uris:
        table_version = tables.version(uri)
        if table_version is not None:
            index_versions[uri] = update_index(uri, table_version)
    indexes = {uri: index_files(uri, number) for uri, number in index_versions.items()}
    last_attempt = pin_attempt(context.store, dataclasses.replace(config, attempt=0), False).attempt
    search = _Search(
        pairs,
        f"{folder}/ranges",
        known=indexes.pop(table_uri, []),
        seen=list(indexes.values()),
        retries=config.attempt > last_attempt,
        num_lanes=max(config.num_lanes, LANES_PER_TASK * _limit(config)),
        allow_hosts=config.allow_hosts,
    )
    if table_uri in index_versions and not search.retries:  # a retry may concern any row
        changes = _find_changes(context.store, pairs, table_uri, index_versions[table_uri])
        search = dataclasses.replace(search, changes=changes)
    listed = run_all(functools.partial(_find_missing, search), ranges.ranges(ranges.range_count(pairs)))
    lanes = plan_shards(
        listed, folder, shard_size=config.shard_size, num_lanes=search.num_lanes, attempt=config.attempt
    )
    files.delete(search.folder)
    return _Plan(_plan_id(context, version), lanes, search.retries)


def _plan_id(context: StageContext, version: int | None) -> str:
    return f"{context.fingerprint} {version}"


def _read_plan(record: Mapping[str, Any]) -> _Plan:
    lanes = [[Shard(*values) for values in lane] for lane in record["lanes"]]
    return _Plan(record["id"], lanes, record["retries"])


def _uncommitted(table_uri: str, plan: _Plan) -> list[list[Shard]]:
    """Lanes of a plan without the shards whose parts are committed."""
    if tables.version(table_uri) is None:
        return [list(lane) for lane in plan.lanes]
    committed = {uri.rpartition("/")[2] for uri in tables.files(table_uri)}
    lanes = [[shard for shard in lane if f"{shard.name}.parquet" not in committed] for lane in plan.lanes]
    return [lane for lane in lanes if lane]


def _limit(config: DownloadConfig) -> int:
    """Number of concurrent tasks."""
    if config.tasks_in_flight:
        return config.tasks_in_flight
    return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class _Search:
    """Rows to look for in each key range of a list."""

    pairs: str
    folder: str
    """Folder for the rows that are found."""
    known: Sequence[str]
    """Index files of the images table."""
    seen: Sequence[Sequence[str]]
    """Index files of the images tables of other settings."""
    retries: bool
    """Rows with transient failures are fetched again."""
    num_lanes: int
    allow_hosts: Sequence[str]
    changes: "_Changes | None" = None
    """Rows of the list that may be missing; None for all."""


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Changes since an earlier refresh, after which the index had a row for every pair of the list."""

    earlier: Generation
    pairs: Sequence[str]
    """Later layers of the list."""
    index: Sequence[str]
    """Later files of the index. Its others are those of the earlier refresh."""
    has_others: bool
    """The index of the earlier refresh had rows of other lists as well."""

    def listed(self, key_range: KeyRange, columns: Sequence[str]) -> pa.Table:
        """Rows of one range that are new in the list."""
        if not self.pairs:
            return ranges.find_rows(self.earlier.read["pairs"], [], columns)
        return ranges.read_layers(self.pairs, key_range, columns)

    def known(self, key_range: KeyRange, keys: pa.ChunkedArray) -> pa.Array:
        """Keys, among some of one range, that the earlier list has."""
        return ranges.known_keys(ranges.layers(self.earlier.read["pairs"]), key_range, keys)

    def find_in_index(
        self,
        files: Sequence[str],
        key_range: KeyRange,
        keys: pa.ChunkedArray,
        columns: Sequence[str],
        new: pa.Table | None = None,
    ) -> pa.Table:
        """Rows of the index with some keys of one range.

        Args:
            files: files of the whole index.
            new: rows of this range of the later files, if they are read already.
        """
        new = read_index(self.index, key_range, columns) if new is None else new
        found = new.filter(pc.is_in(new["key"], value_set=keys.combine_chunks()))
        rest = keys.filter(pc.invert(pc.is_in(keys, value_set=found["key"].combine_chunks())))
        old = rest if self.has_others else self.known(key_range, rest)
        return pa.concat_tables([found, ranges.find_rows(files, old.to_pylist(), columns)]) if len(old) else found


def _settings(table_uri: str) -> str:
    """Fingerprint of the recipe, after which the table is named."""
    return fingerprint(download.version, table_uri.rpartition("/")[2])


def _find_changes(store: Store, pairs: str, table_uri: str, index_version: int) -> _Changes | None:
    """Find an earlier refresh of the same list and table, after which nothing was removed from the table."""
    found, files_now = ranges.layers(pairs), index_files(table_uri, index_version)

    def layers_known(earlier: Generation) -> tuple[int, int] | None:
        folder, number = earlier.read["pairs"], earlier.read["index_version"]
        return (found.index(folder), number) if folder in found and number <= index_version else None

    earlier = generations.find(store, "download", _settings(table_uri), layers_known, [index_identity(table_uri)])
    if earlier is None:
        return None
    known = index_files(table_uri, earlier.read["index_version"])
    if not set(known) <= set(files_now):
        return None
    num_rows, _ = tables.extent(index_uri(table_uri), earlier.read["index_version"])
    later = found[found.index(earlier.read["pairs"]) + 1 :]
    new = sorted(set(files_now) - set(known))
    return _Changes(earlier, later, new, num_rows != earlier.others["pairs"])


def _find_missing(search: _Search, key_range: KeyRange) -> Listed:
    """Write the rows of one range that must be fetched; `replaces` is the part that holds the row of an earlier attempt."""
    columns, changes = ["key", "url", "caption", "status", "expected_sha256"], search.changes
    listed = changes.listed(key_range, columns) if changes else ranges.read_range(search.pairs, key_range, columns)
    wanted = listed.filter(pc.equal(listed["status"], rows.KEPT)).drop_columns("status")
    columns = ["key", "reason", "part"]
    known = (
        changes.find_in_index(search.known, key_range, wanted["key"], columns)
        if changes
        else read_index(search.known, key_range, columns)
    )
    is_transient = pc.match_substring_regex(known["reason"], f"^(?:{TRANSIENT.pattern})$")
    retried = known.filter(is_transient) if search.retries else known.slice(0, 0)
    final = known.filter(pc.invert(pc.is_in(known["key"], value_set=retried["key"])))
    missing = wanted.filter(pc.invert(pc.is_in(wanted["key"], value_set=final["key"])))
    seen = pa.chunked_array([pa.nulls(missing.num_rows, pa.string())])
    for uris in search.seen:
        columns = ["key", "sha256"]
        table = (
            ranges.find_rows(uris, missing["key"].to_pylist(), columns)
            if changes
            else read_index(uris, key_range, columns)
        )
        seen = pc.coalesce(_look_up(missing["key"], table, "sha256"), seen)
    missing = missing.append_column("seen_sha256", seen)
    missing = missing.append_column("replaces", _look_up(missing["key"], retried, "part"))
    return list_rows(ranges.range_uri(search.folder, key_range), missing, search.num_lanes, search.allow_hosts)


def _look_up(keys: pa.ChunkedArray, table: pa.Table, column: str) -> pa.ChunkedArray:
    """Value of a column for each key; null if the table has no such key."""
    return table[column].take(pc.index_in(keys, value_set=table["key"]))


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Outcome of the rows of one key range."""

    sums: Sums
    """Sums over the rows of the list, each with the outcome of its image; the digest is that of the kept ones' images."""
    missing: int
    """Kept rows of the list that the table does not hold exactly once."""


def _outcome(pairs: str, index: Sequence[str], key_range: KeyRange) -> _Outcome:
    listed = ranges.read_range(pairs, key_range, ["key", "status", "reason"])
    return _outcome_of(listed, read_index(index, key_range, _OUTCOME))


_OUTCOME = ["key", "status", "reason", "sha256", "jpg_sha256"]


def _outcome_of(listed: pa.Table, images: pa.Table) -> _Outcome:
    is_wanted = pc.equal(listed["status"], rows.KEPT)
    wanted = listed.filter(is_wanted)["key"]
    images = images.filter(pc.is_in(images["key"], value_set=wanted.combine_chunks()))
    missing = len(wanted) + images.num_rows - 2 * len(images["key"].unique())
    outcome = images.set_column(1, "status", _as_outcome(images["status"])).select(["status", "reason"])
    others = listed.filter(pc.invert(is_wanted)).select(["status", "reason"])
    counts = rows.count(pa.concat_tables([others, outcome]))
    return _Outcome(Sums(counts, tables.rows_digest(images)), missing)


def _sums_of_changes(pairs: str, index: Sequence[str], changes: _Changes) -> Sums | None:
    """Sums over all rows, from those of the earlier refresh; None if rows are missing or repeated."""
    found = run_all(functools.partial(_changed_outcome, index, changes), ranges.ranges(ranges.range_count(pairs)))
    if any(new.missing for new, _ in found):
        return None
    replaced = Sums.total(old.sums for _, old in found)
    return Sums.total([changes.earlier.sums.minus(replaced), *(new.sums for new, _ in found)])


def _changed_outcome(index: Sequence[str], changes: _Changes, key_range: KeyRange) -> tuple[_Outcome, _Outcome]:
    """Outcomes of the rows of one range that are new in the list, and of those that they replace."""
    new = changes.listed(key_range, ["key", "status", "reason"])
    known = changes.known(key_range, new["key"])
    before = ranges.find_rows(changes.earlier.read["pairs"], known.to_pylist(), ["key", "status", "reason"])
    added = read_index(changes.index, key_range, _OUTCOME)
    images = changes.find_in_index(index, key_range, pa.chunked_array([pc.unique(new["key"])]), _OUTCOME, added)
    had = changes.known(key_range, added["key"])
    had = ranges.find_rows(changes.earlier.read["pairs"], had.to_pylist(), ["key", "status"])
    repeated = pc.sum(pc.equal(had["status"], rows.KEPT)).as_py() or 0  # a row of the table was there before
    outcome = _outcome_of(new, images)
    return dataclasses.replace(outcome, missing=outcome.missing + repeated), _outcome_of(before, images)


def _as_outcome(status: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(status, "ok"), rows.KEPT, rows.FAILED)


@dataclasses.dataclass
class _Commits:
    """Commits finished parts in batches, so that a killed run leaves a table with most of what it fetched."""

    table_uri: str
    note: Mapping[str, str]
    run: Run
    plan: str | None
    """Folder of the plan if some of its rows replace rows of the table."""
    tombstones: Tombstones
    """Tombstones at the start of the stage, which every part respects."""
    pending: list[tables.Part] = dataclasses.field(default_factory=list)
    committed_at: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, part: tables.Part) -> None:
        self.pending.append(part)
        is_late = time.monotonic() - self.committed_at >= SECONDS_PER_COMMIT
        if is_late or len(self.pending) >= PARTS_PER_COMMIT:
            self.commit()
            refuse_if_recorded(Store(self.run.storage), "download")

    def commit(self) -> int:
        """Commit the finished parts; in the same commit, remove rows that they replace. Returns the version of the table."""
        if self.run.is_abandoned():  # another run may be writing to the table
            raise StageError("download: the run was stopped, so its parts are left to the next run.")
        tombstones = load_tombstones(Store(self.run.storage))
        if tombstones != self.tombstones:
            withheld = functools.partial(withhold_part, self.table_uri, tombstones)
            self.pending = run_all(withheld, self.pending, num_cpus=0)  # shards hold the CPUs
        rewritten, removed = self._without_replaced() if self.plan and self.pending else ([], [])
        version = tables.append_files(self.table_uri, [*self.pending, *rewritten], IMAGES, self.note, removed=removed)
        self.pending, self.committed_at = [], time.monotonic()
        return version

    def _without_replaced(self) -> tuple[list[tables.Part], list[str]]:
        """Write files again without the rows that pending parts replace; returns the new parts and the names of the old."""
        replacing = pa.concat_tables(
            tables.read_file(f"{self.plan}/{part.name}", ["key", "replaces"]) for part in self.pending
        )
        replacing = replacing.filter(pc.is_valid(replacing["replaces"]))
        # Commits of this plan may have rewritten the files since: `replaces` leads to their names by the common origin.
        by_origin: dict[str, list[str]] = collections.defaultdict(list)
        for name, keys in _grouped(replacing):
            by_origin[tables.origin(name)] += keys
        held = [(uri, by_origin[_origin(uri)]) for uri in tables.files(self.table_uri) if _origin(uri) in by_origin]
        results = run_all(_without, held, num_cpus=0)  # shards hold the CPUs
        changed = [(uri, parts) for (uri, _), parts in zip(held, results, strict=True) if parts is not None]
        return [part for _, parts in changed for part in parts], [uri.rpartition("/")[2] for uri, _ in changed]


def _grouped(replacing: pa.Table) -> Iterator[tuple[str, list[str]]]:
    groups = replacing.group_by("replaces").aggregate([("key", "list")])
    return zip(groups["replaces"].to_pylist(), groups["key_list"].to_pylist(), strict=True)


def _origin(uri: str) -> str:
    return tables.origin(uri.rpartition("/")[2])


def _without(held: tuple[str, Sequence[str]]) -> list[tables.Part] | None:
    uri, keys = held
    return tables.rewrite_without(uri, pa.array(keys, pa.string()))


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """Result of one shard."""

    part: tables.Part
    retried: int
    """Rows that failed in an earlier attempt."""
    unreached: Mapping[str, int]
    """Reasons of `UNREACHED` of the other rows, and how many have them."""
    spent: fetch.Spent = dataclasses.field(default_factory=dict)
    """Budgets of sites of its lane."""


@dataclasses.dataclass
class _Unreached:
    """Rows of an attempt whose server was not reached, without those that failed before."""

    limit: float
    """Largest share of the rows."""
    rows: int
    """Rows of the attempt that did not fail before, or of which that is not known yet."""
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    too_many: bool = False
    """True once more than the limit are certain."""

    def add(self, shard: _Fetched) -> None:
        self.rows -= shard.retried
        self.reasons.update(shard.unreached)
        if self.rows >= LEAST_JUDGED and self.reasons.total() > self.limit * self.rows:
            self.too_many = True

    def explain(self) -> str:
        counts = ", ".join(f"{reason} {number:,}" for reason, number in self.reasons.most_common())
        return (
            f"download: {self.reasons.total():,} of {self.rows:,} rows reached no server ({counts}), more than max_unreached = "
            f"{self.limit:g} of them. Check this machine's network, name servers and proxy, then run the same command again: "
            "it tries these rows again, and the others are kept. If so many servers are gone, set download.max_unreached=1."
        )


def _forget_unreached(table_uri: str, plan: _Plan, context: StageContext, commits: _Commits) -> None:
    """Remove the rows of a plan whose server was not reached, and the plan, so that the next run tries them again."""
    names = {shard.name for lane in plan.lanes for shard in lane}
    files.delete(f"{context.folder}/plan.json")  # first: the shards are not those of the table any more
    held = [uri for uri in tables.files(table_uri) if _origin(uri) in names]
    results = run_all(_without_unreached, held)
    changed = [(uri, parts) for uri, parts in zip(held, results, strict=True) if parts is not None]
    removed = [uri.rpartition("/")[2] for uri, _ in changed]
    tables.append_files(
        table_uri, [part for _, parts in changed for part in parts], IMAGES, commits.note, removed=removed
    )
    for name in removed:  # the next attempt at the same rows must not find them
        files.delete(f"{table_uri}/{name}")
    files.delete(f"{context.folder}/plan")


def _without_unreached(uri: str) -> list[tables.Part] | None:
    table = tables.read_file(uri, ["key", "reason"])
    unreached = table.filter(pc.is_in(table["reason"], value_set=pa.array(UNREACHED)))["key"]
    return tables.rewrite_without(uri, unreached.combine_chunks()) if len(unreached) else None


def _fetched(part: tables.Part, listed: pa.Table, table: pa.Table) -> _Fetched:
    """Count the rows of a shard.

    Args:
        listed: key, replaces.
        table: key, reason.
    """
    retried = listed.filter(pc.is_valid(listed["replaces"]))["key"]
    reasons = table.filter(pc.invert(pc.is_in(table["key"], value_set=retried)))["reason"]
    counts = {item["values"]: item["counts"] for item in reasons.value_counts().to_pylist()}
    return _Fetched(part, len(retried), {reason: counts[reason] for reason in UNREACHED if reason in counts})


def _fetched_before(table_uri: str, folder: str, shard: Shard) -> _Fetched:
    part = tables.find_part(table_uri, shard.name)
    assert part is not None, f"{table_uri} has no part of the shard {shard.name}"
    return _fetched(part, tables.read_file(shard_uri(folder, shard)), _stored(table_uri, part))


def _stored(table_uri: str, part: tables.Part) -> pa.Table:
    return tables.read_file(f"{table_uri}/{part.name}", ["key", "reason"])


def _download_shards(
    table_uri: str, plan: _Plan, config: DownloadConfig, context: StageContext, commits: _Commits
) -> _Unreached:
    lanes, folder = _uncommitted(table_uri, plan), f"{context.folder}/plan"
    left = {shard for lane in lanes for shard in lane}
    progress = context.progress(plan.rows, "images").start(plan.rows - sum(shard.rows for shard in left))
    unreached = _Unreached(config.max_unreached, plan.rows)
    if files.names(folder):  # else all is done and judged
        before = [shard for lane in plan.lanes for shard in lane if shard not in left]
        for shard in run_all(functools.partial(_fetched_before, table_uri, folder), before):
            unreached.add(shard)
    if not lanes:
        return unreached
    run = context.run
    heartbeats = context.store.uri("runs", run.id, "shards")

    def heartbeat_uri(shard: Shard) -> str:
        return f"{heartbeats}/{shard.name}.json"

    lane_of = {shard: number for number, lane in enumerate(lanes) for shard in lane}
    download_shard = _download_shard.options(**with_egress())
    spent: dict[int, fetch.Spent] = {}

    def start(shard: Shard) -> ray.ObjectRefGenerator:
        files.delete(heartbeat_uri(shard))
        rows_uri, of_lane = shard_uri(folder, shard), spent.get(lane_of[shard], {})
        return download_shard.remote(table_uri, shard.name, rows_uri, config, run, heartbeat_uri(shard), of_lane)

    def on_done(shard: Shard, fetched: _Fetched) -> None:
        progress.update(shard.rows)
        unreached.add(fetched)
        spent[lane_of[shard]] = fetched.spent
        commits.add(fetched.part)

    try:
        run_in_lanes(
            lanes,
            _limit(config),
            start,
            on_done,
            heartbeat=lambda shard: (
                files.read_json(heartbeat_uri(shard)) if files.exists(heartbeat_uri(shard)) else None
            ),
            stall_seconds=config.stall_seconds,
            is_over=lambda: unreached.too_many,
        )
    except StageError:
        with contextlib.suppress(Exception):  # keep the original error
            commits.commit()
        raise
    finally:
        files.delete(heartbeats)
    return unreached


@ray.remote(
    num_cpus=1 / (1 + WAITING_PER_TASK),
    max_retries=2,
    retry_exceptions=True,
    scheduling_strategy="SPREAD",
    num_returns="streaming",
)
def _download_shard(
    table_uri: str,
    name: str,
    rows_uri: str,
    config: DownloadConfig,
    run: Run,
    heartbeat_uri: str,
    spent: fetch.Spent,
) -> Iterator[_Fetched | None]:
    """Find the part that an earlier attempt wrote for this shard, or fetch its rows and write it.

    Rows that were taken down before the part is written, or since then, are withheld.

    Args:
        spent: budgets that earlier shards of the lane left.

    Yields:
        None when it only waits for servers, then the result.
    """
    store = Store(run.storage)
    part, listed = tables.find_part(table_uri, name), tables.read_file(rows_uri)
    if part is not None:
        part = withhold_part(table_uri, load_tombstones(store), part)
        table = _stored(table_uri, part)
    else:
        _forget_other_runs(run.id)
        pairs, fetcher = listed.to_pylist(), _fetcher(config)
        urls = [pair["url"] for pair in pairs]
        fetcher.take_budgets(urls, spent)
        beat = _heartbeat(heartbeat_uri, config.stall_seconds / 10)
        last_row = math.inf  # imports, and a child that decodes, are work

        def note(number: int) -> None:
            nonlocal last_row
            last_row = time.monotonic()
            beat(number)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(fetch_pairs, pairs, config, note)
            while not fetching.done() and time.monotonic() - last_row < WAITING_SECONDS:
                concurrent.futures.wait([fetching], timeout=WAITING_SECONDS / 8)
            if not fetching.done():  # else what is left is work, and a task in its place might need a new process
                yield None
            table = withhold(fetching.result(), load_tombstones(store))
        if run.is_abandoned():  # failures caused by the shutdown must not become permanent
            raise StageError("download: the run was stopped, so this shard is left to the next run.")
        part, spent = tables.write_part(table_uri, name, table), fetcher.hand_on_budgets(urls, spent)
    yield dataclasses.replace(_fetched(part, listed, table), spent=spent)


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
    pairs: Sequence[Pair],
    config: DownloadConfig,
    beat: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Run img2dataset's Downloader on pairs; returns exactly one row of `IMAGES` per pair, in the same order.

    A URL is fetched once, however many of the pairs have it.

    Args:
        beat: called with the number of completed rows before the first URL and after each.

    Raises:
        StageError: img2dataset lost a row.
    """
    img2dataset = _import_img2dataset()

    by_url: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_url.setdefault(pair["url"], []).append(pair)
    writer = _Writer(by_url, beat)
    img2dataset.download_image_with_retry = _fetch_with(config, writer.redirected)
    with scratch_folder("shard") as scratch:
        shard = f"{scratch}/shard.arrow"
        columns = ["url", "caption"]
        table = pa.table({"url": list(by_url), "caption": [same[0]["caption"] for same in by_url.values()]})
        with pa.ipc.new_file(shard, table.schema) as file:
            file.write_table(table)
        downloader = img2dataset.Downloader(
            sample_writer_class=lambda *_: writer,
            resizer=_decode_with(
                _decoding_pool(
                    config.image_size,
                    config.jpeg_quality,
                    config.max_pixels,
                    config.chroma_subsampling,
                    config.site_decode_seconds,
                )
            ),
            thread_count=config.num_threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=columns,
            timeout=config.timeout_seconds,
            number_sample_per_shard=len(by_url),
            oom_shard_count=1,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=config.retries,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        beat(0)
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

    def __init__(self, pairs: Mapping[str, Sequence[Pair]], beat: Callable[[int], None]) -> None:
        """Create a writer for the pairs of each URL."""
        self.pairs, self.beat = pairs, beat
        self.rows: dict[str, dict[str, Any]] = {}
        self.redirected: dict[str, fetch.Fetched] = {}
        """URL -> the way to its body, without the body."""

    def write(self, image: decode.DecodedImage | None, _key: str, _caption: str, sample: Mapping[str, Any]) -> None:
        way, hashes = self.redirected.get(sample["url"]), {}
        if image is not None:
            hashes = {"sha256": sample["sha256"], "jpg_sha256": sha256(image.jpg)} | vars(image)
        for pair in self.pairs[sample["url"]]:
            row = {name: pair[name] for name in ("key", "url", "caption")}
            reason = sample["error_message"] if image is None else self._fault(pair, sample["sha256"], way)
            row |= {"status": rows.FAILED, "reason": reason} if reason else {"status": "ok", **hashes}
            if not reason and way is not None and way.final_url is not None:
                row["final_url"] = way.final_url[:MAX_URL_CHARACTERS]
                row["redirect_hosts"] = " ".join(way.redirect_hosts) or None
            self.rows[row["key"]] = row
        self.beat(len(self.rows))

    def _fault(self, pair: Pair, digest: str, way: fetch.Fetched | None) -> str | None:
        """Reason to reject a valid image, or None: the content of a URL may have changed since the list was made."""
        for name, reason in (("expected_sha256", "hash_mismatch"), ("seen_sha256", "content_changed")):
            if pair.get(name) not in (None, digest):
                return reason
        return None

    def close(self) -> None:
        pass


class _Body(io.BytesIO):
    """Body of a response; img2dataset hands it to the resizer."""

    def __init__(self, url: str, data: bytes) -> None:
        super().__init__(data)
        self.url = url


def _fetch_with(config: DownloadConfig, redirected: dict[str, fetch.Fetched]) -> Any:
    """Create a replacement for `img2dataset.downloader.download_image_with_retry`, which notes the URLs with redirects."""
    fetcher = _fetcher(config)

    def fetch_row(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        index, url = row
        try:
            if url.startswith(local_files.SCHEME):
                path = local_files.to_path(url)
                return index, _Body(url, local_files.read(_root(config), path, config.max_bytes)), None
            fetched = fetcher.get(url)
            if fetched.final_url is not None:
                redirected[url] = dataclasses.replace(fetched, body=b"")
            return index, _Body(url, fetched.body), None
        except rows.RowFault as fault:
            return index, None, fault.reason

    return fetch_row


def _root(config: DownloadConfig) -> str:
    if config.local_root is None:
        raise rows.RowFault("blocked_path")
    return config.local_root


@functools.lru_cache(maxsize=1)
def _fetcher(config: DownloadConfig) -> fetch.Fetcher:
    """One fetcher for all shards of a process, so that its knowledge of hosts is reused."""
    names = [field.name for field in dataclasses.fields(fetch.Fetcher) if field.init and field.name != "resolve"]
    return fetch.Fetcher(**{name: getattr(config, name) for name in names})


@functools.lru_cache(maxsize=1)
def _forget_other_runs(run_id: str) -> None:
    """Forget what an earlier run, perhaps one without a network, learned of hosts; nothing if it is the same run."""
    _fetcher.cache_clear()


@functools.cache
def _decoding_pool(
    image_size: int, jpeg_quality: int, max_pixels: int, chroma_subsampling: str, site_seconds: float
) -> decode.DecodingPool:
    """One pool for all shards of a process; its child processes end with the process, whose pipe they read."""
    return decode.DecodingPool(image_size, jpeg_quality, max_pixels, chroma_subsampling, site_seconds=site_seconds)


def _decode_with(pool: decode.DecodingPool) -> Any:
    """Create a replacement for img2dataset's resizer; it passes the decoded image to the writer unchanged."""

    def resize(stream: _Body, _boxes: Any = None) -> tuple[Any, ...]:
        try:
            image = pool.decode(stream.getvalue(), stream.url)
        except rows.RowFault as fault:
            return None, None, None, None, None, fault.reason
        sizes = (image.width, image.height, image.original_width, image.original_height)
        return image, *sizes, None

    return resize
