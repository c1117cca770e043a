"""Command that samples images from a caption."""

from typing import TYPE_CHECKING, Any

import click

from pipelines.options import NUMBER
from pipelines.sampling import ETA, NEGATIVE, SAMPLER, Request, check_caption, check_num, num_option, sampling_options

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("caption")
@sampling_options(
    "samples.png",
    num_option(8, "images"),
    SAMPLER,
    ETA,
    NEGATIVE,
    click.option(
        "--image", metavar="FILE", help="Start from this image with noise added; it is cropped to its central square."
    ),
    click.option(
        "--strength",
        type=NUMBER,
        help="Noise added to --image: 0 returns the image, 1 ignores it.  [default: as published]",
    ),
)
def sample(caption: str, num: int, **given: Any) -> None:
    """Sample images for CAPTION from the published stack."""
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
    """Read an image file as [1, 3, size, size] in [-1, 1]."""
    from tasks.untrusted import given
    from unclip.imaging import from_uint8

    [image] = given.read([path], size)
    return from_uint8(image.pixels[None])


COMMANDS = (sample,)
