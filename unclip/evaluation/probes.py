"""Probes: small linear or MLP heads on CLIP image embeddings, such as aesthetic, NSFW and watermark predictors.

Published predictors on CLIP embeddings all have this form. They are read from safetensors, never unpickled: weights
`<anything>.<number>.weight` [out, in] with optional biases, applied in numerical order. The file's metadata may name
`activation` (between layers) and `output` (after the last one); both default to none.
"""

import json
import re
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from unclip import files
from unclip.errors import InputError, ShapeError

Activation = Literal["none", "relu", "gelu", "silu", "tanh", "sigmoid"]
_FUNCTIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)|(weight|bias)")
MAX_BYTES = 256 << 20


class Probe(nn.Module):
    """A module that maps each embedding to a scalar; for a head with two outputs, the probability of the second."""

    def __init__(self, layers: list[nn.Linear], activation: Activation, output: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = _FUNCTIONS[activation]() if activation != "none" else nn.Identity()
        self.output = _FUNCTIONS[output]() if output != "none" else nn.Identity()
        self.eval().requires_grad_(False)

    @property
    def embedding_dim(self) -> int:
        return int(self.layers[0].in_features)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, image_embedding: Tensor) -> Tensor:
        """Return scores [B] float32 of unit-norm image embeddings [B, E].

        Raises:
            ShapeError: the width of the embeddings differs from the probe's.
        """
        if image_embedding.dim() != 2 or image_embedding.shape[1] != self.embedding_dim:
            raise ShapeError(
                f"probe: got embeddings {tuple(image_embedding.shape)}, expected [B, {self.embedding_dim}]. "
                "Use a probe for this CLIP."
            )
        hidden = image_embedding.float()
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden if index == 0 else self.activation(hidden))
        if hidden.shape[1] == 2:
            return hidden.softmax(dim=1)[:, 1]
        scores: Tensor = self.output(hidden).squeeze(1)
        return scores


def load_probe(uri: str) -> Probe:
    """Read a probe from a safetensors file.

    Raises:
        InputError: the file is missing, damaged, or not a chain of linear layers with one or two outputs.
    """
    from safetensors.torch import load

    try:
        data = files.read(uri)
        if len(data) > MAX_BYTES:
            raise InputError(
                f"probe: {uri} has {len(data):,} bytes, expected at most {MAX_BYTES:,}. Name the file of a probe."
            )
        tensors, metadata = load(data), _metadata(data)
    except FileNotFoundError:
        raise InputError(f"probe: {uri} does not exist. Name a safetensors file.") from None
    except InputError:
        raise
    except Exception as error:  # safetensors raises exceptions of its own
        raise InputError(
            f"probe: {uri} is not a safetensors file: {error}. Convert the weights to safetensors."
        ) from None
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if not match:
            raise InputError(f"probe: {uri} has a tensor {name!r}, expected <number>.weight and <number>.bias only.")
        layers.setdefault(int(match[1] or 0), {})[match[2] or match[3]] = tensor.float()
    linears = [_linear(uri, layers[number]) for number in sorted(layers)]
    widths = [linear.in_features for linear in linears[1:]] + [linears[-1].out_features if linears else 0]
    if [linear.out_features for linear in linears] != widths or widths[-1] not in (1, 2):
        raise InputError(f"probe: the layers of {uri} do not chain to one score. Name the file of a probe.")
    return Probe(linears, *_activations(uri, metadata))


def _linear(uri: str, tensors: dict[str, Tensor]) -> nn.Linear:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(f"probe: {uri} has a layer that is not linear, expected a weight [out, in] and a bias [out].")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict(tensors)
    return linear


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def _activations(uri: str, metadata: dict[str, str]) -> tuple[Activation, Activation]:
    found = [metadata.get("activation", "none"), metadata.get("output", "none")]
    for value in found:
        if value not in get_args(Activation):
            raise InputError(
                f"probe: {uri} names activation {value!r}, expected one of {', '.join(get_args(Activation))}."
            )
    return found[0], found[1]  # type: ignore[return-value]
