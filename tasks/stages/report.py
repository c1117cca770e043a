"""Stage `report`: a page on a dataset version: kept rows, dropped rows and the reasons; opens from disk without a network.

Each range of keys is summarised in a task of its own, and the page is made of the sum of the summaries (`tasks.summaries`),
which is kept beside it. The page of a later refresh is made of the same sum after the rows that have changed since are
subtracted and added; it is the page that all rows would give. Keys are hashes, so the kept rows with the smallest keys are a
random sample, the same one whenever the page is made.
"""

import base64
import dataclasses
import functools
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import generations, host_counts, ranges, rows, tables
from tasks.captions import count_words
from tasks.dataflow import run_all
from tasks.duplicates import AnnotatedKeys, Earlier, Winner, clusters_of, find_winners
from tasks.find_duplicates import write_rows
from tasks.generations import Generation, Sums
from tasks.index import INDEX, index_files, index_identity, read_index
from tasks.new_duplicates import Lookups
from tasks.ranges import KeyRange
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.store import Store
from tasks.summaries import CutCaptions, Examples, Histogram, Summary, Totals
from unclip import files
from unclip.config import fingerprint, require, to_dict

TEMPLATE = Path(__file__).parent / "report.html.j2"
THUMBNAIL_SIDE = 118
NUM_BARS = 40
NUM_DOMAINS = 20
NUM_LOSSES = 3
"""Reasons named beside a domain."""
SPARE = 4
"""Rows that a summary keeps for each one that is shown, so that others take the places of those that change."""
_SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Limit:
    """Range of a measure that is kept."""

    measure: str
    minimum: float | None
    maximum: float | None


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    num_pictures: int = 24
    """Number of kept rows shown."""
    num_at_edges: int = 8
    """Number of rows shown on either side of each threshold."""
    num_clusters: int = 12
    """Number of duplicates per reason, shown beside the kept row."""

    limits: tuple[Limit, ...] = ()
    """Thresholds of [filter] and [curate], filled in by the pipeline."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "num_at_edges", "num_clusters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that rows have."""

    title: str
    unit: str
    below: str
    """Reason of rows below the minimum."""
    above: str


MEASURES: Mapping[str, Measure] = {
    "shorter_side": Measure("Shorter side of the original", "pixels", "too_small", ""),
    "aspect_ratio": Measure("Aspect ratio (longer to shorter side)", "", "", "bad_aspect"),
    "caption_words": Measure("Caption length", "words", "caption_too_short", "caption_too_long"),
    "caption_characters": Measure(
        "Caption length", "characters", "caption_too_few_characters", "caption_too_many_characters"
    ),
    "clip_score": Measure("CLIP score", "cosine", "clip_score_low", "clip_score_high"),
}
"""Measures by name; the others are probes."""


def measure_of(name: str) -> Measure:
    return MEASURES.get(name) or Measure(name, "", f"{name}_low", f"{name}_high")


@dataclasses.dataclass(frozen=True)
class Edge:
    """A limit, and the lists of the rows nearest to it."""

    title: str
    measure: str
    reason: str
    """Reason of rows beyond the limit."""
    sign: int
    """1 for a minimum, -1 for a maximum."""

    @property
    def inside(self) -> str:
        """Name of the list of kept rows."""
        return f"{self.reason}, kept"

    @property
    def outside(self) -> str:
        """Name of the list of rows that were dropped because of the limit."""
        return f"{self.reason}, dropped"


def edges_of(limits: Iterable[Limit]) -> list[Edge]:
    """All limits that are set."""
    found = []
    for limit in limits:
        measure = measure_of(limit.measure)
        for value, reason, sign, word in (
            (limit.minimum, measure.below, 1, "at least"),
            (limit.maximum, measure.above, -1, "at most"),
        ):
            if value is not None and reason:
                title = f"{measure.title}: {word} {value:g} {measure.unit}".strip()
                found.append(Edge(title, limit.measure, reason, sign))
    return found


def _shown(config: ReportConfig) -> dict[str, int]:
    """Number of rows that the page shows of each list."""
    lists = {rows.KEPT: config.num_pictures} | dict.fromkeys(DUPLICATES, config.num_clusters)
    names = [name for edge in edges_of(config.limits) for name in (edge.inside, edge.outside)]
    return lists | dict.fromkeys(names, config.num_at_edges)


