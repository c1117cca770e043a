"""Benefit of the prior: one decoder, the same captions, three image embeddings.

    python -m benchmarks.ablation --storage unclip-data

The ablation of Ramesh et al. 2022, section 5.1, on the demo. A decoder that reads captions, trained with image embedding
and caption dropped independently, samples images for held-out captions from the caption alone, with CLIP's text embedding
instead of the image embedding, and with the prior's image embedding. Both priors are also measured separately. The pipeline
trains any models that the storage lacks. Writes a table and a figure, whatever the result.

Letters: N captions, E CLIP embedding width, S image size of the stack.
"""

import argparse
import dataclasses
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines import dag as dags
from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from tasks.snapshots import Snapshot
from tasks.stage import Artifact
from tasks.stages.evaluate import heldout_pairs
from tasks.store import DEFAULT_ROOT, Store
from unclip import imaging
from unclip.data import Places, RowReader
from unclip.evaluation import distances, metrics, retrieval
from unclip.systems.system import StackFiles
from unclip.systems.unclip.sampling import ImageEmbeddingSource
from unclip.systems.unclip.stack import Stack
from unclip.training.batches import load_images

BASE: tuple[str, ...] = ()
OTHERS = (
    "decoder.model.text=clip",
    "prior.kind=autoregressive",
    "prior.trainer.num_samples=48_000",
    "prior.trainer.learning_rate=4e-3",
)
"""Settings of the second run: a decoder that reads captions, and the autoregressive prior. Both train in parallel."""

ALONE, TEXT, PRIOR, TRUE, REAL = (
    "caption alone",
    "caption, its text embedding",
    "caption, the prior's image embedding",
    "caption, its picture's image embedding",
    "real pictures",
)

ImageEmbedding = Callable[[list[str], torch.Generator], Tensor]
"""(captions, generator) -> image embedding or its substitute, [B, E]."""

SOURCES: dict[str, ImageEmbeddingSource] = {ALONE: "none", TEXT: "text_embedding", PRIOR: "prior"}
"""Variant -> the sampling setting `image_embedding`."""


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Pairs that were never trained on, each caption once."""

    captions: list[str]
    image_embedding: Tensor
    """[N, E], embeddings of their images from the embeddings table."""
    images: Tensor
    """[N, 3, S, S] in [-1, 1], their images."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images sampled for the held-out captions, one each, with their scores."""

    images: Tensor
    """[N, 3, S, S] in [-1, 1]."""
    scenes: metrics.SceneScores
    clip_score: float
    """Mean cosine of CLIP embeddings of images and captions."""
    frechet_distance: float
    """Distance from the real images of the same captions, in CLIP embeddings."""

    def all_correct(self) -> float:
        """Return the share of images with the right colour, background, size and shape."""
        right = self.scenes.all_correct()
        return sum(right) / len(right)


def run(pipeline: str, storage: str, *options: str) -> None:
    """Run a pipeline, which trains what is missing in the storage."""
    subprocess.run([sys.executable, "-m", "pipelines", "run", pipeline, "--storage", storage, *options], check=True)


def train(pipeline: str, storage: str) -> None:
    """Train what is missing; run the unchanged pipeline last, so that its results remain published."""
    changes = [word for assignment in OTHERS for word in ("--set", assignment)]
    run(pipeline, storage, *changes, "--until", "evaluate")
    run(pipeline, storage)


def artifacts(pipeline: str, storage: str, assignments: tuple[str, ...] = BASE) -> dict[str, Artifact]:
    """Return the pipeline's artifacts for these settings, by stage."""
    dag = compose(prepare(load(pipeline, None, assignments, storage)))
    return {name: state.artifact for name, state in dags.states(dag, Store(storage)).items() if state.artifact}


def load_stack(base: Mapping[str, Artifact], **others: Artifact) -> Stack:
    """Load a stack with the sampling settings of its evaluation; `others` replaces models by those of other runs."""
    files = StackFiles.of(base["evaluate"].facts["stack"])
    models = {name: others[name].uri if name in others else uri for name, uri in files.models.items()}
    return Stack.load(dataclasses.replace(files, models=models))


def load_heldout(base: Mapping[str, Artifact], num_captions: int, image_size: int) -> Heldout:
    """Load held-out pairs in the order of their keys, with images of `image_size` pixels."""
    snapshot = Snapshot.of(base["curate"].facts)
    pairs = heldout_pairs(snapshot).slice(0, num_captions)
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", "image_embedding"))
    rows = RowReader(sources, Places([pairs])).read(np.arange(pairs.num_rows))
    embedding = torch.from_numpy(np.stack(rows["image_embedding"]))
    return Heldout(pairs["caption"].to_pylist(), embedding, load_images(rows["jpg"], image_size))


def ways(stack: Stack, heldout: Heldout) -> dict[str, ImageEmbedding]:
    """Return the source of the image embedding in each variant, and for comparison the embedding of the true image."""
    true = dict(zip(heldout.captions, heldout.image_embedding, strict=True))

    def embed(source: ImageEmbeddingSource) -> ImageEmbedding:
        sampling = dataclasses.replace(stack.sampling, image_embedding=source)
        return lambda captions, generator: stack.embed_captions(captions, sampling, generator)

    sources = {name: embed(source) for name, source in SOURCES.items()}
    return {**sources, TRUE: lambda captions, _: torch.stack([true[caption] for caption in captions])}


