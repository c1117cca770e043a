"""The options of all commands that sample with the published stack, and the stack that they open."""

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

    from unclip.systems.system import System

SAMPLERS = (
    "ddpm",
    "ddim",
    "dpm_solver_pp_2m",
    "heun",
    "analytic_dpm",
)  # those of unclip.diffusion.samplers, whose import takes a second


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of all sampling commands."""

    seed: int
    steps: int | None
    guidance_scale: float | None
    assignments: tuple[str, ...]
    out: str
    each: str | None
    model: str | None
    storage: str | None
    sampler: str | None = None
    eta: float | None = None
    strength: float | None = None
    negative: str | None = None
    image: str | None = None

    def check(self) -> None:
        """Raise `InputError` for what is wrong without a look at the stack."""
        if not Path(self.out).resolve().parent.is_dir():
            raise InputError(
                f"--out: the folder {Path(self.out).resolve().parent} does not exist. Make it or name another."
            )
        if self.each is not None and Path(self.each).exists() and not Path(self.each).is_dir():
            raise InputError(f"--each: {self.each} is a file, expected a folder. Name another.")
        if self.strength is not None and self.image is None:
            raise InputError(f"--strength: got {self.strength:g} without an image to begin with. Add --image FILE.")
        if self.image is not None:
            from tasks.untrusted import given as given_images

            given_images.check(self.image)

    def open(self) -> "tuple[System, Any]":
        """The published system, and its sampling settings with the options applied.

        Raises:
            InputError: nothing was published, or an option is none of this system's.
            ConfigError: an unknown setting or an impossible value.
        """
        from pipelines.published import find_stack

        folder = find_stack(self.storage or DEFAULT_ROOT, self.model)
        from unclip import config
        from unclip.systems.system import find_system, read_stack

        stack = read_stack(folder)
        spec = find_system(stack.system)
        system = spec.load(stack)
        values = config.to_dict(system.sampling)
        for option, needed in (("negative", "negative"), ("image", "start")):
            if getattr(self, option) is not None and needed not in spec.inputs:
                raise InputError(f"--{option}: the system {spec.name} takes none. Leave it out.")
        for option in ("steps", "guidance_scale", "sampler", "eta", "strength"):
            value = getattr(self, option)
            if value is not None:
                if option not in spec.shortcuts:
                    raise InputError(
                        f"--{option.replace('_', '-')}: the system {spec.name} has no such setting. Leave it out."
                    )
                values = config.override(values, f"{spec.shortcuts[option]}={value}")
        for assignment in self.assignments:
            values = config.override(values, assignment)
        return system, config.load(spec.sampling, values)

    def save(self, images: "Tensor", labels: Sequence[str] | None = None, *, columns: int, num_given: int = 0) -> None:
        """Write images [N, 3, S, S] as one grid, and those after the given ones each in a file if that was asked for."""
        from unclip import imaging

        Path(self.out).write_bytes(imaging.png(imaging.grid(images, columns=columns, captions=labels)))
        if self.each is not None:
            Path(self.each).mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(imaging.to_uint8(images[num_given:])):
                Path(self.each, f"{number:03d}.png").write_bytes(imaging.png(pixels))
        click.echo(self.out)


def sampling_options(out: str, *extra: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Adds the options of a `Request`, and those of one command before them."""
    shared = (
        click.option("--seed", default=0, show_default=True, help="The same seed gives the same images."),
        click.option("--steps", type=int, help="Sampling steps of the base images.  [default: as published]"),
        click.option("--guidance-scale", type=float, help="Of the base images; 1 is off.  [default: as published]"),
        click.option(
            "--set",
            "assignments",
            metavar="PART.FIELD=VALUE",
            multiple=True,
            help="Override one sampling setting; the stack's stack.json lists them.",
        ),
        click.option("--out", default=out, show_default=True, help="PNG to write: all images in a grid."),
        click.option("--each", metavar="FOLDER", help="Also write every image as a PNG of its own."),
        click.option("--model", help="Registered model, name or name@alias.  [default: the one in the storage]"),
        STORAGE,
    )

    def add(command: Any) -> Any:
        for option in reversed((*extra, *shared)):
            command = option(command)
        return command

    return add


def number(default: int, noun: str) -> Callable[[Any], Any]:
    return click.option("--num", default=default, show_default=True, help=f"Number of {noun}.")


SAMPLER = click.option("--sampler", type=click.Choice(SAMPLERS), help="Of the base images.  [default: as published]")
ETA = click.option(
    "--eta", type=float, help="Noise of the sampler ddim, 0 to 1, for the base images.  [default: as published]"
)
NEGATIVE = click.option("--negative", metavar="CAPTION", help="Guide away from this caption instead of the empty one.")


def check_num(num: int, least: int = 1) -> None:
    if num < least:
        raise InputError(f"--num: got {num}, expected at least {least}.")


def check_caption(caption: str) -> None:
    if not caption.strip():
        raise InputError("caption: got nothing, expected a description of the image.")
