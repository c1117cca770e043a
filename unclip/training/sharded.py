"""Checkpoints of a training that goes on meanwhile, written by all of its workers and read by any number of them.

    000000012800/rank-00000.safetensors     what this worker holds: whole tensors (rank 0), or its share of them
                 rank-00000.json            where each share belongs, and the sha256 of the file beside it
                 facts.json                 what is no tensor
                 manifest.json              the sha256 of all the others, written last: without it there is no checkpoint

Workers copy their tensors and go on; files are written in a thread, and no collective is called there. torch's distributed
checkpoints are not used: what their files hold is pickled, or needs collectives to be written.
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
from unclip.training import parallel
from unclip.training.checkpoints import MANIFEST, digest_of, read_verified
from unclip.training.parallel import Workers

log = logging.getLogger(__name__)

FACTS = "facts.json"
_SECONDS_BETWEEN_LOOKS = 0.05


class Writer:
    """Writes checkpoints below a folder, one at a time, in the background."""

    def __init__(self, root: str, workers: Workers, keep: int, timeout_seconds: float = 1800.0) -> None:
        """Args:
        root: URI of a folder for this training's checkpoints alone.
        keep: how many of the newest stay; the best one stays besides.
        timeout_seconds: for the other workers to have written, after this one.
        """
        self.root, self.workers, self.keep, self.timeout_seconds = root, workers, keep, timeout_seconds
        self.attempt = parallel.broadcast(uuid.uuid4().hex, workers)
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._upcoming: concurrent.futures.Future[None] | None = None

    def save(self, samples_seen: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copy the tensors, and write them while the caller goes on; every worker calls it at the same step.

        Args:
            facts: anything JSON; `validation_loss`, if it is there, says which checkpoint is the best.

        Raises:
            StorageError: the checkpoint before could not be written.
            CheckpointError: another worker did not write its part of it.
        """
        self.wait()
        staged, places = _stage(tensors, self.workers)
        folder = f"{self.root}/{samples_seen:012d}"
        self._upcoming = self._pool.submit(self._write, folder, staged, places, {**facts, "samples_seen": samples_seen})

    def wait(self) -> None:
        """Until the checkpoint that is being written, if any, is committed; raises as `save`."""
        if self._upcoming is not None:
            upcoming, self._upcoming = self._upcoming, None
            upcoming.result()

    def close(self) -> None:
        """Finish what is being written, whether it succeeds or not."""
        self._pool.shutdown(wait=True)

    def _write(
        self, folder: str, tensors: dict[str, Tensor], places: dict[str, dict[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        from safetensors.torch import save as serialize

        name = f"rank-{self.workers.rank:05d}"
        data = serialize(tensors)
        files.write(f"{folder}/{name}.safetensors", data)
        record = {"attempt": self.attempt, "sha256": files.sha256(data), "places": places}
        del data
        files.write_json(f"{folder}/{name}.json", record)
        if self.workers.rank == 0:
            self._commit(folder, facts)

    def _commit(self, folder: str, facts: Mapping[str, Any]) -> None:
        hashes: dict[str, str] = {}
        deadline = time.monotonic() + self.timeout_seconds
        for rank in range(self.workers.world_size):
            record = f"{folder}/rank-{rank:05d}.json"
            while not self._is_of_this_attempt(record):
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder}: worker {rank} did not write its part within {self.timeout_seconds:g} s. Look at its log."
                    )
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            data = files.read(record)
            hashes |= {f"rank-{rank:05d}.json": files.sha256(data)}
            hashes |= {f"rank-{rank:05d}.safetensors": json.loads(data)["sha256"]}
        data = json.dumps(facts, indent=2, sort_keys=True).encode()
        files.write(f"{folder}/{FACTS}", data)
        hashes[FACTS] = files.sha256(data)
        files.write_json(f"{folder}/{MANIFEST}", {"sha256": hashes, "digest": digest_of(hashes)})
        prune(self.root, self.keep)

    def _is_of_this_attempt(self, record: str) -> bool:
        """Files of an attempt that was killed may be there, of other numbers of workers too."""
        return files.exists(record) and json.loads(files.read(record))["attempt"] == self.attempt


def restore(root: str, tensors: Mapping[str, Tensor], workers: Workers) -> dict[str, Any] | None:
    """Copy the newest undamaged checkpoint into tensors, in place; says which ones it passes over.

    Args:
        tensors: by name, whole or sharded in any way; they need not be cut as those that were saved.

    Returns:
        The facts that were saved; None when there is no checkpoint, and then nothing was changed.

    Raises:
        CheckpointError: the checkpoint is of another model.
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
            log.warning("%s Using the one before.", damage)
    return None


def prune(root: str, keep: int) -> None:
    """Delete all but the newest checkpoints and the best one, and what older attempts left incomplete."""
    complete = [name for name in files.names(root) if files.exists(f"{root}/{name}/{MANIFEST}")]
    if not complete:
        return
    kept = set(complete[-keep:]) | {name for name in (best(root, complete),) if name is not None}
    for name in files.names(root):
        if name not in kept and name <= complete[-1]:
            files.delete(f"{root}/{name}/{MANIFEST}")  # first, so that half of it is no checkpoint
            files.delete(f"{root}/{name}")


def best(root: str, names: list[str]) -> str | None:
    """The checkpoint with the lowest validation loss; None when none has one."""
    losses = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            losses[name] = files.read_json(f"{root}/{name}/{FACTS}").get("validation_loss")
    measured = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(measured, key=measured.__getitem__) if measured else None


class _DamageError(Exception):
    """A checkpoint is incomplete, or not what was written."""


def _stage(tensors: Mapping[str, Tensor], workers: Workers) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Copies on the CPU of what this worker has to write; and where in the whole tensor each begins, and the whole's shape."""
    staged: dict[str, Tensor] = {}
    places: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        share = parallel.local_shard(tensor).detach()
        is_sharded = share is not tensor and share.shape != tensor.shape
        if (is_sharded and share.numel()) or (not is_sharded and workers.rank == 0):
            staged[name] = torch.empty(share.shape, dtype=share.dtype).copy_(share)
            first_row = parallel.offset(tensor)[0] if tensor.dim() else 0
            places[name] = {"first_row": first_row, "num_rows": _num_rows(share), "shape": list(tensor.shape)}
    return staged, places


def _read(
    folder: str, wanted: Mapping[str, Tensor], workers: Workers
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Tensor]]]]:
    """The facts, and the places and tensors of each file that holds something of this worker's; all of them verified.

    Every file is verified by some worker: one that nobody needs, by the first.
    """
    from safetensors.torch import load as deserialize

    contents = []
    try:
        manifest = files.read_json(f"{folder}/{MANIFEST}")
        hashes = manifest["sha256"]
        if manifest["digest"] != digest_of(hashes):
            raise _DamageError(f"{folder}/{MANIFEST}: the digest is not that of its contents. The file is damaged.")
        facts = json.loads(read_verified(folder, FACTS, hashes))
        for record in sorted(name for name in hashes if name.startswith("rank-") and name.endswith(".json")):
            places = json.loads(read_verified(folder, record, hashes))["places"]
            is_mine = any(name in places and _shared_rows(tensor, places[name]) for name, tensor in wanted.items())
            if is_mine or workers.rank == 0:
                data = read_verified(folder, record.replace(".json", ".safetensors"), hashes)
                contents.append((places, deserialize(data)))
    except FileNotFoundError as error:
        raise _DamageError(f"{folder}: incomplete: {str(error).splitlines()[0]}.") from None
    except _DamageError:
        raise
    except CheckpointError as error:
        raise _DamageError(str(error)) from None
    except Exception as error:  # whatever damaged JSON and safetensors make their readers raise
        raise _DamageError(f"{folder}: cannot be read: {error}. The checkpoint is damaged.") from error
    return facts, contents


