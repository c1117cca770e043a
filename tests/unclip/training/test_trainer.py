"""Training learns, restarts bit for bit, and takes the same steps on several workers as on one."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from torch import nn

from unclip.data import RowReader, Source
from unclip.errors import ConfigError, NonFiniteError, StoppedError
from unclip.training import checkpoints, trainer
from unclip.training.objective import Monitor
from unclip.training.parallel import Workers
from unclip.training.precision import LossScale
from unclip.training.settings import TrainerConfig, learning_rate
from unclip.training.state import TrainingState

NUM_ROWS = 64


class Line:
    """Objective that learns y = 3 x - 1, with noise on x from the step's generator, and dropout."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.state: dict[str, torch.Tensor] = {}
        self.sample_size = {"numbers": 2}

    def prepare(self, batch: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        columns = {name: torch.tensor(batch[name])[:, None] for name in ("x", "y")}
        return {**columns, "row": torch.tensor([int(key) for key in batch["key"]])}

    def loss(self, network: nn.Module, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        noise = 0.01 * torch.randn(tensors["x"].shape, generator=generator)
        return ((network(tensors["x"] + noise) - tensors["y"]) ** 2).mean()

    def metrics(self, training: bool) -> dict[str, float]:
        return {}

    def preview(self, model: nn.Module) -> torch.Tensor:
        return torch.zeros(1, 3, 2, 2)

    def facts(self) -> dict[str, Any]:
        return {"kind": "line"}


def reader(folder: Path) -> RowReader:
    path = folder / "rows.parquet"
    if not path.exists():
        x = torch.linspace(-1, 1, NUM_ROWS)
        keys = [f"{index:02d}" for index in range(NUM_ROWS)]
        pq.write_table(pa.table({"key": keys, "x": x.numpy(), "y": (3 * x - 1).numpy()}), path, row_group_size=16)
    return RowReader.of_keys([Source((str(path),), ("x", "y"))], [f"{index:02d}" for index in range(NUM_ROWS)])


def settings(**changes: Any) -> TrainerConfig:
    values = {"num_samples": 960, "batch_size": 16, "learning_rate": 0.02, "ema_decay": 0.9, "checkpoint_samples": 160}
    return TrainerConfig(**{**values, "log_samples": 320, **changes})


class Recorder(Monitor):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.previews: list[int] = []
        self.steps: list[int] = []

    def step(self, samples_seen: int, loss: float) -> None:
        self.steps.append(samples_seen)

    def metrics(self, values, samples_seen: int) -> None:
        self.logged.append(dict(values))

    def preview(self, images: torch.Tensor, samples_seen: int) -> None:
        self.previews.append(samples_seen)


@pytest.mark.parametrize("norm", [0.25, 1.0, 4.0])
def test_gradients_longer_than_clip_norm_are_clipped(norm: float) -> None:
    model = torch.nn.Linear(3, 2)
    state = TrainingState(model, {}, settings(clip_norm=1.0, precision="fp32"))
    gradients = [torch.randn_like(value) for value in model.parameters()]
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    gradients = [gradient * norm / length for gradient in gradients]
    for value, gradient in zip(model.parameters(), gradients, strict=True):
        value.grad = gradient.clone()
    gradient_norm = state.gradient_norm().item()
    assert gradient_norm == pytest.approx(norm)
    state.apply(0, gradient_norm)
    for value, gradient in zip(model.parameters(), gradients, strict=True):
        applied = state.optimizer.state[value]["exp_avg"] / (
            1 - state.config.beta1
        )  # the first moment of the first step
        torch.testing.assert_close(applied, gradient / max(1, norm))


class PacedLine(Line):
    """The first layer learns at a tenth of the learning rate, and the last one at the whole."""

    learning_rate_factors: Mapping[str, float] = MappingProxyType({"0": 0.1})


def test_modules_can_learn_with_a_fraction_of_the_learning_rate(tmp_path: Path) -> None:
    """Adam's first step moves every weight by the learning rate, whatever its gradient."""
    one_step = settings(num_samples=16, decay="none", ema_decay=0.0, precision="fp32")
    before = dict(Line().model.named_parameters())
    trainer.train(PacedLine(), reader(tmp_path), one_step, str(tmp_path / "run"), Recorder())
    after = checkpoints.load(str(tmp_path / "run" / "model"))[0]["model"]
    moved = {name: (after[name] - value).abs().max().item() for name, value in before.items()}
    rates = {"0.weight": 0.002, "0.bias": 0.002, "2.weight": 0.02, "2.bias": 0.02}
    assert moved == pytest.approx(rates, rel=1e-3)


def test_training_learns_and_reports(tmp_path: Path) -> None:
    monitor = Recorder()
    trainer.train(Line(), reader(tmp_path), settings(num_samples=3200), str(tmp_path / "run"), monitor)
    tensors, facts = checkpoints.load(str(tmp_path / "run" / "model"))
    line = Line()
    line.model.load_state_dict(tensors["model"])
    predicted = line.model.eval()(torch.tensor([[0.5]])).item()
    assert predicted == pytest.approx(0.5, abs=0.1)
    assert facts == {"kind": "line", "samples_seen": 3200}
    assert monitor.logged[-1]["loss"] < monitor.logged[0]["loss"] / 5
    speeds = {"samples_per_second", "numbers_per_second", "data_wait_share", "teraflops_per_second", "memory_gib"}
    assert {"loss", "gradient_norm", "learning_rate", *speeds} == set(monitor.logged[0])
    expected = 3 * 2 * (8 + 8) * monitor.logged[-1]["samples_per_second"] / 1e12  # two layers of 8 weights
    assert monitor.logged[-1]["teraflops_per_second"] == pytest.approx(expected)
    assert monitor.logged[-1]["numbers_per_second"] == 2 * monitor.logged[-1]["samples_per_second"]
    assert 0.01 < monitor.logged[-1]["memory_gib"] < 100
    assert monitor.previews == [3200]


def test_previews_are_evenly_spaced_few_and_far_apart() -> None:
    def previews(**changes: Any) -> list[int]:
        config = settings(batch_size=100, **changes)
        steps = range(100, config.num_samples + 100, 100)
        return [seen for seen in steps if trainer._due(seen, config.samples_between_previews(), config)]

    assert previews(num_samples=800_000) == list(range(100_000, 800_001, 100_000))
    assert len(previews(num_samples=812_300)) == 8
    assert previews(num_samples=46_000) == [10_000, 20_000, 30_000, 40_000, 46_000]
    assert previews(num_samples=46_000, preview_samples=23_000) == [23_000, 46_000]
    with pytest.raises(ConfigError, match="preview_samples"):
        settings(preview_samples=-1)


class FailingPreview(Line):
    """Objective with previews that fail."""

    def preview(self, model: nn.Module) -> torch.Tensor:
        raise RuntimeError("out of memory")


def test_a_failed_preview_is_a_warning(tmp_path: Path) -> None:
    monitor = WarningRecorder()
    digests = {
        trainer.train(objective, reader(tmp_path), settings(), f"{tmp_path}/{name}", monitor)
        for name, objective in (("failing", FailingPreview()), ("working", Line()))
    }
    assert len(digests) == 1
    assert monitor.warnings == ["no preview after 960 samples: out of memory"]


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "whole"))

    class Killed(Recorder):
        def step(self, samples_seen: int, loss: float) -> None:
            super().step(samples_seen, loss)
            if len(self.steps) == 23:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "killed"), Killed())
    monitor = Recorder()
    resumed = trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "killed"), monitor)
    assert monitor.steps[0] == 320 + 16  # from the last checkpoint, not from the start
    assert resumed == whole


