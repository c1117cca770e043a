import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import queue
import random
import re
import signal
import struct
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tasks import ranges
from tasks import rows as tally
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.stages.ingest import (
    LISTED,
    MAX_LINE_CHARACTERS,
    PAIRS,
    IngestConfig,
    check_source,
    clean,
    drop_duplicates,
    ingest,
    left_out,
    read,
)
from tasks.tombstones import Tombstones, refuse
from tasks.tracking import Tracker
from tasks.untrusted import parquet_list
from tasks.untrusted.normalise import normalise_caption, normalise_sha256, normalise_url
from tasks.untrusted.sandbox import Limits, Sandbox
from unclip import files
from unclip.errors import ConfigError, InputError

stage_module = sys.modules[IngestConfig.__module__]  # `tasks.stages.ingest` as an attribute is the stage

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
    if path.suffix == ".gz":
        plain = Path(write_list(path.with_suffix(""), pairs, names))
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif path.suffix == ".parquet":
        columns = {
            name: pa.array(values, pa.string()) for name, values in zip(names, zip(*pairs, strict=True), strict=True)
        }
        pq.write_table(pa.table({"id": pa.array(range(len(pairs)))} | columns), path)
    elif path.suffix == ".jsonl":
        lines = ({"id": 7, **dict(zip(names, pair, strict=True))} for pair in pairs)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif path.suffix == ".txt":
        path.write_text("".join("\t".join(text or "" for text in pair) + "\n" for pair in pairs))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *pairs])
    return str(path)


class ListRow(NamedTuple):
    """One row of the list; missing values are empty strings."""

    url: str
    caption: str
    sha256: str = ""
    reason: str | None = None


def rows_of(chunks: Iterable[pa.Table]) -> list[ListRow]:
    return [ListRow(**row) for chunk in chunks for row in chunk.to_pylist()]


def listed(path: Path, **settings: Any) -> list[ListRow]:
    return rows_of(read(IngestConfig(str(path), **settings)))


def pairs_of(listed_rows: Iterable[ListRow]) -> pa.Table:
    """Pairs of a whole list, sorted by key."""
    return drop_duplicates(clean(pa.Table.from_pylist([row._asdict() for row in listed_rows], LISTED)))


