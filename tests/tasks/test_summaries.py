"""Summaries: sums of parts, from which parts can be subtracted."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks import host_counts, ranges
from tasks.find_duplicates import write_rows
from tasks.summaries import CutCaptions, Examples, Histogram, Summary, Totals
from unclip import files

SOURCE = np.random.default_rng(0)
VALUES = np.concatenate([SOURCE.normal(0.2, 0.1, 500), SOURCE.integers(0, 4096, 500), [np.nan, np.inf, -0.0, 0, 1e300]])


def entries(histogram: Histogram) -> list[tuple[float, int]]:
    return list(zip(histogram.values.tolist(), histogram.counts.tolist(), strict=True))


def test_histograms_of_parts_add_up_and_are_subtracted() -> None:
    one, two, whole = Histogram.of(VALUES[:300]), Histogram.of(VALUES[300:]), Histogram.of(VALUES)
    assert entries(one.plus(two)) == entries(whole) and whole.counts.sum() == len(VALUES) - 2
    assert entries(whole.plus(two, -1)) == entries(one)
    assert entries(whole.plus(whole, -1)) == []


def test_values_are_rounded_to_the_nearest_of_12_bits() -> None:
    whole = np.arange(4097.0)
    assert entries(Histogram.of(whole)) == [(value, 1) for value in whole]
    values = SOURCE.normal(size=1000)
    rounded = Histogram.of(values).values
    nearest = rounded[np.abs(rounded[:, None] - values).argmin(axis=0)]
    assert np.abs(nearest / values - 1).max() < 2**-12 < 0.025 / 100


def test_percentiles_are_those_of_the_values() -> None:
    values = SOURCE.integers(0, 100, 357).astype(float)
    for percent in (0, 0.5, 37, 50, 99.5, 100):
        assert Histogram.of(values).percentile(percent) == pytest.approx(np.percentile(values, percent))
    assert Histogram.of(np.array([3.0])).percentile(0.5) == 3


def first(rows: list[tuple[float, str]], capacity: int) -> Examples:
    return Examples.first([Examples(sorted(rows), False)], capacity)


@pytest.mark.parametrize("seed", range(5))
def test_first_rows_stay_the_first_when_rows_come_change_and_go(seed: int) -> None:
    source = random.Random(seed)
    rows = {f"{number:04d}": float(source.randrange(50)) for number in range(60)}
    found, num_refilled = first([(rank, key) for key, rank in rows.items()], 12), 0
    for step in range(60):
        changed = {key for key in rows if source.random() < 0.05}
        now = {key: float(source.randrange(50)) for key in changed if source.random() < 0.5}
        now |= {f"{step:04d}{number}": float(source.randrange(50)) for number in range(source.randrange(4))}
        rows = {key: rank for key, rank in rows.items() if key not in changed} | now
        new = first([(rank, key) for key, rank in now.items()], 12)
        whole = sorted((rank, key) for key, rank in rows.items())
        replaced = found.replace(frozenset(changed | now.keys()), new, 12, 6)
        if replaced is None:
            replaced, num_refilled = first(whole, 12), num_refilled + 1
        found = replaced
        assert list(found.rows[:6]) == whole[:6]
        assert found.is_cut or list(found.rows) == whole
    assert num_refilled < 30


def test_a_list_is_refilled_when_too_few_of_its_rows_are_known() -> None:
    found = first([(0.0, "a"), (0.0, "b"), (0.0, "c")], 2)
    nothing, late = Examples([], False), Examples([(1.0, "d")], False)
    assert found.replace(frozenset("a"), nothing, 2, 2) is None and found.replace(frozenset("a"), late, 2, 2) is None
    assert found.replace(frozenset("c"), nothing, 2, 2) == found
    assert first([(0.0, "a")], 2).replace(frozenset("a"), late, 2, 2) == late


def test_a_summary_is_restored_from_its_document(tmp_path: Path) -> None:
    totals = Totals(
        {("too_small", "dropped"): 3}, CutCaptions(5, 1, 2), {"b": Histogram.of(VALUES), "a": Histogram.of(VALUES[:1])}
    )
    summary = Summary(totals, {"kept": Examples([(0.1, "a"), (0.3, "b")], True)})
    files.write_json(f"{tmp_path}/summary.json", summary.document())
    restored = Summary.of_document(files.read_json(f"{tmp_path}/summary.json"))
    assert restored.document() == summary.document() and list(restored.totals.histograms) == ["b", "a"]
    assert entries(restored.totals.plus(totals, -1).histograms["b"]) == []


def test_hosts_are_counted_as_if_all_rows_were_read(tmp_path: Path) -> None:
    source, counted = random.Random(0), pa.table({"host": ["x"], "fate": ["kept"], "rows": [0]}).slice(0, 0)
    earlier = None
    for step in range(4):
        parts = []
        for part in range(3):
            hosts = [f"{source.randrange(40) ** 2}.org" for _ in range(60)]
            rows = pa.table(
                {"host": hosts, "fate": [source.choice(["kept", "too_small"]) for _ in hosts], "rows": [1] * 60}
            )
            counts = host_counts.add_up(rows)
            if step:  # take back some of what the others have
                known = counted.slice(part * 10, 10)
                back = known.set_column(2, "rows", pa.array([-number for number in known["rows"].to_pylist()]))
                counts = host_counts.add_up(pa.concat_tables([counts, back]))
            parts.append(counts)
        uris = [write_rows(f"{tmp_path}/{step}/{number}.rows", counts) for number, counts in enumerate(parts)]
        counted = host_counts.add_up(pa.concat_tables([counted, *parts]))
        folder = f"{tmp_path}/{step}/hosts"
        found = host_counts.write_counts(folder, uris, 4, 5, earlier)
        assert (found[0], found[1].to_pylist()) == (
            (number := len(set(counted["host"].to_pylist()))),
            host_counts.most_rows(counted, 5)[1].to_pylist(),
        )
        assert number > 20 and host_counts.num_files(folder) == 4
        earlier = folder
    Path(ranges.range_files(folder)[1]).unlink()
    assert host_counts.num_files(folder) is None
