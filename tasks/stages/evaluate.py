"""Stage `evaluate`: pictures for captions that no model was trained on, and what is right in them."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from tasks import tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
from unclip import images as pictures
from unclip.config import fingerprint, require
from unclip.evaluation import metrics as evaluation
from unclip.evaluation import scenes
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics, check_agreement
from unclip.systems.unclip.stack import SamplingConfig, Stack, load_model


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    num_captions: int = 256
    """Held-out captions to draw; fewer when the snapshot holds out fewer."""
    num_unseen: int = 0
    """Scene captions to draw whose pairs of shape and colour are in no training picture; for procedural scenes."""
    num_pictures: int = 48
    """Pictures of each group in the captioned grid."""
    seed: int = 0
    """Of the noise, and of the unseen scenes."""
    sampling: SamplingConfig = SamplingConfig()
    """How pictures are drawn; published with the stack as its default."""

    def __post_init__(self) -> None:
        require(self.num_captions >= 1, "num_captions", self.num_captions, "at least 1")
        require(self.num_unseen >= 0, "num_unseen", self.num_unseen, "at least 0")


@stage("evaluate", version=1)
def evaluate(
    context: StageContext,
    config: EvaluateConfig,
    dataset: Artifact,
    clip: Artifact,
    prior: Artifact,
    decoder: Artifact,
    *upsamplers: Artifact,
) -> Output:
    """Draw held-out captions with the whole stack and measure the pictures."""
    groups = {"heldout": list(heldout_keys(Snapshot.of(dataset.facts)))[: config.num_captions]}
    if config.num_unseen:
        groups["unseen"] = unseen_captions(config.num_unseen, config.seed)
    uris = [model.uri for model in (prior, decoder, *upsamplers)]
    statistics = Snapshot.of(dataset.facts).load_statistics()
    images, similarities = _draw_all(context, config, groups, clip, uris, statistics)

    facts: dict[str, Any] = {"accuracy": {}, "clip_score": {}, "captions": {}, "pictures": {}}
    drawn = []
    for group, captions in groups.items():
        scores = evaluation.score_scenes(images[group], captions)
        facts["captions"][group] = len(captions)
        facts["clip_score"][group] = float(similarities[group].mean())
        marks = None
        if scores is not None:
            facts["accuracy"][group] = scores.accuracy()
            marks = scores.all_right()[: config.num_pictures]
            facts["pictures"][f"confusion_{group}"] = _publish(
                context, f"confusion_{group}.png", confusion_picture(scores)
            )
        shown = images[group][: config.num_pictures]
        grid = pictures.png(pictures.grid(shown, columns=8, captions=captions[: config.num_pictures], marks=marks))
        facts["pictures"][group] = _publish(context, f"{group}.png", grid)
        drawn.append(pictures.to_uint8(images[group]).tobytes())
        context.tracker.metrics(
            {f"{group}.clip_score": facts["clip_score"][group]}
            | {f"{group}.{name}": value for name, value in facts["accuracy"].get(group, {}).items()}
        )
    digest = fingerprint([files.sha256(data) for data in drawn], facts["accuracy"])
    facts["sampling"] = dataclasses.asdict(config.sampling)
    return Output(context.folder, digest, facts)


def heldout_keys(snapshot: Snapshot) -> dict[str, str]:
    """Different captions of held-out pairs whose very words no training pair has, each with the key of its first pair.

    In the order of their keys. A snapshot without such captions gives its other captions.
    """
    table = tables.read(snapshot.embeddings, snapshot.embeddings_version, columns=["key", "caption"])
    captions = dict(zip(table.column("key").to_pylist(), table.column("caption").to_pylist(), strict=True))
    trained_on = {captions[key] for key in snapshot.keys("train")}
    heldout: dict[str, str] = {}
    for key in snapshot.keys("holdout"):
        heldout.setdefault(captions[key], key)
    fresh = {caption: key for caption, key in heldout.items() if caption not in trained_on}
    return fresh or heldout or {caption: key for key, caption in captions.items()}


def unseen_captions(count: int, seed: int) -> list[str]:
    """Captions of scenes whose shape and colour never come together in training data."""
    captions = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        captions.append(scenes.caption(scenes.random_scene(rng, unseen=True), rng))
    return captions


def _draw_all(
    context: StageContext,
    config: EvaluateConfig,
    groups: dict[str, list[str]],
    clip: Artifact,
    models: list[str],
    statistics: EmbeddingStatistics,
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Pictures of each group, and the cosine of each to its caption in CLIP's eyes; batches are shared between workers."""
    resources, size = context.resources, config.sampling.batch_size
    batches = [
        (group, number, captions[start : start + size])
        for group, captions in groups.items()
        for number, start in enumerate(range(0, len(captions), size))
    ]
    actor_options = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, "max_restarts": 3}
    actors = [
        Artist.options(**actor_options).remote(  # type: ignore[attr-defined]
            clip, models, config, resources.cpus_per_worker, statistics
        )
        for _ in range(min(resources.num_workers, len(batches)))
    ]
    images: dict[str, list[torch.Tensor]] = {group: [] for group in groups}
    similarities: dict[str, list[np.ndarray]] = {group: [] for group in groups}
    progress = context.progress(sum(map(len, groups.values())), "pictures").start()
    done = ray.util.ActorPool(actors).map(lambda actor, batch: actor.draw.remote(*batch[1:]), batches)
    for (group, _, captions), (pixels, similarity) in zip(batches, done, strict=True):
        images[group].append(torch.from_numpy(pixels))
        similarities[group].append(similarity)
        progress.update(len(captions))
    return (
        {group: torch.cat(parts) for group, parts in images.items()},
        {group: np.concatenate(parts) for group, parts in similarities.items()},
    )