TEXT_SUFFIXES = ["csv", "tsv", "jsonl", "txt"]
SUFFIXES = ["parquet", *TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    artifact = ingested(tmp_path, urls=write_list(tmp_path / f"list.{suffix}"))
    assert artifact.facts["rows"] == {"in": 6, "kept": 2, "dropped": 2, "failed": 2}
    assert artifact.facts["reasons"] == {"bad_url": 1, "duplicate_row": 1, "no_caption": 1, "no_url": 1}
    table = ranges.read_all(artifact.uri)
    by_position = {row["position"]: row for row in table.to_pylist()}
    assert by_position[0]["url"] == by_position[1]["url"] == "http://a.example/1.jpg"
    assert by_position[0]["caption"] == "a red circle" and by_position[0]["key"] == by_position[1]["key"]
    assert (by_position[0]["status"], by_position[0]["reason"]) == ("kept", None)
    assert by_position[1]["reason"] == "duplicate_row"
    assert by_position[2]["caption"] == 'a "blue" square, large'
    keys = table["key"].to_pylist()
    assert keys == sorted(keys) and all(len(key) == 32 for key in keys)
    assert table["expected_sha256"].null_count == table.num_rows
    assert artifact.digest == ingested(tmp_path, urls=write_list(tmp_path / "again.parquet", ROWS[::-1])).digest


def test_a_folder_of_files_is_one_list(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    write_list(folder / "b.csv", ROWS[:1])
    write_list(folder / "a.parquet", ROWS[2:])
    (folder / "notes.txt").write_text("not a list")
    artifact = ingested(tmp_path, urls=str(folder))
    assert artifact.facts["rows"]["in"] == 5
    assert {row["position"]: row["url"] for row in ranges.read_all(artifact.uri).to_pylist()}[
        4
    ] == "http://a.example/1.jpg"


def test_a_folder_uses_text_files_only_without_other_files_and_ignores_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "._a.txt", "_log.txt", ".list.csv", "list.csv.part"):
        write_list(tmp_path / name, [(f"http://{name.strip('._')}/", "x")])
    (tmp_path / "sub.csv").mkdir()
    assert [row.url for row in listed(tmp_path)] == ["http://a.txt.gz/", "http://b.txt/"]
    write_list(tmp_path / "list.csv", ROWS[:1])
    assert [row.url for row in listed(tmp_path)] == [ROWS[0][0]]


def test_a_list_is_not_read_from_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("https://intranet.example/ a secret")
    folder = tmp_path / "lists"
    folder.mkdir()
    write_list(folder / "a.txt", ROWS[:1])
    (folder / "b.txt").symlink_to("a.txt")
    (tmp_path / "given").symlink_to("lists")
    assert len(listed(tmp_path / "given")) == 2
    (folder / "c.txt").symlink_to("../secret")
    for urls in (folder, tmp_path / "given", f"{folder}/*.txt"):
        with pytest.raises(InputError, match=r"c\.txt is a link to .*secret, outside"):
            list(read(IngestConfig(str(urls))))


def test_a_pattern_matches_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for number in (10, 2, 1):
            write_list(tmp_path / folder / f"part-{number}.csv", [(f"http://{folder}/{number}", "a")])
    (tmp_path / "x" / "part-3.csv.crc").write_text("no list")
    write_list(tmp_path / "x" / "part[1].csv", [("http://literal/", "a")])
    monkeypatch.chdir(tmp_path / "x")

    def urls(pattern: str) -> list[str]:
        return [row.url.removeprefix("http://") for row in rows_of(read(IngestConfig(pattern)))]

    assert urls(f"{tmp_path}/x/part-*.csv") == urls("part-*.csv") == ["x/1", "x/10", "x/2"]
    assert urls(f"{tmp_path}/*/part-?.csv") == ["x/1", "x/2", "y/1", "y/2"]
    assert urls("part[1].csv") == ["literal/"]
    with pytest.raises(InputError, match=r"part-9\*.csv matches no file"):
        urls("part-9*.csv")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        settings = dict.fromkeys(names, "test") | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in settings.items():
            environment.setenv(name, value)
        pafs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("lists")
        yield "s3://lists"
    server.stop()


def test_a_list_in_an_object_store(tmp_path: Path, bucket: str) -> None:
    filesystem, folder = files.locate(bucket)
    for name, pairs in (("part-0.parquet", ROWS[:2]), ("part-1.csv.gz", ROWS[2:4]), ("part-2.jsonl", ROWS[4:])):
        with filesystem.open_output_stream(f"{folder}/a/{name}", compression=None) as stream:
            stream.write(Path(write_list(tmp_path / name, pairs)).read_bytes())
    for urls in (f"{bucket}/a", f"{bucket}/a/part-*", f"{bucket}/*/part-[0-2].*?region=us-east-1"):
        config = IngestConfig(urls)
        assert [row.url for row in rows_of(read(config))] == [url or "" for url, _ in ROWS]
        assert check_source(config) == check_source(IngestConfig(str(tmp_path)))
    assert ingested(tmp_path, urls=f"{bucket}/a/part-0.parquet").facts["rows"]["kept"] == 1
    with pytest.raises(InputError, match=r"s3://lists/b\.csv does not exist"):
        check_source(IngestConfig(f"{bucket}/b.csv"))


HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("layout", "name", "content"),
    [
        ("plain", "list.csv", "url,caption\nhttp://a/1,a red circle\n"),
        ("laion", "list.csv", "SAMPLE_ID,URL,TEXT,similarity\n1,http://a/1,a red circle,0.3\n"),
        ("coyo", "list.jsonl", '{"id": 1, "url": "http://a/1", "text": "a red circle"}\n'),
        ("cc3m", "list.tsv", "a red circle\thttp://a/1\n"),
        ("cc12m", "list.tsv.gz", "http://a/1\ta red circle\n"),
        ("cc12m", "list.txt", "http://a/1\ta red circle\n"),
        ("datacomp", "list.csv", f"uid,url,text,sha256\n7,http://a/1,a red circle,{HASH}\n"),
    ],
)
def test_layouts_of_published_datasets(tmp_path: Path, layout: str, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = listed(tmp_path / name, layout=layout)
    assert rows == [ListRow("http://a/1", "a red circle", HASH if layout == "datacomp" else "")]


def test_quotes_are_plain_characters_in_a_layout_without_header(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text('http://a/1\t"half a quote\nhttp://a/2\tsay ""hi""\n')
    assert [row.caption for row in listed(tmp_path / "list.tsv", layout="cc12m")] == ['"half a quote', 'say ""hi""']
    write_list(tmp_path / "list.csv")
    with pytest.raises(InputError, match=r"cc12m is TSV without a header.*layout=plain"):
        listed(tmp_path / "list.csv", layout="cc12m")


def test_column_settings_override_the_layout(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,text,alt,md\nhttp://a/1,b,c,d\n")
    settings = {"layout": "coyo", "caption_column": "alt", "sha256_column": "md"}
    assert listed(tmp_path / "list.csv", **settings) == [ListRow("http://a/1", "c", "d")]


def test_a_matching_layout_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'url' .*Did you mean 'URL'.*layout=laion"):
        listed(Path(write_list(tmp_path / "list.csv", names=("URL", "TEXT"))))
    with pytest.raises(InputError, match=r"no column 'sha256' .ingest.sha256_column"):
        listed(Path(write_list(tmp_path / "list.txt")), layout="datacomp")


def test_an_expected_hash_is_kept_with_the_row_and_not_part_of_its_key(tmp_path: Path) -> None:
    hashes = [HASH, HASH.upper(), None, "", " ", HASH[1:], HASH + "0", "g" * 64, HASH[:-1] + "\u0663"]
    bad = [False] * 5 + [True] * 4
    urls = [f"http://a/{number}" for number in range(len(hashes))]
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": urls, "caption": ["red"] * len(urls), "hash": hashes}), path)
    artifact = ingested(tmp_path, urls=str(path), sha256_column="hash")
    by_url = {row["url"]: row for row in ranges.read_all(artifact.uri).to_pylist()}
    assert [by_url[url]["expected_sha256"] for url in urls] == [HASH, HASH] + [None] * 7
    outcomes = [(by_url[url]["status"], by_url[url]["reason"]) for url in urls]
    assert outcomes == [("failed", "bad_hash") if is_bad else ("kept", None) for is_bad in bad]
    without = ingested(tmp_path, urls=str(path))
    assert {row["key"] for row in ranges.read_all(without.uri).to_pylist()} == {row["key"] for row in by_url.values()}


@pytest.mark.parametrize("seed", range(5))
def test_f24_the_order_of_the_list_changes_nothing_but_positions(tmp_path: Path, seed: int) -> None:
    hashes = ["", HASH, HASH[::-1], "bad"]
    rows = [ListRow(f"http://a/{i % 4}", "ab"[i % 2] * (i % 3), hashes[i % 7 % 4]) for i in range(100)]
    first = pairs_of(rows).drop_columns("position")
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert pairs_of(shuffled).drop_columns("position").equals(first)
    kept = [row for row in first.to_pylist() if row["status"] == "kept"]
    assert len({row["key"] for row in kept}) == len(kept) == 8
    assert all(row["expected_sha256"] == min(HASH, HASH[::-1]) for row in kept)


def test_f24_equal_urls_are_one_row_and_are_counted() -> None:
    same = [
        "http://a.example/1.jpg",
        "HTTP://A.EXAMPLE/1.jpg",
        "http://a.example/1.jpg#top",
        " http://a.example/1.jpg ",
    ]
    other = ["http://a.example/1.JPG", "http://a.example/1.jpg?b=1&a=2", "http://a.example/1.jpg?a=2&b=1"]
    table = pairs_of([ListRow(url, "a red circle") for url in [*same, *other]])
    facts = tally.count(table)
    assert facts["rows"] == {"in": 7, "kept": 4, "dropped": 3, "failed": 0}
    assert facts["reasons"] == {"duplicate_row": 3}
    assert {row["position"] for row in table.to_pylist() if row["status"] == "kept"} == {0, 4, 5, 6}


def test_f27_a_changed_schema_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    """A column is added, missing, renamed or of a different type after the list was read once."""
    path, storage = tmp_path / "list.parquet", tmp_path / "storage"
    columns = {"url": ["http://a/1"], "caption": ["a red circle"]}
    changes: dict[str, dict[str, Any]] = {
        r"no column 'caption' .ingest.caption_column.. Did you mean 'captions'": {"url": ["u"], "captions": ["c"]},
        r"no column 'caption' .ingest.caption_column.. Valid names: url": {"url": ["u"]},
        r"column 'caption' of .*got int64, expected text. Set caption_column": {"url": ["u"], "caption": [1]},
        r"column 'caption' of .*got list.*, expected text. Set caption_column": {"url": ["u"], "caption": [["c"]]},
        r"column 'url' of .*got timestamp\[us, tz=UTC\], expected text": {
            "url": pa.array([0], pa.timestamp("us", "UTC")), "caption": ["c"],
        },
    }  # fmt: skip
    pq.write_table(pa.table(columns | {"added": [1.5]}), path)
    ingested(tmp_path, urls=str(path))
    before = sorted(storage.rglob("*.parquet"))
    for message, changed in changes.items():
        pq.write_table(pa.table(changed), path)
        failure = run_ingest(tmp_path, urls=str(path), digest=None, layout="plain", url_column="url")
        assert isinstance(failure, Failure) and re.search(message, failure.message), failure
    assert sorted(storage.rglob("*.parquet")) == before


def test_files_in_another_order_keep_the_same_keys(tmp_path: Path) -> None:
    parts = [ROWS[:2], ROWS[2:4], [*ROWS[4:], ROWS[2]]]
    digests = set()
    for number, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, part in zip("abc", order, strict=True):
            write_list(folder / f"{name}.csv", parts[part])
        digests.add(ingested(tmp_path, urls=str(folder)).digest)
    assert len(digests) == 1


def varied_rows(num_rows: int, seed: int) -> list[ListRow]:
    """Rows of which many repeat others, some are unusable and some are not ASCII."""
    randomness = random.Random(seed)
    hosts = ["a.example", "B.example", "bücher.example", "user@c.example", ""]
    captions = ["a red circle", "  a\tblue  square", "cafe\u0301", "", "\u202ea star", "x" * 1200]

    def row(number: int) -> ListRow:
        url = f"http://{randomness.choices(hosts, [8, 2, 1, 1, 1])[0]}/{number % (num_rows // 2)}.jpg"
        return ListRow(url, randomness.choice(captions), randomness.choice(["", "", HASH, HASH[::-1], "bad"]))

    return [row(number) for number in range(num_rows)]


def row_of(row: ListRow, position: int) -> dict[str, Any]:
    """Definition of a pair before duplicates are dropped, from one row of the list."""
    url, caption, sha256 = normalise_url(row.url), normalise_caption(row.caption), normalise_sha256(row.sha256)
    shown = url or re.sub(r"//[^/?#@ ]*@", "//", normalise_caption(row.url))
    key = hashlib.sha256(f"{shown}\n{caption}".encode()).hexdigest()[:32]
    outcome: tuple[str, str | None] = ("kept", None)
    if not shown:
        outcome = ("failed", "no_url")
    elif url is None:
        outcome = ("failed", "bad_url")
    elif sha256 is None and row.sha256.strip():
        outcome = ("failed", "bad_hash")
    elif not caption:
        outcome = ("dropped", "no_caption")
    return dict(zip(PAIRS.names, (position, key, shown, caption, *outcome, sha256), strict=True))


def test_f90_a_refused_url_is_stored_without_its_password() -> None:
    listed_rows = [
        ListRow(f"http://{user}@a.example/1.jpg?b=c@d", "a red circle") for user in ("me:c4n4ry", "c4n4ry", "")
    ]
    table = clean(pa.Table.from_pylist([row._asdict() for row in listed_rows], LISTED), 0)
    assert table["reason"].to_pylist() == ["bad_url"] * 3
    assert table["url"].to_pylist() == ["http://a.example/1.jpg?b=c@d"] * 3


def test_f24_rows_are_cleaned_in_chunks_as_they_are_one_by_one() -> None:
    hostile = [
        "",
        " ",
        "\u2003",
        "\0",
        "\u200b",
        "\ufffd",
        "http://[::1/",
        " HTTP://A/ ",
        "http://a:b@c/@d",
        HASH,
        f" {HASH.upper()}\n",
    ]
    listed_rows = varied_rows(2000, seed=1)
    listed_rows += [ListRow(*texts) for texts in itertools.product(hostile, hostile, hostile)]
    table = pa.Table.from_pylist([row._asdict() for row in listed_rows], LISTED)
    expected = pa.Table.from_pylist([row_of(row, 7 + number) for number, row in enumerate(listed_rows)], PAIRS)
    assert clean(table, 7).equals(expected)
    parts = [table.slice(0, 1), table.slice(1, 0), table.slice(1)]
    assert clean(pa.concat_tables(parts), 7).equals(expected)


@pytest.mark.usefixtures("cluster")
def test_the_same_rows_in_one_file_or_several_and_in_any_number_of_ranges_give_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small list is read by the stage itself, a large one by tasks, each file in several chunks."""
    listed_rows = varied_rows(3000, seed=2)
    expected = pairs_of(listed_rows).sort_by([("key", "ascending"), ("position", "ascending")])
    table = pa.Table.from_pylist([row._asdict() for row in listed_rows], LISTED)
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=700)
    (tmp_path / "parts").mkdir()
    for name, start, stop in (
        ("a.parquet", 0, 1),
        ("b.jsonl", 1, 1800),
        ("c.csv", 1800, 1801),
        ("d.parquet", 1801, 3000),
    ):
        part, path = table.slice(start, stop - start), tmp_path / "parts" / name
        if path.suffix == ".parquet":
            pq.write_table(part, path, row_group_size=500)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part.to_pylist()))
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([part.column_names, *(row.values() for row in part.to_pylist())])
    digests = set()
    for urls, count, small_bytes in (
        ("list.parquet", 1, 1 << 20), ("list.parquet", 1, 0), ("list.parquet", 4, 1 << 20), ("list.parquet", 16, 0),
        ("parts", 1, 1 << 20), ("parts", 4, 0), ("parts", 16, 0), ("parts", 4, 10_000),
    ):  # fmt: skip
        monkeypatch.setattr(stage_module, "SMALL_BYTES", small_bytes)
        monkeypatch.setattr(ranges, "ROWS_PER_RANGE", len(listed_rows) // count + 1)
        artifact = ingested(
            tmp_path / f"{urls}-{count}-{small_bytes}", urls=f"{tmp_path}/{urls}", sha256_column="sha256"
        )
        found = ranges.read_all(artifact.uri)
        assert found["key"].to_pylist() == sorted(found["key"].to_pylist())
        assert found.sort_by([("key", "ascending"), ("position", "ascending")]).equals(expected)
        assert ranges.range_count(artifact.uri) == len(ranges.range_files(artifact.uri)) == count
        lines = {"in": 1801, "header": 1, "blank": 0, "continued": 0}  # of b.jsonl and c.csv
        assert artifact.facts == tally.count(expected) | {"layers": []} | ({"lines": lines} if urls == "parts" else {})
        digests.add(artifact.digest)
    assert len(digests) == 1


@pytest.mark.usefixtures("cluster")
def test_f25_a_damaged_file_among_several_is_named_by_the_task_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "SMALL_BYTES", 0)
    (tmp_path / "lists").mkdir()
    for name in ("a.csv", "b.csv", "c.parquet"):
        write_list(tmp_path / "lists" / name)
    (tmp_path / "lists" / "b.csv").write_text('url,caption,"\nhttp://a/1,a\n')
    failure = run_ingest(tmp_path, urls=str(tmp_path / "lists"))
    assert isinstance(failure, Failure) and failure.exit_code == InputError.exit_code
    message = f"ingest.urls: {tmp_path}/lists/b.csv cannot be read: line 1: unexpected end of data. Write it"
    assert failure.message.startswith(message) and "\n" not in failure.message


def test_rows_that_were_taken_down_are_refused_whatever_their_texts_are() -> None:
    hosts = [
        "evil.org",
        "a.evil.org",
        "A.EVIL.org",
        "notevil.org",
        "evil.org:80",
        "user@evil.org",
        "good.org",
        "evil.org.",
        "",
        "[::1",
    ]
    shapes = [
        "http://{}/x",
        "https://{}",
        "ftp://{}/x",
        "//{}/x",
        "1http://{}/",
        "{}",
        "x {}",
        "http:{}/x",
        "http://{}?x",
        "http://{}#x",
    ]
    texts = list(filter(None, (shape.format(host) for shape, host in itertools.product(shapes, hosts))))
    table = pairs_of(
        ListRow(text, f"a {number}") for number, text in enumerate([*texts, "http://c.org/1", "http://c.org/2"])
    )
    tombstones = Tombstones(
        frozenset(table["key"][:1].to_pylist()), frozenset(["http://c.org/1"]), frozenset(["evil.org"])
    )

    def is_taken_down(key: str, url: str) -> bool:
        try:
            host = urllib.parse.urlsplit(url).hostname or ""
        except ValueError:  # "[::1" is no host
            host = ""
        labels = host.removesuffix(".").split(".")
        is_below = any(".".join(labels[start:]) in tombstones.domains for start in range(len(labels)))
        return key in tombstones.keys or url in tombstones.urls or is_below

    expected = [is_taken_down(*pair) for pair in zip(table["key"].to_pylist(), table["url"].to_pylist(), strict=True)]
    refused = refuse(table, tombstones)
    found = pc.equal(refused["reason"], "taken_down").fill_null(False).to_pylist()
    assert 30 < sum(expected) < 80
    for url, is_found, is_expected in zip(table["url"].to_pylist(), found, expected, strict=True):
        is_url = url.startswith(("http://", "https://"))  # of other texts, more may be refused
        assert is_found == is_expected if is_url else is_found >= is_expected, url
    for name in ("url", "caption"):
        assert [text == "" for text in refused[name].to_pylist()] == found
    assert refuse(table, Tombstones()).equals(table)


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
@pytest.mark.parametrize("block", [1, 2, 7, 100])
def test_t13_text_is_read_in_blocks_that_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, block: int
) -> None:
    path = tmp_path / f"list.{suffix}"
    ends = itertools.cycle(["\r\n", "\n", "\r"])
    pairs = [(f"http://a/{number}", f'ä "{number}"' if number % 3 else "") for number in range(40)]
    if suffix in ("csv", "tsv"):
        separator = "," if suffix == "csv" else "\t"
        quoted = (f'{url}{separator}"{caption.replace(chr(34), chr(34) * 2)}\r\n!"' for url, caption in pairs)
        lines = [f"url{separator}caption", *quoted]
        pairs = [(url, f"{caption}\r\n!") for url, caption in pairs]
    elif suffix == "jsonl":
        lines = [json.dumps({"url": url, "caption": caption}) for url, caption in pairs]
    else:
        lines = [f"{url}\t{caption}" for url, caption in pairs]
    path.write_bytes("".join(line + next(ends) for line in lines).encode())
    monkeypatch.setattr(stage_module, "_BLOCK_BYTES", block)
    assert listed(path) == [ListRow(*pair) for pair in pairs]
    if suffix in ("csv", "tsv"):
        path.write_bytes(path.read_bytes() + b'"\n')
        *others, last = listed(path)
        assert others == [ListRow(*pair) for pair in pairs] and last == ListRow('"', '"', reason="bad_quotes")
    elif suffix == "jsonl":
        path.write_bytes(path.read_bytes() + b'"\n')
        *others, last = listed(path)
        assert others == [ListRow(*pair) for pair in pairs] and last == ListRow("", '"', reason="bad_row")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "csv.gz"])
def test_f54_stray_quotes_cost_their_own_rows_and_the_lines_add_up(tmp_path: Path, suffix: str) -> None:
    """Two quotes that are opened and never closed in a list of 50,002 rows, which is read in several blocks."""
    separator = "\t" if suffix == "tsv" else ","
    captions = ["a red circle"] * 50_002
    captions[10], captions[40_000], captions[77] = '"The Starry Night', '"The Starry Night', '"a red\n\ncircle"'
    text = f"url{separator}caption\n\n" + "".join(
        f"http://a.example/{number}.jpg{separator}{caption}\n" for number, caption in enumerate(captions)
    )
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    artifact = ingested(tmp_path, urls=str(path))
    assert artifact.facts["rows"] == {"in": 50_002, "kept": 50_000, "dropped": 0, "failed": 2}
    assert artifact.facts["reasons"] == {"bad_quotes": 2}
    assert artifact.facts["lines"] == {"in": 50_006, "header": 1, "blank": 1, "continued": 2}
    found = ranges.read_all(artifact.uri).sort_by("position").to_pylist()
    assert [row["position"] for row in found if row["status"] == "failed"] == [10, 40_000]
    assert found[10]["url"] == "http://a.example/10.jpg" and found[77]["caption"] == "a red circle"


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
        (extension_table(), "list.parquet has an extension type"),
        (pa.table({"url": ["http://a"], "caption": [["b"]]}), "column 'caption'.*got list.*expected text"),
        (b"PAR1 no parquet at all PAR1", "list.parquet cannot be read"),
        (b"", "list.parquet cannot be read"),
    ],
)
def test_f25_f27_an_unusable_list_raises_before_anything_starts(tmp_path: Path, content: Any, message: str) -> None:
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
        ("list.csv", b"\n\r\n", "cannot be read: it is empty"),
        ("list.csv", b"url,caption\nhttp://a,b,c,d\n", "no row that can be read .*such as 'http://a,b,c,d'"),
        ("list.csv", b"url,caption\n\nhttp://a,b,c\n", "no row that can be read .*such as 'http://a,b,c'"),
        ("list.csv", b'\nurl,"caption\n', "cannot be read: line 2: unexpected end of data"),
        ("list.csv", b"url,caption,url\nhttp://a,b,c\n", "2 columns 'url' .ingest.url_column.*expected one"),
        ("list.csv", b"u\x1b[31m,\xe2\x80\xaecaption\n", r"no column 'url' .*Valid names: caption, u\[31m"),
        ("list.tsv", b"url,caption\nhttp://a,b\n", "no column 'url'"),
        ("list.jsonl", b"", "has no rows"),
        ("list.jsonl", b"{not json}\n", "no row that can be read .*such as '{not json}'"),
        ("list.jsonl", b'\n["http://a", "b"]\n', "no row that can be read .*an object on each line"),
        ("list.jsonl", b'{"link": "http://a", "caption": ""}', "no column 'url'"),
        ("list.jsonl", b"[" * 200_000, "no row that can be read"),
        ("list.txt", b"\n \n", "has no rows"),
        ("list.csv.gz", b"url,caption\nhttp://a,b\n", "cannot be read: Not a gzipped file"),
        # without a timestamp, which would give the test a different name in every process
        ("list.parquet.gz", gzip.compress(b"PAR1", mtime=0), "cannot be read"),
        (
            "list.xlsx",
            b"PK",
            "is not a file, or a folder with files, of the formats .parquet, .csv, .tsv, .jsonl, .txt",
        ),
    ],
)
def test_f25_unusable_text_lists_raise(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_source(IngestConfig(str(tmp_path / name)))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "txt", "parquet"])
def test_f98_a_fault_of_a_row_costs_the_row_in_every_format(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row of four is at fault."""
    monkeypatch.setattr(stage_module, "SMALL_BYTES", 64 << 20)  # read without Ray
    path = tmp_path / f"list.{suffix}"
    long = "a" * (MAX_LINE_CHARACTERS + 10)
    faults: dict[str, dict[Any, str]] = {
        "csv": {
            "http://b/,x,y": "bad_row", "http://b/": "bad_row", f"http://b/{long},x": "bad_row", "\0": "bad_row",
            'http://b/,"x" y': "bad_quotes",
        },
        "tsv": {
            "http://b/\tx\ty": "bad_row", "http://b/": "bad_row", f"http://b/{long}\tx": "bad_row", "\0": "bad_row",
            'http://b/\t"x" y': "bad_quotes",
        },
        "jsonl": {
            "[1]": "bad_row", "{not json}": "bad_row", '"text"': "bad_row", "[" * 200_000: "bad_row",
            '{"url": "http://b/", "caption": ["x"]}': "bad_row", '{"url": {}, "caption": "x"}': "bad_row",
            '{"url": "http://b/", "caption": NaN}': "no_caption", f'{{"url": "http://b/{long}"}}': "bad_row",
            '{"url": ' + "1" * 10_000 + ', "caption": "x"}': "bad_url",
            '{"url": "http://b/", "caption": "x"': "bad_row",
        },
        "txt": {f"http://b/{long}\tx": "bad_url", "\0": "no_url", "http://b/": "no_caption", " \tx": "no_url"},
        "parquet": {
            ("http://b/", None): "no_caption", (None, "x"): "no_url", (long, "x"): "bad_url", ("\0", ""): "no_url",
        },
    }  # fmt: skip
    sound = [(f"http://{name}/", f"caption {name}") for name in "acd"]
    for number, (fault, reason) in enumerate(faults[suffix].items()):
        if suffix == "parquet":
            write_list(path, [sound[0], fault, *sound[1:]])
        else:
            write_list(path, sound)
            lines = path.read_text().splitlines()
            at = len(lines) - 2
            path.write_text("\n".join([*lines[:at], fault, *lines[at:]]) + "\n")
        check_source(IngestConfig(str(path)))
        facts = ingested(tmp_path / str(number), urls=str(path)).facts  # one storage would keep the first result
        assert facts["rows"]["in"] == 4 and facts["rows"]["kept"] == 3, str(fault)[:80]
        assert facts["reasons"] == {reason: 1}, str(fault)[:80]
        assert listed(path)[0].url == "http://a/" and listed(path)[3].url == "http://d/"


def test_f98_a_number_is_its_text_and_nan_is_null(tmp_path: Path) -> None:
    values = ["1984", "-0.50", "1e400", "12345678901234567890123", "NaN", "Infinity", "null", '"NaN"', '"1"']
    lines = [f'{{"url": "http://a/{number}", "caption": {value}}}\n' for number, value in enumerate(values)]
    (tmp_path / "list.jsonl").write_text("".join(lines))
    expected = [*values[:4], "", "", "", "NaN", "1"]
    assert [row.caption for row in listed(tmp_path / "list.jsonl")] == expected
    assert {row.reason for row in listed(tmp_path / "list.jsonl")} == {None}


def test_f98_captions_may_begin_after_many_lines(tmp_path: Path) -> None:
    lines = [f'{{"url": "http://a/{number}"}}\n' for number in range(500)] + ['{"url": "http://b/", "caption": "x"}\n']
    (tmp_path / "list.jsonl").write_text("".join(lines))
    assert [row.caption for row in listed(tmp_path / "list.jsonl")] == [""] * 500 + ["x"]


def test_f98_long_lines_without_a_caption_are_not_held_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_JSON_CHARACTERS_FOR_NAMES", 100_000)
    lines = [json.dumps({"url": f"http://a/{number}", "other": "x" * 1000}) for number in range(300)]
    (tmp_path / "list.jsonl").write_text("\n".join([*lines[:90], '{"url": "http://b/", "caption": "x"}', *lines[90:]]))
    assert [row.caption for row in listed(tmp_path / "list.jsonl") if row.caption] == ["x"]
    (tmp_path / "list.jsonl").write_text(
        "\n".join([*lines[:200], '{"url": "http://b/", "caption": "x"}', *lines[200:]])
    )
    with pytest.raises(InputError, match="no column 'caption'"):
        listed(tmp_path / "list.jsonl")


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (pa.nulls(2), ["", ""]),
        (pa.array([1984, None]), ["1984", ""]),
        (pa.array([1.5, float("nan")]), ["1.5", ""]),
        (pa.array([2.0, 3.0], pa.float16()), ["2", "3"]),
        (pa.array([7, 7], pa.uint8()).dictionary_encode(), ["7", "7"]),
        (pa.nulls(2, pa.string()).dictionary_encode(), ["", ""]),
    ],
)
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_f99_a_part_without_texts_is_part_of_the_list(
    tmp_path: Path, captions: pa.Array, expected: list[str], names: tuple[str, str]
) -> None:
    """The type of one Parquet file's column is not that of the list, whichever file comes first."""
    pq.write_table(pa.table({"url": ["http://a/", "http://b/"], "caption": captions}), tmp_path / f"{names[0]}.parquet")
    write_list(tmp_path / f"{names[1]}.parquet", [("http://c/", "x")])
    check_source(IngestConfig(str(tmp_path)))
    captions_of = {row.url: row.caption for row in listed(tmp_path)}
    assert captions_of == {"http://a/": expected[0], "http://b/": expected[1], "http://c/": "x"}


ONE_ROW = {
    "csv": "url,caption\nhttp://a/,x y\n", "tsv": "url\tcaption\nhttp://a/\tx y\n",
    "jsonl": '{"url": "http://a/", "caption": "x y"}\n', "txt": "http://a/\tx y\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("list.CSV", "csv"), ("List.Csv.GZ", "csv"), ("list.csv.gzip", "csv"), ("list.csv.csv", "csv"),
        ("list.csv.txt", "csv"), ("list.tsv.txt.gz", "tsv"), ("list.TAB", "tsv"), ("list.ndjson", "jsonl"),
        ("list.json", "jsonl"), ("list.JSON.gz", "jsonl"), ("list.jsonl.json", "jsonl"), ("my.list.v2.TXT", "txt"),
        ("list.parquet.gzip", "parquet"), ("list.parquet.snappy", "parquet"), ("list.Parquet", "parquet"),
        ("list.snappy.parquet", "parquet"), ("list.pq", "parquet"), ("list.csv.gz.parquet", "parquet"),
    ],
)  # fmt: skip
def test_f101_files_are_told_by_their_extension_however_it_is_spelled(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "parquet":
        pq.write_table(pa.table({"url": ["http://a/"], "caption": ["x y"]}), path)
    else:
        data = ONE_ROW[kind].encode()
        path.write_bytes(gzip.compress(data) if name.lower().endswith((".gz", ".gzip")) else data)
    for place in (path, tmp_path):
        assert listed(place) == [ListRow("http://a/", "x y")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "twice"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
@pytest.mark.parametrize("block", [1, 1 << 19])
def test_f101_byte_order_marks_are_no_part_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, kind: str, block: int
) -> None:
    monkeypatch.setattr(stage_module, "_BLOCK_BYTES", max(block, 4))
    text = ONE_ROW[kind].replace("x y", "x \U0001f388")
    data = b"\xef\xbb\xbf" * 2 + text.encode() if encoding == "twice" else text.encode(encoding)
    (tmp_path / f"list.{kind}").write_bytes(data)
    assert listed(tmp_path / f"list.{kind}") == [ListRow("http://a/", "x \U0001f388")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "url, caption\nhttp://a/, x y\n"),
        ("list.csv", ' url ,"caption "\nhttp://a/,x y\n'),
        ("list.csv", 'id, url, caption\n1, http://a/, "x y"\n'),
        ("list.tsv", "\xa0url\t caption\nhttp://a/\tx y\n"),
        ("list.jsonl", '{" url": "http://a/", "\ufeffcaption ": "x y"}\n'),
    ],
)
def test_f101_spaces_around_the_name_of_a_column_do_not_matter(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    [row] = pairs_of(listed(tmp_path / name)).to_pylist()
    assert (row["url"], row["caption"], row["status"]) == ("http://a/", "x y", "kept")
    pq.write_table(pa.table({" url": ["http://a/"], "caption\ufeff": ["x y"], "url2": ["b"]}), tmp_path / "b.parquet")
    assert listed(tmp_path / "b.parquet") == [ListRow("http://a/", "x y")]
    pq.write_table(pa.table({" url": ["b"], "url": ["http://a/"], "caption": ["x y"]}), tmp_path / "b.parquet")
    assert listed(tmp_path / "b.parquet") == [ListRow("http://a/", "x y")]


def test_f101_hints_show_what_differs(tmp_path: Path) -> None:
    alike = (("c\u0430ption", "'c\u0430ption', in ASCII 'c\\\\u0430ption'"), ("cap\u200btion", "'cap\\\\u200btion'"))
    for name, shown in (*alike, ("capti\u00f3n", "'capti\u00f3n'")):
        (tmp_path / "list.csv").write_text(f"url,{name}\nhttp://a/,x\n")
        with pytest.raises(InputError, match=rf"no column 'caption' .*Did you mean {shown}\?$"):
            check_source(IngestConfig(str(tmp_path / "list.csv")))


def test_f101_files_that_are_left_out_of_a_folder_are_named(tmp_path: Path) -> None:
    write_list(tmp_path / "list.csv", ROWS[:1])
    assert left_out(str(tmp_path)) == left_out(str(tmp_path / "list.csv")) == ""
    for name in ("b.xlsx", "a.csv.bz2", "notes.txt", "_SUCCESS", ".hidden.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert left_out(str(tmp_path)) == "a.csv.bz2, b.xlsx, notes.txt"
    for number in range(10):
        (tmp_path / f"c{number}.json").write_text("{}")
    assert left_out(str(tmp_path)) == "a.csv.bz2, b.xlsx, c0.json, c1.json, c2.json and 8 more"


def test_f25_a_list_without_usable_rows_raises_with_the_reasons(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv", [("ftp://a", "b"), ("nonsense", "c"), ("http://a", "")])
    failure = run_ingest(tmp_path, urls=path)
    assert isinstance(failure, Failure)
    assert "none of the 3 rows" in failure.message and "bad_url 2, no_caption 1" in failure.message


def test_a_list_that_changes_after_the_check_raises(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv")
    digest = check_source(IngestConfig(path))
    assert digest == check_source(IngestConfig(path))
    assert isinstance(run_ingest(tmp_path, urls=path, digest=digest), Artifact)
    write_list(tmp_path / "list.csv", ROWS[:2])
    assert check_source(IngestConfig(path)) != digest
    failure = run_ingest(tmp_path, urls=path, digest=digest)
    assert isinstance(failure, Artifact), "a committed result does not need the list"
    (tmp_path / "elsewhere").mkdir()
    failure = run_ingest(tmp_path / "elsewhere", urls=path, digest=digest)
    assert isinstance(failure, Failure) and "has changed since this run was planned" in failure.message


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
        ("http://example.com/a\x00b", None),
        ("http://example.com/a\nb", None),
        ("http://example.com/a\tb", None),
        ("http://exam\r\nple.com/", None),
        ("\nhttp://example.com/a\r\n", "http://example.com/a"),
        ("http://example.com/\u202egpj.a", None),
        ("http://example.com/\ufffd.jpg", None),
        ("", None),
    ],
)
def test_f54_urls_are_normalised_and_hold_no_line_break(raw: str, expected: str | None) -> None:
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
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),  # the report escapes it
        ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
        ("كلب صغير", "كلب صغير"),
    ],
)
def test_f23_captions_are_normalised(raw: str, expected: str) -> None:
    assert normalise_caption(raw) == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_f23_t13_hostile_texts_affect_only_their_row(tmp_path: Path, suffix: str) -> None:
    texts = {
        b"http://a/1": b"caf\xe9 \xff red",
        b"http://a/2": b"nul\x00 in it",
        b"http://a/3": "safe\u202egnp.exe".encode(),
        b"http://a/4": b"x" * 1_000_000,
        b"http://a/5": "e\u0301\u0315".encode() * 20_000,
        b"http://a/\xe9": b"a URL of no known encoding",
        "http://a/\u202e7".encode(): b"a URL that reads backwards",
        b"http://a/" + b"8" * 100_000: b"a long URL",
        b"http://a/9": b" ",
    }
    path, plain = tmp_path / f"list.{suffix}", suffix.removesuffix(".gz")
    if suffix == "parquet":
        columns = {"url": list(texts), "caption": list(texts.values())}
        pq.write_table(pa.table({name: pa.array(values, pa.binary()) for name, values in columns.items()}), path)
    else:
        separator = b"," if plain == "csv" else b"\t"
        lines = [url + separator + caption for url, caption in texts.items()]
        if plain == "jsonl":
            escaped = [[text.replace(b"\x00", b"\\u0000") for text in pair] for pair in texts.items()]
            lines = [b'{"url": "%b", "caption": "%b"}' % (url, caption) for url, caption in escaped]
        header = [] if plain in ("jsonl", "txt") else [b"url" + separator + b"caption"]
        data = b"\xef\xbb\xbf" + b"\r\n".join([*header, *lines])  # as Excel writes it
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    found = {row["position"]: row for row in pairs_of(listed(path)).to_pylist()}
    assert [found[position]["reason"] for position in range(9)] == [None] * 5 + ["bad_url"] * 3 + ["no_caption"]
    assert [found[position]["caption"] for position in range(4)] == [
        "caf\ufffd \ufffd red",
        "nul in it",
        "safegnp.exe",
        "x" * 1000,
    ]
    assert found[4]["caption"].startswith("\xe9\u0315") and len(found[4]["caption"]) == 1000


