"""What the prior is good for: one decoder, the same captions, three image embeddings.

    python -m benchmarks.ablation --storage unclip-data

The ablation of Ramesh et al. 2022, section 5.1, on the demo: a decoder that reads captions, and was trained with image
embedding and caption dropped independently, draws held-out captions from the caption alone, with CLIP's text embedding in
the place of the image embedding, and with the prior's image embedding. Both priors are also measured by themselves. What
the storage lacks is trained by the pipeline. Writes a table and a picture, whichever way it comes out.

Letters: N captions, E CLIP embedding width, S side of the stack's pictures.
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
from pipelines.composition import compose
from pipelines.config import load
from pipelines.prepare import prepare
from tasks.snapshots import Snapshot
from tasks.stage import Artifact
from tasks.stages.evaluate import heldout_keys
from tasks.store import DEFAULT_ROOT, Store
from unclip import imaging
from unclip.data import RowReader
from unclip.evaluation import metrics
from unclip.models.decoder import Captions
from unclip.systems.system import StackFiles
from unclip.systems.unclip.stack import Stack
from unclip.training.batches import load_images

BASE: tuple[str, ...] = ()
OTHERS = (
    "decoder.model.text=clip",
    "prior.kind=autoregressive",
    "prior.trainer.num_samples=48_000",
    "prior.trainer.learning_rate=4e-3",
)
"""What the storage must have besides: a decoder that reads captions, and the other prior. They train side by side."""

ALONE, TEXT, PRIOR, TRUE, REAL = (
    "caption alone",
    "caption, its text embedding",
    "caption, the prior's image embedding",
    "caption, its picture's image embedding",
    "real pictures",
)

ImageEmbedding = Callable[[list[str], torch.Generator], Tensor]
"""(captions, randomness) -> what takes the image embedding's place, [B, E]."""


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Pairs that nothing was trained on, each caption once."""

    captions: list[str]
    image_embedding: Tensor
    """[N, E] of their pictures, as the embeddings table has them."""
    images: Tensor
    """[N, 3, S, S] in [-1, 1], their pictures."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One picture for each held-out caption, measured."""

    images: Tensor
    """[N, 3, S, S] in [-1, 1]."""
    scenes: metrics.SceneScores
    clip_score: float
    """Mean cosine of pictures and captions in CLIP's eyes."""
    frechet_distance: float
    """From the real pictures of the same captions, in CLIP's embeddings."""

    def all_right(self) -> float:
        """Share of the pictures of which colour, background, size and shape are right."""
        right = self.scenes.all_right()
        return sum(right) / len(right)


def train(pipeline: str, storage: str) -> None:
    """Run the pipeline for what is missing; as it is last, so that its results are those that stay."""
    command = [sys.executable, "-m", "pipelines", "run", pipeline, "--storage", storage]
    changes = [word for assignment in OTHERS for word in ("--set", assignment)]
    subprocess.run([*command, *changes, "--until", "evaluate"], check=True)
    subprocess.run(command, check=True)


def artifacts(pipeline: str, storage: str, assignments: tuple[str, ...] = BASE) -> dict[str, Artifact]:
    """What the pipeline has made with these settings, by stage."""
    dag = compose(prepare(load(pipeline, None, assignments, storage)))
    return {name: state.artifact for name, state in dags.states(dag, Store(storage)).items() if state.artifact}


def load_stack(made: Mapping[str, Artifact], **others: Artifact) -> Stack:
    """A stack of trained models, some of which other runs may have made; its sampling is that of its evaluation."""
    files = StackFiles.of(made["evaluate"].facts["stack"])
    models = {name: others[name].uri if name in others else uri for name, uri in files.models.items()}
    return Stack.load(dataclasses.replace(files, models=models))


def load_heldout(made: Mapping[str, Artifact], num_captions: int, side: int) -> Heldout:
    """Held-out pairs in the order of their keys, pictures with sides of `side` pixels."""
    snapshot = Snapshot.of(made["curate"].facts)
    pairs = dict(list(heldout_keys(snapshot).items())[:num_captions])
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", "image_embedding"))
    rows = RowReader(sources, list(pairs.values())).read(list(pairs.values()))
    embedding = torch.from_numpy(np.stack(rows["image_embedding"]))
    return Heldout(list(pairs), embedding, load_images(rows["jpg"], side))


def ways(stack: Stack, heldout: Heldout) -> dict[str, ImageEmbedding]:
    """What takes the image embedding's place in each way of drawing, and for comparison that of the picture itself."""
    true = dict(zip(heldout.captions, heldout.image_embedding, strict=True))
    return {
        ALONE: lambda captions, _: stack.decoder.null_image_embedding(len(captions)),
        TEXT: lambda captions, _: stack.embed_text(captions),
        PRIOR: lambda captions, generator: stack.embed_captions(captions, stack.sampling, generator),
        TRUE: lambda captions, _: torch.stack([true[caption] for caption in captions]),
    }


