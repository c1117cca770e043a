"""Stage `curate`: select the training pairs by CLIP scores, probes and semantic deduplication, and write the snapshot.

Scores are independent of thresholds: the folder `scores` has those of every embedded pair. So a threshold can change, and
the report can show the pairs near it, without embedding anything again.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import generations, ranges, rows, tables
from tasks.dataflow import exchange, run_all
from tasks.find_duplicates import find_duplicates, read_rows, write_rows
from tasks.generations import Generation, Layer, Sums
from tasks.index import find_newest, index_files, index_identity, read_index
from tasks.keys import octet_texts
from tasks.lookups import look_up, write_lookup
from tasks.places import (
    PLACED,
    Block,
    EarlierPlaces,
    KeptRows,
    blocks,
    file_names,
    open_block,
    read_changed,
    read_vectors,
    write_changed,
    write_places,
)
from tasks.ranges import KeyRange
from tasks.semantic import semantic_duplicates
from tasks.snapshots import MAX_HELDOUT, Split, record_snapshot, save_statistics
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
from unclip.config import fingerprint, require, to_dict
from unclip.data import vectors
from unclip.errors import ConfigError, InputError, StageError
from unclip.evaluation.probes import load_probe
from unclip.models.embeddings import Moments
from unclip.training import checkpoints

ROWS_AT_ONCE = 4096
FILES_AT_ONCE = 64
"""Files of embeddings that one task scores."""
MOMENT_TASKS = 32
"""Tasks whose sums are added up; each sum takes 8 E^2 bytes."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    name: str
    """Name of the measured property, such as aesthetic or nsfw; reasons start with it."""
    weights: str
    """Safetensors file of a linear or MLP head on the image embeddings of this CLIP; a path or URI."""
    minimum: float | None = None
    """Pairs that score lower are dropped as `<name>_low`."""
    maximum: float | None = None
    """Pairs that score higher are dropped as `<name>_high`."""
    digest: str | None = None
    """sha256 of the weights, filled in by the pipeline; give it to accept these weights only."""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[a-z][a-z0-9_]*", self.name)), "name", self.name, "lower-case letters, digits, _")
        require(self.name not in ("clip_score", "key"), "name", self.name, "another name")
        for limit in ("minimum", "maximum"):
            value = getattr(self, limit)
            require(value is None or math.isfinite(value), limit, value, "a number")
        both = self.minimum is not None and self.maximum is not None
        require(not both or self.minimum <= self.maximum, "maximum", self.maximum, "at least minimum")  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    min_clip_score: float | None = None
    """Smallest CLIP score (cosine of image and caption embeddings) that is kept; None keeps all."""
    max_clip_score: float | None = None
    """Largest CLIP score that is kept: images that show their caption as text score highest; None keeps all."""
    semantic_distance: float | None = None
    """Images whose embeddings are closer than this (1 - cosine) count as duplicates (SemDeDup); None keeps all."""
    cluster_size: int = 1000
    """Mean number of images per cluster of semantic deduplication; each image is compared within a few clusters."""
    probes: tuple[ProbeConfig, ...] = ()
    """Heads on the image embedding, with the limits outside which pairs are dropped."""

    def __post_init__(self) -> None:
        for name in ("min_clip_score", "max_clip_score"):
            value = getattr(self, name)
            require(value is None or -1 <= value <= 1, name, value, "a cosine, -1 to 1")
        distance = self.semantic_distance
        require(distance is None or 0 < distance < 1, "semantic_distance", distance, "between 0 and 1")
        require(self.cluster_size >= 2, "cluster_size", self.cluster_size, "at least 2")
        names = [probe.name for probe in self.probes]
        require(len(set(names)) == len(names), "probes", names, "different names")

    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Smallest and largest score that is kept, for each score."""
        probes = {probe.name: (probe.minimum, probe.maximum) for probe in self.probes}
        return {"clip_score": (self.min_clip_score, self.max_clip_score), **probes}


def pin_probes(config: CurateConfig) -> CurateConfig:
    """Check that the probes can be read, and fill in their digests, so that changed weights cause a new run.

    Raises:
        InputError: a file is missing, damaged, or not a probe.
        ConfigError: a file does not have the digest in the settings.
    """
    pinned = []
    for probe in config.probes:
        load_probe(probe.weights)
        digest = files.sha256(files.read(probe.weights))
        if probe.digest not in (None, digest):
            raise ConfigError(
                f"curate.probes: {probe.weights} has sha256 {digest}, expected {probe.digest}. "
                "Restore the file, or take the digest out of the settings."
            )
        pinned.append(dataclasses.replace(probe, digest=digest))
    return dataclasses.replace(config, probes=tuple(pinned))


@stage("curate", version=3, pin=lambda config, _: pin_probes(config))
def curate(context: StageContext, config: CurateConfig, embed: Artifact) -> Output:
    """Score the pairs by CLIP and by probes, drop those out of bounds and semantic duplicates, and write the snapshot."""
    facts, folder = embed.facts, context.folder
    images = {name: facts[name] for name in ("images", "images_version", "index_version")}
    embeddings = {name: facts[name] for name in ("embeddings", "embeddings_version")}
    source = EmbeddedRows(KeptRows(facts["selection"], **images), **embeddings, scores=f"{folder}/scores")
    changes = _find_changes(context, config, source, facts["pairs"])
    found = None if changes is None else _continue(context, config, source, changes)
    if found is None:
        changes = None
        found = _select_all(context, config, source, bool(facts.get("other_captions")))
    source = dataclasses.replace(source, scores=found.scores)
    selection, counts = found.selection, found.sums.counts
    places = f"{folder}/places"
    if found.places is None:
        source.write_places(selection, places, counts["rows"][rows.KEPT])
    else:
        found.places.write(places, counts["rows"][rows.KEPT])

    moments = source.moments(places) if changes is None else found.moments
    if moments is None or moments.count < 2:
        raise InputError(
            f"curate: got {moments.count if moments else 0} pairs to train on, expected at least 2 "
            f"({rows.top_reasons(counts)}). {_spread(source.sample_scores(), config)}"
            f"Loosen [curate] and [filter], or add URLs."
        )
    statistics = f"{folder}/statistics"
    explained = save_statistics(statistics, moments)
    checkpoints.save(
        f"{folder}/moments",
        {"moments": {"total": moments.total, "products": moments.products}},
        {"rows": moments.count},
    )
    heldout, captions = f"{folder}/heldout.parquet", [f"{folder}/captions"]
    if found.heldout is None:
        tables.write_file(heldout, choose_heldout(selection, facts["pairs"], source, captions[0]))
    else:
        captions = list(found.captions)
        tables.write_file(heldout, found.heldout)
    read = {"selection": facts["selection"], "pairs": facts["pairs"], **images, **embeddings}
    others = {
        "scores": found.scores,
        "places": places,
        "captions": captions,
        "clip_scores": found.clip_scores,
        "scored": found.num_scored,
    }
    settings, identities = _settings(config), source.identities()
    generation = Generation(folder, settings, selection, read, found.sums, found.changed, others, identities)
    generations.save(context, generation)

    digest = fingerprint(embed.digest, found.sums.hex_digest)
    snapshot = {
        **images,
        **embeddings,
        "digest": digest,
        "selection": selection,
        "scores": source.scores,
        "places": places,
    }
    snapshot |= {"heldout": heldout, "statistics": statistics}
    record_snapshot(context.store, context.run.pipeline, snapshot, counts)
    clip_score = found.clip_scores / max(1, found.num_scored)
    context.tracker.metrics({**counts["rows"], **explained, "clip_score": clip_score})
    context.log_dataset(digest, facts["embeddings"], {**counts, "snapshot": snapshot})
    facts = {**facts, **counts, "snapshot": snapshot, "clip_score": clip_score}
    return Output(selection, digest, {**facts, "layers": ranges.layers(selection)[:-1]})


@dataclasses.dataclass(frozen=True)
class _Selected:
    """Selection and scores that the stage wrote."""

    selection: str
    scores: str
    sums: Sums
    changed: int
    """Rows in all layers of the selection but the first."""
    clip_scores: float
    """Sum over all scored rows."""
    num_scored: int
    moments: Moments | None = None
    """Moments of the training rows' image embeddings, if they are known."""
    places: EarlierPlaces | None = None
    """Places to continue, if there are any."""
    heldout: pa.Table | None = None
    """Rows that `choose_heldout` would return, if they follow from earlier ones."""
    captions: Sequence[str] = ()
    """Folders of the look-ups of the training rows' captions, if there are `heldout` rows."""


