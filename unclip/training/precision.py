"""Arithmetic of networks: one decision for training, embedding and sampling."""

import contextlib
import dataclasses
from typing import Any, ClassVar, Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""bf16 or fp16 autocast, or none; auto takes bf16 where the device multiplies matrices faster in it."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network runs on a device."""
    wanted = precision in ("bf16", "fp16") or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=wanted)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices faster in bf16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without instructions of its own for it, a CPU is slower in bf16.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclasses.dataclass
class LossScale:
    """What a loss is multiplied with, so that fp16 can hold its gradients; 1 in any other arithmetic.

    Twice as large after so many good steps, half after an overflow. torch's GradScaler does the same, but knows nothing of
    gradients that are sharded over workers. Source: Micikevicius et al. 2018, section 3.2.
    """

    enabled: bool
    """Whether there is fp16; without it the scale is 1."""
    value: float
    """The scale."""
    good_steps: int = 0
    """Since it last changed."""

    GROWTH_STEPS: ClassVar[int] = 2000
    SMALLEST: ClassVar[float] = 2.0**-14

    @classmethod
    def of(cls, precision: Precision) -> "LossScale":
        return cls(True, 2.0**16) if precision == "fp16" else cls(False, 1.0)

    def grow(self) -> None:
        """After a good step."""
        self.good_steps += int(self.enabled)
        if self.good_steps == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def shrink(self) -> bool:
        """After gradients that are not finite; returns whether a smaller scale may help."""
        can_shrink = self.enabled and self.value > self.SMALLEST
        if can_shrink:
            self.value, self.good_steps = self.value / 2, 0
        return can_shrink
