"""Summaries of the rows of a dataset that add up: counts, histograms, and the first rows of sorted lists.

The summary of a table is the sum of those of its parts. So the rows that a refresh changes are subtracted with their earlier
values and added with their new ones, and no other row is read.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SIGNIFICANT_BITS = 12
"""Bits of a value in a histogram: whole numbers up to 4,096 are exact, others are rounded by 0.025 % at most."""
SPARE = 4
"""Rows that a summary keeps for each one that is shown, so that others take the places of those that change."""
_DROPPED_BITS = np.uint64(53 - SIGNIFICANT_BITS)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Rounded values and the number of rows with each; rows without a finite value are left out."""

    values: np.ndarray
    """[N] float64, ascending."""
    counts: np.ndarray
    """[N] int64, positive."""

    @classmethod
    def of(cls, values: np.ndarray) -> "Histogram":
        """Histogram of values [N], which are rounded."""
        found, counts = np.unique(_rounded(values), return_counts=True)
        return cls(found, counts.astype(np.int64))

    def plus(self, other: "Histogram", sign: int = 1) -> "Histogram":
        """Sum; with the sign -1, the difference."""
        values, places = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, sign * other.counts]))
        assert (counts >= 0).all(), "the subtracted values are not part of the histogram"
        return Histogram(values[counts > 0], counts[counts > 0])

    def percentile(self, percent: float) -> float:
        """Percentile with linear interpolation, as of `numpy.percentile`; at least one value is needed."""
        ends = np.cumsum(self.counts)
        place = percent / 100 * (int(ends[-1]) - 1)
        below, above = self.values[np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")].tolist()
        return float(below + (above - below) * (place - np.floor(place)))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Finite values, rounded to the nearest of `SIGNIFICANT_BITS` bits."""
    finite = np.ascontiguousarray(values[np.isfinite(values)], np.float64)
    bits = finite.view(np.uint64) + (np.uint64(1) << (_DROPPED_BITS - np.uint64(1)))
    rounded = (bits >> _DROPPED_BITS << _DROPPED_BITS).view(np.float64)
    return rounded[np.isfinite(rounded)] + 0.0  # -0.0 becomes 0.0


@dataclasses.dataclass(frozen=True)
class SortedList:
    """Rows of one fate, sorted by key or by a measure, of which the first are shown."""

    fate: str
    """See `rows.fates`."""
    num_shown: int
    measure: str | None = None
    """None sorts by key."""
    sign: int = 1
    """1 puts the smallest values first, -1 the largest."""

    @property
    def capacity(self) -> int:
        """Number of rows that a summary has."""
        return SPARE * self.num_shown


@dataclasses.dataclass(frozen=True)
class Examples:
    """The first rows of a list that is sorted by (rank, key)."""

    rows: Sequence[tuple[float, str]]
    is_cut: bool
    """The list has more rows."""

    @classmethod
    def first(cls, parts: Iterable["Examples"], capacity: int) -> "Examples":
        """The first rows of all parts of a list, at most `capacity`; each part has its own first rows."""
        listed = list(parts)
        merged = sorted(row for part in listed for row in part.rows)
        return cls(merged[:capacity], len(merged) > capacity or any(part.is_cut for part in listed))

    def replace(self, changed: frozenset[str], new: "Examples", capacity: int, needed: int) -> "Examples | None":
        """The first rows after some have changed; None if fewer than `needed` are known, though there may be more.

        Args:
            changed: keys whose rows have changed; keys without a row here do not matter.
            new: the first of the rows that these keys have now.
        """
        left = [row for row in self.rows if row[1] not in changed]
        # Rows beyond the last one are not known, so a new row has no known place among them.
        added = [row for row in new.rows if not self.is_cut or (self.rows and row <= self.rows[-1])]
        merged = Examples.first([Examples(left, self.is_cut), Examples(added, new.is_cut)], capacity)
        return None if merged.is_cut and len(merged.rows) < needed else merged


@dataclasses.dataclass(frozen=True)
class CutCaptions:
    """Captions of kept rows that are longer than CLIP reads."""

    counted: int
    """Captions whose tokens were counted."""
    captions: int
    tokens: int
    """Tokens that CLIP does not read."""

    def plus(self, other: "CutCaptions", sign: int = 1) -> "CutCaptions":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return CutCaptions(*(one + sign * two for one, two in pairs))

    @property
    def share(self) -> str:
        """Share of the counted captions, as a text."""
        percent = 100 * self.captions / max(1, self.counted)
        return "less than 0.01 %" if 0 < percent < 0.01 else f"{percent:.3g} %"


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    statuses: Mapping[tuple[str, str], int]
    """Rows by reason and status."""
    cut: CutCaptions
    histograms: Mapping[str, Histogram]
    """Values by the name of the measure, in the order of the page."""

    @classmethod
    def total(cls, parts: Iterable["Totals"]) -> "Totals":
        return functools.reduce(Totals.plus, parts)

    def plus(self, other: "Totals", sign: int = 1) -> "Totals":
        """Sum; with the sign -1, the difference. Both have the same measures."""
        statuses = Counter(self.statuses)
        for name, count in other.statuses.items():
            statuses[name] += sign * count
        histograms = {name: each.plus(other.histograms[name], sign) for name, each in self.histograms.items()}
        return Totals(+statuses, self.cut.plus(other.cut, sign), histograms)

    def status_of(self) -> dict[str, str]:
        """Reason -> status."""
        return dict(sorted(self.statuses))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Totals of rows, and the first rows of some lists by name."""

    totals: Totals
    examples: Mapping[str, Examples]

    @classmethod
    def total(cls, parts: Sequence["Summary"], lists: Mapping[str, SortedList]) -> "Summary":
        """Summary of all parts of a table."""
        examples = {
            name: Examples.first((part.examples[name] for part in parts), each.capacity) for name, each in lists.items()
        }
        return cls(Totals.total(part.totals for part in parts), examples)

    def document(self) -> dict[str, Any]:
        """JSON value for `of_document`."""
        totals = self.totals
        return {
            "statuses": [[reason, status, count] for (reason, status), count in sorted(totals.statuses.items())],
            "cut": dataclasses.asdict(totals.cut),
            "histograms": [
                [name, each.values.tolist(), each.counts.tolist()] for name, each in totals.histograms.items()
            ],
            "examples": {name: dataclasses.asdict(each) for name, each in self.examples.items()},
        }

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> "Summary":
        """Restore what `document` returned."""
        statuses = {(reason, status): count for reason, status, count in document["statuses"]}
        histograms = {
            name: Histogram(np.array(values, np.float64), np.array(counts, np.int64))
            for name, values, counts in document["histograms"]
        }
        examples = {
            name: Examples([(rank, key) for rank, key in found["rows"]], found["is_cut"])
            for name, found in document["examples"].items()
        }
        return cls(Totals(statuses, CutCaptions(**document["cut"]), histograms), examples)
