"""The upsampler as a part, and chains of upsamplers; shared by all systems that enlarge images by diffusion.

Letters: B batch, s resolution of a system's small images, S resolution of the last upsampler's.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unclip.config import added, load, merge, nearest, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.process import augment_condition
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import Known, require_preview_sampler
from unclip.downscaling import shrink
from unclip.errors import CheckpointError, ConfigError, ShapeError
from unclip.models.degradations import DegradationConfig, degrade, draw_blur
from unclip.models.upsampler import Upsampler, UpsamplerConfig, UpsamplerSampling
from unclip.systems.classes import NO_CLASSES, Classes, ClassesConfig, find_classes, reads_classes
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.system import check_batch_size
from unclip.training.batches import load_images
from unclip.training.diffusion_loss import DiffusionLoss, device_of, measure_scores
from unclip.training.memory import Network, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.precision import Precision, autocast
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class UpsamplerStageConfig:
    model: UpsamplerConfig = UpsamplerConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    preview: UpsamplerSampling = operational(UpsamplerSampling())
    """Sampling settings of the previews."""
    classes: ClassesConfig = added(ClassesConfig())
    """Classes of the captions, for cascades that read them; filled in from the section `classes` of the run."""

    def __post_init__(self) -> None:
        require_preview_sampler(self.preview)


class CroppedConfig(Protocol):
    """Settings of an upsampler that is trained on crops: those of `UpsamplerConfig` with these names."""

    @property
    def unet(self) -> Any: ...
    @property
    def low_res_size(self) -> int: ...
    @property
    def scale(self) -> int: ...
    @property
    def degradation(self) -> DegradationConfig: ...
    @property
    def output_size(self) -> int: ...
    @property
    def name(self) -> str: ...


class ChainedUpsampler(Protocol):
    """Upsampler of any kind, as a system applies it."""

    @property
    def config(self) -> CroppedConfig: ...

    @property
    def sample(self) -> Callable[..., Tensor]:
        """Samples enlarged images, as `Upsampler.sample` does, given the system's conditions by keyword."""


class UpsamplerObjective:
    """Diffusion loss of image crops, given the same crops at low resolution, and their classes if there are any."""

    columns = ("jpg",)

    def __init__(
        self,
        config: UpsamplerConfig,
        preview: Batch,
        preview_sampling: UpsamplerSampling = UpsamplerStageConfig.preview,
        classes: Classes = NO_CLASSES,
    ) -> None:
        self.config, self.classes = config, classes
        self.model: Upsampler = Upsampler(config, len(classes)).to(memory_format=torch.channels_last)
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling

    def prepare(self, batch: Batch) -> Tensors:
        tensors = {"images": load_images(batch["jpg"], self.config.output_size)}  # [B, 3, S, S]
        return {**tensors, "label": self.classes.labels(batch["caption"])} if len(self.classes) else tensors

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, low_res, blur_sigma = self._crops(tensors["images"], generator)
        level = None
        if self.config.max_noise_level > 0:
            levels = (0, self.config.max_noise_level)
            low_res, level = augment_condition(self.model.diffusion, low_res, levels, generator)
        draw = self.process.draw(x0, generator, network.training)
        conditions = {"blur_sigma": blur_sigma, "label": tensors.get("label")}
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, low_res, level, **conditions), x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then their low-resolution versions upsampled."""
        generator = torch.Generator(device_of(model)).manual_seed(0)
        tensors = {name: value.to(device_of(model)) for name, value in self._preview.items()}
        low_res = shrink(tensors["images"], self.config.low_res_size)
        settings, label = self._preview_sampling, tensors.get("label")
        samples = model.sample(low_res, settings, label=label, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview["images"], samples.cpu()])

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        """Mean squared score, with low-resolution images degraded as in training but not noised."""
        x0, low_res, blur_sigma = self._crops(tensors["images"], generator)
        conditions = {"blur_sigma": blur_sigma, "label": tensors.get("label")}
        return measure_scores(self.model.diffusion, lambda x_t, t: model(x_t, t, low_res, **conditions), x0, generator)

    def facts(self) -> dict[str, Any]:
        facts = {"kind": "upsampler", "config": to_dict(self.config)}
        return {**facts, "classes": list(self.classes.names)} if len(self.classes) else facts

    def _crops(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random crops and their low-resolution versions, and the strength of their blur [B] for networks that read it."""
        blur_sigma = draw_blur(len(images), self.config.degradation, generator) if self.config.reads_blur else None
        return *random_crops(images, self.config, generator, blur_sigma), blur_sigma


