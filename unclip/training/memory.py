"""What training a preset's models takes of each GPU's memory, measured without a GPU.

Models are built of fake tensors, which have shapes, dtypes and storages but no bytes. One forward pass, seen as a CUDA
device sees it, says which storages autograd keeps: they are the activations, with the copies of weights that autocast makes.
Captions fill their sequences here; a training that leaves padding out keeps less.

Not counted, and left to a reserve of 10 % of the GPU: the CUDA context, fragmentation, workspaces, what single operations
hold for a moment (up to 8 % in the models of `dalle2`), buffers, the loss, the batch itself, a frozen CLIP, and previews, for
which the first worker holds one more copy of the weights while there are neither gradients nor activations.

Sizes are bytes, GiB where a name says so.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from unclip.config import require
from unclip.models.text import CaptionFeatures, TextShape
from unclip.training.flops import flops_per_sample
from unclip.training.parallel import Parallel, blocks
from unclip.training.precision import Precision

GIB = 2**30
RESERVE = 0.1
"""Share of a GPU that is left to what is not counted."""
MOST_SAMPLES = 4096
"""No larger micro-batch is looked for."""
_FLOAT32 = 4
"""Weights, gradients, moments and average are float32."""


class Network(NamedTuple):
    """A model to be trained, and what it is called with."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    """Arguments of `forward` for so many samples, of the right shapes and no meaning."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A size that grows with the samples of a micro-batch."""

    fixed: int
    per_sample: int

    def at(self, num_samples: int) -> int:
        return self.fixed + self.per_sample * num_samples


@dataclasses.dataclass(frozen=True)
class Activations:
    """What autograd keeps of one micro-batch; `fixed` are mostly the copies of weights that autocast makes."""

    whole: Bytes
    """Without activation checkpointing."""
    between: Bytes
    """With it: what blocks are given, and what lies outside blocks."""
    inside: tuple[Bytes, ...]
    """With it, and for one block at a time: what it computes again."""

    def at(self, num_samples: int, checkpointing: bool) -> int:
        """The most that is kept at a time.

        With checkpointing that is at the end of the forward pass, when autocast still has its copies of all weights, or
        while the largest block computes its activations again.
        """
        if not checkpointing:
            return self.whole.at(num_samples)
        again = max((block.at(num_samples) for block in self.inside), default=0)
        return self.between.at(num_samples) + max(self.whole.fixed - self.between.fixed, again)


@dataclasses.dataclass(frozen=True)
class States:
    """What a GPU holds whatever the micro-batch."""

    weights: int
    gradients: int
    moments: int
    """Adam's two."""
    average: int
    """The moving average of the weights."""
    exchange: int
    """DDP's copy of the gradients; or what FSDP gathers: weights and gradients outside blocks and of two blocks, the one
    at work and the next."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.exchange


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it."""

    num_gpus: int = 1
    parallel: Parallel = "ddp"
    checkpointing: bool = False
    """Of activations."""
    accumulates: bool = False
    """Whether the gradients of several micro-batches add up, which FSDP does with whole gradients on each GPU."""


