"""Commands that start from images: variations, interpolation, edits, probes and inpainting."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import NUMBER
from pipelines.sampling import ETA, NEGATIVE, SAMPLER, Request, check_caption, check_num, num_option, sampling_options
from unclip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.systems.inpainting import UpsampledSystem
    from unclip.systems.unclip.sampling import SamplingConfig
    from unclip.systems.unclip.stack import Stack

NOISE = click.option(
    "--noise",
    type=click.Choice(("inverted", "fixed")),
    default="inverted",
    show_default=True,
    help="Initial noise: obtained by inverting the images, or drawn from the seed.",
)
IMAGE = click.argument("path", metavar="IMAGE")


@click.command()
@IMAGE
@sampling_options(
    "variations.png",
    num_option(7, "variations"),
    click.option(
        "--eta",
        type=NUMBER,
        help="Invert IMAGE, then sample with this much noise, 0 to 1.  [default: start from noise]",
    ),
)
def vary(path: str, num: int, eta: float | None, **given: Any) -> None:
    """Sample variations of IMAGE.

    What the CLIP embedding of IMAGE captures stays, the rest changes. IMAGE may have any size; it is cropped to its central
    square.
    """
    request = Request(**given)
    check_num(num)
    if eta is not None:
        _check_share(eta, "--eta")
    _check_images(path)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, path)
    from unclip.systems.inpainting import num_steps
    from unclip.systems.unclip import manipulations

    length = num_steps(stack, sampling, num, 0 if eta is None else 1)
    with click.progressbar(length=length, label="sampling") as bar:
        samples = manipulations.variations(
            stack, image, num, eta=eta, seed=request.seed, sampling=sampling, progress=bar.update
        )
    _save_row(request, [image], samples, ["given"] + [""] * num)


@click.command()
@click.argument("first")
@click.argument("second")
@sampling_options("interpolation.png", num_option(7, "images, including both ends"), NOISE)
def interpolate(first: str, second: str, num: int, noise: Any, **given: Any) -> None:
    """Sample an interpolation from image FIRST to image SECOND.

    The images may have any size; they are cropped to their central square.
    """
    request = Request(**given)
    check_num(num, least=2)
    _check_images(first, second)
    request.check()
    stack, sampling = _open(request)
    one, other = _read(stack, first, second)
    from unclip.systems.inpainting import num_steps
    from unclip.systems.unclip import manipulations

    thetas = [index / (num - 1) for index in range(num)]
    length = num_steps(stack, sampling, num, 2 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="sampling") as bar:
        samples = manipulations.interpolate(
            stack, one, other, thetas, noise=noise, seed=request.seed, sampling=sampling, progress=bar.update
        )
    _save_row(request, [one], samples, ["first", *_percent(thetas), "second"], after=[other])


@click.command()
@IMAGE
@click.argument("caption")
@sampling_options(
    "edit.png",
    click.option("--from", "base_caption", default="a photo", show_default=True, help="Caption that describes IMAGE."),
    click.option("--theta", default=0.5, show_default=True, help="Strength of the edit, 0 to 1."),
    num_option(6, "images of increasing strength; the first is the reconstruction of IMAGE"),
    NOISE,
)
def edit(path: str, caption: str, base_caption: str, theta: float, num: int, noise: Any, **given: Any) -> None:
    """Edit IMAGE in the direction from one caption to another.

    The edit goes from the caption --from to CAPTION. Word both captions alike, except for the intended change, to keep the
    rest of the image. IMAGE may have any size; it is cropped to its central square.
    """
    request = Request(**given)
    check_num(num, least=2)
    check_caption(caption)
    _check_share(theta, "--theta")
    _check_images(path)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, path)
    from unclip.systems.inpainting import num_steps
    from unclip.systems.unclip import manipulations

    thetas = [theta * index / (num - 1) for index in range(num)]
    length = num_steps(stack, sampling, num, 1 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="sampling") as bar:
        samples = manipulations.text_diff(
            stack,
            image,
            [caption],
            [base_caption],
            thetas,
            noise=noise,
            seed=request.seed,
            sampling=sampling,
            progress=bar.update,
        )
    _save_row(request, [image], samples, ["given", *_percent(thetas)])


@click.command()
@IMAGE
@sampling_options(
    "probe.png",
    click.option("--components", help="Numbers of components, such as 1,4,16.  [default: all, a half, a quarter, ...]"),
)
def probe(path: str, components: str | None, **given: Any) -> None:
    """Show what the principal components of an embedding hold.

    Samples from the leading principal components of IMAGE's CLIP embedding. IMAGE may have any size; it is cropped to its
    central square.
    """
    request = Request(**given)
    _check_images(path)
    numbers = None if components is None else _numbers(components)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, path)
    from unclip.systems.inpainting import num_steps
    from unclip.systems.unclip import manipulations

    if numbers is None:
        width = stack.clip.embedding_dim
        numbers = [width >> shift for shift in range(width.bit_length())][::-1][-8:]
    with click.progressbar(length=num_steps(stack, sampling, len(numbers)), label="sampling") as bar:
        samples = manipulations.probe(stack, image, numbers, seed=request.seed, sampling=sampling, progress=bar.update)
    _save_row(request, [image], samples, ["given", *map(str, numbers)])


@click.command()
@IMAGE
@click.argument("mask")
@click.argument("caption")
@sampling_options("inpainted.png", num_option(6, "images"), SAMPLER, ETA, NEGATIVE)
def inpaint(path: str, mask: str, caption: str, num: int, **given: Any) -> None:
    """Repaint the part of IMAGE that is white in MASK.

    The whole image then matches CAPTION; all other pixels stay unchanged. IMAGE and MASK must have the same size, which
    may be any; they are cropped to their central square.
    """
    request = Request(**given)
    check_num(num)
    check_caption(caption)
    _check_images(path, mask)
    request.check()
    system, sampling = _open_upsampled(request)
    image, white = _read(system, path, mask, same_size=True)
    from unclip.systems.inpainting import inpaint as inpaint_images
    from unclip.systems.inpainting import num_steps

    known = white.mean(dim=1, keepdim=True) < 0  # [1, 1, S, S]
    if known.all():
        raise InputError(f"{mask}: the mask has no white pixels. Paint the part to be repainted white.")
    with click.progressbar(length=num_steps(system, sampling, num), label="sampling") as bar:
        samples = inpaint_images(
            system,
            image.expand(num, -1, -1, -1),
            known.expand(num, -1, -1, -1),
            [caption] * num,
            negative=None if request.negative is None else [request.negative] * num,
            seed=request.seed,
            sampling=sampling,
            progress=bar.update,
        )
    masked = image.where(known, image.new_tensor(0.5))
    _save_row(request, [image, masked], samples[None], ["given", "kept"] + [""] * num)


COMMANDS = (vary, interpolate, edit, probe, inpaint)


def _check_images(*paths: str) -> None:
    from tasks.untrusted import given as given_images

    given_images.check(*paths)


def _open(request: Request) -> "tuple[Stack, SamplingConfig]":
    """Load the published stack, which must be able to invert images.

    Raises:
        InputError: the stack is of another system than unclip.
    """
    system, sampling = request.open()
    from unclip.systems.unclip.stack import Stack

    if not isinstance(system, Stack):
        raise InputError("the published stack cannot start from an image. Publish a stack of the system unclip.")
    return system, sampling


def _open_upsampled(request: Request) -> "tuple[UpsampledSystem, Any]":
    """Load the published stack, which must be able to inpaint.

    Raises:
        InputError: the stack is of a system that cannot.
    """
    system, sampling = request.open()
    from unclip.systems.inpainting import UpsampledSystem

    if not isinstance(system, UpsampledSystem):
        raise InputError(
            "the published stack cannot inpaint. All systems of this package but dalle and parti can: choose another --model or "
            "--storage."
        )
    return system, sampling


def _check_share(value: float, option: str) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{option}: got {value}, expected 0 to 1.")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--components: got {text!r}, expected whole numbers such as 1,4,16.") from None


def _percent(thetas: Sequence[float]) -> list[str]:
    return [f"{theta:.0%}" for theta in thetas]


def _read(system: "UpsampledSystem", *paths: str, same_size: bool = False) -> "list[Tensor]":
    """Read image files as [1, 3, S, S] in [-1, 1], S the resolution of the stack."""
    from tasks.untrusted import given as given_images
    from unclip.imaging import from_uint8

    images = given_images.read(paths, system.image_size)
    for path, image in zip(paths, images, strict=True):
        if same_size and (image.width, image.height) != (images[0].width, images[0].height):
            raise InputError(
                f"{path}: got {image.width} x {image.height} pixels, expected {images[0].width} x {images[0].height} as in "
                f"{paths[0]}. Paint the mask on a copy of the image."
            )
    return [from_uint8(image.pixels[None]) for image in images]


def _save_row(
    request: Request, before: "list[Tensor]", samples: "Tensor", labels: Sequence[str], after: "Sequence[Tensor]" = ()
) -> None:
    """Save samples [1, N, 3, S, S] as one row, between the given images."""
    import torch

    images = torch.cat([*before, samples[0], *after])
    request.save(images, labels, columns=min(len(images), 10), num_given=len(before))
