"""Systems without text: a denoiser of small images, a classifier that guides it if there is one, and upsamplers.

Letters: B batch, s resolution of the denoiser's images, S resolution of the last upsampler's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from unclip.config import require
from unclip.diffusion.guidance import LogProbability
from unclip.errors import CheckpointError, ConfigError
from unclip.models.classifier import Classifier, log_probability
from unclip.models.image_denoiser import ImageDenoiser, ImageDenoiserSampling
from unclip.models.upsampler import Upsampler, UpsamplerSampling
from unclip.systems.classes import Classes
from unclip.systems.classifier import CLASSIFIER
from unclip.systems.denoiser import DENOISER
from unclip.systems.system import StackFiles, load_model, sampling_of
from unclip.systems.upsampler import UPSAMPLER
from unclip.training.precision import Precision, autocast

__all__ = ["PARTS", "SHORTCUTS", "ImageDenoiserSampling", "ImageSamplingConfig", "ImageStack", "UpsamplerSampling"]

PARTS = (DENOISER, CLASSIFIER, UPSAMPLER)
SHORTCUTS = {
    "steps": "denoiser.num_steps",
    "guidance_scale": "denoiser.guidance_scale",
    "sampler": "denoiser.sampler",
    "eta": "denoiser.eta",
}
"""Options of `unclip sample` -> sampling settings."""


@dataclasses.dataclass(frozen=True)
class ImageSamplingConfig:
    denoiser: ImageDenoiserSampling = ImageDenoiserSampling()
    """Settings of the denoiser, and of the classifier that guides it."""
    upsamplers: dict[str, UpsamplerSampling] = dataclasses.field(default_factory=dict)
    """Settings of each upsampler, by the resolution of its images."""
    batch_size: int = 64
    """Captions sampled together."""
    precision: Precision = "auto"
    """Precision of all networks."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


class ImageStack(nn.Module):
    """A denoiser, a classifier or none, and any number of upsamplers, each for the images of the one before."""

    def __init__(
        self, denoiser: ImageDenoiser, classifier: Classifier | None = None, upsamplers: Sequence[Upsampler] = ()
    ) -> None:
        """Raises:
        CheckpointError: the networks have different classes or noising processes, or resolutions that do not follow each
            other.
        """
        super().__init__()
        _check(denoiser, classifier, upsamplers)
        self.denoiser, self.classifier = denoiser, classifier
        self.upsamplers: Sequence[Upsampler] = nn.ModuleList(upsamplers)  # type: ignore[assignment]
        self.classes = Classes(denoiser.class_names)
        self.sampling = ImageSamplingConfig()

    @classmethod
    def load(cls, files: StackFiles) -> Self:
        """Load the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        models = {name: load_model(folder, PARTS) for name, folder in files.models.items()}
        denoiser, classifier = models.pop("denoiser", None), models.pop("classifier", None)
        if not isinstance(denoiser, ImageDenoiser):
            raise CheckpointError(f"stack: got {', '.join(files.models)}, expected a denoiser.")
        stack = cls(denoiser, classifier, list(models.values()))  # type: ignore[arg-type]
        stack.sampling = sampling_of(files, ImageSamplingConfig)
        return stack

    @property
    def image_size(self) -> int:
        """S, resolution of the images, pixels."""
        return (self.denoiser.config.unet.image_size, *(each.config.output_size for each in self.upsamplers))[-1]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def check_captions(self, captions: Sequence[str]) -> None:
        """Check that captions belong to classes, if there are any; see `system.ChecksCaptions`."""
        self.classes.check(captions)

    @torch.no_grad()
    def sample(self, captions: Sequence[str], sampling: ImageSamplingConfig, generator: torch.Generator) -> Tensor:
        """Sample one image of each caption's class, [len(captions), 3, S, S] in [-1, 1].

        A caption without a class gives an image of no particular class. Without classes, captions do not count.

        Raises:
            ConfigError: the settings guide by a classifier that there is not, or are for an upsampler that there is not.
        """
        sizes = [str(each.config.output_size) for each in self.upsamplers]
        for name in sampling.upsamplers:
            expected = f"an upsampler of the stack: {', '.join(sizes) or 'it has none'}"
            require(name in sizes, f"upsamplers.{name}", name, expected)
        label = self.classes.labels(captions).to(self.device) if len(self.classes) else None  # [B]
        with autocast(sampling.precision, self.device):
            images = self.denoiser.sample(
                len(captions),
                label,
                sampling.denoiser,
                self._log_probability(label, sampling.denoiser.classifier_scale),
                generator=generator,
            )
            for upsampler, size in zip(self.upsamplers, sizes, strict=True):
                settings = sampling.upsamplers.get(size, UpsamplerSampling())
                images = upsampler.sample(images, settings, generator=generator)
        return images

    def _log_probability(self, label: Tensor | None, scale: float) -> LogProbability | None:
        """Log probability of the labels by the classifier, 0 for images without a class; None if the scale is 0."""
        if not scale:
            return None
        if self.classifier is None or label is None:
            raise ConfigError(f"denoiser.classifier_scale: got {scale:g}, expected 0 for a stack without a classifier.")
        has_class = label < len(self.classes)  # [B]
        of_class = log_probability(self.classifier, label.clamp(max=len(self.classes) - 1))
        return lambda x_t, t: of_class(x_t, t) * has_class


def _check(denoiser: ImageDenoiser, classifier: Classifier | None, upsamplers: Sequence[Upsampler]) -> None:
    if classifier is not None:
        names = ("num_timesteps", "schedule", "zero_terminal_snr")
        processes = [tuple(getattr(each.config.diffusion, name) for name in names) for each in (denoiser, classifier)]
        if denoiser.class_names != classifier.class_names or processes[0] != processes[1]:
            raise CheckpointError(
                f"classifier: got {len(classifier.class_names)} classes and the process {processes[1]}, expected the "
                f"{len(denoiser.class_names)} classes and the process {processes[0]} of the denoiser. Take models from one stack."
            )
    resolution, source = denoiser.config.unet.image_size, "the denoiser"
    for upsampler in upsamplers:
        if upsampler.config.low_res_size != resolution:
            raise CheckpointError(
                f"{upsampler.config.name}: got images of {resolution} pixels from {source}, expected the "
                f"{upsampler.config.low_res_size} pixels that it was trained for. Take models from the same stack."
            )
        resolution, source = upsampler.config.output_size, upsampler.config.name
