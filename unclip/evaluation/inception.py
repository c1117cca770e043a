"""Inception features of images, as FID and KID are defined by them.

The network is Inception v3 as it was released in 2015 for TensorFlow: of torchvision's network, the pools of some blocks differ.
Its converted weights, `pt_inception-2015-12-05-6726825d.pth`, are those that pytorch-fid, torch-fidelity and torchmetrics use.
No other weights are accepted, since their distances would look like FID and not be FID. TorchScript files are programs, which
would run here, so they are not read.

Letters: B images, S resolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip import files, imaging
from unclip.errors import InputError

DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""sha256 of the weights; the name of their file ends with its first digits."""
MAX_BYTES = 1 << 28
SIZE = 299
"""Resolution that the network reads, pixels."""
WIDTH = 2048
"""Width of the features."""


def load_inception(uri: str) -> nn.Module:
    """Load the network with its weights, in evaluation mode; `prepare` makes images for it. Only tensors are unpickled.

    Raises:
        InputError: the file cannot be read, or holds other weights.
    """
    import io

    data = read_weights(uri)
    with torch.device("meta"):  # no time for random weights
        model: nn.Module = build()
    try:
        model.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), assign=True)
    except Exception as error:  # of many types, by what is wrong
        raise InputError(f"{uri}: holds no weights of Inception: {error}") from None
    model.fc = nn.Identity()
    return model.eval().requires_grad_(False)


def read_weights(uri: str) -> bytes:
    """Read the file with the weights and check its digest.

    Raises:
        InputError: the file cannot be read, or is another one.
    """
    try:
        size = files.size_of(uri)
        data = files.read(uri) if size <= MAX_BYTES else b""
    except OSError as error:
        raise InputError(
            f"{uri}: the weights of Inception cannot be read: {error}. Name the file, or set none."
        ) from None
    found = files.sha256(data)
    if found != DIGEST:
        shown = f"a file of {size:,} bytes" if size > MAX_BYTES else f"sha256 {found[:8]}..."
        raise InputError(
            f"{uri}: got {shown}, expected {DIGEST[:8]}..., that of pt_inception-2015-12-05-6726825d.pth: FID is the distance of "
            "its features, and of no other network's. Name that file, or set none: distances of CLIP's embeddings are measured "
            "in any case."
        )
    return data


def build() -> Any:
    """Return the network with random weights; it takes what `prepare` returns, to logits of 1,008 classes."""
    from torchvision.models.inception import Inception3

    model = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        getattr(model, name).branch_pool.register_forward_pre_hook(_without_padding)
    _take_maximum(model.Mixed_7c)
    return model


def prepare(images: Tensor) -> Tensor:
    """Images [B, 3, S, S] in [-1, 1] as the network reads them, [B, 3, 299, 299] from -1 to 127/128.

    They are rounded to 8 bits and resized as TensorFlow 1 did: bilinearly, with aligned top left corners and without smoothing.
    """
    pixels = torch.from_numpy(imaging.to_uint8(images)).to(images.device).permute(0, 3, 1, 2).float()  # [B, 3, S, S]
    rows, columns = (_interpolation(size, images.device) for size in pixels.shape[2:])
    return (rows @ pixels @ columns.T - 128) / 128


def _interpolation(size: int, device: torch.device) -> Tensor:
    """Matrix [299, S] that interpolates a line of S pixels at i S / 299."""
    position = torch.arange(SIZE, dtype=torch.float64) * size / SIZE
    before = position.floor().long()
    after, share = (before + 1).clamp(max=size - 1), (position - before)[:, None]
    matrix = (1 - share) * F.one_hot(before, size) + share * F.one_hot(after, size)
    return matrix.float().to(device)


def _without_padding(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Average of a 3x3 pool over the pixels inside of the image alone, of one that counts zeros around it."""
    [pooled] = inputs
    inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, 1, 1)
    return pooled / inside


def _take_maximum(block: nn.Module) -> None:
    """Let the last block pool by the maximum instead of the average."""
    read: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
        read[:] = inputs

    def pool(_: nn.Module, __: tuple[Tensor]) -> Tensor:
        return F.max_pool2d(read.pop(), 3, 1, 1)

    block.register_forward_pre_hook(keep)
    block.branch_pool.register_forward_pre_hook(pool)  # type: ignore[union-attr]
