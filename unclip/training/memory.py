"""GPU memory for training the models of a preset, measured without a GPU.

Models are built from fake tensors, which have shapes, dtypes and storages but no data. A forward pass, traced as on a CUDA
device, shows which storages autograd keeps: the activations, and the copies of weights that autocast makes. Captions fill
their sequences here; a training that skips padding needs less. A frozen network in the loss, such as that of a perceptual
distance, counts with its weights and activations.

Not counted, and covered by a reserve of 10 % of the GPU: the CUDA context, fragmentation, workspaces, temporaries of single
operations (up to 8 % in the models of `dalle2`), buffers, the rest of the loss, the batch itself, a frozen CLIP that reads
captions, and previews, for which rank 0 holds one more copy of the weights while there are neither gradients nor activations.

Sizes are in bytes, or in GiB if the name says so.
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
"""Share of GPU memory that is reserved for what is not counted."""
MAX_MICRO_BATCH = 4096
"""Largest micro-batch that is considered."""
_FLOAT32 = 4
"""Bytes per value of weights, gradients, moments and EMA weights."""


class Network(NamedTuple):
    """Model to train, and example inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    """Number of samples -> arguments of `forward`, with the right shapes and arbitrary values."""
    frozen: Callable[[], nn.Module] | None = None
    """Builds, on the meta device, the frozen network that the loss reads with; None if there is none. Arguments of its `forward`:
    the output of the model, then those of `inputs`. Its FLOPs are not counted: they are those of the model alone."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Size that grows with the micro-batch."""

    fixed: int
    per_sample: int

    def at(self, num_samples: int) -> int:
        return self.fixed + self.per_sample * num_samples


@dataclasses.dataclass(frozen=True)
class Activations:
    """Memory that autograd keeps for one micro-batch; `fixed` is mostly the copies of weights that autocast makes."""

    full: Bytes
    """Without activation checkpointing."""
    checkpointed: Bytes
    """With activation checkpointing: inputs of the blocks, and everything outside of blocks."""
    recomputed: tuple[Bytes, ...]
    """With activation checkpointing: what each block recomputes, one block at a time."""
    frozen: Bytes = Bytes(0, 0)
    """Activations of the frozen network in the loss, which is not checkpointed; the backward pass frees them first."""

    def at(self, num_samples: int, checkpointing: bool) -> int:
        """Peak memory of the activations.

        With checkpointing, the peak is either at the end of the forward pass, when autocast still holds its copies of all
        weights, or while the largest block recomputes its activations.
        """
        frozen = self.frozen.at(num_samples)
        if not checkpointing:
            return self.full.at(num_samples) + frozen
        recomputed = max((block.at(num_samples) for block in self.recomputed), default=0)
        return self.checkpointed.at(num_samples) + max(self.full.fixed - self.checkpointed.fixed + frozen, recomputed)


