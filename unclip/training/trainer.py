"""The training loop: one for every model.

Everything is a pure function of (config, rows, samples seen): the order of rows, the noise, dropout and the learning rate.
So a checkpoint holds only weights, their moving average, the optimiser's moments and what the objective itself learns, and a
run that was killed and restarted takes exactly the steps that an undisturbed run takes. With `micro_batch_size` that is so
for any number of workers: noise belongs to the micro-batch, whoever computes it.
"""

import contextlib
import copy
import dataclasses
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unclip import files
from unclip.config import operational, require
from unclip.data import Batch, RowReader
from unclip.errors import ConfigError, NonFiniteError, StoppedError, StorageError
from unclip.training import checkpoints, curves, parallel, sharded
from unclip.training.flops import FirstForward, peak_flops
from unclip.training.parallel import ALONE, Parallel, Workers
from unclip.training.precision import LossScale, Precision, autocast
from unclip.training.watchdog import Watchdog

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

CURVE = "curve.tsv"
"""File in a training's folder that says how its loss fell."""
HUNG = "hung.json"
"""File in a training's folder that says which worker hung last."""
HUNG_EXIT_CODE = 70  # EX_SOFTWARE


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    num_samples: int = 1_000_000
    """Length of the training, in samples."""
    batch_size: int = 256
    """Samples a step, over all workers."""
    micro_batch_size: int = 0
    """Samples that a worker computes at once; it adds up the gradients of as many as make its share of the batch. 0 takes the
    share whole. Given, the steps are the same for any number of workers."""
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
    parallel: Parallel = "ddp"
    """How several workers hold the model: each of them whole, or in shards."""
    activation_checkpointing: bool = False
    """Compute the activations inside blocks again in the backward pass rather than keep them: slower, with less memory."""
    compile: bool = False
    """Have torch compile the blocks of the network: minutes at the start, faster steps on GPUs."""
    seed: int = 0
    """Of the weights, the order of rows, noise and dropout."""
    nonfinite: Literal["stop", "skip", "roll_back"] = operational("stop")
    """When a loss or gradient is not finite: stop; pass over the batch; or go back to the last checkpoint and on from there
    in another order of rows. The weights are never touched by it. In no fingerprint, so that a training that stopped can go on
    with another answer."""
    max_nonfinite: int = operational(10)
    """Batches that may be skipped, or times to roll back, before the training stops after all."""
    hang_seconds: float = operational(1800.0)
    """Without any move of any worker for so long, the one that hangs is named, and several end, so that they are started
    again from the last checkpoint; 0 to wait for ever."""
    validation_rows: int = operational(512)
    """Held-out rows whose loss is measured before each checkpoint, always with the same noise; 0 for none."""
    checkpoint_samples: int = operational(100_000)
    """Samples between checkpoints."""
    keep_checkpoints: int = operational(2)
    """Newest checkpoints that are kept."""
    preview_samples: int = operational(0)
    """Samples between previews; 0 for eight of them, evenly spaced, but at least 10,000 samples apart. One is at the end."""
    log_samples: int = operational(0)
    """Samples between logged metrics; 0 for a hundredth of the training."""
    reference_curve: str | None = operational(None)
    """A curve of the same training that went well, which this one is held against: one that comes with unclip, by name, or
    the path or URI of a `curve.tsv` that the first worker sees."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "checkpoint_samples", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("validation_rows", "preview_samples", "log_samples", "max_nonfinite", "hang_seconds"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0 and below 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive number")
        fits = self.micro_batch_size == 0 or (
            self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0
        )
        require(fits, "micro_batch_size", self.micro_batch_size, f"a divisor of batch_size, {self.batch_size}, or 0")
        curve = self.reference_curve
        is_found = curve is None or curve in curves.reference_names() or curve.startswith("/") or "://" in curve
        expected = f"an absolute path, a URI, or one of {', '.join(curves.reference_names())}"
        require(is_found, "reference_curve", curve, expected)

    def samples_between_previews(self) -> int:
        """A preview takes about as long as training on 400 samples, so that 10,000 make it cheap."""
        return self.preview_samples or max(10_000, math.ceil(self.num_samples / 8))


class Objective(Protocol):
    """What is trained: a model and its loss."""

    model: nn.Module
    state: Mapping[str, Tensor]
    """What losses depend on besides the model: tensors, changed in place and the same on all ranks; often none."""
    sample_size: Mapping[str, int]
    """What is in a sample, to tell the speed by: pixels or tokens."""

    def prepare(self, batch: Batch) -> Tensors:
        """Rows as the reader gives them -> tensors, on the CPU."""

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch.

        `network` is the model, or a wrapper or copy of it that is called the same way. When it is not in training mode
        (`network.training`), nothing is learned from the loss, not by the objective either.
        """

    def metrics(self, training: bool) -> Mapping[str, float]:
        """What else the losses tell since the last time it was asked: of training, where all workers ask, or of validation,
        where the first one does."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Something to look at while training, always of the same content: images [2 B, 3, H, W] in [-1, 1], originals and
        then a drawing of each."""

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
        """Images [2 B, 3, H, W] in [-1, 1]: originals, and what the averaged weights draw of each."""

    def warn(self, message: str) -> None:
        """Something is wrong, but the training goes on."""
        log.warning("training: %s", message)

    def wants_stop(self) -> bool:
        """Asked in every step, of every worker: whether to write a checkpoint and stop."""
        return False

    def wants_checkpoint(self) -> bool:
        """Asked in every step, of every worker: whether to write a checkpoint besides those that are due, and go on."""
        return False


