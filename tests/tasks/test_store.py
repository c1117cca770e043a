"""Storage roots, and records that do not depend on them."""

import re
from pathlib import Path
from typing import Any

import pytest

from tasks.store import Store
from unclip import files
from unclip.errors import ConfigError, DamagedError

FINGERPRINT, RECIPE = "5e" * 32, "a0" * 8


def record(root: str, elsewhere: str = "/else/where") -> dict[str, Any]:
    """Record of a stage with paths in all places where records have them."""
    folder = f"{root}/artifacts/clip/{FINGERPRINT}"
    return {
        "uri": f"{folder}/open_clip",
        "facts": {"model": f"local-dir:{folder}/open_clip", "pretrained": f"local-dir:{elsewhere}", "rows": {"in": 3}},
        "images": f"{root}/images/{RECIPE}",
        "models": [["prior", f"{folder}/model"], ["other", f"{elsewhere}/artifacts/prior/{FINGERPRINT}"]],
        "tracking_uri": f"sqlite:///{root}/mlflow.db",
        "storage": root,
        "unanswered": {f"sqlite:///{root}/mlflow.db": "locked"},
        "sibling": f"{root}-2/images",
        "caption": f"a path such as {root}/images",
        "seconds": 1.5,
        "none": None,
    }


ROOTS = ["/data/a", "/data/a b#c%d?é", "gs://bucket/prefix", "gs://bucket"]


@pytest.mark.parametrize("before", ROOTS)
@pytest.mark.parametrize("after", ["/mnt/elsewhere/deeper", "gs://other"])
def test_f70_a_portable_record_names_files_below_the_present_root(before: str, after: str) -> None:
    stored = Store(before).portable(record(before))
    kept = {"sibling": f"{before}-2/images", "caption": f"a path such as {before}/images"}
    assert stored["uri"] == f"storage://artifacts/clip/{FINGERPRINT}/open_clip" and stored["storage"] == "storage://"
    assert Store(before).resolve(stored) == record(before)
    assert Store(after).resolve(stored) == {**record(after), **kept}


@pytest.mark.parametrize("before", ROOTS)
def test_f70_a_record_of_an_earlier_release_names_files_below_the_present_root(before: str) -> None:
    kept = {"sibling": f"{before}-2/images", "caption": f"a path such as {before}/images"}
    assert Store("/mnt/new").resolve(record(before)) == {**record("/mnt/new"), **kept}


def test_f70_a_model_of_another_storage_stays_there() -> None:
    """Both in a record of this release and in one of an earlier release, where it has the form of an own path."""
    foreign = f"/other/artifacts/clip/{FINGERPRINT}/open_clip"
    pretrained = {"uri": f"local-dir:{foreign}", "facts": {"model": f"local-dir:{foreign}"}}
    assert (
        Store("/here").resolve(pretrained) == pretrained == Store("/here").resolve(Store("/here").portable(pretrained))
    )
    mixed = {"uri": f"/here/images/{RECIPE}", "reference": foreign}
    assert Store("/there").resolve(Store("/here").portable(mixed)) == {**mixed, "uri": f"/there/images/{RECIPE}"}


def test_f70_what_is_written_is_portable_and_what_is_read_is_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "before"))
    store.write_json({"uri": store.uri("images", RECIPE)}, "stages", "download", "f.json")
    assert files.read_json(store.uri("stages", "download", "f.json")) == {"uri": f"storage://images/{RECIPE}"}
    moved = Store(str((tmp_path / "before").rename(tmp_path / "after")))
    assert moved.read_json("stages", "download", "f.json") == {"uri": moved.uri("images", RECIPE)}


@pytest.mark.parametrize("name", ["a%20b", "100%25", "a\\b", "a\nb", "a%2Fb"])
def test_f69_a_folder_that_tables_cannot_be_kept_in_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)storage: got .* which Delta Lake reads as another character\. Rename the folder"
    ):
        Store(str(tmp_path / name))


@pytest.mark.parametrize(("name", "code"), [("a#b", "%23"), ("a?b", "%3F")])
def test_f69_an_object_store_uri_that_would_be_cut_is_refused(name: str, code: str) -> None:
    with pytest.raises(ConfigError, match=f"whose path ends at .*Write {code} instead"):
        Store(f"gs://bucket/{name}/prefix")


def test_f68_a_file_uri_is_the_same_storage_as_its_path(tmp_path: Path) -> None:
    root = tmp_path / "a b#c?é"
    assert Store(files.to_uri(str(root))).root == str(root) == Store(f"file://{root}").root
    assert Store("gs://bucket/a b/é").root == "gs://bucket/a%20b/%C3%A9" == Store("gs://bucket/a%20b/%C3%A9/").root


def test_links_in_a_storage_are_followed_in_its_root_alone(tmp_path: Path) -> None:
    """A user may have moved a folder of the root to another disk, and may name the storage by a link."""
    disk, root = tmp_path / "disk", tmp_path / "storage"
    for folder in (disk / "images", disk / "published", root / "runs"):
        folder.mkdir(parents=True)
    (root / "images").symlink_to(disk / "images")
    (tmp_path / "name").symlink_to(root)
    store = Store(str(tmp_path / "name"))
    store.check_links(deep=True)
    assert store.inside("images", "recipe", "a") == f"{root}/images/recipe/a"
    assert store.links() == {"images": str(disk / "images")}
    files.write(f"{disk}/published/a.json", b"theirs")
    (disk / "images" / "deeper").mkdir()
    for link, deep in (
        (root / "runs" / "r1", False),
        (disk / "images" / "recipe", False),
        (root / "runs" / "r" / "s", True),
    ):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(disk / "published")
        place = str(link).replace(str(disk), str(root))
        with pytest.raises(DamagedError, match=f"{re.escape(place)}/.*: leads to {disk}/published through a link"):
            store.check_links(deep)
        with pytest.raises(DamagedError):
            store.write_json({}, *Path(place).relative_to(root).parts, "a.json")
        link.unlink()
    (root / "published").mkdir()
    (root / "published" / "a.json").symlink_to(disk / "published" / "a.json")
    store.write_json({}, "published", "a.json")
    assert files.read(f"{disk}/published/a.json") == b"theirs" and store.read_json("published", "a.json") == {}
