"""Promotion: decisions about candidates, records, and two promotions at once."""

import dataclasses
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks import promotion, published
from tasks.promotion import Decision, PromotionConfig, compare
from tasks.published import Entry, Record
from tasks.scoring import Measured
from tasks.store import Store
from tests.tasks.publications import CAPTIONS, A, B, C, D, Storage, scores
from unclip.errors import ConfigError, InputError
from unclip.evaluation import scenes
from unclip.evaluation.metrics import Features, score_scenes


@pytest.mark.parametrize("metrics", [(), ("accuracy.all", "clip_score")])
def test_f150_worse_and_equal_candidates_are_refused_and_better_ones_promoted(metrics: tuple[str, ...]) -> None:
    """20 seeds: no wrong decision."""
    config = PromotionConfig(metrics)
    for seed in range(20):
        champion, worse, bad, better = scores(seed, 0.85, 0.7, 0.0, 0.95)
        for candidate, is_better, words in (
            (worse, False, "worse than the champion: accuracy.all "),
            (bad, False, "worse than the champion: accuracy.all 0.000"),
            (champion, False, "not clearly better than the champion: accuracy.all "),
            (better, True, "better than the champion: "),
        ):
            decision = compare(candidate, champion, config)
            assert decision.is_better == is_better and decision.reason.startswith(words), decision.reason


def test_f150_few_of_many_models_that_are_equal_but_for_chance_are_promoted() -> None:
    """0.5 % are expected to be; each model is another training with the same rate."""
    wins = 0
    for seed in range(100):
        champion, candidate = scores(seed, 0.9, 0.9)
        rng = np.random.default_rng(1000 + seed)
        shaken = [pa.array((rng.random(CAPTIONS) < 0.9).astype(np.float32)) for _ in range(2)]
        place = champion.column_names.index("accuracy.all")
        pair = [
            each.set_column(place, "accuracy.all", new) for each, new in zip((candidate, champion), shaken, strict=True)
        ]
        wins += compare(*pair, PromotionConfig()).is_better
    assert wins <= 3


def test_the_metric_is_accuracy_where_captions_are_scenes_and_the_clip_score_elsewhere() -> None:
    champion, better = scores(0, 0.5, 0.9)
    assert list(compare(better, champion, PromotionConfig()).differences) == ["accuracy.all"]
    unknown = pa.nulls(CAPTIONS, pa.float32())
    no_scenes = [table.set_column(2, "accuracy.all", unknown) for table in (better, champion)]
    assert list(compare(*no_scenes, PromotionConfig()).differences) == ["clip_score"]
    refused = compare(better, champion, PromotionConfig(("aesthetics",)))
    assert not refused.is_better and "has no aesthetics, only accuracy.all, clip_score" in refused.reason


def test_f150_images_that_could_differ_by_chance_decide_nothing() -> None:
    """Seven images that are all better have an interval above zero, but a probability of 1 in 64 under equal models."""
    champion, candidate = scores(0, 0.0, 0.0)
    right = pa.array([1.0] * 7 + [0.0] * (CAPTIONS - 7), pa.float32())
    assert compare(candidate.set_column(2, "accuracy.all", right), champion, PromotionConfig()).reason.startswith(
        "too few images differ, 7 of the 8 needed"
    )
    one, other = scores(0, 1.0, 0.0, count=1)
    assert "fewer than 2 captions" in compare(one, other, PromotionConfig()).reason


