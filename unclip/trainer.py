"""The training loop: one for every model.

Everything is a pure function of (config, rows, samples seen): the order of rows, the noise, dropout and the learning rate.
So a checkpoint holds only weights, their moving average, the optimiser's moments and what the objective itself learns, and a
run that was killed and restarted takes exactly the steps that an undisturbed run takes.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from unclip import checkpoints
from unclip.config import require
from unclip.data import Batch, RowReader
from unclip.errors import CheckpointError, NonFiniteError
from unclip.precision import Precision, autocast

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    num_samples: int = 1_000_000
    """Length of the training, in samples."""
    batch_size: int = 256
    """Samples a step, over all workers."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_samples: int = 0
    """Samples of linear warm-up."""
    decay: Literal["cosine", "none"] = "cosine"
    """Decay of the learning rate after the warm-up, to zero at the end."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.999
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.9999
    """Decay of the moving average of weights; early in training a smaller one is used."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward passes."""
    seed: int = 0
    """Of the weights, the order of rows, noise and dropout."""
    checkpoint_samples: int = 100_000
    """Samples between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    preview_samples: int = 0
    """Samples between previews; 0 for one at the end only."""
    log_samples: int = 10_000
    """Samples between logged metrics."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "checkpoint_samples", "keep_checkpoints", "log_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0 and below 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive number")


class Objective(Protocol):
    """What is trained: a model and its loss."""

    model: nn.Module
    state: Mapping[str, Tensor]
    """What losses depend on besides the model: tensors, changed in place and the same on all ranks; often none."""

    def prepare(self, batch: Batch) -> Tensors:
        """Rows as the reader gives them -> tensors, on the CPU."""

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch; `network` is the model, or a wrapper of it that is called the same way."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Something to look at while training: images [B, 3, H, W] in [-1, 1]; always of the same content."""

    def facts(self) -> dict[str, Any]:
        """What is needed to build the model again."""


class Monitor:
    """Hears how the training goes; this one ignores it."""

    def start(self, samples_seen: int, num_samples: int) -> None:
        """Training begins, or goes on, at `samples_seen`."""

    def step(self, samples_seen: int, loss: float) -> None:
        """After every step."""

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        """Now and then."""

    def preview(self, images: Tensor, samples_seen: int) -> None:
        """Images [B, 3, H, W] in [-1, 1] of the averaged weights."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """This process's place among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


