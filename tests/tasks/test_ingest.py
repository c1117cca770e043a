import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import tables
from tasks.ingest import IngestConfig, check_source, clean, ingest, normalise_caption, normalise_url
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.tracking import Tracker
from unclip.errors import ConfigError, InputError

ROWS = [
    ("http://A.example/1.jpg#top", "a  red\tcircle"),
    ("http://a.example/1.jpg", "a red circle"),
    ("https://b.example/2.jpg?x=1,2", 'a "blue" square, large'),
    ("ftp://b.example/3.jpg", "a star"),
    (None, "a cross"),
    ("http://c.example/4.jpg", None),
]


def run_ingest(storage: Path, **settings: Any) -> Artifact | Failure:
    run = Run("r1", "test", str(storage / "storage"), Tracker("", ""), "0")
    return execute(Call(ingest, IngestConfig(**settings)), run, [])


def ingested(storage: Path, **settings: Any) -> Artifact:
    artifact = run_ingest(storage, **settings)
    assert isinstance(artifact, Artifact), artifact
    rows = artifact.facts["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    return artifact


def write_list(path: Path, pairs: list[tuple[Any, Any]] = ROWS, names: tuple[str, str] = ("url", "caption")) -> str:
    columns = {
        name: pa.array(values, pa.string()) for name, values in zip(names, zip(*pairs, strict=True), strict=True)
    }
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": pa.array(range(len(pairs)))} | columns), path)
    elif path.suffix == ".jsonl":
        lines = ({"id": 7, **dict(zip(names, pair, strict=True))} for pair in pairs)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *pairs])
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    artifact = ingested(tmp_path, urls=write_list(tmp_path / f"list.{suffix}"))
    assert artifact.facts["rows"] == {"in": 6, "kept": 2, "dropped": 2, "failed": 2}
    assert artifact.facts["reasons"] == {"bad_url": 1, "duplicate_row": 1, "no_caption": 1, "no_url": 1}
    table = tables.read_file(artifact.uri)
    by_position = {row["position"]: row for row in table.to_pylist()}
    assert by_position[0]["url"] == by_position[1]["url"] == "http://a.example/1.jpg"
    assert by_position[0]["caption"] == "a red circle" and by_position[0]["key"] == by_position[1]["key"]
    assert (by_position[0]["status"], by_position[0]["reason"]) == ("kept", None)
    assert by_position[1]["reason"] == "duplicate_row"
    assert by_position[2]["caption"] == 'a "blue" square, large'
    keys = table["key"].to_pylist()
    assert keys == sorted(keys) and all(len(key) == 32 for key in keys)
    assert artifact.digest == ingested(tmp_path, urls=write_list(tmp_path / "again.parquet", ROWS[::-1])).digest


