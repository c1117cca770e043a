"""Duplicates found by exchanging rows equal those of comparing all rows with all."""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks import ranges
from tasks.find_duplicates import KeepCaptions, find_duplicates
from tasks.near_duplicates import agree_in_a_band, near_duplicates, near_to
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


def with_captions(table: pa.Table, seed: int) -> pa.Table:
    """Rows with URLs: a few for each of the images, which may be those of several URLs."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, table.num_rows // 3, table.num_rows)
    urls = [f"https://example.org/{image}-{rng.integers(0, 2)}" for image in images]
    looks = table.select(["sha256", "phash", "colour"]).take(pa.array(images))
    return pa.table({"key": table["key"], "url": urls, **{name: looks[name] for name in looks.column_names}})


def brute_force_captions(table: pa.Table, distance: int, captions: str) -> dict[str, tuple[str | None, str]]:
    """Key -> reason and key of the first row, of the rows that are dropped or are other captions."""
    first_rows: dict[str, dict[str, str]] = {}
    found: dict[str, tuple[str | None, str]] = {}
    for row in table.to_pylist():
        first = first_rows.setdefault(row["sha256"], row)
        if first is not row:
            is_caption = captions == "image" or row["url"] == first["url"]
            found[row["key"]] = (None if is_caption else "duplicate_image", first["key"])
    firsts = table.filter(pa.array([key not in found for key in table["key"].to_pylist()]))
    dropped = brute_force(firsts, distance)
    for key, (reason, first_key) in found.items():
        if reason is None and first_key in dropped:
            found[key] = (dropped[first_key], first_key)
    return found | {key: (reason, key) for key, reason in dropped.items()}


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


@pytest.mark.parametrize("captions", ["url", "image"])
@pytest.mark.parametrize(("distance", "num_ranges", "num_partitions"), [(-1, 1, 1), (0, 4, 8), (5, 1, 1), (5, 8, 4)])
def test_f97_captions_of_an_image_have_the_fate_of_its_first_row(
    tmp_path: Path, captions: KeepCaptions, distance: int, num_ranges: int, num_partitions: int
) -> None:
    table = with_captions(planted(1500, distance + 1), distance + 1)
    expected = brute_force_captions(table, distance, captions)
    reading = functools.partial(read, table)
    parts = find_duplicates(
        reading, num_ranges, distance, f"{tmp_path}/s", result, num_partitions=num_partitions, captions=captions
    )
    found = {row["key"]: (row["reason"], row["first"]) for row in pa.concat_tables(parts).to_pylist()}
    assert found == expected
    fates = [reason for reason, _ in found.values()]
    assert fates.count(None) > 100 and (fates.count("duplicate_image") > 100) == (captions == "url")
    assert (fates.count("near_duplicate") > 20) == (distance >= 0)


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


@pytest.mark.parametrize("distance", [0, 1, 8, 16])
def test_rows_near_a_look_agree_with_it_in_a_band(distance: int) -> None:
    rng = np.random.default_rng(distance)
    looks = [((int(rng.integers(0, 2**64, dtype=np.uint64)), -1), distance) for _ in range(20)]
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 20), replace=False)) for _ in range(2000)]
    hashes = np.array([looks[number % 20][0][0] ^ flip for number, flip in enumerate(flips)], np.uint64)
    hashes = np.append(hashes, rng.integers(0, 2**64, 1000, dtype=np.uint64))
    cells = np.full(len(hashes), -1, np.int32)
    near = np.any([near_to(hashes, cells, *look) for look in looks], axis=0)
    found = agree_in_a_band(hashes, looks)
    assert near.any() and found[near].all() and (distance > 8 or not found.all())
