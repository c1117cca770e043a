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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=DEFAULT_ROOT, help="storage folder of the pipeline, may be new")
    parser.add_argument("--pipeline", default="demo", help="demo, or tiny to try it out")
    parser.add_argument("--captions", type=int, default=256, help="scenes of each kind")
    arguments = parser.parse_args()

    ablation.run(arguments.pipeline, arguments.storage)
    stack = ablation.load_stack(ablation.artifacts(arguments.pipeline, arguments.storage))
    known = scene_captions(NUM_FITTED, 1, unseen=False)
    by_image, by_text = (fit(embed(stack, known), labels(known)) for embed in (embed_images, embed_text))
    groups = [scene_captions(arguments.captions, 2, unseen=unseen) for unseen in (False, True)]
    rows: dict[str, Callable[[list[str]], float]] = {
        "CLIP's image embedding of the true image, read": lambda group: read(
            by_image, embed_images(stack, group), group
        ),
        "CLIP's text embedding, read": lambda group: read(by_text, embed_text(stack, group), group),
        "the prior's image embedding, read": lambda group: read(by_image, sample_prior(stack, group), group),
        "decoded from the true image's embedding": lambda group: decode(stack, embed_images(stack, group), group),
        "decoded from the prior's embedding": lambda group: decode(stack, sample_prior(stack, group), group),
        "decoded from the text embedding": lambda group: decode(stack, embed_text(stack, group), group),
    }
    print("| right shapes | known pairs | unseen pairs |\n|---|---:|---:|", flush=True)
    for name, share in rows.items():
        print(f"| {name} | {' | '.join(f'{share(group):.3f}' for group in groups)} |", flush=True)


@torch.no_grad()
def in_batches(stack: Stack, captions: list[str], function: Callable[[list[str], int], Tensor]) -> Tensor:
    """Apply a function of captions and the number of the first one to batches, and join the results."""
    size = stack.sampling.batch_size
    return torch.cat([function(captions[start : start + size], start) for start in range(0, len(captions), size)])


def embed_images(stack: Stack, captions: list[str]) -> Tensor:
    """CLIP's embeddings [N, E] of rendered images."""
    return in_batches(stack, captions, lambda batch, start: stack.embed_images(render(batch, start, stack.image_size)))


def embed_text(stack: Stack, captions: list[str]) -> Tensor:
    """CLIP's embeddings [N, E] of captions."""
    return in_batches(stack, captions, lambda batch, _: stack.embed_text(batch))


def sample_prior(stack: Stack, captions: list[str]) -> Tensor:
    """Image embeddings [N, E] that the prior samples for captions, always the same."""
    return in_batches(
        stack,
        captions,
        lambda batch, start: stack.embed_captions(batch, stack.sampling, torch.Generator().manual_seed(start)),
    )


def decode(stack: Stack, embedding: Tensor, captions: list[str]) -> float:
    """Share of images with the right shape, sampled from image embeddings [N, E]."""
    images = in_batches(
        stack,
        captions,
        lambda batch, start: stack.decode(
            embedding[start : start + len(batch)],
            stack.sampling,
            torch.Generator().manual_seed(start),
            stack.captions(batch, stack.sampling),
        ),
    )
    found = metrics.score_scenes(images, captions)
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


def read(classifier: tuple[Tensor, Tensor], embedding: Tensor, captions: list[str]) -> float:
    """Share of embeddings [N, E] whose shape a linear classifier reads right."""
    return float((F.linear(embedding, *classifier).argmax(dim=1) == labels(captions)).float().mean())


if __name__ == "__main__":
    main()
