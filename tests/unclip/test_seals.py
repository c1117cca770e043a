"""Digests that files carry."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unclip.damage import flipped
from unclip import files, seals
from unclip.errors import DamagedError

TABLE = pa.table({"key": ["a", "b", "c"], "jpg": [b"x", None, b"yz"]})


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(TABLE.select(["key"]), buffer, write_page_checksum=True, write_statistics=False)
    return buffer.getvalue()


def arrow() -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return buffer.getvalue()


def check(data: bytes) -> seals.State:
    return seals.check(pa.BufferReader(data))


@pytest.mark.parametrize("data", [parquet(), arrow()], ids=["parquet", "arrow"])
def test_f78_every_flipped_bit_and_every_truncation_of_a_sealed_file_is_found(data: bytes) -> None:
    sealed = seals.seal(data)
    assert check(sealed) == "sound"
    assert all(check(flipped(sealed, bit)) == "damaged" for bit in range(8 * len(sealed)))
    assert {check(sealed[:length]) for length in range(len(sealed))} == {"damaged"}
    assert check(sealed + b"\0") == "damaged"


@pytest.mark.parametrize("data", [parquet(), arrow()], ids=["parquet", "arrow"])
def test_f80_a_file_without_a_seal_is_not_covered(data: bytes) -> None:
    assert check(data) == "not covered"


@pytest.mark.parametrize("data", [parquet(), arrow()], ids=["parquet", "arrow"])
def test_the_digest_that_comes_with_a_seal_is_that_of_the_sealed_file(data: bytes) -> None:
    assert seals.seal_and_digest(data) == (seals.seal(data), hashlib.sha256(seals.seal(data)).hexdigest())


def test_readers_of_the_formats_read_sealed_files() -> None:
    assert pq.read_table(pa.BufferReader(seals.seal(parquet()))).equals(TABLE.select(["key"]))
    assert pa.ipc.open_file(pa.BufferReader(seals.seal(arrow()))).read_all().equals(TABLE)


def test_f78_a_footer_is_checked_before_it_is_used() -> None:
    data = parquet()
    sealed = seals.seal(data)
    footer = seals.read_footer(pa.BufferReader(sealed), "a.parquet")
    assert sealed.endswith(footer) and pq.read_metadata(pa.BufferReader(footer)).num_rows == 3
    assert seals.read_footer(pa.BufferReader(data), "a.parquet") == footer
    start = len(sealed) - len(footer)
    for changed in (flipped(sealed, bit) for bit in range(8 * len(sealed))):
        if changed[start:] != footer:
            with pytest.raises(DamagedError, match=r"a\.parquet: its footer"):
                seals.read_footer(pa.BufferReader(changed), "a.parquet")


def test_f78_json_objects_are_checked_when_they_are_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.json")
    value = {"z": [1.5, None], "a": {"2": "é", "10": True}}
    files.write_json(uri, value)
    assert files.read_json(uri) == value and set(json.loads(files.read(uri))) == {"a", "z", "checksum"}
    Path(uri).write_text(Path(uri).read_text().replace("1.5", "1.4"))
    with pytest.raises(DamagedError, match=r"a\.json: does not match its checksum"):
        files.read_json(uri)
    Path(uri).write_text('{"a": 1}')
    assert files.read_json(uri) == {"a": 1}
    files.write_json(uri, {1: "a", 10: "b", 2: "c"})
    assert files.read_json(uri) == {"1": "a", "2": "c", "10": "b"}


def test_files_without_a_seal_are_under_the_manifest_of_their_folder(tmp_path: Path) -> None:
    folder = str(tmp_path)
    contents = {"a.png": b"a", "previews/b.png": b"b", "model/c.bin": b"c", "d.parquet": b"d"}
    for name, data in contents.items():
        files.write(f"{folder}/{name}", data)
    files.write_json(f"{folder}/model/manifest.json", {"sha256": {}})
    files.write_json(f"{folder}/plan.json", {"a": 1})
    files.write_json(f"{folder}/previews/keys.json", ["k"])
    seals.cover(folder)
    contents["previews/keys.json"] = files.encode_json(["k"])
    hashes = {name: files.sha256(contents[name]) for name in ("a.png", "previews/b.png", "previews/keys.json")}
    others = ["d.parquet", "model/c.bin", "model/manifest.json", "plan.json"]
    assert files.read_json(f"{folder}/manifest.json") == {"sha256": hashes, "others": others}
    with seals.changing(folder, "previews/"):
        of_a = {"a.png": hashes["a.png"]}
        assert files.read_json(f"{folder}/manifest.json") == {"sha256": of_a, "others": others}, "after a kill"
        files.write(f"{folder}/previews/b.png", b"B")
    changed = {**hashes, "previews/b.png": files.sha256(b"B")}
    assert files.read_json(f"{folder}/manifest.json") == {"sha256": changed, "others": others}
    with seals.changing(folder, "model/"):
        files.delete(f"{folder}/model")
    assert files.read_json(f"{folder}/manifest.json") == {"sha256": changed, "others": ["d.parquet", "plan.json"]}


def test_a_copy_takes_no_space_and_follows_no_later_change(tmp_path: Path) -> None:
    source, target = tmp_path / "a" / "model", tmp_path / "b" / "c" / "model"
    files.write(str(source), b"weights")
    for _ in range(2):
        files.copy(str(source), str(target))
        assert source.samefile(target) and [entry.name for entry in files.walk(str(tmp_path))] == [
            "a/model",
            "b/c/model",
        ]
    files.write(str(source), b"others")
    assert target.read_bytes() == b"weights"
