"""Part of unclip that loses the shapes of unseen combinations: every part by itself, on the demo.

    python -m benchmarks.unseen --storage unclip-data

Scenes whose shape and colour occur together in no training image are compared with scenes of pairs that do. The decoder
samples from the embedding of the true image, of the prior, and of the text; a linear classifier reads the shape from CLIP's
embeddings of true images, from those of the prior, and from text embeddings. It is fitted to scenes of known pairs, so it
reads unseen ones as well only if the embedding of a shape does not depend on the colour. The pipeline trains any models that
the storage lacks.

Letters: N scenes, E CLIP embedding width, S image size of the stack.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ablation
from pipelines.real_images import render
from tasks.stages.evaluate import scene_captions
from tasks.store import DEFAULT_ROOT
from unclip.evaluation import metrics, scenes
from unclip.systems.unclip.stack import Stack

NUM_FITTED = 2000
"""Scenes of known pairs that the linear classifiers are fitted to."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Scenes, with CLIP's embeddings of what is known about them."""

    captions: list[str]
    image_embedding: Tensor
    """[N, E], of rendered images."""
    text_embedding: Tensor
    """[N, E]."""
    prior_embedding: Tensor | None = None
    """[N, E], sampled from the prior."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=DEFAULT_ROOT, help="storage folder of the pipeline, may be new")
    parser.add_argument("--pipeline", default="demo", help="demo, or tiny to try it out")
    parser.add_argument("--captions", type=int, default=256, help="scenes of each kind")
    arguments = parser.parse_args()

    ablation.run(arguments.pipeline, arguments.storage)
    stack = ablation.load_stack(ablation.artifacts(arguments.pipeline, arguments.storage))
    fitted = embed(stack, scene_captions(NUM_FITTED, 1, unseen=False))
    groups = {
        name: embed(stack, scene_captions(arguments.captions, 2, unseen=unseen), with_prior=True)
        for name, unseen in (("known pairs", False), ("unseen pairs", True))
    }
    print(table(stack, fitted, groups))


@torch.no_grad()
def embed(stack: Stack, captions: list[str], with_prior: bool = False) -> Group:
    """Embed scenes by their captions and their rendered images."""
    images, texts, sampled = [], [], []
    for start in range(0, len(captions), stack.sampling.batch_size):
        batch = captions[start : start + stack.sampling.batch_size]
        images.append(stack.embed_images(render(batch, start, stack.image_size)))
        texts.append(stack.embed_text(batch))
        if with_prior:
            sampled.append(stack.embed_captions(batch, stack.sampling, torch.Generator().manual_seed(start)))
    return Group(captions, torch.cat(images), torch.cat(texts), torch.cat(sampled) if with_prior else None)


@torch.no_grad()
def decoded_shape(stack: Stack, captions: list[str], embedding: Tensor | None) -> float:
    """Share of images with the right shape, sampled from image embeddings [N, E]."""
    assert embedding is not None
    parts = []
    for start in range(0, len(captions), stack.sampling.batch_size):
        end = start + stack.sampling.batch_size
        read = stack.captions(captions[start:end], stack.sampling)
        parts.append(stack.decode(embedding[start:end], stack.sampling, torch.Generator().manual_seed(start), read))
    found = metrics.score_scenes(torch.cat(parts), captions)
    assert found is not None, "all captions describe scenes"
    return found.accuracy()["shape"]


def labels(captions: Sequence[str]) -> Tensor:
    """Numbers of the shapes, [N]."""
    parsed = [scenes.parse_caption(caption) for caption in captions]
    return torch.tensor([scenes.SHAPES.index(scene.objects[0].shape) for scene in parsed if scene is not None])


def fit(embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier, logistic regression with a weak penalty; returns weights [K, E] and biases [K]."""
    weight = torch.zeros(len(scenes.SHAPES), embedding.shape[1], requires_grad=True)
    bias = torch.zeros(len(scenes.SHAPES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(F.linear(embedding, weight, bias), label) + 1e-5 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def table(stack: Stack, fitted: Group, groups: dict[str, Group]) -> str:
    """Format shares of right shapes as Markdown: a row for each part, a column for each group."""
    label = labels(fitted.captions)
    by_image, by_text = fit(fitted.image_embedding, label), fit(fitted.text_embedding, label)

    def read(classifier: tuple[Tensor, Tensor], embedding: Tensor | None, group: Group) -> float:
        assert embedding is not None
        found = F.linear(embedding, *classifier).argmax(dim=1)
        return float((found == labels(group.captions)).float().mean())

    rows: dict[str, Callable[[Group], float]] = {
        "CLIP's image embedding of the true image, read": lambda group: read(by_image, group.image_embedding, group),
        "CLIP's text embedding, read": lambda group: read(by_text, group.text_embedding, group),
        "the prior's image embedding, read": lambda group: read(by_image, group.prior_embedding, group),
        "decoded from the true image's embedding": lambda group: decoded_shape(
            stack, group.captions, group.image_embedding
        ),
        "decoded from the prior's embedding": lambda group: decoded_shape(stack, group.captions, group.prior_embedding),
        "decoded from the text embedding": lambda group: decoded_shape(stack, group.captions, group.text_embedding),
    }
    lines = [f"| right shapes | {' | '.join(groups)} |", "|---" + "|---:" * len(groups) + "|"]
    for name, share in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{share(group):.3f}' for group in groups.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
