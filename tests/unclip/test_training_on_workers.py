"""A training is the same however it is divided: over workers, in shards, in micro-batches, and wherever it is resumed (F47)."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from PIL import Image

from unclip import checkpoints, parallel, trainer
from unclip.data import RowReader, Source
from unclip.diffusion import DiffusionConfig
from unclip.objectives import UpsamplerObjective
from unclip.parallel import ALONE, Workers
from unclip.trainer import TrainerConfig
from unclip.unet import UNetConfig
from unclip.upsampler import UpsamplerConfig

NUM_ROWS = 32
UNET = UNetConfig(8, 16, (1, 2), 1, norm_groups=4, dropout=0.1)
MODEL = UpsamplerConfig(UNET, low_res_size=8, scale=2, diffusion=DiffusionConfig(num_timesteps=50))


def reader(folder: Path) -> RowReader:
    path = folder / "rows.parquet"
    keys = [f"{index:02d}" for index in range(NUM_ROWS)]
    if not path.exists():
        rng = np.random.default_rng(0)
        pictures = [io.BytesIO() for _ in keys]
        for picture in pictures:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "JPEG")
        table = pa.table({"key": keys, "jpg": [picture.getvalue() for picture in pictures]})
        pq.write_table(table, path, row_group_size=8)
    return RowReader([Source((str(path),), ("jpg",))], keys)


def settings(**changes: Any) -> TrainerConfig:
    values = {"num_samples": 128, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_samples": 48}
    return TrainerConfig(**{**values, "micro_batch_size": 4, "precision": "fp32", **changes})


class Losses(trainer.Monitor):
    """Of every step; a training that is to end early is told to stop."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after, self.values = stop_after, dict[int, float]()
        self.num_asked = 0

    def step(self, samples_seen: int, loss: float) -> None:
        self.values[samples_seen] = loss

    def wants_stop(self) -> bool:
        self.num_asked += 1
        return self.num_asked == self.stop_after


def run(folder: Path, name: str, workers: Workers = ALONE, stop_after: int = 0, **changes: Any) -> dict[int, float]:
    """Losses by samples seen; as JSON in the folder, too."""
    torch.manual_seed(0)
    rows = reader(folder)
    monitor = Losses(stop_after)
    try:
        objective = UpsamplerObjective(MODEL, rows.read(["00", "01"]))
        trainer.train(objective, rows, settings(**changes), str(folder / name), monitor, workers)
    except trainer.StoppedError:
        assert stop_after
    if workers.rank == 0:
        (folder / f"{name}-{workers.world_size}.json").write_text(json.dumps(list(monitor.values.values())))
    return monitor.values


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


def _two_workers(rank: int, folder: str, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, changes in jobs:
        run(Path(folder), name, Workers(rank, 2), **changes)
    torch.distributed.destroy_process_group()


def test_two_workers_whole_or_in_shards_take_the_steps_of_one_and_go_on_where_others_stopped(tmp_path: Path) -> None:
    alone = run(tmp_path, "alone")
    run(tmp_path, "one then two", stop_after=4)
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {"parallel": "ddp"}),
        ("fsdp", {"parallel": "fsdp"}),
        ("fsdp with less memory", {"parallel": "fsdp", "activation_checkpointing": True}),
        ("one then two", {"parallel": "fsdp"}),
        ("two then one", {"parallel": "fsdp", "stop_after": 4}),
        ("shards then whole", {"parallel": "fsdp", "stop_after": 4}),
        ("shards then whole", {"parallel": "ddp"}),
    ]
    torch.multiprocessing.spawn(_two_workers, (str(tmp_path), jobs), nprocs=2)
    run(tmp_path, "two then one")
    expected = list(alone.values())
    assert len(expected) == 8
    for name in ("ddp-2", "fsdp-2", "fsdp with less memory-2"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx(expected, abs=1e-5), name
    for name in ("one then two-2", "two then one-1", "shards then whole-2"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx(expected[4:], abs=1e-5), name
    for name in dict(jobs):
        for key, value in weights(tmp_path, "alone").items():
            torch.testing.assert_close(weights(tmp_path, name)[key], value, atol=2e-5, rtol=1e-4)


def test_activations_computed_again_change_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "kept") == run(tmp_path, "computed again", activation_checkpointing=True)
    kept, again = weights(tmp_path, "kept"), weights(tmp_path, "computed again")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """Noise belongs to a micro-batch, so losses differ from those of another division, but not in their mean."""
    whole, quarters = run(tmp_path, "whole", micro_batch_size=16), run(tmp_path, "quarters", micro_batch_size=4)
    assert whole != quarters
    assert np.mean(list(whole.values())) == pytest.approx(np.mean(list(quarters.values())), rel=0.1)


def test_blocks_are_the_innermost_that_a_model_repeats() -> None:
    linear = torch.nn.Linear(1, 1)
    nested = torch.nn.Sequential(torch.nn.ModuleList([linear]))
    assert parallel.blocks(torch.nn.Sequential(torch.nn.ModuleList([nested]))) == [linear]
