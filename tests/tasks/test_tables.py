import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties

from tasks import tables
from unclip.errors import DamagedError

SCHEMA = pa.schema({"key": pa.string(), "jpg": pa.binary(), "width": pa.int32()})


def rows(*keys: str) -> pa.Table:
    columns = {"key": keys, "jpg": [key.encode() if key != "c" else None for key in keys], "width": range(len(keys))}
    return pa.table({name: list(values) for name, values in columns.items()}, SCHEMA)


def test_f33_parts_become_visible_with_their_commit_and_stay_in_their_version(tmp_path: Path) -> None:
    table = str(tmp_path / "images")
    assert tables.version(table) is None
    first = tables.write_part(table, "p1", rows("d", "b"))
    assert (first.name, first.rows) == ("p1.parquet", 2) and first == tables.find_part(table, "p1")
    assert tables.version(table) is None
    assert tables.append_files(table, [first], SCHEMA, {"unclip.run": "r1"}) == 1, "version 0 is the empty table"
    second = tables.write_part(table, "p0", rows("c", "a"))
    assert tables.read(table)["key"].to_pylist() == ["b", "d"]
    assert tables.append_files(table, [first, second], SCHEMA) == 2
    assert tables.version(table) == 2
    assert tables.read(table)["key"].to_pylist() == ["a", "b", "c", "d"]
    assert tables.read(table).schema == SCHEMA
    assert tables.read(table, version=1, columns=["key", "width"]).to_pydict() == {"key": ["b", "d"], "width": [1, 0]}
    assert [Path(uri).name for uri in tables.files(table)] == ["p0.parquet", "p1.parquet"]


def test_the_log_knows_the_rows_and_bytes_of_each_version(tmp_path: Path) -> None:
    table = str(tmp_path / "images")
    assert tables.extent(table) == (0, 0)
    first, second = tables.write_part(table, "a", rows("a", "b")), tables.write_part(table, "b", rows("c"))
    tables.append_files(table, [first], SCHEMA)
    tables.append_files(table, [second], SCHEMA)
    assert tables.extent(table, 1) == (2, first.size_bytes)
    assert tables.extent(table) == (3, first.size_bytes + second.size_bytes)


def test_committing_again_changes_nothing(tmp_path: Path) -> None:
    table = str(tmp_path)
    parts = [tables.write_part(table, name, rows(name)) for name in ("a", "b")]
    assert tables.append_files(table, parts, SCHEMA) == 1
    assert tables.append_files(table, parts, SCHEMA) == 1
    assert tables.append_files(table, [], SCHEMA) == 1
    assert tables.read(table).num_rows == 2


def test_any_delta_reader_sees_the_rows_and_their_count(tmp_path: Path) -> None:
    import deltalake

    tables.append_files(str(tmp_path), [tables.write_part(str(tmp_path), "p", rows("a", "b", "c"))], SCHEMA)
    table = deltalake.DeltaTable(str(tmp_path))
    assert table.count() == 3
    query = deltalake.QueryBuilder().register("t", table).execute("select key from t where jpg is null")
    assert pa.table(query.read_all())["key"].to_pylist() == ["c"]


def test_an_existing_part_is_not_written_again(tmp_path: Path) -> None:
    table = str(tmp_path)
    first = tables.write_part(table, "p", rows("a"))
    before = (tmp_path / "p.parquet").stat()
    assert tables.write_part(table, "p", rows("b", "c")) == first == tables.find_part(table, "p")
    after = (tmp_path / "p.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert tables.find_part(table, "q") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.parquet"]


def test_the_same_rows_give_the_same_bytes_in_row_groups_of_a_thousand(tmp_path: Path) -> None:
    keys = [f"{number:05}" for number in range(2500)]
    whole = rows(*keys)
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7)])
    assert tables.parquet_bytes(whole) == tables.parquet_bytes(pieces)
    tables.write_file(str(tmp_path / "a.parquet"), whole)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert [metadata.row_group(group).num_rows for group in range(3)] == [1000, 1000, 500]
    codecs = {metadata.row_group(0).column(i).path_in_schema: metadata.row_group(0).column(i) for i in range(3)}
    assert codecs["jpg"].compression == "UNCOMPRESSED" and codecs["key"].compression == "ZSTD"
    assert "RLE_DICTIONARY" not in codecs["jpg"].encodings


