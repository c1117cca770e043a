"""Derived tables: one row for each kept row, made once, in step with the images, and known to all who tidy a storage."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks import derived, garbage, references, tables, verification
from tasks.derived import Derivation, DerivedTable, derive
from tasks.lineage.provenance import find_row
from tasks.lineage.takedown import parse, take_down
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Failure, Output, Resources, Run, StageContext, execute, stage
from tasks.stages.train import SnapshotInputs, TablesRead
from tasks.store import Store
from tasks.tracking import Tracker
from tests.tasks.datasets import kept_selection, key, write_folder, write_images, write_kept_places
from unclip import files
from unclip.data import RowReader, half_bytes
from unclip.errors import InputError, NonFiniteError
from unclip.training.batches import stack_halves
from unclip.training.parallel import ALONE

NUM_ROWS = 24
LONG = 25
"""Length of the caption that the encoder refuses while a file `refuse` exists."""
BATCH = 5


class Lengths:
    """Encoder whose rows tell the length of the caption and of the image; logs its calls."""

    def __init__(self, folder: str, extra: int) -> None:
        self.folder, self.extra = Path(folder), extra

    def encode(self, rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        assert len(rows["caption"]) == len(rows["jpg"]) == BATCH
        if LONG in map(len, rows["caption"]) and (self.folder / "refuse").exists():
            raise InputError("refused")
        (self.folder / "calls").open("a").write("x")
        pairs = [(len(caption), len(jpg)) for caption, jpg in zip(rows["caption"], rows["jpg"], strict=True)]
        return {"lengths": [half_bytes(np.array(pair)) for pair in pairs] + [b""] * self.extra}


def load_lengths(folder: str, extra: int, device: torch.device) -> Lengths:
    return Lengths(folder, extra)


SCHEMA = pa.schema({"key": pa.string(), "lengths": pa.binary()})


@dataclasses.dataclass(frozen=True)
class LengthsConfig:
    folder: str
    extra: int = 0


@stage("lengths", version=1, has_workers=True)
def lengths(context: StageContext, config: LengthsConfig, dataset: Artifact) -> Output:
    """Measure captions and images."""
    load = functools.partial(load_lengths, config.folder, config.extra)
    table, count = derive(context, dataset, Derivation("lengths", SCHEMA, ("caption", "jpg"), load, ("v1",), BATCH))
    return Output(table.derived, dataset.digest, {**dataclasses.asdict(table), "derived_now": count})


def write_rows(store: Store) -> dict[str, Any]:
    """Images table of two files, even and odd rows; row n has a caption of n + 2 letters and an image of 2 n + 1 bytes."""
    return write_images(
        store.root,
        *(
            [
                {
                    "key": key(n),
                    "url": f"https://a.example/{n}",
                    "caption": "a" * (n + 2),
                    "status": "ok",
                    "sha256": f"{n:064x}",
                    "jpg": b"j" * (2 * n + 1),
                }
                for n in range(start, NUM_ROWS, 2)
            ]
            for start in (0, 1)
        ),
    )


def dataset_of(store: Store, images: Mapping[str, Any], kept: Sequence[int], digest: str) -> Artifact:
    """Artifact of a snapshot with these rows; every fourth is held out. It reads no embeddings."""
    root = store.uri("artifacts", "curate", digest)
    splits = {key(n): "holdout" if n % 4 == 0 else "train" for n in kept}
    selection = write_folder(f"{root}/selection", kept_selection(splits))
    names = {field.name: "" for field in dataclasses.fields(Snapshot)}
    snapshot = {**names, **images, "digest": digest, "selection": selection, "embeddings_version": 0}
    snapshot["places"] = write_kept_places(root, selection, images)
    facts = {"rows": {"in": NUM_ROWS, "kept": len(kept), "dropped": 0, "failed": 0}, "snapshot": snapshot}
    artifact = Artifact("curate", digest, selection, digest, facts, 0.0)
    store.write_json(dataclasses.asdict(artifact), "stages", "curate", f"{digest}.json")
    return artifact


def run_stage(store: Store, dataset: Artifact, extra: int = 0) -> Artifact | Failure:
    run = Run("r", "p", store.root, Tracker("", ""), "", {"lengths": Resources(1, 1)})
    return execute(Call(lengths, LengthsConfig(str(Path(store.root).parent), extra)), run, [dataset])


def num_calls(store: Store) -> int:
    calls = Path(store.root).parent / "calls"
    return len(calls.read_text()) if calls.exists() else 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "storage"))


def made(store: Store, dataset: Artifact) -> Artifact:
    result = run_stage(store, dataset)
    assert isinstance(result, Artifact), result
    return result


def read_all(dataset: Artifact, artifact: Artifact, split: Any) -> list[tuple[str, list[float], int]]:
    """Key, derived numbers and size of the image of all rows of a split, as a training reads them."""
    read = TablesRead.of(Snapshot.of(dataset.facts), {"lengths": artifact})
    reader = RowReader((read.source("lengths", "lengths"), read.source("images", "jpg")), read.open_places(split))
    batch = reader.read(np.arange(len(reader)))
    numbers = stack_halves(batch["lengths"], 2).tolist()
    return list(zip(batch["key"], numbers, map(len, batch["jpg"]), strict=True))


@pytest.mark.usefixtures("cluster")
def test_rows_are_made_once_and_read_beside_the_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "COMMIT_SECONDS", 0.0)
    images = write_rows(store)
    first = dataset_of(store, images, range(0, NUM_ROWS, 3), "a" * 64)
    (Path(store.root).parent / "refuse").touch()
    whole = dataset_of(store, images, range(NUM_ROWS), "b" * 64)

    some = made(store, first)
    assert some.facts["derived_now"] == 8
    assert read_all(first, some, "train") == [(key(n), [n + 2, 2 * n + 1], 2 * n + 1) for n in (6, 18, 3, 9, 15, 21)], (
        "in the order of the images"
    )

    calls = num_calls(store)
    assert calls == 2, "4 rows of each file, in one batch"
    failed = run_stage(store, whole)  # one of the last rows is refused
    assert isinstance(failed, Failure) and "refused" in failed.message
    (Path(store.root).parent / "refuse").unlink()
    assert num_calls(store) - calls == 3, "both batches of the first file, and one of the second"
    second = made(store, whole)
    assert num_calls(store) - calls == 5, "only the second file's batches again"
    assert second.facts["derived_now"] == 8, "the part of the failed attempt was committed"
    found = {row[0]: row[1:] for split in ("train", "holdout") for row in read_all(whole, second, split)}
    assert found == {key(n): ([n + 2, 2 * n + 1], 2 * n + 1) for n in range(NUM_ROWS)}
    assert read_all(first, some, "train")[0] == (key(6), [8, 13], 13), (
        "the version of the first snapshot stays readable"
    )

    inputs = SnapshotInputs(ALONE, Snapshot.of(whole.facts), (), {"lengths": second})
    assert stack_halves(inputs.sample_rows("lengths", ("lengths",), 3)["lengths"], 2).shape == (3, 2)
    assert inputs.facts("lengths")["derived"] == second.uri


@pytest.mark.usefixtures("cluster")
def test_previews_show_held_out_rows_with_what_was_made_of_them(store: Store) -> None:
    images = write_rows(store)
    dataset = dataset_of(store, images, range(NUM_ROWS), "a" * 64)
    artifact = made(store, dataset)
    rows = {n: divmod(n, 2)[::-1] for n in (20, 4, 8)}  # file and row of the images
    shown = pa.table(
        {
            "key": [key(n) for n in rows],
            "split": ["holdout"] * 3,
            **{
                f"images_{name}": [place[index] for place in rows.values()]
                for index, name in enumerate(("file", "row"))
            },
        }
    )
    heldout = f"{store.root}/heldout.parquet"
    tables.write_file(heldout, shown)
    snapshot = dataclasses.replace(Snapshot.of(dataset.facts), heldout=heldout)
    read = TablesRead.of(snapshot, {"lengths": artifact})
    inputs = SnapshotInputs(ALONE, snapshot, (read.source("lengths", "lengths"),), {"lengths": artifact})
    preview = inputs.preview_rows()
    assert preview["key"] == [key(n) for n in rows]
    assert stack_halves(preview["lengths"], 2)[:, 0].tolist() == [n + 2 for n in rows]


@pytest.mark.usefixtures("cluster")
def test_an_encoder_that_returns_another_number_of_rows_writes_nothing(store: Store) -> None:
    dataset = dataset_of(store, write_rows(store), range(NUM_ROWS), "a" * 64)
    failed = run_stage(store, dataset, extra=1)
    assert isinstance(failed, Failure) and "got 6 values of lengths for 5 rows" in failed.message
    assert not list(Path(store.root).glob("derived/*/*.parquet"))


@pytest.mark.usefixtures("cluster")
def test_a_takedown_deletes_what_was_made_of_a_row(store: Store) -> None:
    dataset = dataset_of(store, write_rows(store), range(NUM_ROWS), "a" * 64)
    artifact = made(store, dataset)
    [name] = store.list("derived")
    [place] = find_row(store, key(5)).derived
    assert place["table"] == name
    part = tables.read_file(f"{artifact.uri}/{place['part']}")
    assert part["key"][place["row"]].as_py() == key(5)
    orphan = pa.table({"key": [key(5)], "lengths": [half_bytes(np.array([5, 5]))]}, schema=SCHEMA)
    tables.write_part(artifact.uri, "part1-orphan", orphan)

    ledger = take_down(store, [parse("key", key(5))], None, [])
    assert ledger.deleted[f"derived/{name}"] == 1
    assert len(tables.read(artifact.uri)) == NUM_ROWS - 1
    left = list(Path(artifact.uri).glob("*.parquet"))
    assert not any(key(5) in tables.read_file(str(path))["key"].to_pylist() for path in left)
    assert find_row(store, key(5)).derived == ()

    images = {"images": dataset.facts["snapshot"]["images"]}
    images |= {"images_version": tables.version(images["images"])}
    images |= {"index_version": tables.version(images["images"].replace("/images/", "/index/"))}
    rest = dataset_of(store, images, [n for n in range(NUM_ROWS) if n != 5], "b" * 64)
    again = made(store, rest)
    assert again.facts["derived_now"] == 0 and len(read_all(rest, again, "train")) == 17


@pytest.mark.usefixtures("cluster")
def test_damage_is_found_and_dropped_and_unneeded_parts_are_garbage(store: Store) -> None:
    images = write_rows(store)
    dataset = dataset_of(store, images, range(NUM_ROWS), "a" * 64)
    artifact = made(store, dataset)
    [version] = [each for each in references.versions_in(artifact.facts) if each.kind == "derived"]
    assert version.number == artifact.facts["derived_version"]
    part = Path(tables.files(artifact.uri)[0])
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)
    items = verification.survey(store)
    states = verification.check_all(items, 1)
    problems = [
        verification.Problem(item, state)
        for item, state in zip(items, states, strict=True)
        if state in ("damaged", "missing")
    ]
    assert [problem.item.uri for problem in problems] == [str(part)]
    assert verification.drop(store, problems) == []
    assert not store.exists("stages", "lengths", f"{artifact.fingerprint}.json"), "its record refers to the part"
    again = made(store, dataset)
    assert again.facts["derived_now"] == 12 and len(read_all(dataset, again, "train")) == 18

    tables.remove_files(again.uri, [tables.files(again.uri)[0].rpartition("/")[2]])
    files.delete(store.uri(*references.Folder("lengths", again.fingerprint).record))
    found = [each.path for each in garbage.find(store, [], 0) if each.path.startswith("derived/")]
    assert len(found) == 1, "the part that the newest version and no record needs"


def test_half_precision_is_stored_as_bytes() -> None:
    values = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    rows = [half_bytes(value.numpy()) for value in values]
    assert torch.equal(stack_halves(rows, 2, 4), values.half().float())
    with pytest.raises(InputError, match="got a row of 16 bytes, expected 32"):
        stack_halves(rows, 2, 8)
    for bad in (70_000.0, float("nan")):
        with pytest.raises(NonFiniteError, match="at most 65,504"):
            half_bytes(np.array([1.0, bad]))


def test_places_of_other_rows_are_not_joined(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    images = write_rows(store)
    one, other = (
        Snapshot.of(dataset_of(store, images, kept, digest).facts)
        for kept, digest in ((range(1, 20), "a" * 64), (range(2, 21), "b" * 64))
    )
    assert len(one.open_places("train").beside([one.open_places("train")])) == 15
    with pytest.raises(InputError, match="Run the pipeline again"):
        one.open_places("train").beside([other.open_places("train")])
    with pytest.raises(InputError, match="row 11 of file 1 of images is not among"):
        other.open_places("train").find_rows("images", np.array([1]), np.array([11]))
    assert DerivedTable.of(Artifact("a", "", "", "", {}, 0.0)) is None