def train(
    objective: Objective,
    reader: RowReader,
    config: TrainerConfig,
    folder: str,
    monitor: Monitor | None = None,
    workers: Workers = Workers(),
) -> str:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Args:
        folder: URI for this training alone; gets `checkpoints/` and at the end `model/`.

    Returns:
        Digest of `model/`: weights (the moving average) and facts.

    Raises:
        NonFiniteError: a loss or gradient that is not finite; the weights were not touched by it.
        CheckpointError: the checkpoints in `folder` are of another model.
        ConfigError: the batch cannot be shared equally.
    """
    require(
        config.batch_size % workers.world_size == 0,
        "batch_size",
        config.batch_size,
        f"a multiple of {workers.world_size} workers",
    )
    monitor = monitor if monitor is not None and workers.rank == 0 else Monitor()
    if workers.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Nothing reads uninitialised memory here, and filling it takes a tenth of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model = objective.model.to(workers.device).train()
    state = _State(model, objective.state, config)
    samples_seen = state.restore(f"{folder}/checkpoints")
    network: nn.Module = model
    if workers.world_size > 1:
        network = nn.parallel.DistributedDataParallel(model)
    monitor.start(samples_seen, config.num_samples)

    pace = _Pace(config)
    batches = reader.batches(
        seed=config.seed,
        samples_seen=samples_seen,
        batch_size=config.batch_size,
        rank=workers.rank,
        world_size=workers.world_size,
    )
    with contextlib.closing(batches):
        while samples_seen < config.num_samples:
            batch = next(batches)
            pace.data_arrived()
            generator = _seed_step(config.seed, samples_seen, workers)
            tensors = {name: value.to(workers.device) for name, value in objective.prepare(batch).items()}
            with autocast(config.precision, workers.device):
                loss = objective.loss(network, tensors, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            value, gradient_norm = state.step(loss.detach(), samples_seen, batch["key"])
            samples_seen += config.batch_size
            monitor.step(samples_seen, value)
            pace.stepped(value)
            if _due(samples_seen, config.log_samples, config):
                extra = {"gradient_norm": gradient_norm, "learning_rate": learning_rate(config, samples_seen)}
                monitor.metrics(pace.summary() | extra, samples_seen)
            if workers.rank == 0 and _due(samples_seen, config.checkpoint_samples, config):
                checkpoints.save_step(
                    f"{folder}/checkpoints", samples_seen, state.tensors(), objective.facts(), config.keep_checkpoints
                )
            if workers.rank == 0 and _due(samples_seen, config.preview_samples or config.num_samples, config):
                _preview(objective, state, monitor, samples_seen)
    if workers.world_size > 1:
        torch.distributed.barrier()  # the last checkpoint is complete
    facts = {**objective.facts(), "samples_seen": samples_seen}
    if workers.rank > 0:
        return ""
    return checkpoints.save(f"{folder}/model", {"model": state.averaged()}, facts)


def learning_rate(config: TrainerConfig, samples_seen: int) -> float:
    """Learning rate of the step that starts at `samples_seen`: linear warm-up, then cosine decay to 0."""
    if samples_seen < config.warmup_samples:
        return config.learning_rate * (samples_seen + config.batch_size) / (config.warmup_samples + config.batch_size)
    if config.decay == "none":
        return config.learning_rate
    progress = (samples_seen - config.warmup_samples) / max(1, config.num_samples - config.warmup_samples)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _State:
    """The model's weights, their moving average and the optimiser, by parameter name; and the objective's own tensors."""

    def __init__(self, model: nn.Module, objective: Mapping[str, Tensor], config: TrainerConfig) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = [value for value in self.parameters.values() if value.dim() >= 2]
        vectors = [value for value in self.parameters.values() if value.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    def step(self, loss: Tensor, samples_seen: int, keys: list[str]) -> tuple[float, float]:
        """Apply the gradients; returns loss and gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
        value, gradient_norm = torch.stack([loss.float(), norm.float()]).tolist()  # one wait for the device
        if not (math.isfinite(value) and math.isfinite(gradient_norm)):
            raise NonFiniteError(
                f"training: got loss {value} and gradient norm {gradient_norm} after {samples_seen} samples, in the batch of "
                f"{', '.join(keys[:4])} ... The weights are untouched. Lower the learning rate or set precision = 'fp32'."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, samples_seen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        steps = samples_seen / self.config.batch_size
        decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            averages, values = list(self.average.values()), [value.detach() for value in self.parameters.values()]
            torch._foreach_lerp_(averages, values, 1 - decay)
        return value, gradient_norm

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything that a later step depends on."""
        moments: dict[str, Tensors] = {"exp_avg": {}, "exp_avg_sq": {}, "step": {}}
        for name, value in self.parameters.items():
            for moment, group in moments.items():
                group[name] = self.optimizer.state[value][moment]
        objective = {"objective": self.objective} if self.objective else {}
        return {"weights": dict(self.model.state_dict()), "average": self.average, **moments, **objective}

    def restore(self, root: str) -> int:
        """Take up the last checkpoint; returns its samples_seen, 0 without one."""
        checkpoint = checkpoints.load_latest(root)
        if checkpoint is None:
            return 0
        try:
            self.model.load_state_dict(checkpoint.tensors["weights"])
            for name, tensor in self.objective.items():
                tensor.copy_(checkpoint.tensors["objective"][name])
            for name, value in self.parameters.items():
                self.average[name].copy_(checkpoint.tensors["average"][name])
                moments = {moment: checkpoint.tensors[moment][name] for moment in ("exp_avg", "exp_avg_sq", "step")}
                # the fused optimiser wants `step` beside the weights, and all of it in their memory layout
                self.optimizer.state[value] = {
                    "step": moments["step"].to(value.device),
                    "exp_avg": torch.empty_like(value).copy_(moments["exp_avg"]),
                    "exp_avg_sq": torch.empty_like(value).copy_(moments["exp_avg_sq"]),
                }
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{root}: the checkpoint is of another model: {error}") from error
        return checkpoint.samples_seen

    def averaged(self) -> Tensors:
        """The model's state with the averaged weights in place of the raw ones."""
        return {**self.model.state_dict(), **self.average}

    @contextlib.contextmanager
    def using_average(self) -> Any:
        """The model in evaluation mode with the averaged weights, for as long as the block lasts."""
        raw = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._assign(self.average)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self._assign(raw)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(values[name])


class _Pace:
    """Speed and mean loss since the last time they were asked for."""

    def __init__(self, config: TrainerConfig) -> None:
        self.batch_size = config.batch_size
        self._reset()

    def _reset(self) -> None:
        self.started = self.last = time.monotonic()
        self.waited, self.losses = 0.0, list[float]()

    def data_arrived(self) -> None:
        self.waited += time.monotonic() - self.last

    def stepped(self, loss: float) -> None:
        self.losses.append(loss)
        self.last = time.monotonic()

    def summary(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        values = {
            "loss": sum(self.losses) / max(len(self.losses), 1),
            "samples_per_second": len(self.losses) * self.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self._reset()
        return values


def _due(samples_seen: int, every: int, config: TrainerConfig) -> bool:
    """Whether this step crossed a multiple of `every`, or is the last."""
    crossed = samples_seen // every > (samples_seen - config.batch_size) // every
    return crossed or samples_seen >= config.num_samples


def _seed_step(seed: int, samples_seen: int, workers: Workers) -> torch.Generator:
    """Randomness of one step on one rank: a function of where it stands, so that nothing of it needs saving."""
    step_seed = (seed * 1_000_003 + samples_seen * 1_009 + workers.rank) % 2**63
    torch.manual_seed(step_seed)  # dropout
    return torch.Generator(workers.device).manual_seed(step_seed + 1)


def _preview(objective: Objective, state: _State, monitor: Monitor, samples_seen: int) -> None:
    with state.using_average() as model:
        images = objective.preview(model)
    if images is not None:
        monitor.preview(images, samples_seen)
