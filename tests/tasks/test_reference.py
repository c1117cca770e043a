"""References: computed once for a snapshot, known to garbage collection and verification, without rows that are taken down."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks import garbage, reference, tables, verification
from tasks.lineage.evaluations import blank_captions
from tasks.lineage.takedown import take_down
from tasks.reference import Reference, find_reference
from tasks.scoring import scores_table
from tasks.snapshots import Snapshot
from tasks.store import Store
from tasks.tombstones import Tombstone
from tests.tasks.lineage.test_takedown import make_store
from unclip import files, seals
from unclip.evaluation.distances import Statistics
from unclip.evaluation.intervals import mean_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Storage whose snapshot holds out all rows but the last."""
    made = make_store(tmp_path / "storage")
    listed = tables.read_file(made.uri("artifacts", "curate", "f", "heldout.parquet"))
    split = ["holdout"] * (listed.num_rows - 1) + ["train"]
    tables.write_file(snapshot_of(made).heldout, listed.append_column("split", pa.array(split)))
    return made


def snapshot_of(store: Store, digest: str = "d1" * 32) -> Snapshot:
    names = {field.name: "" for field in dataclasses.fields(Snapshot)}
    return Snapshot(**{**names, "digest": digest, "heldout": store.uri("artifacts", "curate", "f", "heldout.parquet")})  # type: ignore[arg-type]


class Measuring:
    """Features of rows, by their keys; counts its calls."""

    def __init__(self) -> None:
        self.measured: list[list[str]] = []

    def __call__(self, rows: pa.Table) -> torch.Tensor:
        keys = rows["key"].to_pylist()
        self.measured.append(keys)
        return features_of(keys)


def features_of(keys: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.random.default_rng(int(key, 16)).normal(size=3) for key in keys]))


def find(store: Store, measure: Measuring, digest: str = "d1" * 32, features: str = "some") -> Reference:
    found = find_reference(store, snapshot_of(store, digest), features, measure)
    assert found is not None
    return found


def same(one: Statistics, other: Statistics) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_is_computed_once_for_a_snapshot_and_its_features(store: Store) -> None:
    measure = Measuring()
    first = find(store, measure)
    assert len(measure.measured) == 1 and len(measure.measured[0]) == 11, "training rows are no reference"
    assert first.num_images == 11 and same(first.statistics, Statistics.of(features_of(measure.measured[0])))
    again = find(store, measure)
    assert len(measure.measured) == 1 and again.uri == first.uri and same(again.statistics, first.statistics)
    find(store, measure, digest="d2" * 32)
    find(store, measure, features="others")
    assert len(measure.measured) == 3


def test_a_few_held_out_rows_are_no_reference(store: Store) -> None:
    snapshot = snapshot_of(store)
    tables.write_file(snapshot.heldout, tables.read_file(snapshot.heldout).slice(10))  # one is held out
    assert find_reference(store, snapshot, "some", Measuring()) is None
    assert not store.list("artifacts", "reference")


def test_verification_covers_it_and_garbage_collection_keeps_what_evaluations_name(store: Store) -> None:
    named, unnamed = find(store, Measuring()), find(store, Measuring(), features="others")
    record = {"stage": "evaluate", "uri": "", "digest": "", "facts": {"references": {"reference": {"uri": named.uri}}}}
    store.write_json(record, "stages", "evaluate", f"{'e' * 64}.json")
    files.write(store.uri("artifacts", "evaluate", "e" * 64, "heldout.png"), b"")
    summary = {"pipeline": "mine", "artifacts": {"evaluate": "e" * 64}}
    store.write_json(summary, "results", "mine", "summary.json")
    items = [item for item in verification.survey(store) if "/reference/" in item.uri]
    assert {verification.state_of(item) for item in items} == {"sound"} and len(items) == 2 * 6
    for path in Path(store.root).rglob("*"):
        if path.is_file():
            os.utime(path, (0, path.stat().st_mtime - 10))
    found = [each.path for each in garbage.find(store, [], 0) if "reference" in each.path]
    assert found == [unnamed.uri.removeprefix(f"{store.root}/")]
    statistics = Path(named.uri, "statistics", "statistics.safetensors")
    statistics.write_bytes(statistics.read_bytes()[:-1] + b"?")
    assert "damaged" in {verification.state_of(item) for item in items}


def test_f145_a_takedown_leaves_no_row_in_references_and_scores(store: Store) -> None:
    measure = Measuring()
    first = find(store, measure)
    [gone, *others] = measure.measured[0]
    groups = {"heldout": ["taken", "kept"], "unseen": ["taken"]}
    estimates = {group: {"score": mean_of(torch.ones(len(captions)))} for group, captions in groups.items()}
    keys = {"heldout": {"taken": gone, "kept": others[0]}}
    folder = store.uri("artifacts", "evaluate", "e" * 64)
    tables.write_file(f"{folder}/scores.parquet", scores_table(groups, estimates, keys))
    seals.cover(folder)
    take_down(store, [Tombstone("key", others[-1])], None, [])  # the last held-out row
    assert not store.list("artifacts", "reference") and not store.list("stages", "reference")
    assert "taken" in tables.read_file(f"{folder}/scores.parquet")["caption"].to_pylist()
    second = find(store, measure)
    assert second.uri == first.uri and measure.measured[1] == [gone, *others[:-1]]

    take_down(store, [Tombstone("key", gone)], None, [])
    scores = tables.read_file(f"{folder}/scores.parquet")
    assert scores["caption"].to_pylist() == ["", "kept", "taken"], "prompts that are no row's stay"
    assert scores["score"].to_pylist() == [1, 1, 1] and scores["index"].to_pylist() == [0, 1, 0]
    states = {verification.state_of(item) for item in verification.survey(store) if "/evaluate/" in item.uri}
    assert states <= {"sound"}
    third = find(store, measure)
    assert third.num_images == 9 and same(third.statistics, Statistics.of(features_of(others[:-1])))
    take_down(store, [Tombstone("domain", "nowhere.example.org")], None, [])
    assert same(find(store, measure).statistics, third.statistics) and len(measure.measured) == 3


def test_f145_a_row_that_is_taken_down_while_it_is_measured_does_not_stay(store: Store) -> None:
    measure = Measuring()

    def meanwhile(rows: pa.Table) -> torch.Tensor:
        if not measure.measured:
            take_down(store, [Tombstone("key", rows["key"][3].as_py())], None, [])
        return measure(rows)

    found = find_reference(store, snapshot_of(store), "some", meanwhile)
    assert found is not None and [len(keys) for keys in measure.measured] == [11, 10]
    assert same(found.statistics, Statistics.of(features_of(measure.measured[1])))
    assert store.list("artifacts", reference.REFERENCE) == store.list("artifacts", "reference")


def test_scores_without_the_rows_stay_as_they_are(store: Store) -> None:
    folder = store.uri("artifacts", "evaluate", "e" * 64)
    table = scores_table({"unseen": ["a"]}, {"unseen": {"score": mean_of(torch.ones(1))}})
    tables.write_file(f"{folder}/scores.parquet", table)
    before = files.stamp(f"{folder}/scores.parquet")
    blank_captions(folder, frozenset({"0" * 32}))
    blank_captions(folder, frozenset())
    blank_captions(store.uri("artifacts", "evaluate", "none"), frozenset({"0" * 32}))
    assert files.stamp(f"{folder}/scores.parquet") == before
