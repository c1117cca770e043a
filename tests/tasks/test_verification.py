"""Verification of a storage: damaged and missing files are found, named and dropped."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks import references, tables, verification
from tasks.references import Folder
from tasks.store import Store
from tasks.verification import Item, Problem, state_of, state_of_json, survey
from tests.tasks.datasets import kept_selection, key, write_folder, write_images, write_kept_places
from tests.unclip.damage import damaged, flip, flipped
from unclip import files, seals
from unclip.errors import DamagedError

FINGERPRINT = "ab" * 32


def image(number: int) -> dict[str, Any]:
    return {
        "key": key(number),
        "url": f"http://a/{number}",
        "caption": "a",
        "status": "ok",
        "jpg": bytes([number]) * 99,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Storage with an images table and a stage that selected its rows."""
    store = Store(str(tmp_path))
    images = write_images(store.root, [image(number) for number in range(4)], [image(number) for number in (4, 5)])
    folder = store.uri("artifacts", "dedup", FINGERPRINT)
    selection = write_folder(f"{folder}/selection", kept_selection({key(number): "train" for number in range(6)}), 2)
    places = write_kept_places(folder, selection, images)
    files.write(f"{folder}/page.html", b"<html>")
    seals.cover(folder)
    facts = {**images, "places": places}
    record = {"stage": "dedup", "fingerprint": FINGERPRINT, "uri": selection, "digest": "0", "facts": facts}
    store.write_json({**record, "seconds": 1.0}, "stages", "dedup", f"{FINGERPRINT}.json")
    run = {"pipeline": "tiny", "state": "done", "host": "a", "pid": 1, "config": {}}
    store.write_json(run, "runs", "r1", "run.json")
    store.write_json({"stage": "dedup", "fingerprint": FINGERPRINT}, "runs", "r1", "dedup.json")
    store.write_json({"stack": "", "digest": "0", "at": 0.5}, "published", "tiny.json")
    return store


def problems(store: Store) -> list[Problem]:
    return [
        Problem(item, state)
        for item in survey(store)
        if (state := state_of(item)) not in ("sound", "not covered")  # type: ignore[comparison-overlap]
    ]


