"""Loss-aware timesteps: unbiased, equal on all ranks, and restarted bit for bit."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import nn

from tests.unclip.training.trained_on_workers import NUM_ROWS, reader
from unclip.data import RowReader
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.systems.upsampler import UpsamplerObjective
from unclip.training import checkpoints, sharded, trainer
from unclip.training.objective import Monitor, Tensors
from unclip.training.parallel import ALONE, Workers
from unclip.training.settings import TrainerConfig
from unclip.training.timesteps import LossAwareTimesteps

NUM_TIMESTEPS = 4


def objective(
    rows: RowReader, timestep_sampling: str = "loss_aware", of: type[UpsamplerObjective] = UpsamplerObjective
) -> UpsamplerObjective:
    torch.manual_seed(0)
    config = UpsamplerConfig(
        UNetConfig(8, channels=4, channel_mult=(1,), num_res_blocks=1, norm_groups=2),
        low_res_size=8,
        scale=2,
        diffusion=DiffusionConfig(NUM_TIMESTEPS, timestep_sampling=timestep_sampling),  # type: ignore[arg-type]
    )
    return of(config, rows.read(np.array([0])))


def settings(num_samples: int = 400) -> TrainerConfig:
    return TrainerConfig(num_samples, batch_size=16, learning_rate=0.01, checkpoint_samples=160, precision="fp32")


class Killed(Monitor):
    """Kills a training after step 18; records where it started."""

    def start(self, samples_seen: int, num_samples: int) -> None:
        self.started_at = samples_seen

    def step(self, samples_seen: int, loss: float) -> None:
        if samples_seen == 18 * 16:
            raise KeyboardInterrupt


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    rows = reader(tmp_path)
    whole = trainer.train(objective(rows), rows, settings(), str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(objective(rows), rows, settings(), str(tmp_path / "killed"), Killed())
    saved = {"objective/num_updates": torch.zeros(NUM_TIMESTEPS, dtype=torch.int64)}
    facts = sharded.restore(str(tmp_path / "killed" / "checkpoints"), saved, ALONE)
    assert facts is not None and facts["samples_seen"] == 160
    assert saved["objective/num_updates"].sum() == 160
    assert saved["objective/num_updates"].min() >= 10, "draws are still uniform, so nothing is tested"
    monitor, resumed = Killed(), objective(rows)
    monitor.step = lambda samples_seen, loss: None  # type: ignore[method-assign]
    digest = trainer.train(resumed, rows, settings(), str(tmp_path / "killed"), monitor)
    assert monitor.started_at == 160 and digest == whole
    probabilities = resumed.process.timesteps.probabilities()  # type: ignore[attr-defined]
    assert (probabilities - 1 / NUM_TIMESTEPS).abs().max() > 0.02


def test_a_checkpoint_without_losses_is_rejected(tmp_path: Path) -> None:
    rows = reader(tmp_path)
    trainer.train(objective(rows, "uniform"), rows, settings(160), str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="from another model"):
        trainer.train(objective(rows), rows, settings(), str(tmp_path / "run"))


def test_the_expected_loss_equals_that_of_uniform_timesteps(tmp_path: Path) -> None:
    rows = reader(tmp_path)
    batch = rows.read(np.arange(NUM_ROWS))

    def mean_loss(timestep_sampling: str) -> float:
        trained = objective(rows, timestep_sampling)
        for name, tensor in trained.state.items():  # the last timestep has by far the largest losses
            tensor.copy_(torch.tensor([[1.0], [2.0], [4.0], [16.0]]) if name == "losses" else torch.full((4,), 10))
        tensors = trained.prepare(batch)
        with torch.no_grad():
            losses = [trained.loss(trained.model, tensors, torch.Generator().manual_seed(seed)) for seed in range(60)]
        return torch.stack(losses).mean().item()

    assert mean_loss("loss_aware") == pytest.approx(mean_loss("uniform"), rel=0.03)


def _train_one_rank(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    rows = reader(Path(folder))
    _train_in_micro_batches(rows, f"{folder}/rank{rank}", Workers(rank, 2))
    torch.distributed.destroy_process_group()


def _train_in_micro_batches(rows: RowReader, folder: str, workers: Workers) -> None:
    """Train in micro-batches of 4, of which 4 are a step; save the weights and the state of this rank."""
    trained = objective(rows)
    config = dataclasses.replace(settings(), micro_batch_size=4)
    trainer.train(trained, rows, config, f"{folder.rpartition('/')[0]}/run-{workers.world_size}", workers=workers)
    checkpoints.save(folder, {"state": trained.state, "model": trained.model.state_dict()}, {})


def test_f133_four_micro_batches_of_one_worker_are_two_of_each_of_two(tmp_path: Path) -> None:
    """One worker is the oracle of two: same losses in the histories, in the same order, and the same weights."""
    rows = reader(tmp_path)
    torch.multiprocessing.spawn(_train_one_rank, (str(tmp_path),), nprocs=2)
    _train_in_micro_batches(rows, str(tmp_path / "alone"), ALONE)
    first, second, alone = (checkpoints.load(str(tmp_path / name))[0] for name in ("rank0", "rank1", "alone"))
    assert first["state"]["num_updates"].sum() == 400  # of both ranks
    for name in LossAwareTimesteps(NUM_TIMESTEPS).state:
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], alone["state"][name], atol=1e-5, rtol=1e-4)
    for name, weights in alone["model"].items():
        torch.testing.assert_close(first["model"][name], weights, atol=2e-5, rtol=0)


class Interrupted(UpsamplerObjective):
    """Objective whose loss is not finite in its sixth micro-batch."""

    calls = 0

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        return super().loss(network, tensors, generator) * (math.nan if self.calls == 6 else 1.0)


def test_f133_a_step_that_is_not_taken_teaches_nothing(tmp_path: Path) -> None:
    rows = reader(tmp_path)
    trained = objective(rows, of=Interrupted)
    config = dataclasses.replace(settings(64), micro_batch_size=4, nonfinite="skip")
    trainer.train(trained, rows, config, str(tmp_path / "run"))
    assert trained.state["num_updates"].sum() == 3 * 16  # of four steps, without those of the second
    assert trained.state["losses"].isfinite().all()
