"""Data-parallel training of one model: replicated on each worker (DDP) or sharded (FSDP2).

Other modules need to know only the local shard of a tensor and the full tensor.

What shards is imported where it is used: it takes longer than all else here, and commands and single workers do not need it.
"""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Parallel = Literal["ddp", "fsdp"]
"""ddp keeps the whole model, the EMA weights and the optimiser's moments on each worker; fsdp a shard of each."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """Rank, world size and device of this process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = Workers()


def single_process() -> Workers:
    """Single process, on its GPU if it has one."""
    return Workers(device=torch.device("cuda")) if torch.cuda.is_available() else ALONE


def distribute(model: nn.Module, parallel: Parallel, workers: Workers) -> nn.Module:
    """Wrap a model for distributed training and return the network to call.

    `model` itself holds the parameters, which fsdp shards in place. All ranks must hold the same weights. A single worker
    gets the model unchanged.
    """
    if workers.world_size == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # shards are rows, which are not contiguous in channels_last
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """Repeated blocks of a model: the children of its module lists that contain no further lists. They are the units of
    sharding, compilation and activation checkpointing."""
    children = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    lists = (nn.ModuleList,)
    return [child for child in children if not any(isinstance(inner, lists) for inner in child.modules())]


def checkpoint_activations(model: nn.Module) -> None:
    """Make each block recompute its activations in the backward pass. Parameter names stay as they are."""
    from torch.distributed._composable.checkpoint_activation import checkpoint

    for block in blocks(model):
        checkpoint(block)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block separately: equal blocks only once. Sharding, gradient averaging and activation checkpointing stay
    outside of the compiled code, so that they can overlap with it."""
    parts = blocks(model) or [model]
    # forward() is compiled once per block shape, with and without gradients; beyond the limit it would run uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)


@contextlib.contextmanager
def no_sync(network: nn.Module, enabled: bool) -> Any:
    """Skip gradient synchronisation inside the block if `enabled`: for all but the last micro-batch of a step."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        with network.no_sync() if enabled else contextlib.nullcontext():
            yield
    else:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(network, fsdp.FSDPModule):
            network.set_requires_gradient_sync(not enabled)
        yield


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    module = sys.modules.get("torch.distributed.tensor")  # before it is imported, no tensor is sharded
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Local shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Full tensor, on every rank; all ranks must call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Start of the local shard in the full tensor, by dimension."""
    if not _is_sharded(tensor):
        return (0,) * tensor.dim()
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # as torch.distributed.checkpoint does
    return tuple(chunk.offsets)


def all_reduce_mean(values: Tensor, workers: Workers) -> Tensor:
    """Average small tensors of equal shape over all ranks."""
    if workers.world_size > 1:
        torch.distributed.all_reduce(values)
        values /= workers.world_size
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; unchanged in a single process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def all_reduce_min(value: int, workers: Workers) -> int:
    """Minimum over all ranks."""
    if workers.world_size == 1:
        return value
    minimum = torch.tensor(value, device=workers.device)
    torch.distributed.all_reduce(minimum, op=torch.distributed.ReduceOp.MIN)
    return int(minimum)


def broadcast(value: Any, workers: Workers) -> Any:
    """Return the value of rank 0, on every rank."""
    if workers.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, device=workers.device)
    return values[0]


def all_gather(value: Any, workers: Workers) -> list[Any]:
    """Return the values of all ranks, in order, on every rank."""
    if workers.world_size == 1:
        return [value]
    values: list[Any] = [None] * workers.world_size
    torch.distributed.all_gather_object(values, value)
    return values