@torch.no_grad()
def draw(stack: Stack, way: ImageEmbedding, heldout: Heldout, seed: int = 0) -> Drawn:
    """Draw every held-out caption in one way; all ways of a seed start from the same noise."""
    parts, size = [], stack.sampling.batch_size
    for number, start in enumerate(range(0, len(heldout.captions), size)):
        captions = heldout.captions[start : start + size]
        for_prior, for_decoder = (torch.Generator().manual_seed(seed * 1_000_003 + number) for _ in range(2))
        embedding = way(captions, for_prior)
        parts.append(stack.decode(embedding, stack.sampling, for_decoder, Captions(stack.read_captions(captions))))
    return measure(stack, torch.cat(parts), heldout)


@torch.no_grad()
def measure(stack: Stack, images: Tensor, heldout: Heldout) -> Drawn:
    """Pictures [N, 3, S, S] for the held-out captions, against the captions and against their real pictures."""
    scenes = metrics.score_scenes(images, heldout.captions)
    assert scenes is not None, "the demo's captions are those of scenes"
    embedding, text = stack.embed_images(images), stack.embed_text(heldout.captions)
    distance = metrics.frechet_distance(embedding, stack.embed_images(heldout.images))
    return Drawn(images, scenes, float((embedding * text).sum(dim=1).mean()), distance)


@torch.no_grad()
def score_prior(stack: Stack, heldout: Heldout, seed: int = 0) -> dict[str, float]:
    """How near the image embeddings that a stack's prior draws are to those of the captions' pictures."""
    drawn = stack.embed_captions(heldout.captions, stack.sampling, torch.Generator().manual_seed(seed))
    return metrics.score_embeddings(drawn, heldout.image_embedding)


def table(drawn: Mapping[str, Drawn], priors: Mapping[str, Mapping[str, float]]) -> str:
    """Both results in Markdown."""
    attributes = [*metrics.ATTRIBUTES, "place"]
    lines = [f"| drawn from | {' | '.join(attributes)} | all but place | CLIP score | Fréchet distance |"]
    lines.append("|---" * (len(attributes) + 4) + "|")
    for name, one in drawn.items():
        accuracy = one.scenes.accuracy()
        cells = [f"{accuracy[attribute]:.3f}" for attribute in attributes]
        cells += [f"{one.all_right():.3f}", f"{one.clip_score:.3f}", f"{one.frechet_distance:.4f}"]
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


def picture(drawn: Mapping[str, Drawn], captions: list[str], columns: int = 8) -> bytes:
    """A PNG: a row for each way, a column for each caption; red frames where a picture is wrong in something."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * columns + 1.2, 1.3 * len(drawn) + 0.9), layout="constrained")
    plots = figure.subplots(len(drawn), columns, squeeze=False)
    for row, (name, one) in zip(plots, drawn.items(), strict=True):
        shown = zip(row, imaging.to_uint8(one.images[:columns]), one.scenes.all_right()[:columns], strict=True)
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
    parser.add_argument("--storage", default=DEFAULT_ROOT, help="folder of a run of the pipeline, or of none yet")
    parser.add_argument("--pipeline", default="demo", help="demo, or tiny to try it out")
    parser.add_argument("--captions", type=int, default=1000, help="held-out captions at most")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", default="docs/ablation", help="picture and table are this with .png and .md")
    arguments = parser.parse_args()

    train(arguments.pipeline, arguments.storage)
    made, others = (artifacts(arguments.pipeline, arguments.storage, settings) for settings in (BASE, OTHERS))
    stack = load_stack(made, decoder=others["decoder"])
    heldout = load_heldout(made, arguments.captions, stack.image_size)
    drawn = {name: draw(stack, way, heldout, arguments.seed) for name, way in ways(stack, heldout).items()}
    drawn[REAL] = measure(stack, heldout.images, heldout)
    priors = {
        "text embedding": metrics.score_embeddings(stack.embed_text(heldout.captions), heldout.image_embedding),
        "diffusion prior": score_prior(stack, heldout, arguments.seed),
        "autoregressive prior": score_prior(load_stack(made, prior=others["prior"]), heldout, arguments.seed),
    }
    text = f"{len(heldout.captions)} held-out captions, guidance scale {stack.sampling.decoder.guidance_scale:g}\n\n"
    text += table(drawn, priors)
    Path(arguments.out).with_suffix(".md").write_text(text)
    Path(arguments.out).with_suffix(".png").write_bytes(picture(drawn, heldout.captions))
    print(text)


if __name__ == "__main__":
    main()
