"""Arithmetic of networks: one decision for training, embedding and sampling."""

import contextlib
from typing import Any, Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
"""bf16 autocast, or none; auto takes bf16 where the device multiplies matrices faster in it."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network runs on a device."""
    wanted = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices faster in bf16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without instructions of its own for it, a CPU is slower in bf16.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
