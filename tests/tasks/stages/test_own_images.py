"""Images of one's own: a folder with captions beside them, an `imagefolder`, and lists of paths."""

import dataclasses
import functools
import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import LocalFileSystem

from tasks import image_folders, ranges
from tasks.lanes import sites
from tasks.lineage.takedown import parse, parse_file
from tasks.stage import Artifact, Call, Failure, Pinning, Run, execute
from tasks.stages.download import DownloadConfig, fetch_pairs
from tasks.stages.ingest import IngestConfig, image_folder, ingest
from tasks.store import Store
from tasks.tombstones import gather, refuse
from tasks.tracking import Tracker
from tasks.untrusted import local_files
from unclip.errors import InputError

stage_module = sys.modules[IngestConfig.__module__]  # `tasks.stages.ingest` as an attribute is the stage


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(path)


def pinned(storage: Path, **settings: Any) -> IngestConfig:
    assert ingest.pin is not None
    found = ingest.pin(IngestConfig(**settings), Pinning(Store(str(storage)), None))
    assert isinstance(found, IngestConfig)
    return found


def run_ingest(storage: Path, **settings: Any) -> Artifact | Failure:
    config = pinned(storage, **settings)
    return execute(Call(ingest, config), Run("r1", "test", str(storage), Tracker("", ""), "0"), [])


