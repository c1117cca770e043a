"""The unCLIP pipeline: prior, decoder and upsamplers, trained independently on one dataset."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import dataset, finish
from pipelines.pipeline import Pipeline, Variant
from pipelines.upsampled import UpsampledConfig, UpsampledEvaluateConfig, UpsampledResources, with_chain
from tasks.stage import OwnResources
from tasks.stages.train import train
from unclip import config
from unclip.config import require
from unclip.systems.unclip.decoder import DECODER, DecoderStageConfig
from unclip.systems.unclip.prior import PRIOR, PriorStageConfig
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.sizes import MODEL_SIZES
from unclip.systems.upsampler import UPSAMPLER, merge_over


@dataclasses.dataclass(frozen=True)
class UnclipResources(UpsampledResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    prior: OwnResources | None = None
    """Resources for training the prior."""
    decoder: OwnResources | None = None
    """Resources for training the decoder."""


@dataclasses.dataclass(frozen=True)
class UnclipEvaluateConfig(UpsampledEvaluateConfig):
    sampling: SamplingConfig = SamplingConfig()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class UnclipConfig(UpsampledConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: UnclipResources = UnclipResources()
    prior: PriorStageConfig = PriorStageConfig()
    decoder: DecoderStageConfig = DecoderStageConfig()
    evaluate: UnclipEvaluateConfig = UnclipEvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        prior = self.evaluate.sampling.prior
        has_bound = self.prior.model.clip_range is not None or prior.threshold is not None
        needs_bound = self.prior.kind == "diffusion" and prior.thresholding == "dynamic"
        expected = "static or none, or a threshold beside it, since prior.model.clip_range is none"
        require(has_bound or not needs_bound, "evaluate.sampling.prior.thresholding", prior.thresholding, expected)


def unclip(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    prior = bind(train(PRIOR), data.snapshot, data.clip)
    decoder = bind(train(DECODER), data.snapshot, data.clip)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, data.clip, prior, decoder, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and the resolutions that depend on each other.

    Raises:
        ConfigError: inconsistent resolutions; the message names the setting.
    """
    return _with_resolutions(_with_model_size(values))


def _with_model_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `values` over those of the named model size; without one, over a single upsampler to 256 pixels.

    An empty section `upsamplers` removes all upsamplers.
    """
    name = values.get("model_size")
    if name in (None, "none"):
        return merge_over({"upsamplers": {"256": {}}}, values)
    prior = values.get("prior")
    kind = prior.get("kind", "diffusion") if isinstance(prior, Mapping) else "diffusion"
    return merge_over(MODEL_SIZES[name].sections(kind), values)


def _with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the resolutions that follow from the names of the upsamplers, and their sampling settings."""
    section = values.get("decoder", {})
    if not isinstance(section, Mapping):
        return dict(values)  # `config.load` reports the error
    size = config.load(DecoderStageConfig, section, "decoder").model.unet.image_size
    return with_chain(values, size, "the decoder")


def _reads_captions(config: UnclipConfig) -> bool:
    return config.decoder.model.text != "none"


def _reads_none(config: UnclipConfig) -> bool:
    return not _reads_captions(config)


_TEXT_EMBEDDING = "evaluate.sampling.image_embedding=text_embedding"
_NO_EMBEDDING = "evaluate.sampling.image_embedding=none"
_CAPTIONS = ("decoder.model.text=clip", "decoder.trainer.reference_curve=none")  # the curve is another network's
_AUTOREGRESSIVE = ("prior.kind=autoregressive", "prior.trainer.reference_curve=none")
VARIANTS = {
    "text_embedding": Variant("unclip, text embedding in the prior's place", (_TEXT_EMBEDDING,)),
    "no_caption": Variant(
        "unclip, decoder without caption", ("evaluate.sampling.decoder.reads_captions=false",), _reads_captions
    ),
    "caption_alone": Variant("unclip, caption alone", (_NO_EMBEDDING,), _reads_captions),
    "autoregressive": Variant(
        "unclip, autoregressive prior", _AUTOREGRESSIVE, lambda config: config.prior.kind == "diffusion"
    ),
    "captions": Variant("unclip, decoder reads captions", _CAPTIONS, _reads_none),
    "captions_text_embedding": Variant(
        "unclip, decoder reads captions, text embedding in the prior's place",
        (*_CAPTIONS, _TEXT_EMBEDDING),
        _reads_none,
    ),
    "captions_alone": Variant(
        "unclip, decoder reads captions, caption alone", (*_CAPTIONS, _NO_EMBEDDING), _reads_none
    ),
}
"""Rows of the ablation in section 5.1 of Ramesh et al. 2022, and the other prior; those that need no other training first."""

PIPELINE = Pipeline(UnclipConfig, unclip, resolve, MODEL_SIZES, VARIANTS)