@dataclasses.dataclass(frozen=True)
class ModelMemory:
    """One model's measurements."""

    name: str
    parameters: int
    outside_blocks: int
    """Parameters that are in no block (`parallel.blocks`)."""
    largest_block: int
    """Parameters of the largest block."""
    activations: Activations
    flops_per_sample: float
    """Of training (`unclip.training.flops`)."""

    def states(self, training: TrainingSetup) -> States:
        whole = _FLOAT32 * self.parameters
        if training.num_gpus == 1:
            return States(whole, whole, 2 * whole, whole, exchange=0)
        if training.parallel == "ddp":
            return States(whole, whole, 2 * whole, whole, exchange=whole)
        share = -(-whole // training.num_gpus)
        gathered = 2 * _FLOAT32 * (self.outside_blocks + 2 * self.largest_block)
        return States(share, whole if training.accumulates else share, 2 * share, share, exchange=gathered)

    def at(self, num_samples: int, training: TrainingSetup) -> int:
        """All that a GPU holds with micro-batches of so many samples."""
        return self.states(training).total + self.activations.at(num_samples, training.checkpointing)

    def largest_micro_batch(self, training: TrainingSetup, memory_gib: float) -> int:
        """The most samples, up to `MOST_SAMPLES`, that fit into GPUs of this memory less the reserve; 0 if none does."""
        available = memory_gib * GIB * (1 - RESERVE)
        fits, fails = 0, MOST_SAMPLES + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.at(middle, training) <= available else (fits, middle)
        return fits


def measure(name: str, network: Network, device: str = "cuda", precision: Precision = "bf16") -> ModelMemory:
    """Measure a model without holding it.

    Args:
        device: whose way of computing is measured; it need not be there.
        precision: of autocast; "auto" is not known here.

    Raises:
        ConfigError: precision "auto".
    """
    require(precision != "auto", "precision", precision, "bf16, fp16 or fp32")
    with FakeTensorMode(), torch.device(device), _FusedAttention():
        model = network.build().train()
        with _autocast(device, precision):
            fewer, more = (_saved(model, network.inputs(batch)) for batch in (2, 4))
        flops = flops_per_sample(model, *network.inputs(1))
    in_blocks = [_num_parameters(block) for block in blocks(model)]
    parameters = _num_parameters(model)
    return ModelMemory(
        name=name,
        parameters=parameters,
        outside_blocks=parameters - sum(in_blocks),
        largest_block=max(in_blocks, default=0),
        activations=Activations(
            whole=_line(fewer.whole, more.whole),
            between=_line(fewer.between, more.between),
            inside=tuple(_line(few, many) for few, many in zip(fewer.inside, more.inside, strict=True)),
        ),
        flops_per_sample=flops,
    )


class _Saved(NamedTuple):
    """Bytes that autograd keeps of one forward pass; see `Activations`."""

    whole: int
    between: int
    inside: list[int]


def _saved(model: nn.Module, inputs: tuple[Any, ...]) -> _Saved:
    """Run a forward pass and count the storages that it leaves to the backward pass, each once and without the weights."""
    own = {_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    outside: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage takes the same place
    inside: list[dict[int, torch.UntypedStorage]] = []
    given: dict[int, torch.UntypedStorage] = {}
    at_work = [outside]

    def enter(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        given.update({_key(tensor): tensor.untyped_storage() for tensor in tensors if _key(tensor) not in own})
        inside.append({})
        at_work.append(inside[-1])

    def leave(*_: Any) -> None:
        at_work.pop()

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            at_work[-1][_key(tensor)] = tensor.untyped_storage()
        return tensor

    with contextlib.ExitStack() as stack:
        for block in blocks(model):
            for handle in (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave),
            ):
                stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        output = model(*inputs)
        output.float().square().mean()  # the output is kept as by a loss
    everything = outside.copy()
    for each in inside:
        everything.update(each)
    between = {**outside, **given}
    alone = [{key: storage for key, storage in each.items() if key not in between} for each in inside]
    return _Saved(_size(everything.values()), _size(between.values()), [_size(each.values()) for each in alone])


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU computes it, which keeps no matrix of scores; without a GPU torch would take the plain way."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        mask = (kwargs or {}).get("attn_mask")
        bias = None if mask is None else mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


@contextlib.contextmanager
def _autocast(device: str, precision: Precision) -> Iterator[None]:
    """`precision.autocast` for a device that need not be there, which torch's own switches off."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, precision != "fp32")
    torch.set_autocast_dtype(device, torch.float16 if precision == "fp16" else torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def example_images(batch: int, size: int) -> Tensor:
    """Images [batch, 3, size, size] of no meaning."""
    return torch.zeros(batch, 3, size, size)


def example_indices(*shape: int) -> Tensor:
    """Integers, such as timesteps or tokens."""
    return torch.zeros(shape, dtype=torch.int64)


def example_flags(*shape: int) -> Tensor:
    """Booleans, such as masks."""
    return torch.zeros(shape, dtype=torch.bool)


def example_features(batch: int, text: TextShape, embedding_dim: int) -> CaptionFeatures:
    """Captions that fill their sequences, as CLIP gives them."""
    encodings = torch.zeros(batch, text.length, text.width)
    return CaptionFeatures(encodings, example_flags(batch, text.length), torch.zeros(batch, embedding_dim))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _line(at_2: int, at_4: int) -> Bytes:
    per_sample = (at_4 - at_2) // 2
    return Bytes(at_2 - 2 * per_sample, per_sample)


def _size(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
