"""The DALL·E pipeline: an autoencoder, the tokens of all images, and a Transformer over captions and tokens."""

import dataclasses

from pipelines.tokens import TokenPipelineConfig, TokenResources, token_pipeline
from tasks.stage import OwnResources
from tasks.stages.evaluate import EvaluateConfig
from unclip.systems.dalle import DALLE, MODEL_SIZES, DalleSampling, DalleStageConfig


@dataclasses.dataclass(frozen=True)
class DalleResources(TokenResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    dalle: OwnResources | None = None
    """Resources for training the Transformer."""


@dataclasses.dataclass(frozen=True)
class DalleEvaluateConfig(EvaluateConfig):
    sampling: DalleSampling = DalleSampling()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class DallePipelineConfig(TokenPipelineConfig):
    """All settings of a run."""

    resources: DalleResources = DalleResources()
    dalle: DalleStageConfig = DalleStageConfig()
    evaluate: DalleEvaluateConfig = DalleEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model("dalle", self.dalle.model)


PIPELINE = token_pipeline(DallePipelineConfig, DALLE, MODEL_SIZES)
