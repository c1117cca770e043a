"""The index of an images table: complete after every commit, rewrite and restart, in any number of ranges, and compact."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import Schema

from tasks import index, ranges, tables
from tasks.stages.download import IMAGES

pytestmark = pytest.mark.usefixtures("cluster")


def image_rows(first: int, count: int) -> pa.Table:
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(first, first + count)]
    columns = {"key": keys, "url": [f"http://a.example/{key}" for key in keys], "status": ["ok"] * count}
    columns |= {"sha256": [key * 2 for key in keys], "original_width": [40] * count, "jpg": [b"x"] * count}
    return pa.table(
        [pa.array(columns.get(name, [None] * count), IMAGES.field(name).type) for name in IMAGES.names], IMAGES
    )


def commit(images: str, *parts: pa.Table, **changes: object) -> int:
    written = [tables.write_part(images, tables.content_digest(part)[:32], part) for part in parts]
    return tables.append_files(images, written, IMAGES, **changes)  # type: ignore[arg-type]


def assert_describes(images: str, version: int, count: int = 1) -> None:
    files = index.index_files(images)
    found = pa.concat_tables([index.read_index(files, key_range) for key_range in ranges.ranges(count)])
    expected = tables.read(images, version, ["key", "url", "status", "sha256"])
    assert found.select(expected.column_names).equals(expected)
    for row in found.select(["key", "part", "row"]).to_pylist():
        assert tables.read_file(f"{images}/{row['part']}", ["key"])["key"][row["row"]].as_py() == row["key"]


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(tmp_path / "images" / "recipe")


@pytest.mark.parametrize("rows_per_range", [1 << 17, 64])
def test_the_index_follows_commits_and_rewrites(
    images: str, rows_per_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", rows_per_range)
    version = commit(images, image_rows(0, 100), image_rows(100, 100))
    first = index.update_index(images, version)
    assert_describes(images, version, 4)
    assert index.update_index(images, version) == first, "nothing new, no commit"

    version = commit(images, image_rows(200, 50))
    index.update_index(images, version)
    assert_describes(images, version, 2)

    keys = tables.read(images, columns=["key"])["key"].combine_chunks().slice(0, 7)
    tables.delete_rows(images, keys)
    version = tables.version(images) or 0
    index.update_index(images, version)
    assert_describes(images, version)
    assert not pc.any(
        pc.is_in(index.read_index(index.index_files(images), ranges.KeyRange(0, 1))["key"], value_set=keys)
    ).as_py()
    assert index.read_index(index.index_files(images, first), ranges.KeyRange(0, 1)).num_rows == 200, (
        "older versions remain"
    )


def test_several_commits_are_described_by_one_update(images: str) -> None:
    commit(images, image_rows(0, 10))
    version = commit(images, image_rows(10, 10))
    index.update_index(images, version)
    assert_describes(images, version)


def test_rows_are_found_while_the_index_is_out_of_date(images: str) -> None:
    def found() -> list[str]:
        every = pa.concat_tables(index.each_table(images, ["key", "sha256"]))
        keys = tables.read(images, columns=["key"])["key"].to_pylist()
        assert every.sort_by("key")["key"].to_pylist() == keys
        for row in index.find_rows(images, keys[::7], ["key", "part", "row"]).to_pylist():
            assert tables.read_rows(f"{images}/{row['part']}", [row["row"]], ["key"])["key"][0].as_py() == row["key"]
        assert index.find_rows(images, keys[::7], ["key"])["key"].to_pylist() == keys[::7]
        return keys

    version = commit(images, image_rows(0, 100))
    keys = found()
    index.update_index(images, version)
    assert found() == keys
    commit(images, image_rows(100, 50))
    assert len(found()) == 150
    tables.delete_rows(images, pa.array(keys[:3]))
    assert len(found()) == 147 and not index.find_rows(images, keys[:3], ["key"]).num_rows


def test_an_index_whose_writer_was_killed_when_it_had_created_it_is_written(images: str) -> None:
    version = commit(images, image_rows(0, 3))
    tables.create(index.index_uri(images), Schema.from_arrow(index.INDEX))
    assert sum(table.num_rows for table in index.each_table(images, ["key"])) == 3
    index.update_index(images, version)
    assert_describes(images, version)


def test_many_small_commits_are_merged(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_MAX_FILES_PER_RANGE", 4)
    for number in range(10):
        version = commit(images, image_rows(10 * number, 10))
        index.update_index(images, version)
        assert len(index.index_files(images)) <= 4
    assert_describes(images, version)


def test_small_commits_beside_a_large_one_are_merged_before_every_range_reads_many(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_MAX_FILES_PER_RANGE", 4)
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", 64)
    version = commit(images, image_rows(0, 1000))
    index.update_index(images, version)
    for number in range(8):
        version = commit(images, image_rows(1000 + 10 * number, 10))
        index.update_index(images, version)
        for key_range in ranges.ranges(64):
            files = index.index_files(images)
            assert sum(ranges.range_of_file(uri).overlaps(key_range) for uri in files) <= 4
    assert_describes(images, version, 16)


def test_a_part_of_an_older_version_lacks_columns_which_are_null(images: str) -> None:
    old = image_rows(0, 10).drop_columns("phash")
    part = tables.write_part(images, "old", old)
    index.update_index(images, tables.append_files(images, [part], IMAGES))
    assert (
        index.read_index(index.index_files(images), ranges.KeyRange(0, 1), ["key", "phash"])["phash"].null_count == 10
    )


@pytest.mark.parametrize("rows_per_range", [1 << 17, 64])
def test_f58_a_storage_from_before_redirects_were_recorded_is_read_with_nulls(
    images: str, rows_per_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images and its index lack the columns; what is fetched later has them."""
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", rows_per_range)
    new = ["final_url", "redirect_hosts"]
    before = pa.schema([field for field in IMAGES if field.name not in new])
    index_before = pa.schema([field for field in index.INDEX if field.name not in new])
    old = image_rows(0, 200).drop_columns(new)
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(index, "INDEX", index_before)
        earlier.setattr(index, "_COPIED", [name for name in index._COPIED if name not in new])
        part = tables.write_part(images, "old", old)
        index.update_index(images, tables.append_files(images, [part], before))
    assert tables.columns(images) == before.names
    added = image_rows(200, 10).set_column(
        IMAGES.get_field_index("redirect_hosts"), "redirect_hosts", pa.array(["cdn.example"] * 10)
    )
    for parts, known in (([], 0), ([added], 10)):
        index.update_index(images, commit(images, *parts))
        files = index.index_files(images)
        for count in (1, 16):
            found = pa.concat_tables(
                [index.read_index(files, each, ["key", *new]).select(["key", *new]) for each in ranges.ranges(count)]
            )
            assert len(found) - found["redirect_hosts"].null_count == known and found["final_url"].null_count == len(
                found
            )
        every = pa.concat_tables(index.each_table(images, ["key", *new]))
        assert every.sort_by("key").equals(found.sort_by("key"))
    keys = [old["key"][0].as_py(), added["key"][0].as_py()]
    rows = index.find_rows(images, keys, ["key", "redirect_hosts"]).to_pylist()
    assert {row["key"]: row["redirect_hosts"] for row in rows} == dict(zip(keys, [None, "cdn.example"], strict=True))
