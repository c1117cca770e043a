"""Page of the stage `report`: the lists of rows that it shows, charts, domains and thumbnails, as one HTML file."""

import base64
import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks import ranges, rows, tables
from tasks.duplicates import AnnotatedKeys, Winner, clusters_of
from tasks.index import index_files
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.summaries import Histogram, SortedList, Summary

TEMPLATE = Path(__file__).with_name("report_page.html.j2")
THUMBNAIL_SIDE = 118
NUM_BARS = 40
NUM_DOMAINS = 20
NUM_LOSSES = 3
"""Reasons named beside a domain."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Range of a measure that is kept."""

    measure: str
    minimum: float | None
    maximum: float | None


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


def lists_of(limits: Iterable[Limit], num_pictures: int, num_at_edges: int, num_clusters: int) -> dict[str, SortedList]:
    """Lists of rows that the page shows, by name; see `ReportConfig` for the numbers."""
    found = {rows.KEPT: SortedList(rows.KEPT, num_pictures)}
    found |= {name: SortedList(name, num_clusters) for name in DUPLICATES}
    for edge in edges_of(limits):
        found[edge.inside] = SortedList(rows.KEPT, num_at_edges, edge.measure, edge.sign)
        found[edge.outside] = SortedList(edge.reason, num_at_edges, edge.measure, -edge.sign)
    return found


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
    """Kept row of each of `shown_duplicates`; None if there is none any more."""


def shown_duplicates(summary: Summary, lists: Mapping[str, SortedList]) -> dict[str, str]:
    """Key -> reason."""
    return {key: name for name in DUPLICATES for _, key in _shown(summary, lists, name)}


def _shown(summary: Summary, lists: Mapping[str, SortedList], name: str) -> Sequence[tuple[float, str]]:
    return summary.examples[name].rows[: lists[name].num_shown]


def render(
    pipeline: str, facts: Mapping[str, Any], limits: Sequence[Limit], lists: Mapping[str, SortedList], found: Found
) -> str:
    """Render the page as HTML. Text from lists and servers is escaped, and the page loads nothing.

    Args:
        facts: facts of `curate`.
        lists: see `lists_of`.
        found: of the tables that the facts name.
    """
    import jinja2

    snapshot, summary = Snapshot.of(facts), found.summary
    described = index_files(snapshot.images, snapshot.index_version)
    kept = [key for _, key in _shown(summary, lists, rows.KEPT)]
    edges = _nearest(summary, limits, lists)
    winners = {key: winner for key, winner in found.winners.items() if winner is not None}
    clusters = clusters_of(shown_duplicates(summary, lists), winners)
    shown = set(kept)
    shown |= {key for _, *groups in edges for group in groups for key, _ in group}
    shown |= {key for cluster in clusters for key, _ in cluster}
    thumbnails = read_thumbnails(snapshot.images, described, shown)
    pairs = ranges.find_rows(facts["pairs"], sorted(shown), ["key", "caption"])
    captions = dict(zip(pairs["key"].to_pylist(), pairs["caption"].to_pylist(), strict=True))

    def figures(noted: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        listed = [(key, note) for key, note in noted if key in thumbnails]
        return [{"key": k, "note": n, "caption": captions.get(k, ""), "source": thumbnails[k]} for k, n in listed]

    statuses = summary.totals.status_of()
    reasons: list[dict[str, Any]] = [
        {"name": name, "count": count, "status": statuses[name], "meaning": rows.meaning(name)}
        for name, count in rows.by_frequency(facts["reasons"])
    ]
    thresholds = {limit.measure: limit for limit in limits}
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
        charts=[_chart(measure_of(name), each, thresholds.get(name)) for name, each in histograms.items()],
        kept=figures((key, "") for key in kept),
        edges=[
            {"title": title, "kept": figures(inside), "dropped": figures(outside)} for title, inside, outside in edges
        ],
        clusters=[figures(cluster) for cluster in clusters],
    )


def _nearest(
    summary: Summary, limits: Iterable[Limit], lists: Mapping[str, SortedList]
) -> list[tuple[str, AnnotatedKeys, AnnotatedKeys]]:
    """Each limit with the nearest rows on either side; limits that dropped no row are omitted."""
    found = []
    for edge in edges_of(limits):
        inside, outside = (
            [(key, f"{lists[name].sign * rank:.4g}") for rank, key in _shown(summary, lists, name)]
            for name in (edge.inside, edge.outside)
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
        bar = {"x": place(left), "y": 125 - height, "width": 300 / NUM_BARS - 1, "height": height}
        bars.append(bar | {"label": f"{left:.4g} to {right:.4g}: {count:,}"})
    lines = []
    for limit in limits:
        side = {"anchor": "end", "shift": -4} if place(limit) > 200 else {"anchor": "start", "shift": 4}
        lines.append({"x": place(limit), "label": f"{limit:g}"} | side)
    ends = {"low": f"{low:.4g}", "high": f"{high:.4g}"}
    return {"title": measure.title, "unit": measure.unit, "bars": bars, "limits": lines} | ends


def read_thumbnails(images: str, described: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
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
