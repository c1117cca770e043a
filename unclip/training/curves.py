"""How the loss of a training fell, as a small text file; and whether that of another falls as it should.

A curve is tab-separated text with a line for each of some hundred places of a training. Those of the demo's trainings come
with this package as references (`reference_curves/`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from unclip import files
from unclip.errors import ConfigError

COLUMNS = ("loss", "relative_loss", "gradient_norm", "validation_loss", "validation_relative_loss")
REFERENCES = Path(__file__).parent / "reference_curves"

WINDOW = 5
"""Points of a curve that are judged together: one alone is noisy."""
RISEN = 2.0
"""Times its lowest, from where a loss has diverged."""
WORSE_THAN_REFERENCE = 1.3
"""Times that of the reference, from where a loss is worse."""
NUM_PATIENT = 2 * WINDOW
"""Points before a training must be better than predicting the mean."""

Point = Mapping[str, float]
"""Values of some of the columns."""
Curve = dict[int, dict[str, float]]
"""Points by samples seen, in that order."""


def reference_names() -> list[str]:
    """Of the curves that come with this package."""
    return sorted(path.stem for path in REFERENCES.glob("*.tsv"))


def write(uri: str, curve: Curve) -> None:
    lines = ["\t".join(("samples_seen", *COLUMNS))]
    for samples_seen, point in curve.items():
        values = (f"{point[name]:.6g}" if name in point else "" for name in COLUMNS)
        lines.append("\t".join((str(samples_seen), *values)))
    files.write(uri, ("\n".join(lines) + "\n").encode())


def read(uri: str) -> Curve:
    """Read a curve: the name of a reference, or a URI.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    path = str(REFERENCES / f"{uri}.tsv") if uri in reference_names() else uri
    try:
        header, *lines = files.read(path).decode().splitlines()
        names = header.split("\t")[1:]
        curve = {}
        for line in lines:
            samples_seen, *values = line.split("\t")
            curve[int(samples_seen)] = {name: float(value) for name, value in zip(names, values, strict=True) if value}
        if not any("loss" in point for point in curve.values()):
            raise ValueError("it has no column 'loss'")
        return curve
    except FileNotFoundError:
        raise ConfigError(
            f"{uri}: no such curve. Name the curve.tsv of an earlier training, or one of {', '.join(reference_names())}."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{uri}: got something else than a curve: {error}. Name the curve.tsv of a training."
        ) from None


def at(curve: Curve, name: str, first: int, last: int) -> float | None:
    """Mean of a column between two numbers of samples seen; None where the curve has nothing there."""
    values = [point[name] for samples_seen, point in curve.items() if first <= samples_seen <= last and name in point]
    return sum(values) / len(values) if values else None


class Alarm:
    """Hears the points of a curve as they come, and says once when something is wrong with them."""

    def __init__(self, curve: Curve, reference: Curve | None = None) -> None:
        """Args:
        curve: what was heard before; grows with each point.
        reference: a training of the same model whose curve was good.
        """
        self.curve, self.reference = curve, reference
        self._losses: list[tuple[int, float]] = []  # finite ones, as samples seen and loss
        self._lowest = math.inf  # of windows but the last
        self._told: set[str] = set()
        for samples_seen, point in curve.items():
            self._take(samples_seen, point)

    def add(self, samples_seen: int, point: Point) -> None:
        """Values of columns at a place; others are no part of a curve."""
        known = {name: point[name] for name in COLUMNS if name in point}
        self.curve[samples_seen] = {**self.curve.get(samples_seen, {}), **known}

    def hear(self, samples_seen: int, point: Point) -> list[str]:
        """Take in a point; returns what is newly wrong, in sentences for people."""
        self.add(samples_seen, point)
        self._take(samples_seen, point)
        wrong = self._wrong(samples_seen, point)
        news = [sentence for kind, sentence in wrong.items() if kind not in self._told]
        self._told = set(wrong)
        return news

    def over_reference(self) -> float | None:
        """Loss of the last points over that of the reference at the same place; None without one."""
        recent = self._losses[-WINDOW:]
        if self.reference is None or len(recent) < WINDOW:
            return None
        expected = at(self.reference, self._column, recent[0][0], recent[-1][0])
        return _mean(recent) / expected if expected else None

    @property
    def _column(self) -> str:
        return "relative_loss" if "relative_loss" in self.curve[self._losses[-1][0]] else "loss"

    def _take(self, samples_seen: int, point: Point) -> None:
        loss = point.get("relative_loss", point.get("loss", math.nan))
        if math.isfinite(loss):
            if len(self._losses) >= WINDOW:
                self._lowest = min(self._lowest, _mean(self._losses[-WINDOW:]))
            self._losses.append((samples_seen, loss))

    def _wrong(self, samples_seen: int, point: Point) -> dict[str, str]:
        wrong = {}
        place = f"after {samples_seen:,} samples"
        if point.get("gradient_norm") == 0:
            wrong["dead"] = (
                f"no gradient reaches the weights {place}: the loss does not depend on them. "
                f"Look at detach() and requires_grad."
            )
        if len(self._losses) <= WINDOW:
            return wrong
        now = _mean(self._losses[-WINDOW:])
        if now > RISEN * self._lowest:
            wrong["risen"] = (
                f"the loss rose to {now:.4g} {place}, {now / self._lowest:.1f} times its lowest. "
                f"Stop it, and train again with a lower learning rate."
            )
        if self._column == "relative_loss" and len(self._losses) > NUM_PATIENT and now > 1:
            wrong["useless"] = (
                f"the loss is {now:.3f} of that of predicting the mean {place}, so nothing is learnt. "
                f"See what is wrong: unclip train ... --overfit 16."
            )
        beside = self.over_reference()
        if beside is not None and beside > WORSE_THAN_REFERENCE:
            wrong["worse"] = (
                f"the loss is {beside:.2f} times that of the reference curve {place}. "
                f"Look at what differs: the data, the model or the settings of the trainer."
            )
        return wrong


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return math.fsum(loss for _, loss in points) / len(points)
