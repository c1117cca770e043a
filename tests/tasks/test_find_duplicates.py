"""Duplicates found by exchanging rows equal those of comparing all rows with all."""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks import ranges
from tasks.find_duplicates import find_duplicates
from tasks.near_duplicates import near_duplicates
from tasks.ranges import KeyRange


def planted(count: int, seed: int) -> pa.Table:
    """Rows of few hashes and their neighbours, in colours near and far, some bytes repeated, some hash or colour unknown."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, count // 6, dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), count)].copy()
    hashes[: count // 8] = centres[0]  # a placeholder in many colours
    for _ in range(8):
        flipped = rng.random(count) < 0.5
        flipped[: count // 8] = False
        hashes[flipped] ^= np.uint64(1) << rng.integers(0, 64, flipped.sum()).astype(np.uint64)
    colours = [f"{red * 3:02x}{green:02x}{blue:02x}" for red, green, blue in rng.integers(0, 12, (count, 3))]
    texts = [f"{value:016x}" for value in hashes]
    digests = [rng.bytes(32).hex() for _ in range(count)]
    for copy, original in rng.integers(0, count, (count // 10, 2)):
        texts[copy], colours[copy], digests[copy] = texts[original], colours[original], digests[original]
    unknown, flat = rng.random(count) < 0.05, rng.random(count) < 0.05
    return pa.table(
        {
            "key": sorted(rng.bytes(16).hex() for _ in range(count)),
            "sha256": digests,
            "phash": pa.array(texts, mask=flat),
            "colour": pa.array(colours, mask=unknown),
        }
    )


def brute_force(table: pa.Table, distance: int) -> dict[str, str]:
    """Key -> reason, by the definition: each row is compared with every earlier row."""

    def agree(one: str | None, other: str | None) -> bool:
        if one is None or other is None:
            return True
        cells = [np.array(list(bytes.fromhex(colour))) // 4 for colour in (one, other)]
        return bool((np.abs(cells[0] - cells[1]) <= 1).all())

    found: dict[str, str] = {}
    seen: set[str] = set()
    firsts: list[tuple[int, str | None]] = []
    for row in table.to_pylist():
        if row["sha256"] in seen:
            found[row["key"]] = "duplicate_image"
            continue
        seen.add(row["sha256"])
        if row["phash"] is None or distance < 0:
            continue
        value = int(row["phash"], 16)
        near = ((value ^ other).bit_count() <= distance and agree(row["colour"], colour) for other, colour in firsts)
        if any(near):
            found[row["key"]] = "near_duplicate"
        firsts.append((value, row["colour"]))
    return found


def read(table: pa.Table, key_range: KeyRange) -> pa.Table:
    return table.filter(pa.array(ranges.of_keys(table["key"], key_range.count) == key_range.index))


def result(key_range: KeyRange, found: pa.Table) -> pa.Table:
    assert (ranges.of_keys(found["key"], key_range.count) == key_range.index).all()
    assert found["key"].to_pylist() == sorted(set(found["key"].to_pylist()))
    return found


def search(table: pa.Table, distance: int, scratch: Path, num_ranges: int, num_partitions: int) -> dict[str, str]:
    parts = find_duplicates(
        functools.partial(read, table), num_ranges, distance, str(scratch), result, num_partitions=num_partitions
    )
    assert len(parts) == num_ranges and not scratch.exists()
    found = pa.concat_tables(parts)
    return dict(zip(found["key"].to_pylist(), found["reason"].to_pylist(), strict=True))


@pytest.mark.parametrize("distance", [-1, 0, 2, 4, 7])
def test_one_process_finds_the_duplicates_of_the_definition(tmp_path: Path, distance: int) -> None:
    table = planted(1500, distance + 1)
    expected = brute_force(table, distance)
    assert search(table, distance, tmp_path / "scratch", 1, 1) == expected
    counts = {reason: list(expected.values()).count(reason) for reason in ("duplicate_image", "near_duplicate")}
    assert counts["duplicate_image"] > 100 and (counts["near_duplicate"] > 100) == (distance >= 0)


@pytest.mark.parametrize(("num_ranges", "num_partitions"), [(4, 4), (1, 16), (16, 4)])
@pytest.mark.parametrize("distance", [0, 5])
def test_partitions_do_not_change_the_duplicates(
    cluster: None, tmp_path: Path, num_ranges: int, num_partitions: int, distance: int
) -> None:
    table = planted(3000, distance)
    assert search(table, distance, tmp_path / "scratch", num_ranges, num_partitions) == brute_force(table, distance)


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert search(planted(40, 0).slice(0, 0), 4, tmp_path / "scratch", 1, 1) == {}


@pytest.mark.parametrize(("distance", "looks_left"), [(0, 64), (4, 1)])
def test_many_rows_may_share_a_hash_or_nearly(distance: int, looks_left: int) -> None:
    """`python -m benchmarks.scaling --skew` shows that they cost no more than different ones."""
    rng = np.random.default_rng(0)
    same = np.full(100_000, rng.integers(0, 2**64, dtype=np.uint64))
    assert np.flatnonzero(~near_duplicates(same, distance)).tolist() == [0]
    flipped = same ^ np.uint64(1) << rng.integers(0, 64, len(same)).astype(np.uint64)
    found = near_duplicates(flipped, distance)
    assert len(found) - found.sum() == looks_left and not found[0]
