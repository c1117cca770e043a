"""Loss curves: small text files, and checks of a running training against rules and a reference curve.

A curve is tab-separated text with about a hundred lines, one per logged point. The package contains the curves of the
demo's trainings as references (`reference_curves/`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from unclip import files
from unclip.errors import ConfigError

COLUMNS = ("loss", "relative_loss", "gradient_norm", "validation_loss", "validation_relative_loss")
REFERENCES = Path(__file__).parent / "reference_curves"

WINDOW = 5
"""Number of points that are averaged before they are judged; single points are noisy."""
DIVERGENCE_RATIO = 2.0
"""Ratio to the lowest loss above which a loss has diverged."""
REFERENCE_RATIO = 1.3
"""Ratio to the reference above which a loss is worse."""
PATIENCE = 2 * WINDOW
"""Number of points before a training must be better than predicting the mean."""

Point = Mapping[str, float]
"""Values of some of the columns, by name."""
Curve = dict[int, dict[str, float]]
"""Points by samples seen, in ascending order."""


def reference_names() -> list[str]:
    """Names of the reference curves in this package."""
    return sorted(path.stem for path in REFERENCES.glob("*.tsv"))


def write(uri: str, curve: Curve) -> None:
    lines = ["\t".join(("samples_seen", *COLUMNS))]
    for samples_seen, point in curve.items():
        values = (f"{point[name]:.6g}" if name in point else "" for name in COLUMNS)
        lines.append("\t".join((str(samples_seen), *values)))
    files.write(uri, ("\n".join(lines) + "\n").encode())


def read(uri: str) -> Curve:
    """Read a curve with losses: the name of a reference, or a URI.

    Raises:
        ConfigError: the file does not exist, is not a curve or has no losses.
    """
    curve = restore(uri)
    if not any("loss" in point for point in curve.values()):
        raise ConfigError(f"{uri}: not a curve: it has no column 'loss'. Name the curve.tsv of a training.")
    return curve


def restore(uri: str) -> Curve:
    """Read a curve, which may have no losses yet; see `read`."""
    path = str(REFERENCES / f"{uri}.tsv") if uri in reference_names() else uri
    try:
        header, *lines = files.read(path).decode().splitlines()
        names = header.split("\t")[1:]
        curve = {}
        for line in lines:
            samples_seen, *values = line.split("\t")
            curve[int(samples_seen)] = {name: float(value) for name, value in zip(names, values, strict=True) if value}
        if not header.startswith("samples_seen\t"):
            raise ValueError("it has no column 'samples_seen'")
        return curve
    except FileNotFoundError:
        raise ConfigError(
            f"{uri}: no such curve. Name the curve.tsv of an earlier training, or one of {', '.join(reference_names())}."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: not a curve: {error}. Name the curve.tsv of a training.") from None


def at(curve: Curve, name: str, first: int, last: int) -> float | None:
    """Mean of a column from `first` to `last` samples seen, inclusive; None if the curve has no values there."""
    values = [point[name] for samples_seen, point in curve.items() if first <= samples_seen <= last and name in point]
    return sum(values) / len(values) if values else None


class Alarm:
    """Watches a loss curve as it grows; reports each problem once."""

    def __init__(self, curve: Curve, reference: Curve | None = None) -> None:
        """Args:
        curve: earlier points; new points are added to it.
        reference: curve of a good training of the same model.
        """
        self.curve, self.reference = curve, reference
        self._losses: list[tuple[int, float]] = []  # (samples seen, finite loss)
        self._lowest = math.inf  # mean of all windows but the last
        self._reported: set[str] = set()
        for samples_seen, point in curve.items():
            self._track(samples_seen, point)

    def add(self, samples_seen: int, point: Point) -> None:
        """Add a point to the curve without checking it; values of other columns are ignored."""
        values = {name: point[name] for name in COLUMNS if name in point}
        self.curve[samples_seen] = {**self.curve.get(samples_seen, {}), **values}

    def check(self, samples_seen: int, point: Point) -> list[str]:
        """Add a point and return its new problems, as messages for users."""
        self.add(samples_seen, point)
        self._track(samples_seen, point)
        problems = self._problems(samples_seen, point)
        new = [message for kind, message in problems.items() if kind not in self._reported]
        self._reported = set(problems)
        return new

    def over_reference(self) -> float | None:
        """Ratio of the recent loss to the reference at the same samples; None without a reference."""
        recent = self._losses[-WINDOW:]
        if self.reference is None or len(recent) < WINDOW:
            return None
        expected = at(self.reference, self._column, recent[0][0], recent[-1][0])
        return _mean(recent) / expected if expected else None

    @property
    def _column(self) -> str:
        return "relative_loss" if "relative_loss" in self.curve[self._losses[-1][0]] else "loss"

    def _track(self, samples_seen: int, point: Point) -> None:
        loss = point.get("relative_loss", point.get("loss", math.nan))
        if math.isfinite(loss):
            if len(self._losses) >= WINDOW:
                self._lowest = min(self._lowest, _mean(self._losses[-WINDOW:]))
            self._losses.append((samples_seen, loss))

    def _problems(self, samples_seen: int, point: Point) -> dict[str, str]:
        problems = {}
        when = f"after {samples_seen:,} samples"
        if point.get("gradient_norm") == 0:
            problems["dead"] = (
                f"no gradient reaches the weights {when}: the loss does not depend on them. "
                f"Check detach() and requires_grad."
            )
        if len(self._losses) <= WINDOW:
            return problems
        now = _mean(self._losses[-WINDOW:])
        if now > DIVERGENCE_RATIO * self._lowest:
            problems["risen"] = (
                f"the loss rose to {now:.4g} {when}, {now / self._lowest:.1f} times its lowest value. "
                f"Stop, and train again with a lower learning rate."
            )
        if self._column == "relative_loss" and len(self._losses) > PATIENCE and now > 1:
            problems["useless"] = (
                f"the loss is {now:.3f} times that of predicting the mean {when}: the model learns nothing. "
                f"Find out why: unclip train ... --overfit 16."
            )
        ratio = self.over_reference()
        if ratio is not None and ratio > REFERENCE_RATIO:
            problems["worse"] = (
                f"the loss is {ratio:.2f} times that of the reference curve {when}. "
                f"Check for differences in the data, the model and the trainer settings."
            )
        return problems


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return math.fsum(loss for _, loss in points) / len(points)
