"""Stage `report`: a page on a dataset version: kept rows, dropped rows and the reasons; opens from disk without a network.

Each range of keys is summarised in a task of its own, and the page is made of the summaries: counts, the nearest rows at each
threshold, and a sample of each measure. Keys are hashes, so the rows with the smallest keys of each range are a random sample,
the same one whenever the page is made.
"""

import base64
import dataclasses
import functools
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import ranges, rows, tables
from tasks.captions import count_words
from tasks.dataflow import run_all
from tasks.duplicates import AnnotatedKeys, duplicate_clusters
from tasks.index import index_files, read_index
from tasks.ranges import KeyRange
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.tombstones import hosts_of
from unclip import files
from unclip.config import require

TEMPLATE = Path(__file__).parent / "report.html.j2"
THUMBNAIL_SIDE = 118
NUM_BARS = 40
MAX_SAMPLE = 100_000
"""Values of a measure that its chart shows; of more, a random sample."""
MAX_HOSTS = 2_000_000
"""Hosts of all ranges together that are counted; of more, those with the most rows in a range."""
NUM_DOMAINS = 20
CHARACTER_REASONS = ("caption_too_few_characters", "caption_too_many_characters")


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
    """Values of some rows, and the limits within which rows are kept."""

    title: str
    unit: str
    keys: pa.ChunkedArray
    """Ascending keys of the rows that have a value."""
    values: np.ndarray
    """Value of each of them: [N] float64."""
    minimum: float | None = None
    maximum: float | None = None
    reasons: tuple[str, str] = ("", "")
    """Reasons of rows below the minimum and above the maximum."""


@dataclasses.dataclass(frozen=True)
class Edge:
    """Rows nearest to a limit: (distance, key, value) of kept rows, and of rows that were dropped because of it."""

    title: str
    inside: list[tuple[float, str, float]]
    outside: list[tuple[float, str, float]]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A random sample of a measure, and the number of rows that have a value."""

    title: str
    unit: str
    limits: tuple[float, ...]
    num_values: int
    sample: np.ndarray


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything that the page shows of one range of keys."""

    statuses: Mapping[str, str]
    """Reason -> status."""
    kept: list[str]
    """The first kept keys."""
    duplicates: Mapping[str, list[str]]
    """Reason -> the first keys that were dropped as duplicates."""
    hosts: pa.Table
    """Number of rows by host and fate: host, fate, rows."""
    lacks_hosts: bool
    """True if only the hosts with the most rows are counted."""
    edges: list[Edge]
    distributions: list[Distribution]
    cut: "CutCaptions"


@dataclasses.dataclass(frozen=True)
class CutCaptions:
    """Captions of kept rows that are longer than CLIP reads."""

    counted: int
    """Captions whose tokens were counted."""
    captions: int
    tokens: int
    """Tokens that CLIP does not read."""

    @property
    def share(self) -> str:
        """Share of the counted captions, as a text."""
        percent = 100 * self.captions / max(1, self.counted)
        return "less than 0.01 %" if 0 < percent < 0.01 else f"{percent:.3g} %"


def _pin(config: ReportConfig, pinning: Pinning) -> ReportConfig:
    """Fill in the limits of [filter] and [curate]."""
    limits = {**pinning.config.filter.limits(), **pinning.config.curate.limits()}
    return dataclasses.replace(config, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))


@stage("report", version=2, pin=_pin, shows_rows=True)
def report(context: StageContext, config: ReportConfig, dataset: Artifact) -> Output:
    """Write the page on the dataset: totals, reasons, domains, distributions, and images at every threshold."""
    page = render(context.run.pipeline, Snapshot.of(dataset.facts), dataset.facts, config)
    uri = f"{context.folder}/report.html"
    files.write(uri, page.encode())
    context.tracker.bytes(page.encode(), "report.html")
    return Output(uri, files.sha256(page.encode()))


