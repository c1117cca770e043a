"""The trainer's promises hold for every part: exact resumption, any workers and shards, and the test of overfitting."""

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from tests.unclip.training import small_parts
from tests.unclip.training.small_parts import PARTS, STEPS, STOP, Job, run
from tests.unclip.training.trained_on_workers import losses
from unclip.training import checkpoints, overfitting, trainer
from unclip.training.settings import TrainerConfig

DDP = {"parallel": "ddp"}
FSDP = {"parallel": "fsdp", "activation_checkpointing": True}
QUICK = {"ddp": ("latent_diffusion", "super_resolution", "vit_vqgan"), "fsdp": ("latent_diffusion",)}
"""Trainings of two workers in `make test`, by parallelism; `make test-slow` has all of them."""


def parts(parallel: str) -> list[Any]:
    """All parts, of which those that are not quick are slow tests."""
    return [part if part in QUICK[parallel] else pytest.param(part, marks=pytest.mark.slow) for part in PARTS]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Path]:
    """Part -> its folder, with the training "alone" of one worker."""

    @functools.cache
    def train(part: str) -> Path:
        (folder / part).mkdir()
        run(folder / part, part, "alone")
        expected = [loss for _, loss in losses(folder / part, "alone")]
        assert len(expected) == STEPS and np.isfinite(expected).all()
        return folder / part

    return train


@pytest.fixture(scope="module")
def on_two_workers(folder: Path, alone: Callable[[str], Path]) -> Callable[[bool], None]:
    """Train on two workers, the quick trainings or all others.

    All of them have the same two processes, whose start takes longer than a training.
    """

    @functools.cache
    def train(is_quick: bool) -> None:
        jobs: list[Job] = [
            (part, parallel, changes)
            for parallel, changes in (("ddp", DDP), ("fsdp", FSDP))
            for part in PARTS
            if (part in QUICK[parallel]) is is_quick
        ]
        for part, _, _ in jobs:
            alone(part)
        multiprocessing.get_context("forkserver").set_forkserver_preload([small_parts.__name__, "open_clip"])
        arguments = (str(folder), jobs)
        torch.multiprocessing.start_processes(
            small_parts.run_rank_of_two, arguments, nprocs=2, start_method="forkserver"
        )
        (folder / "rendezvous").unlink(missing_ok=True)

    return train


def check_steps(folder: Path, name: str) -> None:
    """A training took the steps of one worker, to rounding."""
    expected = [loss for _, loss in losses(folder, "alone")]
    assert [loss for _, loss in losses(folder, name)] == pytest.approx(expected, abs=1e-5)
    found = weights(folder, name)
    for key, value in weights(folder, "alone").items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_a_stopped_training_ends_with_the_same_bits(part: str, alone: Callable[[str], Path]) -> None:
    folder = alone(part)
    run(folder, part, "stopped", end=STOP)
    assert len(losses(folder, "stopped")) < STEPS
    run(folder, part, "stopped")
    whole, stopped = weights(folder, "alone"), weights(folder, "stopped")
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert dict(losses(folder, "stopped")) == dict(losses(folder, "alone"))


@pytest.mark.parametrize("part", parts("ddp"))
def test_two_workers_take_the_steps_of_one(part: str, folder: Path, on_two_workers: Callable[[bool], None]) -> None:
    on_two_workers(part in QUICK["ddp"])
    check_steps(folder / part, "ddp")


@pytest.mark.parametrize("part", parts("fsdp"))
def test_shards_take_the_steps_of_one_worker(part: str, folder: Path, on_two_workers: Callable[[bool], None]) -> None:
    on_two_workers(part in QUICK["fsdp"])
    check_steps(folder / part, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_sixteen_rows_are_memorised(part: str, tmp_path: Path) -> None:
    rows = small_parts.reader(tmp_path, part, num_rows=16)
    diagnosis = overfitting.Diagnosis()
    config = overfitting.settings(TrainerConfig(precision="fp32"), num_rows=16)
    trainer.train(small_parts.objective(part, rows, memorises=True), rows, config, str(tmp_path / "run"), diagnosis)
    assert diagnosis.has_memorised, diagnosis.relative_losses
