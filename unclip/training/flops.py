"""Arithmetic that a model's training takes, counted rather than worked out: what model FLOPs utilisation is a share of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 operations a second by a part of the device's name, from their makers' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """What a device can do in a second in bf16 at most; None when that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class FirstForward:
    """Counts the operations of a model by the inputs of its next forward pass, whoever calls it, and of none after that."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        """Args:
        twin: the same network, neither compiled nor in shards: the operations of those are not all counted. Not changed.
        """
        self.flops_per_sample: float | None = None
        """Of training, as `flops_per_sample`; None before."""
        self._twin = twin
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._hook.remove()
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs, options = tree_map_only(Tensor, _with_no_data, (inputs, options))
            self.flops_per_sample = flops_per_sample(self._twin, *inputs, **options)


def _with_no_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def flops_per_sample(model: nn.Module, *inputs: Any, **options: Any) -> float:
    """Floating-point operations of matrix products, convolutions and attention that training takes for one sample.

    Three times those of a forward pass: the backward pass has two products for each of the forward pass. What activation
    checkpointing computes again is not counted, nor is anything else that a model does not need (Chowdhery et al. 2022,
    appendix B). Only shapes matter, so model and inputs may be fake or on the meta device.

    Args:
        inputs, options: those of `model.forward`, the first a tensor [B, ...].
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, **options)
    return float(3 * counter.get_total_flops() / len(inputs[0]))
