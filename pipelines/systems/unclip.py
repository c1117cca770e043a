"""The pipeline of unCLIP: prior, decoder and upsamplers, trained independently of each other on one dataset."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pipelines.dag import Binder
from pipelines.dataset import DatasetResources, PipelineConfig, dataset, finish
from pipelines.pipeline import Pipeline
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
    """Resources of workers: of all stages, but for those that have a section of their own."""

    prior: Resources | None = None
    """For training the prior."""
    decoder: Resources | None = None
    """For training the decoder."""
    upsamplers: dict[str, Resources] = dataclasses.field(default_factory=dict)
    """For training each upsampler, by the resolution of its images."""


@dataclasses.dataclass(frozen=True)
class UnclipEvaluateConfig(EvaluateConfig):
    sampling: SamplingConfig = SamplingConfig()
    """Sampling settings; published with the stack as its defaults."""


@dataclasses.dataclass(frozen=True)
class UnclipConfig(PipelineConfig):
    """All settings of a run; `upsamplers.256` are those of the stage `upsampler-256`."""

    model_size: str | None = None
    """Fills the sections of the parts, and of CLIP, from the table of sizes: demo, small, base or dalle2."""
    resources: UnclipResources = UnclipResources()
    prior: PriorStageConfig = PriorStageConfig()
    decoder: DecoderStageConfig = DecoderStageConfig()
    upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
    """One for each upsampler, by the resolution of its images, the smallest first. It takes the images of the one before, the
    first those of the decoder. "none" in the place of a section leaves it out."""
    evaluate: UnclipEvaluateConfig = UnclipEvaluateConfig()

    def __post_init__(self) -> None:
        for name in self.resources.upsamplers:
            if name not in self.upsamplers:
                there_are = nearest(name, self.upsamplers) if self.upsamplers else "There is none."
                raise ConfigError(f"resources.upsamplers.{name}: no such upsampler. {there_are}")


def unclip(bind: Binder) -> Any:
    """Compose the DAG."""
    data = dataset(bind)
    prior = bind(train(PRIOR), data.snapshot, data.clip)
    decoder = bind(train(DECODER), data.snapshot, data.clip)
    upsamplers = bind.each(train(UPSAMPLER), data.snapshot)
    return finish(bind, data, data.clip, prior, decoder, *upsamplers)


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sections of a model size, and the resolutions that follow from each other.

    Raises:
        ConfigError: an unknown model size, or resolutions that do not follow from each other; names the setting.
    """
    return _with_resolutions(_with_model_size(values))


def _with_model_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over those of the model size that they name; without one, over an upsampler to 256 pixels.

    An empty section of upsamplers leaves out all.
    """
    name = values.get("model_size")
    if name in (None, "none"):
        return _over({"upsamplers": {"256": {}}}, values)
    if name not in MODEL_SIZES:
        raise ConfigError(f"model_size: got {name!r}. {nearest(str(name), MODEL_SIZES)}")
    prior = values.get("prior")
    kind = prior.get("kind", "diffusion") if isinstance(prior, Mapping) else "diffusion"
    return _over(MODEL_SIZES[name].sections(kind), values)


def _over(sections: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = config.merge(sections, values)
    return {**merged, "upsamplers": {}} if values.get("upsamplers") == {} else merged


def _with_resolutions(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with upsamplers in the order of their resolutions, and the resolutions that sections do not give.

    An upsampler's name is the resolution of its images, and it is given those of the one before; images are stored large
    enough for the last of them.
    """
    sections, decoder_section, stored = values.get("upsamplers"), values.get("decoder", {}), values.get("download", {})
    if not (isinstance(sections, Mapping) and isinstance(decoder_section, Mapping) and isinstance(stored, Mapping)):
        return dict(values)  # for `config.load` to judge
    sections = {name: section for name, section in sections.items() if section != "none"}
    for name in sections:
        is_size = bool(re.fullmatch(r"[1-9]\d*", name))
        require(is_size, f"upsamplers.{name}", name, "the resolution of its images, as in upsamplers.256")
    decoder = config.load(DecoderStageConfig, decoder_section, "decoder").model
    size, maker = decoder.unet.image_size, "the decoder"
    sized: dict[str, Any] = {}
    sampling = to_dict(SamplingConfig())["upsamplers"]
    for name in sorted(sections, key=int):
        section, expected = sections[name], f"a multiple of {size}, the resolution of the images of {maker}"
        require(int(name) > size and int(name) % size == 0, f"upsamplers.{name}", int(name), expected)
        derived = {"low_res_size": size, "scale": int(name) // size}
        if isinstance(section, Mapping) and isinstance(model := section.get("model", {}), Mapping):
            for setting, value in derived.items():
                given = model.get(setting, value)
                expected = f"{value}, as {maker} makes {size} pixels and this one {name}"
                require(given == value, f"upsamplers.{name}.model.{setting}", given, expected)
            section = config.merge({"model": derived}, section)
        sampling[name] = to_dict(SamplingConfig().upsampler(int(name), is_first=not sized))
        sized[name] = section
        size, maker = int(name), f"upsampler-{name}"
    stored = {"image_size": max(size, DownloadConfig.image_size), **stored}
    image_size = config.load(DownloadConfig, stored, "download").image_size
    expected = f"at least {size}, the resolution of the images of {maker}, which trains on them"
    require(image_size >= size, "download.image_size", image_size, expected)
    resolved = {**values, "upsamplers": sized, "download": stored}
    return config.merge({"evaluate": {"sampling": {"upsamplers": sampling}}}, resolved)


PIPELINE = Pipeline(UnclipConfig, unclip, resolve)