@dataclasses.dataclass(frozen=True)
class States:
    """Memory on each GPU that does not depend on the micro-batch."""

    weights: int
    gradients: int
    moments: int
    """Adam's two moments."""
    average: int
    """EMA weights."""
    exchange: int
    """Memory that FSDP gathers: weights and gradients outside of blocks and of two blocks, the current one and the next. DDP
    reduces the gradients in place, in buckets of which they are views (`parallel.distribute`)."""
    frozen: int = 0
    """Weights of the frozen network in the loss, whole on each GPU."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.exchange + self.frozen


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """Training settings that memory depends on."""

    num_gpus: int = 1
    parallel: Parallel = "ddp"
    checkpointing: bool = False
    """Use activation checkpointing."""
    accumulates: bool = False
    """Accumulate gradients over several micro-batches; FSDP then holds full gradients on each GPU."""


@dataclasses.dataclass(frozen=True)
class ModelMemory:
    """Memory and FLOPs of one model."""

    name: str
    parameters: int
    outside_blocks: int
    """Number of parameters outside of all blocks (`parallel.blocks`)."""
    largest_block: int
    """Number of parameters in the largest block."""
    largest_parameter: int
    """Size of the largest parameter."""
    activations: Activations
    flops_per_sample: float
    """FLOPs of training (`unclip.training.flops`), without those of a frozen network in the loss."""
    frozen_bytes: int = 0
    """Size of the weights of the frozen network in the loss; they are none of `parameters`."""

    def states(self, training: TrainingSetup) -> States:
        full = _FLOAT32 * self.parameters
        if training.num_gpus == 1 or training.parallel == "ddp":
            return States(full, full, 2 * full, full, 0, self.frozen_bytes)
        shard = -(-full // training.num_gpus)
        gathered = 2 * _FLOAT32 * (self.outside_blocks + 2 * self.largest_block)
        gradients = full if training.accumulates else shard
        return States(shard, gradients, 2 * shard, shard, gathered, self.frozen_bytes)

    def at(self, num_samples: int, training: TrainingSetup) -> int:
        """Total memory on each GPU with micro-batches of `num_samples`.

        The peak is that of the activations or, if these are few, when the gradient of the largest parameter is added to that of
        an earlier micro-batch: the embedding of a large vocabulary is the last layer that the backward pass reaches.
        """
        activations = self.activations.at(num_samples, training.checkpointing)
        return self.states(training).total + max(activations, _FLOAT32 * self.largest_parameter)

    def largest_micro_batch(self, training: TrainingSetup, memory_gib: float) -> int:
        """Largest micro-batch, up to `MAX_MICRO_BATCH`, that fits into GPUs of this memory minus the reserve; 0 if none fits."""
        available = memory_gib * GIB * (1 - RESERVE)
        fits, fails = 0, MAX_MICRO_BATCH + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.at(middle, training) <= available else (fits, middle)
        return fits


def measure(name: str, network: Network, device: str = "cuda", precision: Precision = "bf16") -> ModelMemory:
    """Measure a model without allocating it.

    Args:
        device: type of device to measure for; it need not be present.
        precision: autocast precision; "auto" is not supported here.

    Raises:
        ConfigError: precision is "auto".
    """
    require(precision != "auto", "precision", precision, "bf16, fp16 or fp32")
    with torch.device("meta"):
        frozen = None if network.frozen is None else network.frozen()
    with FakeTensorMode(), torch.device(device), _FusedAttention():
        model = network.build().train()
        if frozen is not None:
            _move_from_meta(frozen)
        with _autocast(device, precision):
            at_2, at_4 = (_saved(model, network.inputs(batch), frozen) for batch in (2, 4))
        flops = flops_per_sample(model, *network.inputs(1))
    in_blocks = [_num_parameters(block) for block in blocks(model)]
    parameters = _num_parameters(model)
    return ModelMemory(
        name=name,
        parameters=parameters,
        outside_blocks=parameters - sum(in_blocks),
        largest_block=max(in_blocks, default=0),
        largest_parameter=max((parameter.numel() for parameter in model.parameters()), default=0),
        activations=Activations(
            full=_fit_line(at_2.full, at_4.full),
            checkpointed=_fit_line(at_2.checkpointed, at_4.checkpointed),
            recomputed=tuple(_fit_line(two, four) for two, four in zip(at_2.recomputed, at_4.recomputed, strict=True)),
            frozen=_fit_line(at_2.frozen, at_4.frozen),
        ),
        flops_per_sample=flops,
        frozen_bytes=0 if frozen is None else sum(each.nbytes for each in frozen.parameters()),
    )


class Compute(NamedTuple):
    """Size of a model and FLOPs of its training, as in `ModelMemory`."""

    parameters: int
    flops_per_sample: float


def count(network: Network, device: str = "cuda") -> Compute:
    """Count parameters and FLOPs alone, which takes a fraction of the time of `measure`."""
    with FakeTensorMode(), torch.device(device), _FusedAttention():
        model = network.build().train()
        return Compute(_num_parameters(model), flops_per_sample(model, *network.inputs(1)))


class _Saved(NamedTuple):
    """Bytes that autograd saves in one forward pass; see `Activations`."""

    full: int
    checkpointed: int
    recomputed: list[int]
    frozen: int


def _saved(model: nn.Module, inputs: tuple[Any, ...], frozen: nn.Module | None = None) -> _Saved:
    """Run a forward pass and count the storages saved for the backward pass, each once and without the weights."""
    networks = [model] if frozen is None else [model, frozen]
    own = {_key(tensor) for each in networks for tensor in [*each.parameters(), *each.buffers()]}
    outside: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no other storage reuses the address
    in_loss: dict[int, torch.UntypedStorage] = {}
    in_blocks: list[dict[int, torch.UntypedStorage]] = []
    block_inputs: dict[int, torch.UntypedStorage] = {}
    active = [outside]

    def enter(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        block_inputs.update({_key(tensor): tensor.untyped_storage() for tensor in tensors if _key(tensor) not in own})
        in_blocks.append({})
        active.append(in_blocks[-1])

    def leave(*_: Any) -> None:
        active.pop()

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            active[-1][_key(tensor)] = tensor.untyped_storage()
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
        output.float().square().mean()  # the output is saved as a loss would
        if frozen is not None:
            active.append(in_loss)
            frozen(output, *inputs)
    everything = outside.copy()
    for block_storages in in_blocks:
        everything.update(block_storages)
    checkpointed = {**outside, **block_inputs}
    recomputed = [{key: storage for key, storage in each.items() if key not in checkpointed} for each in in_blocks]
    return _Saved(
        _size(everything.values()),
        _size(checkpointed.values()),
        [_size(each.values()) for each in recomputed],
        _size(storage for key, storage in in_loss.items() if key not in everything),
    )


class _FusedAttention(TorchFunctionMode):
    """Attention as on a GPU, which keeps no score matrix; without a GPU, torch would use the unfused implementation."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v, *given = args
        mask = given[0] if given else (kwargs or {}).get("attn_mask")
        bias = None if mask is None else mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


@contextlib.contextmanager
def _autocast(device: str, precision: Precision) -> Iterator[None]:
    """Enable autocast for a device that need not be present; torch.autocast would disable itself."""
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
    """Example images [batch, 3, size, size]."""
    return torch.zeros(batch, 3, size, size)


def example_indices(*shape: int) -> Tensor:
    """Example integers, such as timesteps or tokens."""
    return torch.zeros(shape, dtype=torch.int64)


def example_flags(*shape: int) -> Tensor:
    """Example booleans, such as masks."""
    return torch.zeros(shape, dtype=torch.bool)


def example_features(batch: int, text: TextShape, embedding_dim: int) -> CaptionFeatures:
    """Example CLIP features of captions that fill their sequences."""
    encodings = torch.zeros(batch, text.length, text.width)
    return CaptionFeatures(encodings, example_flags(batch, text.length), torch.zeros(batch, embedding_dim))


def _move_from_meta(module: nn.Module) -> None:
    """Replace the tensors of a module by fake ones on the current device; `Module.to_empty` takes no tensors of meta here."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            part.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fit_line(at_2: int, at_4: int) -> Bytes:
    per_sample = (at_4 - at_2) // 2
    return Bytes(at_2 - 2 * per_sample, per_sample)


def _size(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