def random_crops(
    images: Tensor, config: CroppedConfig, generator: torch.Generator, blur_sigma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Crop each image and its degraded low-resolution version at random.

    Whole images are degraded before cropping, so that the edges of a crop look as they do in a whole image.

    Args:
        images: [B, 3, S, S] in [-1, 1].
        blur_sigma: [B], strength of the blur; None draws it, if the degradation blurs.

    Returns:
        Crops [B, 3, c, c], c the size that the network trains on, and [B, 3, c / scale, c / scale].
    """
    scale, crop = config.scale, config.unet.image_size // config.scale
    low_res = degrade(images, config.low_res_size, config.degradation, generator, blur_sigma)
    offsets = torch.randint(
        config.low_res_size - crop + 1, (2, len(images)), generator=generator, device=images.device
    ).tolist()
    corners = list(zip(*offsets, strict=True))
    high = [
        image[:, scale * y : scale * (y + crop), scale * x : scale * (x + crop)]
        for image, (y, x) in zip(images, corners, strict=True)
    ]
    low = [image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(low_res, corners, strict=True)]
    return torch.stack(high), torch.stack(low)


def _network(config: UpsamplerStageConfig, _: Shapes) -> Network:
    model = config.model
    size = model.unet.image_size

    def inputs(batch: int) -> tuple[Any, ...]:
        small = example_images(batch, size // model.scale)
        return example_images(batch, size), example_indices(batch), small, example_indices(batch)

    return Network(lambda: Upsampler(model, config.classes.expected_number), inputs)


def _objective(config: UpsamplerStageConfig, inputs: TrainingInputs) -> UpsamplerObjective:
    classes = find_classes(config.classes, inputs)
    return UpsamplerObjective(config.model, inputs.preview_rows(), config.preview, classes)


def _build(facts: Mapping[str, Any]) -> Upsampler:
    classes = Classes(facts.get("classes", ()))
    model = Upsampler(load(UpsamplerConfig, facts["config"]), len(classes))
    model.class_names = classes.names
    return model


UPSAMPLER = Part(
    name="upsampler",
    help="Train an upsampler: from small images to large ones.",
    config=UpsamplerStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda config: reads_classes(config.classes),
    network=_network,
    needs=(),
    shows_rows=True,
    version=1,
)

FIRST_UPSAMPLER = UpsamplerSampling(num_steps=27)
"""Default of the first upsampler; the others use 15 steps. Source: Ramesh et al. 2022, Table 3."""


@dataclasses.dataclass(frozen=True)
class UpsampledSampling:
    """Sampling settings of a system with upsamplers; the system adds a section for each of its other parts."""

    upsamplers: dict[str, UpsamplerSampling] = dataclasses.field(default_factory=dict)
    """Settings of each upsampler, by the resolution of its images."""
    batch_size: int = 64
    """Captions sampled together."""
    precision: Precision = "auto"
    """Precision of the networks of pixels."""
    pad_batches: bool = added(False)
    """Fill every batch up to `batch_size`. Then an image sampled from a caption depends on its caption, seed and settings alone,
    bit for bit; in batches of different sizes matrix products round differently."""

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    def upsampler(self, resolution: int, is_first: bool) -> UpsamplerSampling:
        """Settings of the upsampler that outputs this resolution."""
        default = FIRST_UPSAMPLER if is_first else UpsamplerSampling()
        return self.upsamplers.get(str(resolution), default)


class UpsampledSystem(nn.Module, abc.ABC):
    """Small images, and any number of upsamplers, each for the images of the one before."""

    small_size: int
    """s, pixels."""
    upsamplers: Sequence[ChainedUpsampler]
    sampling: Any
    """Default sampling settings, a subclass of `UpsampledSampling`."""

    def __init__(self, small_size: int, source: str, upsamplers: Sequence[ChainedUpsampler]) -> None:
        """Args:
            source: name of the part that samples the small images.

        Raises:
            CheckpointError: an upsampler was trained for a resolution other than it gets here.
        """
        super().__init__()
        resolution = small_size
        for upsampler in upsamplers:
            trained_for = upsampler.config.low_res_size
            if trained_for != resolution:
                raise CheckpointError(
                    f"{upsampler.config.name}: got images of {resolution} pixels from {source}, expected the {trained_for} "
                    "pixels that it was trained for. Take models from the same stack."
                )
            resolution, source = upsampler.config.output_size, upsampler.config.name
        self.small_size = small_size
        self.upsamplers = nn.ModuleList(upsamplers)  # type: ignore[assignment,arg-type]

    @property
    def image_size(self) -> int:
        """S, resolution of the system's images, pixels."""
        return (self.small_size, *self.upsampled_sizes)[-1]

    @property
    def upsampled_sizes(self) -> list[int]:
        """Resolution of each upsampler's images, pixels."""
        return [upsampler.config.output_size for upsampler in self.upsamplers]

    @property
    def device(self) -> torch.device:
        return device_of(self)

    @abc.abstractmethod
    def small_steps(self, sampling: Any) -> int:
        """Sampling steps of the network of small images."""

    def upsampler_conditions(self, captions: Sequence[str]) -> Mapping[str, Any]:
        """Conditions of the upsamplers, from captions: name in their `sample` -> value; none for upsamplers that read none."""
        return {}

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        sampling: Any,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample one image for each caption, [len(captions), 3, S, S] in [-1, 1].

        Args:
            negative: captions to guide away from.
            start: [B, 3, S, S], images to start from, shrunk to the small resolution and noised by the strength of the settings.
            on_step: hook of the network of small images and of the upsamplers, called after every step.

        Raises:
            ConfigError: there are settings for an upsampler that the system does not have.
            InputError: there are negative captions, but no part that reads captions is guided.
            ShapeError: start or negative does not match the captions.
        """
        self.check_sampling(sampling)
        if start is not None:
            start = self.small_start(start, len(captions))
        low_res = self.sample_small(captions, sampling, generator, negative=negative, start=start, on_step=on_step)
        hooks = [on_step] * len(self.upsamplers)
        return self.upsample(
            low_res, sampling, generator, on_step=hooks, conditions=self.upsampler_conditions(captions)
        )

    @abc.abstractmethod
    def sample_small(
        self,
        captions: Sequence[str],
        sampling: Any,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample small images, [len(captions), 3, s, s] in [-1, 1].

        Args:
            negative: captions to guide away from.
            start: [B, 3, s, s], images to start from.
            known: [B, 4, s, s] from `known_region`; None if nothing is known.
            on_step: hook of the network of small images, called after every step.
        """

    def upsample(
        self,
        low_res: Tensor,
        sampling: UpsampledSampling,
        generator: torch.Generator,
        x_T: Sequence[Tensor] | None = None,
        on_step: Sequence[OnStep] | None = None,
        known: Sequence[Known] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Apply the upsamplers one after the other.

        Args:
            low_res: [B, 3, s, s] in [-1, 1].
            x_T: initial noise of each upsampler, shaped like its images; None draws it from the generator.
            on_step: hook of each upsampler, called after every step; None for no hooks.
            known: known pixels of each upsampler's images; None if nothing is known.
            conditions: of upsamplers that read some, from `upsampler_conditions`.

        Returns:
            [B, 3, S, S] in [-1, 1].
        """
        noises: Sequence[Tensor | None] = x_T or [None] * len(self.upsamplers)
        hooks = on_step or [undisturbed] * len(self.upsamplers)
        parts: Sequence[Known | None] = known or [None] * len(self.upsamplers)
        with autocast(sampling.precision, self.device):
            for upsampler, settings, noise, hook, part in zip(
                self.upsamplers, self.upsampler_sampling(sampling), noises, hooks, parts, strict=True
            ):
                low_res = upsampler.sample(
                    low_res, settings, known=part, x_T=noise, generator=generator, on_step=hook, **conditions or {}
                )
        return low_res

    def upsampler_sampling(self, sampling: UpsampledSampling) -> list[UpsamplerSampling]:
        """Sampling settings of each upsampler."""
        return [sampling.upsampler(size, index == 0) for index, size in enumerate(self.upsampled_sizes)]

    def check_sampling(self, sampling: UpsampledSampling) -> None:
        """Raises:
        ConfigError: there are settings for an upsampler that the system does not have.
        """
        sizes = [str(size) for size in self.upsampled_sizes]
        for name in sampling.upsamplers:
            expected = f"an upsampler of the stack: {', '.join(sizes) or 'it has none'}"
            require(name in sizes, f"upsamplers.{name}", name, expected)

    def small_start(self, start: Tensor, num_captions: int) -> Tensor:
        """Shrink images to start from to the small resolution, on the system's device.

        Args:
            start: [num_captions, 3, S, S] in [-1, 1].

        Raises:
            ShapeError: they have another shape.
        """
        expected = (num_captions, 3, self.image_size, self.image_size)
        if tuple(start.shape) != expected:
            raise ShapeError(f"sample: got start images {tuple(start.shape)}, expected {expected}.")
        return shrink(start.to(self.device), self.small_size)


class Chain(NamedTuple):
    """Sections of upsamplers, lowest resolution first, with the resolutions that follow from their names."""

    sections: dict[str, Any]
    """Output resolution -> section."""
    sampling: dict[str, Any]
    """Output resolution -> default sampling settings."""
    size: int
    """Resolution of the last part's images."""
    last: str
    """Name of the last part."""


def chained(sections: Mapping[str, Any], size: int, source: str, sampling: UpsampledSampling | None = None) -> Chain:
    """Sort sections of upsamplers by resolution, and fill in the resolutions that follow from their names.

    An upsampler is named after its output resolution; its input resolution is the output of the part before.

    Args:
        sections: output resolution -> section of a run file; "none" removes an upsampler.
        size: resolution of the small images.
        source: name of the part that samples them, as in "the decoder".
        sampling: sampling settings of the system, which give the defaults of each upsampler's; None for those of the class.

    Raises:
        ConfigError: the resolutions are inconsistent; names the setting.
    """
    sections = {name: section for name, section in sections.items() if section != "none"}
    for name in sections:
        is_size = bool(re.fullmatch(r"[1-9]\d*", name))
        require(is_size, f"upsamplers.{name}", name, "its output resolution, as in upsamplers.256")
    sized: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for name in sorted(sections, key=int):
        section, expected = sections[name], f"a multiple of {size}, the output resolution of {source}"
        require(int(name) > size and int(name) % size == 0, f"upsamplers.{name}", int(name), expected)
        derived = {"low_res_size": size, "scale": int(name) // size}
        if isinstance(section, Mapping) and isinstance(model := section.get("model", {}), Mapping):
            for setting, value in derived.items():
                given = model.get(setting, value)
                expected = f"{value}, since {source} outputs {size} pixels and this upsampler {name}"
                require(given == value, f"upsamplers.{name}.model.{setting}", given, expected)
            section = merge({"model": derived}, section)
        defaults[name] = to_dict((sampling or UpsampledSampling()).upsampler(int(name), is_first=not sized))
        sized[name] = section
        size, source = int(name), f"upsampler-{name}"
    return Chain(sized, defaults, size, source)


def merge_over(sections: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings of a run file over others, those of a model size.

    "none" removes an upsampler, and an empty section all of them; their sampling settings go with them.
    """
    merged = merge(sections, values)
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


def check_sections(
    upsamplers: Mapping[str, UpsamplerStageConfig],
    sampling: UpsampledSampling,
    resources: Mapping[str, Any],
    classes: ClassesConfig,
) -> None:
    """Check the sampling settings and the resources of upsamplers against their models, before these are trained.

    Args:
        classes: classes that the system gives to upsamplers that read them.

    Raises:
        ConfigError: they are for an upsampler that does not exist, or ask for what it does not learn; or an upsampler reads
            other classes.
    """
    for name, stage in upsamplers.items():
        expected = "none, since this system has no classes" if classes.source == "none" else f"none or {classes.source}"
        is_given = stage.classes in (ClassesConfig(), classes)
        require(is_given, f"upsamplers.{name}.classes", stage.classes.source, expected)
    check_names(upsamplers, sampling, resources)
    for name, settings in sampling.upsamplers.items():
        setting = f"evaluate.sampling.upsamplers.{name}"
        model = upsamplers[name].model
        strongest = model.degradation.max_blur_sigma if model.reads_blur else 0
        expected = f"at most {strongest:g}, the strongest blur that its network reads"
        require(settings.blur_sigma <= strongest, f"{setting}.blur_sigma", settings.blur_sigma, expected)


def check_names(upsamplers: Mapping[str, Any], sampling: UpsampledSampling, resources: Mapping[str, Any]) -> None:
    """Check that the sampling settings and the resources of upsamplers of any kind are for upsamplers that there are, and that
    their noise levels were trained.

    Raises:
        ConfigError: they are not; names the setting.
    """
    for section, names in (("resources", resources), ("evaluate.sampling", sampling.upsamplers)):
        for name in names:
            if name not in upsamplers:
                remedy = nearest(name, upsamplers) if upsamplers else "There are no upsamplers."
                raise ConfigError(f"{section}.upsamplers.{name}: no such upsampler. {remedy}")
    for name, settings in sampling.upsamplers.items():
        setting = f"evaluate.sampling.upsamplers.{name}.noise_level"
        most, level = upsamplers[name].model.max_noise_level, settings.noise_level
        require(level <= most, setting, level, f"at most {most}, the max_noise_level of its training")


def section_of(config: Any) -> dict[str, Any]:
    """Section of a run file for an upsampler, without the sizes that follow from the chain of resolutions."""
    section = to_dict(config)
    for name in ("low_res_size", "scale"):
        del section["model"][name]
    return section
