"""Garbage of a storage: what is needed stays, with all that it refers to."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from tasks import garbage, published, references, tables, verification
from tasks.lock import Held, lock, result_lock
from tasks.published import Entry, Record
from tasks.references import Folder, Version
from tasks.run_records import beat, driver
from tasks.store import Store
from tasks.verification import Item, Problem
from tests.pipelines.command_line import ROOT
from unclip import files, seals
from unclip.errors import AlreadyRunningError, DamagedError, StorageError

PLACE = {"storage": "storage://", "here": "", "elsewhere": "/gone/before/", "bucket": "s3://bucket/some/prefix/"}


def folder(stage: str, number: int) -> Folder:
    return Folder(stage, f"{number:064x}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def finish(store: Store, stage: str, number: int, facts: Any = None, run: str | None = None) -> Folder:
    """Write the files, the commit record and, for a run, the event of a stage."""
    done = folder(stage, number)
    files.write(store.uri(*done.path, "model", "model.safetensors"), b"weights")
    files.write(store.uri(*done.path, "checkpoints", "1", "manifest.json"), b"{}")
    record = {"stage": stage, "uri": store.uri(*done.path, "model"), "digest": f"{number}", "facts": facts or {}}
    store.write_json(record, *done.record)
    if run:
        reach(store, done, run)
    return done


def reach(store: Store, reached: Folder, run: str, state: str = "done") -> None:
    record = {"pipeline": "tiny", "state": state, "host": "elsewhere", "pid": 1}
    store.write_json(record, "runs", run, "run.json")
    beat(store, run)
    event = {"stage": reached.stage, "fingerprint": reached.fingerprint}
    store.write_json(event, "runs", run, f"{reached.stage}.json")


def find(store: Store, days: float = 0) -> list[garbage.Garbage]:
    for path in Path(store.root).rglob("*"):
        if path.is_file():  # the clock of the file system is coarse
            os.utime(path, (0, max(0, path.stat().st_mtime - 1)))
    return garbage.find(store, [], days)


def found(store: Store, days: float = 0) -> dict[str, str]:
    return {each.path: each.what for each in find(store, days)}


@pytest.mark.parametrize("root", PLACE.values(), ids=list(PLACE))
def test_references_are_found_wherever_the_storage_was(root: str) -> None:
    own = folder("prior", 7)
    path = f"{root}artifacts/prior/{own.fingerprint}"
    value = {"a": [f"{path}/model"], "b": {"c": f"local-dir:{path}/open_clip"}, "d": path, "e": "artifacts/prior/7"}
    assert list(references.folders_in(value)) == [(own, "model"), (own, "open_clip"), (own, "")]
    snapshot = {"images": f"{root}images/0a1b", "images_version": 3, "index_version": 2, "embeddings": None}
    assert list(references.versions_in([{"facts": snapshot}])) == [
        Version("images", "0a1b", 3),
        Version("index", "0a1b", 2),
    ]


def test_the_last_result_of_a_stage_stays_and_an_older_one_goes(store: Store) -> None:
    old, new = finish(store, "prior", 1, run="r1"), finish(store, "prior", 2, run="r2")
    never_reached, unfinished = finish(store, "prior", 3), folder("prior", 4)
    files.write(store.uri(*unfinished.path, "checkpoints", "1", "a"), b"")
    assert found(store, days=1) == {}
    paths = found(store)
    for gone in (old, never_reached):
        assert paths["/".join(gone.path)] == "result of the stage prior"
    assert paths["/".join(unfinished.path)] == "unfinished stage prior"
    assert paths["/".join((*new.path, "checkpoints"))] == "checkpoints of a finished training"
    assert "/".join(new.path) not in paths and "/".join((*new.path, "model")) not in paths
    reach(store, unfinished, "r3", "failed")  # the same command resumes it
    assert "/".join(unfinished.path) not in found(store) and "/".join(new.path) in found(store)
    reach(store, old, "r0", "running")
    assert "/".join(old.path) not in found(store), "an older run is still running"


def test_what_a_needed_result_refers_to_stays(store: Store) -> None:
    first = finish(store, "ingest", 1)
    second = finish(store, "filter", 2, {"pairs": store.uri(*first.path, "pairs")})
    other = finish(store, "publish", 3)
    published = finish(store, "publish", 4)
    finish(store, "evaluate", 5, {"stack": {"models": [["prior", store.uri(*second.path)]]}})
    assert len(found(store)) == 5
    store.write_json({"stack": store.uri(*published.path, "stack")}, "published", "tiny.json")
    store.write_json(
        {"pipeline": "tiny", "artifacts": {"evaluate": folder("evaluate", 5).fingerprint}},
        "results",
        "tiny",
        "summary.json",
    )
    whole = {path for path in found(store) if path.count("/") == 2}
    assert whole == {"/".join(other.path)}


def test_f151_the_stacks_that_a_promotion_or_a_rollback_may_need_stay(store: Store) -> None:
    """Champion, challenger and the champions before; also their scores."""
    made = [finish(store, "publish", number) for number in range(5)]
    entries = [Entry(store.uri(*each.path, "stack"), f"{number:x}" * 64, 1.0) for number, each in enumerate(made)]
    record = Record("tiny")
    for entry in entries[:3]:
        record = record.promote(entry, "better")
    published.write(store, record.challenge(entries[3], "worse").challenge(entries[4], "worse"))
    for entry in entries:
        files.write(store.uri("scores", f"{entry.scores}-0.parquet"), b"PAR1")
    listed = set(found(store))
    assert {path for path in listed if path.startswith("scores")} == {f"scores/{entries[3].scores}-0.parquet"}
    assert {path for path in listed if path.count("/") == 2} == {"/".join(made[3].path)}


def test_all_results_that_a_comparison_shows_stay(store: Store) -> None:
    made = [finish(store, "evaluate", number) for number in range(4)]
    shown = {"pipeline": "tiny", "artifacts": {"evaluate": [each.fingerprint for each in made[:2]]}}
    store.write_json(shown, "results", "tiny-comparison", "summary.json")
    assert {path for path in found(store) if path.count("/") == 2} == {"/".join(each.path) for each in made[2:]}


def test_a_selection_that_takedowns_search_stays_with_all_it_refers_to(store: Store) -> None:
    table, rows = store.uri("images", "recipe"), pa.table({"key": ["a"]})
    [old, _] = [
        tables.append_files(table, [tables.write_part(table, name, rows)], rows.schema, removed=[before])
        for name, before in (("a", ""), ("b", "a.parquet"))
    ]
    listed = finish(store, "ingest", 1)
    facts = {"images": table, "images_version": old, "places": store.uri(*folder("dedup", 2).path, "places")}
    selecting = finish(store, "dedup", 2, {**facts, "pairs": store.uri(*listed.path, "model")})
    files.write(store.uri(*selecting.path, "places", "train.arrow"), b"a")
    finish(store, "filter", 3)
    garbage.delete(store, garbage.find(store, [], -1))
    assert store.exists(*selecting.path, "places", "train.arrow") and store.exists(*listed.record)
    assert tables.read(table, old)["key"].to_pylist() == ["a"]
    assert not store.exists(*folder("filter", 3).record) and not store.exists(*selecting.path, "checkpoints")
    assert not [item.uri for item in verification.survey(store) if verification.state_of(item) == "missing"]


def test_a_version_whose_log_is_gone_keeps_no_part_and_stops_nothing(store: Store) -> None:
    table, rows = store.uri("images", "recipe"), pa.table({"key": ["a"]})
    versions = [
        tables.append_files(table, [tables.write_part(table, name, rows)], rows.schema, removed=[before])
        for name, before in (("a", ""), ("b", "a.parquet"))
    ]
    finish(store, "filter", 1, {"images": table, "images_version": versions[0], "index_version": 0}, run="r1")
    DeltaTable(table).create_checkpoint()
    for number in range(versions[1]):
        files.delete(f"{table}/_delta_log/{number:020d}.json")
    assert references.files_of(table, versions[0]) == set()
    assert references.files_of(table, versions[1]) == {"b.parquet"}
    assert {path for path in found(store) if path.startswith("images")} == {"images/recipe/a.parquet"}
    item = Item(f"{table}/b.parquet", 0, "", "", part=("images", "recipe"))
    assert verification.drop(store, [Problem(item, "missing")]) == [] and not tables.files(table)
    with pytest.raises(TableNotFoundError):
        references.files_of(store.uri("images", "none"), 1)


def test_f131_all_that_a_run_has_come_to_need_meanwhile_stays(store: Store) -> None:
    table, rows = store.uri("images", "recipe"), pa.table({"key": ["a"]})
    old, _ = (
        tables.append_files(table, [tables.write_part(table, name, rows)], rows.schema, removed=[before])
        for name, before in (("a", ""), ("b", "a.parquet"))
    )
    prior = finish(store, "prior", 1)
    stack = finish(store, "publish", 2, {"prior": store.uri(*prior.path), "images": table, "images_version": old})
    gone, making, made = (
        finish(store, "prior", 3),
        Folder("prior", "4" * 64),
        folder("prior", 5),
    )  # locks are named after 16 digits
    for unfinished in (making, made):
        files.write(store.uri(*unfinished.path, "a"), b"")
    listed = garbage.find(store, [], -1)
    assert {each.path for each in listed} > {"/".join(each.path) for each in (prior, stack, gone, making, made)}
    reach(store, stack, "r1", "running")  # another run finds the result as cached
    finish(store, "prior", 5)
    with lock(store, result_lock(*dataclasses.astuple(making))):
        deleted = garbage.delete(store, listed)
    assert [each.path for each in deleted if each.path.count("/") == 2] == ["/".join(gone.path)]
    assert store.exists(*stack.record) and store.exists(*prior.record) and store.exists(*prior.path, "model")
    assert store.exists(*making.path) and store.exists(*made.record) and not store.exists(*gone.path)
    assert tables.read(table, old)["key"].to_pylist() == ["a"]


@pytest.mark.parametrize("number", [3, 9])
def test_killed_runs_of_this_machine_are_asked_once_however_much_garbage_there_is(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for index in range(number):
        finish(store, "prior", index)
        store.write_json(
            {"pipeline": "tiny", "state": "running", **driver(), "pid": child.pid}, "runs", f"r{index}", "run.json"
        )
    silent = {"pipeline": "tiny", "state": "running", "host": "elsewhere", "pid": 1}
    store.write_json(silent, "runs", "silent", "run.json")
    listed, asked, real = garbage.find(store, [], -1), list[str](), Store.read_json
    assert len(listed) == number

    def read_json(self: Store, *path: str) -> Any:
        asked.append(path[1])
        return real(self, *path)

    monkeypatch.setattr(Store, "read_json", read_json)
    assert len(garbage.delete(store, listed)) == number
    times = number + 1  # before each folder, and before the parts of tables
    assert {run: asked.count(run) for run in asked} == {"silent": times} | {f"r{index}": 1 for index in range(number)}


def test_f131_nothing_is_deleted_once_another_owner_has_taken_over(store: Store) -> None:
    table = store.uri("images", "recipe")
    tables.append_files(table, [], pa.schema({"key": pa.string()}))
    part = tables.write_part(table, "orphan", pa.table({"key": ["a"]}))
    gone = finish(store, "prior", 1)
    listed = garbage.find(store, [], -1)
    held = Held(1, was_given_back=True)
    held.lost.set()
    for some in (listed, [each for each in listed if each.path.startswith("images")]):
        with pytest.raises(AlreadyRunningError, match="taken over"):
            garbage.delete(store, some, held)
    item = Item(store.uri(*gone.path, "model", "model.safetensors"), 0, "", "", folder=gone)
    with pytest.raises(AlreadyRunningError, match="taken over"):
        verification.drop(store, [Problem(item, "damaged")], held)
    assert (
        store.exists("images", "recipe", part.name) and store.exists(*gone.record) and store.exists(*gone.path, "model")
    )


def test_f131_an_mlflow_that_does_not_answer_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri, reason in (
        (f"sqlite:///{store.root}/gone.db", "gone.db does not exist"),
        ("http://user:secret@127.0.0.1:9", "Connection refused"),
    ):
        with pytest.raises(StorageError, match="does not tell its registered versions") as caught:
            garbage.find(store, [uri], 0)
        message, shown = str(caught.value), uri.replace("user:secret@", "")
        assert reason in message and f"--without-mlflow {shown} if" in message and "secret" not in message


def test_parts_of_needed_versions_stay(store: Store) -> None:
    table, rows = store.uri("images", "recipe"), pa.table({"key": ["a"]})
    parts = [tables.write_part(table, name, rows) for name in ("a", "b", "c", "orphan")]
    versions = [
        tables.append_files(table, [part], rows.schema, removed=[before])
        for part, before in zip(parts[:3], ("", "a.parquet", "b.parquet"), strict=True)
    ]
    assert set(found(store)) == {f"images/recipe/{name}.parquet" for name in ("a", "b", "orphan")}
    finish(store, "filter", 1, {"images": table, "images_version": versions[1], "index_version": 0}, run="r1")
    gone = {path for path in found(store) if path.startswith("images")}
    assert gone == {f"images/recipe/{name}.parquet" for name in ("a", "orphan")}
    garbage.delete(store, find(store))
    assert tables.read(table)["key"].to_pylist() == ["a"] == tables.read(table, versions[1])["key"].to_pylist()
    assert [path.name for path in sorted(Path(table).glob("*.parquet"))] == ["b.parquet", "c.parquet"]


def test_only_the_last_name_of_a_file_frees_its_bytes(store: Store) -> None:
    first, second = finish(store, "prior", 1), finish(store, "publish", 2)
    names = [store.uri(*each.path, "model", "model.safetensors") for each in (first, second)]
    files.write(names[0], bytes(1000))
    files.copy(names[0], names[1])
    assert sum(each.size for each in find(store)) == 1000 + 2 * len("{}")
    reach(store, first, "r1")
    assert sum(each.size for each in find(store)) == 2 * len("{}")


def test_nothing_is_garbage_while_a_record_is_damaged(store: Store) -> None:
    done = finish(store, "prior", 1)
    uri = Path(store.uri(*done.record))
    uri.write_text(uri.read_text().replace('"digest": "1"', '"digest": "2"'))
    with pytest.raises(DamagedError, match="what it needs is not known"):
        found(store)


def test_the_age_of_a_folder_is_that_of_its_newest_file(store: Store) -> None:
    done = finish(store, "prior", 1)
    for path in Path(store.root).rglob("*"):
        os.utime(path, (0, 0))
    assert "/".join(done.path) in found(store, days=1)
    files.write(store.uri(*done.path, "curve.tsv"), b"")
    assert "/".join(done.path) not in found(store, days=1)


KILL = """
import itertools, os, shutil, signal, sys
import deltalake
from tasks import garbage
from tasks.store import Store