def test_content_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32()))
    table = rows("a", "b", "c").append_column("vector", vectors).append_column("ok", pa.array([True, None, False]))
    digest = tables.content_digest(table)
    assert digest == tables.content_digest(pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1)]))
    assert digest == tables.content_digest(pa.concat_tables([last_rows(table, 2), table]).slice(2))
    dictionary = table.set_column(0, "key", table["key"].dictionary_encode())
    large = table.set_column(0, "key", table["key"].cast(pa.large_string()))
    assert digest == tables.content_digest(dictionary) == tables.content_digest(large)
    for part, keys in (("p2", ("a",)), ("p1", ("c", "b"))):
        tables.write_part(str(tmp_path), part, rows(*keys))
    tables.append_files(
        str(tmp_path), [part for name in ("p2", "p1") if (part := tables.find_part(str(tmp_path), name))], SCHEMA
    )
    stored = tables.read(str(tmp_path), columns=["key", "jpg"])
    assert tables.content_digest(stored) == tables.content_digest(rows("a", "b", "c").select(["key", "jpg"]))


def last_rows(table: pa.Table, number: int) -> pa.Table:
    return table.slice(table.num_rows - number)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.rename_columns(["key", "jpg", "size"]),
        lambda t: t.set_column(2, "width", t["width"].cast(pa.int64())),
        lambda t: t.set_column(2, "width", pa.array([0, 1, None], pa.int32())),
        lambda t: t.set_column(1, "jpg", pa.array([b"a", b"b", b""])),
        lambda t: t.set_column(0, "key", pa.array(["ab", "", "c"])),
        lambda t: t.take([1, 0, 2]),
        lambda t: t.slice(0, 2),
    ],
)
def test_content_digest_detects_every_change(change: object) -> None:
    table = rows("a", "b", "c")
    assert tables.content_digest(change(table)) != tables.content_digest(table)  # type: ignore[operator]


@pytest.mark.parametrize("shift", [86_400, -86_400])
def test_f35_rows_removed_under_a_wrong_clock_leave_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    table = str(tmp_path)
    tables.append_files(table, [tables.write_part(table, "first", rows("secret", "b"))], SCHEMA)
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda now=time.time: now() + shift)
        first = f"{table}/first.parquet"
        rewritten = tables.rewrite_without(first, pa.array(["b"]))
        assert rewritten is not None and len(rewritten) == 1 and tables.origin(rewritten[0].name) == "first"
        parts = [tables.write_part(table, "second", rows("b")), *rewritten]
        assert tables.append_files(table, parts, SCHEMA, removed=["first.parquet"]) == 2
    assert tables.read(table)["key"].to_pylist() == ["b", "secret"], "versions are not ordered by time"
    assert tables.delete_rows(table, pa.array(["secret"])) == 1
    assert tables.read(table)["key"].to_pylist() == ["b"]
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["second.parquet"]


