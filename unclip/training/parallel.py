"""One model on several workers: whole on each of them (DDP), or in shards (FSDP2).

Everything else asks nothing but: which part of this tensor is mine, and what is the whole of it?
"""

import contextlib
import dataclasses
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

Parallel = Literal["ddp", "fsdp"]
"""ddp keeps the whole model, its average and the optimiser's moments on each worker; fsdp a share of each."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """This process's place among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = Workers()


def by_itself() -> Workers:
    """A process that trains alone, on its GPU if it has one."""
    return Workers(device=torch.device("cuda")) if torch.cuda.is_available() else ALONE


def distribute(model: nn.Module, parallel: Parallel, workers: Workers) -> nn.Module:
    """The network to call in training; `model` itself is what holds the parameters, sharded in place by fsdp.

    Every rank must hold the same weights. One worker alone is given the model as it is.
    """
    if workers.world_size == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # shards are rows, which channels_last has not in one piece
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """What a model repeats, the children of its module lists, without those that hold others: units of sharding, of
    compilation and of activation checkpointing."""
    children = [child for each in model.modules() if isinstance(each, nn.ModuleList) for child in each]
    lists = (nn.ModuleList,)
    return [child for child in children if not any(isinstance(inner, lists) for inner in child.modules())]


def checkpoint_activations(model: nn.Module) -> None:
    """Have each block compute its activations again in the backward pass instead of keeping them. Names stay as they are."""
    for block in blocks(model):
        checkpoint(block)


def compile_blocks(model: nn.Module) -> None:
    """Have torch compile each block by itself: equal ones once, and what shards them, averages their gradients or checkpoints
    their activations stays outside, where it can run beside them."""
    parts = blocks(model) or [model]
    # Of one forward() there are as many versions as shapes of blocks, with and without gradients. Those beyond are not compiled.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)


@contextlib.contextmanager
def without_sync(network: nn.Module, wanted: bool) -> Any:
    """Gradients stay with their worker inside the block where wanted: for all but the last micro-batch of a step."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        with network.no_sync() if wanted else contextlib.nullcontext():
            yield
    else:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(not wanted)
        yield


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor; what is not sharded is its own part. Shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every worker; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this worker's part begins in the whole, in elements of each dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch.distributed.checkpoint goes by it
    return tuple(chunk.offsets)


def all_reduce_mean(values: Tensor, workers: Workers) -> Tensor:
    """The mean over all workers of small tensors of the same shape."""
    if workers.world_size > 1:
        torch.distributed.all_reduce(values)
        values /= workers.world_size
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes that train together, in place; one that trains alone has it already."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def all_reduce_min(value: int, workers: Workers) -> int:
    """The least of all workers' values."""
    if workers.world_size == 1:
        return value
    least = torch.tensor(value, device=workers.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def broadcast(value: Any, workers: Workers) -> Any:
    """The first worker's value, on every one."""
    if workers.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, device=workers.device)
    return values[0]


def all_gather(value: Any, workers: Workers) -> list[Any]:
    """Every worker's value, by rank, on every one."""
    if workers.world_size == 1:
        return [value]
    values: list[Any] = [None] * workers.world_size
    torch.distributed.all_gather_object(values, value)
    return values
