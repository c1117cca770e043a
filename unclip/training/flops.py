"""FLOPs of training a model, counted while it runs, for model FLOPs utilisation.

torch's counters are imported where they are used: they take a second, and most commands count nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PEAK_FLOPS = {
    "H200 NVL": 835.5e12,
    "H200": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOPs per second by a part of the device name, from the vendors' data sheets; names of which others are parts
come first."""


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOPs per second of a device; None if unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(device_name: str) -> float | None:
    """Peak bf16 FLOPs per second of the device with this name; None if unknown."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


class FirstForward:
    """Counts the FLOPs of a model once, from the inputs of its next forward pass."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        """Args:
        twin: the same network, not compiled and not sharded, because not all operations of those are counted. Not changed.
        """
        self.flops_per_sample: float | None = None
        """FLOPs of training, as from `flops_per_sample()`; None before the first forward pass."""
        self._twin = twin
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils._pytree import tree_map_only

        self._hook.remove()
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs, options = tree_map_only(Tensor, _without_data, (inputs, options))
            self.flops_per_sample = flops_per_sample(self._twin, *inputs, **options)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def flops_per_sample(model: nn.Module, *inputs: Any, **options: Any) -> float:
    """FLOPs of training per sample, in matrix products, convolutions and attention.

    Training takes three times the FLOPs of a forward pass, because the backward pass has two products for each of the
    forward pass. Recomputation by activation checkpointing is not counted (model FLOPs as in Chowdhery et al. 2022,
    appendix B), nor is a frozen network in the loss. Only shapes matter, so model and inputs may be fake or on the meta device.

    Args:
        inputs, options: arguments of `model.forward`; the first is a tensor [B, ...].
    """
    return float(3 * flops_of(model, *inputs, **options) / len(inputs[0]))


def flops_of(function: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """FLOPs of one call of a model or of its method, counted like those of `flops_per_sample`, without a backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs, **options)
    return int(counter.get_total_flops())
