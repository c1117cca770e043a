"""Tables and figures of a comparison: for the console, as Markdown, HTML and PNG."""

import dataclasses
import html
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipelines.comparison import Comparison, Row
from pipelines.quantities import number
from tasks.model_card import escaped
from unclip.evaluation.metrics import ATTRIBUTES, SCORED

RIGHT, WRONG = "#8a8f98", "#d62728"
BEST = "#d5ecd4"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


@dataclasses.dataclass(frozen=True)
class Column:
    """A measured quantity."""

    group: str
    heading: str
    value: Callable[[Row], float | None]
    form: Callable[[float], str]
    better: int = 0
    """1 if more is better, -1 if less is, 0 if neither."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """Value of a metric of a row."""

    group: str
    name: str

    def __call__(self, row: Row) -> float | None:
        return row.metrics.get(self.group, {}).get(self.name)

    def interval(self, row: Row) -> Sequence[float] | None:
        """Lower and upper limit of the 95 % interval."""
        return row.intervals.get(self.group, {}).get(self.name)


def _decimals(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{places}f}"


def _power(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _accuracy(title: str, group: str, attributes: Sequence[str]) -> list[Column]:
    return [Column(title, name, Metric(group, f"accuracy.{name}"), _decimals(3), 1) for name in attributes]


COLUMNS = (
    *_accuracy("held-out captions", "heldout", SCORED),
    *_accuracy("unseen combinations", "unseen", SCORED),
    *_accuracy("relations of two objects", "relations", ATTRIBUTES),
    Column("relations of two objects", "colours swapped", Metric("relations", "swapped.colour"), _decimals(3), -1),
    Column("relations of two objects", "shapes swapped", Metric("relations", "swapped.shape"), _decimals(3), -1),
    Column("likeness", "CLIP score", Metric("heldout", "clip_score"), _decimals(3), 1),
    Column("likeness", "Fréchet distance", Metric("heldout", "clip_frechet_distance"), _decimals(4), -1),
    Column("likeness", "bits per dimension", lambda row: row.bits_per_dim, _decimals(3), -1),
    Column("diversity", "place entropy", Metric("repeated", "place_entropy"), _decimals(3), 1),
    Column("diversity", "pairwise distance", Metric("repeated", "pairwise_distance"), _decimals(3)),
    Column("cost", "parameters", lambda row: row.parameters, number),
    Column("cost", "training samples", lambda row: row.num_samples, number),
    Column("cost", "training FLOPs", lambda row: row.flops, _power),
    Column("cost", "training seconds", lambda row: row.training_seconds, _seconds),
    Column("cost", "seconds an image", lambda row: row.seconds_per_image, _seconds),
)
BLOCKS = (
    ("held-out captions", "unseen combinations"),
    ("relations of two objects", "likeness", "diversity"),
    ("cost",),
)
"""Groups of columns that a narrow table shows side by side."""

NOTES = (
    "Accuracy is the share of images in which everything of that kind is as the caption says, measured from pixels; place, "
    "among captions that name one. Swapped: each of two objects has the other's value.",
    "CLIP score: mean cosine of CLIP's embeddings of image and caption. Fréchet distance: between CLIP's embeddings of samples "
    "and of held-out images. Place entropy: of the places of objects in images of one caption that names none, as a share of "
    "log 5. Pairwise distance: mean of 1 - cosine over pairs of images of one caption. Bits per dimension: variational bound of "
    "a system that learns the density of images, on up to 16 held-out images of the resolution that it draws first.",
    "A cell of the page shows the 95 % interval of its value when it is pointed at; it is that of the sampled images, by the "
    "bootstrap, and tells nothing about other trainings.",
    "Parameters, samples and FLOPs are those of all trained parts, without the frozen CLIP; training seconds are the sum over "
    "parts, which may have trained side by side, without what came before the last resumption of a training; seconds an image "
    "are those of one worker.",
)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Columns with a value in some row."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def _blocks(rows: Sequence[Row]) -> Iterator[list[Column]]:
    for groups in BLOCKS:
        if block := [column for column in columns_of(rows) if column.group in groups]:
            yield block


def _cell(column: Column, row: Row) -> str:
    value = column.value(row)
    return "-" if value is None or not math.isfinite(value) else column.form(value)


def _title(column: Column, row: Row) -> str:
    """Attribute of a cell of the page that shows the interval of its value."""
    interval = column.value.interval(row) if isinstance(column.value, Metric) else None
    return "" if interval is None else f' title="95 %: {" to ".join(map(column.form, interval))}"'


def _is_best(column: Column, row: Row, rows: Sequence[Row]) -> bool:
    """Tell if a row has the best value of the systems, to the digits that are shown; not if all have it.

    Real images do not compete.
    """
    values = [value for each in rows if each.system is not None and (value := column.value(each)) is not None]
    value = column.value(row)
    if not column.better or row.system is None or value is None or len({*map(column.form, values)}) < 2:
        return False
    best = max(values) if column.better > 0 else min(values)
    return column.form(value) == column.form(best)


def heading(comparison: Comparison) -> str:
    """Sentence about what is compared."""
    names = {"heldout": "held-out", "unseen": "unseen", "relations": "two-object", "repeated": "repeated"}
    counts = [
        f"{comparison.num_captions[group]:,} {name}"
        for group, name in names.items()
        if group in comparison.num_captions
    ]
    equal = {
        "samples": "the costliest part of each system is trained on as many samples as that of the first",
        "flop": "each system is trained for as many FLOPs as the first",
    }
    lengths = "each system is trained with its own settings" if comparison.equal is None else equal[comparison.equal]
    swept = "" if comparison.sweep is None else f"Values of {comparison.sweep.setting}. "
    return f"{swept}Captions: {', '.join(counts)}. On the same rows, {lengths}."


def text(comparison: Comparison) -> str:
    """Tables for the console."""
    rows = comparison.rows
    width = max(len(row.label) for row in rows)
    lines = [heading(comparison)]
    for block in _blocks(rows):
        cells = {column: [_cell(column, row) for row in rows] for column in block}
        headings = {column: column.heading.split() for column in block}
        widths = {column: max(map(len, [*headings[column], *cells[column]])) for column in block}
        groups: dict[str, int] = {}
        for column in block:
            groups[column.group] = groups.get(column.group, -2) + 2 + widths[column]
        height = max(map(len, headings.values()))
        lines += ["", " " * width + "".join(f"  {group[:size]:<{size}}" for group, size in groups.items())]
        for level in range(height):
            words = ([""] * (height - len(headings[column])) + headings[column] for column in block)
            lines.append(
                " " * width + "".join(f"  {word[level]:>{widths[c]}}" for c, word in zip(block, words, strict=True))
            )
        for index, row in enumerate(rows):
            line = "".join(f"  {cells[column][index]:>{widths[column]}}" for column in block)
            lines.append(f"{row.label:<{width}}{line}")
    return "\n".join(line.rstrip() for line in lines)


def markdown(comparison: Comparison) -> str:
    """Tables as Markdown; the best value of the systems is bold."""
    rows = comparison.rows
    lines = [heading(comparison)]
    for block in _blocks(rows):
        groups = list(dict.fromkeys(column.group for column in block))
        lines += ["", " and ".join(groups).capitalize() + ":", ""]
        names = [f"{column.group}: {column.heading}" if len(groups) > 1 else column.heading for column in block]
        short = [name.replace("held-out captions: ", "").replace("unseen combinations: ", "unseen ") for name in names]
        short = [name.rpartition(": ")[2] for name in short]
        lines += [f"| | {' | '.join(short)} |", "|---" + "|---:" * len(block) + "|"]
        for row in rows:
            cells = [f"**{_cell(c, row)}**" if _is_best(c, row, rows) else _cell(c, row) for c in block]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    lines += [f"\n{note}" for note in NOTES]
    lines += [f"\nFailed: {escaped(label)}: {escaped(why, 2000)}" for label, why in comparison.failures.items()]
    return "\n".join(lines) + "\n"


_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0; }
th { font-weight: 500; color: #555; padding: .15em .6em; vertical-align: bottom; text-align: right; }
th.group { text-align: center; border-bottom: 1px solid #bbb; color: #222; }
td { padding: .25em .6em; text-align: right; border-top: 1px solid #eee; white-space: nowrap; }
td:first-child { text-align: left; font-weight: 600; }
tr.real td { color: #777; border-bottom: 1px solid #bbb; }
td.best { background: #d5ecd4; font-weight: 600; }
.start { border-left: 1px solid #ddd; }
img { max-width: 100%; }
p.note { color: #666; max-width: 60em; }
p.failed { color: #b00; }
"""


