"""The commands that start from images: variations, interpolations, edits, probes, inpainting."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pipelines.sampling import ETA, NEGATIVE, SAMPLER, Request, check_caption, check_num, number, sampling_options
from unclip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.systems.unclip.sampling import SamplingConfig
    from unclip.systems.unclip.stack import Stack

NOISE = click.option(
    "--noise",
    type=click.Choice(("inverted", "fixed")),
    default="inverted",
    show_default=True,
    help="Start from the noise that the pictures come from, or from noise of the seed.",
)
PICTURE = click.argument("picture")


@click.command()
@PICTURE
@sampling_options(
    "variations.png",
    number(7, "variations"),
    click.option(
        "--eta", type=float, help="Start from the picture and add so much noise, 0 to 1.  [default: start anew]"
    ),
)
def vary(picture: str, num: int, eta: float | None, **given: Any) -> None:
    """Draw variations of PICTURE: what CLIP sees in it stays, the rest changes.

    Of a picture that is not square its middle is taken; any size will do.
    """
    request = Request(**given)
    check_num(num)
    if eta is not None:
        _check_share(eta, "--eta")
    _check_pictures(picture)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    length = manipulations.num_steps(stack, sampling, num, 0 if eta is None else 1)
    with click.progressbar(length=length, label="sampling") as bar:
        drawn = manipulations.variations(
            stack, image, num, eta=eta, seed=request.seed, sampling=sampling, progress=bar.update
        )
    _save_rows(request, [image], drawn, ["given"] + [""] * num)


@click.command()
@click.argument("first")
@click.argument("second")
@sampling_options("interpolation.png", number(7, "pictures, the two ends included"), NOISE)
def interpolate(first: str, second: str, num: int, noise: Any, **given: Any) -> None:
    """Draw pictures on the way from picture FIRST to picture SECOND.

    Of a picture that is not square its middle is taken; any size will do.
    """
    request = Request(**given)
    check_num(num, least=2)
    _check_pictures(first, second)
    request.check()
    stack, sampling = _open(request)
    one, other = _read(stack, first, second)
    from unclip.systems.unclip import manipulations

    thetas = [index / (num - 1) for index in range(num)]
    length = manipulations.num_steps(stack, sampling, num, 2 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="sampling") as bar:
        drawn = manipulations.interpolate(
            stack, one, other, thetas, noise=noise, seed=request.seed, sampling=sampling, progress=bar.update
        )
    _save_rows(request, [one], drawn, ["first", *_percent(thetas), "second"], after=[other])


@click.command()
@PICTURE
@click.argument("caption")
@sampling_options(
    "edit.png",
    click.option("--from", "base_caption", default="a photo", show_default=True, help="Says what PICTURE shows."),
    click.option("--theta", default=0.5, show_default=True, help="How far to go, 0 to 1."),
    number(6, "pictures on the way, PICTURE drawn again included"),
    NOISE,
)
def edit(picture: str, caption: str, base_caption: str, theta: float, num: int, noise: Any, **given: Any) -> None:
    """Change PICTURE by words: the way from the caption --from to CAPTION.

    The more alike the two captions are but for what shall change, the more stays as it is. Of a picture that is not square
    its middle is taken; any size will do.
    """
    request = Request(**given)
    check_num(num, least=2)
    check_caption(caption)
    _check_share(theta, "--theta")
    _check_pictures(picture)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    thetas = [theta * index / (num - 1) for index in range(num)]
    length = manipulations.num_steps(stack, sampling, num, 1 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="sampling") as bar:
        drawn = manipulations.text_diff(
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
    _save_rows(request, [image], drawn, ["given", *_percent(thetas)])


@click.command()
@PICTURE
@sampling_options(
    "probe.png",
    click.option("--components", help="Numbers of components, such as 1,4,16.  [default: all, a half, a quarter, ...]"),
)
def probe(picture: str, components: str | None, **given: Any) -> None:
    """Draw what the leading principal components of PICTURE's CLIP embedding hold.

    Of a picture that is not square its middle is taken; any size will do.
    """
    request = Request(**given)
    _check_pictures(picture)
    numbers = None if components is None else _numbers(components)
    request.check()
    stack, sampling = _open(request)
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    if numbers is None:
        width = stack.clip.embedding_dim
        numbers = [width >> shift for shift in range(width.bit_length())][::-1][-8:]
    with click.progressbar(length=manipulations.num_steps(stack, sampling, len(numbers)), label="sampling") as bar:
        drawn = manipulations.probe(stack, image, numbers, seed=request.seed, sampling=sampling, progress=bar.update)
    _save_rows(request, [image], drawn, ["given", *map(str, numbers)])


@click.command()
@PICTURE
@click.argument("mask")
@click.argument("caption")
@sampling_options("inpainted.png", number(6, "pictures"), SAMPLER, ETA, NEGATIVE)
def inpaint(picture: str, mask: str, caption: str, num: int, **given: Any) -> None:
    """Repaint the part of PICTURE that is white in the picture MASK, so that the whole is what CAPTION says.

    The two have the same size. All other pixels stay as they are. Of a picture that is not square its middle is taken; any
    size will do.
    """
    request = Request(**given)
    check_num(num)
    check_caption(caption)
    _check_pictures(picture, mask)
    request.check()
    stack, sampling = _open(request)
    image, white = _read(stack, picture, mask, same_size=True)
    from unclip.systems.unclip import manipulations

    known = white.mean(dim=1, keepdim=True) < 0  # [1, 1, S, S]
    if known.all():
        raise InputError(f"{mask}: nothing in it is white, so there is nothing to repaint. Paint that part white.")
    with click.progressbar(length=manipulations.num_steps(stack, sampling, num), label="sampling") as bar:
        drawn = manipulations.inpaint(
            stack,
            image.expand(num, -1, -1, -1),
            known.expand(num, -1, -1, -1),
            [caption] * num,
            negative=None if request.negative is None else [request.negative] * num,
            seed=request.seed,
            sampling=sampling,
            progress=bar.update,
        )
    _save_rows(request, [image, image.where(known, image.new_tensor(0.5))], drawn[None], ["given", "kept"] + [""] * num)


COMMANDS = (vary, interpolate, edit, probe, inpaint)


def _check_pictures(*paths: str) -> None:
    from tasks.untrusted import given as given_pictures

    given_pictures.check(*paths)


def _open(request: Request) -> "tuple[Stack, SamplingConfig]":
    """The published stack, which must be one that takes images apart.

    Raises:
        InputError: it is of another system.
    """
    system, sampling = request.open()
    from unclip.systems.unclip.stack import Stack

    if not isinstance(system, Stack):
        raise InputError(
            "the published stack reads no images, so it cannot start from one. Publish one of the system unclip."
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


def _read(stack: "Stack", *paths: str, same_size: bool = False) -> "list[Tensor]":
    """Picture files as [1, 3, S, S] in [-1, 1], S as the stack draws."""
    from tasks.untrusted import given as given_pictures
    from unclip.imaging import from_uint8

    found = given_pictures.read(paths, stack.image_size)
    for path, picture in zip(paths, found, strict=True):
        if same_size and (picture.width, picture.height) != (found[0].width, found[0].height):
            raise InputError(
                f"{path}: got {picture.width} x {picture.height} pixels, expected {found[0].width} x {found[0].height} as in "
                f"{paths[0]}. Paint the mask on a copy of the picture."
            )
    return [from_uint8(picture.pixels[None]) for picture in found]


def _save_rows(
    request: Request, before: "list[Tensor]", drawn: "Tensor", labels: Sequence[str], after: "Sequence[Tensor]" = ()
) -> None:
    """A row of pictures [1, N, 3, S, S], between those that were given."""
    import torch

    images = torch.cat([*before, drawn[0], *after])
    request.save(images, labels, columns=min(len(images), 10), num_given=len(before))
