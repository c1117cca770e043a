"""Checks of captions that systems share: negative captions, and the CLIP that reads captions."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from unclip.errors import CheckpointError, InputError, ShapeError
from unclip.models.clip import Clip


@runtime_checkable
class KnowsClip(Protocol):
    """Network that stores what the CLIP of its training made of the empty caption."""

    def knows(self, clip: Clip) -> bool:
        """Return True if this CLIP makes the same of it."""


def check_clip(clip: Clip, models: Mapping[str, nn.Module]) -> None:
    """Check that models were trained with a CLIP.

    Args:
        models: name of the part -> model.

    Raises:
        CheckpointError: this CLIP reads the empty caption in another way; names the first part that differs.
    """
    for name, model in models.items():
        if not all(module.knows(clip) for module in model.modules() if isinstance(module, KnowsClip)):
            raise CheckpointError(
                f"{name}: was trained with a CLIP other than this one, which reads the empty caption differently, so its samples "
                f"would not match captions. Take the CLIP and the {name} from the same stack."
            )


def check_negative(
    negative: Sequence[str], captions: Sequence[str], guidance_scales: Sequence[float], remedy: str
) -> None:
    """Check negative captions.

    Args:
        guidance_scales: those of the parts that read captions.
        remedy: setting that guides one of them.

    Raises:
        InputError: nothing that reads captions is guided, so they would have no effect.
        ShapeError: there are more or fewer than captions.
    """
    if len(negative) != len(captions):
        raise ShapeError(
            f"sample: got {len(negative)} negative captions for {len(captions)} captions, expected the same number."
        )
    if all(scale == 1 for scale in guidance_scales):
        raise InputError(
            f"negative: got {negative[0]!r}, but nothing that reads captions is guided, so it would have no effect. Set "
            f"{remedy} above 1."
        )
