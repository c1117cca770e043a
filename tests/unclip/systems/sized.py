"""Networks of a model size, for tests."""

import dataclasses

import torch
from torch import nn

from unclip.systems.part import Shapes
from unclip.systems.unclip.decoder import DECODER
from unclip.systems.unclip.prior import PRIOR
from unclip.systems.unclip.sizes import ModelSize
from unclip.systems.upsampler import UPSAMPLER
from unclip.training.memory import Network


def shapes(size: ModelSize) -> Shapes:
    return Shapes.of(size.clip)


def networks(size: ModelSize) -> dict[str, Network]:
    """Both priors, the decoder and the upsamplers, by name."""
    autoregressive = dataclasses.replace(size.prior, kind="autoregressive")
    return {
        "prior": PRIOR.network(size.prior, shapes(size)),
        "autoregressive_prior": PRIOR.network(autoregressive, shapes(size)),
        "decoder": DECODER.network(size.decoder, shapes(size)),
        **{each.model.name: UPSAMPLER.network(each, shapes(size)) for each in size.upsamplers},
    }


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameters(network: Network) -> int:
    """Count parameters without allocating them, on the meta device."""
    with torch.device("meta"):
        return num_parameters(network.build())
