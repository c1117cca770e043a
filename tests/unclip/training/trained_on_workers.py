"""Small but complete training, run to the end, stopped or killed, on one worker or two.

Processes from a fork server import this module, so that a hundred of them start in seconds.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from unclip.data import Batch, RowReader, Source
from unclip.diffusion.process import DiffusionConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.systems.upsampler import UpsamplerObjective
from unclip.training import trainer
from unclip.training.objective import Monitor
from unclip.training.parallel import ALONE, Workers
from unclip.training.settings import TrainerConfig

NUM_ROWS = 32
UNET = UNetConfig(8, 16, (1, 2), 1, norm_groups=4, dropout=0.1)
MODEL = UpsamplerConfig(UNET, low_res_size=8, scale=2, diffusion=DiffusionConfig(num_timesteps=50))


@dataclasses.dataclass(frozen=True)
class End:
    """Early end of a training before a step: by a signal to one worker, or by a request to stop."""

    before_step: int
    rank: int = 0
    kill: int | None = signal.SIGKILL
    wait_seconds: float = 0.0
    """Wait before the signal, so that this worker's progress is written."""


class Objective(UpsamplerObjective):
    """Objective that records the rows it is trained on."""

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {**super().prepare(batch), "row": torch.tensor([int(key) for key in batch["key"]])}

    def loss(self, network: nn.Module, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        if network.training:
            self.rows = [*getattr(self, "rows", []), *tensors["row"].tolist()]
        return super().loss(network, tensors, generator)


class Recorder(Monitor):
    """Monitor that writes every loss exactly, and ends the training as told by `end`."""

    def __init__(self, path: Path, rank: int, end: End | None) -> None:
        self.path, self.rank, self.end, self.num_steps = path, rank, end, 0

    def metrics(self, values: Mapping[str, float], samples_seen: int) -> None:
        with self.path.with_suffix(".metrics").open("a") as file:
            file.write(json.dumps({"samples_seen": samples_seen, **values}) + "\n")

    def preview(self, images: torch.Tensor, samples_seen: int) -> None:
        with self.path.with_suffix(".previews").open("a") as file:
            file.write(f"{samples_seen}\n")

    def step(self, samples_seen: int, loss: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([samples_seen, loss.hex()]) + "\n")

    def wants_stop(self) -> bool:
        self.num_steps += 1
        is_due = self.end is not None and self.num_steps == self.end.before_step and self.rank == self.end.rank
        if is_due and self.end is not None and self.end.kill:
            time.sleep(self.end.wait_seconds)
            os.kill(os.getpid(), self.end.kill)
        return is_due


def reader(folder: Path) -> RowReader:
    path = folder / "rows.parquet"
    keys = [f"{index:02d}" for index in range(NUM_ROWS)]
    if not path.exists():
        rng = np.random.default_rng(0)
        jpegs = [io.BytesIO() for _ in keys]
        for jpeg in jpegs:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(jpeg, "JPEG")
        table = pa.table({"key": keys, "jpg": [jpeg.getvalue() for jpeg in jpegs]})
        pq.write_table(table, path, row_group_size=8)
    return RowReader.of_keys([Source((str(path),), ("jpg",))], keys)


def validation(folder: Path) -> RowReader:
    """Reader of half of the training rows; real validation rows would be held out."""
    return RowReader.of_keys(
        [Source((f"{folder}/rows.parquet",), ("jpg",))], [f"{index:02d}" for index in range(0, NUM_ROWS, 2)]
    )


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """All logged metrics."""
    return [json.loads(line) for line in (folder / f"{name}.metrics").read_text().splitlines()]


def previews(folder: Path, name: str) -> list[int]:
    """Samples seen at each preview."""
    return [int(line) for line in (folder / f"{name}.previews").read_text().split()]


def settings(**changes: Any) -> TrainerConfig:
    values = {"num_samples": 128, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_samples": 48}
    return TrainerConfig(**{**values, "log_samples": 32, "micro_batch_size": 4, "precision": "fp32", **changes})


def run(
    folder: Path, name: str, workers: Workers = ALONE, end: End | None = None, root: str = "", **changes: Any
) -> list[int]:
    """Train in `root`, by default `folder`; write losses to NAME.jsonl in `folder` and return the rows that this rank saw."""
    torch.manual_seed(0)
    rows = reader(folder)
    objective = Objective(MODEL, rows.read(np.arange(2)))
    monitor = Recorder(folder / f"{name}.jsonl", workers.rank, end)
    try:
        config = settings(**changes)
        trainer.train(objective, rows, config, f"{root or folder}/{name}", monitor, workers, validation(folder))
    except trainer.StoppedError:
        assert end is not None
    return getattr(objective, "rows", [])


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    """(samples seen, loss) of every step, over all attempts."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(samples_seen, float.fromhex(loss)) for samples_seen, loss in map(json.loads, lines)]


Job = tuple[str, End | None, dict[str, Any]]
"""Name, early end and changed settings of a training."""


def run_rank_of_two(rank: int, folder: str, jobs: list[Job]) -> None:
    """Run several trainings as one of two ranks."""
    for job in jobs:
        run_rank(rank, folder, f"{folder}/nothing-armed", 2, job)


def run_rank(rank: int, folder: str, armed: str, world_size: int, job: Job) -> None:
    """Run a training as one rank; write the rows that it saw to NAME-RANK.rows."""
    name, end, changes = job
    torch.set_num_threads(1)
    if Path(armed).exists():
        os.environ["UNCLIP_FAILPOINTS"] = armed
    if world_size > 1 and not torch.distributed.is_initialized():
        rendezvous = f"file://{folder}/rendezvous-{name}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    rows = run(Path(folder), name, Workers(rank, world_size), end, **changes)
    Path(folder, f"{name}-{rank}.rows").write_text(json.dumps(rows))


def run_rank_in(environment: dict[str, str], *arguments: Any) -> None:
    """`run_rank` with these environment variables."""
    os.environ.update(environment)
    run_rank(*arguments)


def attempt(folder: Path, world_size: int, job: Job, armed: Path | None = None) -> int:
    """Train in separate processes until one of them dies or all end; return the highest exit status.

    Args:
        armed: folder with failpoints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unclip.training.trained_on_workers"])
    (folder / f"rendezvous-{job[0]}").unlink(missing_ok=True)
    arguments = (str(folder), str(armed or f"{folder}/nothing-armed"), world_size, job)
    # the fork server has the environment of its start, which another test may have been
    environment = dict(os.environ)
    processes = [
        context.Process(target=run_rank_in, args=(environment, rank, *arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        processes[0].join(0.02)
    status = max(abs(process.exitcode or 0) for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return status
