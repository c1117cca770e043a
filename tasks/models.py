"""Stages `prior`, `decoder` and `upsampler`: the three trainings, independent of each other."""

import dataclasses
from typing import Any

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from tasks.tracking import PREVIEW_KEYS
from tasks.train import Training, run_training
from unclip import objectives
from unclip.clip import Clip
from unclip.data import RowReader
from unclip.decoder import DecoderConfig
from unclip.prior import PriorConfig
from unclip.trainer import TrainerConfig
from unclip.upsampler import UpsamplerConfig

NUM_PREVIEWS = 16


@dataclasses.dataclass(frozen=True)
class PriorStageConfig:
    model: PriorConfig = PriorConfig()
    """The network and its diffusion process."""
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


@stage("prior", version=1)
def prior(context: StageContext, config: PriorStageConfig, dataset: Artifact, clip: Artifact) -> Output:
    """Train the diffusion prior: captions to CLIP image embeddings."""
    snapshot, model = Snapshot.of(dataset.facts), config.model
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.PriorObjective(
                model, Clip.load(clip.facts["model"], clip.facts["pretrained"]), snapshot.load_statistics()
            ),
            sources=(snapshot.source("embeddings", *objectives.PriorObjective.columns),),
            keys=lambda: snapshot.keys("train"),
            config=config.trainer,
        ),
    )


@stage("decoder", version=1)
def decoder(context: StageContext, config: DecoderStageConfig, dataset: Artifact) -> Output:
    """Train the decoder: CLIP image embeddings to small pictures."""
    snapshot, model = Snapshot.of(dataset.facts), config.model
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", "image_embedding"))
    shown = _shown_rows(context, snapshot)
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.DecoderObjective(
                model, snapshot.load_statistics(), RowReader(sources, shown).read(shown)
            ),
            sources=sources,
            keys=lambda: snapshot.keys("train"),
            config=config.trainer,
        ),
    )


@stage("upsampler", version=1)
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