def _capacities(config: ReportConfig) -> dict[str, int]:
    """Number of rows that a summary has of each list."""
    return {name: SPARE * number for name, number in _shown(config).items()}


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables of a dataset version that the page is made of."""

    selection: str
    """Folder of range files, like `pairs` and `scores`."""
    pairs: str
    scores: str
    images: str
    images_version: int
    index_version: int
    embeddings: str
    embeddings_version: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Tables":
        """Tables of the facts of `curate`."""
        snapshot = Snapshot.of(facts)
        names = [field.name for field in dataclasses.fields(cls) if field.name != "pairs"]
        return cls(pairs=facts["pairs"], **{name: getattr(snapshot, name) for name in names})

    def described(self) -> list[str]:
        """Files of the index of the images."""
        return index_files(self.images, self.index_version)

    def key_ranges(self) -> list[KeyRange]:
        return ranges.ranges(ranges.range_count(self.selection))


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that the page is made of, besides images and captions."""

    summary: Summary
    hosts: str
    """Folder of `host_counts.write_counts`."""
    num_hosts: int
    top_hosts: pa.Table
    """Counts of the hosts with the most rows; see `host_counts.most_rows`."""
    winners: Mapping[str, Winner | None]
    """Kept row of each duplicate that is shown; None if there is none any more."""


def _pin(config: ReportConfig, pinning: Pinning) -> ReportConfig:
    """Fill in the limits of [filter] and [curate]."""
    limits = {**pinning.config.filter.limits(), **pinning.config.curate.limits()}
    return dataclasses.replace(config, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))


@stage("report", version=3, pin=_pin, shows_rows=True)
def report(context: StageContext, config: ReportConfig, dataset: Artifact) -> Output:
    """Write the page on the dataset: totals, reasons, domains, distributions, and images at every threshold.

    Only rows that have changed since the page of an earlier refresh are read, and those that are shown.
    """
    facts, read = dataset.facts, Tables.of(dataset.facts)
    changes = _find_changes(context, config, read)
    found = None if changes is None else _continue(context, config, changes, _lookups(context.store, facts))
    if found is None:
        found = summarise(read, config, f"{context.folder}/hosts", context.intermediate)
    page = render(context.run.pipeline, facts, config, found)
    uri = f"{context.folder}/report.html"
    files.write(uri, page.encode())
    winners = {key: None if winner is None else list(winner) for key, winner in found.winners.items()}
    files.write_json(f"{context.folder}/{_SUMMARY}", {"summary": found.summary.document(), "winners": winners})
    counts = {name: facts[name] for name in ("rows", "reasons")}
    generation = Generation(
        context.folder,
        _settings(config),
        read.selection,
        dataclasses.asdict(read),
        Sums(counts, 0),
        0,  # a summary has no layers
        {"hosts": found.hosts},
        [index_identity(read.images)],
    )
    generations.save(context, generation)
    context.tracker.bytes(page.encode(), "report.html")
    return Output(uri, files.sha256(page.encode()))