def test_randomness_differs_by_step_rank_and_seed(tmp_path: Path) -> None:
    digests = {
        trainer.train(Line(), reader(tmp_path), settings(seed=seed), str(tmp_path / str(seed))) for seed in (0, 1)
    }
    assert len(digests) == 2
    cpu = torch.device("cpu")
    generators = [trainer._seed_step(0, samples, rank, cpu) for samples, rank in itertools.product((0, 16), (0, 1))]
    assert len({torch.randn(1, generator=generator).item() for generator in generators}) == 4


def test_a_nan_loss_stops_the_training_before_the_step(tmp_path: Path) -> None:
    class Poisoned(Line):
        def loss(self, network, tensors, generator):
            return super().loss(network, tensors, generator) * (torch.nan if 7 in tensors["row"] else 1.0)

    objective = Poisoned()
    with pytest.raises(NonFiniteError, match="The weights are unchanged"):
        trainer.train(objective, reader(tmp_path), settings(), str(tmp_path / "run"))
    assert all(parameter.isfinite().all() for parameter in objective.model.parameters())


class SometimesPoisoned(Line):
    """Objective with a NaN loss for the first `times` batches that contain row 07."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.order: list[int] = []

    def loss(self, network, tensors, generator):
        is_bad = 7 in tensors["row"] and self.times > 0
        self.times -= is_bad
        self.order += tensors["row"].tolist()
        return super().loss(network, tensors, generator) * (torch.nan if is_bad else 1.0)


class WarningRecorder(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_f43_bad_batches_are_skipped_and_named_until_there_are_too_many(tmp_path: Path) -> None:
    monitor, objective = WarningRecorder(), SometimesPoisoned(times=3)
    trainer.train(
        objective, reader(tmp_path), settings(nonfinite="skip", max_nonfinite=3), str(tmp_path / "a"), monitor
    )
    assert len(monitor.warnings) == 3 and "got loss nan" in monitor.warnings[0]
    events = [json.loads(path.read_text()) for path in sorted((tmp_path / "a" / "nonfinite").iterdir())]
    assert len(events) == 3 and all("07" in event["keys"] and len(event["keys"]) == 16 for event in events)
    assert checkpoints.load(str(tmp_path / "a" / "model"))[0]["model"]["0.weight"].isfinite().all()
    with pytest.raises(NonFiniteError, match="The weights are unchanged"):
        trainer.train(
            SometimesPoisoned(4), reader(tmp_path), settings(nonfinite="skip", max_nonfinite=3), str(tmp_path / "b")
        )


@pytest.mark.parametrize("first_checkpoint", [32, 640])
def test_f43_a_training_rolls_back_and_continues_in_another_order(tmp_path: Path, first_checkpoint: int) -> None:
    """Roll back also before the first regular checkpoint."""
    config = settings(nonfinite="roll_back", max_nonfinite=1, checkpoint_samples=first_checkpoint)
    undisturbed, objective, monitor = SometimesPoisoned(0), SometimesPoisoned(1), WarningRecorder()
    trainer.train(undisturbed, reader(tmp_path), config, str(tmp_path / "undisturbed"))
    trainer.train(objective, reader(tmp_path), config, str(tmp_path / "run"), monitor)
    assert len(monitor.warnings) == 1 and "rolling back" in monitor.warnings[0]
    [bad] = (int(path.stem) for path in (tmp_path / "run" / "nonfinite").iterdir())
    assert monitor.steps[bad // 16] == bad // first_checkpoint * first_checkpoint + 16, "not from the last checkpoint"
    assert objective.order[: bad + 16] == undisturbed.order[: bad + 16]
    assert (
        objective.order[bad + 16 :][:NUM_ROWS]
        != undisturbed.order[bad // first_checkpoint * first_checkpoint :][:NUM_ROWS]
    )
    with pytest.raises(NonFiniteError):
        trainer.train(SometimesPoisoned(2), reader(tmp_path), config, str(tmp_path / "twice"))


def test_a_training_that_was_asked_to_stop_loses_nothing(tmp_path: Path) -> None:
    class Stopped(Recorder):
        def wants_stop(self) -> bool:
            return len(self.steps) == 22

    whole = trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "whole"))
    with pytest.raises(StoppedError, match=r"stopped as asked after 368 of 960 samples"):
        trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "run"), Stopped())
    monitor = Recorder()
    assert trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "run"), monitor) == whole
    assert monitor.steps[0] == 368 + 16


def test_fp16_finds_a_working_loss_scale(tmp_path: Path) -> None:
    class Steep(Line):
        def loss(self, network, tensors, generator):
            return 100 * super().loss(network, tensors, generator)

    monitor = Recorder()
    trainer.train(
        Steep(), reader(tmp_path), settings(precision="fp16", num_samples=3200), str(tmp_path / "run"), monitor
    )
    [*_, last] = sorted((tmp_path / "run" / "checkpoints").iterdir())
    facts = json.loads((last / "facts.json").read_text())
    assert facts["loss_scale"]["value"] < 2**16 and facts["num_nonfinite"] == 0
    assert monitor.logged[-1]["loss"] < monitor.logged[0]["loss"] / 5


def test_the_loss_scale_shrinks_and_grows() -> None:
    scale = LossScale.of("fp16")
    assert LossScale.of("bf16") == LossScale(False, 1.0) and not LossScale.of("bf16").shrink()
    assert scale.shrink() and scale.value == 2**15
    for _ in range(LossScale.GROWTH_STEPS):
        scale.grow()
    assert scale.value == 2**16 and scale.good_steps == 0
    while scale.shrink():
        assert scale.value >= LossScale.SMALLEST
    assert scale.value == LossScale.SMALLEST, "it shrinks below the minimum"


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps(tmp_path: Path) -> None:
    losses, flops = [], []
    for compiled in (False, True):
        torch.compiler.reset()
        monitor = Recorder()
        changes = settings(num_samples=320, log_samples=16, compile=compiled, precision="fp32")
        trainer.train(Deterministic(), reader(tmp_path), changes, str(tmp_path / str(compiled)), monitor)
        losses.append([values["loss"] for values in monitor.logged])
        flops.append(
            [1e12 * values["teraflops_per_second"] / values["samples_per_second"] for values in monitor.logged]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert flops[1] == pytest.approx(flops[0]) and flops[0] == pytest.approx([3 * 2 * (8 + 8)] * 20)


def test_learning_rate_warms_up_then_decays_to_zero() -> None:
    config = settings(warmup_samples=160, num_samples=1600)
    rates = [learning_rate(config, samples) for samples in range(0, 1601, 16)]
    assert rates[0] == pytest.approx(0.02 * 16 / 176) and max(rates) == rates[10] == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0) and sorted(rates[10:], reverse=True) == rates[10:]


def _train_one_rank(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    trainer.train(
        Deterministic(),
        reader(Path(folder)),
        settings(precision="fp32"),
        f"{folder}/together",
        workers=Workers(rank, world_size),
    )
    torch.distributed.destroy_process_group()


class Deterministic(Line):
    """Objective without randomness, so that only the division of the batch can make a difference."""

    def loss(self, network, tensors, generator):
        return ((network(tensors["x"]) - tensors["y"]) ** 2).mean()

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(self.model[0], self.model[2])


def test_two_workers_take_the_same_steps_as_one(tmp_path: Path) -> None:
    trainer.train(Deterministic(), reader(tmp_path), settings(precision="fp32"), str(tmp_path / "alone"))
    torch.multiprocessing.spawn(_train_one_rank, (2, str(tmp_path)), nprocs=2)
    alone, together = (checkpoints.load(str(tmp_path / name / "model"))[0]["model"] for name in ("alone", "together"))
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-4)


def test_a_batch_that_cannot_be_divided_among_workers_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: got 16, expected a multiple of 3 workers"):
        trainer.train(Line(), reader(tmp_path), settings(), str(tmp_path / "run"), workers=Workers(0, 3))
