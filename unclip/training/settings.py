"""Settings of a training, and the learning rate that follows from them."""

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


def learning_rate(config: TrainerConfig, samples_seen: int) -> float:
    """Learning rate of the step that starts at `samples_seen`: linear warm-up, then cosine decay to 0."""
    if samples_seen < config.warmup_samples:
        return config.learning_rate * (samples_seen + config.batch_size) / (config.warmup_samples + config.batch_size)
    if config.decay == "none":
        return config.learning_rate
    progress = (samples_seen - config.warmup_samples) / max(1, config.num_samples - config.warmup_samples)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
