"""The training loop: one for every model.

Everything is a pure function of (config, rows, samples seen): the order of rows, the noise, dropout and the learning rate.
So a checkpoint holds only weights, their moving average, the optimiser's moments and what the objective itself learns, and a
run that was killed and restarted takes exactly the steps that an undisturbed run takes. With `micro_batch_size` that is so
for any number of workers: noise belongs to the micro-batch, whoever computes it.
"""

import contextlib
import copy
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unclip import files
from unclip.config import require
from unclip.data import Batch, RowReader
from unclip.errors import ConfigError, NonFiniteError, StoppedError, StorageError
from unclip.training import checkpoints, curves, parallel, sharded
from unclip.training.flops import FirstForward, peak_flops
from unclip.training.objective import Measuring, Monitor, Objective, Tensors
from unclip.training.parallel import ALONE, Workers
from unclip.training.precision import autocast
from unclip.training.settings import TrainerConfig, learning_rate
from unclip.training.state import TrainingState
from unclip.training.watchdog import Watchdog

log = logging.getLogger(__name__)

CURVE = "curve.tsv"
"""File in a training's folder that says how its loss fell."""
HUNG = "hung.json"
"""File in a training's folder that says which worker hung last."""
HUNG_EXIT_CODE = 70  # EX_SOFTWARE
MEASURED_ROWS = 16
"""Training rows that a finished model is measured on."""


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
        self.state = TrainingState(model, objective.state, config)
        self.writer = sharded.Writer(f"{folder}/checkpoints", workers, config.keep_checkpoints)
        self.samples_seen = self._restore()
        self.alarm = self._restore_curve()
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
                        self.alarm = self._restore_curve()
                        break
                    if self.samples_seen >= self.config.num_samples:
                        break
                    self.watchdog.reached("reading rows", self.samples_seen)

    def close(self) -> None:
        self.writer.close()

    def export(self) -> str:
        """Write `model/`; every worker calls it, the first one writes."""
        self.writer.wait()  # the last checkpoint is complete
        self.watchdog.reached("measuring the model", self.samples_seen)
        with self._averaged_replica() as model:
            if model is None:
                return ""
            measured = self._measure(model)
        tensors = {"model": model.state_dict(), **({"measured": measured} if measured else {})}
        facts = {**self.objective.facts(), "samples_seen": self.samples_seen}
        return checkpoints.save(f"{self.folder}/model", tensors, facts)

    def _measure(self, model: nn.Module) -> Tensors:
        """Tensors that the objective measures of the finished model, if it does: the same for the same weights."""
        if not isinstance(self.objective, Measuring):
            return {}
        device = self.workers.device
        batch = self.reader.read(self.reader.keys()[:MEASURED_ROWS])
        tensors = {name: value.to(device) for name, value in self.objective.prepare(batch).items()}
        with torch.no_grad(), autocast(self.config.precision, device):
            return self.objective.measure(model, tensors, torch.Generator(device).manual_seed(self.config.seed))

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
        means = parallel.all_reduce_mean(torch.cat([loss[None], asked.float()]), workers)
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
        keys = [key for of_worker in parallel.all_gather(keys, self.workers) for key in of_worker]
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

    def _restore_curve(self) -> curves.Alarm:
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
        state.restore(facts or {})
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