def test_a_table_gains_a_column_and_its_older_parts_read_as_nulls(tmp_path: Path) -> None:
    import deltalake

    table, gained = str(tmp_path), pa.schema([*SCHEMA, pa.field("colour", pa.string())])
    old = tables.write_part(table, "old", rows("c", "a"))
    assert tables.append_files(table, [old], SCHEMA) == 1
    names = ["key", "colour"]
    before = {"key": ["a", "c"], "colour": [None, None]}
    assert tables.read(table, columns=names).to_pydict() == before, "before any part has the column"
    assert tables.read_file(f"{table}/{old.name}", names).schema.field("colour").type == pa.string()
    assert tables.read_file(f"{table}/{old.name}").column_names == SCHEMA.names
    new = tables.write_part(table, "new", rows("b").append_column("colour", pa.array(["ff0000"])))
    version = tables.append_files(table, [old, new], gained)
    assert tables.append_files(table, [old, new], gained) == version, "committing again changes nothing"
    assert tables.columns(table) == gained.names
    assert tables.read(table, columns=names).to_pydict() == {"key": ["a", "b", "c"], "colour": [None, "ff0000", None]}
    assert tables.read(table)["colour"].to_pylist() == [None, "ff0000", None]
    assert tables.read(table, version=1, columns=names).to_pydict() == before
    assert tables.read_with_commit_times(table).num_rows == 3
    query = (
        deltalake.QueryBuilder().register("t", deltalake.DeltaTable(table)).execute("select colour from t order by key")
    )
    assert pa.table(query.read_all())["colour"].to_pylist() == [None, "ff0000", None], "any Delta reader sees the same"
    assert tables.delete_rows(table, pa.array(["a"])) == 1
    assert tables.read(table, columns=names).to_pydict() == {"key": ["b", "c"], "colour": ["ff0000", None]}
    with pytest.raises(KeyError, match="typo"):
        tables.read(table, columns=["key", "typo"])["typo"]


def test_a_file_is_rewritten_only_if_it_has_such_rows(tmp_path: Path) -> None:
    tables.write_part(str(tmp_path), "first", rows("a", "b", "c"))
    assert tables.rewrite_without(f"{tmp_path}/first.parquet", pa.array(["d"])) is None
    assert tables.rewrite_without(f"{tmp_path}/first.parquet", pa.array(["a", "b", "c"])) == []
    [once] = tables.rewrite_without(f"{tmp_path}/first.parquet", pa.array(["a"])) or []
    [twice] = tables.rewrite_without(f"{tmp_path}/{once.name}", pa.array(["c"])) or []
    assert tables.read_file(f"{tmp_path}/{twice.name}")["key"].to_pylist() == ["b"]
    assert tables.origin(once.name) == tables.origin(twice.name) == "first" and once.name != twice.name


def test_rows_are_read_by_number_from_their_row_groups_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.parquet")
    keys = [f"{number:05}" for number in range(0, 5000, 2)]
    tables.write_file(uri, rows(*keys))
    found = tables.read_rows(uri, [2400, 3, 1999, 2000, 3], ["key", "width"])
    assert found.to_pydict() == {"key": [keys[n] for n in (3, 1999, 2000, 2400)], "width": [3, 1999, 2000, 2400]}
    assert tables.read_rows(uri, [], ["key"]).num_rows == 0

    data = bytearray(Path(uri).read_bytes())
    column = pq.read_metadata(uri).row_group(1).column(0)
    start = column.dictionary_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    Path(uri).write_bytes(data)  # row group 1 is damaged, so reading its keys fails
    assert tables.read_rows(uri, [5, 2100], ["key"])["key"].to_pylist() == [keys[5], keys[2100]]
    assert tables.has_keys(uri, pa.array([keys[5]])) and tables.has_keys(uri, pa.array([keys[2100], "x"]))
    assert not tables.has_keys(uri, pa.array([keys[7][:-1] + "5", "99999"])), "excluded by statistics"
    with pytest.raises(DamagedError, match=r"a\.parquet: cannot be read"):
        tables.read_rows(uri, [1500], ["key"])


def test_old_versions_stay_in_the_log(tmp_path: Path) -> None:
    """By default Delta deletes logs of 30 days ago at every hundredth commit."""
    table = str(tmp_path)
    first = tables.append_files(table, [tables.write_part(table, "a", rows("a"))], SCHEMA)
    for _ in range(97):
        tables.commit_note(tables._table(table), CommitProperties())
    for path in tmp_path.glob("_delta_log/*.json"):
        os.utime(path, (1.6e9, 1.6e9))
    for name in ("b", "c", "d"):
        tables.append_files(table, [tables.write_part(table, name, rows(name))], SCHEMA)
    assert list(tmp_path.glob("_delta_log/*.checkpoint.parquet")) and tables.version(table) == 101
    assert tables.extent(table, first)[0] == 1
    assert set(tables.recorded_hashes(table)) == {f"{name}.parquet" for name in "abcd"}


