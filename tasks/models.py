"""Stages `prior`, `decoder` and `upsampler`: the three trainings, independent of each other."""

import dataclasses
from typing import Any

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from tasks.train import Training, run_training
from unclip import objectives
from unclip.clip import Clip
from unclip.data import Batch, RowReader, Source
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


@stage("decoder", version=2)
def decoder(context: StageContext, config: DecoderStageConfig, dataset: Artifact, clip: Artifact) -> Output:
    """Train the decoder: CLIP image embeddings, and captions where configured, to small pictures."""
    snapshot, model = Snapshot.of(dataset.facts), config.model
    columns = objectives.DecoderObjective.columns(model)
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", *columns))
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.DecoderObjective(
                model,
                snapshot.load_statistics(),
                _preview_rows(sources, snapshot),
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
    return _train(
        context,
        dataset,
        Training(
            build=lambda _: objectives.UpsamplerObjective(model, _preview_rows(sources, snapshot)),
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


def _preview_rows(sources: tuple[Source, ...], snapshot: Snapshot) -> Batch:
    """A few rows to watch a training on: held-out ones, where there are any."""
    keys = (snapshot.keys("holdout") or snapshot.keys("train"))[:NUM_PREVIEWS]
    return RowReader(sources, keys).read(keys)
