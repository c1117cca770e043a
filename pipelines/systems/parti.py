"""The Parti pipeline: an autoencoder, the tokens of all images, and a Transformer from captions to tokens."""

import dataclasses

from pipelines.tokens import TokenPipelineConfig, TokenResources, token_pipeline
from tasks.stage import OwnResources
from tasks.stages.evaluate import EvaluateConfig
from unclip.systems.parti import MODEL_SIZES, PARTI, PartiSampling, PartiStageConfig


@dataclasses.dataclass(frozen=True)
class PartiResources(TokenResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    parti: OwnResources | None = None
    """Resources for training the Transformer."""


@dataclasses.dataclass(frozen=True)
class PartiEvaluateConfig(EvaluateConfig):
    sampling: PartiSampling = PartiSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class PartiPipelineConfig(TokenPipelineConfig):
    """All settings of a run."""

    resources: PartiResources = PartiResources()
    parti: PartiStageConfig = PartiStageConfig()
    evaluate: PartiEvaluateConfig = PartiEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model("parti", self.parti.model)


PIPELINE = token_pipeline(PartiPipelineConfig, PARTI, MODEL_SIZES)
