import concurrent.futures
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tasks import tables
from tests.unclip.damage import damaged, flip
from unclip import data, files, seals
from unclip.data import Places, RowReader, Source, decode_image, vectors
from unclip.errors import DamagedError, InputError

NUM_ROWS = 103


@pytest.fixture
def reader(tmp_path: Path) -> RowReader:
    """Reader of captions in two files and of embeddings in a third, in another order and with an extra row."""
    keys = [f"k{index:03d}" for index in range(NUM_ROWS)]
    for number, part in enumerate((keys[:60], keys[60:])):
        table = pa.table({"key": part, "caption": [f"caption of {key}" for key in part]})
        pq.write_table(table, tmp_path / f"captions{number}.parquet", row_group_size=10)
    shuffled = [*reversed(keys), "other"]
    embeddings = [[float(key[1:]) if key != "other" else -1.0, 1.0] for key in shuffled]
    table = pa.table({"key": shuffled, "embedding": pa.array(embeddings, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "embeddings.parquet", row_group_size=7)
    captions = tuple(str(tmp_path / f"captions{number}.parquet") for number in (0, 1))
    embedded = Source((str(tmp_path / "embeddings.parquet"),), ("embedding",), "embeddings")
    return RowReader.of_keys([Source(captions, ("caption",)), embedded], keys, window=4, group_rows=10)


def epoch(reader: RowReader, seed: int, number: int) -> list[int]:
    return np.concatenate(list(reader.windows(seed, number))).tolist()


def stream(reader: RowReader, count: int, **options) -> list[str]:
    batches = reader.batches(**{"seed": 0, "samples_seen": 0, "batch_size": 10, **options})
    return [key for _ in range(count) for key in next(batches)["key"]]


def test_columns_from_all_sources_are_joined_by_key(reader: RowReader) -> None:
    batch = next(reader.batches(seed=0, samples_seen=0, batch_size=50))
    for key, caption, embedding in zip(batch["key"], batch["caption"], batch["embedding"], strict=True):
        assert caption == f"caption of {key}" and embedding[0] == float(key[1:])


def test_each_epoch_has_every_row_once_in_its_own_order(reader: RowReader) -> None:
    first, second = epoch(reader, 0, 0), epoch(reader, 0, 1)
    assert len(first) == len(reader) == NUM_ROWS
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second and first != epoch(reader, 1, 0) and first == epoch(reader, 0, 0)
    for start in (1, 39, 40, 41, 102):
        assert np.concatenate(list(reader.windows(0, 0, start))).tolist() == first[start:]


def test_the_stream_resumes_where_it_stopped(reader: RowReader) -> None:
    whole = stream(reader, 30)
    for num_done in (3, 10, 17):
        assert stream(reader, 30 - num_done, samples_seen=10 * num_done) == whole[10 * num_done :]


def test_the_stream_has_every_row_equally_often(reader: RowReader) -> None:
    keys = stream(reader, NUM_ROWS)
    assert {keys.count(key) for key in set(keys)} == {10}


def test_ranks_share_every_batch(reader: RowReader) -> None:
    whole = stream(reader, 20)
    ranks = [stream(reader, 20, rank=rank, world_size=2) for rank in range(2)]
    together = [key for step in range(20) for keys in ranks for key in keys[5 * step : 5 * step + 5]]
    assert together == whole


def test_batches_are_prepared_without_a_team_of_threads(reader: RowReader) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = reader.batches(seed=0, samples_seen=0, batch_size=10, prepare=lambda _: torch.get_num_threads())
        assert (next(batches), torch.get_num_threads(), next(batches)) == (1, 3, 1)
    finally:
        torch.set_num_threads(before)


def test_ranks_rarely_read_the_same_row_groups(tmp_path: Path) -> None:
    keys = [f"k{index:04d}" for index in range(3200)]
    pq.write_table(pa.table({"key": keys}), tmp_path / "rows.parquet", row_group_size=100)
    num_read = 0
    for rank in range(8):
        reader = RowReader.of_keys([Source((f"{tmp_path}/rows.parquet",), ())], keys, window=16, group_rows=100)
        shares = reader._shares(0, 0, batch_size=400, rank=rank, world_size=8)
        rows = np.concatenate([next(shares)["images_row"] for _ in range(8)])
        num_read += len(set((rows // 100).tolist()))
    assert 32 <= num_read <= 2.5 * 32  # 8 times 32 if each rank read from every row group


def test_missing_rows_are_named(reader: RowReader) -> None:
    with pytest.raises(InputError, match=r"lacks 1 of 2 keys, such as nowhere"):
        RowReader.of_keys(reader.sources, ["k001", "nowhere"])
    with pytest.raises(InputError, match="no rows to train on"):
        RowReader.of_keys(reader.sources, [])
    assert reader.read(np.array([7, 3]))["caption"] == ["caption of k007", "caption of k003"]


def test_invalid_vectors_are_rejected() -> None:
    for values in ([[1.0, 2.0], [3.0]], [[1.0], None], [[1.0], [None]]):
        with pytest.raises(InputError, match="nulls or vectors of different lengths"):
            vectors(pa.chunked_array([pa.array(values, pa.list_(pa.float32()))]))


def test_images_are_center_cropped() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    square = decode_image(buffer.getvalue(), 16)
    assert square.shape == (16, 16, 3) and square.min() > 200


def stored_places(folder: Path, reader: RowReader) -> list[str]:
    """Arrow files of the reader's places, in two parts, with keys as bytes."""
    rows = np.arange(len(reader))
    columns = {"key": pa.array([key.encode().ljust(16) for key in reader.places.keys(rows)], pa.binary(16))}
    columns |= {
        f"{table}_{kind}": pa.array(reader.places.column(f"{table}_{kind}", rows))
        for table in ("images", "embeddings")
        for kind in ("file", "row")
    }
    whole, uris = pa.table(columns), []
    for number, part in enumerate((whole.slice(0, 37), whole.slice(37))):
        uris.append(str(folder / f"{number}.arrow"))
        with pa.OSFile(uris[-1], "wb") as sink, pa.ipc.new_file(sink, part.schema) as writer:
            writer.write_table(part.combine_chunks())
    return uris


def test_stored_places_give_the_same_stream_and_take_no_memory_for_rows(reader: RowReader, tmp_path: Path) -> None:
    places = Places.open(stored_places(tmp_path, reader))
    again = RowReader(reader.sources, places, window=4, group_rows=10)
    before = next(reader.batches(seed=3, samples_seen=0, batch_size=30))
    after = next(again.batches(seed=3, samples_seen=0, batch_size=30))
    assert after["caption"] == before["caption"]
    assert [bytes.fromhex(key).decode().rstrip() for key in after["key"]] == before["key"]
    assert again._group_starts.tolist() == reader._group_starts.tolist()


def test_a_spread_of_rows_is_even_and_bounded(reader: RowReader) -> None:
    assert reader.places.spread(4).tolist() == [0, 34, 68, 102]
    assert reader.places.spread(1000).tolist() == list(range(NUM_ROWS))


def test_places_of_a_remote_file_that_was_written_again_are_read_again(
    reader: RowReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    first, second = stored_places(tmp_path, reader)
    uri = f"file://{first}"
    assert len(Places.open([uri])) == len(Places.open([uri])) == 37
    assert len(list((tmp_path / "local").rglob("*"))) == 3, "one folder, one copy, one lock"
    Path(first).write_bytes(Path(second).read_bytes())
    assert len(Places.open([uri])) == NUM_ROWS - 37


def test_f78_no_flipped_bit_reaches_a_training(tmp_path: Path) -> None:
    rng, number = np.random.default_rng(0), 1200
    keys = [f"{index:032x}" for index in range(number)]
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(4 * number), pa.float32()), 4)
    parts = {
        "images": pa.table({"key": keys, "jpg": [rng.bytes(50) for _ in keys]}),
        "embeddings": pa.table({"key": keys, "image_embedding": embeddings.cast(pa.list_(pa.float32()))}),
    }
    sources = []
    for (name, part), column in zip(parts.items(), ("jpg", "image_embedding"), strict=True):
        tables.write_file(f"{tmp_path}/{name}.parquet", part)
        sources.append(Source((f"{tmp_path}/{name}.parquet",), (column,), name))
    places = Places.find(sources, keys)

    def read() -> tuple[list[bytes], np.ndarray]:
        data._metadata.cache_clear()
        batch = RowReader(sources, places).read(np.arange(0, number, 7))
        return batch["jpg"], np.stack(batch["image_embedding"])

    jpgs, vectors_read = read()
    num_found = 0
    for trial in range(100):
        path = tmp_path / f"{('images', 'embeddings')[trial % 2]}.parquet"
        bit = int(rng.integers(8 * path.stat().st_size))
        with damaged(path, bit):
            try:
                found = read()
            except DamagedError:
                num_found += 1
            else:  # a bit that this reader has no use for
                assert found[0] == jpgs and (found[1] == vectors_read).all(), (path, bit)
    assert num_found > 75


def test_pages_are_checked_once_by_each_reader(tmp_path: Path) -> None:
    uri, keys = f"{tmp_path}/a.parquet", [f"{index:04}" for index in range(2000)]
    tables.write_file(uri, pa.table({"key": keys, "jpg": [key.encode() * 10 for key in keys]}))
    reader = RowReader.of_keys([Source((uri,), ("jpg",))], keys)
    first = reader.read(np.arange(1500))["jpg"]
    assert first == [key.encode() * 10 for key in keys[:1500]] and reader._checked == {(0, 0): 0b11}
    reader._groups.clear()
    flip(uri, 8 * Path(uri).read_bytes().index(b"0007" * 10))
    assert reader.read(np.arange(1500))["jpg"] != first, "the second epoch does not pay for it"
    with pytest.raises(DamagedError, match=r"a\.parquet: cannot be read.*unclip verify"):
        RowReader.of_keys([Source((uri,), ("jpg",))], keys).read(np.arange(10))


def test_f78_a_damaged_file_of_places_is_refused(tmp_path: Path) -> None:
    places = pa.table({"key": ["a", "b"], "images_file": [0, 0], "images_row": [0, 1]})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, places.schema) as writer:
        writer.write_table(places)
    uri, sealed = str(tmp_path / "train.arrow"), seals.seal(sink.getvalue())
    Path(uri).write_bytes(sealed)
    assert len(Places.open([uri])) == 2
    flip(uri, 4 * len(sealed))
    with pytest.raises(DamagedError, match=r"train\.arrow"):
        Places.open([uri])


def test_f130_a_store_that_does_not_answer_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    once = pafs.AwsStandardS3RetryStrategy(max_attempts=0)
    store = pafs.S3FileSystem(
        anonymous=True, endpoint_override="127.0.0.1:9", scheme="http", region="us-east-1", retry_strategy=once
    )
    monkeypatch.setattr(files, "locate", lambda _: (store, "bucket/a.parquet"))  # with fewer attempts
    with pytest.raises(OSError, match="AWS Error") as caught:
        tables.read_file("/bucket/a.parquet")
    assert not isinstance(caught.value, FileNotFoundError)


def test_f130_what_cannot_be_decoded_is_damaged_only_if_its_bytes_are(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.parquet"
    tables.write_file(uri, pa.table({"key": ["a"]}))

    def fail(parquet: pq.ParquetFile) -> None:
        raise OSError("Unexpected end of stream")  # as pyarrow's decoders say it, without a number

    with pytest.raises(OSError, match=r"^Unexpected end of stream$"):
        data.read_parquet(uri, fail)
    content = bytearray(Path(uri).read_bytes())
    content[5] ^= 1
    Path(uri).write_bytes(content)
    with pytest.raises(DamagedError, match="cannot be read: Unexpected end of stream"):
        data.read_parquet(uri, fail)


def sealed_places(*keys: str) -> bytes:
    places = pa.table({"key": keys, "images_file": [0] * len(keys), "images_row": [*range(len(keys))]})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, places.schema) as writer:
        writer.write_table(places)
    return seals.seal(sink.getvalue())


def test_places_are_checked_once_by_the_processes_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    path, sealed = tmp_path / "train.arrow", sealed_places("a", "b")
    path.write_bytes(sealed)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def flip_on_disk() -> None:
        with path.open("r+b") as file:  # the disk flips a bit, and its time of writing stays
            file.seek(len(sealed) // 2)
            file.write(bytes([sealed[len(sealed) // 2] ^ 1]))
        os.utime(path, ns=times)

    source = "from unclip.data import Places; import sys; print(len(Places.open(sys.argv[1:])))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(path)],
            env={**os.environ, "TMPDIR": str(tmp_path / "local")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [rank.communicate()[0] for rank in ranks] == ["2\n", "2\n"]
    [note] = (tmp_path / "local").rglob("*.checked")
    flip_on_disk()
    assert len(Places.open([str(path)])) == 2, "a rank that starts minutes later does not pay for it again"
    os.utime(note, (0, 0))
    with pytest.raises(DamagedError, match=r"train\.arrow"):
        Places.open([str(path)])
    path.write_bytes(sealed_places("a", "b", "c"))
    assert len(Places.open([str(path)])) == 3
    assert len([*(tmp_path / "local").rglob("*.checked")]) == 1, "old notes are deleted"


def test_copies_of_places_wait_for_no_other_and_are_deleted_when_long_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.arrow").write_bytes(sealed_places(name))
    uris = [f"file://{tmp_path}/{name}.arrow" for name in ("a", "b")]
    real_read, opened = files.read, []

    def read(uri: str) -> bytes:
        if uri == uris[0]:  # the other is copied while this one is on its way
            opened.append(pool.submit(Places.open, [uris[1]]).result(timeout=30))
        return real_read(uri)

    monkeypatch.setattr(files, "read", read)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened.append(Places.open([uris[0]]))
    assert [places.keys(np.arange(1)) for places in opened] == [["b"], ["a"]]
    for path in (tmp_path / "local").rglob("?" * 64 + "*"):
        os.utime(path, (0, 0))
    Places.open([uris[1]])
    assert len([*(tmp_path / "local").rglob("?" * 64)]) == 1
    assert len([*(tmp_path / "local").rglob("*.lock")]) <= 2, "a lock that was used to delete goes with the next sweep"
    assert opened[1].keys(np.arange(1)) == ["a"], "a copy that is mapped stays readable"


def test_f130_a_damaged_copy_of_places_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    path, sealed = tmp_path / "train.arrow", sealed_places("a", "b")
    path.write_bytes(sealed)
    uri = f"file://{path}"
    assert len(Places.open([uri])) == 2
    [copy] = (tmp_path / "local").rglob("?" * 64)
    copy.write_bytes(sealed[:-40] + bytes(40))
    os.utime(copy, (0, 0))
    assert len(Places.open([uri])) == 2 and copy.read_bytes() == sealed
    copy.unlink()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(sealed[:100] + bytes([sealed[100] ^ 1]) + sealed[101:])
    os.utime(path, ns=times)
    with pytest.raises(DamagedError, match=r"train\.arrow"):
        Places.open([uri])
    assert not copy.exists(), "damaged bytes are not kept"
    path.write_bytes(sealed)
    os.utime(path, ns=times)
    assert len(Places.open([uri])) == 2