def test_f23_t13_lone_surrogates_in_json_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"url": "http://a/1", "caption": "\\ud83d red \\ud83d\\ude00"}\n')
    assert pairs_of(listed(path)).to_pylist()[0]["caption"] == "\ufffd\ufffd\ufffd red \U0001f600"


def test_a_json_line_may_omit_missing_values(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"url": "http://a/1"}\n{"caption": null, "url": "http://a/2"}\n')
    assert listed(tmp_path / "list.jsonl") == [ListRow("http://a/1", ""), ListRow("http://a/2", "")]


def test_urls_with_commas_and_quotes_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text('http://a/1,2,"3\r\nhttp://a/4\ta, "b"\tc')
    assert listed(tmp_path / "list.txt") == [ListRow('http://a/1,2,"3', ""), ListRow("http://a/4", 'a, "b"\tc')]
    assert pairs_of(listed(tmp_path / "list.txt"))["url"].to_pylist()[0] in ('http://a/1,2,"3', "http://a/4")


def test_t13_truncated_gzip_and_trailing_bytes_raise(tmp_path: Path) -> None:
    path = Path(write_list(tmp_path / "list.csv.gz"))
    data = path.read_bytes()
    for damaged, message in ((data[:-9], "Compressed file ended"), (data + b"more", "Not a gzipped file")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"list\.csv\.gz cannot be read: {message}"):
            listed(path)
    path.write_bytes(data + data)
    assert len(listed(path)) == 2 * len(ROWS) + 1, "gzip files may be joined; the second header is a row"