def _settings(config: CurateConfig) -> str:
    return fingerprint(curate.version, to_dict(config))


def _select_all(
    context: StageContext, config: CurateConfig, source: "EmbeddedRows", has_other_captions: bool
) -> _Selected:
    folder = context.folder
    scored = source.write_scores(config)
    bounded = f"{folder}/selection" if config.semantic_distance is None else f"{context.intermediate}/in_bounds"
    in_bounds = run_all(functools.partial(_drop_out_of_bounds, source, config, bounded), source.key_ranges())
    selection, found = bounded, in_bounds
    if config.semantic_distance is not None:
        selection, candidates = f"{folder}/selection", f"{context.intermediate}/candidates"
        num_kept = sum(sums.counts["rows"][rows.KEPT] for sums in in_bounds)
        captions = OtherCaptions(source, bounded, f"{context.intermediate}/captions") if has_other_captions else None
        if captions:
            num_kept -= captions.write()
        source.write_places(bounded, candidates, num_kept, captions)
        write = functools.partial(_write_selection, bounded, selection)
        use: Callable[[KeyRange, pa.Table], Any] = captions.write_duplicates if captions else write
        found = semantic_duplicates(
            functools.partial(source.read_block, candidates),
            blocks(candidates),
            num_kept,
            config.semantic_distance,
            config.cluster_size,
            f"{context.intermediate}/duplicates",
            len(source.key_ranges()),
            use,
        )
        if captions:
            found = captions.drop_with_first(write)
    total, count = sum(total for total, _ in scored), sum(count for _, count in scored)
    return _Selected(selection, source.scores, Sums.total(found), 0, total, count)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Layers of dedup's selection, and files of the embeddings, since an earlier generation."""

    layer: Layer
    selection: Sequence[str]
    embeddings: Sequence[str]
    names: Sequence[str]
    """Files of the embeddings, in the order of their numbers in all layers of the scores."""
    scores: str
    """Folder of the new layer of scores."""
    all_index: Sequence[str]
    index: Sequence[str]
    """New files of the index."""
    pairs: str

    @property
    def earlier_scores(self) -> str:
        return str(self.layer.earlier.others["scores"])


