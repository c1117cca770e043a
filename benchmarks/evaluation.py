"""Memory of an evaluation: many images are sampled, measured and summarised in one process.

    python -m benchmarks.evaluation

The sampler gives random pixels and CLIP has random weights, but batches are measured, pickled as between a worker and its stage,
and summarised by the code of the stage `evaluate`. One process does the work of a worker and of the stage, so its peak is an
upper bound of either.
"""

import argparse
import json
import os
import pickle
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import measure
from tasks.scoring import Measured, measure_batch, merge
from tasks.snapshots import MAX_HELDOUT
from tasks.stages.evaluate import EvaluateConfig, summarise, unseen_captions
from unclip import imaging
from unclip.evaluation.distances import Statistics
from unclip.evaluation.intervals import intervals_of
from unclip.evaluation.metrics import Sampled, values_of
from unclip.models.clip import Clip, architectures

MB, GB = 1 << 20, 1 << 30
ARCHITECTURE = "unclip-demo"


def random_clip(embedding_dim: int) -> Clip:
    """Return the demo's CLIP with random weights and another width of its embeddings."""
    import open_clip

    settings = json.loads(architectures()[ARCHITECTURE].read_text())
    model = open_clip.model.CLIP(**{**settings, "embed_dim": embedding_dim})
    size = settings["vision_cfg"]["image_size"]
    open_clip.model.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": size})
    return Clip(model, ARCHITECTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=30_000, help="images to sample")
    parser.add_argument("--image-size", type=int, default=256, help="resolution in pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch")
    parser.add_argument("--embedding-dim", type=int, default=768, help="width of CLIP's embeddings")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clip, num_shown = random_clip(arguments.embedding_dim), EvaluateConfig().num_images
    captions = unseen_captions(arguments.num_images, seed=0)
    real = F.normalize(torch.randn(MAX_HELDOUT, arguments.embedding_dim), dim=1)
    process, started = os.getpid(), time.monotonic()
    peaks, sizes = {"before the first batch": measure.peak_rss(process)}, []

    def sample() -> Iterator[Measured]:
        for start in range(0, len(captions), arguments.batch_size):
            batch = captions[start : start + arguments.batch_size]
            shape = (len(batch), arguments.image_size, arguments.image_size, 3)
            images = imaging.from_uint8(rng.integers(0, 256, shape, np.uint8))
            data = pickle.dumps(measure_batch(clip, images, batch, max(0, num_shown - start)))
            sizes.append(len(data))
            yield pickle.loads(data)
            if len(sizes) == 10:
                peaks["after 10 batches"] = measure.peak_rss(process)

    measured = merge(sample(), len(captions))
    peaks["after the last batch"] = measure.peak_rss(process)
    sampled = time.monotonic()
    reference = Statistics.of(real)
    estimates, _ = summarise("heldout", Sampled(captions, measured.features, reference), measured)
    intervals = intervals_of(estimates)
    peaks["after the metrics"] = measure.peak_rss(process)
    finished = time.monotonic()

    print(measure.machine("torch", "ray"))
    print(f"{len(captions):,} images of {arguments.image_size} px in batches of {arguments.batch_size}, "
          f"embeddings of {arguments.embedding_dim} numbers\n")  # fmt: skip
    for moment, megabytes in peaks.items():
        print(f"peak memory {moment:24} {megabytes:8,.0f} MB")
    pixels = len(captions) * 3 * arguments.image_size**2 * 4
    print(f"\nreturned by workers: {sum(sizes) / MB:,.0f} MB, {sum(sizes) / len(captions):,.0f} bytes an image; "
          f"as float32 images it would be {pixels / GB:,.1f} GB")  # fmt: skip
    print(f"sampling and measuring {sampled - started:,.0f} s, metrics and intervals {finished - sampled:,.0f} s")
    for name, value in values_of(estimates).items():
        limits = "  ".join(f"{limit:.5f}" for limit in intervals.get(name, ()))
        print(f"{name:24} {value:10.5f}   {limits:20} of {estimates[name].count:,}")


if __name__ == "__main__":
    main()