def train(
    objective: Objective,
    reader: RowReader,
    config: TrainerConfig,
    folder: str,
    monitor: Monitor | None = None,
    workers: Workers = ALONE,
    validation: RowReader | None = None,
) -> str:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Args:
        folder: URI for this training alone; gets `checkpoints/` and at the end `model/`.
        monitor: hears how it goes, on the first worker; every worker's is asked what it wants.
        validation: rows that are not trained on; the first `validation_rows` of them are validated with.

    One of several workers ends its process with `HUNG_EXIT_CODE` when one of them hangs.

    Returns:
        Digest of `model/`: weights (the moving average) and facts; "" on other workers than the first.

    Raises:
        NonFiniteError: a loss or gradient that is not finite; the weights were not touched by it.
        StoppedError: the monitor asked to stop; a checkpoint was written.
        CheckpointError: the checkpoints in `folder` are of another model.
        ConfigError: the batch cannot be shared equally.
    """
    unit = workers.world_size * max(1, config.micro_batch_size)
    expected = f"a multiple of {workers.world_size} workers" + " times micro_batch_size" * (config.micro_batch_size > 0)
    require(config.batch_size % unit == 0, "batch_size", config.batch_size, expected)
    if workers.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Nothing reads uninitialised memory here, and filling it takes a tenth of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    monitor = monitor or Monitor()

    def hung(message: str) -> None:
        try:
            monitor.warn(message)
            if workers.world_size > 1:
                files.write_json(f"{folder}/{HUNG}", {"message": message})
        finally:
            if workers.world_size > 1:
                os._exit(HUNG_EXIT_CODE)  # nothing else gets a process out of a collective

    watchdog = Watchdog(f"{folder}/workers", workers, config.hang_seconds, hung)
    with watchdog.awake():
        training = _Training(objective, reader, config, folder, monitor, workers, watchdog, validation)
        with contextlib.closing(training):
            training.run()
        return training.export()


class _Training:
    """One worker's part of a training."""

    def __init__(
        self,
        objective: Objective,
        reader: RowReader,
        config: TrainerConfig,
        folder: str,
        monitor: Monitor,
        workers: Workers,
        watchdog: Watchdog,
        validation: RowReader | None,
    ) -> None:
        self.validation = validation if config.validation_rows else None
        self.objective, self.reader, self.config, self.folder, self.workers = objective, reader, config, folder, workers
        self.asked = monitor
        self.monitor = monitor if workers.rank == 0 else Monitor()
        self.watchdog = watchdog
        # Draws previews with the averaged weights, on the first worker alone: shards and compilation do not concern it.
        self.replica = copy.deepcopy(objective.model).cpu().eval() if workers.rank == 0 else None
        model = objective.model.to(workers.device).train()
        if config.activation_checkpointing:
            parallel.checkpoint_activations(model)
        self.flops = None if self.replica is None else FirstForward(model, self.replica)
        if config.compile:
            parallel.compile_blocks(model)
        self.network = parallel.distribute(model, config.parallel, workers)
        self.state = _State(model, objective.state, config)
        self.writer = sharded.Writer(f"{folder}/checkpoints", workers, config.keep_checkpoints)
        self.samples_seen = self._restore()
        self.alarm = self._take_up_curve()
        if config.nonfinite == "roll_back" and self.samples_seen == 0:
            self._save()  # what there is to go back to at first

    def run(self) -> None:
        """From where the training stands to its end."""
        self.monitor.start(self.samples_seen, self.config.num_samples)
        pace = _Pace(self.config)
        while self.samples_seen < self.config.num_samples:
            batches = self.reader.batches(
                seed=self.config.seed + 1_000_000_007 * self.state.num_roll_backs,
                samples_seen=self.samples_seen,
                batch_size=self.config.batch_size,
                rank=self.workers.rank,
                world_size=self.workers.world_size,
                prepare=self._prepare,
            )
            with contextlib.closing(batches):
                self.watchdog.reached("reading rows", self.samples_seen)
                for keys, micro_batches in batches:
                    pace.data_arrived()
                    self.watchdog.reached("taking a step", self.samples_seen)
                    if not self._step(keys, micro_batches, pace):
                        self.writer.wait()
                        self.samples_seen = self._restore()
                        self.alarm = self._take_up_curve()
                        break
                    if self.samples_seen >= self.config.num_samples:
                        break
                    self.watchdog.reached("reading rows", self.samples_seen)

    def close(self) -> None:
        self.writer.close()

    def export(self) -> str:
        """Write `model/`; every worker calls it, the first one writes."""
        self.writer.wait()  # the last checkpoint is complete
        averaged = self.state.averaged()
        if self.workers.rank > 0:
            return ""
        facts = {**self.objective.facts(), "samples_seen": self.samples_seen}
        return checkpoints.save(f"{self.folder}/model", {"model": averaged}, facts)

    def _prepare(self, batch: Batch) -> tuple[list[str], list[Tensors]]:
        """Keys and micro-batches of a batch, ready for the device; called in the reader's thread."""
        size = self.config.micro_batch_size or len(batch["key"])
        parts = [
            {name: values[start : start + size] for name, values in batch.items()}
            for start in range(0, len(batch["key"]), size)
        ]
        micro_batches = [self.objective.prepare(part) for part in parts]
        if self.workers.device.type == "cuda":
            micro_batches = [
                {name: value if value.is_cuda else value.pin_memory() for name, value in one.items()}
                for one in micro_batches
            ]
        return batch["key"], micro_batches

    def _step(self, keys: list[str], micro_batches: list[Tensors], pace: "_Pace") -> bool:
        """One step, and what is due after it; returns whether to go on with the next batch."""
        config, state, workers = self.config, self.state, self.workers
        loss = self._backward(micro_batches)
        asked = torch.tensor([self.asked.wants_stop(), self.asked.wants_checkpoint()], device=workers.device)
        means = parallel.mean(torch.cat([loss[None], asked.float()]), workers)
        norm = state.gradient_norm()
        value, stopped, saved, gradient_norm = torch.cat([means, norm[None]]).tolist()  # one wait for the device
        if math.isfinite(value) and math.isfinite(gradient_norm):
            state.apply(self.samples_seen, gradient_norm)
        elif math.isfinite(value) and state.loss_scale.shrink():
            state.zero_grad()  # an overflow of fp16, which a smaller scale prevents
        elif self._after_nonfinite(value, gradient_norm, keys) == "roll_back":
            return False
        self.samples_seen += config.batch_size
        self.monitor.step(self.samples_seen, value)
        pace.stepped(value)
        if _due(self.samples_seen, config.log_samples or max(1, config.num_samples // 100), config):
            extra = {"gradient_norm": gradient_norm, "learning_rate": learning_rate(config, self.samples_seen)}
            speed = pace.summary()
            speed |= self._speed(speed["samples_per_second"])
            self._tell({**speed, **extra, **self.objective.metrics(True)})
        if stopped or saved or _due(self.samples_seen, config.checkpoint_samples, config):
            self._save(validate=not (stopped or saved))
        if not stopped and _due(self.samples_seen, config.samples_between_previews(), config):
            self._preview()
        if stopped and self.samples_seen < config.num_samples:
            self.writer.wait()
            raise StoppedError(
                f"training: stopped as asked after {self.samples_seen:,} of {config.num_samples:,} samples. "
                f"Nothing is lost: run the same command again to go on."
            )
        return True

    def _backward(self, micro_batches: list[Tensors]) -> Tensor:
        """Gradients of this worker's share of a batch; returns its mean loss."""
        config, workers, number = self.config, self.workers, len(micro_batches)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            generator = _seed_step(config.seed, self.samples_seen, workers.rank * number + index, workers.device)
            tensors = {name: value.to(workers.device, non_blocking=True) for name, value in micro_batch.items()}
            with parallel.without_sync(self.network, index < number - 1):
                with autocast(config.precision, workers.device):
                    loss = self.objective.loss(self.network, tensors, generator)
                (loss * (self.state.loss_scale.value / number)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def _after_nonfinite(self, loss: float, gradient_norm: float, keys: list[str]) -> str:
        """Do what the configuration says about a loss or gradient that is not finite; the same on all workers."""
        config, state = self.config, self.state
        state.zero_grad()
        keys = [key for of_worker in parallel.of_all(keys, self.workers) for key in of_worker]
        state.num_nonfinite += 1
        happened = f"got loss {loss} and gradient norm {gradient_norm} after {self.samples_seen} samples"
        if self.workers.rank == 0:
            event = {"samples_seen": self.samples_seen, "loss": str(loss), "gradient_norm": str(gradient_norm)}
            files.write_json(f"{self.folder}/nonfinite/{self.samples_seen:012d}.json", {**event, "keys": keys})
        if config.nonfinite == "stop" or state.num_nonfinite > config.max_nonfinite:
            raise NonFiniteError(
                f"training: {happened}, in the batch of {', '.join(keys[:4])} ... ({len(keys)} keys are in "
                f"{self.folder}/nonfinite). The weights are untouched. Lower the learning rate or set precision = 'fp32'."
            )
        self.monitor.warn(f"{happened}; {'the batch is skipped' if config.nonfinite == 'skip' else 'rolling back'}.")
        return config.nonfinite

    def _tell(self, values: dict[str, float]) -> None:
        """Metrics to the monitor and the curve, and what is wrong with them; on the first worker."""
        if self.workers.rank > 0:
            return
        for warning in self.alarm.hear(self.samples_seen, values):
            self.monitor.warn(warning)
        over_reference = self.alarm.over_reference()
        if over_reference is not None:
            values = {**values, "loss_over_reference": over_reference}
        self.monitor.metrics(values, self.samples_seen)

    def _take_up_curve(self) -> curves.Alarm:
        """The curve up to the checkpoint that was taken up; the first worker has one."""
        if self.workers.rank > 0:
            return curves.Alarm({})
        curve: curves.Curve = {}
        if self.samples_seen:
            try:
                curve = curves.read(f"{self.folder}/{CURVE}")
            except ConfigError as error:
                self.monitor.warn(f"the curve begins anew: {error}")
        reference = self.config.reference_curve
        return curves.Alarm(
            {samples_seen: point for samples_seen, point in curve.items() if samples_seen <= self.samples_seen},
            None if reference is None else curves.read(reference),
        )

    def _speed(self, samples_per_second: float) -> dict[str, float]:
        """What is in the samples of a second, the arithmetic that each device does for them and its share of what it could do;
        and the most memory that this worker had."""
        sizes = self.objective.sample_size.items()
        values = {f"{unit}_per_second": samples_per_second * size for unit, size in sizes}
        if self.flops is not None and self.flops.flops_per_sample is not None:
            rate = samples_per_second * self.flops.flops_per_sample / self.workers.world_size
            values["teraflops_per_second"] = rate / 1e12
            peak = peak_flops(self.workers.device)
            values |= {} if peak is None else {"model_flops_utilisation": rate / peak}
        on_device = self.workers.device.type == "cuda"
        peak_bytes = torch.cuda.max_memory_allocated(self.workers.device) if on_device else _peak_resident_bytes()
        return {**values, "memory_gib": peak_bytes / 2**30}

    def _save(self, validate: bool = True) -> None:
        """Write a checkpoint; without a validation before it where time is short."""
        facts = {**self.objective.facts(), **self.state.facts(), **(self._validate() if validate else {})}
        self.watchdog.reached("writing a checkpoint", self.samples_seen)
        if self.workers.rank == 0:
            with contextlib.suppress(StorageError):  # a full disk is for the checkpoint to tell
                curves.write(f"{self.folder}/{CURVE}", self.alarm.curve)
        self.writer.save(self.samples_seen, self.state.tensors(), facts)

    def _validate(self) -> dict[str, float]:
        """Measure `validation_loss` of the averaged weights; on the first worker, which the others wait for."""
        if self.validation is None:
            return {}
        with self._averaged_replica() as model:
            if model is None:
                return {}
            keys = self.validation.keys()[: self.config.validation_rows]
            size = self.config.micro_batch_size or self.config.batch_size // self.workers.world_size
            total = 0.0
            for start in range(0, len(keys), size):
                self.watchdog.reached("validating", self.samples_seen)
                batch = self.validation.read(keys[start : start + size])
                generator = torch.Generator(self.workers.device).manual_seed(start)
                tensors = {name: value.to(self.workers.device) for name, value in self.objective.prepare(batch).items()}
                with torch.no_grad(), autocast(self.config.precision, self.workers.device):
                    total += float(self.objective.loss(model, tensors, generator)) * len(batch["key"])
        values = {"loss": total / len(keys), **self.objective.metrics(False)}
        validation = {f"validation_{name}": value for name, value in values.items()}
        self.alarm.add(self.samples_seen, validation)
        self.monitor.metrics(validation, self.samples_seen)
        return {"validation_loss": values["loss"]}

    @contextlib.contextmanager
    def _averaged_replica(self) -> Iterator[nn.Module | None]:
        """On the first worker a whole model with the averaged weights, on its device and in evaluation mode."""
        averaged = self.state.averaged()
        if self.replica is None:
            yield None
            return
        self.replica.load_state_dict(averaged)
        try:
            yield self.replica.to(self.workers.device)
        finally:
            self.replica.cpu()

    def _restore(self) -> int:
        """Take up the last checkpoint; returns its samples_seen, 0 without one."""
        state = self.state
        num_nonfinite, num_roll_backs = state.num_nonfinite, state.num_roll_backs
        facts = sharded.restore(f"{self.folder}/checkpoints", state.tensors(), self.workers)
        state.take_up(facts or {})
        if num_nonfinite:  # rolled back: what was learnt of bad batches is newer than the checkpoint
            state.num_nonfinite, state.num_roll_backs = num_nonfinite, num_roll_backs + 1
        return int(facts["samples_seen"]) if facts else 0

    def _preview(self) -> None:
        self.watchdog.reached("drawing a preview", self.samples_seen)
        with self._averaged_replica() as model:
            if model is None:
                return
            try:
                with torch.no_grad(), autocast(self.config.precision, self.workers.device):
                    images = self.objective.preview(model)
                if images is not None:
                    self.monitor.preview(images, self.samples_seen)
            except Exception as error:  # a picture is not worth a training
                self.monitor.warn(f"no preview after {self.samples_seen:,} samples: {error or type(error).__name__}")


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
        self.loss_scale = LossScale.of(config.precision)
        self.num_nonfinite = self.num_roll_backs = 0
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
        # There before the first step, so that a checkpoint can be copied into it.
        for value in self.parameters.values():
            moments = {name: torch.zeros_like(value.detach()) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=value.device)
            self.optimizer.state[value] = {"step": step, **moments}
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients of all workers together; undoes the scale of the loss."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        if self.loss_scale.enabled:
            torch._foreach_mul_([parallel.local(gradient) for gradient in gradients], 1 / self.loss_scale.value)
        return parallel.whole(torch.nn.utils.get_total_norm(gradients)).float()

    def apply(self, samples_seen: int, gradient_norm: float) -> None:
        """Take the step that the gradients say, whose norm is `gradient_norm`."""
        if gradient_norm > self.config.clip_norm:
            norm = torch.tensor(gradient_norm)
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, samples_seen)
        self.optimizer.step()
        self.zero_grad()
        self.loss_scale.grow()
        steps = samples_seen / self.config.batch_size
        decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            averages = [parallel.local(value) for value in self.average.values()]
            values = [parallel.local(value.detach()) for value in self.parameters.values()]
            torch._foreach_lerp_(averages, values, 1 - decay)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Tensors:
        """Everything that a later step depends on and that is a tensor; a checkpoint is copied into them."""
        groups: dict[str, Mapping[str, Tensor]] = {"weights": self.model.state_dict(), "average": self.average}
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            groups[moment] = {name: self.optimizer.state[value][moment] for name, value in self.parameters.items()}
        groups["objective"] = self.objective
        return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}

    def facts(self) -> dict[str, Any]:
        """What else a later step depends on."""
        return {
            "num_nonfinite": self.num_nonfinite,
            "num_roll_backs": self.num_roll_backs,
            "loss_scale": dataclasses.asdict(self.loss_scale),
        }

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """What `facts` gave."""
        self.num_nonfinite, self.num_roll_backs = facts.get("num_nonfinite", 0), facts.get("num_roll_backs", 0)
        if "loss_scale" in facts:
            self.loss_scale = LossScale(**facts["loss_scale"])

    def averaged(self) -> Tensors:
        """The model's whole state on the CPU, averaged weights in place of the raw ones. All workers must ask."""
        values = {**self.model.state_dict(), **self.average}
        return {name: parallel.whole(value).cpu() for name, value in values.items()}


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


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _due(samples_seen: int, every: int, config: TrainerConfig) -> bool:
    """Whether this step crossed a multiple of `every`, or is the last."""
    crossed = samples_seen // every > (samples_seen - config.batch_size) // every
    return crossed or samples_seen >= config.num_samples


def _seed_step(seed: int, samples_seen: int, micro_batch: int, device: torch.device) -> torch.Generator:
    """Randomness of a micro-batch: a function of where it stands in all of the training, so that nothing of it is saved."""
    step_seed = (seed * 1_000_003 + samples_seen * 1_009 + micro_batch) % 2**63
    torch.manual_seed(step_seed)  # dropout
    return torch.Generator(device).manual_seed(step_seed + 1)
