"""Systems without text: a denoiser of small images, a classifier that guides it if there is one, and upsamplers.

Letters: B batch, S resolution of the system's images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from unclip.diffusion.guidance import LogProbability
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.models.classifier import Classifier, log_probability
from unclip.models.image_denoiser import ImageDenoiser, ImageDenoiserSampling
from unclip.models.small_images import known_part
from unclip.models.upsampler import Upsampler
from unclip.systems.classes import Classes
from unclip.systems.classifier import CLASSIFIER
from unclip.systems.denoiser import DENOISER
from unclip.systems.system import StackFiles, load_model, sampling_of
from unclip.systems.upsampler import UPSAMPLER, UpsampledSampling, UpsampledSystem
from unclip.training.precision import autocast

PARTS = (DENOISER, CLASSIFIER, UPSAMPLER)
SHORTCUTS = {
    "steps": "denoiser.num_steps",
    "sampler": "denoiser.sampler",
    "eta": "denoiser.eta",
}
"""Options of `unclip sample` -> sampling settings."""


@dataclasses.dataclass(frozen=True)
class ImageStackSampling(UpsampledSampling):
    denoiser: ImageDenoiserSampling = ImageDenoiserSampling()
    """Settings of the denoiser, and of the classifier that guides it."""


class ImageStack(UpsampledSystem):
    """A denoiser, a classifier or none, and any number of upsamplers, each for the images of the one before.

    It samples images of the captions' classes. A caption without a class gives an image of no particular class; without
    classes, captions do not count.
    """

    def __init__(
        self, denoiser: ImageDenoiser, classifier: Classifier | None = None, upsamplers: Sequence[Upsampler] = ()
    ) -> None:
        """Raises:
        CheckpointError: the networks have different classes or noising processes, or resolutions that do not follow each
            other.
        """
        super().__init__(denoiser.config.unet.image_size, "the denoiser", upsamplers)
        if classifier is not None:
            _check_agreement(denoiser, classifier)
        for upsampler in upsamplers:
            if upsampler.num_classes and upsampler.class_names != denoiser.class_names:
                raise CheckpointError(
                    f"{upsampler.config.name}: got {upsampler.num_classes} classes, expected the {denoiser.num_classes} classes "
                    "of the denoiser. Take models from one stack."
                )
        self.denoiser, self.classifier = denoiser, classifier
        self.classes = Classes(denoiser.class_names)
        self.sampling = ImageStackSampling()

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
        stack.sampling = sampling_of(files, ImageStackSampling)
        return stack

    def check_captions(self, captions: Sequence[str]) -> None:
        """Check that captions belong to classes, if there are any; see `system.ChecksCaptions`."""
        self.classes.check(captions)

    def small_steps(self, sampling: ImageStackSampling) -> int:
        return sampling.denoiser.num_steps

    def upsampler_conditions(self, captions: Sequence[str]) -> Mapping[str, Any]:
        return {"label": self.labels(captions)}

    def labels(self, captions: Sequence[str]) -> Tensor | None:
        """Classes of the captions, [B] int64; None without classes."""
        return self.classes.labels(captions).to(self.device) if len(self.classes) else None

    @torch.no_grad()
    def sample_small(
        self,
        captions: Sequence[str],
        sampling: ImageStackSampling,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample small images [B, 3, s, s]; this system reads neither negative captions nor images to start from.

        Args:
            known: [B, 4, s, s] from `known_region`; pixels to return unchanged.

        Raises:
            ConfigError: the settings guide by a classifier that there is not.
        """
        if negative is not None:
            raise InputError("sample: got negative captions, expected none: this system reads classes only.")
        if start is not None:
            raise InputError("sample: got images to start from, expected none: this system reads classes only.")
        label = self.labels(captions)  # [B]
        target = self._log_probability(label) if sampling.denoiser.classifier_scale else None
        with autocast(sampling.precision, self.device):
            return self.denoiser.sample(
                len(captions),
                label,
                sampling.denoiser,
                target,
                known=None if known is None else known_part(known),
                generator=generator,
                on_step=on_step,
            )

    def _log_probability(self, label: Tensor | None) -> LogProbability:
        """Log probability of the labels by the classifier; 0 for images without a class."""
        if self.classifier is None or label is None:
            raise ConfigError("denoiser.classifier_scale: expected 0, as this stack has no classifier.")
        has_class = label < len(self.classes)  # [B]
        of_class = log_probability(self.classifier, label.clamp(max=len(self.classes) - 1))
        return lambda x_t, t: of_class(x_t, t) * has_class


def _check_agreement(denoiser: ImageDenoiser, classifier: Classifier) -> None:
    processes = [each.config.diffusion.noising for each in (classifier, denoiser)]
    if denoiser.class_names != classifier.class_names or processes[0] != processes[1]:
        raise CheckpointError(
            f"classifier: got {len(classifier.class_names)} classes and the process {processes[0]}, expected the "
            f"{len(denoiser.class_names)} classes and the process {processes[1]} of the denoiser. Take models from one stack."
        )
