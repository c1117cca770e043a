"""Stages `prior`, `decoder` and `upsampler`: trainings, independent of each other. There may be several upsamplers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from tasks.tracking import PREVIEW_KEYS
from tasks.training import Training, run_training
from unclip import files
from unclip.data import Batch, RowReader, Source
from unclip.models.autoregressive_prior import AutoregressivePriorConfig
from unclip.models.clip import Clip
from unclip.models.decoder import DecoderConfig
from unclip.models.embeddings import EmbeddingQuantizer
from unclip.models.prior import PriorConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.systems.unclip import objectives
from unclip.training.objective import Objective
from unclip.training.parallel import Workers
from unclip.training.settings import TrainerConfig
from unclip.training.trainer import CURVE

NUM_PREVIEWS = 16
NUM_QUANTIZED = 65_536
"""Training rows whose range the autoregressive prior's buckets cover."""


@dataclasses.dataclass(frozen=True)
class PriorStageConfig:
    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    """Which of the paper's two priors."""
    model: PriorConfig = PriorConfig()
    """The diffusion prior's network and process."""
    autoregressive: AutoregressivePriorConfig = AutoregressivePriorConfig()
    """The autoregressive prior's network and buckets."""
    trainer: TrainerConfig = TrainerConfig()
    """The training."""


@dataclasses.dataclass(frozen=True)
class DecoderStageConfig:
    model: DecoderConfig = DecoderConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """The training."""


@dataclasses.dataclass(frozen=True)
class UpsamplerStageConfig:
    model: UpsamplerConfig = UpsamplerConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """The training."""


@stage("prior", version=2)
def prior(context: StageContext, config: PriorStageConfig, dataset: Artifact, clip: Artifact) -> Output:
    """Train the prior: captions to CLIP image embeddings."""
    return _train(context, dataset, prior_training(config, Snapshot.of(dataset.facts), clip))


def prior_training(config: PriorStageConfig, snapshot: Snapshot, clip: Artifact) -> Training:
    kinds: dict[str, type[objectives.PriorObjective | objectives.AutoregressivePriorObjective]] = {
        "diffusion": objectives.PriorObjective,
        "autoregressive": objectives.AutoregressivePriorObjective,
    }

    def build(_: Workers) -> Objective:
        frozen_clip, statistics = Clip.load(clip.facts["model"], clip.facts["pretrained"]), snapshot.load_statistics()
        if config.kind == "diffusion":
            return objectives.PriorObjective(config.model, frozen_clip, statistics)
        quantizer = fit_quantizer(snapshot, config.autoregressive)
        return objectives.AutoregressivePriorObjective(config.autoregressive, frozen_clip, statistics, quantizer)

    columns = kinds[config.kind].columns
    return _of_snapshot(snapshot, build, (snapshot.source("embeddings", *columns),), config.trainer)


def fit_quantizer(snapshot: Snapshot, config: AutoregressivePriorConfig) -> EmbeddingQuantizer:
    """Buckets for the image embeddings of a dataset, from the first of its training rows; every worker finds the same."""
    keys = snapshot.keys("train")[:NUM_QUANTIZED]  # keys are hashes: the first are as good as any
    rows = RowReader((snapshot.source("embeddings", "image_embedding", "clip_score"),), keys).read(keys)
    return EmbeddingQuantizer.fit(
        torch.from_numpy(np.stack(rows["image_embedding"])),
        torch.tensor(rows["clip_score"]),
        snapshot.load_statistics(),
        snapshot.load_principal_components(),
        explained=config.explained_variance,
        num_buckets=config.num_buckets,
    )


@stage("decoder", version=2)
def decoder(context: StageContext, config: DecoderStageConfig, dataset: Artifact, clip: Artifact) -> Output:
    """Train the decoder: CLIP image embeddings, and captions where configured, to small pictures."""
    _tell_shown_rows(context, dataset)
    return _train(context, dataset, decoder_training(config, Snapshot.of(dataset.facts), clip))


def decoder_training(config: DecoderStageConfig, snapshot: Snapshot, clip: Artifact) -> Training:
    columns = objectives.DecoderObjective.columns(config.model)
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", *columns))

    def build(_: Workers) -> Objective:
        reads_text = config.model.text != "none"
        frozen_clip = Clip.load(clip.facts["model"], clip.facts["pretrained"]) if reads_text else None
        shown = _read_shown_rows(snapshot, sources)
        return objectives.DecoderObjective(config.model, snapshot.load_statistics(), shown, frozen_clip)

    return _of_snapshot(snapshot, build, sources, config.trainer)


@stage("upsampler", version=2)
def upsampler(context: StageContext, config: UpsamplerStageConfig, dataset: Artifact) -> Output:
    """Train an upsampler: small pictures to large ones."""
    _tell_shown_rows(context, dataset)
    return _train(context, dataset, upsampler_training(config, Snapshot.of(dataset.facts)))


def upsampler_training(config: UpsamplerStageConfig, snapshot: Snapshot, _: Artifact | None = None) -> Training:
    sources = (snapshot.source("images", "jpg"),)

    def build(_: Workers) -> Objective:
        return objectives.UpsamplerObjective(config.model, _read_shown_rows(snapshot, sources))

    return _of_snapshot(snapshot, build, sources, config.trainer)


TRAININGS: dict[type, Callable[..., Training]] = {
    PriorStageConfig: prior_training,
    DecoderStageConfig: decoder_training,
    UpsamplerStageConfig: upsampler_training,
}
"""What a stage with such a configuration trains, given that, the snapshot and the CLIP."""


def _of_snapshot(
    snapshot: Snapshot, build: Callable[[Workers], Objective], sources: tuple[Source, ...], config: TrainerConfig
) -> Training:
    return Training(build, sources, lambda: snapshot.keys("train"), config, lambda: snapshot.keys("holdout"))


def _train(context: StageContext, dataset: Artifact, training: Training) -> Output:
    snapshot = Snapshot.of(dataset.facts)
    facts: dict[str, Any] = {"rows": dataset.facts["rows"], "snapshot": dataset.facts["snapshot"]}
    context.tracker.dataset(context.run.pipeline, snapshot.digest, snapshot.embeddings, facts)
    model, digest = run_training(context, training)
    context.tracker.file(model, "model")
    if files.exists(f"{context.folder}/{CURVE}"):
        context.tracker.bytes(files.read(f"{context.folder}/{CURVE}"), CURVE)
    return Output(model, digest, {"samples_seen": training.config.num_samples, "snapshot": snapshot.digest})


def _shown_keys(snapshot: Snapshot) -> list[str]:
    """Keys of a few rows to watch a training on, held-out ones where there are any."""
    return (snapshot.keys("holdout") or snapshot.keys("train"))[:NUM_PREVIEWS]


def _read_shown_rows(snapshot: Snapshot, sources: tuple[Source, ...]) -> Batch:
    keys = _shown_keys(snapshot)
    return RowReader(sources, keys).read(keys)


def _tell_shown_rows(context: StageContext, dataset: Artifact) -> None:
    """Said before there are pictures, in MLflow and in the stage's folder: so what shows a row that is taken down is found."""
    keys = _shown_keys(Snapshot.of(dataset.facts))
    files.write_json(f"{context.folder}/{PREVIEW_KEYS}", keys)
    context.tracker.json(keys, PREVIEW_KEYS)