def test_t13_a_gzip_bomb_raises(tmp_path: Path) -> None:
    line = b"http://a/\t" + bytes(MAX_LINE_CHARACTERS - 100) + b"\n"
    (tmp_path / "list.txt.gz").write_bytes(gzip.compress(line * 20, 1))
    with pytest.raises(
        InputError, match=r"list.txt.gz cannot be read: its .* bytes decompress to more than 67,108,864"
    ):
        for _ in read(IngestConfig(str(tmp_path))):
            pass


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def file_claiming(num_rows: int) -> bytes:
    """Parquet file whose footer claims `num_rows` rows everywhere instead of the actual number."""

    def field(value: int) -> bytes:  # a 64-bit integer field in Thrift's compact protocol
        zigzag, encoded = value << 1, [0x16]
        while zigzag > 0x7F:
            encoded.append(zigzag & 0x7F | 0x80)
            zigzag >>= 7
        return bytes([*encoded, zigzag])

    actual_rows = 123_457
    data = parquet_bytes(pa.table({"url": ["http://a"] * actual_rows, "caption": ["b"] * actual_rows}))
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    footer = data[start:-8]
    assert footer.count(field(actual_rows)) >= 4  # the file, its row group and two columns
    footer = footer.replace(field(actual_rows), field(num_rows))
    return data[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def test_f28_t13_a_footer_that_claims_more_than_the_file_can_hold_raises(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    nulls = pa.table({name: pa.nulls(1_000_001, pa.string()) for name in ("url", "caption")})
    long = pa.table({"url": ["http://a"], "caption": ["x" * 70_000_000]})
    bombs = {
        "claims 1,000,000,000,000 rows": file_claiming(10**12),
        "claims 1,000,001 rows": parquet_bytes(nulls),
        "claims 70,...,... bytes": parquet_bytes(long, compression="zstd", use_dictionary=False),
    }
    for message, data in bombs.items():
        assert len(data) < 500_000
        path.write_bytes(data)
        before = pa.default_memory_pool().bytes_allocated()
        with pytest.raises(InputError, match=f"list.parquet cannot be read: its footer {message}"):
            check_source(IngestConfig(str(path)))
        assert pa.default_memory_pool().bytes_allocated() - before < 1_000_000
    path.write_bytes(file_claiming(999_999))
    with pytest.raises(InputError, match=r"list.parquet cannot be read"):
        listed(path)


@pytest.mark.parametrize("encoding", ["RLE_DICTIONARY", "PLAIN", "DELTA_BYTE_ARRAY"])
def test_t13_a_long_caption_shared_by_many_rows_is_not_multiplied(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "list.parquet"
    for num_rows in (200, 2000):
        captions = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows), ["x" * 100_000])
        table = pa.table({"url": [f"http://a/{i}" for i in range(num_rows)], "caption": captions.cast(pa.string())})
        options = (
            {} if encoding == "RLE_DICTIONARY" else {"use_dictionary": False, "column_encoding": {"caption": encoding}}
        )
        pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=300, **options)
        if num_rows == 200:
            assert {normalise_caption(row.caption) for row in listed(path)} == {"x" * 1000}
        else:
            with pytest.raises(InputError, match=r"list\.parquet cannot be read"):
                listed(path)


TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


DELTA = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}  # pyarrow cannot read it as a dictionary


ENCODINGS: list[tuple[pa.DataType, dict[str, Any]]] = [
    *((kind, options) for kind in TEXT_TYPES for options in ({}, {"dictionary_pagesize_limit": 1})),
    *((kind, DELTA) for kind in TEXT_TYPES if not pa.types.is_dictionary(kind)),
]


@pytest.mark.parametrize(("kind", "options"), ENCODINGS, ids=str)
def test_parquet_in_all_its_encodings_of_text(tmp_path: Path, kind: pa.DataType, options: dict[str, Any]) -> None:
    urls = [None if number % 5 == 0 else f"http://a/{number % 1100}" for number in range(3000)]
    captions = [None if number % 7 == 0 else f"caption {number % 3}" for number in range(3000)]
    columns = {"url": urls, "caption": captions}
    table = pa.table(
        {name: pa.array(values, kind if name == "caption" else pa.string()) for name, values in columns.items()}
    )
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=1300, **options)
    expected = [ListRow(url or "", caption or "") for url, caption in zip(urls, captions, strict=True)]
    assert listed(tmp_path / "list.parquet") == expected


def pairs_table(num_rows: int = 120) -> pa.Table:
    captions = [
        None if number % 7 == 0 else f"a {'red' if number % 2 else 'blue'} circle" for number in range(num_rows)
    ]
    urls = [f"http://a.example/{number}.jpg" for number in range(num_rows)]
    return pa.table({"id": range(num_rows), "url": urls, "caption": captions})