def _settings(config: ReportConfig) -> str:
    return fingerprint(report.version, to_dict(config))


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Layers and files that the tables have since an earlier page."""

    earlier: Generation
    before: Tables
    now: Tables
    selection: Sequence[str]
    """They have all rows that have changed in any table."""
    pairs: Sequence[str]
    scores: Sequence[str]
    described: Sequence[str]
    """All files of the index."""
    new: Sequence[str]
    """New ones."""


def _find_changes(context: StageContext, config: ReportConfig, now: Tables) -> _Changes | None:
    """Find an earlier page to continue, and what has changed since; None if there is none, or if much has."""
    layers = {name: ranges.layers(getattr(now, name)) for name in ("selection", "pairs", "scores")}

    def layers_known(earlier: Generation) -> int | None:
        before = Tables(**earlier.read)
        is_earlier = before.selection in layers["selection"][:-1] and before.images == now.images
        is_earlier = is_earlier and all(getattr(before, name) in found for name, found in layers.items())
        is_whole = host_counts.num_files(earlier.others["hosts"]) is not None
        is_whole = is_whole and files.exists(f"{earlier.folder}/{_SUMMARY}")
        return layers["selection"].index(before.selection) if is_earlier and is_whole else None

    earlier = generations.find(context.store, "report", _settings(config), layers_known, [index_identity(now.images)])
    if earlier is None:
        return None
    before, described = Tables(**earlier.read), now.described()
    since = {name: found[found.index(getattr(before, name)) + 1 :] for name, found in layers.items()}
    if earlier.begins_anew(
        sum(tables.num_rows(uri) for folder in since["selection"] for uri in ranges.range_files(folder))
    ):
        return None
    known = set(before.described())
    if not all(map(files.exists, known.difference(described))):  # earlier sizes of images are read from them
        return None
    new = [uri for uri in described if uri not in known]
    return _Changes(earlier, before, now, **since, described=described, new=new)


def summarise(read: Tables, config: ReportConfig, hosts: str, scratch: str) -> Found:
    """Summarise all rows.

    Args:
        hosts: folder for the counts of hosts.
        scratch: folder for intermediate files.
    """
    key_ranges, described = read.key_ranges(), read.described()
    summarise_one = functools.partial(summarise_range, read, described, config, scratch)
    summary = Summary.total(run_all(summarise_one, key_ranges), _capacities(config))
    uris = [_hosts_uri(scratch, key_range) for key_range in key_ranges]
    num_hosts, top = host_counts.write_counts(hosts, uris, len(key_ranges), NUM_DOMAINS)
    return Found(summary, hosts, num_hosts, top, _winners(read, described, _duplicates(summary, config)))


def _lookups(store: Store, facts: Mapping[str, Any]) -> Lookups | None:
    """Look-ups of the rows that `dedup` has compared; None if it has none, or if some are missing."""
    selection = facts.get("selection", "")
    generation = generations.read(store, selection.rpartition("/")[0]) if selection else None
    folders = generation.others["lookups"] if generation else []
    if not folders:
        return None
    found = Lookups(folders, ranges.range_count(selection), bool(files.names(f"{folders[0]}/looks")))
    return found if found.is_whole() else None


def _continue(context: StageContext, config: ReportConfig, changes: _Changes, lookups: Lookups | None) -> Found | None:
    """Summarise all rows, of which only changed ones are read; None if too few rows of a list are known."""
    stored = files.read_json(f"{changes.earlier.folder}/{_SUMMARY}")
    before, scratch = Summary.of_document(stored["summary"]), context.intermediate
    winners: dict[str, Winner | None] = {
        key: None if winner is None else (winner[0], winner[1], winner[2]) for key, winner in stored["winners"].items()
    }
    watched = {key for examples in before.examples.values() for _, key in examples.rows}
    watched |= {key for pair in winners.items() for key in (pair[0], pair[1][2] if pair[1] else None) if key}
    key_ranges = changes.now.key_ranges()
    summarise_one = functools.partial(
        _summarise_changes, changes, config, scratch, pa.array(sorted(watched), pa.string())
    )
    parts = run_all(summarise_one, key_ranges)
    changed = frozenset().union(*(part.watched for part in parts))
    totals = before.totals.plus(Totals.total(part.before for part in parts), -1)
    capacities, new = _capacities(config), Summary.total([part.now for part in parts], _capacities(config))
    examples = {}
    for name, number in _shown(config).items():
        replaced = before.examples[name].replace(changed, new.examples[name], capacities[name], number)
        if replaced is None:
            return None
        examples[name] = replaced
    summary = Summary(totals.plus(new.totals), examples)
    hosts, earlier_hosts = f"{context.folder}/hosts-since-{changes.earlier.name}", changes.earlier.others["hosts"]
    count, uris = host_counts.num_files(earlier_hosts), [_hosts_uri(scratch, key_range) for key_range in key_ranges]
    assert count is not None
    num_hosts, top = host_counts.write_counts(hosts, uris, count, NUM_DOMAINS, earlier_hosts)
    left = {
        key: winner
        for key, winner in winners.items()
        if key not in changed and (winner is None or winner[2] not in changed)
    }
    known = Earlier(left, changes.selection, changes.new, lookups)
    duplicates = _duplicates(summary, config)
    return Found(summary, hosts, num_hosts, top, _winners(changes.now, changes.described, duplicates, known))


def _hosts_uri(scratch: str, key_range: KeyRange) -> str:
    return f"{scratch}/hosts/{key_range}.rows"


def _duplicates(summary: Summary, config: ReportConfig) -> dict[str, str]:
    """Key -> reason of the duplicates that are shown."""
    lists = {name: summary.examples[name].rows[: config.num_clusters] for name in DUPLICATES}
    return {key: name for name, found in lists.items() for _, key in found}


def _winners(
    read: Tables, described: Sequence[str], duplicates: Mapping[str, str], earlier: Earlier | None = None
) -> dict[str, Winner | None]:
    embeddings = tables.files(read.embeddings, read.embeddings_version)
    found = find_winners(duplicates, read.selection, described, embeddings, earlier)
    return {key: found.get(key) for key in duplicates}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of some keys in all tables, each sorted by key."""

    selection: pa.Table
    pairs: pa.Table
    images: pa.Table
    """Rows of the index of those that are usable."""
    scores: pa.Table

    def fates(self) -> pa.Table:
        """See `rows.fates`."""
        return rows.fates(self.selection)


