"""Commands that export stacks to diffusers and import them."""

import re
import time
from pathlib import Path
from typing import Any

import click

from pipelines.options import MODEL, STORAGE
from tasks.store import DEFAULT_ROOT
from unclip.errors import InputError

LAYOUTS = ("current", "portable", "hub")  # as in unclip.interop.pipeline, which takes a second to import


@click.command("export")
@click.argument("folder")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="current",
    show_default=True,
    help="Folder layout. current: diffusers 0.38 and later. portable: any version, but 0.38 and later load its Python file "
    "only with trust_remote_code. hub: 0.37 and earlier.",
)
@click.option(
    "--image-variation",
    is_flag=True,
    help="Write an UnCLIPImageVariationPipeline instead.",
)
@click.option(
    "--upsampler-1024", metavar="MODEL", help="Model folder of a second upsampler, written next to the pipeline."
)
@MODEL
@STORAGE
def export(
    folder: str, layout: str, image_variation: bool, upsampler_1024: str | None, model: str | None, storage: str | None
) -> None:
    """Export the published stack as a diffusers pipeline.

    UnCLIPPipeline loads the FOLDER, which must be new or empty; of latent_diffusion, StableDiffusionPipeline, and of
    stable_unclip, StableUnCLIPPipeline.
    """
    from pipelines.published import find_stack

    published = find_stack(storage or DEFAULT_ROOT, model)

    from tasks.model_card import EXPORTABLE
    from unclip.interop import pipeline, stable_diffusion, stable_unclip
    from unclip.models.upsampler import Upsampler
    from unclip.systems.latent_diffusion import LatentDiffusionStack, LatentSystem
    from unclip.systems.stable_unclip import StableUnclipStack
    from unclip.systems.system import load_model, load_stack, read_stack
    from unclip.systems.unclip.stack import PARTS, Stack

    second = None if upsampler_1024 is None else load_model(upsampler_1024, PARTS)
    if second is not None and not isinstance(second, Upsampler):
        raise InputError(f"--upsampler-1024: got a {type(second).__name__}, expected the model folder of an upsampler.")
    files = read_stack(published)
    if files.system not in EXPORTABLE:
        raise InputError(
            f"the published stack cannot be exported: its system is {files.system}, and diffusers has pipelines for "
            f"{', '.join(EXPORTABLE)} only. Choose another --model or --storage."
        )
    stack = load_stack(files)
    if isinstance(stack, LatentSystem) and (layout != LAYOUTS[0] or image_variation or second is not None):
        raise InputError(
            "--layout, --image-variation and --upsampler-1024: got one for a stack that samples latents, and only UnCLIPPipeline "
            "knows them. Leave them out."
        )
    if isinstance(stack, LatentDiffusionStack):
        notes = stable_diffusion.export_stack(stack, folder)
    elif isinstance(stack, StableUnclipStack):
        notes = stable_unclip.export_stack(stack, folder)
    else:
        assert isinstance(stack, Stack)
        notes = pipeline.export_stack(
            stack,
            folder,
            layout=layout,  # type: ignore[arg-type]
            image_variation=image_variation,
            upsampler_1024=second,
        )
    for note in notes:
        click.echo(note)
    click.echo(folder)


@click.command("import")
@click.argument("folder")
@click.option(
    "--image-variation",
    metavar="FOLDER",
    help="Folder of the image variation pipeline, for its image encoder.",
)
@click.option("--name", default="imported", show_default=True, help="Name of the stack in the storage.")
@STORAGE
def import_(folder: str, image_variation: str | None, name: str, storage: str | None) -> None:
    """Import a stack from a diffusers pipeline.

    FOLDER is a downloaded UnCLIPPipeline, StableDiffusionPipeline or StableUnCLIPPipeline. `unclip sample` then samples from the
    imported stack.
    """
    from tasks.store import Store

    store = Store(storage or DEFAULT_ROOT)
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(f"--name: got {name!r}, expected letters, digits, dots, dashes and underscores.")
    if not store.is_local:
        raise InputError(f"--storage: got {store.root}, expected a local folder, as `unclip sample` needs one.")
    if store.exists("published", f"{name}.json") or store.exists("imported", name, "stack.json"):
        raise InputError(f"--name: {store.root} already has a stack {name!r}. Choose another name.")
    for given in filter(None, (folder, image_variation)):
        if not Path(given).is_dir():
            raise InputError(f"{given}: no such folder. Download the pipeline first, for example with git.")

    from tasks import published
    from unclip import foreign
    from unclip.config import fingerprint
    from unclip.interop import pipeline, stable_diffusion, stable_unclip
    from unclip.systems.system import read_stack
    from unclip.training import checkpoints

    store.check_links()
    destination, notes = store.uri("imported", name), []
    kind = foreign.read_json(Path(folder, "model_index.json")).get("_class_name")
    of_latents: Any = {module.PIPELINE: module for module in (stable_diffusion, stable_unclip)}.get(kind)
    if of_latents is not None and image_variation is None:
        imported = of_latents.import_stack(folder)
        of_latents.save_imported(imported, destination)
        notes = imported.notes
    else:
        pipeline.save_imported(pipeline.import_stack(folder, image_variation=image_variation), destination)
    digest = fingerprint([checkpoints.digest(folder) for folder in read_stack(destination).models.values()])
    entry = published.Entry(destination, digest, time.time(), system=read_stack(destination).system)
    with published.changing(store, name) as record:
        published.commit(
            store, record.promote(entry, f"imported from {folder}"), lambda _: None
        )  # MLflow does not have it
    for note in notes:
        click.echo(note)
    click.echo(destination)


COMMANDS = (export, import_)
