"""Tombstones: spellings of hosts, looks of images, and requests that are recorded but not carried out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.scene_server import ScenesConfig, jpeg
from tasks import tables
from tasks.lineage.takedown import parse
from tasks.stages.download import IMAGES
from tasks.store import TOMBSTONES, Store
from tasks.tombstones import (
    RECORDED,
    Entry,
    Tombstone,
    canonical_url,
    entries,
    forget,
    gather,
    load_tombstones,
    look_value,
    record,
    record_found,
    recorded,
    refuse,
    refuse_if_recorded,
    tombstones_digest,
    withhold,
    withhold_part,
    write_entries,
)
from tasks.untrusted import decode
from tasks.untrusted.domains import canonical_host
from unclip import files
from unclip.errors import StageError

SPELLINGS = [
    (
        "example.com",
        ["EXAMPLE.com", "example.com.", "ｅxample.com", "example。com", "ｅｘａｍｐｌｅ．ｃｏｍ", "exam\xadple.com"],
    ),
    ("münchen.de", ["MÜNCHEN.de", "xn--mnchen-3ya.de", "XN--MNCHEN-3YA.DE.", "mu\u0308nchen.de", "münchen｡de"]),
    ("faß.de", ["xn--fa-hia.de", "FAß.de"]),
    ("☃.example", ["xn--n3h.example"]),  # not allowed by IDNA 2008, and served all the same
    ("a_b.example.com", ["A_B.example.com"]),
]


@pytest.mark.parametrize(("domain", "spellings"), SPELLINGS)
def test_f85_a_domain_covers_its_hosts_in_any_spelling(domain: str, spellings: list[str]) -> None:
    hosts = [spelling for name in (domain, *spellings) for spelling in (name, f"www.{name}", f"{name}:8443")]
    others = ["example.org", "notexample.com", "munchen.de", "fass.de", "b.example.net", "example.com.evil.org"]
    urls = [f"https://{host}/a.jpg" for host in (*hosts, *others)]
    pairs = pa.table({"key": [f"{number:032x}" for number in range(len(urls))], "url": urls})
    for spelling in (domain, *spellings):
        assert canonical_host(spelling) == canonical_host(domain) and canonical_host(spelling).isascii()
        covered = gather([parse("domain", spelling)]).cover(pairs).to_pylist()
        assert covered == [True] * len(hosts) + [False] * len(others), spelling
        # As earlier versions stored it.
        assert gather([Tombstone("domain", spelling.lower().strip("."))]).cover(pairs).to_pylist() == covered


def test_f85_a_url_covers_the_spellings_of_its_host_and_port() -> None:
    alike = [
        "https://münchen.de/a.jpg?b=C",
        "https://xn--mnchen-3ya.de:443/a.jpg?b=C",
        "https://MÜNCHEN。de./a.jpg?b=C",
    ]
    others = [
        "https://münchen.de/A.jpg?b=C",
        "https://münchen.de:8443/a.jpg?b=C",
        "http://münchen.de/a.jpg?b=C",
        "",
        "x",
    ]
    pairs = pa.table({"key": [str(number) for number in range(8)], "url": [*alike, *others]})
    for url in alike:
        assert gather([parse("url", url)]).cover(pairs).to_pylist() == [True] * 3 + [False] * 5
    assert [canonical_url(url) for url in ("not a url", "http://[::1/x", "http://u:p@Host/x")] == [
        "not a url",
        "http://[::1/x",
        "http://u:p@Host/x",
    ]
    assert canonical_url("http://[2001:DB8:0::1]:80/x") == "http://[2001:db8::1]/x"
    zeros = pa.table({"key": ["a", "b"], "url": ["http://a.example:080/x", "http://a.example:08080/x"]})
    for number, url in enumerate(("http://a.example:080/x", "http://a.example:08080/x")):
        assert gather([parse("url", url)]).cover(zeros).to_pylist() == [number == 0, number == 1]
    assert parse("domain", "[2001:DB8::1]") == Tombstone("domain", "2001:db8::1")


def test_f85_the_url_that_redirects_led_to_counts_as_well() -> None:
    images = pa.table(
        {
            "key": ["a", "b", "c"],
            "url": ["https://short.example/1", "https://short.example/2", "https://short.example/3"],
            "final_url": ["https://ｅxample.com/1.jpg", None, "https://other.example/3.jpg"],
        }
    )
    assert gather([parse("domain", "example.com")]).cover(images).to_pylist() == [True, False, False]
    assert gather([parse("url", "https://other.example/3.jpg")]).cover(images).to_pylist() == [False, False, True]


def stored(image: decode.DecodedImage, number: int) -> dict[str, object]:
    facts = {"key": f"{number:032x}", "url": f"https://a.example/{number}", "caption": "c", "status": "ok"}
    return {**facts, "sha256": f"{number:064x}", "phash": image.phash, "colour": image.colour, "jpg": image.jpg}


def test_f86_a_copy_that_was_encoded_again_is_withheld_and_another_image_is_not() -> None:
    """The same scene at twice the resolution and another quality is a copy; other scenes are not."""
    small, large = (ScenesConfig(num_images=8, side=side, broken=0) for side in (64, 128))
    original = decode.decode(jpeg(small, 0), 64, 95, 10**6)
    again = decode.decode(jpeg(large, 0), 64, 60, 10**6)
    others = [decode.decode(jpeg(small, number), 64, 95, 10**6) for number in range(1, 8)]
    assert original.phash and again.jpg != original.jpg
    table = pa.Table.from_pylist([stored(image, n) for n, image in enumerate([again, *others])], schema=IMAGES)
    withheld = withhold(table, gather([Tombstone("look", look_value(original.phash, original.colour, 4))]))
    first, *rest = withheld.to_pylist()
    kept = {name: value for name, value in first.items() if value is not None}
    # It was taken down by its look, not by its address.
    facts = {"key": f"{0:032x}", "url": "https://a.example/0", "caption": "c"}
    assert kept == {**facts, "status": "failed", "reason": "taken_down"}
    assert rest == table.to_pylist()[1:]
    assert withhold(table, gather([Tombstone("sha256", f"{9:064x}")])) is table
    blank = withhold(table, gather([Tombstone("key", f"{1:032x}")])).to_pylist()[1]
    assert (blank["url"], blank["caption"], blank["jpg"], blank["reason"]) == ("", "", None, "taken_down")


def test_f86_a_look_without_a_hash_or_of_another_colour_covers_nothing() -> None:
    stone = gather([Tombstone("look", look_value("0" * 16, "102030", 3))])
    rows = {
        "phash": [None, "0" * 16, f"{7:016x}", f"{15:016x}", "0" * 16, "0" * 16],
        "colour": ["102030", "142030", None, "102030", "182030", "102038"],
    }
    assert stone.cover(pa.table(rows)).to_pylist() == [False, True, True, False, False, False]


def test_f83_a_part_is_written_again_without_rows_that_were_taken_down_since(tmp_path: Path) -> None:
    data_of = np.random.default_rng(0).bytes(1000)
    rows = [
        {"key": f"{n:032x}", "url": f"https://a.example/{n}", "status": "ok", "sha256": f"{n:064x}"} for n in range(3)
    ]
    table = pa.Table.from_pylist([{**row, "jpg": data_of + bytes([n])} for n, row in enumerate(rows)], schema=IMAGES)
    part = tables.write_part(str(tmp_path), "shard", table)
    assert withhold_part(str(tmp_path), gather([parse("sha256", f"{9:064x}")]), part) == part
    written = withhold_part(str(tmp_path), gather([parse("sha256", f"{1:064x}")]), part)
    assert written == tables.find_part(str(tmp_path), "shard") and written.name == part.name and written != part
    data = (tmp_path / "shard.parquet").read_bytes()
    assert data_of + b"\1" not in data and data_of + b"\0" in data and data_of + b"\2" in data
    assert withhold_part(str(tmp_path), gather([parse("sha256", f"{1:064x}")]), written) == written


def test_f84_a_recorded_request_counts_at_once_and_nothing_is_committed_before_it_is_carried_out(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    refuse_if_recorded(store, "curate")
    assert tombstones_digest(store) is None and load_tombstones(store) is load_tombstones(store)
    first = record(store, [parse("domain", "example.com")], None)
    digest = tombstones_digest(store)
    second = record(store, [parse("url", "https://a.example/x")], 3)
    assert recorded(store) == sorted([first, second], key=lambda request: request.id) and digest != tombstones_digest(
        store
    )
    pairs = pa.table(
        {"key": ["a", "b", "c"], "url": ["https://www.example.com/1", "https://a.example/x", "https://b.example"]}
    )
    assert load_tombstones(store).cover(pairs).to_pylist() == [True, True, False]
    with pytest.raises(StageError, match=r"curate: a takedown was recorded meanwhile \(.*Run the same command again"):
        refuse_if_recorded(store, "curate")
    record_found(store, second, [Entry("sha256", "ab" * 32, "url https://a.example/x")])
    assert load_tombstones(store).sha256s == {"ab" * 32}

    before = entries(store)
    write_entries(store, before)
    for request in (first, second):
        forget(store, request)
    assert entries(store) == before and not recorded(store)
    refuse_if_recorded(store, "curate")


def test_f84_what_a_search_finds_after_the_request_was_carried_out_is_not_left(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    request = record(store, [parse("key", "a" * 32)], None)
    record_found(store, request, [Entry("key", "b" * 32, "key")])
    assert load_tombstones(store).keys == {"a" * 32, "b" * 32}
    forget(store, request)
    record_found(store, request, [Entry("key", "b" * 32, "key")])
    assert store.list(*RECORDED) == [] and load_tombstones(store) is load_tombstones(store)


def test_f77_the_same_tombstones_are_not_written_again(tmp_path: Path) -> None:
    """Trainings look at the time of the file."""
    store = Store(str(tmp_path))
    write_entries(store, [Entry("key", "a" * 32, "key")])
    before = files.stamp(store.uri(TOMBSTONES))
    write_entries(store, [Entry("key", "a" * 32, "key")])
    assert files.stamp(store.uri(TOMBSTONES)) == before


def test_refused_rows_have_neither_url_nor_caption() -> None:
    listed = {"key": ["a", "b"], "url": ["https://ｅxample.com/1", "https://b.example/2"], "caption": ["one", "two"]}
    pairs = pa.table({**listed, "status": ["kept", "kept"], "reason": pa.nulls(2, pa.string())})
    first, second = refuse(pairs, gather([parse("domain", "example.com")])).to_pylist()
    assert first == {"key": "a", "url": "", "caption": "", "status": "dropped", "reason": "taken_down"}
    assert second["url"] == "https://b.example/2" and second["status"] == "kept"
