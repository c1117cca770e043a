"""`unclip verify --drop` on a small storage."""

from pathlib import Path

import pytest

from tasks import tables
from tasks.lock import lock
from tasks.store import Store
from tests.pipelines.command_line import call, call_json
from tests.tasks.datasets import key, write_images
from tests.unclip.damage import flip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    write_images(store.root, [{"key": key(1), "url": "http://a"}], [{"key": key(2), "url": "http://b"}])
    return store


def test_f78_damage_is_dropped_once_and_the_rest_stays(store: Store) -> None:
    assert call_json("verify", "--storage", store.root)["problems"] == []
    part = Path(store.uri("images", "recipe", "part0.parquet"))
    flip(part, 4 * part.stat().st_size)
    [problem] = call_json("verify", "--storage", store.root, code=1)["problems"]
    assert problem["problem"] == "damaged" and problem["file"] == str(part) and not problem["is_dropped"]
    with lock(store):
        assert call("verify", "--drop", "--storage", store.root).returncode == 75
    result = call("verify", "--drop", "--storage", store.root)
    assert result.returncode == 1 and "part of the table images/recipe (dropped)" in result.stdout
    document = call_json("verify", "--storage", store.root)
    assert document["problems"] == [] and document["bytes"] > 0
    assert tables.read(store.uri("images", "recipe"))["key"].to_pylist() == [key(2)]


def test_f79_a_file_that_no_run_makes_again_is_not_dropped(store: Store) -> None:
    store.write_json({"requests": []}, "takedowns", "20260101-120000.json")
    path = Path(store.uri("takedowns", "20260101-120000.json"))
    path.write_bytes(path.read_bytes()[:-1])
    [problem] = call_json("verify", "--drop", "--storage", store.root, code=1)["problems"]
    assert not problem["is_dropped"] and problem["remedy"] == "restore it from a copy" and path.exists()


def test_f130_a_file_that_cannot_be_read_is_reported_and_not_dropped(store: Store) -> None:
    part = Path(store.uri("images", "recipe", "part0.parquet"))
    manifest = Path(store.uri("images", "recipe", "manifest.json"))
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # reading it is an input/output error
    [problem] = call_json("verify", "--drop", "--storage", store.root, code=1)["problems"]
    assert problem["problem"] == "unreadable" and problem["file"] == str(manifest) and not problem["is_dropped"]
    assert manifest.is_symlink() and part.exists()
