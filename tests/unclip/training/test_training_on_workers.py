"""Training is the same for any workers, shards and micro-batches, and for any interruption (F41, F46, F47)."""

import functools
import json
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing

from tests.unclip.training import trained_on_workers
from tests.unclip.training.trained_on_workers import NUM_ROWS, End, losses, metrics, previews, run, run_rank_of_two
from unclip import files
from unclip.training import checkpoints, parallel
from unclip.training.checkpoints import MANIFEST
from unclip.training.trainer import HUNG, HUNG_EXIT_CODE

STEPS = 8
"""Steps of 16 samples; checkpoints after the third, the sixth and the last one."""


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


def test_ddp_and_fsdp_take_the_steps_of_one_worker_and_resume_from_each_other(tmp_path: Path) -> None:
    run(tmp_path, "alone")
    stop = End(before_step=4, kill=None)
    run(tmp_path, "one then two", end=stop)
    jobs: list[tuple[str, End | None, dict[str, Any]]] = [
        ("ddp", None, {"parallel": "ddp"}),
        ("fsdp", None, {"parallel": "fsdp"}),
        ("checkpointing", None, {"parallel": "fsdp", "activation_checkpointing": True}),
        ("one then two", None, {"parallel": "fsdp"}),
        ("two then one", stop, {"parallel": "fsdp"}),
        ("fsdp then ddp", stop, {"parallel": "fsdp"}),
        ("fsdp then ddp", None, {"parallel": "ddp"}),
    ]
    torch.multiprocessing.spawn(run_rank_of_two, (str(tmp_path), jobs), nprocs=2)
    run(tmp_path, "two then one")
    expected = losses(tmp_path, "alone")
    assert len(expected) == STEPS
    for name in {name for name, _, _ in jobs}:
        got = losses(tmp_path, name)
        assert [samples_seen for samples_seen, _ in got] == [samples_seen for samples_seen, _ in expected], name
        assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], abs=1e-5), name
        for key, value in weights(tmp_path, "alone").items():
            torch.testing.assert_close(weights(tmp_path, name)[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps_on_one_worker_and_in_shards(tmp_path: Path) -> None:
    """No block runs uncompiled because of the recompile limit."""
    limit = torch._dynamo.config.recompile_limit
    run(tmp_path, "plain")
    # torch's own way of restoring settings: undone by a monkeypatch, they are gone for the tests that follow
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        run(tmp_path, "compiled", compile=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > limit
    shards = {"compile": True, "parallel": "fsdp", "activation_checkpointing": True}
    assert trained_on_workers.attempt(tmp_path, 2, ("sharded", None, shards)) == 0
    plain, compiled, sharded = (
        [loss for _, loss in losses(tmp_path, name)] for name in ("plain", "compiled", "sharded")
    )
    assert len(compiled) == STEPS and compiled == pytest.approx(plain, abs=1e-3)
    assert sharded == pytest.approx(compiled, abs=1e-5)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    run(tmp_path, "kept")
    run(tmp_path, "recomputed", activation_checkpointing=True)
    assert losses(tmp_path, "kept") == losses(tmp_path, "recomputed")
    kept, recomputed = weights(tmp_path, "kept"), weights(tmp_path, "recomputed")
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_previews_change_nothing(tmp_path: Path) -> None:
    run(tmp_path, "one")
    run(tmp_path, "many", preview_samples=16)
    assert losses(tmp_path, "one") == losses(tmp_path, "many")
    assert state(tmp_path, "one") == state(tmp_path, "many")
    assert previews(tmp_path, "one") == [128] and previews(tmp_path, "many") == list(range(16, 129, 16))


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """Noise depends on the micro-batch, so another division changes the losses, but not their mean."""
    run(tmp_path, "whole", micro_batch_size=16)
    run(tmp_path, "quarters", micro_batch_size=4)
    whole, quarters = ([loss for _, loss in losses(tmp_path, name)] for name in ("whole", "quarters"))
    assert whole != quarters
    assert np.mean(whole) == pytest.approx(np.mean(quarters), rel=0.1)


def test_losses_are_reported_by_timestep_and_relative_to_predicting_the_mean(tmp_path: Path) -> None:
    run(tmp_path, "run", learning_rate=1e-9)  # an untrained network predicts zeros
    training = [values for values in metrics(tmp_path, "run") if "relative_loss" in values]
    assert [values["samples_seen"] for values in training] == [32, 64, 96, 128]
    buckets = {"loss_t_0000_0011", "loss_t_0012_0024", "loss_t_0025_0036", "loss_t_0037_0049"}
    for values in training:
        assert values["relative_loss"] == pytest.approx(1, abs=1e-6)
        assert buckets >= {name for name in values if name.startswith("loss_t_")} != set()


def test_validation_is_deterministic_and_changes_nothing(tmp_path: Path) -> None:
    for name, changes in (("still", {"learning_rate": 1e-9}), ("learning", {}), ("without", {"validation_rows": 0})):
        run(tmp_path, name, **changes)
    measured = {
        name: [values for values in metrics(tmp_path, name) if "validation_loss" in values]
        for name in ("still", "learning", "without")
    }
    assert [values["samples_seen"] for values in measured["still"]] == [48, 96, 128]
    assert len({values["validation_loss"] for values in measured["still"]}) == 1
    learned = [values["validation_loss"] for values in measured["learning"]]
    assert learned[2] < learned[0] < measured["still"][0]["validation_loss"]
    assert {"validation_relative_loss", "validation_loss_t_0000_0011"} <= set(measured["learning"][0])
    assert not measured["without"] and losses(tmp_path, "without") == losses(tmp_path, "learning")
    facts = files.read_json(f"{tmp_path}/learning/checkpoints/{16 * STEPS:012d}/facts.json")
    assert facts["validation_loss"] == learned[2]


def test_blocks_are_the_innermost_repeated_modules() -> None:
    linear = torch.nn.Linear(1, 1)
    nested = torch.nn.Sequential(torch.nn.ModuleList([linear]))
    assert parallel.blocks(torch.nn.Sequential(torch.nn.ModuleList([nested]))) == [linear]


class Kill(NamedTuple):
    """Point at which a worker of a training is killed."""

    world_size: int
    end: End | None = None
    """Death before a step of the loop, or"""
    failpoint: str = ""
    """at the write of a file: a regular expression for `files.failpoint`."""
    hang_seconds: float = 0
    """Seconds without progress after which a worker hangs; 0 for never."""


def kills(world_size: int) -> Iterator[tuple[str, Kill]]:
    """Yield kills by name: in the loop, and before, within and after the write of each file of a checkpoint."""
    last = world_size - 1
    for step in (1, 3, 4, 8):
        yield f"step {step}", Kill(world_size, End(step, last))
    for samples_seen in (48, 96, 128):
        for name in (f"rank-{last:05d}.safetensors", f"rank-{last:05d}.json", "facts.json", "manifest.json"):
            for moment in ("before", "within", "after") if samples_seen != 96 else ("within",):
                place = rf"^{moment} .*/checkpoints/{samples_seen:012d}/{re.escape(name)}"
                yield f"{moment} {samples_seen} {name}", Kill(world_size, failpoint=place)
    for moment in ("before", "after"):
        yield f"{moment} model", Kill(world_size, failpoint=rf"^{moment} .*/model/{MANIFEST}")


QUICK_KILLS = {
    1: {
        "step 4",
        "within 48 rank-00000.safetensors",
        "after 96 facts.json",
        "before 128 manifest.json",
        "before model",
    },
    2: {"step 4", "within 96 rank-00001.json"},
}
"""Kills in `make test`, by world size; `make test-slow` has all of them."""
KILLS = [
    pytest.param(kill, id=f"{world_size}: {name}", marks=() if name in QUICK_KILLS[world_size] else pytest.mark.slow)
    for world_size in (1, 2)
    for name, kill in kills(world_size)
]


def attempt(folder: Path, name: str, kill: Kill) -> int:
    changes = {"parallel": "fsdp" if kill.world_size > 1 else "ddp", "hang_seconds": kill.hang_seconds}
    return trained_on_workers.attempt(folder, kill.world_size, (name, kill.end, changes), folder / f"{name}-armed")


def state(folder: Path, name: str) -> list[str]:
    """sha256 of the tensor files of the last checkpoint and the model: weights, EMA weights, moments."""
    last = f"{folder}/{name}/checkpoints/{16 * STEPS:012d}"
    shards = [entry for entry in files.names(last) if entry.endswith(".safetensors")]
    paths = [*(f"{last}/{entry}" for entry in shards), f"{folder}/{name}/model/model.safetensors"]
    return [files.sha256(Path(path).read_bytes()) for path in paths]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """World size -> folder with `whole`, an uninterrupted training."""

    @functools.cache
    def train(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{world_size}-workers")
        trained_on_workers.reader(folder)
        assert attempt(folder, "whole", Kill(world_size)) == 0
        return folder

    return train


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_row_of_an_epoch_is_seen_once(uninterrupted: Callable[[int], Path], world_size: int) -> None:
    folder = uninterrupted(world_size)
    seen = [json.loads((folder / f"whole-{rank}.rows").read_text()) for rank in range(world_size)]
    share = 16 // world_size
    order = [row for step in range(STEPS) for rows in seen for row in rows[step * share : (step + 1) * share]]
    assert len(order) == 16 * STEPS
    for start in range(0, 16 * STEPS, NUM_ROWS):
        assert len(set(order[start : start + NUM_ROWS])) == NUM_ROWS


@pytest.mark.parametrize("kill", KILLS)
def test_f41_a_killed_training_resumes_to_the_same_losses_and_weights(
    uninterrupted: Callable[[int], Path], kill: Kill
) -> None:
    folder, name = uninterrupted(kill.world_size), uuid.uuid4().hex
    armed = folder / f"{name}-armed"
    armed.mkdir()
    if kill.failpoint:
        (armed / "here").write_text(kill.failpoint)
    assert attempt(folder, name, kill) == signal.SIGKILL
    assert not list(armed.iterdir()), "nothing was killed there"
    committed, before = last_checkpoint(folder, name), len(losses(folder, name))
    assert attempt(folder, name, Kill(kill.world_size)) == 0
    got, expected = losses(folder, name), dict(losses(folder, "whole"))
    assert all(expected[samples_seen] == loss for samples_seen, loss in got), "a loss differs"
    assert {samples_seen for samples_seen, _ in got} == set(expected)
    assert [samples_seen for samples_seen, _ in got[before:]] == list(range(committed + 16, 16 * STEPS + 1, 16))
    assert state(folder, name) == state(folder, "whole")


@pytest.mark.slow
def test_f46_a_hanging_worker_is_named_and_the_training_resumes_from_its_checkpoint(
    uninterrupted: Callable[[int], Path],
) -> None:
    folder, name = uninterrupted(2), uuid.uuid4().hex
    stop = End(5, rank=1, kill=signal.SIGSTOP, wait_seconds=5.0)  # workers write every 1.5 s
    assert attempt(folder, name, Kill(2, stop, hang_seconds=15)) == HUNG_EXIT_CODE
    message = files.read_json(f"{folder}/{name}/{HUNG}")["message"]
    assert re.fullmatch(
        r"no progress for 15 s: worker 1 \(process \d+ on .+\) does not respond; "
        r"its last sign of life was while taking a step after 64 samples\.",
        message,
    )
    assert attempt(folder, name, Kill(2, hang_seconds=60)) == 0
    assert state(folder, name) == state(folder, "whole")


def last_checkpoint(folder: Path, name: str) -> int:
    """Samples seen at the last committed checkpoint; 0 if there is none."""
    root = f"{folder}/{name}/checkpoints"
    return max((int(entry) for entry in files.names(root) if files.exists(f"{root}/{entry}/{MANIFEST}")), default=0)