def damage(data: bytes, randomness: random.Random) -> bytes:
    """Truncate the data, or change some bytes, half of the time in the footer."""
    if randomness.random() < 0.2:
        return data[: randomness.randrange(len(data))]
    damaged = bytearray(data)
    footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    for _ in range(randomness.choice([1, 1, 1, 3])):
        position = randomness.randrange(randomness.choice([0, footer]), len(data))
        damaged[position] ^= 1 << randomness.randrange(8) if randomness.random() < 0.5 else randomness.randrange(1, 256)
    return bytes(damaged)


WRITERS: list[dict[str, Any]] = [
    {"compression": "none"},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"compression": "snappy", "use_dictionary": False, "store_schema": False},
    {"use_dictionary": False, "column_encoding": {"url": "DELTA_BYTE_ARRAY", "caption": "DELTA_LENGTH_BYTE_ARRAY"}},
]


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("checksums", [True, False])
def test_f28_t13_damaged_parquet_raises_or_is_read_unchanged(
    tmp_path: Path, writer: dict[str, Any], checksums: bool
) -> None:
    """Without page checksums a changed letter cannot be detected, but nothing crashes."""
    data = parquet_bytes(pairs_table(), write_page_checksum=checksums, row_group_size=50, **writer)
    path, randomness = tmp_path / "list.parquet", random.Random(1)
    path.write_bytes(data)
    intact, outcomes = listed(path), {"refused": 0, "equal": 0, "changed": 0}
    assert len(intact) == 120
    for _ in range(150):
        path.write_bytes(damage(data, randomness))
        try:
            rows = listed(path)
        except InputError as error:
            assert str(path) in str(error) and str(error).isprintable()
            outcomes["refused"] += 1
        else:
            outcomes["equal" if rows == intact else "changed"] += 1
            assert len(rows) == len(intact)
    assert outcomes["refused"] > 50 and outcomes["equal"] > 5
    assert outcomes["changed"] == 0 or not checksums


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != "parquet"])
def test_t13_damaged_text_lists_raise_or_lose_rows(tmp_path: Path, suffix: str) -> None:
    path, randomness = tmp_path / f"list.{suffix}", random.Random(2)
    write_list(path, [(f"http://a/{number}", f'a "red" circle, {number}') for number in range(50)])
    data, outcomes = path.read_bytes(), set()
    for _ in range(60):
        damaged = bytearray(data[: randomness.randrange(len(data))] if randomness.random() < 0.2 else data)
        for _ in range(randomness.choice([1, 10]) if damaged else 0):
            damaged[randomness.randrange(len(damaged))] = randomness.choice(b'\0"\r\n\t,{}[]\\\xff\xe2a')
        path.write_bytes(damaged)
        try:
            table = pairs_of(listed(path))
        except InputError as error:
            assert str(path) in str(error) and str(error).isprintable()
            outcomes.add("refused")
        else:
            assert set(table["status"].to_pylist()) <= {"kept", "failed", "dropped"}
            outcomes.add("read")
    assert "refused" in outcomes or suffix in ("txt", "jsonl")
    assert "read" in outcomes or suffix.endswith(".gz")  # nearly any changed byte breaks gzip's checksum


