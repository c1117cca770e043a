"""The commands that draw with the published stack: from captions, and from pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import STORAGE
from tasks.store import DEFAULT_ROOT
from unclip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.systems.unclip.stack import SamplingConfig, Stack

SAMPLERS = ("ddpm", "ddim", "dpm_solver_pp_2m", "heun")  # those of unclip.samplers, whose import takes a second


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What all drawing commands are told."""

    seed: int
    steps: int | None
    guidance_scale: float | None
    out: str
    each: str | None
    model: str | None
    storage: str | None
    sampler: str | None = None
    prior_guidance_scale: float | None = None

    def check(self) -> None:
        """Raise `InputError` for what is wrong without a look at the stack."""
        if not Path(self.out).resolve().parent.is_dir():
            raise InputError(
                f"--out: the folder {Path(self.out).resolve().parent} does not exist. Make it or name another."
            )
        if self.each is not None and Path(self.each).exists() and not Path(self.each).is_dir():
            raise InputError(f"--each: {self.each} is a file, expected a folder. Name another.")

    def open(self) -> "tuple[Stack, SamplingConfig]":
        """The stack, and how it shall draw."""
        from pipelines.published import find_stack

        folder = find_stack(self.storage or DEFAULT_ROOT, self.model)
        from unclip.systems.unclip.stack import Stack

        stack = Stack.load(folder)
        given = {
            "decoder_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "prior_guidance_scale": self.prior_guidance_scale,
            "decoder_sampler": self.sampler,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return stack, dataclasses.replace(stack.sampling, **changes)

    def save(self, images: "Tensor", labels: Sequence[str] | None = None, *, columns: int, num_given: int = 0) -> None:
        """Write pictures [N, 3, S, S] as one grid, and those after the given ones each in a file if that was asked for."""
        from unclip import images as pictures

        Path(self.out).write_bytes(pictures.png(pictures.grid(images, columns=columns, captions=labels)))
        if self.each is not None:
            Path(self.each).mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(pictures.to_uint8(images[num_given:])):
                Path(self.each, f"{number:03d}.png").write_bytes(pictures.png(pixels))
        click.echo(self.out)


def options(out: str, *extra: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Adds the options of a `Drawing`, and those of one command before them."""
    shared = (
        click.option("--seed", default=0, show_default=True, help="The same seed gives the same pictures."),
        click.option("--steps", type=int, help="Sampling steps of the decoder.  [default: as published]"),
        click.option("--guidance-scale", type=float, help="Of the decoder; 1 is off.  [default: as published]"),
        click.option("--out", default=out, show_default=True, help="PNG to write: all pictures in a grid."),
        click.option("--each", metavar="FOLDER", help="Also write every picture as a PNG of its own."),
        click.option("--model", help="Registered model, name or name@alias.  [default: the one in the storage]"),
        STORAGE,
    )

    def add(command: Any) -> Any:
        for option in reversed((*extra, *shared)):
            command = option(command)
        return command

    return add


def number(default: int, what: str) -> Callable[[Any], Any]:
    return click.option("--num", default=default, show_default=True, help=f"How many {what}.")


SAMPLER = click.option("--sampler", type=click.Choice(SAMPLERS), help="Of the decoder.  [default: as published]")
NOISE = click.option(
    "--noise",
    type=click.Choice(("inverted", "fixed")),
    default="inverted",
    show_default=True,
    help="Start from the noise that the pictures come from, or from noise of the seed.",
)
PICTURE = click.argument("picture")


@click.command()
@click.argument("caption")
@options(
    "samples.png",
    number(8, "pictures"),
    click.option("--prior-guidance-scale", type=float, help="Of the prior; 1 is off.  [default: as published]"),
    SAMPLER,
)
def sample(caption: str, num: int, **given: Any) -> None:
    """Draw pictures of a caption with the published stack."""
    drawing = Drawing(**given)
    _check_num(num)
    _check_caption(caption)
    drawing.check()
    stack, sampling = drawing.open()
    with click.progressbar(length=num, label="drawing") as bar:
        images = stack.text2image([caption] * num, seed=drawing.seed, sampling=sampling, progress=bar.update)
    drawing.save(images, columns=min(num, 8))


@click.command()
@PICTURE
@options(
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
    drawing = Drawing(**given)
    _check_num(num)
    if eta is not None:
        _check_share(eta, "--eta")
    _check_pictures(picture)
    drawing.check()
    stack, sampling = drawing.open()
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    length = manipulations.num_steps(stack, sampling, num, 0 if eta is None else 1)
    with click.progressbar(length=length, label="drawing") as bar:
        drawn = manipulations.variations(
            stack, image, num, eta=eta, seed=drawing.seed, sampling=sampling, progress=bar.update
        )
    _save_rows(drawing, [image], drawn, ["given"] + [""] * num)


@click.command()
@click.argument("first")
@click.argument("second")
@options("interpolation.png", number(7, "pictures, the two ends included"), NOISE)
def interpolate(first: str, second: str, num: int, noise: Any, **given: Any) -> None:
    """Draw pictures on the way from picture FIRST to picture SECOND.

    Of a picture that is not square its middle is taken; any size will do.
    """
    drawing = Drawing(**given)
    _check_num(num, least=2)
    _check_pictures(first, second)
    drawing.check()
    stack, sampling = drawing.open()
    one, other = _read(stack, first, second)
    from unclip.systems.unclip import manipulations

    thetas = [index / (num - 1) for index in range(num)]
    length = manipulations.num_steps(stack, sampling, num, 2 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="drawing") as bar:
        drawn = manipulations.interpolate(
            stack, one, other, thetas, noise=noise, seed=drawing.seed, sampling=sampling, progress=bar.update
        )
    _save_rows(drawing, [one], drawn, ["first", *_percent(thetas), "second"], after=[other])


@click.command()
@PICTURE
@click.argument("caption")
@options(
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
    drawing = Drawing(**given)
    _check_num(num, least=2)
    _check_caption(caption)
    _check_share(theta, "--theta")
    _check_pictures(picture)
    drawing.check()
    stack, sampling = drawing.open()
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    thetas = [theta * index / (num - 1) for index in range(num)]
    length = manipulations.num_steps(stack, sampling, num, 1 if noise == "inverted" else 0)
    with click.progressbar(length=length, label="drawing") as bar:
        drawn = manipulations.text_diff(
            stack,
            image,
            [caption],
            [base_caption],
            thetas,
            noise=noise,
            seed=drawing.seed,
            sampling=sampling,
            progress=bar.update,
        )
    _save_rows(drawing, [image], drawn, ["given", *_percent(thetas)])


@click.command()
@PICTURE
@options(
    "probe.png",
    click.option("--components", help="Numbers of components, such as 1,4,16.  [default: all, a half, a quarter, ...]"),
)
def probe(picture: str, components: str | None, **given: Any) -> None:
    """Draw what the leading principal components of PICTURE's CLIP embedding hold.

    Of a picture that is not square its middle is taken; any size will do.
    """
    drawing = Drawing(**given)
    _check_pictures(picture)
    numbers = None if components is None else _numbers(components)
    drawing.check()
    stack, sampling = drawing.open()
    [image] = _read(stack, picture)
    from unclip.systems.unclip import manipulations

    if numbers is None:
        width = stack.clip.embedding_dim
        numbers = [width >> shift for shift in range(width.bit_length())][::-1][-8:]
    with click.progressbar(length=manipulations.num_steps(stack, sampling, len(numbers)), label="drawing") as bar:
        drawn = manipulations.probe(stack, image, numbers, seed=drawing.seed, sampling=sampling, progress=bar.update)
    _save_rows(drawing, [image], drawn, ["given", *map(str, numbers)])


@click.command()
@PICTURE
@click.argument("mask")
@click.argument("caption")
@options("inpainted.png", number(6, "pictures"), SAMPLER)
def inpaint(picture: str, mask: str, caption: str, num: int, **given: Any) -> None:
    """Repaint the part of PICTURE that is white in the picture MASK, so that the whole is what CAPTION says.

    The two have the same size. All other pixels stay as they are. Of a picture that is not square its middle is taken; any
    size will do.
    """
    drawing = Drawing(**given)
    _check_num(num)
    _check_caption(caption)
    _check_pictures(picture, mask)
    drawing.check()
    stack, sampling = drawing.open()
    image, white = _read(stack, picture, mask, same_size=True)
    from unclip.systems.unclip import manipulations

    known = white.mean(dim=1, keepdim=True) < 0  # [1, 1, S, S]
    if known.all():
        raise InputError(f"{mask}: nothing in it is white, so there is nothing to repaint. Paint that part white.")
    with click.progressbar(length=manipulations.num_steps(stack, sampling, num), label="drawing") as bar:
        drawn = manipulations.inpaint(
            stack,
            image.expand(num, -1, -1, -1),
            known.expand(num, -1, -1, -1),
            [caption] * num,
            seed=drawing.seed,
            sampling=sampling,
            progress=bar.update,
        )
    _save_rows(drawing, [image, image.where(known, image.new_tensor(0.5))], drawn[None], ["given", "kept"] + [""] * num)


COMMANDS = (sample, vary, interpolate, edit, probe, inpaint)


def _check_num(num: int, least: int = 1) -> None:
    if num < least:
        raise InputError(f"--num: got {num}, expected at least {least}.")


def _check_pictures(*paths: str) -> None:
    from tasks.untrusted import given as given_pictures

    given_pictures.check(*paths)


def _check_caption(caption: str) -> None:
    if not caption.strip():
        raise InputError("caption: got nothing, expected a description of the picture.")


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
    import torch

    from tasks.untrusted import given as given_pictures

    found = given_pictures.read(paths, stack.image_size)
    for path, picture in zip(paths, found, strict=True):
        if same_size and (picture.width, picture.height) != (found[0].width, found[0].height):
            raise InputError(
                f"{path}: got {picture.width} x {picture.height} pixels, expected {found[0].width} x {found[0].height} as in "
                f"{paths[0]}. Paint the mask on a copy of the picture."
            )
    return [torch.tensor(picture.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in found]


def _save_rows(
    drawing: Drawing, before: "list[Tensor]", drawn: "Tensor", labels: Sequence[str], after: "Sequence[Tensor]" = ()
) -> None:
    """A row of pictures [1, N, 3, S, S], between those that were given."""
    import torch

    images = torch.cat([*before, drawn[0], *after])
    drawing.save(images, labels, columns=min(len(images), 10), num_given=len(before))