def page(comparison: Comparison, images: Sequence[str]) -> str:
    """HTML page with one wide table and figures.

    Args:
        images: names of the figures' files, beside the page.
    """
    rows, columns = comparison.rows, columns_of(comparison.rows)
    starts = {column for before, column in zip([None, *columns], columns, strict=False)
              if before is None or before.group != column.group}  # fmt: skip
    groups: dict[str, int] = {}
    for column in columns:
        groups[column.group] = groups.get(column.group, 0) + 1

    def kind(*names: str) -> str:
        return f' class="{" ".join(filter(None, names))}"' if any(names) else ""

    def start(column: Column) -> str:
        return "start" if column in starts else ""

    spans = "".join(
        f'<th class="group start" colspan="{count}">{html.escape(name)}</th>' for name, count in groups.items()
    )
    names = "".join(f"<th{kind(start(column))}>{html.escape(column.heading)}</th>" for column in columns)
    body = []
    for row in rows:
        cells = "".join(
            f"<td{kind('best' if _is_best(column, row, rows) else '', start(column))}{_title(column, row)}>"
            f"{_cell(column, row)}</td>"
            for column in columns
        )
        body.append(f"<tr{kind('real' if row.system is None else '')}><td>{html.escape(row.label)}</td>{cells}</tr>")
    title = f"Comparison of systems: {html.escape(comparison.pipeline)}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1><p>{html.escape(heading(comparison))}</p>",
        f"<table><tr><td></td>{spans}</tr><tr><td></td>{names}</tr>{''.join(body)}</table>",
        *(
            f'<p class="failed">Failed: {html.escape(f"{label}: {why}")}</p>'
            for label, why in comparison.failures.items()
        ),
        *(f'<p><img src="{name}" alt="{name}"></p>' for name in images),
        *(f'<p class="note">{html.escape(note)}</p>' for note in NOTES),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _save(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _write(axes: Any, x: float, y: float, words: str, **style: Any) -> None:
    """Write a text as it is: captions may have dollar signs, which matplotlib takes for formulas."""
    axes.text(x, y, words, parse_math=False, **style)


def draw_table(comparison: Comparison) -> bytes:
    """PNG of the tables, with the best value of the systems on green."""
    from matplotlib.figure import Figure

    rows, blocks = comparison.rows, list(_blocks(comparison.rows))
    row_height, column_width = 0.27, 0.78
    label_width = 0.35 + 0.078 * max(len(row.label) for row in rows)
    headings = 2.7  # lines above the rows of a block
    lines = sum(len(rows) + headings + 0.6 for _ in blocks)
    width = label_width + column_width * max(map(len, blocks)) + 0.2
    figure = Figure(figsize=(width, row_height * lines + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(row_height * lines + 0.2, 0))
    axes.axis("off")
    top = 0.15
    for block in blocks:
        rights = [label_width + column_width * (index + 1) for index in range(len(block))]
        groups: dict[str, list[float]] = {}
        for column, right in zip(block, rights, strict=True):
            groups.setdefault(column.group, []).append(right)
            words, y = textwrap.fill(column.heading, 10), top + headings * row_height - 0.05
            style = {"fontsize": 8, "color": "#555555", "linespacing": 0.95}
            _write(axes, right - 0.08, y, words, ha="right", va="bottom", **style)
        for name, ends in groups.items():
            left = ends[0] - column_width + 0.12
            _write(axes, (left + ends[-1]) / 2, top + 0.14, name, ha="center", va="center", fontsize=9)
            axes.plot([left, ends[-1] - 0.04], [top + 0.28] * 2, color="#bbbbbb", linewidth=0.8)
        for index, row in enumerate(rows):
            y = top + (headings + index) * row_height
            is_real = row.system is None
            axes.plot([0.12, rights[-1]], [y, y], color="#bbbbbb" if index < 2 else "#eeeeee", linewidth=0.8, zorder=0)
            _write(axes, 0.15, y + row_height / 2, row.label, va="center", fontsize=9, color="#777777" if is_real else "#111111",
                      weight="normal" if is_real else "bold")  # fmt: skip
            for column, right in zip(block, rights, strict=True):
                if is_best := _is_best(column, row, rows):
                    box = [right - column_width + 0.06, right - 0.02]
                    axes.fill_between(box, y + 0.015, y + row_height - 0.015, color=BEST, linewidth=0)
                _write(axes, right - 0.08, y + row_height / 2, _cell(column, row), ha="right", va="center", fontsize=9,
                          color="#777777" if is_real else "#111111", weight="bold" if is_best else "normal")  # fmt: skip
        top += (len(rows) + headings + 0.6) * row_height
    return _save(figure)


def draw_images(comparison: Comparison) -> bytes:
    """PNG with a row for each entry and a column for each caption; real images on top, a red frame around wrong ones."""
    from matplotlib.figure import Figure

    rows, captions = comparison.rows, comparison.captions
    tile, gap, left, top = 1.0, 0.09, 1.75, 0.78
    step = tile + gap
    width, height = left + step * len(captions) + gap, top + step * len(rows) + gap + 0.08
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for index, caption in enumerate(captions):
        words = textwrap.fill(caption, 18)
        _write(
            axes,
            left + index * step + tile / 2,
            top - 0.07,
            words,
            ha="center",
            va="bottom",
            fontsize=7.2,
            color="#333333",
        )
    for number_of_row, row in enumerate(rows):
        y = top + number_of_row * step + (0.08 if number_of_row else 0)
        is_real = row.system is None
        label = textwrap.fill(row.label, 18)
        _write(axes, left - 0.12, y + tile / 2, label, ha="right", va="center", fontsize=9.5,
                  color="#777777" if is_real else "#111111", weight="normal" if is_real else "bold")  # fmt: skip
        for index in range(0 if row.images is None else min(len(row.images), len(captions))):
            assert row.images is not None
            x = left + index * step
            axes.imshow(row.images[index], extent=(x, x + tile, y + tile, y), interpolation="nearest", aspect="auto")
            is_wrong = row.correct is not None and not row.correct[index]
            frame: dict[str, Any] = {"color": WRONG if is_wrong else RIGHT, "linewidth": 2.2 if is_wrong else 0.5}
            axes.plot([x, x + tile, x + tile, x, x], [y, y, y + tile, y + tile, y], **frame)
    if len(rows) > 1:
        y = top + step - gap / 2 + 0.04
        axes.plot([0.1, width - 0.1], [y, y], color="#bbbbbb", linewidth=0.8)
    axes.set(xlim=(0, width), ylim=(height, 0))  # imshow changes them
    return _save(figure)


def _mean_accuracy(group: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        metrics = row.metrics.get(group, {})
        found = [metrics[f"accuracy.{name}"] for name in SCORED if f"accuracy.{name}" in metrics]
        return float(np.mean(found)) if found else None

    return value


PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("accuracy, held-out captions (mean of attributes)", _mean_accuracy("heldout")),
    ("accuracy, unseen combinations (mean of attributes)", _mean_accuracy("unseen")),
    ("CLIP score", Metric("heldout", "clip_score")),
    ("Fréchet distance (less is better)", Metric("heldout", "clip_frechet_distance")),
    ("pairwise distance of one caption's images", Metric("repeated", "pairwise_distance")),
    ("place entropy of one caption's images", Metric("repeated", "place_entropy")),
)


def draw_sweep(comparison: Comparison) -> bytes:
    """PNG of quality and diversity against the values of a sweep, a line for each system; real images are dashed."""
    from matplotlib.figure import Figure

    sweep = comparison.sweep
    assert sweep is not None
    panels = [panel for panel in PANELS if any(panel[1](row) is not None for row in comparison.rows)]
    lines: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.system is not None:
            lines.setdefault(row.name, []).append(row)
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * height + 0.4), layout="constrained")
    plots = list(figure.subplots(height, columns, squeeze=False).flat)
    positions = _positions(sweep.values)
    for axes, (title, value) in zip(plots, panels, strict=False):
        for rows, colour in zip(lines.values(), COLOURS * len(lines), strict=False):
            points = [
                (positions[row.value], number) for row in rows if row.value and (number := value(row)) is not None
            ]
            xs, ys = [x for x, _ in points], [y for _, y in points]  # empty for a line without this metric
            axes.plot(xs, ys, "o-", color=colour, label=rows[0].title, markersize=4, linewidth=1.6)
        if (real := value(comparison.rows[0])) is not None:
            axes.axhline(real, color="#999999", linewidth=1, linestyle="--", label="real images", zorder=0)
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel(sweep.name.replace("_", " "), fontsize=8.5)
        axes.set_xticks(list(positions.values()), list(positions))
        axes.tick_params(labelsize=8)
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in plots[len(panels) :]:
        axes.axis("off")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    return _save(figure)


def _positions(values: Sequence[str]) -> dict[str, float]:
    """Place of each value on the axis: the value, or its index if one is no number."""
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {value: float(index) for index, value in enumerate(values)}