def collect(storage, number):
    left = iter(range(number))

    def kill(event, _):
        if event in ("os.remove", "os.rmdir", "os.rename") and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    store = Store(storage)
    found = garbage.find(store, [], 0)
    sys.addaudithook(kill)
    garbage.delete(store, found)

for number in itertools.count():
    copy = shutil.copytree(sys.argv[1], f"{sys.argv[2]}/{number:03d}")
    child = os.fork()
    if not child:
        collect(copy, number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""
"""Collects the garbage of copies of a storage; each process is killed one deletion or rename later than the one before."""


def test_f82_killed_at_any_deletion_nothing_half_deleted_looks_finished_and_the_next_one_frees_the_rest(
    store: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new, unfinished = finish(store, "prior", 1, run="r1"), finish(store, "prior", 2, run="r2"), folder("prior", 3)
    files.write(store.uri(*unfinished.path, "checkpoints", "1", "manifest.json"), b"{}")
    for each in (new, unfinished):
        for rank in range(6):
            files.write(store.uri(*each.path, "checkpoints", "1", f"rank-{rank}"), b"weights")
    for done in (old, new):
        seals.cover(store.uri(*done.path))
    table, rows = store.uri("images", "recipe"), pa.table({"key": ["a"]})
    parts = [tables.write_part(table, name, rows) for name in ("a", "b", "orphan")]
    for part, before in zip(parts[:2], ("", "a.parquet"), strict=True):
        tables.append_files(table, [part], rows.schema, removed=[before])
    assert len(find(store)) == 5
    copies = tmp_path_factory.mktemp("copies")
    command = [sys.executable, "-c", KILL, store.root, str(copies)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def content(root: Path) -> dict[str, bytes]:
        paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".tmp"]  # runs delete these
        found = {str(path.relative_to(root)): path.read_bytes() for path in paths}
        return {name: data for name, data in found.items() if not name.startswith("locks/")}

    whole, *killed, collected = content(Path(store.root)), *sorted(copies.iterdir())
    freed = content(collected)
    assert len(killed) > 15 and freed.keys() < whole.keys() and tables.read(str(collected / "images/recipe")).num_rows
    for number, path in enumerate(killed):
        copy, now = Store(str(path)), content(path)
        assert freed.keys() <= now.keys() <= whole.keys(), number
        states = {item.uri: verification.state_of(item) for item in verification.survey(copy)}
        assert not {"damaged", "missing"} & set(states.values()), (number, states)
        for name in whole.keys() - now.keys():
            done = folder("prior", int(name.split("/")[2], 16)) if name.startswith("artifacts/") else None
            assert done is None or "checkpoints" in name or not copy.exists(*done.record), (number, name)
            checkpoint = name.rpartition("/")[0]
            assert "checkpoints" not in name or f"{checkpoint}/manifest.json" not in now, (number, name)
        garbage.delete(copy, find(copy))
        assert content(path) == freed, number


@pytest.mark.parametrize("record", [True, False])
def test_of_a_link_in_the_place_of_a_result_the_link_alone_is_garbage(
    store: Store, record: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside, linked = tmp_path_factory.mktemp("outside"), folder("prior", 1)
    files.write(f"{outside}/a.json", b"{}")
    place = Path(store.uri(*linked.path))
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)
    if record:
        store.write_json({"stage": "prior", "facts": {}}, *linked.record)
    [listed] = garbage.find(store, [], -1)
    assert (listed.path, listed.num_files) == ("/".join(linked.path), 1)
    assert garbage.delete(store, [listed]) == [listed]
    assert not place.is_symlink() and not store.exists(*linked.record) and (outside / "a.json").exists()


@pytest.mark.parametrize("linked", ["artifacts", "artifacts/prior", "images", "images/recipe"])
def test_nothing_behind_a_link_is_garbage_but_in_folders_of_the_root_if_the_operator_says_so(
    store: Store, linked: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    done, table = finish(store, "prior", 1), store.uri("images", "recipe")
    tables.append_files(table, [], pa.schema({"key": pa.string()}))
    part = tables.write_part(table, "orphan", pa.table({"key": ["a"]}))
    before = garbage.find(store, [], -1)
    paths = {"/".join(done.path), f"images/recipe/{part.name}"}
    assert {each.path for each in before} == paths
    outside, place = tmp_path_factory.mktemp("outside") / "moved", Path(store.uri(linked))
    place.rename(outside)
    place.symlink_to(outside)
    followed = garbage.find(store, [], -1, follow_links=True)
    behind = {path for path in paths if path.startswith(linked)}
    assert {each.path for each in followed} == (paths if "/" not in linked else paths - behind)
    assert {each.path for each in garbage.find(store, [], -1)} == paths - behind
    with pytest.raises(DamagedError, match=re.escape(linked.partition("/")[0])):
        garbage.delete(store, [each for each in before if each.path in behind])
    assert all(store.exists(path) for path in paths)
    assert {each.path for each in garbage.delete(store, followed, follow_links=True)} == {
        each.path for each in followed
    }


def test_only_folders_with_the_name_of_a_result_are_garbage(store: Store) -> None:
    """A record named `...json` would be that of all of a stage, and a link to a home folder has other folders."""
    files.write(store.uri("artifacts", "documents", "thesis", "a.txt"), b"a")
    for name in ("...json", ".json"):
        store.write_json({"stage": "documents", "facts": {}}, "stages", "documents", name)
    assert garbage.find(store, [], -1) == []
