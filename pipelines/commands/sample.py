"""The command that samples from captions."""

from typing import Any

import click

from pipelines.sampling import SAMPLER, Request, check_caption, check_num, number, sampling_options


@click.command()
@click.argument("caption")
@sampling_options("samples.png", number(8, "images"), SAMPLER)
def sample(caption: str, num: int, **given: Any) -> None:
    """Sample images of a caption with the published stack."""
    request = Request(**given)
    check_num(num)
    check_caption(caption)
    request.check()
    system, sampling = request.open()
    from unclip.systems.system import sample_captions

    with click.progressbar(length=num, label="sampling") as bar:
        images = sample_captions(system, [caption] * num, seed=request.seed, sampling=sampling, progress=bar.update)
    request.save(images, columns=min(num, 8))


COMMANDS = (sample,)
