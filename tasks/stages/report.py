"""Stage `report`: a page on a dataset version: kept rows, dropped rows and the reasons; opens from disk without a network."""

import base64
import dataclasses
import io
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.duplicates import AnnotatedKeys, duplicate_clusters
from tasks.rows import DUPLICATES
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from unclip import files
from unclip.config import require

TEMPLATE = Path(__file__).parent / "report.html.j2"
THUMBNAIL_SIDE = 118
NUM_BARS = 40
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
    """A value per row, with its limits."""

    title: str
    unit: str
    values: Mapping[str, float]
    """Key -> value."""
    minimum: float | None = None
    maximum: float | None = None
    reasons: tuple[str, str] = ("", "")
    """Reasons of rows below the minimum and above the maximum."""


def _pin(config: ReportConfig, pinning: Pinning) -> ReportConfig:
    """Fill in the limits of [filter] and [curate]."""
    limits = {**pinning.config.filter.limits(), **pinning.config.curate.limits()}
    return dataclasses.replace(config, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))


@stage("report", version=1, pin=_pin, shows_rows=True)
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

    selection = tables.read_file(snapshot.selection)
    pairs = tables.read_file(facts["pairs"], ["key", "url", "caption", "status"])
    columns = ["key", "original_width", "original_height", "sha256", "phash"]
    images = tables.read(snapshot.images, snapshot.images_version, columns)
    captions = dict(zip(pairs["key"].to_pylist(), pairs["caption"].to_pylist(), strict=True))
    fates = rows.fates(selection)
    kept = [key for key, fate in fates.items() if fate == rows.KEPT]
    measures = _measures(captions, images, snapshot, {limit.measure: limit for limit in config.limits})

    edges = [edge for measure in measures for edge in _edges(measure, fates, config.num_at_edges)]
    clusters = duplicate_clusters(fates, kept, images, snapshot, config.num_clusters)
    shown = set(kept[: config.num_pictures])
    shown |= {key for _, *groups in edges for group in groups for key, _ in group}
    shown |= {key for cluster in clusters for key, _ in cluster}
    thumbnails = _thumbnails(snapshot, shown)

    def figures(noted: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        listed = [(key, note) for key, note in noted if key in thumbnails]
        return [{"key": k, "note": n, "caption": captions.get(k, ""), "source": thumbnails[k]} for k, n in listed]

    statuses = dict(zip(selection["reason"].to_pylist(), selection["status"].to_pylist(), strict=True))
    reasons = [
        {"name": name, "count": count, "status": statuses[name], "meaning": rows.meaning(name)}
        for name, count in facts["reasons"].items()
    ]
    domains = _domains(pairs, fates)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        pipeline=pipeline,
        digest=snapshot.digest,
        total=facts["rows"]["in"],
        outcomes=[(name, facts["rows"][name]) for name in (rows.KEPT, rows.DROPPED, rows.FAILED)],
        duplicates=sum(facts["reasons"].get(name, 0) for name in DUPLICATES),
        reasons=reasons,
        largest_reason=max((reason["count"] for reason in reasons), default=1),
        num_domains=len(domains),
        domains=domains[:20],
        charts=[_chart(measure) for measure in measures if measure.values],
        kept=figures((key, "") for key in kept[: config.num_pictures]),
        edges=[
            {"title": title, "kept": figures(inside), "dropped": figures(outside)} for title, inside, outside in edges
        ],
        clusters=[figures(cluster) for cluster in clusters],
    )


