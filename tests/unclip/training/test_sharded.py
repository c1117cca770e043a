"""Checkpoints of a training: complete or skipped, and resharded for any reader (F41, F42, F47)."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from tests.unclip.damage import flipped
from unclip.errors import CheckpointError, StorageError
from unclip.training import parallel, sharded
from unclip.training.parallel import ALONE, Workers


def tensors(value: float) -> dict[str, Tensor]:
    return {
        "weights/a": torch.full((5, 3), value).t(),
        "weights/b": torch.full((4,), value, dtype=torch.bfloat16),
        "step/a": torch.tensor(value),
        "objective/n": torch.full((2,), int(value), dtype=torch.int64),
    }


def save(root: Path, *samples: int, keep: int = 2, **facts: float) -> None:
    writer = sharded.Writer(str(root), ALONE, keep)
    for number in samples:
        writer.save(number, tensors(number), {"kind": "test", **facts})
    writer.wait()
    writer.close()


def restored(root: Path) -> tuple[dict[str, Tensor], dict | None]:
    values = tensors(0)
    return values, sharded.restore(str(root), values, ALONE)


def test_a_checkpoint_is_restored_in_place(tmp_path: Path) -> None:
    assert restored(tmp_path)[1] is None
    save(tmp_path, 16)
    values, facts = restored(tmp_path)
    assert facts == {"kind": "test", "samples_seen": 16}
    for name, value in tensors(16).items():
        assert torch.equal(values[name], value) and values[name].stride() == value.stride()


def test_tensors_can_change_once_save_returns(tmp_path: Path) -> None:
    writer, changing = sharded.Writer(str(tmp_path), ALONE, 2), tensors(16)
    writer.save(16, changing, {})
    for value in changing.values():
        value.zero_()
    writer.wait()
    writer.close()
    assert restored(tmp_path)[0]["weights/a"].min() == 16


def test_only_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / "000000000008").mkdir()
    (tmp_path / "000000000008" / "rank-00000.safetensors").write_bytes(b"half")
    for samples, loss in ((16, 3.0), (32, 1.0), (48, 2.0), (64, 5.0), (80, float("nan"))):
        save(tmp_path, samples, validation_loss=loss)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["32", "64", "80"]


def damages(folder: Path) -> list[tuple[str, bytes | None]]:
    """Damage to each file: deleted, truncated to many lengths, and 300 single flipped bits."""
    rng = random.Random(0)
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    damaged: list[tuple[str, bytes | None]] = [(name, None) for name in contents]
    for name, data in contents.items():
        damaged += [(name, data[:length]) for length in sorted({0, 1, 7, *range(8, len(data), 97), len(data) - 1})]
    positions = [(name, position) for name, data in contents.items() for position in range(len(data))]
    for name, position in rng.sample(positions, 300):
        damaged.append((name, flipped(contents[name], 8 * position + rng.randrange(8))))
    return damaged


def test_f42_t15_damage_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 16, 32)
    newest = tmp_path / "000000000032"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert set(whole) == {"rank-00000.safetensors", "rank-00000.json", "facts.json", "manifest.json"}
    for name, data in damages(newest):
        if data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            values, facts = restored(tmp_path)
        assert facts is not None and facts["samples_seen"] == 16, (name, data)
        assert torch.equal(values["weights/a"], tensors(16)["weights/a"])
        assert "000000000032" in caplog.text and "Using the previous checkpoint" in caplog.text
        (newest / name).write_bytes(whole[name])
    assert restored(tmp_path)[1] == {"kind": "test", "samples_seen": 32}


def test_a_checkpoint_of_another_model_is_not_taken_for_damaged(tmp_path: Path) -> None:
    save(tmp_path, 16)
    for other in ({"weights/a": torch.zeros(3, 6)}, {"weights/c": torch.zeros(3)}):
        with pytest.raises(CheckpointError, match=r"from another model: .*weights/[ac]"):
            sharded.restore(str(tmp_path), other, ALONE)


def test_a_failed_write_is_reported_at_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "000000000016").write_bytes(b"a file where a folder belongs")
    writer = sharded.Writer(str(tmp_path), ALONE, 2)
    writer.save(16, tensors(16), {})
    with pytest.raises(StorageError, match="cannot write"):
        writer.save(32, tensors(32), {})
    writer.close()


def test_parts_of_a_killed_attempt_do_not_count(tmp_path: Path) -> None:
    """Rank 0 ignores the old part of another rank and waits for the new one."""
    folder = tmp_path / "000000000016"
    folder.mkdir()
    (folder / "rank-00001.json").write_text(json.dumps({"attempt": "before", "sha256": "0", "places": {}}))
    writer = sharded.Writer.__new__(sharded.Writer)
    writer.root, writer.workers, writer.keep = str(tmp_path), Workers(0, 2), 2
    writer.timeout_seconds, writer.attempt = 0.2, "now"
    with pytest.raises(CheckpointError, match=r"worker 1 did not write its part within 0.2 s"):
        writer._write(str(folder), {"a": torch.zeros(1)}, {"a": {"first_row": 0, "num_rows": 1, "shape": [1]}}, {})
    assert not (folder / "manifest.json").exists()


def _save_and_reshard(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh, workers = init_device_mesh("cpu", (2,)), Workers(rank, 2)
    for rows in (1, 4, 5):
        value = torch.arange(rows * 3.0).view(rows, 3)
        saved = {"weights/a": distribute_tensor(value, mesh, [Shard(0)]), "weights/b": torch.tensor(7.0)}
        writer = sharded.Writer(f"{folder}/{rows}", workers, 2)
        writer.save(16, saved, {})
        writer.wait()
        writer.close()
        torch.distributed.barrier()
        resharded = {
            "weights/a": distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)]),
            "weights/b": torch.tensor(0.0),
        }
        assert sharded.restore(f"{folder}/{rows}", resharded, workers) == {"samples_seen": 16}
        assert torch.equal(parallel.full_tensor(resharded["weights/a"]), value) and resharded["weights/b"] == 7
        full = {"weights/a": torch.zeros(rows, 3), "weights/b": torch.tensor(0.0)}
        assert sharded.restore(f"{folder}/{rows}", full, ALONE) == {"samples_seen": 16}
        assert torch.equal(full["weights/a"], value)
    torch.distributed.destroy_process_group()


def test_f47_shards_of_two_ranks_are_read_by_two_and_by_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_save_and_reshard, (str(tmp_path),), nprocs=2)
