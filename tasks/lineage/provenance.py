"""Provenance of rows, and differences between dataset versions.

A row is read from the one file of each table whose range holds its key, and its image's facts from the one row group that the
index names. Whole selections are read range by range.
"""

import bisect
import collections
import dataclasses
import itertools
import json
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import index, published, ranges, rows, tables
from tasks.duplicates import duplicate_clusters
from tasks.run_records import is_alive, stage_events
from tasks.store import Store
from tasks.tombstones import entries
from unclip import files
from unclip.errors import InputError

_MIN_DIGITS = 6
_HINT_DIGITS = 4  # a suggested key has these digits in common


@dataclasses.dataclass(frozen=True)
class Version:
    """A dataset version of a storage."""

    number: int
    """Number of the version; the first is 1."""
    digest: str
    facts: Mapping[str, Any]
    """The row of the `snapshots` table."""

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(self.facts["rows"])
        return counts


def versions(store: Store) -> list[Version]:
    """Return all dataset versions, oldest first."""
    if tables.version(store.uri("snapshots")) is None:
        return []
    listed = tables.read_with_commit_times(store.uri("snapshots")).sort_by("number").to_pylist()
    return [Version(row["number"], row["digest"], store.resolve(row)) for row in listed]


def pairs_folders(store: Store) -> list[str]:
    """Return the folders with the lists that ingest wrote; a single file if an earlier release wrote it."""
    uris = [
        store.uri("artifacts", "ingest", fingerprint, name)
        for fingerprint in store.list("artifacts", "ingest")
        for name in ("pairs", "pairs.parquet")
    ]
    return [uri for uri in uris if files.exists(uri) and ranges.range_files(uri)]


def delta_tables(store: Store, kind: str) -> list[str]:
    """Return the URIs of the tables in a folder of the storage, such as `images`."""
    uris = [store.uri(kind, name) for name in store.list(kind)]
    return [uri for uri in uris if tables.version(uri) is not None]