def render(pipeline: str, snapshot: Snapshot, facts: Mapping[str, Any], config: ReportConfig) -> str:
    """Render the page as HTML. Text from lists and servers is escaped, and the page loads nothing."""
    import jinja2

    described = index_files(snapshot.images, snapshot.index_version)
    all_ranges = ranges.ranges(ranges.range_count(snapshot.selection))
    summarise = functools.partial(summarise_range, snapshot, facts["pairs"], described, config)
    summaries = run_all(summarise, all_ranges)

    kept = [key for summary in summaries for key in summary.kept][: config.num_pictures]
    edges = _merged_edges([summary.edges for summary in summaries], config.num_at_edges)
    duplicates = {
        key: name
        for name in DUPLICATES
        for key in [key for summary in summaries for key in summary.duplicates[name]][: config.num_clusters]
    }
    embeddings = tables.files(snapshot.embeddings, snapshot.embeddings_version)
    clusters = duplicate_clusters(duplicates, snapshot.selection, described, embeddings)
    shown = set(kept)
    shown |= {key for _, *groups in edges for group in groups for key, _ in group}
    shown |= {key for cluster in clusters for key, _ in cluster}
    thumbnails = _thumbnails(snapshot.images, described, shown)
    captions = dict(_captions(ranges.find_rows(facts["pairs"], sorted(shown), ["key", "caption"])))

    def figures(noted: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        listed = [(key, note) for key, note in noted if key in thumbnails]
        return [{"key": k, "note": n, "caption": captions.get(k, ""), "source": thumbnails[k]} for k, n in listed]

    statuses = {name: status for summary in summaries for name, status in summary.statuses.items()}
    reasons = [
        {"name": name, "count": count, "status": statuses[name], "meaning": rows.meaning(name)}
        for name, count in facts["reasons"].items()
    ]
    cut = [dataclasses.astuple(summary.cut) for summary in summaries]
    num_domains, domains = _domains([summary.hosts for summary in summaries])
    measured = [distribution for summary in summaries for distribution in summary.distributions]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        pipeline=pipeline,
        digest=snapshot.digest,
        total=facts["rows"]["in"],
        outcomes=[(name, facts["rows"][name]) for name in (rows.KEPT, rows.DROPPED, rows.FAILED)],
        duplicates=sum(facts["reasons"].get(name, 0) for name in DUPLICATES),
        reasons=reasons,
        largest_reason=max((reason["count"] for reason in reasons), default=1),
        cut=CutCaptions(*map(sum, zip(*cut, strict=True))),
        num_domains=num_domains,
        lacks_domains=any(summary.lacks_hosts for summary in summaries),
        domains=domains,
        charts=[_chart(distribution) for distribution in _merged_distributions(measured) if distribution.num_values],
        kept=figures((key, "") for key in kept),
        edges=[
            {"title": title, "kept": figures(inside), "dropped": figures(outside)} for title, inside, outside in edges
        ],
        clusters=[figures(cluster) for cluster in clusters],
    )