def test_a_folder_of_files_is_one_list(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    write_list(folder / "b.csv", ROWS[:1])
    write_list(folder / "a.parquet", ROWS[2:])
    (folder / "notes.txt").write_text("not a list")
    artifact = ingested(tmp_path, urls=str(folder))
    assert artifact.facts["rows"]["in"] == 5
    assert {row["position"]: row["url"] for row in tables.read_file(artifact.uri).to_pylist()}[
        4
    ] == "http://a.example/1.jpg"


def test_other_column_names(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv", names=("URL", "TEXT"))
    assert ingested(tmp_path, urls=path, url_column="URL", caption_column="TEXT").facts["rows"]["kept"] == 2


def extension_table() -> pa.Table:
    return pa.table(
        {"url": ["http://a"], "caption": ["a b"], "id": pa.array([b"0" * 16], pa.binary(16)).cast(pa.uuid())}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (pa.table({"URL": ["http://a"], "caption": ["b"]}), "no column 'url' .ingest.url_column.. Did you mean 'URL'"),
        (
            pa.table({"url": ["http://a"], "captions": ["b"]}),
            "no column 'caption' .ingest.caption_column.. Did you mean 'captions'",
        ),
        (pa.table({"url": [1], "caption": ["b"]}), "column 'url'.*got int64, expected text"),
        (pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), "has no rows"),
        (extension_table(), "column 'id'.*extension type"),
        (b"PAR1 no parquet at all PAR1", "list.parquet cannot be read"),
        (b"", "list.parquet cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_before_anything_starts(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "list.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(content, path)
    with pytest.raises(InputError, match=message):
        check_source(IngestConfig(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"", "cannot be read"),
        ("list.csv", b"url,caption\n", "has no rows"),
        ("list.csv", b"link,caption\nhttp://a,b c\n", "no column 'url'"),
        ("list.csv", b"url,caption\nhttp://a,b,c,d\n", "cannot be read"),
        ("list.jsonl", b"{not json}\n", "cannot be read"),
        ("list.txt", b"http://a\n", "is no .parquet, .csv, .tsv, .jsonl file"),
    ],
)
def test_text_lists_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_source(IngestConfig(str(tmp_path / name)))


def test_a_list_without_one_usable_row_says_why(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv", [("ftp://a", "b"), ("nonsense", "c"), ("http://a", "")])
    failure = run_ingest(tmp_path, urls=path)
    assert isinstance(failure, Failure)
    assert "none of the 3 rows" in failure.message and "bad_url 2, no_caption 1" in failure.message


def test_a_list_that_changes_after_the_check_is_refused(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv")
    digest = check_source(IngestConfig(path))
    assert digest == check_source(IngestConfig(path))
    assert isinstance(run_ingest(tmp_path, urls=path, digest=digest), Artifact)
    write_list(tmp_path / "list.csv", ROWS[:2])
    assert check_source(IngestConfig(path)) != digest
    failure = run_ingest(tmp_path, urls=path, digest=digest, caption_column="caption", url_column="url")
    assert isinstance(failure, Artifact), "a committed result needs no list"
    (tmp_path / "elsewhere").mkdir()
    failure = run_ingest(tmp_path / "elsewhere", urls=path, digest=digest)
    assert isinstance(failure, Failure) and "changed since this run was planned" in failure.message


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (" HTTP://Example.COM/A.jpg#x ", "http://example.com/A.jpg"),
        ("https://example.com", "https://example.com/"),
        ("http://example.com:8080/a?b=c#d", "http://example.com:8080/a?b=c"),
        ("http://[::1]/a", "http://[::1]/a"),
        ("file:///etc/passwd", None),
        ("data:image/png;base64,aaaa", None),
        ("//example.com/a", None),
        ("http:///a", None),
        ("http://user:pw@example.com/", None),
        ("http://example.com:99999/", None),
        ("http://[::1/", None),
        ("http://example.com/" + "a" * 3000, None),
        ("", None),
    ],
)
def test_urls_are_normalised(raw: str, expected: str | None) -> None:
    assert normalise_url(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a\n\n red \t circle ", "a red circle"),
        ("cafe\u0301", "café"),
        ("a\x00b\x1b[31mred", "ab[31mred"),
        ("safe\u202egnp.exe\u2066", "safegnp.exe"),
        ("\u200e \u200f", ""),
        ("👩\u200d🎨 paints", "👩\u200d🎨 paints"),
        ("x" * 5000, "x" * 1000),
    ],
)
def test_captions_are_normalised(raw: str, expected: str) -> None:
    assert normalise_caption(raw) == expected


def test_invalid_utf8_costs_no_row() -> None:
    table = clean(pa.table({"url": pa.array([b"http://a/1"]), "caption": pa.array([b"caf\xe9 \xff red"])}))
    assert table.to_pylist()[0]["caption"] == "caf\ufffd \ufffd red"
    assert table.to_pylist()[0]["status"] == "kept"


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="urls"):
        IngestConfig("")
    with pytest.raises(ConfigError, match="caption_column"):
        IngestConfig("a.csv", caption_column="url")