@ray.remote(max_task_retries=3)
class Artist:
    """Holds one stack; draws one batch a call."""

    def __init__(
        self,
        clip: Artifact,
        models: list[str],
        config: EvaluateConfig,
        num_threads: int,
        statistics: EmbeddingStatistics,
    ) -> None:
        torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = [load_model(uri) for uri in models]
        prior, decoder, *upsamplers = loaded
        frozen_clip = Clip.load(clip.facts["model"], clip.facts["pretrained"])
        self.stack = Stack(frozen_clip, prior, decoder, upsamplers).to(device)
        check_agreement({"dataset": statistics, "prior": self.stack.prior.statistics})
        self.config = config

    def draw(self, number: int, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number` of a group: pictures [B, 3, H, W] in [-1, 1], and their cosines to the captions [B]."""
        images = self.stack.draw_batch(captions, number, seed=self.config.seed, sampling=self.config.sampling)
        return images.numpy(), _clip_scores(self.stack, images, captions)


def _clip_scores(stack: Stack, images: torch.Tensor, captions: Sequence[str]) -> np.ndarray:
    image_embedding = stack.clip.embed_images(stack.clip.resize(images.to(stack.device)))
    text_embedding = stack.clip.encode_text(stack.clip.tokenize(list(captions)).to(stack.device)).text_embedding
    return (image_embedding * text_embedding).sum(dim=1).cpu().numpy()


def _publish(context: StageContext, name: str, data: bytes) -> str:
    """Keep a picture in the stage's folder and show it in MLflow; returns its URI."""
    files.write(f"{context.folder}/{name}", data)
    context.tracker.bytes(data, name)
    return f"{context.folder}/{name}"


def confusion_picture(scores: evaluation.SceneScores) -> bytes:
    """A PNG of what was drawn where what was asked for: shapes, colours and sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    plots = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS), "size": scenes.SIZES}
    for axes, (attribute, labels) in zip(figure.subplots(1, len(plots)), plots.items(), strict=True):
        counts = scores.confusion(attribute, labels)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels) + 1), [*labels, "other"], rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="drawn", ylabel="asked for", title=f"{attribute}: {np.trace(counts) / counts.sum():.0%} right")
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column,
                    row,
                    count,
                    ha="center",
                    va="center",
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()