_SELECTION = ["key", "status", "reason"]
_PAIRS = ["key", "url", "caption", "status"]
_IMAGES = ["key", "original_width", "original_height"]


def _usable(pairs: pa.Table) -> pa.Array:
    """Keys of the usable rows of a list; the index may have rows of other lists."""
    return pc.unique(pairs.filter(pc.equal(pairs["status"], rows.KEPT))["key"].combine_chunks())


def _without(table: pa.Table, keys: pa.Array | pa.ChunkedArray) -> pa.Table:
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return table.filter(pc.invert(pc.is_in(table["key"], value_set=keys)))


def summarise_range(
    read: Tables, described: Sequence[str], config: ReportConfig, scratch: str, key_range: KeyRange
) -> Summary:
    """Summarise the rows of one range of keys, and write the counts of their hosts to the scratch folder.

    Args:
        described: files of the index of the images.
    """
    selection = ranges.read_range(read.selection, key_range, _SELECTION)
    pairs = ranges.read_range(read.pairs, key_range, _PAIRS)
    images = read_index(described, key_range, _IMAGES)
    images = images.filter(pc.is_in(images["key"], value_set=_usable(pairs)))
    found = _Rows(selection, pairs, images, ranges.read_range(read.scores, key_range))
    fates = found.fates()
    write_rows(_hosts_uri(scratch, key_range), host_counts.count_hosts(pairs, fates))
    return _summary_of(found, fates, config)


@dataclasses.dataclass(frozen=True)
class _Changed:
    """Effects of the changed rows of one range."""

    before: Totals
    """Totals of their earlier values."""
    now: Summary
    watched: frozenset[str]
    """Changed keys among those that the earlier page depends on."""


def _summarise_changes(
    changes: _Changes, config: ReportConfig, scratch: str, watched: pa.Array, key_range: KeyRange
) -> _Changed:
    """Summarise the changed rows of one range of keys, and write how they change the counts of hosts."""
    selection = ranges.read_layers(changes.selection, key_range, _SELECTION)
    keys = pc.unique(selection["key"].combine_chunks())
    known = ranges.known_keys(ranges.layers(changes.before.pairs), key_range, selection["key"])
    before = _find(changes.before, known)
    now = _Rows(
        selection,
        pairs := _newer(before.pairs, changes.pairs, key_range, _PAIRS),
        _newer_images(before.images, changes, key_range, _usable(pairs)),
        _newer(before.scores, changes.scores, key_range),
    )
    fates_before, fates = before.fates(), now.fates()
    counts = [
        host_counts.count_hosts(pairs, fates),
        host_counts.count_hosts(before.pairs, fates_before, -1),
    ]
    write_rows(_hosts_uri(scratch, key_range), host_counts.add_up(pa.concat_tables(counts)))
    own = watched.filter(pc.is_in(watched, value_set=keys)).to_pylist()
    return _Changed(_totals_of(before, fates_before), _summary_of(now, fates, config), frozenset(own))