def find_version(store: Store, name: str) -> Version:
    """Return the dataset version with this number or digest prefix; `latest` is the newest.

    Raises:
        InputError: no version matches, or several do.
    """
    known = versions(store)
    if not known:
        raise InputError(f"{store.root}: has no dataset version. Run a pipeline, or name its folder with --storage.")
    found = [version for version in known if str(version.number) == name] or [
        version for version in known if version.digest.startswith(name.lower()) and len(name) >= 4
    ]
    found = known[-1:] if name == "latest" else found
    if len(found) != 1:
        short = [f"{version.number} ({version.digest[:8]})" for version in known[-10:]]
        raise InputError(f"{name}: {len(found)} dataset versions have this name. The latest are: {', '.join(short)}.")
    return found[0]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences between two dataset versions."""

    counts: tuple[Mapping[str, int], Mapping[str, int]]
    """Numbers of rows in, kept, dropped and failed, in both versions."""
    changes: Mapping[tuple[str, str], int]
    """(fate before, fate after) -> number of rows, most first. A fate is kept, a reason, or absent."""
    keys: Mapping[tuple[str, str], pa.ChunkedArray]
    """The keys of those rows, sorted, if they were asked for."""


def difference(old: Version, new: Version, with_keys: bool = False) -> Difference:
    """Compare two versions key by key, one range of keys at a time.

    Args:
        with_keys: collect the keys of the changed rows too.
    """
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    keys: dict[tuple[str, str], list[pa.Array]] = collections.defaultdict(list)
    for key_range in ranges.ranges(max(ranges.range_count(version.facts["selection"]) for version in (old, new))):
        before, after = (_fates(version, key_range) for version in (old, new))
        both = before.join(after, "key", join_type="full outer", right_suffix=" after")
        both = pa.table({name: pc.fill_null(both[name], "absent") for name in both.column_names})
        changed = both.filter(pc.not_equal(both["fate"], both["fate after"]))
        for group in changed.group_by(["fate", "fate after"]).aggregate([("key", "count")]).to_pylist():
            fates = group["fate"], group["fate after"]
            counts[fates] += group["key_count"]
            if with_keys:
                is_such = pc.and_(pc.equal(changed["fate"], fates[0]), pc.equal(changed["fate after"], fates[1]))
                own = changed.filter(is_such)["key"].combine_chunks()
                keys[fates].append(own.take(pc.sort_indices(own)))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Difference(
        (old.counts, new.counts), dict(ordered), {fates: pa.chunked_array(parts) for fates, parts in keys.items()}
    )


def _fates(version: Version, key_range: ranges.KeyRange) -> pa.Table:
    return rows.fates(ranges.read_range(version.facts["selection"], key_range, ["key", "status", "reason"]))


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """All records of one row."""

    key: str
    fate: str
    """One sentence: kept, dropped or failed, in which version and why, and the takedown that removed it, if any."""
    url: str | None
    """None if the row was taken down; likewise the caption."""
    caption: str | None
    lists: tuple[Mapping[str, Any], ...]
    """Lists that contain the row: ingest (fingerprint), position, status, reason."""
    images: tuple[Mapping[str, Any], ...]
    """Downloads of the row: recipe, and the columns of the `images` table except those above and the image."""
    same_picture_as: tuple[Mapping[str, str], ...]
    """The kept row that it duplicates: key, note."""
    dataset_versions: tuple[Mapping[str, Any], ...]
    """Versions that contain the row: number, digest, status, reason, split, scores."""
    runs: tuple[Mapping[str, Any], ...]
    """Runs that read a version in which the row was kept: id, pipeline, state, dataset_version, split, models."""
    derived: tuple[Mapping[str, Any], ...]
    """Tables that hold something made of the image with a trained model, such as latents: table, part, row."""
    model_versions: tuple[Mapping[str, Any], ...]
    """Published models that were trained on such a version: name, version, digest, aliases, dataset_version, split."""


def show(store: Store, key: str) -> dict[str, Any]:
    """Return `find_row` as text: name -> text, or a mapping of details; unknown entries are omitted."""
    row = find_row(store, key)
    sections = {
        "lists": {
            f"{each['ingest'][:8]} row {each['position']}": each["reason"] or each["status"] for each in row.lists
        },
        "images": {
            each["recipe"]: ", ".join(
                f"{name} {value}" for name, value in each.items() if name != "recipe" and value not in (None, "")
            )
            for each in row.images
        },
        "same picture as": {each["key"]: each["note"] for each in row.same_picture_as},
        "dataset versions": {
            f"{each['number']} {each['digest'][:8]}": ", ".join(
                [_fate(each), *(f"{name} {value:.3f}" for name, value in each["scores"].items())]
            )
            for each in row.dataset_versions
        },
        "derived": {each["table"]: f"row {each['row']} of {each['part']}" for each in row.derived},
        "runs that had it": {
            each["id"]: f"{each['pipeline']}, {each['state']}, version {each['dataset_version']} ({each['split']}), "
            + (f"models {', '.join(each['models'])}" if each["models"] else "no model")
            for each in row.runs
        },
        "published models": {
            f"{each['name']}/{each['version'] or each['digest'][:8]}": ", ".join(
                [*each["aliases"], f"version {each['dataset_version']} ({each['split']})"]
            )
            for each in row.model_versions
        },
    }
    known = {"key": row.key, "fate": row.fate, "url": row.url, "caption": row.caption, **sections}
    return {name: value for name, value in known.items() if value}


def _fate(row: Mapping[str, Any]) -> str:
    return f"kept ({row['split']})" if row["status"] == rows.KEPT else f"{row['status']}: {row['reason']}"


def find_row(store: Store, key: str) -> RowFacts:
    """Collect all records of a row: its fate, lists, image, dataset versions and runs.

    Args:
        key: the key, or its first digits, at least 6.

    Raises:
        InputError: no row matches, or several do; names the nearest key, or the matching ones.
    """
    lists = pairs_folders(store)
    image_tables = delta_tables(store, "images")
    key = _resolve_key(store, key.strip().lower(), lists, image_tables)

    listed: list[dict[str, Any]] = []
    known: dict[str, str] = {}
    for uri in lists:
        for row in ranges.find_rows(uri, [key]).to_pylist():
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            place = {"ingest": uri.split("/")[-2], "position": row["position"]}
            listed.append({**place, "status": row["status"], "reason": row["reason"] or None})
    images: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    outcome = ""
    for uri in image_tables:
        for place in index.find_rows(uri, [key], ["key", "part", "row"]).to_pylist():
            places.append(place)
            part = f"{uri}/{place['part']}"
            columns = [name for name in tables.file_columns(part) if name != "jpg"]
            [row] = tables.read_rows(part, [place["row"]], columns).to_pylist()
            known |= {name: row[name] for name in ("url", "caption") if row[name]}
            facts = {name: value for name, value in row.items() if name not in ("key", "url", "caption")}
            images.append({"recipe": uri.rpartition("/")[2], **facts})
            outcome = row["reason"] or outcome
    datasets: list[dict[str, Any]] = []
    held, fate, original = {}, "", {}
    for version in versions(store):
        found = ranges.find_rows(version.facts["selection"], [key]).to_pylist()
        if found:
            row = next((row for row in found if row["status"] == rows.KEPT), found[0])
            scores = ranges.find_rows(version.facts["scores"], [key])
            names = [field.name for field in scores.schema if pa.types.is_floating(field.type)]
            measured = {name: value for scored in scores.select(names).to_pylist() for name, value in scored.items()}
            status = {name: row[name] for name in ("status", "reason", "split")}
            datasets.append({"number": version.number, "digest": version.digest, **status, "scores": measured})
            fate = f"{_fate(row)} in dataset version {version.number}"
            if row["status"] == rows.KEPT:
                held[version.digest] = (version.number, row["split"])
            else:
                fate += f": {rows.meaning(row['reason'])}"
            original = _duplicate_of(version, key, row["reason"])
    if not fate:
        reasons = (outcome, *(each["reason"] for each in listed))
        reason = next((reason for reason in reasons if rows.is_reason(reason or "")), "")
        fate = "in no dataset version" + (f": {reason}, {rows.meaning(reason)}" if reason else " yet")
    requests = sorted({entry.request for entry in entries(store) if entry.value == key})
    if requests:
        fate = f"taken down because of {', '.join(requests)}; before: {fate}"
    duplicates = tuple({"key": winner, "note": note} for winner, note in original.items())
    return RowFacts(
        key,
        fate,
        known.get("url"),
        known.get("caption"),
        tuple(listed),
        tuple(images),
        duplicates,
        tuple(datasets),
        tuple(_runs_with(store, held)),
        tuple(_derived_with(store, key, [place["part"] for place in places])),
        tuple(_models_with(store, held)),
    )


def _resolve_key(store: Store, prefix: str, lists: Sequence[str], image_tables: Sequence[str]) -> str:
    """Return the one key with this prefix, among all rows that are listed, stored or taken down."""
    if len(prefix) < _MIN_DIGITS:
        raise InputError(f"{prefix}: got {len(prefix)} digits of a key, expected at least {_MIN_DIGITS}.")
    is_hex = all(digit in string.hexdigits for digit in prefix[:_HINT_DIGITS])
    near = _keys_in(store, ranges.of_prefix(prefix[:_HINT_DIGITS]), lists, image_tables) if is_hex else []
    start = bisect.bisect_left(near, prefix)
    found = list(itertools.takewhile(lambda key: key.startswith(prefix), itertools.islice(near, start, None)))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise InputError(f"{prefix}: {len(found)} rows have a key with this prefix: {some}. Give more digits.")
    # Among sorted keys, one of the two neighbours shares the longest prefix.
    nearest = max(near[max(0, start - 1) : start + 1], key=lambda key: _common_prefix_length(key, prefix), default="")
    hint = f"Did you mean {nearest}?" if nearest else "`unclip data diff --keys` prints keys."
    count = max([1, *map(ranges.range_count, lists)])
    number = sum(len(_keys_in(store, key_range, lists, image_tables)) for key_range in ranges.ranges(count))
    where = f"none of the {number:,} rows in {store.root}" if number else f"{store.root} has no rows, so none"
    raise InputError(f"{prefix}: {where} has a key with this prefix. {hint}")


def _keys_in(store: Store, key_range: ranges.KeyRange, lists: Sequence[str], image_tables: Sequence[str]) -> list[str]:
    """Return the keys of a range that are listed, stored or taken down, sorted."""
    columns = [ranges.read_range(uri, key_range, ["key"])["key"] for uri in lists]
    columns += [table["key"] for uri in image_tables for table in index.each_table(uri, ["key"], key_range)]
    columns.append(pa.chunked_array([[entry.value for entry in entries(store) if entry.kind == "key"]]))
    known: set[str] = set()
    for column in columns:
        inside = ranges.of_keys(column, key_range.count) == key_range.index
        known |= set(column.filter(pa.array(inside)).to_pylist())
    return sorted(known)


def _common_prefix_length(key: str, other: str) -> int:
    """Return the length of the common prefix."""
    pairs = zip(key, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _duplicate_of(version: Version, key: str, reason: str | None) -> dict[str, str]:
    """Return the kept row that a duplicate was dropped for, with a note on their similarity; empty for other rows."""
    if reason not in rows.DUPLICATES:
        return {}
    facts = version.facts
    # Rows that were taken down since are in the newest versions no longer; older ones may be unreadable.
    described = (
        index.index_files(facts["images"]) if tables.version(index.index_uri(facts["images"])) is not None else []
    )
    found = duplicate_clusters({key: reason}, facts["selection"], described, tables.files(facts["embeddings"]))
    return {winner: note for (winner, _), (_, note) in found}


def checkpoints_of(store: Store, datasets: Collection[str]) -> list[dict[str, str | None]]:
    """Return the checkpoints that runs of this storage trained on one of these datasets, from its own records.

    So runs that MLflow does not know are included, and trainings that were stopped or killed. Each has: run, pipeline, stage,
    state, folder in the storage, and mlflow_run, None if MLflow did not track the run.
    """
    found: list[dict[str, str | None]] = []
    for run_id in store.list("runs"):
        if not store.exists("runs", run_id, "run.json"):
            continue
        record, events = store.read_json("runs", run_id, "run.json"), stage_events(store, run_id)
        for stage, event in sorted(events.items()):
            folder = ("artifacts", stage, str(event.get("fingerprint")))
            # CLIP is trained or given: its folder tells.
            has_weights = not _WEIGHTS.isdisjoint(store.list(*folder)) or _trains(store, stage, event)
            if has_weights and _digests_read(store, events, stage) & set(datasets):
                state = event.get("state")
                if state == "running" and not is_alive(store, run_id, record):
                    state = "stopped" if record["state"] == "stopped" else "killed"
                facts = {"run": run_id, "pipeline": record["pipeline"], "stage": stage, "state": state}
                facts |= {"folder": "/".join(folder), "mlflow_run": record.get("mlflow_run") or None}
                found.append(facts)
    return found


_WEIGHTS = {"checkpoints", "model"}
"""Folders of a training in the folder of its stage."""


def _runs_with(store: Store, held: Mapping[str, tuple[int, str]]) -> list[dict[str, Any]]:
    """Return the pipeline runs that read one of these dataset versions, with the models they trained.

    Args:
        held: digest -> version number, and the row's split in that version.
    """
    found = []
    for run_id in store.list("runs"):
        events = stage_events(store, run_id)
        read = set().union(*(_digests_read(store, events, stage) for stage in events)) & held.keys()
        for digest in sorted(read, key=lambda digest: held[digest]):
            record = store.read_json("runs", run_id, "run.json")
            trained = [stage for stage, event in events.items() if _trains(store, stage, event)]
            number, split = held[digest]
            facts = {"id": run_id, "pipeline": record["pipeline"], "state": record["state"]}
            models = sorted(
                trained, key=lambda stage: (len(stage), stage)
            )  # the shortest first, members by their number
            found.append({**facts, "dataset_version": number, "split": split, "models": models})
    return found


def _derived_with(store: Store, key: str, image_parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the places of a row in derived tables; looks only into files that are named after those with the image."""
    origins = tuple(f"{tables.origin(part)}-" for part in image_parts)
    for uri in delta_tables(store, "derived"):
        for part in tables.files(uri) if origins else ():
            name = part.rpartition("/")[2]
            if name.startswith(origins) and tables.has_keys(part, pa.array([key])):
                row = tables.read_file(part, ["key"])["key"].index(key).as_py()
                yield {"table": uri.rpartition("/")[2], "part": name, "row": row}


