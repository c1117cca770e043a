"""Stages `prior`, `decoder` and `upsampler`: the three trainings, independent of each other."""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from tasks.tracking import PREVIEW_KEYS
from tasks.train import Training, run_training
from unclip import objectives
from unclip.autoregressive_prior import AutoregressivePriorConfig
from unclip.clip import Clip
from unclip.data import RowReader
from unclip.decoder import DecoderConfig
from unclip.embeddings import EmbeddingQuantizer
from unclip.parallel import Workers
from unclip.prior import PriorConfig
from unclip.trainer import Objective, TrainerConfig
from unclip.upsampler import UpsamplerConfig

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
    snapshot = Snapshot.of(dataset.facts)
    kinds = {"diffusion": objectives.PriorObjective, "autoregressive": objectives.AutoregressivePriorObjective}

    def build(_: Workers) -> Objective:
        frozen_clip, statistics = Clip.load(clip.facts["model"], clip.facts["pretrained"]), snapshot.load_statistics()
        if config.kind == "diffusion":
            return objectives.PriorObjective(config.model, frozen_clip, statistics)
        quantizer = fit_quantizer(snapshot, config.autoregressive)
        return objectives.AutoregressivePriorObjective(config.autoregressive, frozen_clip, statistics, quantizer)

    training = Training(
        build=build,
        sources=(snapshot.source("embeddings", *kinds[config.kind].columns),),
        keys=lambda: snapshot.keys("train"),
        config=config.trainer,
    )
    return _train(context, dataset, training)


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
    snapshot, model = Snapshot.of(dataset.facts), config.model
    columns = objectives.DecoderObjective.columns(model)
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", *columns))
    shown = _shown_rows(context, snapshot)
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.DecoderObjective(
                model,
                snapshot.load_statistics(),
                RowReader(sources, shown).read(shown),
                None if model.text == "none" else Clip.load(clip.facts["model"], clip.facts["pretrained"]),
            ),
            sources=sources,
            keys=lambda: snapshot.keys("train"),
            config=config.trainer,
        ),
    )


@stage("upsampler", version=2)
def upsampler(context: StageContext, config: UpsamplerStageConfig, dataset: Artifact) -> Output:
    """Train the upsampler: small pictures to large ones."""
    snapshot, model = Snapshot.of(dataset.facts), config.model
    sources = (snapshot.source("images", "jpg"),)
    shown = _shown_rows(context, snapshot)
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.UpsamplerObjective(model, RowReader(sources, shown).read(shown)),
            sources=sources,
            keys=lambda: snapshot.keys("train"),
            config=config.trainer,
        ),
    )


def _train(context: StageContext, dataset: Artifact, training: Training) -> Output:
    snapshot = Snapshot.of(dataset.facts)
    facts: dict[str, Any] = {"rows": dataset.facts["rows"], "snapshot": dataset.facts["snapshot"]}
    context.tracker.dataset(context.run.pipeline, snapshot.digest, snapshot.embeddings, facts)
    model, digest = run_training(context, training)
    context.tracker.file(model, "model")
    return Output(model, digest, {"samples_seen": training.config.num_samples, "snapshot": snapshot.digest})


def _shown_rows(context: StageContext, snapshot: Snapshot) -> list[str]:
    """Keys of a few rows to watch a training on, held-out ones where there are any.

    MLflow hears of them before it gets pictures, so that what shows a row that is taken down can be found.
    """
    keys = (snapshot.keys("holdout") or snapshot.keys("train"))[:NUM_PREVIEWS]
    context.tracker.json(keys, PREVIEW_KEYS)
    return keys