def _find_changes(context: StageContext, config: CurateConfig, source: "EmbeddedRows", pairs: str) -> _Changes | None:
    """Find an earlier selection to continue, and what has changed since; None if there is none, or if much has."""
    if config.semantic_distance is not None:  # a new row may change the fate of rows that are far from it
        return None
    found = ranges.layers(source.kept.selection)

    def layers_known(earlier: Generation) -> int | None:
        same = earlier.read["embeddings"] == source.embeddings and earlier.read["images"] == source.kept.images
        return found.index(earlier.read["selection"]) if same and earlier.read["selection"] in found else None

    earlier = generations.find(context.store, "curate", _settings(config), layers_known, source.identities())
    if earlier is None:
        return None
    uris = source.uris()
    before = set(tables.files(source.embeddings, earlier.read["embeddings_version"]))
    selection = found[found.index(earlier.read["selection"]) + 1 :]
    changed = sum(tables.num_rows(uri) for folder in selection for uri in ranges.range_files(folder))
    if not before <= set(uris) or earlier.begins_anew(changed):
        return None
    new = [uri for uri in uris if uri not in before]
    names = [*_file_names(earlier.others["scores"]), *map(_name, new)]
    layer = Layer.on(earlier, context, "selection", earlier.read["pairs"])
    all_index = index_files(source.kept.images, source.kept.index_version)
    known = set(index_files(source.kept.images, earlier.read["index_version"]))
    index = [uri for uri in all_index if uri not in known]
    scores = f"{context.folder}/scores-since-{earlier.name}"
    return _Changes(layer, selection, new, names, scores, all_index, index, pairs)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _file_names(scores: str) -> list[str]:
    """Names of the files of the embeddings, in the order of their numbers in a folder of scores."""
    return list(files.read_json(f"{scores}/{_FILES}")["names"])


_FILES = "embeddings.json"


@dataclasses.dataclass(frozen=True)
class _Changed:
    """Effects of the changed rows of one range."""

    sums: tuple[Sums, Sums]
    """See `Layer.write`."""
    clip_scores: float
    """Added to the sum over all scored rows."""
    num_scored: int
    """Added to their number."""
    added: pa.Table
    """Places of rows that are trained on now, but for those with new embeddings: embeddings_file, embeddings_row."""
    removed: pa.Table
    """Places of rows that are no longer trained on."""
    heldout: pa.Table
    """Changed rows that are held out now, as in `choose_heldout` but for `is_trained_on`."""
    keys: pa.Array
    """Keys of the changed rows."""


def _continue(
    context: StageContext, config: CurateConfig, source: "EmbeddedRows", changes: _Changes
) -> _Selected | None:
    """Write layers of the selection and of the scores; None if an embedding is not where new ones are."""
    layer, earlier = changes.layer, changes.layer.earlier
    count = len(layer.key_ranges())
    number = {name: index for index, name in enumerate(changes.names)}
    numbered = [(number[_name(uri)], uri) for uri in changes.embeddings]
    groups = [numbered[start : start + FILES_AT_ONCE] for start in range(0, len(numbered), FILES_AT_ONCE)]
    scratch = f"{context.intermediate}/scored"
    score_new = functools.partial(_score_files, config, count, keeps_rows=True)
    exchange(score_new, groups, count, functools.partial(_keep_scored, scratch))
    write = functools.partial(_write_changes, changes, source, config, scratch, bool(groups))
    found = run_all(write, layer.key_ranges())
    if any(part is None for part in found):
        return None
    parts = [part for part in found if part is not None]
    files.write_json(f"{changes.scores}/{_FILES}", {"names": changes.names})
    ranges.write_earlier(changes.scores, ranges.layers(changes.earlier_scores))
    sums, changed = layer.finish(part.sums for part in parts)
    uris = [f"{source.embeddings}/{name}" for name in changes.names]
    tensors, record = checkpoints.load(f"{earlier.folder}/moments")
    moments = Moments(record["rows"], tensors["moments"]["total"], tensors["moments"]["products"])
    for key_range in layer.key_ranges():
        new = read_rows(f"{scratch}/{key_range}.vectors")
        moments = moments.plus(Moments.of(torch.tensor(vectors(new["image_embedding"])))) if new.num_rows else moments
    for name, sign in (("added", 1), ("removed", -1)):
        places = pa.concat_tables(getattr(part, name) for part in parts)
        for start in range(0, places.num_rows, _MOMENTS_AT_ONCE):
            vectors_read = read_vectors(places.slice(start, _MOMENTS_AT_ONCE), uris, "image_embedding")
            own = Moments.of(torch.tensor(vectors_read))
            moments = moments.plus(Moments(sign * own.count, sign * own.total, sign * own.products))
    tables_read = (
        ("images", source.kept.images, source.kept.images_version),
        ("embeddings", source.embeddings, source.embeddings_version),
    )
    names = {
        name: (file_names(uri, earlier.read[f"{name}_version"]), file_names(uri, now)) for name, uri, now in tables_read
    }
    caption_folders = [*earlier.others["captions"], f"{changes.scores}/captions"]
    heldout = _continue_heldout(f"{earlier.folder}/heldout.parquet", parts, caption_folders, names)
    clip_scores = earlier.others["clip_scores"] + sum(part.clip_scores for part in parts)
    num_scored = earlier.others["scored"] + sum(part.num_scored for part in parts)
    places = EarlierPlaces(earlier.others["places"], names, scratch, layer.key_ranges())
    return _Selected(
        layer.folder, changes.scores, sums, changed, clip_scores, num_scored, moments, places, heldout, caption_folders
    )


