"""Tables split by key range: ranges, files, joins of folders with different numbers of ranges, and digests that add up."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tasks import keys, ranges, tables
from tasks.ranges import KeyRange


def keyed(rows: int, start: int = 0) -> pa.Table:
    keys = sorted(hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(start, start + rows))
    return pa.table({"key": keys, "value": np.arange(rows)})


def write(folder: str, table: pa.Table, count: int) -> str:
    for key_range, part in zip(ranges.ranges(count), ranges.split_by_key(table, count), strict=True):
        ranges.write_range(folder, key_range, part)
    return folder


@pytest.mark.parametrize(("rows", "count"), [(0, 1), (1, 1), (131_072, 1), (131_073, 2), (10**6, 8), (10**9, 1024)])
def test_the_number_of_ranges_grows_with_the_rows(rows: int, count: int) -> None:
    assert ranges.num_ranges(rows) == count


@pytest.mark.parametrize("count", [1, 2, 64, 1024])
def test_every_key_is_in_the_range_whose_bounds_enclose_it(count: int) -> None:
    keys = keyed(2000)["key"]
    for key, index in zip(keys.to_pylist(), ranges.of_keys(keys, count).tolist(), strict=True):
        found = KeyRange(index, count)
        assert found.start <= key and (found.stop is None or key < found.stop)


def test_ranges_of_a_slice_are_those_of_its_keys() -> None:
    keys = keyed(100)["key"].combine_chunks()
    assert ranges.of_keys(keys.slice(30, 50), 16).tolist() == ranges.of_keys(keys, 16)[30:80].tolist()


@pytest.mark.parametrize(("written", "read"), [(1, 1), (1, 8), (8, 1), (4, 16), (16, 4), (8, 8)])
def test_a_folder_is_read_in_any_number_of_ranges(tmp_path: object, written: int, read: int) -> None:
    table = keyed(3000)
    folder = write(str(tmp_path), table, written)
    parts = [ranges.read_range(folder, key_range) for key_range in ranges.ranges(read)]
    assert [part.num_rows for part in parts] == np.bincount(ranges.of_keys(table["key"], read), minlength=read).tolist()
    assert pa.concat_tables(parts).equals(table)
    assert ranges.read_all(folder).equals(table)
    assert ranges.range_count(folder) == written


@pytest.mark.parametrize(("written", "read"), [(1, 16), (2, 8), (4, 4)])
def test_a_narrow_range_of_a_wide_file_reads_no_other_rows(tmp_path: object, written: int, read: int) -> None:
    table = keyed(15_000)
    folder = write(str(tmp_path), table, written)
    for narrow in ranges.ranges(read):
        uri = next(uri for uri in ranges.range_files(folder) if ranges.range_of_file(uri).overlaps(narrow))
        assert tables.read_between(uri, narrow.start, narrow.stop).equals(ranges.read_range(folder, narrow))


def test_row_groups_of_a_range_file_have_about_a_thousand_rows(tmp_path: object) -> None:
    for rows in (0, 1, 999, 1001, 4000, 50_000):
        folder = write(f"{tmp_path}/{rows}", keyed(rows), 1)
        metadata = pq.read_metadata(ranges.range_files(folder)[0])
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert sum(sizes) == rows and max(sizes, default=0) <= 1200 and len(sizes) <= max(1, rows / 400)


def test_keys_become_bytes_and_numbers_and_texts_again() -> None:
    table = keyed(300)["key"].slice(17, 200)
    octets = keys.key_octets(table)
    assert [each.hex() for each in octets.to_pylist()] == table.to_pylist()
    assert keys.octet_texts(pa.chunked_array([octets.slice(3, 50)])).to_pylist() == table.to_pylist()[3:53]
    assert keys.key_texts(keys.hex_numbers(table, 32)).to_pylist() == table.to_pylist()
    assert keys.key_octets(table.slice(0, 0)).to_pylist() == []
    high, low = (pa.chunked_array([numbers]) for numbers in keys.hex_numbers(table, 32).T)
    pairs = keys.pair_octets(high, low)
    assert pc.index_in(pairs.slice(5, 9), value_set=pairs).to_pylist() == list(range(5, 14))
    assert len(keys.pair_octets(high.slice(0, 0), low.slice(0, 0))) == 0
    assert len(ranges.of_keys(pa.array([]), 8)) == 0


def test_rows_are_found_in_the_files_that_hold_them(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    table = keyed(3000)
    folder = write(str(tmp_path), table, 16)
    opened = []
    read = tables.read_keys
    monkeypatch.setattr(tables, "read_keys", lambda uri, *arguments: opened.append(uri) or read(uri, *arguments))
    wanted = [table["key"][5].as_py(), table["key"][2990].as_py(), "f" * 32]
    found = ranges.find_rows(folder, wanted)
    assert found["key"].to_pylist() == wanted[:2]
    assert len(opened) == 2


def test_digests_of_parts_add_up_in_any_order() -> None:
    table = keyed(1000).append_column("text", pa.array([None, "", "a", "b"] * 250))
    whole = tables.hex_digest(tables.rows_digest(table))
    shuffled = table.take(np.random.default_rng(0).permutation(1000))
    parts = [tables.rows_digest(shuffled.slice(start, 100)) for start in range(0, 1000, 100)]
    assert tables.hex_digest(*parts) == whole
    assert tables.hex_digest(*parts[1:]) != whole
    changed = table.set_column(2, "text", pa.array(["", None, "a", "b"] + [None, "", "a", "b"] * 249))
    assert tables.hex_digest(tables.rows_digest(changed)) != whole
    assert tables.hex_digest(tables.rows_digest(table.rename_columns(["key", "number", "text"]))) != whole
