"""Training settings and the learning rate schedule."""

import dataclasses
import math
from typing import Literal

from unclip.config import operational, require
from unclip.training import curves
from unclip.training.parallel import Parallel
from unclip.training.precision import Precision


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    num_samples: int = 1_000_000
    """Length of the training, in samples."""
    batch_size: int = 256
    """Samples per step, over all workers."""
    micro_batch_size: int = 0
    """Samples in one forward pass on a worker, which accumulates gradients over its share of the batch; 0 for the whole share
    at once. If set, training is the same for any number of workers."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_samples: int = 0
    """Length of the linear warm-up, in samples."""
    decay: Literal["cosine", "none"] = "cosine"
    """Decay of the learning rate after the warm-up; cosine reaches zero at the end."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.999
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.9999
    """Decay of the EMA weights; smaller early in training."""
    precision: Precision = "auto"
    """Precision of forward and backward passes."""
    parallel: Parallel = "ddp"
    """Model on several workers: replicated (ddp) or sharded (fsdp)."""
    activation_checkpointing: bool = False
    """Recompute the activations inside blocks in the backward pass: slower, but with less memory."""
    compile: bool = False
    """Compile the blocks of the network with torch: minutes at the start, faster steps on GPUs."""
    seed: int = 0
    """Seed of the weights, the order of rows, noise and dropout."""
    nonfinite: Literal["stop", "skip", "roll_back"] = operational("stop")
    """Reaction to a loss or gradient that is not finite: stop; skip the batch; or roll back to the last checkpoint and
    continue with another order of rows. The weights are never changed by it. Not in fingerprints, so that a stopped training
    can resume with another choice."""
    max_nonfinite: int = operational(10)
    """Maximum number of skipped batches or roll-backs; one more stops the training."""
    hang_seconds: float = operational(1800.0)
    """Seconds without progress on any worker after which the hanging one is reported. Several workers then exit, to be
    restarted from the last checkpoint. 0 to wait forever."""
    validation_rows: int = operational(512)
    """Number of held-out rows for the validation loss before each checkpoint, always with the same noise; 0 for none."""
    checkpoint_samples: int = operational(100_000)
    """Samples between checkpoints."""
    keep_checkpoints: int = operational(2)
    """Number of newest checkpoints to keep."""
    preview_samples: int = operational(0)
    """Samples between previews; 0 for eight evenly spaced ones, but at least 10,000 samples apart. The last is at the end."""
    log_samples: int = operational(0)
    """Samples between logged metrics; 0 for a hundredth of the training."""
    reference_curve: str | None = operational(None)
    """Loss curve of a good training of the same model to compare with: the name of one included in unclip, or the absolute
    path or URI of a `curve.tsv` that rank 0 can read."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "checkpoint_samples", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("validation_rows", "preview_samples", "log_samples", "max_nonfinite", "hang_seconds"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0 and below 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive number")
        fits = self.micro_batch_size == 0 or (
            self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0
        )
        require(fits, "micro_batch_size", self.micro_batch_size, f"a divisor of batch_size, {self.batch_size}, or 0")
        curve = self.reference_curve
        is_valid = curve is None or curve in curves.reference_names() or curve.startswith("/") or "://" in curve
        expected = f"an absolute path, a URI, or one of {', '.join(curves.reference_names())}"
        require(is_valid, "reference_curve", curve, expected)

    def check_workers(self, num_workers: int) -> None:
        """Check that a batch can be divided equally among workers.

        Raises:
            ConfigError: it cannot.
        """
        unit = num_workers * max(1, self.micro_batch_size)
        expected = f"a multiple of {num_workers} workers" + " times micro_batch_size" * (self.micro_batch_size > 0)
        require(self.batch_size % unit == 0, "batch_size", self.batch_size, expected)

    def samples_between_previews(self) -> int:
        """Preview interval in samples. A preview costs about as much as 400 training samples, so 10,000 keep it cheap."""
        return self.preview_samples or max(10_000, math.ceil(self.num_samples / 8))


def learning_rate(config: TrainerConfig, samples_seen: int) -> float:
    """Learning rate of the step at `samples_seen`: linear warm-up, then cosine decay to 0 unless `decay` is none."""
    if samples_seen < config.warmup_samples:
        return config.learning_rate * (samples_seen + config.batch_size) / (config.warmup_samples + config.batch_size)
    if config.decay == "none":
        return config.learning_rate
    progress = (samples_seen - config.warmup_samples) / max(1, config.num_samples - config.warmup_samples)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