def test_f78_every_flipped_bit_of_a_record_is_found() -> None:
    data = files.encode_json({"stage": "dedup", "facts": {"name": "é", "share": 1e-07, "rows": [1, None]}, "uri": "/a"})
    assert state_of_json(data) == "sound"
    for bit in range(8 * len(data)):
        assert state_of_json(flipped(data, bit)) == "damaged", data[max(0, bit // 8 - 20) : bit // 8 + 20]


def test_f78_flipped_bits_of_a_storage_are_found(store: Store) -> None:
    items = survey(store)
    assert {state_of(item) for item in items} == {"sound"} and len(items) > 15
    rng = random.Random(0)
    for _ in range(400):
        item = rng.choice(items)
        with damaged(item.uri, rng.randrange(8 * item.size)):
            assert state_of(item) == "damaged", item.uri


REFERRING = {
    "record of a run",
    "commit record of the stage dedup",
    "record of a published stack",
    "digests of the log of images/recipe",
    "digests of the log of index/recipe",
}
"""Files that refer to others, and that no file refers to: whether one is missing cannot be seen."""


def test_f79_missing_and_truncated_files_are_found(store: Store) -> None:
    unseen = set()
    for item in survey(store):
        before = Path(item.uri).read_bytes()
        Path(item.uri).write_bytes(before[: item.size // 2])
        assert item.uri in [problem.item.uri for problem in problems(store)]
        Path(item.uri).unlink()
        found = [problem.item.uri for problem in problems(store)]
        if item.what in REFERRING or item.uri.endswith(f"/{seals.MANIFEST}"):
            assert found == [], item
            unseen.add(item.what)
        else:
            assert item.uri in found, item
        Path(item.uri).write_bytes(before)
    assert not problems(store)
    assert unseen - {"file of the stage dedup"} == REFERRING, "a kind that the storage of the test lacks"


def test_f80_files_of_earlier_versions_are_not_covered_or_by_the_log_of_their_table(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    table = store.uri("images", "recipe")
    rows = pa.table({"key": [key(1)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seals, "seal", bytes)
        patch.setattr(seals, "seal_and_digest", lambda data: (bytes(data), files.sha256(bytes(data))))
        patch.setattr(tables, "cover_log", lambda _: None)
        part = tables.write_part(table, "part", rows)
        tables.append_files(table, [part], rows.schema)
        tables.write_file(store.uri("scenes", "a.parquet"), rows)
    files.write(store.uri("attempts", "recipe.json"), b"1")
    states = {item.uri.removeprefix(f"{store.root}/"): state_of(item) for item in survey(store)}
    assert states.pop("images/recipe/part.parquet") == "sound", "the commit has its digest"
    assert set(states.values()) == {"not covered"} and len(states) == 4, states
    flip(f"{table}/part.parquet", 99)
    assert [problem.item.part for problem in problems(store)] == [("images", "recipe")]


def test_f78_a_damaged_part_leaves_its_table_with_the_records_of_its_versions(store: Store) -> None:
    part = store.uri("images", "recipe", "part0.parquet")
    flip(part, 1000)
    found = problems(store)
    assert [problem.item.uri for problem in found] == [part]
    storage = f"--storage {store.root}"
    assert found[0].item.remedy == f"`unclip verify --drop {storage}`, then `unclip run tiny {storage}`"
    assert verification.drop(store, found) == []
    assert tables.read(store.uri("images", "recipe"))["key"].to_pylist() == [key(4), key(5)]
    assert tables.read(store.uri("index", "recipe"))["key"].to_pylist() == [key(4), key(5)]
    assert not store.exists("stages", "dedup", f"{FINGERPRINT}.json") and not Path(part).exists()
    assert not problems(store)
    # A new part of the same rows may have the same name.
    table, schema = store.uri("images", "recipe"), tables.read(store.uri("images", "recipe")).schema
    new = tables.write_part(table, "part0", pa.Table.from_pylist([image(0)], schema))
    tables.append_files(table, [new], schema)
    assert tables.read(table).num_rows == 3


def test_f78_a_damaged_file_of_a_stage_is_dropped_with_what_marks_it_as_complete(store: Store) -> None:
    folder = Folder("dedup", FINGERPRINT)
    page = store.uri(*folder.path, "page.html")
    flip(page, 3)
    flip(store.uri("published", "tiny.json"), 90)
    found = problems(store)
    assert {problem.item.uri for problem in found} == {page, store.uri("published", "tiny.json")}
    assert "unclip run tiny" in next(problem.item.remedy for problem in found if problem.item.uri == page)
    [remaining] = verification.drop(store, found)
    assert remaining.item.uri == store.uri("published", "tiny.json"), "no stage of this storage published it"
    assert not store.exists(*folder.record) and not store.exists(*folder.path, seals.MANIFEST)
    assert store.exists(*folder.path, "selection"), "the stage finds the rest"


def test_f78_a_log_that_cannot_be_read_does_not_hide_other_damage(store: Store) -> None:
    [log, *_] = [item for item in survey(store) if "images/recipe/_delta_log" in item.uri]
    Path(log.uri).write_text("{")
    flip(store.uri("artifacts", "dedup", FINGERPRINT, "page.html"), 3)
    found = {problem.item.uri.rpartition("/")[2]: problem for problem in problems(store)}
    assert {"page.html", "00000000000000000000.json"} <= found.keys()
    assert "restore it from a copy" in found["00000000000000000000.json"].item.remedy


def test_an_item_that_disappears_is_missing(tmp_path: Path) -> None:
    assert state_of(Item(str(tmp_path / "a.json"), 0, "", "")) == "missing"
    assert state_of(Item(str(tmp_path / "a.parquet"), 0, "", "")) == "missing"
    assert state_of(Item(str(tmp_path / "a.bin"), 0, "", "", sha256="0")) == "missing"


def test_f130_a_file_or_folder_that_cannot_be_read_is_reported_and_stays(store: Store) -> None:
    def replace(path: Path, target: str) -> None:
        path.unlink()
        path.symlink_to(target)

    folder = Path(store.uri("artifacts", "dedup", FINGERPRINT))
    page, run = folder / "page.html", Path(store.uri("runs", "r1", "dedup.json"))
    for path in (page, run):
        replace(path, "/proc/self/mem")  # reading it is an input/output error
    found = problems(store)
    assert {(problem.item.uri, problem.state) for problem in found} == {
        (str(page), "unreadable"),
        (str(run), "unreadable"),
    }
    assert verification.drop(store, found) == found
    assert page.is_symlink() and store.exists("stages", "dedup", f"{FINGERPRINT}.json")
    replace(folder / "manifest.json", "/proc/self/mem")
    assert str(folder / "manifest.json") in [problem.item.uri for problem in problems(store)]
    record = Path(store.uri("stages", "dedup", f"{FINGERPRINT}.json"))
    replace(record, "/proc/self/mem")
    [problem] = [problem for problem in problems(store) if problem.item.uri == str(record)]
    assert problem.state == "unreadable" and "unclip verify" in problem.item.remedy


def test_f130_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    too_long = str(tmp_path / ("a" * 300))  # an error for root as well, unlike missing permissions
    with pytest.raises(OSError, match="too long"):
        files.walk(too_long)
    for uri in (too_long, str(tmp_path), str(tmp_path / "none")):  # whatever happens to it after it was listed
        assert state_of(Item(uri, 0, "", "", is_folder=True)) == "unreadable"
    assert files.walk(str(tmp_path / "none")) == []


def test_records_of_runs_are_listed_once_and_progress_is_none_of_them(store: Store) -> None:
    store.write_json({"done": 1}, "runs", "r1", "progress", "dedup.json")
    store.write_json({"stage": "dedup", "fingerprint": "cd" * 32}, "runs", "r0", "dedup.json")  # a run without a record
    store.write_json({"pipeline": "other"}, "runs", "r2", "run.json")
    path = Path(store.uri("runs", "r2", "embed.json"))
    path.write_text("{")
    store.write_json({"stage": "filter", "fingerprint": FINGERPRINT}, "runs", "r2", "filter.json")
    assert references.pipelines(store) == {Folder("dedup", FINGERPRINT): "tiny", Folder("filter", FINGERPRINT): "other"}
    with pytest.raises(DamagedError):
        list(references.last_reached(store))
    path.unlink()
    assert [*references.last_reached(store)] == [
        ("tiny", Folder("dedup", FINGERPRINT)),
        ("other", Folder("filter", FINGERPRINT)),
    ]
    named = [item.uri for item in survey(store) if item.what == "record of a run"]
    assert len(named) == 5 and not [uri for uri in named if "progress" in uri]


@pytest.mark.parametrize("key", ["sha256", "others"])
@pytest.mark.parametrize(
    "name", ["../../../../{outside}/settings.json", "{outside}/settings.json", "link/settings.json", ".."]
)
def test_a_manifest_that_names_a_file_outside_its_folder_is_damaged_and_that_file_stays(
    store: Store, key: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "settings.json").write_text("// theirs")
    folder = store.uri("artifacts", "dedup", FINGERPRINT)
    Path(folder, "link").symlink_to(outside)
    manifest = files.read_json(f"{folder}/{seals.MANIFEST}")
    given = name.format(outside=outside)
    extra: Any = {given: "0" * 64} if key == "sha256" else [given]
    manifest[key] = manifest[key] | extra if key == "sha256" else manifest[key] + extra
    files.write_json(f"{folder}/{seals.MANIFEST}", manifest)
    found = problems(store)
    assert [(each.item.uri, each.state) for each in found] == [(f"{folder}/{seals.MANIFEST}", "damaged")]
    with pytest.raises(DamagedError, match="expected"), seals.changing(folder, "page"):
        pass
    assert verification.drop(store, found) == [] and (outside / "settings.json").read_text() == "// theirs"
    assert not files.exists(f"{folder}/{seals.MANIFEST}") and problems(store) == []


def test_a_record_that_names_a_file_outside_its_folder_is_damaged_and_that_file_stays(
    store: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "page.html"
    outside.write_text("theirs")
    path = ("stages", "dedup", f"{FINGERPRINT}.json")
    record = store.read_json(*path)
    record["facts"]["page"] = f"{store.uri('artifacts', 'dedup', FINGERPRINT)}/../../../../{outside}"
    store.write_json(record, *path)
    found = problems(store)
    assert [(each.item.uri, each.state) for each in found] == [(store.uri(*path), "damaged")]
    assert verification.drop(store, found) == [] and outside.read_text() == "theirs" and not store.exists(*path)


@pytest.mark.parametrize("linked", ["artifacts", "artifacts/dedup", f"artifacts/dedup/{FINGERPRINT}", "images/recipe"])
def test_damage_behind_a_link_is_named_and_dropped_only_in_folders_of_the_root(
    store: Store, linked: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside, place = tmp_path_factory.mktemp("outside") / "moved", Path(store.uri(linked))
    place.rename(outside)
    place.symlink_to(outside)
    file = next(outside.rglob("part0.parquet" if linked == "images/recipe" else "page.html"))
    flip(file, 8)
    found = problems(store)
    assert len(found) == 1 and verification.drop(store, found) == found and file.exists()
    assert store.exists("stages", "dedup", f"{FINGERPRINT}.json")
    remaining = verification.drop(store, found, follow_links=True)
    assert (remaining == []) == (not file.exists()) == (linked == "artifacts")