def _measures(
    captions: Mapping[str, str], images: pa.Table, snapshot: Snapshot, limits: Mapping[str, Limit]
) -> list[Measure]:
    sizes = images.filter(pc.is_valid(images["original_width"]))
    keys = sizes["key"].to_pylist()
    width, height = (sizes[name].to_numpy().astype(float) for name in ("original_width", "original_height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    words = {key: float(len(caption.split())) for key, caption in captions.items() if caption}
    characters = {key: float(len(caption)) for key, caption in captions.items() if caption}
    scores = tables.read_file(snapshot.scores)
    scored = scores["key"].to_pylist()

    def measure(name: str, title: str, unit: str, values: Mapping[str, float], below: str, above: str) -> Measure:
        limit = limits.get(name, Limit(name, None, None))
        return Measure(title, unit, values, limit.minimum, limit.maximum, (below, above))

    shorter_sides = dict(zip(keys, shorter, strict=True))
    ratios = dict(zip(keys, longer / shorter, strict=True))
    measures = [
        measure("shorter_side", "Shorter side of the original", "pixels", shorter_sides, "too_small", ""),
        measure("aspect_ratio", "Aspect ratio (longer to shorter side)", "", ratios, "", "bad_aspect"),
        measure("caption_words", "Caption length", "words", words, "caption_too_short", "caption_too_long"),
        measure("caption_characters", "Caption length", "characters", characters, *CHARACTER_REASONS),
    ]
    for name in scores.column_names[1:]:
        title, unit = ("CLIP score", "cosine") if name == "clip_score" else (name, "")
        values = dict(zip(scored, scores[name].to_pylist(), strict=True))
        measures.append(measure(name, title, unit, values, f"{name}_low", f"{name}_high"))
    return measures


def _edges(measure: Measure, fates: Mapping[str, str], count: int) -> list[tuple[str, AnnotatedKeys, AnnotatedKeys]]:
    """For each limit: the nearest rows that are kept, and the nearest that were dropped because of it."""
    found = []
    for limit, reason, sign, word in (
        (measure.minimum, measure.reasons[0], 1, "at least"),
        (measure.maximum, measure.reasons[1], -1, "at most"),
    ):
        dropped = [key for key in measure.values if fates.get(key) == reason]
        if limit is None or not reason or not dropped:
            continue
        kept = [key for key in measure.values if fates.get(key) == rows.KEPT]
        inside = sorted(kept, key=lambda key: (sign * measure.values[key], key))[:count]
        outside = sorted(dropped, key=lambda key: (-sign * measure.values[key], key))[:count]
        title = f"{measure.title}: {word} {limit:g} {measure.unit}".strip()
        groups = ([(key, f"{measure.values[key]:.4g}") for key in keys] for keys in (inside, outside))
        found.append((title, *groups))
    return found  # type: ignore[return-value]


def _domains(pairs: pa.Table, fates: Mapping[str, str]) -> list[dict[str, Any]]:
    """Counts per host, in decreasing order of rows."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, url in zip(pairs["key"].to_pylist(), pairs["url"].to_pylist(), strict=True):
        host = urllib.parse.urlsplit(url).hostname if "://" in url else None
        counts[host or "(none)"][fates[key]] += 1
    found = []
    for host, fate in counts.items():
        losses = ", ".join(f"{name} {number:,}" for name, number in fate.most_common(4) if name != rows.KEPT)
        found.append({"name": host, "rows": fate.total(), "kept": fate[rows.KEPT], "lost": losses})
    return sorted(found, key=lambda domain: (-domain["rows"], domain["name"]))


def _chart(measure: Measure) -> dict[str, Any]:
    """Histogram over the 0.5th to 99.5th percentile and the limits; values beyond count in the outermost bars."""
    values = np.array([value for value in measure.values.values() if np.isfinite(value)])
    limits = [limit for limit in (measure.minimum, measure.maximum) if limit is not None]
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
        "title": measure.title,
        "unit": measure.unit,
        "bars": bars,
        "limits": limit_lines,
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
    }


def _thumbnails(snapshot: Snapshot, keys: Iterable[str]) -> dict[str, str]:
    """Key -> data URI of a small JPEG."""
    from PIL import Image

    wanted, found = pa.array(sorted(keys), pa.string()), {}
    for uri in tables.files(snapshot.images, snapshot.images_version):
        present = tables.read_file(uri, ["key"])["key"]
        if not pc.any(pc.is_in(present, value_set=wanted)).as_py():
            continue
        table = tables.read_file(uri, ["key", "jpg"])
        table = table.filter(pc.and_(pc.is_in(table["key"], value_set=wanted), pc.is_valid(table["jpg"])))
        for key, jpg in zip(table["key"].to_pylist(), table["jpg"].to_pylist(), strict=True):
            image = Image.open(io.BytesIO(jpg), formats=["JPEG"])
            image.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=80)
            found[key] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found
