"""Images of one's own: a folder with captions beside them, an `imagefolder`, and lists of paths."""

import dataclasses
import functools
import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks import ranges
from tasks.lanes import sites
from tasks.lineage.takedown import parse, parse_file
from tasks.stage import Artifact, Call, Failure, Pinning, Run, execute
from tasks.stages.download import DownloadConfig, fetch_pairs
from tasks.stages.ingest import IngestConfig, find_local_root, ingest
from tasks.store import Store
from tasks.tombstones import gather, refuse
from tasks.tracking import Tracker
from unclip.errors import InputError


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
    expected = [
        ("B.JPG", "", "no_caption"), ("a.jpg", "a cat", None), ("a.jpg", "a red cat", None), ("c%20d.png", "a dog", None),
        (f"file://{tmp_path}/out.jpg", "x", "blocked_path"), ("gone.jpg", "x", "no_file"), ("none.jpeg", "", "no_caption"),
        ("sub/deep/f.gif", "", "no_caption"), ("sub/e.webp", "a bird", None),
    ]  # fmt: skip
    assert named(ingested(tmp_path / "storage", urls=str(photos)), photos) == sorted(expected)
    if kind == "csv":
        path.write_text("file_name,about\na.jpg,a red cat\n")
        with pytest.raises(InputError, match="no column 'text'"):
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
    assert pinned(storage, **listed).digest != before.digest


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


def test_f103_folders_of_lists_stay_lists_and_images_need_captions(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images without captions.*a\.txt beside it"):
        ingested(tmp_path / "storage", urls=str(photos))
    (photos / "list.csv").write_text("url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert find_local_root(IngestConfig(str(photos))) is None
    assert [row["url"] for row in ingested(tmp_path / "storage", urls=str(photos))] == ["http://a.example/1.jpg"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "metadata.csv").write_text("url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert len(ingested(tmp_path / "storage", urls=f"{tmp_path}/lists")) == 1
