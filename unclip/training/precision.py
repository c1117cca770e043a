"""Numerical precision of networks, for training, embedding and sampling alike."""

import contextlib
import dataclasses
from typing import Any, ClassVar, Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""Autocast precision; fp32 is no autocast, and auto is bf16 on devices with fast bf16 matrix products, otherwise fp32."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast context for running a network on a device."""
    enabled = precision in ("bf16", "fp16") or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=enabled)


def has_fast_bf16(device: torch.device) -> bool:
    """Return True if the device multiplies matrices faster in bf16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without bf16 instructions, a CPU is slower in bf16.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclasses.dataclass
class LossScale:
    """Scale of the loss that keeps fp16 gradients in range; 1 in other precisions.

    Doubled after `GROWTH_STEPS` good steps and halved after an overflow. torch's GradScaler does the same, but does not
    support gradients that are sharded over workers. Source: Micikevicius et al. 2018, section 3.2.
    """

    enabled: bool
    """True for fp16; otherwise the scale stays 1."""
    value: float
    """Current scale."""
    good_steps: int = 0
    """Good steps since the scale last changed."""

    GROWTH_STEPS: ClassVar[int] = 2000
    SMALLEST: ClassVar[float] = 2.0**-14

    @classmethod
    def of(cls, precision: Precision) -> "LossScale":
        return cls(True, 2.0**16) if precision == "fp16" else cls(False, 1.0)

    def grow(self) -> None:
        """Count a good step; double the scale when it is due."""
        self.good_steps += int(self.enabled)
        if self.good_steps == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def shrink(self) -> bool:
        """Halve the scale after gradients that are not finite; returns False if it cannot get smaller."""
        can_shrink = self.enabled and self.value > self.SMALLEST
        if can_shrink:
            self.value, self.good_steps = self.value / 2, 0
        return can_shrink
