"""CLIP embedding in pairs per second: the stage's actor against a bare open_clip forward pass over tensors in memory.

    python -m benchmarks.embed --model ViT-S-32-alt

The actor reads Parquet, decodes, resizes, tokenises, embeds and writes Parquet; the bare pass only computes. Both use the
same model with random weights, batch size, precision and threads. Both are warm, run in separate processes and take turns.
"""

import argparse
import concurrent.futures
import io
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import measure
from unclip.background import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_FILE = 1000
CAPTION = "soft clouds of many colours above a wide plain, picture {} of a long row"


def write_images(folder: str, pairs: int, image_size: int) -> list[str]:
    """Write an images table like the download stage, in files of `ROWS_PER_FILE` rows; return their paths."""
    from PIL import Image

    from tasks import tables
    from tasks.stages.download import IMAGES

    images = []
    for data in measure.photographs(min(pairs, 200)):
        buffer = io.BytesIO()
        width = round(image_size * measure.PHOTO_WIDTH / measure.PHOTO_HEIGHT)
        Image.open(io.BytesIO(data)).resize((width, image_size)).save(buffer, "JPEG", quality=95, subsampling=0)
        images.append(buffer.getvalue())
    paths = []
    for start in range(0, pairs, ROWS_PER_FILE):
        rows = [
            {
                "key": key_of(number),
                "caption": CAPTION.format(number),
                "status": "ok",
                "jpg": images[number % len(images)],
            }
            for number in range(start, min(start + ROWS_PER_FILE, pairs))
        ]
        paths.append(f"{folder}/images-{start}.parquet")
        tables.write_file(paths[-1], pa.Table.from_pylist(rows, schema=IMAGES))
    return paths


def key_of(number: int) -> str:
    return f"{number:032x}"


class Actor:
    """The stage's Ray actor."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        import ray

        from tasks.derived import Shard
        from tasks.progress import Progress
        from tasks.stage import Artifact
        from tasks.stages.embed import EmbedConfig, Embedder

        paths = write_images(folder, arguments.pairs, arguments.image_size)
        num_rows = [min(ROWS_PER_FILE, arguments.pairs - start) for start in range(0, arguments.pairs, ROWS_PER_FILE)]
        self.shards = [Shard(path, np.arange(count)) for path, count in zip(paths, num_rows, strict=True)]
        self.num_pairs: int = arguments.pairs
        self.table = f"{folder}/embeddings"
        clip = Artifact("clip", "", "", "", {"model": arguments.model, "pretrained": None}, 0.0)
        config = EmbedConfig(arguments.batch_size, arguments.precision)
        ray.init(num_cpus=arguments.threads, include_dashboard=False, log_to_driver=False)
        cpus, gpus = arguments.threads, torch.cuda.device_count() and 1
        embedder: Any = Embedder
        progress = Progress(f"{folder}/progress.json", arguments.pairs, "pairs")
        self.actor = embedder.options(num_cpus=cpus, num_gpus=gpus).remote(clip, config, self.table, cpus, progress)
        self.pid = ray.get(self.actor.__ray_call__.remote(lambda _: os.getpid()))
        ray.get(self.actor.embed.remote(Shard(paths[0], np.arange(arguments.batch_size))))

    def pairs_per_second(self) -> float:
        import ray

        for path in Path(self.table).glob("*.parquet"):
            path.unlink()  # existing parts are not written again
        started = time.monotonic()
        ray.get([self.actor.embed.remote(shard) for shard in self.shards])
        return self.num_pairs / (time.monotonic() - started)


_bare: dict[str, Any] = {}


def prepare_bare(arguments: argparse.Namespace) -> int:
    """Load the model and create the batches in memory; return the process id."""
    from unclip.models import clip

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = clip.create(arguments.model, None).eval().to(device)
    size = clip.input_size(model)
    batches = []
    for start in range(0, arguments.pairs, arguments.batch_size):
        count = min(arguments.batch_size, arguments.pairs - start)
        pixels = torch.randn(count, 3, size, size, device=device)
        batches.append((pixels, torch.randint(1, model.vocab_size, (count, model.context_length), device=device)))
    _bare.update(model=model, batches=batches, precision=arguments.precision, device=device)
    embed_bare(1)
    return os.getpid()


@torch.no_grad()
def embed_bare(num_batches: int | None = None) -> float:
    """Run only the forward passes, up to unit-norm embeddings on the CPU; return pairs per second."""
    from unclip.training.precision import autocast

    model, device, done = _bare["model"], _bare["device"], 0
    started = time.monotonic()
    for pixels, tokens in _bare["batches"][:num_batches]:
        with autocast(_bare["precision"], device):
            model.encode_image(pixels, normalize=True).float().cpu()
            model.encode_text(tokens, normalize=True).float().cpu()
        done += len(pixels)
    return done / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-32-alt", help="any architecture of open_clip, or unclip-demo")
    parser.add_argument("--pairs", type=int, default=256, help="pairs in one round, a multiple of the batch size")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in one forward pass")
    parser.add_argument("--precision", default="fp32", choices=["auto", "bf16", "fp32"], help="precision of both")
    parser.add_argument(
        "--image-size", type=int, default=256, help="length of the shorter side of stored images, in pixels"
    )
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads of both")
    arguments = parser.parse_args()

    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}  # for Ray's workers
    print(measure.machine("ray", "torch", "open_clip_torch", "pyarrow"))
    print(vars(arguments), "\n", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as folder,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        bare_pid = pool.submit(prepare_bare, arguments).result()
        actor = Actor(arguments, folder)
        contenders = {"actor": actor.pairs_per_second, "bare": lambda: pool.submit(embed_bare).result()}
        figures = measure.interleave(contenders, arguments.rounds)
        print(f"{'':6} {'pairs/s':>26}  {'peak memory, MB':>15}")
        for name, pid in (("actor", actor.pid), ("bare", bare_pid)):
            print(f"{name:6} {measure.describe(figures[name]):>26}  {measure.peak_rss(pid):15,.0f}")
        print(f"\nratio {measure.median_ratio(figures['actor'], figures['bare']):.2f}")


if __name__ == "__main__":
    main()