def _num_rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _shared_rows(tensor: Tensor, place: Mapping[str, Any]) -> range:
    """Rows of the whole tensor that both this worker's part of it and a saved share hold. Shares are cut by rows alone."""
    start = parallel.offset(tensor)[0] if tensor.dim() else 0
    end = start + _num_rows(parallel.local_shard(tensor))
    return range(max(start, place["first_row"]), min(end, place["first_row"] + place["num_rows"]))


def _plan(
    folder: str, tensors: Mapping[str, Tensor], contents: list[tuple[dict[str, Any], dict[str, Tensor]]]
) -> list[Callable[[], Any]]:
    """What to call so that every tensor has its values; nothing is changed before all of it is known to fit.

    Raises:
        CheckpointError: names or shapes are others.
    """
    copies: list[Callable[[], Any]] = []
    for name, tensor in tensors.items():
        part = parallel.local_shard(tensor).detach()
        start = parallel.offset(tensor)[0] if tensor.dim() else 0
        num_found = 0
        for places, shares in contents:
            if name not in places:
                continue
            if places[name]["shape"] != list(tensor.shape):
                raise CheckpointError(
                    f"{folder}: the checkpoint is of another model: got {name} of shape {places[name]['shape']}, "
                    f"expected {list(tensor.shape)}. Use another folder, or the configuration that it was made with."
                )
            rows = _shared_rows(tensor, places[name])
            num_found += len(rows)
            if tensor.dim() == 0:
                copies.append(functools.partial(part.copy_, shares[name]))
            elif rows:
                first = places[name]["first_row"]
                share = shares[name][rows.start - first : rows.stop - first]
                copies.append(functools.partial(part[rows.start - start : rows.stop - start].copy_, share))
        if num_found != _num_rows(part):
            raise CheckpointError(
                f"{folder}: the checkpoint is of another model: {name} has {num_found} rows, expected {_num_rows(part)}. "
                f"Use another folder, or the configuration that it was made with."
            )
    return copies
