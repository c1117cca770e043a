"""The trainer's promises hold for every part: exact resumption, any workers and shards, and the test of overfitting."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from tests.unclip.training import small_parts
from tests.unclip.training.small_parts import PARTS, STEPS, STOP, run
from tests.unclip.training.trained_on_workers import losses
from unclip.training import checkpoints, overfitting, trainer
from unclip.training.settings import TrainerConfig


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


@pytest.mark.parametrize("part", PARTS)
def test_a_stopped_training_ends_with_the_same_bits(part: str, tmp_path: Path) -> None:
    run(tmp_path, part, "whole")
    run(tmp_path, part, "stopped", end=STOP)
    assert len(losses(tmp_path, "stopped")) < STEPS
    run(tmp_path, part, "stopped")
    whole, stopped = weights(tmp_path, "whole"), weights(tmp_path, "stopped")
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert len(losses(tmp_path, "whole")) == STEPS
    assert dict(losses(tmp_path, "stopped")) == dict(losses(tmp_path, "whole"))


def check_steps(folder: Path, part: str, name: str, **changes: object) -> None:
    """Two workers take the steps of one with such settings."""
    run(folder, part, "alone")
    jobs = {name: {"parallel": name, **changes}}
    torch.multiprocessing.start_processes(
        small_parts.run_rank_of_two, (str(folder), part, jobs), nprocs=2, start_method="forkserver"
    )
    expected = [loss for _, loss in losses(folder, "alone")]
    assert len(expected) == STEPS and np.isfinite(expected).all()
    assert [loss for _, loss in losses(folder, name)] == pytest.approx(expected, abs=1e-5)
    found = weights(folder, name)
    for key, value in weights(folder, "alone").items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("part", PARTS)
def test_two_workers_take_the_steps_of_one(part: str, tmp_path: Path) -> None:
    check_steps(tmp_path, part, "ddp")


@pytest.mark.parametrize(
    "part", ["latent_diffusion", *(pytest.param(each, marks=pytest.mark.slow) for each in list(PARTS)[1:])]
)
def test_shards_take_the_steps_of_one_worker(part: str, tmp_path: Path) -> None:
    check_steps(tmp_path, part, "fsdp", activation_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_sixteen_rows_are_memorised(part: str, tmp_path: Path) -> None:
    rows = small_parts.reader(tmp_path, part, num_rows=16)
    diagnosis = overfitting.Diagnosis()
    config = overfitting.settings(TrainerConfig(precision="fp32"), num_rows=16)
    trainer.train(small_parts.objective(part, rows, memorises=True), rows, config, str(tmp_path / "run"), diagnosis)
    assert diagnosis.has_memorised, diagnosis.relative_losses
