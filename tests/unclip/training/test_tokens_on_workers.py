"""Trainings of image tokens are the same for any interruption, workers and shards."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing

from tests.unclip.systems import tiny_tokens
from tests.unclip.training.trained_on_workers import End, Recorder, losses, settings
from unclip.data import RowReader, Source
from unclip.training import checkpoints, trainer
from unclip.training.parallel import ALONE, Workers

STEPS = 4
SHORT = {"num_samples": 16 * STEPS, "checkpoint_samples": 32, "adam_eps": 1e-5}
"""Biases of keys have no gradient but rounding errors, which Adam's usual epsilon would make as large as any."""
STOP = End(before_step=3, kill=None)
COLUMNS = ("tokens", "codes")
Job = tuple[str, End | None, dict[str, Any]]


@functools.cache
def clip() -> Any:
    return tiny_tokens.demo_clip()


def write_rows(folder: Path) -> None:
    rows = tiny_tokens.rows(clip(), 32)
    columns = {name: pa.array([row.tolist() for row in rows[name]], pa.list_(pa.int32())) for name in COLUMNS}
    keys = [f"{index:02d}" for index in range(32)]
    pq.write_table(pa.table({"key": keys, **columns}), folder / "rows.parquet", row_group_size=8)


def run(folder: Path, kind: str, name: str, workers: Workers = ALONE, end: End | None = None, **changes: Any) -> None:
    objective = tiny_tokens.objective(kind, clip(), dropout=0.1)
    keys = [f"{index:02d}" for index in range(32)]
    reader = RowReader.of_keys([Source((f"{folder}/rows.parquet",), COLUMNS)], keys)
    monitor = Recorder(folder / f"{name}.jsonl", workers.rank, end)
    try:
        trainer.train(objective, reader, settings(**SHORT, **changes), f"{folder}/{name}", monitor, workers, reader)
    except trainer.StoppedError:
        assert end is not None


def run_rank_of_two(rank: int, folder: str, kind: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for name, end, changes in jobs:
        run(Path(folder), kind, name, Workers(rank, 2), end, **changes)
    torch.distributed.destroy_process_group()


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


@pytest.mark.parametrize("kind", tiny_tokens.KINDS)
def test_a_stopped_training_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    run(tmp_path, kind, "whole")
    run(tmp_path, kind, "stopped", end=STOP)
    assert len(losses(tmp_path, "stopped")) < STEPS
    run(tmp_path, kind, "stopped")
    whole, stopped = weights(tmp_path, "whole"), weights(tmp_path, "stopped")
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert len(losses(tmp_path, "whole")) == STEPS
    assert dict(losses(tmp_path, "stopped")) == dict(losses(tmp_path, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_tokens.KINDS)
def test_two_workers_and_shards_take_the_steps_of_one_worker(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    run(tmp_path, kind, "alone")
    jobs: list[Job] = [
        ("ddp", None, {"parallel": "ddp"}),
        ("fsdp", None, {"parallel": "fsdp", "activation_checkpointing": True}),
    ]
    torch.multiprocessing.spawn(run_rank_of_two, (str(tmp_path), kind, jobs), nprocs=2)
    expected = [loss for _, loss in losses(tmp_path, "alone")]
    assert len(expected) == STEPS and np.isfinite(expected).all()
    for name, _, _ in jobs:
        assert [loss for _, loss in losses(tmp_path, name)] == pytest.approx(expected, abs=1e-5), name
        for key, value in weights(tmp_path, "alone").items():
            torch.testing.assert_close(weights(tmp_path, name)[key], value, atol=2e-5, rtol=1e-4)
