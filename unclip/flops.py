"""Arithmetic that a model's training takes, counted rather than worked out: what model FLOPs utilisation is a share of."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 operations a second by a part of the device's name, from their makers' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """What a device can do in a second in bf16 at most; None when that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class FirstForward:
    """Counts the operations of the next forward pass of a model, whoever calls it, and none after that."""

    def __init__(self, model: nn.Module) -> None:
        self.flops_per_sample: float | None = None
        """Of training, as `flops_per_sample`; None before."""
        self._counter = FlopCounterMode(display=False)
        self._before = model.register_forward_pre_hook(self._start)
        self._after = model.register_forward_hook(self._end)

    def _start(self, *_: Any) -> None:
        self._before.remove()
        self._counter.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        self._after.remove()
        self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.flops_per_sample = 3 * self._counter.get_total_flops() / len(inputs[0])


def flops_per_sample(model: nn.Module, *inputs: Any) -> float:
    """Floating-point operations of matrix products, convolutions and attention that training takes for one sample.

    Three times those of a forward pass: the backward pass has two products for each of the forward pass. What activation
    checkpointing computes again is not counted, nor is anything else that a model does not need (Chowdhery et al. 2022,
    appendix B). Only shapes matter, so model and inputs may be fake or on the meta device.

    Args:
        inputs: those of `model.forward`, the first a tensor [B, ...].
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return float(3 * counter.get_total_flops() / len(inputs[0]))
