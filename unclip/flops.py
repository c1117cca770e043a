"""Arithmetic that a model's training takes, counted rather than worked out: what model FLOPs utilisation is a share of."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