_MOMENTS_AT_ONCE = 1 << 16


def _continue_heldout(
    earlier: str,
    parts: Sequence[_Changed],
    captions: Sequence[str],
    names: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> pa.Table | None:
    """Rows that `choose_heldout` would return, from earlier ones; None if that takes all rows.

    Args:
        earlier: file of the earlier rows.
        captions: folders of the look-ups of the training rows' captions.
        names: see `EarlierPlaces`.
    """
    before = tables.read_file(earlier)
    if not before.num_rows or pc.any(pc.not_equal(before["split"], "holdout")).as_py():
        return None
    changed = pa.concat_arrays([part.keys for part in parts])
    left = before.filter(pc.invert(pc.is_in(before["key"], value_set=changed)))
    for table, (then, now) in names.items():
        number, column = {name: index for index, name in enumerate(now)}, f"{table}_file"
        new = [number[then[old]] for old in left[column].to_pylist()]
        left = left.set_column(left.column_names.index(column), left.schema.field(column), pa.array(new, pa.int32()))
    found = pa.concat_tables([part.heldout for part in parts]).select(left.column_names[:-1])
    found = pa.concat_tables(
        [left.drop_columns("is_trained_on"), found.cast(left.drop_columns("is_trained_on").schema)]
    )
    if before.num_rows >= MAX_HELDOUT:  # of keys after its last one, not all rows are known
        found = found.filter(pc.less_equal(found["key"], before["key"][-1]))
        if found.num_rows < MAX_HELDOUT:
            return None
    found = found.sort_by("key").slice(0, MAX_HELDOUT)
    if not found.num_rows:
        return None
    hashes = caption_hashes(found["caption"])
    uris = [uri for folder in captions for uri in _caption_files(folder)]
    counted = look_up(uris, "hash", hashes).group_by("hash").aggregate([("change", "sum")])
    trained_on = counted.filter(pc.greater(counted["change_sum"], 0))["hash"].to_numpy()
    return found.append_column("is_trained_on", pa.array(np.isin(hashes, trained_on)))


def caption_hashes(captions: pa.ChunkedArray) -> np.ndarray:
    """First 64 bits of the sha256 of captions: [N] uint64."""
    texts = captions.cast(pa.binary()).to_pylist()
    octets = b"".join(hashlib.sha256(text).digest()[:8] for text in texts)
    return np.frombuffer(octets, np.uint64)


def _caption_files(folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in files.names(folder)]


def _write_captions(folder: str, key_range: KeyRange, added: pa.ChunkedArray, removed: pa.ChunkedArray) -> None:
    """Write a look-up of the captions of rows that are trained on, and of those that are no longer."""
    hashes = [caption_hashes(captions) for captions in (added, removed)]
    change = np.repeat(np.array([1, -1], np.int8), [len(part) for part in hashes])
    table = pa.table({"hash": np.concatenate(hashes), "change": change})
    write_lookup(f"{folder}/{key_range}.arrow", table, "hash")


def _keep_scored(folder: str, output: int, pieces: list[pa.Table]) -> None:
    if pieces:
        write_rows(f"{folder}/{output:05d}.scored", pa.concat_tables(pieces))


def _write_changes(
    changes: _Changes, source: "EmbeddedRows", config: CurateConfig, scratch: str, has_new: bool, key_range: KeyRange
) -> _Changed | None:
    """Write the changed rows of one range of the selection and of the scores; None if a row has no new embedding."""
    layer, before = changes.layer, changes.layer.earlier
    listed = (
        ranges.read_layers(changes.selection, key_range) if changes.selection else ranges.find_rows(before.table, [])
    )
    known = layer.known(key_range, listed["key"]).to_pylist()
    old_scores, old = ranges.find_rows(changes.earlier_scores, known), ranges.find_rows(before.table, known)
    kept = pc.unique(listed.filter(pc.equal(listed["status"], rows.KEPT))["key"].combine_chunks())
    was_scored = old_scores["key"].combine_chunks()
    new = kept.filter(pc.invert(pc.is_in(kept, value_set=was_scored)))
    nothing = new.slice(0, 0)
    scores, captions = old_scores.slice(0, 0), pa.table({"key": nothing, "caption": nothing})
    embedded = pa.table({"key": nothing, "image_embedding": pa.array([], pa.list_(pa.float32()))})
    if has_new:
        scored = read_rows(f"{scratch}/{key_range.index:05d}.scored")
        scored = scored.filter(pc.is_in(scored["key"], value_set=new)).sort_by("key")
        captions = scored.select(["key", "caption"])
        embedded = scored.select(["key", "image_embedding"])
        scores = scored.drop_columns(["caption", "image_embedding"]).cast(old_scores.schema)
    if not scores["key"].combine_chunks().equals(new.take(pc.sort_indices(new))):
        return None
    gone = old_scores.filter(pc.invert(pc.is_in(was_scored, value_set=kept)))
    ranges.write_range(changes.scores, key_range, scores)
    ranges.write_removed(changes.scores, key_range, gone["key"])
    all_scores = pa.concat_tables([scores, old_scores])
    table = rows.drop(listed, out_of_bounds(all_scores.filter(pc.is_in(all_scores["key"], value_set=kept)), config))
    sums = layer.write(key_range, table)
    selected = table.filter(pc.equal(table["status"], rows.KEPT)).select(["key", "split"])
    if len(changes.selection) == 1 and PLACED in files.names(changes.selection[0]):
        in_images, _ = read_changed(f"{changes.selection[0]}/{PLACED}", key_range)
        in_images = in_images.filter(pc.is_in(in_images["key"], value_set=selected["key"].combine_chunks()))
    else:
        index = find_newest(
            changes.all_index, changes.index, key_range, selected["key"].combine_chunks(), ["key", "part", "row"]
        )
        in_images = source.kept.place(selected, index)
    numbers = renumbered(all_scores.select(["key", "embeddings_file", "embeddings_row"]), changes.names, source.uris())
    placed = in_images.join(numbers, "key").sort_by("key")
    write_changed(scratch, key_range, placed, pc.unique(table["key"].combine_chunks()))
    trained, trained_before = (part.filter(pc.equal(part["split"], "train"))["key"] for part in (table, old))
    added = trained.filter(pc.invert(pc.is_in(trained, value_set=trained_before.combine_chunks())))
    removed = trained_before.filter(pc.invert(pc.is_in(trained_before, value_set=trained.combine_chunks())))
    heldout = placed.filter(pc.equal(placed["split"], "holdout"))
    chunks = [*added.chunks, *removed.chunks, *heldout["key"].chunks]
    captions = _with_captions_of(pa.chunked_array(chunks, pa.string()), captions, changes)
    texts = [
        captions.filter(pc.is_in(captions["key"], value_set=keys.combine_chunks()))["caption"]
        for keys in (added, removed)
    ]
    _write_captions(f"{changes.scores}/captions", key_range, *texts)
    known = embedded.filter(pc.is_in(embedded["key"], value_set=added.combine_chunks()))
    write_rows(f"{scratch}/{key_range}.vectors", known.select(["image_embedding"]))
    added = added.filter(pc.invert(pc.is_in(added, value_set=known["key"].combine_chunks())))
    total = sum(
        sign * float(np.sum(part["clip_score"].to_numpy(), dtype=np.float64))
        for part, sign in ((scores, 1), (gone, -1))
    )
    moved = [
        all_scores.filter(pc.is_in(all_scores["key"], value_set=keys.combine_chunks())) for keys in (added, removed)
    ]
    places = [part.select(["embeddings_file", "embeddings_row"]) for part in moved]
    heldout = heldout.join(captions, "key").sort_by("key")
    num_scored = scores.num_rows - gone.num_rows
    return _Changed(sums, total, num_scored, places[0], places[1], heldout, pc.unique(table["key"].combine_chunks()))


def _with_captions_of(keys: pa.ChunkedArray, known: pa.Table, changes: _Changes) -> pa.Table:
    """Key and caption of some rows, of which some are known and the others are in the list."""
    wanted = keys.filter(pc.invert(pc.is_in(keys, value_set=known["key"].combine_chunks())))
    if not len(wanted):
        return known
    listed = ranges.find_rows(changes.pairs, wanted.to_pylist(), ["key", "caption", "status"])
    listed = listed.filter(pc.equal(listed["status"], rows.KEPT)).select(["key", "caption"])
    return pa.concat_tables([known, listed])


@dataclasses.dataclass(frozen=True)
class EmbeddedRows:
    """Kept rows of dedup's selection with their embeddings and their scores."""

    kept: KeptRows
    embeddings: str
    embeddings_version: int
    scores: str
    """Folder of range files that `write_scores` writes: key, clip_score, a column per probe, tokens_lost, embeddings_file,
    embeddings_row."""

    def key_ranges(self) -> list[KeyRange]:
        return ranges.ranges(ranges.range_count(self.kept.selection))

    def identities(self) -> list[str | None]:
        """See `Generation`."""
        return [index_identity(self.kept.images), tables.identity(self.embeddings)]

    def uris(self) -> list[str]:
        """Files of the embeddings table."""
        return tables.files(self.embeddings, self.embeddings_version)

    def write_scores(self, config: CurateConfig) -> list[tuple[float, int]]:
        """Score every kept row; returns the sum of the CLIP scores and the number of rows of each key range."""
        uris, count = self.uris(), len(self.key_ranges())
        numbered = list(enumerate(uris))
        groups = [numbered[start : start + FILES_AT_ONCE] for start in range(0, len(uris), FILES_AT_ONCE)]
        files.write_json(f"{self.scores}/{_FILES}", {"names": list(map(_name, uris))})
        return exchange(
            functools.partial(_score_files, config, count),
            groups,
            count,
            functools.partial(_write_scores, self, uris, count),
        )

    def sample_scores(self) -> pa.Table:
        """Scores of one key range: keys are hashes, so these are a random sample."""
        return ranges.read_range(self.scores, self.key_ranges()[0])

    def read(self, selection: str, key_range: KeyRange) -> pa.Table:
        """Kept rows of a selection in one key range, with places in both tables."""
        kept = dataclasses.replace(self.kept, selection=selection).read(key_range)
        places = ranges.read_range(self.scores, key_range, ["key", "embeddings_file", "embeddings_row"])
        return kept.join(renumbered(places, _file_names(self.scores), self.uris()), "key").sort_by("key")

    def write_places(self, selection: str, folder: str, num_rows: int, captions: "OtherCaptions | None" = None) -> None:
        """Write the places of the kept rows of a selection, in both tables, but for other captions of an image."""
        read = functools.partial(self.read, selection) if captions is None else captions.read_firsts
        write_places(folder, self.key_ranges(), read, self.kept.num_files(), num_rows)

    def read_block(self, folder: str, block: Block, *splits: str) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Keys (32 hex digits) and image embeddings [N, E] of the rows of a block of places."""
        listed = open_block(folder, block, *splits)
        keys = pa.chunked_array([octet_texts(listed["key"])])
        return keys, read_vectors(listed, self.uris(), "image_embedding")

    def moments(self, places: str) -> Moments | None:
        """Moments of the training rows' image embeddings; None if there are no rows."""
        found = blocks(places)
        groups = [found[start::MOMENT_TASKS] for start in range(min(MOMENT_TASKS, len(found)))]
        parts = [part for part in run_all(functools.partial(_moments_of, self, places), groups) if part is not None]
        return functools.reduce(Moments.plus, parts) if parts else None


def renumbered(places: pa.Table, names: Sequence[str], uris: Sequence[str]) -> pa.Table:
    """Places (key, embeddings_file, embeddings_row) with the numbers of files in a version of the table; null for others.

    Args:
        names: names of the files in the order of their numbers in `places`.
        uris: files of the version.
    """
    numbers = pc.index_in(pa.array(names, pa.string()), value_set=pa.array(list(map(_name, uris)), pa.string()))
    return places.set_column(1, "embeddings_file", numbers.take(places["embeddings_file"].combine_chunks()))


@dataclasses.dataclass(frozen=True)
class OtherCaptions:
    """Kept rows with the bytes of an earlier kept row, which have its fate in semantic deduplication."""

    source: EmbeddedRows
    selection: str
    folder: str
    """Folder for files by key range: `rows` (key, first), and `found` and `dropped` (key, reason)."""

    def write(self) -> int:
        """Find these rows; returns their number."""
        key_ranges = self.source.key_ranges()
        scratch = f"{self.folder}/scratch"
        return sum(find_duplicates(self._hashes, len(key_ranges), -1, scratch, self._write_rows, captions="image"))

    def _hashes(self, key_range: KeyRange) -> pa.Table:
        kept = self.source.kept
        index = read_index(
            index_files(kept.images, kept.index_version), key_range, ["key", "sha256", "phash", "colour"]
        )
        return index.filter(pc.is_in(index["key"], value_set=_kept_keys(self.selection, key_range)))

    def _write_rows(self, key_range: KeyRange, found: pa.Table) -> int:
        ranges.write_range(f"{self.folder}/rows", key_range, found.select(["key", "first"]))
        return int(found.num_rows)

    def read_firsts(self, key_range: KeyRange) -> pa.Table:
        """Other kept rows of one key range, with places in both tables."""
        table = self.source.read(self.selection, key_range)
        others = ranges.read_range(f"{self.folder}/rows", key_range)["key"].combine_chunks()
        return table.filter(pc.invert(pc.is_in(table["key"], value_set=others)))

    def write_duplicates(self, key_range: KeyRange, found: pa.Table) -> None:
        """Write the rows to drop of one key range, without captions."""
        ranges.write_range(f"{self.folder}/found", key_range, found)

    def drop_with_first(self, use: Callable[[KeyRange, pa.Table], Any]) -> list[Any]:
        """Call `use` for each key range with the rows to drop: those of `write_duplicates`, and their captions."""
        key_ranges = self.source.key_ranges()
        count = len(key_ranges)
        exchange(functools.partial(_split_by_first, self.folder, count), key_ranges, count, self._write_dropped)
        return exchange(
            functools.partial(_split_dropped, self.folder, count),
            key_ranges,
            count,
            functools.partial(_use_dropped, use, count),
        )

    def _write_dropped(self, index: int, pieces: list[pa.Table]) -> None:
        key_range = KeyRange(index, len(self.source.key_ranges()))
        found, captions = ranges.read_range(f"{self.folder}/found", key_range), pa.concat_tables(pieces)
        reason = found["reason"].take(pc.index_in(captions["first"], value_set=found["key"].combine_chunks()))
        dropped = pa.table({"key": captions["key"], "reason": reason}).filter(reason.is_valid())
        ranges.write_range(f"{self.folder}/dropped", key_range, pa.concat_tables([found, dropped.cast(found.schema)]))


def _split_by_first(folder: str, count: int, key_range: KeyRange) -> list[pa.Table]:
    captions = ranges.read_range(f"{folder}/rows", key_range)
    return ranges.split(captions, ranges.of_keys(captions["first"], count), count)


def _split_dropped(folder: str, count: int, key_range: KeyRange) -> list[pa.Table]:
    return ranges.split_by_key(ranges.read_range(f"{folder}/dropped", key_range), count)


def _use_dropped(use: Callable[[KeyRange, pa.Table], Any], count: int, index: int, pieces: list[pa.Table]) -> Any:
    return use(KeyRange(index, count), pa.concat_tables(pieces).sort_by("key"))


def _kept_keys(selection: str, key_range: KeyRange) -> pa.Array:
    table = ranges.read_range(selection, key_range, ["key", "status"])
    return table.filter(pc.equal(table["status"], rows.KEPT))["key"].combine_chunks()


def _score_files(
    config: CurateConfig, count: int, numbered: Sequence[tuple[int, str]], keeps_rows: bool = False
) -> list[pa.Table]:
    parts = []
    others = ["caption"] if keeps_rows else []
    for number, uri in numbered:
        embedded = tables.read_file(uri, ["key", "image_embedding", "clip_score", "tokens_lost", *others])
        scores = score(embedded, torch.tensor(vectors(embedded["image_embedding"])), config)
        scores = scores.append_column("tokens_lost", embedded["tokens_lost"])
        file = pa.repeat(pa.scalar(number, pa.int32()), embedded.num_rows)
        scores = scores.append_column("embeddings_file", file)
        scores = scores.append_column("embeddings_row", pa.array(range(embedded.num_rows), pa.int32()))
        for name in ("caption", "image_embedding") if keeps_rows else ():
            scores = scores.append_column(name, embedded[name])
        parts.append(scores)
    return ranges.split_by_key(pa.concat_tables(parts), count)


def _write_scores(
    source: EmbeddedRows, uris: Sequence[str], count: int, output: int, pieces: list[pa.Table]
) -> tuple[float, int]:
    """Write the scores of the kept rows of one key range; returns the sum of their CLIP scores and their number."""
    key_range = KeyRange(output, count)
    keys = _kept_keys(source.kept.selection, key_range)
    scores = pa.concat_tables(pieces)
    scores = scores.filter(pc.is_in(scores["key"], value_set=keys)).sort_by("key")
    if scores.num_rows > len(keys):
        order = tables.commit_order(source.embeddings)
        committed = pa.array([order.get(uri.rpartition("/")[2], -1) for uri in uris], pa.int64())
        committed = committed.take(scores["embeddings_file"].combine_chunks())
        scores, is_first = tables.in_commit_order(scores, "embeddings_file", committed)
        scores = scores.filter(is_first)
    if not scores["key"].combine_chunks().equals(keys):
        raise StageError(
            f"curate: the embeddings table has {scores.num_rows} rows for {len(keys)} kept pairs of one key range. "
            f"Remove {source.embeddings} and the records in stages/embed, and run again."
        )
    ranges.write_range(source.scores, key_range, scores)
    return float(np.sum(scores["clip_score"].to_numpy(), dtype=np.float64)), scores.num_rows


def _drop_out_of_bounds(source: EmbeddedRows, config: CurateConfig, folder: str, key_range: KeyRange) -> Sums:
    dropped = out_of_bounds(ranges.read_range(source.scores, key_range), config)
    return _write_selection(source.kept.selection, folder, key_range, dropped)


def _write_selection(selection: str, folder: str, key_range: KeyRange, dropped: pa.Table) -> Sums:
    """Write one range of a selection without some rows (key, reason); returns its sums."""
    table = rows.drop(ranges.read_range(selection, key_range), dropped)
    ranges.write_range(folder, key_range, table)
    return Sums.of(table)


def _moments_of(source: EmbeddedRows, places: str, group: Sequence[Block]) -> Moments | None:
    total: Moments | None = None
    for block in group:
        _, embeddings = source.read_block(places, block, "train")
        if len(embeddings):
            moments = Moments.of(torch.tensor(embeddings))
            total = moments if total is None else total.plus(moments)
    return total


def choose_heldout(selection: str, pairs: str, source: EmbeddedRows, lookups: str) -> pa.Table:
    """The held-out rows with the smallest keys, at most `MAX_HELDOUT`; training rows if nothing is held out.

    See `Snapshot.heldout_rows`.

    Args:
        lookups: folder for look-ups of the captions of training rows; none are written if nothing is held out.
    """
    files.delete(lookups)  # of an earlier attempt
    chosen = _first_rows(selection, pairs, source, "holdout")
    if not chosen.num_rows:
        first = _first_rows(selection, pairs, source, "train")
        return first.append_column("is_trained_on", pa.repeat(True, first.num_rows))
    captions = chosen["caption"].combine_chunks().unique()
    search = functools.partial(_captions_trained_on, selection, pairs, captions, lookups)
    found = run_all(search, source.key_ranges())
    trained_on = pa.concat_arrays(found).unique()
    return chosen.append_column("is_trained_on", pc.is_in(chosen["caption"], value_set=trained_on))


def _first_rows(selection: str, pairs: str, source: EmbeddedRows, split: Split) -> pa.Table:
    parts: list[pa.Table] = []
    for key_range in source.key_ranges():
        kept = source.read(selection, key_range)
        kept = kept.filter(pc.equal(kept["split"], split)).slice(0, MAX_HELDOUT - sum(part.num_rows for part in parts))
        captions = ranges.read_range(pairs, key_range, ["key", "caption", "status"])
        captions = captions.filter(pc.equal(captions["status"], rows.KEPT)).select(["key", "caption"])
        parts.append(kept.join(captions, "key").sort_by("key"))
        if sum(part.num_rows for part in parts) >= MAX_HELDOUT:
            break
    return pa.concat_tables(parts)


def _captions_trained_on(selection: str, pairs: str, captions: pa.Array, lookups: str, key_range: KeyRange) -> pa.Array:
    """Captions, among these, that a training row of the key range has; writes a look-up of all of them."""
    kept = ranges.read_range(selection, key_range, ["key", "split"])
    trained_on = kept.filter(pc.equal(kept["split"], "train"))["key"].combine_chunks()
    listed = ranges.read_range(pairs, key_range, ["key", "caption", "status"])
    listed = listed.filter(
        pc.and_(pc.equal(listed["status"], rows.KEPT), pc.is_in(listed["key"], value_set=trained_on))
    )
    _write_captions(lookups, key_range, listed["caption"], listed["caption"].slice(0, 0))
    return listed.filter(pc.is_in(listed["caption"], value_set=captions))["caption"].combine_chunks().unique()


def score(embedded: pa.Table, image_embeddings: torch.Tensor, config: CurateConfig) -> pa.Table:
    """Table of key, clip_score and a column per probe, with one row per embedded pair.

    Args:
        embedded: key, clip_score.
        image_embeddings: [N, E] of the same rows.
    """
    table = embedded.select(["key", "clip_score"])
    for probe_config in config.probes:
        probe = load_probe(probe_config.weights)
        found = torch.cat([probe(batch) for batch in torch.split(image_embeddings, ROWS_AT_ONCE)])
        table = table.append_column(probe_config.name, pa.array(found.numpy(), pa.float32()))
    return table


def out_of_bounds(scores: pa.Table, config: CurateConfig) -> pa.Table:
    """Key and reason of the rows with a score outside its limits; the first reason counts.

    NaN counts as low and infinity as low or high, even without limits: such a row is useless for training.
    """
    finite = np.finfo(np.float64)
    reasons: list[str] = []
    verdicts = np.full(scores.num_rows, -1)
    for name, (minimum, maximum) in config.limits().items():
        values = scores.column(name).to_numpy().astype(np.float64)
        low = ~(values >= (finite.min if minimum is None else minimum))
        high = values > (finite.max if maximum is None else maximum)
        for bound, mask in (("low", low), ("high", high)):
            verdicts[mask & (verdicts < 0)] = len(reasons)
            reasons.append(f"{name}_{bound}")
    dropped = np.flatnonzero(verdicts >= 0)
    reason = pa.array(reasons, pa.string()).take(pa.array(verdicts[dropped]))
    return pa.table({"key": scores["key"].take(pa.array(dropped)), "reason": reason})


def _spread(scores: pa.Table, config: CurateConfig) -> str:
    """Quantiles of the scores that have limits, to reveal a limit in the wrong unit."""
    text = ""
    for name, limits in config.limits().items():
        values = scores.column(name).to_numpy()
        values = values[np.isfinite(values)]
        if len(values) and limits != (None, None):
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
            text += f"Quantiles of {name}: 5 % {low:.3g}, 50 % {middle:.3g}, 95 % {high:.3g}. "
    return text