def _models_with(store: Store, held: Mapping[str, tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Yield the published versions that were trained on one of these dataset versions; `held` as for `_runs_with`."""
    for record in published.read_all(store):
        for entry in record.versions:
            snapshot = snapshot_of(store, entry)
            if snapshot is not None and snapshot in held:
                number, split = held[snapshot]
                facts = {"name": record.name, "version": entry.version, "digest": entry.digest}
                yield {**facts, "aliases": list(record.aliases_of(entry)), "dataset_version": number, "split": split}


def snapshot_of(store: Store, entry: published.Entry) -> str | None:
    """Return the digest of the dataset version that a published version was trained on; None if nothing tells it.

    Earlier releases did not record it with the version, but the run that published it has it.
    """
    publisher = entry.publisher
    if entry.snapshot is not None or publisher is None:
        return entry.snapshot
    for run_id in store.list("runs"):
        if not store.exists("runs", run_id, f"{publisher.stage}.json"):
            continue
        events = stage_events(store, run_id)
        if events[publisher.stage].get("fingerprint") == publisher.fingerprint and "curate" in events:
            artifact = _artifact(store, "curate", events["curate"])
            return None if artifact is None else str(artifact["digest"])
    return None


def _digests_read(store: Store, events: Mapping[str, Mapping[str, Any]], stage: str) -> set[str]:
    """Return the digests of the selections and dataset versions that a stage of a run read, or made.

    Args:
        events: last events of all stages of the run.
    """
    made = {name: _artifact(store, name, events[name]) for name in ("dedup", "curate") if name in events}
    read = {str(artifact["digest"]) for name, artifact in made.items() if artifact and name == stage}
    if "reads" in events[stage]:  # a training apart from its pipeline has no records of other stages
        return read | set(events[stage]["reads"].values())
    return read | {str(artifact["digest"]) for artifact in made.values() if artifact}  # earlier releases


def _artifact(store: Store, stage: str, event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the committed artifact of a stage of a run; None if there is none."""
    path = ("stages", stage, f"{event.get('fingerprint')}.json")
    found: Mapping[str, Any] | None = store.read_json(*path) if store.exists(*path) else None
    return found


def _trains(store: Store, stage: str, event: Mapping[str, Any]) -> bool:
    """Return True if a stage of a run trains a part."""
    if "trains" in event:
        return bool(event["trains"])
    # Earlier releases did not record `trains`, but their artifacts have `samples_seen`.
    artifact = _artifact(store, stage, event)
    return artifact is not None and "samples_seen" in artifact.get("facts", {})