def test_invalid_conditions_are_refused_before_anything_starts() -> None:
    conditions = ({"confidence": 1.0}, {"confidence": 0.2}, {"minima": {"accuracy.all": float("nan")}})
    for wrong in (*conditions, {"metrics": ("clip_score", "swapped.colour")}):
        with pytest.raises(ConfigError, match="promotion"):
            PromotionConfig(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(Store(str(tmp_path)))


def test_a_challenger_becomes_champion_when_it_is_better(storage: Storage) -> None:
    champion, worse, better = scores(1, 0.8, 0.5, 0.95)
    first = storage.publish(A, champion)
    assert (first.alias, first.entry.reason) == ("champion", "the first champion")
    second = storage.publish(B, worse)
    assert second.alias == "challenger" and "worse than version aaaaaaaa: accuracy.all 0.500 against 0.797" in str(
        second.entry.reason
    )
    again = storage.publish(A, champion)
    assert again.alias == "champion" and again.entry.reason == "the first champion", "it stays what it is"
    assert [entry.digest for entry in storage.record().versions] == [A, B]
    third = storage.publish(C, better)
    assert third.alias == "champion"
    record = storage.record()
    assert record.champion == third.entry and record.challenger is not None and record.challenger.digest == B
    assert record.former == (A,) and {entry.digest for entry in record.needed()} == {A, B, C}
    assert record.is_ahead, "MLflow has not followed"


def test_minima_hold_for_the_first_version_too(tmp_path: Path) -> None:
    storage = Storage(Store(str(tmp_path)), PromotionConfig(minima={"accuracy.all": 0.6}))
    bad, good = scores(2, 0.1, 0.9)
    outcome = storage.publish(A, bad)
    assert outcome.alias == "challenger" and storage.record().champion is None
    assert "accuracy.all is 0.10" in str(outcome.entry.reason) and "below the minimum 0.6" in str(outcome.entry.reason)
    assert storage.publish(B, good).alias == "champion"
    forced = dataclasses.replace(storage, config=PromotionConfig(always=True))
    assert forced.publish(A, bad).alias == "champion", "a challenger is promoted by its second publication"
    unknown = dataclasses.replace(storage, config=PromotionConfig(minima={"beauty": 1.0}))
    assert unknown.publish(C, good).entry.reason == "beauty is not measured, below the minimum 1"


def test_f153_a_champion_that_cannot_be_compared_with_is_told(storage: Storage) -> None:
    champion, better = scores(3, 0.5, 0.9)
    storage.publish(A, champion)
    larger = dataclasses.replace(storage.record().versions[0], image_size=128)
    published.write(storage.store, storage.record().with_version(larger))
    other_size = storage.publish(B, better)
    assert other_size.alias == "challenger"
    assert "cannot be compared with version aaaaaaaa: its images have 128 pixels, those of the candidate 64" in str(
        other_size.entry.reason
    )
    published.write(storage.store, storage.record().with_version(dataclasses.replace(larger, image_size=64)))
    for path in Path(storage.store.root, "scores").glob(f"{larger.scores}*"):
        path.unlink()
    damaged = storage.publish(B, better)
    assert damaged.alias == "challenger" and "has no system or no manifest.json" in str(damaged.entry.reason)
    Path(larger.stack, "stack.json").unlink()
    gone = storage.publish(B, better)
    assert gone.alias == "champion" and "takes the place of version aaaaaaaa, which is gone" in str(gone.entry.reason)


def test_f145_a_caption_that_was_taken_down_counts_for_neither_model(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It describes no scene, but the champion has an accuracy for the others, of the same noise."""
    captions = [
        scenes.caption(scene, rng) for rng in [np.random.default_rng(0)] for scene in [scenes.random_scene(rng)]
    ]
    better = scores(6, 0.95)[0]
    better = better.set_column(1, "caption", pa.array(["", "", *captions * (CAPTIONS - 2)]))
    sampled: list[str] = []

    def sample(groups: dict[str, list[str]], *_: Any) -> dict[str, Measured]:
        sampled.extend(groups["heldout"])
        embedding = torch.ones(CAPTIONS, 1)
        measured = score_scenes(torch.zeros(CAPTIONS, 3, 16, 16), groups["heldout"])
        return {"heldout": Measured(Features(embedding, embedding, measured), [], np.zeros((1, 64, 64, 3), np.uint8))}

    monkeypatch.setattr(promotion, "sample_groups", sample)
    monkeypatch.setattr(promotion, "_stack_of", lambda *_: None)
    storage.publish(A, scores(6, 0.5)[0])
    outcome = storage.publish(B, better)
    assert sampled == captions * CAPTIONS
    assert outcome.alias == "champion" and f"on {CAPTIONS - 2} captions" in str(outcome.entry.reason)


ROUNDS = 6


def promote_in_rounds(root: str, digest: str, barrier: Any) -> None:
    """Publish one version under several names, each time at the same moment as another thread or process does another."""
    better = scores(4, 0.9)[0]
    for number in range(ROUNDS):
        Storage(Store(root), name=f"model{number}").publish(digest, better, lambda _: barrier.wait(60) and None)


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_f152_of_two_promotions_at_once_one_wins(tmp_path: Path, kind: str) -> None:
    """Both are better than the champion, and equal. None is lost, and the other one is compared with the winner."""
    for number in range(ROUNDS):
        Storage(Store(str(tmp_path)), name=f"model{number}").publish(A, scores(4, 0.5)[0])
    context = multiprocessing.get_context("spawn")
    barrier: Any = threading.Barrier(2) if kind == "thread" else context.Barrier(2)
    start: Any = threading.Thread if kind == "thread" else context.Process
    other = start(target=promote_in_rounds, args=(str(tmp_path), B, barrier))
    other.start()
    promote_in_rounds(str(tmp_path), C, barrier)
    other.join(120)
    assert not other.is_alive()
    for number in range(ROUNDS):
        record = Storage(Store(str(tmp_path)), name=f"model{number}").record()
        assert record.champion is not None and record.challenger is not None
        assert {record.champion.digest, record.challenger.digest} == {B, C} and record.former == (A,)
        assert f"not clearly better than version {record.champion.digest[:8]}" in str(record.challenger.reason)


def test_f151_rollback_goes_back_one_champion_at_a_time(storage: Storage) -> None:
    rates = scores(5, 0.2, 0.4, 0.6, 0.95)
    for digest, table in zip((A, B, C, D), rates, strict=True):
        assert storage.publish(digest, table).alias == "champion"
    record = storage.record()
    for digest in (C, B, A):
        record = record.roll_back("by hand")
        assert record.champion is not None and record.champion.digest == digest
    with pytest.raises(InputError, match="model: has had no champion before"):
        record.roll_back("by hand")
    published.write(storage.store, record)
    assert storage.publish(D, rates[3]).alias == "champion", "what was rolled back may come again"
    assert storage.record().former == (A,)


def test_f154_a_record_of_an_earlier_release_is_a_champion(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stack = store.uri("artifacts", "publish", A * 4, "stack")
    store.write_json({"stack": stack, "digest": A, "at": 5.0}, "published", "model.json")
    record = published.read(store, "model")
    assert record.champion == Entry(stack, A, 5.0) and record.versions == (record.champion,) and record.former == ()
    published.write(store, record)
    assert published.read(store, "model") == record and store.read_json("published", "model.json")["stack"] == stack
    assert published.read(store, "none") == Record("none") and published.names(store) == ["model"]


def test_versions_are_found_by_number_and_by_digest() -> None:
    record = Record("model", (Entry("", A, 1.0, "1"), Entry("", B, 2.0, "2"), Entry("", "2" + C, 3.0)))
    found = {label: record.named(label) for label in ("2", "bbbbbb", "bbb", "2ccccc", "7")}
    assert {label: entry and entry.digest for label, entry in found.items()} == {
        "2": B,
        "bbbbbb": B,
        "bbb": None,
        "2ccccc": "2" + C,
        "7": None,
    }


def test_scores_of_versions_that_only_a_registry_has_stay_apart() -> None:
    one, other = (Entry("", f"a-name-that-is-long/{number}", 1.0).scores for number in (1, 2))
    assert one != other and "/" not in one


def test_a_decision_needs_no_number_of_the_registry() -> None:
    assert Entry("", A, 1.0).label == "aaaaaaaa" and Entry("", A, 1.0, "3").label == "3"
    assert Decision(True, "better").differences == {}