def ingested(storage: Path, **settings: Any) -> list[dict[str, Any]]:
    artifact = run_ingest(storage, **settings)
    assert isinstance(artifact, Artifact), artifact
    rows = artifact.facts["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    found: list[dict[str, Any]] = ranges.read_all(artifact.uri).to_pylist()
    return sorted(found, key=lambda row: row["position"])


def named(rows: list[dict[str, Any]], root: Path) -> list[tuple[str, str, str | None]]:
    return sorted((row["url"].removeprefix(f"file://{root}/"), row["caption"], row["reason"]) for row in rows)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.jpg", "B.JPG", "c d.png", "sub/e.webp", "sub/deep/f.gif", "none.jpeg")):
        draw(tmp_path / "photos" / name, number)
    return tmp_path / "photos"


def test_f103_captions_lie_beside_the_images(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("a red\n cat\n")
    (photos / "B.json").write_text('{"caption": ["one cat", "two cats"], "width": NaN}', "utf-8-sig")
    (photos / "c d.TXT").write_text("a blue dog", "utf-16")
    (photos / "sub" / "e.json").write_text('{"text": "a green bird"}')
    (photos / "sub" / "deep" / "f.caption").write_text("一只猫")
    (photos / "readme.txt").write_text("not a caption")
    (photos / "._a.jpg").write_bytes(b"hidden")
    (photos / "none.json").write_text("{broken")
    expected = [
        ("B.JPG", "one cat", None), ("B.JPG", "two cats", None), ("a.jpg", "a red cat", None),
        ("c%20d.png", "a blue dog", None), ("none.jpeg", "", "no_caption"), ("sub/deep/f.gif", "一只猫", None),
        ("sub/e.webp", "a green bird", None),
    ]  # fmt: skip
    for urls in (str(photos), f"{photos}/", f"file://{photos}"):
        assert named(ingested(tmp_path / "storage", urls=urls), photos) == expected


def test_f103_a_file_without_a_caption_hides_none(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("\n")
    (photos / "a.json").write_text('{"caption": " ", "text": ["", "a cat"]}')
    (photos / "B.txt").write_bytes(b"")
    (photos / "B.caption").write_text("\u3000\n", "utf-8")
    (photos / "B.json").write_text('"a dog"')
    (photos / "c d.caption").write_text(" ")
    found = named(ingested(tmp_path / "storage", urls=str(photos)), photos)
    assert found[:3] == [("B.JPG", "a dog", None), ("a.jpg", "a cat", None), ("c%20d.png", "", "no_caption")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_f103_metadata_files_name_the_images_below_their_folder(photos: Path, tmp_path: Path, kind: str) -> None:
    rows = [
        ("a.jpg", "a red cat"),
        ("sub/e.webp", "a bird"),
        ("a.jpg", "a cat"),
        ("gone.jpg", "x"),
        ("../out.jpg", "x"),
    ]
    draw(tmp_path / "out.jpg", 9)
    path = photos / f"metadata.{kind}"
    if kind == "csv":
        path.write_text("file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
    else:
        pq.write_table(pa.table({"file_name": [name for name, _ in rows], "text": [text for _, text in rows]}), path)
    (photos / "c d.txt").write_text("a dog")
    assert image_folders.survey(str(photos)).metadata == image_folders.metadata_files(str(photos)) == [str(path)]
    expected = [
        ("B.JPG", "", "no_caption"), ("a.jpg", "a cat", None), ("a.jpg", "a red cat", None), ("c%20d.png", "a dog", None),
        (f"file://{tmp_path}/out.jpg", "x", "blocked_path"), ("gone.jpg", "x", "no_file"), ("none.jpeg", "", "no_caption"),
        ("sub/deep/f.gif", "", "no_caption"), ("sub/e.webp", "a bird", None),
    ]  # fmt: skip
    assert named(ingested(tmp_path / "storage", urls=str(photos)), photos) == sorted(expected)
    if kind == "csv":
        path.write_text("file_name,about\na.jpg,a red cat\n")
        with pytest.raises(
            InputError, match=r"no column 'caption' or 'text' with the captions.*--set ingest.caption_column"
        ):
            ingested(tmp_path / "storage", urls=str(photos))
        rows_found = ingested(tmp_path / "storage", urls=str(photos), caption_column="about")
        assert ("a.jpg", "a red cat", None) in named(rows_found, photos)


def test_f103_lists_name_files_below_a_root_in_any_spelling(photos: Path, tmp_path: Path) -> None:
    spelled = [f"{photos}/a.jpg", f"file://{photos}/a.jpg", "a.jpg", "./sub/../a.jpg", f"{photos}/c d.png", "c%20d.png"]
    spelled += ["/etc/hosts", "http://a.example/1.jpg", "../photos2/x.jpg", "link.jpg", "s3://bucket/a.jpg"]
    (photos / "link.jpg").symlink_to("/etc/hosts")
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{text},a red cat\n" for text in spelled))
    rows = ingested(tmp_path / "storage", urls=f"{tmp_path}/list.csv", local_root=str(photos))
    reasons = (
        [None]
        + ["duplicate_row"] * 3
        + [None, "no_file"]
        + ["blocked_path", None, "blocked_path", "blocked_path", "bad_url"]
    )
    assert [row["reason"] for row in rows] == reasons
    assert {row["url"] for row in rows[:4]} == {f"file://{photos}/a.jpg"}
    without = ingested(tmp_path / "storage", urls=f"{tmp_path}/list.csv")
    assert [row["reason"] for row in without] == ["bad_url"] * 7 + [None] + ["bad_url"] * 3
    with pytest.raises(InputError, match=r"local_root: .*none is not a folder"):
        ingested(tmp_path / "storage", urls=f"{tmp_path}/list.csv", local_root=f"{tmp_path}/none")


def test_f103_the_same_image_is_the_same_row_of_the_images_table_whichever_way_it_came(photos: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(photos))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    config = DownloadConfig(image_size=8, allow_hosts=(address,), local_root=str(photos))
    names = ["a.jpg", "c%20d.png", "sub/e.webp", "sub/deep/f.gif"]
    (photos / "damaged.jpg").write_bytes(b"\xff\xd8no image")
    (photos / "link.jpg").symlink_to("/etc/hosts")
    try:
        urls = [
            f"{base}/{name}" for base in (f"http://{address}", f"file://{photos}") for name in [*names, "damaged.jpg"]
        ]
        urls += [f"file://{photos}/link.jpg", f"file://{photos}/none.jpg", "file:///etc/hosts"]
        pairs = [{"key": f"{number:032x}", "url": url, "caption": "a cat"} for number, url in enumerate(urls)]
        table = fetch_pairs(pairs, config)
    finally:
        server.shutdown()
        server.server_close()
    found = table.drop_columns(["key", "url"]).to_pylist()
    assert (
        found[:5] == found[5:10]
        and [row["status"] for row in found[:4]] == ["ok"] * 4
        and found[4]["status"] == "failed"
    )
    assert table["reason"].to_pylist()[10:] == ["blocked_path", "no_file", "blocked_path"]
    refused = fetch_pairs(pairs[5:6], dataclasses.replace(config, local_root=None))
    assert refused["reason"].to_pylist() == ["blocked_path"]
    assert sites(pa.chunked_array([urls])).to_pylist()[5:] == [None] * 8  # no politeness among one's own files


def test_f103_a_refresh_finds_changed_files_by_size_and_time_and_then_by_hash(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("a red cat")
    (photos / "B.txt").write_text("a red dog")
    storage = tmp_path / "storage"
    before = pinned(storage, urls=str(photos))
    first = ingested(storage, urls=str(photos))
    assert pinned(storage, urls=str(photos)) == before
    os.utime(photos / "a.jpg", (1, 1))  # another time, the same bytes
    assert pinned(storage, urls=str(photos)).digest != before.digest
    assert ingested(storage, urls=str(photos)) == first
    draw(photos / "a.jpg", 77)
    second = ingested(storage, urls=str(photos))
    keys = [{row["url"]: row["key"] for row in rows} for rows in (first, second)]
    changed = {url for url in keys[0] if keys[0][url] != keys[1][url]}
    assert changed == {f"file://{photos}/a.jpg"}
    (photos / "B.txt").write_text("a green dog")  # a caption, not an image
    assert {row["caption"] for row in ingested(storage, urls=str(photos))} == {"a red cat", "a green dog", ""}
    (tmp_path / "list.csv").write_text("url,caption\na.jpg,a red cat\n")
    listed = {"urls": f"{tmp_path}/list.csv", "local_root": str(photos)}
    before = pinned(storage, **listed)
    draw(photos / "a.jpg", 78)
    assert pinned(storage, **listed).local_digest != before.local_digest


@pytest.mark.parametrize("is_listed", [False, True])
def test_f103_slow_file_systems_are_asked_in_many_threads_and_fast_ones_in_few(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_listed: bool
) -> None:
    for number in range(60):
        (photos / "sub" / f"{number}.jpg").write_bytes(b"x" * number)
    (photos / "a.txt").write_text("a red cat")
    settings = {"urls": str(photos)}
    if is_listed:
        paths = [path.relative_to(photos) for path in photos.rglob("*.*")]
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{path},a cat\n" for path in paths))
        settings = {"urls": f"{tmp_path}/list.csv", "local_root": str(photos)}
    expected, threads, real = pinned(tmp_path / "storage", **settings), set[str](), local_files._state
    monkeypatch.setattr(local_files, "_STATES_AT_ONCE", 4)
    for seconds in (0.0, 0.01):
        monkeypatch.setattr(local_files, "_SECONDS_PER_THREAD", 1.0 if seconds == 0 else 0.001)

        def state(path: str, seconds: float = seconds) -> str:
            threads.add(threading.current_thread().name)
            time.sleep(seconds)
            return real(path)

        threads.clear()
        monkeypatch.setattr(local_files, "_state", state)
        assert pinned(tmp_path / "storage", **settings) == expected
        assert len(threads) == 2 if seconds == 0 else len(threads) > 4, "one measures, the others ask"


def test_f103_files_are_taken_down_by_path(photos: Path, tmp_path: Path) -> None:
    (photos / "c d.txt").write_text("a red cat")
    (tmp_path / "list.txt").write_text(f"{photos}/a.jpg\nfile://{photos}/c%20d.png\nexample.com\n")
    tombstones = [parse("url", f"{photos}/c d.png"), *parse_file(f"{tmp_path}/list.txt")]
    assert [tombstone.kind for tombstone in tombstones] == ["url", "url", "url", "domain"]
    assert tombstones[0] == tombstones[2]
    artifact = run_ingest(tmp_path / "storage", urls=str(photos))
    assert isinstance(artifact, Artifact)
    refused = refuse(ranges.read_all(artifact.uri), gather(tombstones))
    assert refused["reason"].to_pylist().count("taken_down") == 2 and "c%20d" not in str(refused["url"].to_pylist())
    with pytest.raises(InputError, match="or the path of a local file"):
        parse("url", "photos/a.jpg")
    with pytest.raises(InputError, match="or the path of a local file"):
        parse("url", "file://[x/a.jpg")


def test_f103_folders_of_lists_stay_lists_and_images_need_captions(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images without captions.*a\.txt beside it"):
        ingested(tmp_path / "storage", urls=str(photos))
    (photos / "list.csv").write_text("url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert image_folder(str(photos)) is None
    assert [row["url"] for row in ingested(tmp_path / "storage", urls=str(photos))] == ["http://a.example/1.jpg"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "metadata.csv").write_text("url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert len(ingested(tmp_path / "storage", urls=f"{tmp_path}/lists")) == 1


def test_f98_damaged_rows_of_metadata_fail_and_a_list_of_captions_is_several(photos: Path, tmp_path: Path) -> None:
    lines = ['{"file_name": "a.jpg", "text": ["one cat", "two cats"]}', '{"file_name": "B.JPG", "text": {"en": "x"}}']
    (photos / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "c d.png", "text": 7}', "[1]"]))
    (photos / "sub" / "metadata.csv").write_text('file_name,text\ne.webp,a dog, running\ndeep/f.gif,"a "bird", red"\n')
    rows = named(ingested(tmp_path / "storage", urls=str(photos)), photos)
    assert [(url, caption) for url, caption, reason in rows if reason is None] == [
        ("a.jpg", "one cat"), ("a.jpg", "two cats"), ("c%20d.png", "7"),
    ]  # fmt: skip
    assert sorted((url, reason) for url, _, reason in rows if reason) == [
        ("", "bad_row"), ("B.JPG", "bad_row"), ("none.jpeg", "no_caption"), ("sub/deep/f.gif", "bad_quotes"),
        ("sub/e.webp", "bad_row"),
    ]  # fmt: skip


def test_f98_metadata_without_captions_is_no_damage_and_several_a_line_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    several = '{"file_name": "a.jpg", "text": ["one", "two", "three"]}'
    path.write_text(f'{several}\n\n{{"file_name": "b.jpg", "text": []}}\n')
    config = IngestConfig(str(path), url_column="file_name", caption_column="text")

    def read(**facts: Any) -> tuple[list[tuple[str, str, str | None]], dict[str, int]]:
        counted = stage_module.LineCounts()
        source = stage_module._Source(LocalFileSystem(), str(path), str(path), path.stat().st_size, **facts)
        found = pa.concat_tables(stage_module._read_source(source, config, counted)).to_pylist()
        return [(row["url"], row["caption"], row["reason"]) for row in found], counted

    expected = [("a.jpg", "one", None), ("a.jpg", "two", None), ("a.jpg", "three", None), ("b.jpg", "", None)]
    assert read(has_lists=True) == (expected, {"in": 3, "blank": 1})
    rows, _ = read(root=str(tmp_path))  # where a file lies does not tell what it holds
    assert [reason for _, _, reason in rows] == ["bad_row", "bad_row"]


def test_f103_a_list_may_hold_texts_that_are_no_urls(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\nfile://[x/a.jpg,x\nfile://\u2100/x,x\na.jpg,a red cat\n")
    rows = ingested(tmp_path / "storage", urls=f"{tmp_path}/list.csv", local_root=str(photos))
    assert [row["reason"] for row in rows] == ["bad_url", "bad_url", None]


def test_f103_paths_of_any_bytes_and_length_are_rows(photos: Path, tmp_path: Path) -> None:
    folder = photos / ("\u732b" * 80) / ("\u72ac" * 80) / ("\u9ce5" * 80)
    draw(folder / "a.jpg", 1)
    (folder / "a.txt").write_text("a red cat")
    raw = os.fsdecode(b"\xff\xe4")
    draw(photos / raw / "b.jpg", 2)
    (photos / raw / "b.txt").write_text("a dog")
    long = Path(raw * 60)  # too long for the system as a whole, but each folder can be entered
    here = os.open(photos, os.O_RDONLY)
    for _ in range(40):
        os.mkdir(long, dir_fd=here)
        inner = os.open(long, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    with pytest.raises(InputError, match=r"cannot be listed.*File name too long.*move it elsewhere"):
        pinned(tmp_path / "storage", urls=str(photos))
    (photos / long).rename(tmp_path / "away")
    kept = [row["url"] for row in ingested(tmp_path / "storage", urls=str(photos)) if row["status"] == "kept"]
    assert len(kept) == 2 and f"file://{photos}/%FF%E4/b.jpg" in kept


def test_f103_metadata_anywhere_describes_images_of_earlier_folders(photos: Path, tmp_path: Path) -> None:
    (photos / "sub" / "metadata.csv").write_text("file_name,text\n../a.jpg,a red cat\n../c d.png,a dog\n")
    (photos / "c d.txt").write_text("a blue dog")
    (photos / "B.txt").touch()
    rows = named(ingested(tmp_path / "storage", urls=str(photos)), photos)
    assert [row for row in rows if row[2] is None] == [
        ("a.jpg", "a red cat", None), ("c%20d.png", "a blue dog", None), ("c%20d.png", "a dog", None),
    ]  # fmt: skip
    assert [url for url, _, reason in rows if reason == "no_caption"] == [
        "B.JPG", "none.jpeg", "sub/deep/f.gif", "sub/e.webp",
    ]  # fmt: skip


def test_f103_every_file_with_a_caption_changes_the_digest(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("a red cat")
    names = ["B.JPG.txt", "B.txt", "B.TXT", "B.caption", "c d.png.json", "sub/e.CAPTION", "metadata.csv", "new.png"]
    seen = [pinned(tmp_path / "storage", urls=str(photos)).digest]
    for name in names:
        (photos / name).write_text("file_name,text\na.jpg,a cat\n")
        seen.append(pinned(tmp_path / "storage", urls=str(photos)).digest)
        (photos / name).write_text("file_name,text\na.jpg,a dog, longer\n")
        seen.append(pinned(tmp_path / "storage", urls=str(photos)).digest)
    assert len(set(seen)) == len(seen)
    (photos / "readme.txt").write_text("not a caption")
    assert pinned(tmp_path / "storage", urls=str(photos)).digest == seen[-1]


def test_f104_captions_that_lie_elsewhere_or_cannot_be_read_are_reasons(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    (photos / "a.txt").symlink_to(tmp_path / "secret.txt")
    (photos / "B.txt").write_text("x" * (2 << 20))
    os.mkfifo(photos / "c d.txt")
    (photos / "sub" / "e.txt").write_text("a bird")
    (photos / "none.txt").symlink_to("sub/e.txt")
    assert named(ingested(tmp_path / "storage", urls=str(photos)), photos) == [
        ("B.JPG", "", "too_large"), ("a.jpg", "", "blocked_path"), ("c%20d.png", "", "no_file"),
        ("none.jpeg", "a bird", None), ("sub/deep/f.gif", "", "no_caption"), ("sub/e.webp", "a bird", None),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_f104_metadata_that_lies_elsewhere_or_is_a_pipe_is_not_read(photos: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.csv").write_text("file_name,text\na.jpg,a secret\n")
    (photos / name).symlink_to(tmp_path / "secret.csv")
    with pytest.raises(InputError, match=rf"{name} cannot be read: the local file, or what it links to, is not below"):
        ingested(tmp_path / "storage", urls=str(photos))
    (photos / name).unlink()
    os.mkfifo(photos / name)
    with pytest.raises(InputError, match=rf"{name} cannot be read: the local file does not exist or cannot be read"):
        ingested(tmp_path / "storage", urls=str(photos))
    (photos / name).unlink()
    (photos / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        ingested(tmp_path / "storage", urls=str(photos))


def test_f103_a_folder_that_cannot_be_listed_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("a red cat")
    (photos / "lost+found").mkdir(mode=0)
    deep = photos
    with pytest.raises(InputError, match=r"sub/deep cannot be listed.*Make it readable, or move it elsewhere"):
        for folder in image_folders.walk(str(photos)):
            if folder.path == str(photos / "sub"):  # it vanishes between its name and its content
                (photos / "sub" / "deep").rename(tmp_path / "deep")
    (tmp_path / "deep").rename(deep / "sub" / "deep")
    assert len(ingested(tmp_path / "storage", urls=str(photos))) == 6


def test_f103_the_folder_that_img2dataset_writes_is_a_folder_of_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard, name in (("00000", "000000000"), ("00000", "000000002"), ("00001", "000010001")):
        draw(out / shard / f"{name}.jpg", int(name))
        (out / shard / f"{name}.txt").write_text(f"caption {name}")
        (out / shard / f"{name}.json").write_text(
            json.dumps({"caption": "other", "url": "http://a.example", "key": name})
        )
    for shard in ("00000", "00001"):
        pq.write_table(
            pa.table({"url": ["http://a.example/1"], "caption": ["x"], "key": ["0"]}), out / f"{shard}.parquet"
        )
        (out / f"{shard}_stats.json").write_text("{}")
    assert image_folder(str(out)) == str(out) and image_folders.survey(str(out)).num_left_out == 0
    assert [row["caption"] for row in ingested(tmp_path / "storage", urls=str(out))] == [
        "caption 000000000", "caption 000000002", "caption 000010001",
    ]  # fmt: skip
    (out / "00002.parquet").write_bytes((out / "00000.parquet").read_bytes())  # without a folder, it is a list
    assert image_folder(str(out)) is None


def test_f101_files_of_a_folder_of_images_that_are_not_read_are_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "a.txt").write_text("a red cat")
    pinned(tmp_path / "storage", urls=str(photos))
    assert "left out" not in caplog.text
    for name in ("a.bmp", "readme.txt", "sub/b.tif", "sub/c.heic", "sub/d.svg", "sub/e.mp4", ".hidden.bmp"):
        (photos / name).write_bytes(b"x")
    pinned(tmp_path / "storage", urls=str(photos))
    assert (
        "left out a.bmp, readme.txt, sub/b.tif, sub/c.heic, sub/d.svg and 1 more, which are no captions" in caplog.text
    )


def test_f103_missing_columns_of_metadata_are_named_with_what_helps(photos: Path, tmp_path: Path) -> None:
    messages = {
        "file,text": r"metadata.csv has no column 'file_name' with the images.*Did you mean 'file'\?$",
        "file_name,txt": r"no column 'caption' or 'text' with the captions. Did you mean 'txt'\?.*ingest.caption_column\.$",
    }
    for header, message in messages.items():
        (photos / "metadata.csv").write_text(f"{header}\na.jpg,a cat\n")
        with pytest.raises(InputError, match=message):
            pinned(tmp_path / "storage", urls=str(photos))
        (photos / "metadata.csv").unlink()
    (photos / "metadata.csv").write_text("file_name,text\na.jpg,a cat\n")
    with pytest.raises(InputError, match=r"no column 'about' with the captions"):
        pinned(tmp_path / "storage", urls=str(photos), caption_column="about")


def test_f103_a_list_is_told_from_a_folder_of_images_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow file system the answer takes long."""
    asked: list[str] = []
    real = image_folders.has_images
    monkeypatch.setattr(image_folders, "has_images", lambda root: asked.append(root) or real(root))
    (photos / "a.txt").write_text("a red cat")
    config = pinned(tmp_path / "storage", urls=str(photos))
    assert asked == [str(photos)]
    artifact = execute(Call(ingest, config), Run("r1", "test", str(tmp_path / "storage"), Tracker("", ""), "0"), [])
    assert isinstance(artifact, Artifact) and asked == [str(photos)] * 2, "once more in the process of the stage"


def test_f103_tasks_hash_few_images_each(photos: Path, tmp_path: Path) -> None:
    """Rows that name no files are no reason to divide a list."""
    urls = ["a.jpg", *[f"http://a.example/{number}" for number in range(9000)], *["c d.png"] * 5000, "B.JPG"]
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{url},a {n}\n" for n, url in enumerate(urls)))
    config = pinned(tmp_path / "storage", urls=f"{tmp_path}/list.csv", local_root=str(photos))
    chunks, _, num_rows, _ = stage_module._read_list(config, stage_module._sources(config.urls))
    files = [sum("://" not in url for url in chunk.listed["url"].to_pylist()) for chunk in chunks]
    assert files == [2048, 2048, 906] and num_rows == len(urls)
    assert [chunk.first_row for chunk in chunks] == np.cumsum([0, *(chunk.num_rows for chunk in chunks[:-1])]).tolist()
    rows = ingested(tmp_path / "storage", urls=f"{tmp_path}/list.csv", local_root=str(photos))
    assert [row["caption"] for row in rows] == [f"a {n}" for n in range(len(urls))]
    assert {row["reason"] for row in rows} == {None}


@pytest.mark.parametrize(("num_files", "num_pieces"), [(10**5, 49), (10**6, 489 * 8), (10**7, 977 * 128)])
def test_the_pieces_of_local_files_do_not_grow_with_the_square_of_their_number(num_files: int, num_pieces: int) -> None:
    chunks = range(-(-num_files // stage_module._IMAGES_PER_TASK))
    groups = stage_module._grouped(chunks)
    assert [chunk for group in groups for chunk in group] == [*chunks]
    assert len(groups) * ranges.num_ranges(num_files) == num_pieces
    assert len(stage_module._grouped(range(1 << 20))) * ranges.MAX_RANGES == 1 << 20, "however many there are"
    assert stage_module._grouped([]) == []


@pytest.mark.usefixtures("cluster")
def test_f103_captions_of_many_images_are_read_in_tasks(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "c d", "sub/e"):
        (photos / f"{name}.json").write_text(json.dumps([f"{name} one", f"{name} two"]))
    (photos / "sub" / "metadata.csv").write_text("file_name,text\n../B.JPG,a dog\n../a.jpg,a cat\n")
    expected = ingested(tmp_path / "one", urls=str(photos))
    monkeypatch.setattr(stage_module, "_IMAGES_PER_TASK", 2)
    monkeypatch.setattr(stage_module, "SMALL_BYTES", -1)
    monkeypatch.setattr(stage_module, "_MAX_SPLITS", 2)
    found = ingested(tmp_path / "two", urls=str(photos))
    assert [row["position"] for row in found] == list(range(10))
    assert named(found, photos) == named(expected, photos)