def test_f76_a_takedown_keeps_files_of_older_versions_that_have_none_of_its_rows(tmp_path: Path) -> None:
    """Trainings read them."""
    table = str(tmp_path / "images")
    parts = [tables.write_part(table, name, rows(*name)) for name in ("ab", "cd", "ef")]
    tables.append_files(table, parts, SCHEMA)
    tables.append_files(table, [tables.write_part(table, "c", rows("c"))], SCHEMA, removed=["cd.parquet"])
    tables.write_part(table, "uncommitted", rows("z"))
    assert tables.delete_rows(table, pa.array(["a"])) == 1
    assert tables.read(table)["key"].to_pylist() == ["b", "c", "e", "f"]
    assert not (tmp_path / "images" / "ab.parquet").exists()
    assert not (tmp_path / "images" / "uncommitted.parquet").exists()
    assert tables.read_file(f"{table}/cd.parquet")["key"].to_pylist() == ["c", "d"]
    assert tables.delete_rows(table, pa.array(["d"])) == 0  # no row of the newest version
    assert not (tmp_path / "images" / "cd.parquet").exists()


def test_f74_rows_of_a_key_are_sorted_by_the_commit_of_their_file() -> None:
    rows_of_files = pa.table({"key": [*"babac"], "file": [*"xyzyx"], "value": range(5)})
    ordered, is_first = tables.in_commit_order(rows_of_files, "file", pa.array([1, 1, 0, 1, 2]))
    assert ordered.to_pydict() == {"key": [*"aabbc"], "file": [*"yyzxx"], "value": [1, 3, 2, 0, 4]}
    assert is_first.to_pylist() == [True, False, True, False, True]
    nothing, is_first = tables.in_commit_order(rows_of_files.slice(0, 0), "file", pa.array([], pa.int64()))
    assert not nothing.num_rows and not len(is_first)


def test_f74_of_repeated_rows_the_one_that_was_committed_first_stays(tmp_path: Path) -> None:
    table = str(tmp_path / "images")

    def commit(name: str, first_width: int, keys: str) -> None:
        table_of_keys = rows(*keys).set_column(
            2, "width", pa.array(range(first_width, first_width + len(keys)), pa.int32())
        )
        tables.append_files(table, [tables.write_part(table, name, table_of_keys)], SCHEMA)

    commit("z", 0, "ab")
    commit("y", 10, "bc")
    commit("x", 20, "bcd")
    places = pa.concat_tables(
        tables.read_file(uri, ["key"]).append_column("part", pa.array([Path(uri).name] * tables.num_rows(uri)))
        for uri in tables.files(table)
    )
    repeated = tables.repeats(places)
    assert sorted(repeated["key"].to_pylist()) == ["b", "b", "b", "c", "c"]
    assert tables.remove_repeats(table, repeated, SCHEMA) == 4
    assert tables.read(table, columns=["key", "width"]).to_pydict() == {"key": [*"abcd"], "width": [0, 1, 11, 22]}
    assert tables.read(table, version=3).num_rows == 7
    assert tables.commit_order(table)[tables.files(table)[0].rpartition("/")[2]] == 3  # x, rewritten


def test_a_process_that_ends_between_the_creation_of_a_table_and_its_first_commit_leaves_a_table_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, schema = str(tmp_path / "table"), pa.schema({"key": pa.string()})

    class Killed(Exception):
        pass

    def stop(moment: str, uri: str) -> None:
        if moment == "within":
            raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr("tasks.tables.storage.failpoint", stop)
        tables.append_files(table, [], schema, {"unclip.plan": "a"})
    assert tables.version(table) == 0
    assert tables.read_with_commit_times(table).column_names == ["key", "committed"]
    assert tables.append_files(table, [], schema, {"unclip.plan": "a"}) == 1
    assert tables.last_note(table)["unclip.plan"] == "a"  # it counts even without rows
    assert tables.append_files(table, [], schema, {"unclip.plan": "a"}) == 1
