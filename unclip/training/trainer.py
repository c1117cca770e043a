"""Training loop for all models.

The order of rows, the noise, dropout and the learning rate are pure functions of (config, rows, samples seen). So a
checkpoint holds only weights, EMA weights, the optimiser's moments and the state of the objective, and a training that was
killed and restarted takes exactly the same steps as one without interruption. With `micro_batch_size` this holds for any
number of workers, because noise depends on the micro-batch and not on the rank that computes it.
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
from unclip.data import Batch, RowReader
from unclip.errors import ConfigError, NonFiniteError, StoppedError, StorageError
from unclip.training import checkpoints, curves, parallel, sharded
from unclip.training.flops import FirstForward, peak_flops
from unclip.training.objective import Learning, Measuring, Monitor, Objective, Paced, Tensors
from unclip.training.parallel import ALONE, Workers
from unclip.training.precision import autocast
from unclip.training.settings import TrainerConfig, learning_rate
from unclip.training.state import TrainingState
from unclip.training.watchdog import Watchdog

log = logging.getLogger(__name__)

CURVE = "curve.tsv"
"""Name of the loss curve file in the folder of a training."""
HUNG = "hung.json"
"""Name of the file in the folder of a training that says which worker hung last."""
HUNG_EXIT_CODE = 70  # EX_SOFTWARE
MEASURED_ROWS = 16
"""Number of training rows on which a finished model is measured."""


def train(
    objective: Objective,
    reader: RowReader,
    config: TrainerConfig,
    folder: str,
    monitor: Monitor | None = None,
    workers: Workers = ALONE,
    validation: RowReader | None = None,
) -> str:
    """Train to the end, resuming from the last checkpoint in `folder` if there is one.

    Args:
        folder: URI of a folder for this training only; gets `checkpoints/` and, at the end, `model/`.
        monitor: follows the training on rank 0; on every rank it may request a checkpoint or a stop.
        validation: held-out rows; `validation_rows` of them give the validation loss.

    With several workers, all processes exit with `HUNG_EXIT_CODE` if one of them hangs.

    Returns:
        Digest of `model/`, which holds the EMA weights and facts; "" on ranks other than 0.

    Raises:
        NonFiniteError: a loss or gradient is not finite; it did not change the weights.
        StoppedError: the monitor requested a stop; a checkpoint was written.
        CheckpointError: the checkpoints in `folder` are from another model.
        ConfigError: the batch cannot be divided equally among the workers.
    """
    config.check_workers(workers.world_size)
    if workers.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling uninitialised memory takes a tenth of a step, and nothing here reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    monitor = monitor or Monitor()

    def on_hang(message: str) -> None:
        try:
            monitor.warn(message)
            if workers.world_size > 1:
                files.write_json(f"{folder}/{HUNG}", {"message": message})
        finally:
            if workers.world_size > 1:
                os._exit(HUNG_EXIT_CODE)  # nothing else can interrupt a collective

    watchdog = Watchdog(f"{folder}/workers", workers, config.hang_seconds, on_hang)
    with watchdog.running():
        training = _Training(objective, reader, config, folder, monitor, workers, watchdog, validation)
        with contextlib.closing(training):
            training.run()
        return training.export()


class _Training:
    """Training, as run by one of its workers."""

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
        assert isinstance(objective, Learning) or not objective.state, "an objective with a state needs `learn`"
        self.requests = monitor  # of every rank
        self.monitor = monitor if workers.rank == 0 else Monitor()
        self.watchdog = watchdog
        # Full model for the EMA weights, on rank 0 only, without sharding and compilation.
        self.replica = copy.deepcopy(objective.model).cpu().eval() if workers.rank == 0 else None
        model = objective.model.to(workers.device).train()
        if config.activation_checkpointing:
            parallel.checkpoint_activations(model)
        self.flops = None if self.replica is None else FirstForward(model, self.replica)
        if config.compile:
            parallel.compile_blocks(model)
        self.network = parallel.distribute(model, config.parallel, workers)
        factors = objective.learning_rate_factors if isinstance(objective, Paced) else {}
        self.state = TrainingState(model, objective.state, config, factors)
        self.writer = sharded.Writer(f"{folder}/checkpoints", workers, config.keep_checkpoints)
        self.samples_seen = self._restore()
        self.alarm = self._restore_curve()
        if config.nonfinite == "roll_back" and self.samples_seen == 0:
            self._save()  # target of a roll-back before the first regular checkpoint

    def run(self) -> None:
        """Train from the current state to the end."""
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
        """Write `model/` on rank 0; all ranks must call it."""
        self.writer.wait()  # until the last checkpoint is complete
        self.watchdog.reached("measuring the model", self.samples_seen)
        with self._ema_replica() as model:
            if model is None:
                return ""
            measured = self._measure(model)
        numbers = {name: value.item() for name, value in measured.items() if value.dim() == 0}
        if numbers:
            self.monitor.metrics(numbers, self.samples_seen)
        tensors = {"model": model.state_dict(), **({"measured": measured} if measured else {})}
        facts = {**self.objective.facts(), "samples_seen": self.samples_seen}
        return checkpoints.save(f"{self.folder}/model", tensors, facts)

    def _measure(self, model: nn.Module) -> Tensors:
        """Measure the finished model if the objective is `Measuring`; the result is deterministic."""
        if not isinstance(self.objective, Measuring):
            return {}
        device = self.workers.device
        # no more rows at once than in training: these fit
        num_rows = min(MEASURED_ROWS, self.config.micro_batch_size or MEASURED_ROWS)
        batch = self.reader.read(self.reader.places.spread(num_rows))
        tensors = {name: value.to(device) for name, value in self.objective.prepare(batch).items()}
        with torch.no_grad(), autocast(self.config.precision, device):
            return self.objective.measure(model, tensors, torch.Generator(device).manual_seed(self.config.seed))

    def _prepare(self, batch: Batch) -> tuple[list[str], list[Tensors]]:
        """Split a batch into its keys and micro-batches, ready for the device; called in the reader's thread."""
        size = self.config.micro_batch_size or len(batch["key"])
        parts = [
            {name: values[start : start + size] for name, values in batch.items()}
            for start in range(0, len(batch["key"]), size)
        ]
        micro_batches = [self.objective.prepare(part) for part in parts]
        if self.workers.device.type == "cuda":
            micro_batches = [
                {name: value if value.is_cuda else value.pin_memory() for name, value in micro_batch.items()}
                for micro_batch in micro_batches
            ]
        return batch["key"], micro_batches

    def _step(self, keys: list[str], micro_batches: list[Tensors], pace: "_Pace") -> bool:
        """Take a step, then log, save and preview as due; return False after a roll-back."""
        config, state, workers = self.config, self.state, self.workers
        loss = self._backward(micro_batches)
        requests = torch.tensor([self.requests.wants_stop(), self.requests.wants_checkpoint()], device=workers.device)
        means = parallel.all_reduce_mean(torch.cat([loss[None], requests.float()]), workers)
        norm = state.gradient_norm()
        value, wants_stop, wants_checkpoint, gradient_norm = torch.cat([means, norm[None]]).tolist()  # one device sync
        step_taken = math.isfinite(value) and math.isfinite(gradient_norm)
        if isinstance(self.objective, Learning):
            self.objective.learn(step_taken)
        if step_taken:
            state.apply(self.samples_seen, gradient_norm)
        elif math.isfinite(value) and state.loss_scale.shrink():
            state.zero_grad()  # an fp16 overflow, which a smaller scale prevents
        elif self._after_nonfinite(value, gradient_norm, keys) == "roll_back":
            return False
        self.samples_seen += config.batch_size
        self.monitor.step(self.samples_seen, value)
        pace.stepped(value)
        if _due(self.samples_seen, config.log_samples or max(1, config.num_samples // 100), config):
            extra = {"gradient_norm": gradient_norm, "learning_rate": learning_rate(config, self.samples_seen)}
            speed = pace.summary()
            speed |= self._speed(speed["samples_per_second"])
            self._report({**speed, **extra, **self.objective.metrics(True)})
        if wants_stop or wants_checkpoint or _due(self.samples_seen, config.checkpoint_samples, config):
            self._save(validate=not (wants_stop or wants_checkpoint))
        if not wants_stop and _due(self.samples_seen, config.samples_between_previews(), config):
            self._preview()
        if wants_stop and self.samples_seen < config.num_samples:
            self.writer.wait()
            raise StoppedError(
                f"training: stopped as asked after {self.samples_seen:,} of {config.num_samples:,} samples. "
                f"Nothing is lost: run the same command again to resume."
            )
        return True

    def _backward(self, micro_batches: list[Tensors]) -> Tensor:
        """Compute the gradients of this rank's share of a batch; return its mean loss."""
        config, workers, num_micro_batches = self.config, self.workers, len(micro_batches)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            position = workers.rank * num_micro_batches + index
            generator = _seed_step(config.seed, self.samples_seen, position, workers.device)
            tensors = {name: value.to(workers.device, non_blocking=True) for name, value in micro_batch.items()}
            with parallel.no_sync(self.network, index < num_micro_batches - 1):
                with autocast(config.precision, workers.device):
                    loss = self.objective.loss(self.network, tensors, generator)
                (loss * (self.state.loss_scale.value / num_micro_batches)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def _after_nonfinite(self, loss: float, gradient_norm: float, keys: list[str]) -> str:
        """React to a loss or gradient that is not finite, as configured by `nonfinite`; the same on all ranks."""
        config, state = self.config, self.state
        state.zero_grad()
        keys = [key for of_rank in parallel.all_gather(keys, self.workers) for key in of_rank]
        state.num_nonfinite += 1
        problem = f"got loss {loss} and gradient norm {gradient_norm} after {self.samples_seen} samples"
        if self.workers.rank == 0:
            event = {"samples_seen": self.samples_seen, "loss": str(loss), "gradient_norm": str(gradient_norm)}
            files.write_json(f"{self.folder}/nonfinite/{self.samples_seen:012d}.json", {**event, "keys": keys})
        if config.nonfinite == "stop" or state.num_nonfinite > config.max_nonfinite:
            raise NonFiniteError(
                f"training: {problem}, in the batch of {', '.join(keys[:4])} ... ({len(keys)} keys are in "
                f"{self.folder}/nonfinite). The weights are unchanged. Lower the learning rate or set precision = 'fp32'."
            )
        self.monitor.warn(f"{problem}; {'the batch is skipped' if config.nonfinite == 'skip' else 'rolling back'}.")
        return config.nonfinite

    def _report(self, values: dict[str, float]) -> None:
        """Send metrics to the monitor and the curve, and warn about problems; on rank 0."""
        if self.workers.rank > 0:
            return
        for warning in self.alarm.check(self.samples_seen, values):
            self.monitor.warn(warning)
        over_reference = self.alarm.over_reference()
        if over_reference is not None:
            values = {**values, "loss_over_reference": over_reference}
        self.monitor.metrics(values, self.samples_seen)

    def _restore_curve(self) -> curves.Alarm:
        """Loss curve up to the restored checkpoint; rank 0 only."""
        if self.workers.rank > 0:
            return curves.Alarm({})
        curve: curves.Curve = {}
        if self.samples_seen:
            try:
                curve = curves.restore(f"{self.folder}/{CURVE}")
            except ConfigError as error:
                self.monitor.warn(f"starting a new loss curve: {error}")
        reference = self.config.reference_curve
        return curves.Alarm(
            {samples_seen: point for samples_seen, point in curve.items() if samples_seen <= self.samples_seen},
            None if reference is None else curves.read(reference),
        )

    def _speed(self, samples_per_second: float) -> dict[str, float]:
        """Units per second, FLOPs per second and model FLOPs utilisation of each device, and the peak memory of rank 0's
        process."""
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
        """Write a checkpoint, after a validation unless time is short."""
        facts = {**self.objective.facts(), **self.state.facts(), **(self._validate() if validate else {})}
        self.watchdog.reached("writing a checkpoint", self.samples_seen)
        if self.workers.rank == 0:
            with contextlib.suppress(StorageError):  # the checkpoint reports a full disk
                curves.write(f"{self.folder}/{CURVE}", self.alarm.curve)
        self.writer.save(self.samples_seen, self.state.tensors(), facts)

    def _validate(self) -> dict[str, float]:
        """Measure `validation_loss` of the EMA weights on rank 0, while the other ranks wait."""
        if self.validation is None:
            return {}
        with self._ema_replica() as model:
            if model is None:
                return {}
            rows = self.validation.places.spread(self.config.validation_rows)
            size = self.config.micro_batch_size or self.config.batch_size // self.workers.world_size
            total = 0.0
            for start in range(0, len(rows), size):
                self.watchdog.reached("validating", self.samples_seen)
                batch = self.validation.read(rows[start : start + size])
                generator = torch.Generator(self.workers.device).manual_seed(start)
                tensors = {name: value.to(self.workers.device) for name, value in self.objective.prepare(batch).items()}
                with torch.no_grad(), autocast(self.config.precision, self.workers.device):
                    total += float(self.objective.loss(model, tensors, generator)) * len(batch["key"])
        values = {"loss": total / len(rows), **self.objective.metrics(False)}
        validation = {f"validation_{name}": value for name, value in values.items()}
        self.alarm.add(self.samples_seen, validation)
        self.monitor.metrics(validation, self.samples_seen)
        return {"validation_loss": values["loss"]}

    @contextlib.contextmanager
    def _ema_replica(self) -> Iterator[nn.Module | None]:
        """Full model with the EMA weights, on the device and in evaluation mode; None on ranks other than 0."""
        state_dict = self.state.ema_state_dict()
        if self.replica is None:
            yield None
            return
        self.replica.load_state_dict(state_dict)
        try:
            yield self.replica.to(self.workers.device)
        finally:
            self.replica.cpu()

    def _restore(self) -> int:
        """Restore the last checkpoint; return its `samples_seen`, or 0 if there is none."""
        state = self.state
        num_nonfinite, num_roll_backs = state.num_nonfinite, state.num_roll_backs
        facts = sharded.restore(f"{self.folder}/checkpoints", state.tensors(), self.workers)
        state.restore(facts or {})
        if num_nonfinite:  # roll-back: these counts are newer than the checkpoint
            state.num_nonfinite, state.num_roll_backs = num_nonfinite, num_roll_backs + 1
        return int(facts["samples_seen"]) if facts else 0

    def _preview(self) -> None:
        self.watchdog.reached("drawing a preview", self.samples_seen)
        with self._ema_replica() as model:
            if model is None:
                return
            try:
                with torch.no_grad(), autocast(self.config.precision, self.workers.device):
                    images = self.objective.preview(model)
                if images is not None:
                    self.monitor.preview(images, self.samples_seen)
            except Exception as error:  # a failed preview must not end a training
                self.monitor.warn(f"no preview after {self.samples_seen:,} samples: {error or type(error).__name__}")


class _Pace:
    """Speed and mean loss since the last summary."""

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
    """Return True if this step crossed a multiple of `every` or is the last one."""
    crossed = samples_seen // every > (samples_seen - config.batch_size) // every
    return crossed or samples_seen >= config.num_samples


def _seed_step(seed: int, samples_seen: int, micro_batch: int, device: torch.device) -> torch.Generator:
    """Seed torch and return a generator, as a function of the position in the training, so that no RNG state is saved."""
    step_seed = (seed * 1_000_003 + samples_seen * 1_009 + micro_batch) % 2**63
    torch.manual_seed(step_seed)  # dropout
    return torch.Generator(device).manual_seed(step_seed + 1)
