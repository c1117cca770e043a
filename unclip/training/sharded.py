"""Asynchronous checkpoints of a training, written by all ranks and readable by any number of them.

    000000012800/rank-00000.safetensors     shards of this rank; on rank 0 also the tensors that are not sharded
                 rank-00000.json            position of each shard in the full tensor, and the sha256 of the shards file
                 facts.json                 state that is not a tensor
                 manifest.json              sha256 of all other files; written last, and without it there is no checkpoint

Workers copy their tensors and continue; a thread writes the files and calls no collectives. torch's distributed checkpoints
are not used, because they contain pickles or need collectives for writing.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unclip import files
from unclip.errors import CheckpointError
from unclip.messages import reason_of
from unclip.training import parallel
from unclip.training.checkpoints import MANIFEST, digest_of, read_verified
from unclip.training.parallel import Workers

log = logging.getLogger(__name__)

FACTS = "facts.json"
_POLL_SECONDS = 0.05


class Writer:
    """Writer of checkpoints to a folder, one at a time, in the background."""

    def __init__(self, root: str, workers: Workers, keep: int, timeout_seconds: float = 1800.0) -> None:
        """Args:
        root: URI of a folder for the checkpoints of this training only.
        keep: number of newest checkpoints to keep, besides the best one.
        timeout_seconds: time that rank 0 waits for the other ranks, after writing its own files.
        """
        self.root, self.workers, self.keep, self.timeout_seconds = root, workers, keep, timeout_seconds
        self.attempt = parallel.broadcast(uuid.uuid4().hex, workers)
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, samples_seen: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copy the tensors and write them in the background; all ranks must call it at the same step.

        Args:
            facts: JSON values; the checkpoint with the lowest `validation_loss`, if given, is the best one.

        Raises:
            StorageError: the previous checkpoint could not be written.
            CheckpointError: another rank did not write its part of the previous checkpoint.
        """
        self.wait()
        staged, positions = _stage(tensors, self.workers)
        folder = f"{self.root}/{samples_seen:012d}"
        self._pending = self._pool.submit(
            self._write, folder, staged, positions, {**facts, "samples_seen": samples_seen}
        )

    def wait(self) -> None:
        """Wait until the pending checkpoint, if any, is committed; raises the same errors as `save`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Finish pending writes, ignoring errors."""
        self._pool.shutdown(wait=True)

    def _write(
        self, folder: str, tensors: dict[str, Tensor], positions: dict[str, dict[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        from safetensors.torch import save as serialize

        name = f"rank-{self.workers.rank:05d}"
        data = serialize(tensors)
        files.write(f"{folder}/{name}.safetensors", data)
        record = {"attempt": self.attempt, "sha256": files.sha256(data), "places": positions}
        del data
        files.write_json(f"{folder}/{name}.json", record)
        if self.workers.rank == 0:
            self._commit(folder, facts)

    def _commit(self, folder: str, facts: Mapping[str, Any]) -> None:
        hashes: dict[str, str] = {}
        deadline = time.monotonic() + self.timeout_seconds
        for rank in range(self.workers.world_size):
            record = f"{folder}/rank-{rank:05d}.json"
            while not self._is_current(record):
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder}: worker {rank} did not write its part within {self.timeout_seconds:g} s. Check its log."
                    )
                time.sleep(_POLL_SECONDS)
            data = files.read(record)
            hashes |= {f"rank-{rank:05d}.json": files.sha256(data)}
            hashes |= {f"rank-{rank:05d}.safetensors": json.loads(data)["sha256"]}
        data = json.dumps(facts, indent=2, sort_keys=True).encode()
        files.write(f"{folder}/{FACTS}", data)
        hashes[FACTS] = files.sha256(data)
        files.write_json(f"{folder}/{MANIFEST}", {"sha256": hashes, "digest": digest_of(hashes)})
        prune(self.root, self.keep)

    def _is_current(self, record: str) -> bool:
        """Return True if the record is from this attempt and not left by a killed one."""
        return files.exists(record) and json.loads(files.read(record))["attempt"] == self.attempt


def restore(root: str, tensors: Mapping[str, Tensor], workers: Workers) -> dict[str, Any] | None:
    """Copy the newest undamaged checkpoint into `tensors`, in place; log a warning for each damaged one.

    Args:
        tensors: by name, full or sharded; the sharding may differ from that of the checkpoint.

    Returns:
        The saved facts; None if there is no checkpoint, in which case nothing was changed.

    Raises:
        CheckpointError: the checkpoint is from another model.
    """
    names = parallel.broadcast(files.names(root), workers)
    for name in reversed(names):
        folder, copies, damage = f"{root}/{name}", None, ""
        facts: dict[str, Any] = {}
        try:
            facts, contents = _read(folder, tensors, workers)
            copies = _plan(folder, tensors, contents)
        except _DamageError as error:
            damage = str(error)
        if parallel.all_reduce_min(int(not damage), workers):
            assert copies is not None
            for copy in copies:
                copy()
            return facts
        if damage:
            log.warning("%s Using the previous checkpoint.", damage)
    return None


def prune(root: str, keep: int) -> None:
    """Delete all checkpoints but the newest and the best one, and incomplete ones of earlier attempts."""
    complete = [name for name in files.names(root) if files.exists(f"{root}/{name}/{MANIFEST}")]
    if not complete:
        return
    kept = set(complete[-keep:]) | {name for name in (best(root, complete),) if name is not None}
    for name in files.names(root):
        if name not in kept and name <= complete[-1]:
            files.delete(f"{root}/{name}/{MANIFEST}")  # first, so that a half-deleted folder is not a checkpoint
            files.delete(f"{root}/{name}")


def best(root: str, names: list[str]) -> str | None:
    """Name of the checkpoint with the lowest validation loss; None if none has a validation loss."""
    losses = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            losses[name] = files.read_json(f"{root}/{name}/{FACTS}").get("validation_loss")
    measured = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(measured, key=measured.__getitem__) if measured else None


class _DamageError(Exception):
    """Error for a checkpoint that is incomplete or damaged."""


def _stage(tensors: Mapping[str, Tensor], workers: Workers) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Copy the tensors that this rank writes to the CPU; return them with their positions and full shapes."""
    staged: dict[str, Tensor] = {}
    positions: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        shard = parallel.local_shard(tensor).detach()
        is_sharded = shard is not tensor and shard.shape != tensor.shape
        if (is_sharded and shard.numel()) or (not is_sharded and workers.rank == 0):
            staged[name] = torch.empty(shard.shape, dtype=shard.dtype).copy_(shard)
            first_row = parallel.offset(tensor)[0] if tensor.dim() else 0
            positions[name] = {"first_row": first_row, "num_rows": _num_rows(shard), "shape": list(tensor.shape)}
    return staged, positions


def _read(
    folder: str, wanted: Mapping[str, Tensor], workers: Workers
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Tensor]]]]:
    """Read and verify the facts, and the positions and tensors of each file with rows that this rank needs.

    Rank 0 reads all files, so that every file is verified.
    """
    from safetensors.torch import load as deserialize

    contents = []
    try:
        manifest = files.read_json(f"{folder}/{MANIFEST}")
        hashes = manifest["sha256"]
        if manifest["digest"] != digest_of(hashes):
            raise _DamageError(f"{folder}/{MANIFEST}: the digest does not match the contents. The file is damaged.")
        facts = json.loads(read_verified(folder, FACTS, hashes))
        for record in sorted(name for name in hashes if name.startswith("rank-") and name.endswith(".json")):
            positions = json.loads(read_verified(folder, record, hashes))["places"]
            is_needed = any(
                name in positions and _shared_rows(tensor, positions[name]) for name, tensor in wanted.items()
            )
            if is_needed or workers.rank == 0:
                data = read_verified(folder, record.replace(".json", ".safetensors"), hashes)
                contents.append((positions, deserialize(data)))
    except FileNotFoundError as error:
        raise _DamageError(f"{folder}: incomplete: {reason_of(error)}.") from None
    except _DamageError:
        raise
    except CheckpointError as error:
        raise _DamageError(str(error)) from None
    except Exception as error:  # readers of JSON and safetensors raise many kinds of errors for damaged files
        raise _DamageError(f"{folder}: cannot be read: {error}. The checkpoint is damaged.") from error
    return facts, contents


def _num_rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _shared_rows(tensor: Tensor, position: Mapping[str, Any]) -> range:
    """Rows of the full tensor that are both in the local shard and in a saved shard. Shards are split by rows only."""
    start = parallel.offset(tensor)[0] if tensor.dim() else 0
    end = start + _num_rows(parallel.local_shard(tensor))
    return range(max(start, position["first_row"]), min(end, position["first_row"] + position["num_rows"]))


def _plan(
    folder: str, tensors: Mapping[str, Tensor], contents: list[tuple[dict[str, Any], dict[str, Tensor]]]
) -> list[Callable[[], Any]]:
    """Prepare the copies into all tensors; nothing is changed until all names and shapes are checked.

    Raises:
        CheckpointError: names or shapes differ.
    """
    copies: list[Callable[[], Any]] = []
    for name, tensor in tensors.items():
        local = parallel.local_shard(tensor).detach()
        start = parallel.offset(tensor)[0] if tensor.dim() else 0
        num_found = 0
        for positions, shards in contents:
            if name not in positions:
                continue
            if positions[name]["shape"] != list(tensor.shape):
                raise CheckpointError(
                    f"{folder}: the checkpoint is from another model: got {name} of shape {positions[name]['shape']}, "
                    f"expected {list(tensor.shape)}. Use another folder, or the configuration that it was trained with."
                )
            rows = _shared_rows(tensor, positions[name])
            num_found += len(rows)
            if tensor.dim() == 0:
                copies.append(functools.partial(local.copy_, shards[name]))
            elif rows:
                first = positions[name]["first_row"]
                shard = shards[name][rows.start - first : rows.stop - first]
                copies.append(functools.partial(local[rows.start - start : rows.stop - start].copy_, shard))
        if num_found != _num_rows(local):
            raise CheckpointError(
                f"{folder}: the checkpoint is from another model: {name} has {num_found} rows, expected {_num_rows(local)}. "
                f"Use another folder, or the configuration that it was trained with."
            )
    return copies