class Deserialised(pa.ExtensionType):
    """Extension type that writes a marker file when its metadata is deserialised, which must not happen."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "unclip.test")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, serialised: bytes) -> "Deserialised":
        Path(os.environ["UNCLIP_TEST_MARKER"]).write_bytes(serialised)
        return cls()


def test_f28_t13_metadata_of_extension_types_is_not_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "list.parquet"
    monkeypatch.setenv("UNCLIP_TEST_MARKER", str(marker))
    pa.register_extension_type(Deserialised())
    try:
        extra = pa.ExtensionArray.from_storage(Deserialised(), pa.array(["x"]))
        pq.write_table(pa.table({"url": ["http://a"], "caption": ["b"], "id": extra}), path)
        marker.unlink(missing_ok=True)
        with pytest.raises(InputError, match="extension type"):
            check_source(IngestConfig(str(path)))
        assert not marker.exists()
        pq.ParquetFile(path)
        assert marker.exists(), "opening the file does run the code"
    finally:
        pa.unregister_extension_type("unclip.test")


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sandbox]]:
    """Child processes started for this test alone, limited to 64 MiB and five seconds."""
    started: list[Sandbox] = []

    def start(function: Callable[[bytes], bytes], limits: Limits) -> Sandbox:
        started.append(Sandbox(function, limits=limits))
        return started[-1]

    monkeypatch.setattr(parquet_list, "_idle", queue.SimpleQueue())
    monkeypatch.setattr(parquet_list, "Sandbox", start)
    monkeypatch.setattr(parquet_list, "LIMITS", Limits(wall_seconds=5.0, memory_bytes=1 << 26, open_files=4))
    yield started
    for sandbox in started:
        sandbox.close()


def test_f28_t13_a_list_that_kills_its_reader_is_named(tmp_path: Path, readers: list[Sandbox]) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pairs_table(10), path)
    for number, message in (
        (signal.SIGSEGV, "the process that read it crashed"),
        (
            signal.SIGKILL,
            "reading it takes more than 67,108,864 bytes of memory",
        ),  # as the kernel does when memory runs out
        (signal.SIGSTOP, "reading it takes more than 5 s at a time"),
    ):
        assert len(listed(path)) == 10, "the next list gets a new reader"
        [pid] = readers[0].pids
        os.kill(pid, number)
        with pytest.raises(InputError, match=rf"list\.parquet cannot be read: {message}"):
            listed(path)
        assert readers[0].pids != [pid] and len(readers) == 1


def test_f28_t13_a_list_that_needs_much_memory_uses_none_in_the_driver(tmp_path: Path, readers: list[Sandbox]) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://a"], "caption": ["x" * 60_000_000]}), path, compression="zstd")
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(InputError, match=r"list\.parquet cannot be read: .*more than 67,108,864 bytes of memory"):
        listed(path)
    assert pa.default_memory_pool().max_memory() == before


def test_t13_lists_that_are_read_concurrently_have_separate_readers(tmp_path: Path, readers: list[Sandbox]) -> None:
    for name in "ab":
        pq.write_table(
            pa.table({"url": [f"http://{name}/{i}" for i in range(9)], "caption": [name] * 9}), tmp_path / name
        )
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")
    for _ in range(2):
        both = zip(*(read(IngestConfig(str(tmp_path / f"{name}.parquet"))) for name in "ab"), strict=True)
        assert [[set(chunk["caption"].to_pylist()) for chunk in pair] for pair in both] == [[{"a"}, {"b"}]]
    assert len(readers) == 2


def test_t13_many_long_captions_are_read_in_pieces(tmp_path: Path) -> None:
    captions = [f"{number} " + "x" * 70_000 for number in range(600)]  # more than one reply holds
    pq.write_table(pa.table({"url": ["http://a"] * 600, "caption": captions}), tmp_path / "list.parquet")
    found = [row.caption for row in listed(tmp_path / "list.parquet")]
    assert found == [caption[: parquet_list.MAX_TEXT_BYTES] for caption in captions]


def test_f28_t13_extension_types_declared_by_parquet_itself_raise(tmp_path: Path) -> None:
    identifiers = pa.array([b"0" * 16], pa.binary(16)).cast(pa.uuid())
    for column in (identifiers, pa.StructArray.from_arrays([identifiers], ["inner"])):
        path = tmp_path / "list.parquet"
        pq.write_table(pa.table({"url": ["http://a"], "caption": ["b"], "id": column}), path, store_schema=False)
        with pytest.raises(InputError, match=r"column 'id' of .*extension type"):
            check_source(IngestConfig(str(path)))


def test_t13_too_many_columns_raise(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), *((f"c{i}", pa.int8()) for i in range(10_000))])
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(InputError, match="it has 10,002 columns, expected at most 10,000"):
        check_source(IngestConfig(str(path)))


def test_two_parquet_columns_of_one_name_raise(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table([["http://a"], ["b"], ["http://c"]], ["url", "caption", "url"]), path)
    with pytest.raises(InputError, match=r"2 columns 'url'"):
        check_source(IngestConfig(str(path)))


def test_invalid_settings_raise() -> None:
    with pytest.raises(ConfigError, match="urls"):
        IngestConfig("")
    with pytest.raises(ConfigError, match="caption_column"):
        IngestConfig("a.csv", caption_column="url")
    with pytest.raises(ConfigError, match="sha256_column"):
        IngestConfig("a.csv", layout="coyo", sha256_column="text")
    with pytest.raises(ConfigError, match="url_column"):
        IngestConfig("a.csv", url_column="")
    with pytest.raises(ConfigError, match=r"layout.*expected one of plain, laion"):
        IngestConfig("a.csv", layout="laoin")  # type: ignore[arg-type]
