"""The command that samples from captions."""

from typing import TYPE_CHECKING, Any

import click

from pipelines.sampling import ETA, NEGATIVE, SAMPLER, Request, check_caption, check_num, number, sampling_options

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("caption")
@sampling_options(
    "samples.png",
    number(8, "images"),
    SAMPLER,
    ETA,
    NEGATIVE,
    click.option(
        "--image", metavar="FILE", help="Begin with this image, noised; of one that is not square, the middle."
    ),
    click.option(
        "--strength",
        type=float,
        help="Share of the sampling that --image goes through: 0 returns it, 1 ignores it.  [default: as published]",
    ),
)
def sample(caption: str, num: int, **given: Any) -> None:
    """Sample images of a caption with the published stack."""
    request = Request(**given)
    check_num(num)
    check_caption(caption)
    request.check()
    system, sampling = request.open()
    from unclip.systems.system import sample_captions

    with click.progressbar(length=num, label="sampling") as bar:
        images = sample_captions(
            system,
            [caption] * num,
            seed=request.seed,
            sampling=sampling,
            negative=None if request.negative is None else [request.negative] * num,
            start=None if request.image is None else _read(request.image, system.image_size).expand(num, -1, -1, -1),
            progress=bar.update,
        )
    request.save(images, columns=min(num, 8))


def _read(path: str, size: int) -> "Tensor":
    """An image file as [1, 3, size, size] in [-1, 1]."""
    from tasks.untrusted import given
    from unclip.imaging import from_uint8

    [image] = given.read([path], size)
    return from_uint8(image.pixels[None])


COMMANDS = (sample,)
