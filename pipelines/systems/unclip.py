"""The unCLIP pipeline: prior, decoder and upsamplers, trained independently on one dataset."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import DatasetResources, PipelineConfig, dataset, finish
from pipelines.pipeline import Pipeline, Variant
from tasks.stage import Resources
from tasks.stages.download import DownloadConfig
from tasks.stages.evaluate import EvaluateConfig
from tasks.stages.train import train
from unclip import config
from unclip.config import nearest, require, to_dict
from unclip.errors import ConfigError
from unclip.systems.unclip.decoder import DECODER, DecoderStageConfig
from unclip.systems.unclip.prior import PRIOR, PriorStageConfig
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.sizes import MODEL_SIZES
from unclip.systems.upsampler import UPSAMPLER, UpsamplerStageConfig


@dataclasses.dataclass(frozen=True)
class UnclipResources(DatasetResources):
    """Worker resources: defaults for all stages, and sections that override them for single stages."""

    prior: Resources | None = None
    """Resources for training the prior."""
    decoder: Resources | None = None
    """Resources for training the decoder."""
    upsamplers: dict[str, Resources] = dataclasses.field(default_factory=dict)
    """Resources for training each upsampler, by its output resolution."""


@dataclasses.dataclass(frozen=True)
class UnclipEvaluateConfig(EvaluateConfig):
    sampling: SamplingConfig = SamplingConfig()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class UnclipConfig(PipelineConfig):
    """All settings of a run; the section `upsamplers.256` configures the stage `upsampler-256`."""

    resources: UnclipResources = UnclipResources()
    prior: PriorStageConfig = PriorStageConfig()
    decoder: DecoderStageConfig = DecoderStageConfig()
    upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
    """One section per upsampler, by output resolution in ascending order. Each upsampler takes the images of the previous
    one; the first takes those of the decoder. "none" instead of a section removes the upsampler."""
    evaluate: UnclipEvaluateConfig = UnclipEvaluateConfig()

    def __post_init__(self) -> None:
        for section, named in (("resources", self.resources), ("evaluate.sampling", self.evaluate.sampling)):
            for name in named.upsamplers:
                if name not in self.upsamplers:
                    remedy = nearest(name, self.upsamplers) if self.upsamplers else "There are no upsamplers."
                    raise ConfigError(f"{section}.upsamplers.{name}: no such upsampler. {remedy}")
        self._check_sampling()

    def _check_sampling(self) -> None:
        """Check the sampling settings against the models, before these are trained."""
        sampling = self.evaluate.sampling
        for name, settings in sampling.upsamplers.items():
            setting = f"evaluate.sampling.upsamplers.{name}"
            most, level = self.upsamplers[name].model.max_noise_level, settings.noise_level
            require(
                level <= most, f"{setting}.noise_level", level, f"at most {most}, the max_noise_level of its training"
            )
        prior = sampling.prior
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
        return _merge_over({"upsamplers": {"256": {}}}, values)
    prior = values.get("prior")
    kind = prior.get("kind", "diffusion") if isinstance(prior, Mapping) else "diffusion"
    return _merge_over(MODEL_SIZES[name].sections(kind), values)


def _merge_over(sections: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `values` over `sections`; upsamplers that are removed take their sampling settings with them."""
    merged = config.merge(sections, values)
    removes_all = values.get("upsamplers") == {}
    if removes_all:
        merged["upsamplers"] = {}
    try:
        sampling = merged["evaluate"]["sampling"]["upsamplers"].items()
        kept = {name: each for name, each in sampling if not removes_all and merged["upsamplers"].get(name) != "none"}
    except (KeyError, TypeError, AttributeError):  # there is none, or `config.load` says what is wrong
        return merged
    evaluate = merged["evaluate"]
    return {**merged, "evaluate": {**evaluate, "sampling": {**evaluate["sampling"], "upsamplers": kept}}}


