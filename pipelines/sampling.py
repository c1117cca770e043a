"""Options of all commands that sample from the published stack, and loading of that stack."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import MODEL, NUMBER, STORAGE
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
)  # as in unclip.diffusion.samplers, which takes a second to import

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of an image file -> format."""


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
        """Check the options that do not depend on the stack.

        Raises:
            InputError: an option is invalid.
        """
        out = Path(self.out).resolve()
        if not out.parent.is_dir():
            raise InputError(f"--out: the folder {out.parent} does not exist. Create it or choose another.")
        if out.is_dir():
            raise InputError(
                f"--out: {self.out} is a folder, expected a file such as {self.out.rstrip('/')}/samples.png."
            )
        if out.suffix.lower() not in FORMATS:
            raise InputError(f"--out: {self.out} does not end in {', '.join(FORMATS)}, which give the format.")
        if self.each is not None and Path(self.each).exists() and not Path(self.each).is_dir():
            raise InputError(f"--each: {self.each} is a file, expected a folder. Choose another.")
        if self.strength is not None and self.image is None:
            raise InputError(f"--strength: got {self.strength:g} without an initial image. Add --image FILE.")
        if self.image is not None:
            from tasks.untrusted import given as given_images

            given_images.check(self.image)

    def open(self) -> "tuple[System, Any]":
        """Load the published system; return it with its sampling settings, updated by the options.

        Raises:
            InputError: nothing was published, or the system does not support an option.
            ConfigError: unknown setting or invalid value.
        """
        from pipelines.published import find_stack

        folder = find_stack(self.storage or DEFAULT_ROOT, self.model)
        import torch

        from unclip import config
        from unclip.background import usable_cpus
        from unclip.systems.system import find_system, load_stack, read_stack, sampling_of

        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))  # torch knows no quotas of containers
        stack = read_stack(folder)
        spec = find_system(stack.system)
        values = config.to_dict(sampling_of(stack, spec.sampling))
        for option, required in (("negative", "negative"), ("image", "start")):
            if getattr(self, option) is not None and required not in spec.inputs:
                raise InputError(f"--{option}: not supported by the system {spec.name}. Leave it out.")
        for option in ("steps", "guidance_scale", "sampler", "eta", "strength"):
            value = getattr(self, option)
            if value is not None:
                if option not in spec.shortcuts:
                    raise InputError(
                        f"--{option.replace('_', '-')}: not supported by the system {spec.name}. Leave it out."
                    )
                values = config.override(values, f"{spec.shortcuts[option]}={value}")
        for assignment in self.assignments:
            values = config.override(values, assignment)
        sampling: Any = config.load(spec.sampling, values)
        return load_stack(stack), sampling

    def save(self, images: "Tensor", labels: Sequence[str] | None = None, *, columns: int, num_given: int = 0) -> None:
        """Write images [N, 3, S, S] as one grid; with --each, also write all but the first `num_given` as single files."""
        from unclip import imaging

        grid = imaging.grid(images, columns=columns, captions=labels)
        Path(self.out).write_bytes(imaging.encode(grid, FORMATS[Path(self.out).suffix.lower()]))
        if self.each is not None:
            Path(self.each).mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(imaging.to_uint8(images[num_given:])):
                Path(self.each, f"{number:03d}.png").write_bytes(imaging.png(pixels))
        click.echo(self.out)


def sampling_options(out: str, *extra: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Add the options of a `Request` to a command, after the command's own options."""
    shared = (
        click.option(
            "--seed",
            type=click.IntRange(0, 2**64 - 1),
            default=0,
            show_default=True,
            help="Random seed; the same seed gives the same images.",
        ),
        click.option("--steps", type=int, help="Sampling steps for the base images.  [default: as published]"),
        click.option(
            "--guidance-scale",
            type=NUMBER,
            help="Guidance scale for the base images; 1 is off.  [default: as published]",
        ),
        click.option(
            "--set",
            "assignments",
            metavar="PART.FIELD=VALUE",
            multiple=True,
            help="Override one sampling setting, listed in the stack's stack.json; repeatable.",
        ),
        click.option(
            "--out", default=out, show_default=True, help="PNG, JPEG or WebP file for the grid of all images."
        ),
        click.option("--each", metavar="FOLDER", help="Folder for one PNG file per image, in addition to the grid."),
        MODEL,
        STORAGE,
    )

    def add(command: Any) -> Any:
        for option in reversed((*extra, *shared)):
            command = option(command)
        return command

    return add


def num_option(default: int, noun: str) -> Callable[[Any], Any]:
    return click.option("--num", default=default, show_default=True, help=f"Number of {noun}.")


SAMPLER = click.option(
    "--sampler", type=click.Choice(SAMPLERS), help="Sampler for the base images.  [default: as published]"
)
ETA = click.option(
    "--eta", type=NUMBER, help="Noise of the ddim sampler for the base images, 0 to 1.  [default: as published]"
)
NEGATIVE = click.option("--negative", metavar="CAPTION", help="Caption to guide away from, instead of the empty one.")


def check_num(num: int, least: int = 1) -> None:
    if num < least:
        raise InputError(f"--num: got {num}, expected at least {least}.")


def check_caption(caption: str) -> None:
    if not caption.strip():
        raise InputError("caption: got an empty caption, expected a description of the image.")