def _find(read: Tables, keys: pa.Array) -> _Rows:
    """Rows with some keys."""
    wanted, described = keys.to_pylist(), read.described()
    pairs = ranges.find_rows(read.pairs, wanted, _PAIRS)
    images = INDEX.empty_table().select(_IMAGES)
    if described:
        images = ranges.find_rows(described, _usable(pairs).to_pylist(), _IMAGES)
    selection = ranges.find_rows(read.selection, wanted, _SELECTION)
    return _Rows(selection, pairs, images, ranges.find_rows(read.scores, wanted))


def _newer(
    before: pa.Table, layers: Sequence[str], key_range: KeyRange, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows as later layers of their table have them.

    Args:
        before: rows of all earlier keys that the layers have or remove.
    """
    if not layers:
        return before
    later = ranges.read_layers(layers, key_range, columns)
    removed = [ranges.read_removed(folder, key_range) for folder in layers]
    left = _without(_without(before, later["key"]), pa.concat_arrays(removed))
    return pa.concat_tables([left, later], promote_options="default").sort_by("key")


def _newer_images(before: pa.Table, changes: _Changes, key_range: KeyRange, usable: pa.Array) -> pa.Table:
    """Rows of the index as its new files have them.

    Args:
        before: rows of earlier keys.
    """
    new = read_index(changes.new, key_range, _IMAGES)
    parts = [new, _without(before, new["key"])]
    parts = [part.filter(pc.is_in(part["key"], value_set=usable)) for part in parts]
    others = usable
    for part in parts:
        others = others.filter(pc.invert(pc.is_in(others, value_set=part["key"].combine_chunks())))
    if len(others) and changes.described:  # fetched for another list, or not fetched
        parts.append(ranges.find_rows(changes.described, others.to_pylist(), _IMAGES))
    return pa.concat_tables(parts).sort_by("key")


def _summary_of(found: _Rows, fates: pa.Table, config: ReportConfig) -> Summary:
    capacities, measured = _capacities(config), _measured(found)
    stored = fates.filter(pc.is_in(fates["key"], value_set=found.images["key"].combine_chunks()))
    examples = {rows.KEPT: _first_with_fate(fates, rows.KEPT, capacities[rows.KEPT])}
    examples |= {name: _first_with_fate(stored, name, capacities[name]) for name in DUPLICATES}
    for edge in edges_of(config.limits):
        keys, values = measured.get(edge.measure, (fates["key"].slice(0, 0), np.zeros(0)))
        fate = fates["fate"].take(pc.index_in(keys, value_set=fates["key"].combine_chunks()))
        for name, wanted, sign in ((edge.inside, rows.KEPT, edge.sign), (edge.outside, edge.reason, -edge.sign)):
            examples[name] = _smallest(keys, values, pc.equal(fate, wanted), sign, capacities[name])
    return Summary(_totals_of(found, fates, measured), examples)


Measured = Mapping[str, tuple[pa.ChunkedArray, np.ndarray]]
"""Name of a measure -> ascending keys of the rows that have a value, and the values: [N] float64."""


def _totals_of(found: _Rows, fates: pa.Table, measured: Measured | None = None) -> Totals:
    explained = found.selection.filter(pc.is_valid(found.selection["reason"]))
    counted = explained.group_by(["reason", "status"]).aggregate([([], "count_all")]).to_pylist()
    return Totals(
        {(row["reason"], row["status"]): row["count_all"] for row in counted},
        _cut_captions(found.scores, fates),
        {name: Histogram.of(values) for name, (_, values) in (measured or _measured(found)).items()},
    )


def _cut_captions(scores: pa.Table, fates: pa.Table) -> CutCaptions:
    if "tokens_lost" not in scores.column_names:  # of an earlier release
        return CutCaptions(0, 0, 0)
    kept = fates.filter(pc.equal(fates["fate"], rows.KEPT))["key"].combine_chunks()
    lost = scores.filter(pc.is_in(scores["key"], value_set=kept))["tokens_lost"].drop_null()
    return CutCaptions(len(lost), pc.sum(pc.greater(lost, 0)).as_py() or 0, pc.sum(lost).as_py() or 0)


def _first_with_fate(fates: pa.Table, fate: str, count: int) -> Examples:
    keys = fates.filter(pc.equal(fates["fate"], fate))["key"]
    return Examples([(0.0, key) for key in keys.slice(0, count).to_pylist()], len(keys) > count)


def _measured(found: _Rows) -> Measured:
    """Measures of some rows, in the order of the page."""
    sizes = found.images.filter(pc.is_valid(found.images["original_width"]))
    width, height = (sizes[name].to_numpy().astype(float) for name in ("original_width", "original_height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    captioned = _last_of_each_key(found.pairs)
    captioned = captioned.filter(pc.greater(pc.utf8_length(captioned["caption"]), 0))
    keys, captions = captioned["key"], captioned["caption"]
    values = {
        "shorter_side": (sizes["key"], shorter),
        "aspect_ratio": (sizes["key"], longer / shorter),
        "caption_words": (keys, np.asarray(count_words(captions), float)),
        "caption_characters": (keys, np.asarray(pc.utf8_length(captions), float)),
    }
    for field in found.scores.schema:
        if pa.types.is_floating(field.type):  # the others are places of embeddings
            values[field.name] = (found.scores["key"], np.asarray(found.scores[field.name], float))
    return values


def _last_of_each_key(pairs: pa.Table) -> pa.Table:
    """The last row of each key, of a table that is sorted by key."""
    keys = pairs["key"].combine_chunks()
    return pairs.filter(
        pa.array(np.append(pc.not_equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))), [True])[: len(keys)])
    )


def _smallest(keys: pa.ChunkedArray, values: np.ndarray, mask: pa.ChunkedArray, sign: int, count: int) -> Examples:
    """Rows with the smallest values, ranked by them; with the sign -1, those with the largest."""
    candidates = np.flatnonzero(pc.fill_null(mask, False).to_numpy() & ~np.isnan(values))
    order = candidates[np.argsort(sign * values[candidates], kind="stable")[:count]]  # keys ascend
    ranks = (sign * values[order]).tolist()
    return Examples(list(zip(ranks, keys.take(order).to_pylist(), strict=True)), len(candidates) > count)


def render(pipeline: str, facts: Mapping[str, Any], config: ReportConfig, found: Found) -> str:
    """Render the page as HTML. Text from lists and servers is escaped, and the page loads nothing.

    Args:
        facts: facts of `curate`.
        found: what `summarise` returned for its tables.
    """
    import jinja2

    snapshot, summary = Snapshot.of(facts), found.summary
    described = index_files(snapshot.images, snapshot.index_version)
    kept = [key for _, key in summary.examples[rows.KEPT].rows[: config.num_pictures]]
    edges = _nearest(summary, config)
    clusters = clusters_of(
        _duplicates(summary, config), {key: winner for key, winner in found.winners.items() if winner is not None}
    )
    shown = set(kept)
    shown |= {key for _, *groups in edges for group in groups for key, _ in group}
    shown |= {key for cluster in clusters for key, _ in cluster}
    thumbnails = _thumbnails(snapshot.images, described, shown)
    captions = dict(_captions(ranges.find_rows(facts["pairs"], sorted(shown), ["key", "caption"])))

    def figures(noted: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        listed = [(key, note) for key, note in noted if key in thumbnails]
        return [{"key": k, "note": n, "caption": captions.get(k, ""), "source": thumbnails[k]} for k, n in listed]

    statuses = summary.totals.status_of()
    reasons = [
        {"name": name, "count": count, "status": statuses[name], "meaning": rows.meaning(name)}
        for name, count in facts["reasons"].items()
    ]
    limits = {limit.measure: limit for limit in config.limits}
    histograms = {name: each for name, each in summary.totals.histograms.items() if len(each.values)}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        pipeline=pipeline,
        digest=snapshot.digest,
        total=facts["rows"]["in"],
        outcomes=[(name, facts["rows"][name]) for name in (rows.KEPT, rows.DROPPED, rows.FAILED)],
        duplicates=sum(facts["reasons"].get(name, 0) for name in DUPLICATES),
        reasons=reasons,
        largest_reason=max((reason["count"] for reason in reasons), default=1),
        cut=summary.totals.cut,
        num_domains=found.num_hosts,
        domains=_domains(found.top_hosts),
        charts=[_chart(measure_of(name), each, limits.get(name)) for name, each in histograms.items()],
        kept=figures((key, "") for key in kept),
        edges=[
            {"title": title, "kept": figures(inside), "dropped": figures(outside)} for title, inside, outside in edges
        ],
        clusters=[figures(cluster) for cluster in clusters],
    )


def _captions(pairs: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(pairs["key"].to_pylist(), pairs["caption"].to_pylist(), strict=True)


def _nearest(summary: Summary, config: ReportConfig) -> list[tuple[str, AnnotatedKeys, AnnotatedKeys]]:
    """Each limit with the nearest rows on either side; limits that dropped no row are omitted."""
    found = []
    for edge in edges_of(config.limits):
        inside, outside = (
            [(key, f"{sign * rank:.4g}") for rank, key in summary.examples[name].rows[: config.num_at_edges]]
            for name, sign in ((edge.inside, edge.sign), (edge.outside, -edge.sign))
        )
        if outside:
            found.append((edge.title, inside, outside))
    return found


def _domains(counts: pa.Table) -> list[dict[str, Any]]:
    """Rows of the hosts with the most, and the reasons for which most are lost, from `host_counts.most_rows`."""
    fates: dict[str, dict[str, int]] = defaultdict(dict)
    for row in counts.to_pylist():
        fates[row["host"]][row["fate"]] = row["rows"]
    found = []
    for host, numbers in fates.items():
        losses = [f"{name} {number:,}" for name, number in numbers.items() if name != rows.KEPT]
        lost = ", ".join(losses[:NUM_LOSSES])
        found.append({"name": host, "rows": sum(numbers.values()), "kept": numbers.get(rows.KEPT, 0), "lost": lost})
    return found


def _chart(measure: Measure, histogram: Histogram, thresholds: Limit | None) -> dict[str, Any]:
    """Histogram over the 0.5th to 99.5th percentile and the limits; values beyond count in the outermost bars."""
    bounds = (None, None) if thresholds is None else (thresholds.minimum, thresholds.maximum)
    limits = [bound for bound in bounds if bound is not None]
    low, high = (histogram.percentile(percent) for percent in (0.5, 99.5))
    low, high = min([low, *limits]), max([high, *limits])
    high = high if high > low else low + 1
    counts, edges = np.histogram(
        histogram.values.clip(low, high), bins=NUM_BARS, range=(low, high), weights=histogram.counts
    )

    def place(value: float) -> float:
        return round(10 + 300 * (value - low) / (high - low), 1)

    bars = []
    for count, left, right in zip(counts.tolist(), edges, edges[1:], strict=False):
        height = round(100 * count / max(1, counts.max()), 1)
        label = f"{left:.4g} to {right:.4g}: {count:,}"
        bars.append(
            {"x": place(left), "y": 125 - height, "width": 300 / NUM_BARS - 1, "height": height, "label": label}
        )
    limit_lines = []
    for limit in limits:
        right = place(limit) > 200
        limit_lines.append(
            {
                "x": place(limit),
                "label": f"{limit:g}",
                "anchor": "end" if right else "start",
                "shift": -4 if right else 4,
            }
        )
    return {
        "title": measure.title,
        "unit": measure.unit,
        "bars": bars,
        "limits": limit_lines,
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
    }


def _thumbnails(images: str, described: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
    """Key -> data URI of a small JPEG; reads only the row groups that hold the images."""
    from PIL import Image

    places: dict[str, list[int]] = defaultdict(list)
    for place in ranges.find_rows(described, sorted(keys), ["key", "part", "row"]).to_pylist():
        places[place["part"]].append(place["row"])
    found = {}
    for part, numbers in places.items():
        table = tables.read_rows(f"{images}/{part}", numbers, ["key", "jpg"])
        for key, jpg in zip(table["key"].to_pylist(), table["jpg"].to_pylist(), strict=True):
            if jpg is None:
                continue
            image = Image.open(io.BytesIO(jpg), formats=["JPEG"])
            image.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=80)
            found[key] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found