def _with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the upsamplers by resolution, and fill in the resolutions that follow from their names.

    An upsampler is named after its output resolution; its input resolution is the output of the previous part. Images are
    stored at the resolution of the last part or larger.
    """
    sections, decoder_section, stored = values.get("upsamplers"), values.get("decoder", {}), values.get("download", {})
    if not (isinstance(sections, Mapping) and isinstance(decoder_section, Mapping) and isinstance(stored, Mapping)):
        return dict(values)  # `config.load` reports the error
    sections = {name: section for name, section in sections.items() if section != "none"}
    for name in sections:
        is_size = bool(re.fullmatch(r"[1-9]\d*", name))
        require(is_size, f"upsamplers.{name}", name, "its output resolution, as in upsamplers.256")
    decoder = config.load(DecoderStageConfig, decoder_section, "decoder").model
    size, previous = decoder.unet.image_size, "the decoder"
    sized: dict[str, Any] = {}
    sampling = to_dict(SamplingConfig())["upsamplers"]
    for name in sorted(sections, key=int):
        section, expected = sections[name], f"a multiple of {size}, the output resolution of {previous}"
        require(int(name) > size and int(name) % size == 0, f"upsamplers.{name}", int(name), expected)
        derived = {"low_res_size": size, "scale": int(name) // size}
        if isinstance(section, Mapping) and isinstance(model := section.get("model", {}), Mapping):
            for setting, value in derived.items():
                given = model.get(setting, value)
                expected = f"{value}, since {previous} outputs {size} pixels and this upsampler {name}"
                require(given == value, f"upsamplers.{name}.model.{setting}", given, expected)
            section = config.merge({"model": derived}, section)
        sampling[name] = to_dict(SamplingConfig().upsampler(int(name), is_first=not sized))
        sized[name] = section
        size, previous = int(name), f"upsampler-{name}"
    stored = {"image_size": max(size, DownloadConfig.image_size), **stored}
    image_size = config.load(DownloadConfig, stored, "download").image_size
    expected = f"at least {size}, the output resolution of {previous}, which trains on these images"
    require(image_size >= size, "download.image_size", image_size, expected)
    resolved = {**values, "upsamplers": sized, "download": stored}
    return config.merge({"evaluate": {"sampling": {"upsamplers": sampling}}}, resolved)


def _reads_captions(config: UnclipConfig) -> bool:
    return config.decoder.model.text != "none"


def _reads_none(config: UnclipConfig) -> bool:
    return not _reads_captions(config)


_TEXT_EMBEDDING = "evaluate.sampling.image_embedding=text_embedding"
_NO_EMBEDDING = "evaluate.sampling.image_embedding=none"
_CAPTIONS = "decoder.model.text=clip"
VARIANTS = {
    "text_embedding": Variant("unclip, text embedding in the prior's place", (_TEXT_EMBEDDING,)),
    "no_caption": Variant(
        "unclip, decoder without caption", ("evaluate.sampling.decoder.reads_captions=false",), _reads_captions
    ),
    "caption_alone": Variant("unclip, caption alone", (_NO_EMBEDDING,), _reads_captions),
    "autoregressive": Variant(
        "unclip, autoregressive prior", ("prior.kind=autoregressive",), lambda config: config.prior.kind == "diffusion"
    ),
    "captions": Variant("unclip, decoder reads captions", (_CAPTIONS,), _reads_none),
    "captions_text_embedding": Variant(
        "unclip, decoder reads captions, text embedding in the prior's place", (_CAPTIONS, _TEXT_EMBEDDING), _reads_none
    ),
    "captions_alone": Variant("unclip, decoder reads captions, caption alone", (_CAPTIONS, _NO_EMBEDDING), _reads_none),
}
"""Rows of the ablation in section 5.1 of Ramesh et al. 2022, and the other prior; those that need no other training first."""

PIPELINE = Pipeline(UnclipConfig, unclip, resolve, MODEL_SIZES, VARIANTS)