@torch.no_grad()
def draw(stack: Stack, embed: ImageEmbedding, heldout: Heldout, seed: int = 0) -> Samples:
    """Sample an image for each held-out caption; all variants with the same seed start from the same noise."""
    parts, size = [], stack.sampling.batch_size
    for number, start in enumerate(range(0, len(heldout.captions), size)):
        captions = heldout.captions[start : start + size]
        for_prior, for_decoder = (torch.Generator().manual_seed(seed * 1_000_003 + number) for _ in range(2))
        embedding = embed(captions, for_prior)
        read = stack.captions(captions, stack.sampling)
        parts.append(stack.decode(embedding, stack.sampling, for_decoder, read))
    return measure(stack, torch.cat(parts), heldout)


@torch.no_grad()
def measure(stack: Stack, images: Tensor, heldout: Heldout) -> Samples:
    """Score images [N, 3, S, S] against the held-out captions and against their real images."""
    scenes = metrics.score_scenes(images, heldout.captions)
    assert scenes is not None, "the demo's captions describe scenes"
    embedding, text = stack.embed_images(images), stack.embed_text(heldout.captions)
    distance = distances.frechet_distance(embedding, stack.embed_images(heldout.images))
    return Samples(images, scenes, float((embedding * text).sum(dim=1).mean()), distance)


@torch.no_grad()
def score_prior(stack: Stack, heldout: Heldout, seed: int = 0) -> dict[str, float]:
    """Compare image embeddings sampled by a stack's prior with those of the captions' images."""
    sampled = stack.embed_captions(heldout.captions, stack.sampling, torch.Generator().manual_seed(seed))
    return retrieval.score_embeddings(sampled, heldout.image_embedding)


def table(results: Mapping[str, Samples], priors: Mapping[str, Mapping[str, float]]) -> str:
    """Format both results as Markdown."""
    attributes = [*metrics.ATTRIBUTES, "place"]
    lines = [f"| drawn from | {' | '.join(attributes)} | all but place | CLIP score | Fréchet distance |"]
    lines.append("|---" * (len(attributes) + 4) + "|")
    for name, samples in results.items():
        accuracy = samples.scenes.accuracy()
        cells = [f"{accuracy[attribute]:.3f}" for attribute in attributes]
        cells += [f"{samples.all_correct():.3f}", f"{samples.clip_score:.3f}", f"{samples.frechet_distance:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    columns = list(next(iter(priors.values())))
    lines += [
        "",
        f"| image embedding | {' | '.join(columns).replace('_at_', '@')} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(f'{scores[column]:.3f}' for column in columns)} |" for name, scores in priors.items()
    ]
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Samples], captions: list[str], columns: int = 8) -> bytes:
    """Return a PNG with a row per variant and a column per caption; a red frame marks an image with any wrong attribute."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * columns + 1.2, 1.3 * len(results) + 0.9), layout="constrained")
    plots = figure.subplots(len(results), columns, squeeze=False)
    for row, (name, samples) in zip(plots, results.items(), strict=True):
        shown = zip(
            row, imaging.to_uint8(samples.images[:columns]), samples.scenes.all_correct()[:columns], strict=True
        )
        for axes, pixels, is_right in shown:
            axes.imshow(pixels, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#888888" if is_right else "#dc1e1e", linewidth=0.5 if is_right else 3)
        row[0].set_ylabel(textwrap.fill(name, 20), fontsize=8)
    for axes, caption in zip(plots[0], captions, strict=False):
        axes.set_title(textwrap.fill(caption, 22), fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=DEFAULT_ROOT, help="storage folder of the pipeline, may be new")
    parser.add_argument("--pipeline", default="demo", help="demo, or tiny to try it out")
    parser.add_argument("--captions", type=int, default=1000, help="maximum number of held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--out", default="docs/ablation", help="path of the figure and the table, without .png and .md")
    arguments = parser.parse_args()

    train(arguments.pipeline, arguments.storage)
    base, others = (artifacts(arguments.pipeline, arguments.storage, settings) for settings in (BASE, OTHERS))
    stack = load_stack(base, decoder=others["decoder"])
    heldout = load_heldout(base, arguments.captions, stack.image_size)
    results = {name: draw(stack, embed, heldout, arguments.seed) for name, embed in ways(stack, heldout).items()}
    results[REAL] = measure(stack, heldout.images, heldout)
    priors = {
        "text embedding": retrieval.score_embeddings(stack.embed_text(heldout.captions), heldout.image_embedding),
        "diffusion prior": score_prior(stack, heldout, arguments.seed),
        "autoregressive prior": score_prior(load_stack(base, prior=others["prior"]), heldout, arguments.seed),
    }
    text = f"{len(heldout.captions)} held-out captions, guidance scale {stack.sampling.decoder.guidance_scale:g}\n\n"
    text += table(results, priors)
    Path(arguments.out).with_suffix(".md").write_text(text)
    Path(arguments.out).with_suffix(".png").write_bytes(plot(results, heldout.captions))
    print(text)


if __name__ == "__main__":
    main()