def summarise_range(
    snapshot: Snapshot, pairs_folder: str, described: Sequence[str], config: ReportConfig, key_range: KeyRange
) -> Summary:
    """Summarise the rows of one range of keys.

    Args:
        pairs_folder: folder of range files of the list.
        described: files of the index of the images.
    """
    selection = ranges.read_range(snapshot.selection, key_range, ["key", "status", "reason"])
    fates = rows.fates(selection)
    reasons = selection.filter(pc.is_valid(selection["reason"])).group_by("reason").aggregate([("status", "max")])
    pairs = ranges.read_range(pairs_folder, key_range, ["key", "url", "caption"])
    images = read_index(described, key_range, ["key", "original_width", "original_height"])
    scores = ranges.read_range(snapshot.scores, key_range)
    measures = _measures(pairs, images, scores, {limit.measure: limit for limit in config.limits})
    hosts, lacks_hosts = _count_hosts(pairs, fates, MAX_HOSTS // key_range.count)
    stored = fates.filter(pc.is_in(fates["key"], value_set=images["key"]))
    return Summary(
        statuses=dict(zip(reasons["reason"].to_pylist(), reasons["status_max"].to_pylist(), strict=True)),
        kept=_first_with_fate(fates, rows.KEPT, config.num_pictures),
        duplicates={name: _first_with_fate(stored, name, config.num_clusters) for name in DUPLICATES},
        hosts=hosts,
        lacks_hosts=lacks_hosts,
        edges=[edge for measure in measures for edge in _edges(measure, fates, config.num_at_edges)],
        distributions=[_distribution(measure, MAX_SAMPLE // key_range.count) for measure in measures],
        cut=_cut_captions(scores, fates),
    )


def _cut_captions(scores: pa.Table, fates: pa.Table) -> CutCaptions:
    if "tokens_lost" not in scores.column_names:  # of an earlier release
        return CutCaptions(0, 0, 0)
    kept = fates.filter(pc.equal(fates["fate"], rows.KEPT))["key"].combine_chunks()
    lost = scores.filter(pc.is_in(scores["key"], value_set=kept))["tokens_lost"].drop_null()
    return CutCaptions(len(lost), pc.sum(pc.greater(lost, 0)).as_py() or 0, pc.sum(lost).as_py() or 0)


def _first_with_fate(fates: pa.Table, fate: str, count: int) -> list[str]:
    found: list[str] = fates.filter(pc.equal(fates["fate"], fate))["key"].slice(0, count).to_pylist()
    return found


def _measures(pairs: pa.Table, images: pa.Table, scores: pa.Table, limits: Mapping[str, Limit]) -> list[Measure]:
    """Measures of the rows of a range, in the order of their keys."""

    def measure(name: str, title: str, unit: str, keys: Any, values: Any, *reasons: str) -> Measure:
        limit = limits.get(name, Limit(name, None, None))
        below, above = reasons
        values = np.asarray(values, float)
        return Measure(title, unit, keys, values, limit.minimum, limit.maximum, (below, above))

    sizes = images.filter(pc.is_valid(images["original_width"]))
    width, height = (sizes[name].to_numpy().astype(float) for name in ("original_width", "original_height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    captioned = _last_of_each_key(pairs)
    captioned = captioned.filter(pc.greater(pc.utf8_length(captioned["caption"]), 0))
    keys, captions = captioned["key"], captioned["caption"]
    measures = [
        measure("shorter_side", "Shorter side of the original", "pixels", sizes["key"], shorter, "too_small", ""),
        measure(
            "aspect_ratio",
            "Aspect ratio (longer to shorter side)",
            "",
            sizes["key"],
            longer / shorter,
            "",
            "bad_aspect",
        ),
        measure(
            "caption_words",
            "Caption length",
            "words",
            keys,
            count_words(captions),
            "caption_too_short",
            "caption_too_long",
        ),
        measure(
            "caption_characters", "Caption length", "characters", keys, pc.utf8_length(captions), *CHARACTER_REASONS
        ),
    ]
    for field in scores.schema:
        if pa.types.is_floating(field.type):  # the others are places of embeddings
            name = field.name
            title, unit = ("CLIP score", "cosine") if name == "clip_score" else (name, "")
            measures.append(measure(name, title, unit, scores["key"], scores[name], f"{name}_low", f"{name}_high"))
    return measures


def _last_of_each_key(pairs: pa.Table) -> pa.Table:
    """The last row of each key, of a table that is sorted by key."""
    keys = pairs["key"].combine_chunks()
    return pairs.filter(
        pa.array(np.append(pc.not_equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))), [True])[: len(keys)])
    )


def _captions(pairs: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(pairs["key"].to_pylist(), pairs["caption"].to_pylist(), strict=True)


def _edges(measure: Measure, fates: pa.Table, count: int) -> list[Edge]:
    """For each limit: the nearest rows that are kept, and the nearest that were dropped because of it."""
    fate = fates["fate"].take(pc.index_in(measure.keys, value_set=fates["key"]))  # null outside the list
    found = []
    for limit, reason, sign, word in (
        (measure.minimum, measure.reasons[0], 1, "at least"),
        (measure.maximum, measure.reasons[1], -1, "at most"),
    ):
        if limit is None or not reason:
            continue
        title = f"{measure.title}: {word} {limit:g} {measure.unit}".strip()
        inside, outside = (
            _smallest(measure, pc.equal(fate, wanted), direction, count)
            for wanted, direction in ((rows.KEPT, sign), (reason, -sign))
        )
        found.append(Edge(title, inside, outside))
    return found


def _smallest(measure: Measure, mask: pa.ChunkedArray, sign: int, count: int) -> list[tuple[float, str, float]]:
    """Rows with the smallest values (the largest, if the sign is -1), as (sign * value, key, value)."""
    candidates = np.flatnonzero(pc.fill_null(mask, False).to_numpy() & ~np.isnan(measure.values))
    order = candidates[np.argsort(sign * measure.values[candidates], kind="stable")[:count]]  # keys ascend
    keys, values = measure.keys.take(order).to_pylist(), measure.values[order].tolist()
    return [(sign * value, key, value) for key, value in zip(keys, values, strict=True)]


def _merged_edges(edges: Sequence[Sequence[Edge]], count: int) -> list[tuple[str, AnnotatedKeys, AnnotatedKeys]]:
    """Each limit with the nearest rows of all ranges; limits that dropped no row are omitted."""
    merged = []
    for same in zip(*edges, strict=True):
        inside, outside = (
            [(key, f"{value:.4g}") for _, key, value in sorted(itertools.chain(*groups))[:count]]
            for groups in ([edge.inside for edge in same], [edge.outside for edge in same])
        )
        if outside:
            merged.append((same[0].title, inside, outside))
    return merged


def _count_hosts(pairs: pa.Table, fates: pa.Table, limit: int) -> tuple[pa.Table, bool]:
    """Rows by host and fate, of the `limit` hosts with the most rows; True if some were left out."""
    fate = fates["fate"].take(pc.index_in(pairs["key"], value_set=fates["key"]))
    host = pc.fill_null(hosts_of(pairs["url"]), "(none)")
    counts = _add_up(pa.table({"host": host, "fate": fate, "rows": np.ones(pairs.num_rows, np.int64)}))
    totals = counts.select(["host", "rows"]).group_by("host").aggregate([("rows", "sum")])
    if totals.num_rows <= limit:
        return counts, False
    largest = totals.sort_by([("rows_sum", "descending"), ("host", "ascending")])["host"].slice(0, limit)
    return counts.filter(pc.is_in(counts["host"], value_set=largest)), True


def _add_up(counts: pa.Table) -> pa.Table:
    summed = counts.group_by(["host", "fate"], use_threads=False).aggregate([("rows", "sum")])  # in order
    return pa.table({"host": summed["host"], "fate": summed["fate"], "rows": summed["rows_sum"]})


def _domains(counts: Sequence[pa.Table]) -> tuple[int, list[dict[str, Any]]]:
    """Number of hosts, and the counts of those with the most rows."""
    by_fate = _add_up(pa.concat_tables(counts))
    totals = by_fate.select(["host", "rows"]).group_by("host").aggregate([("rows", "sum")])
    top = totals.sort_by([("rows_sum", "descending"), ("host", "ascending")])["host"].slice(0, NUM_DOMAINS)
    fates: dict[str, Counter[str]] = defaultdict(Counter)
    for row in by_fate.filter(pc.is_in(by_fate["host"], value_set=top)).to_pylist():
        fates[row["host"]][row["fate"]] = row["rows"]
    found = []
    for host in top.to_pylist():
        most = fates[host].most_common(4)
        losses = ", ".join(f"{name} {number:,}" for name, number in most if name != rows.KEPT)
        found.append({"name": host, "rows": fates[host].total(), "kept": fates[host][rows.KEPT], "lost": losses})
    return totals.num_rows, found


def _distribution(measure: Measure, count: int) -> Distribution:
    limits = tuple(limit for limit in (measure.minimum, measure.maximum) if limit is not None)
    return Distribution(measure.title, measure.unit, limits, len(measure.values), measure.values[:count])


def _merged_distributions(distributions: Sequence[Distribution]) -> list[Distribution]:
    """The distribution of each measure over all ranges."""
    by_measure: dict[tuple[str, str], list[Distribution]] = defaultdict(list)
    for distribution in distributions:
        by_measure[distribution.title, distribution.unit].append(distribution)
    return [
        dataclasses.replace(
            same[0],
            num_values=sum(distribution.num_values for distribution in same),
            sample=np.concatenate([distribution.sample for distribution in same]),
        )
        for same in by_measure.values()
    ]


def _chart(distribution: Distribution) -> dict[str, Any]:
    """Histogram over the 0.5th to 99.5th percentile and the limits; values beyond count in the outermost bars."""
    values = distribution.sample[np.isfinite(distribution.sample)]
    limits, num_sampled = distribution.limits, len(distribution.sample)
    low, high = np.percentile(values, [0.5, 99.5]) if len(values) else (0.0, 1.0)
    low, high = min([low, *limits]), max([high, *limits])
    high = high if high > low else low + 1
    counts, edges = np.histogram(values.clip(low, high), bins=NUM_BARS, range=(low, high))

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
        "title": distribution.title,
        "unit": distribution.unit,
        "sampled": f"sample of {num_sampled:,} of {distribution.num_values:,} rows"
        if num_sampled < distribution.num_values
        else "",
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
