"""Command that estimates the memory and compute of training, before a GPU is rented."""

import dataclasses
from typing import TYPE_CHECKING

import click

from pipelines.options import CONFIG, SET, SYSTEM, complete
from pipelines.preset import pipeline_names
from unclip.config import require

if TYPE_CHECKING:
    from pipelines.dataset import PipelineConfig
    from unclip.training.memory import ModelMemory, TrainingSetup
    from unclip.training.parallel import Parallel

HEADINGS = ("weights", "gradients", "moments", "EMA weights", "exchange", "activations", "checkpointed")


@click.command("plan train")
@click.argument(
    "pipeline", default="text_to_image", shell_complete=lambda *given: complete(pipeline_names(), given[-1])
)
@CONFIG
@SYSTEM
@SET
@click.option(
    "--model-size",
    metavar="NAME",
    help="Named model size, such as demo, small, base or dalle2; short for --set model_size=NAME.",
)
@click.option("--gpus", default=1, show_default=True, help="Number of GPUs that train one model together.")
@click.option("--memory-gib", default=80.0, show_default=True, help="Memory of each GPU in GiB.")
@click.option(
    "--micro-batch-size", default=1, show_default=True, help="Micro-batch size for the activations in the table."
)
def plan_train(
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    model_size: str | None,
    gpus: int,
    memory_gib: float,
    micro_batch_size: int,
) -> None:
    """Estimate the GPU memory for training, and what fits.

    Covers each part that a PIPELINE trains; needs no GPU and starts nothing. PIPELINE defaults to text_to_image. The
    columns are GiB per GPU, with float32 weights and bf16 autocast: weights, gradients, Adam's two moments, EMA weights,
    what FSDP gathers, and the activations of one micro-batch, without and with activation checkpointing. Weights and
    activations include those of the frozen network of a perceptual loss. GFLOP/sample is the compute for training the
    part itself on one sample.
    """
    require(gpus >= 1, "--gpus", gpus, "at least 1")
    require(memory_gib > 0, "--memory-gib", memory_gib, "a positive number")
    require(micro_batch_size >= 1, "--micro-batch-size", micro_batch_size, "at least 1")
    from pipelines.config import load
    from unclip.training import memory

    size = () if model_size is None else (f"model_size={model_size}",)
    # memory does not depend on the list of URLs, which need not exist yet
    config = load(pipeline, run_file, ("ingest.urls=unknown", *assignments, *size), system=system)
    plan = _measure(config)
    width = max(len(model.name) for model in plan)
    widths = [max(len(heading), len("100.000")) for heading in HEADINGS]
    headings = "  ".join(f"{heading:>{wide}}" for heading, wide in zip(HEADINGS, widths, strict=True))
    click.echo(f"{'':<{width}}{'parameters':>15}  GFLOP/sample  parallel  {headings}")
    for model in plan:
        parallel = _parallel(model, gpus, memory_gib)
        states = model.states(memory.TrainingSetup(gpus, parallel))
        activations = [model.activations.at(micro_batch_size, checkpointing) for checkpointing in (False, True)]
        sizes = (
            states.weights + states.frozen,
            states.gradients,
            states.moments,
            states.average,
            states.exchange,
            *activations,
        )
        cells = "  ".join(f"{size / memory.GIB:>{wide}.3f}" for size, wide in zip(sizes, widths, strict=True))
        shown = parallel if gpus > 1 else "-"
        gigaflops = model.flops_per_sample / 1e9
        click.echo(f"{model.name:<{width}}{model.parameters:>15,}{gigaflops:>14,.1f}  {shown:<8}  {cells}")
    click.echo()
    machine = f"{gpus} {'GPU' if gpus == 1 else 'GPUs'} of {memory_gib:g} GiB"
    sentences = [f"{model.name}: {machine}: {_what_fits(model, gpus, memory_gib)}" for model in plan]
    click.echo("\n".join(sentences))
    click.echo()
    if any("(" in sentence for sentence in sentences):
        click.echo("In brackets: with gradient accumulation, for which FSDP keeps full gradients.")
    click.echo(
        f"{memory.RESERVE:.0%} of each GPU is reserved for what is not counted: the CUDA context, fragmentation, workspaces, "
        "buffers, the batch and a frozen CLIP that reads captions."
    )


def _measure(config: "PipelineConfig") -> "list[ModelMemory]":
    """Measure the memory of each part that a pipeline trains."""
    from pipelines.pipeline import compose
    from unclip.systems.part import Shapes
    from unclip.training.memory import measure

    shapes = Shapes.of(config.clip.model)
    nodes = compose(config).items()
    return [
        measure(name, node.stage.part.network(node.config, shapes))
        for name, node in nodes
        if node.stage.part is not None
    ]


def _parallel(model: "ModelMemory", gpus: int, memory_gib: float) -> "Parallel":
    """Choose DDP if one sample fits, otherwise FSDP."""
    from unclip.training.memory import TrainingSetup

    return "ddp" if model.largest_micro_batch(TrainingSetup(gpus, "ddp", checkpointing=True), memory_gib) else "fsdp"


def _what_fits(model: "ModelMemory", gpus: int, memory_gib: float) -> str:
    """Describe the largest micro-batches that fit."""
    from unclip.training.memory import GIB, RESERVE, TrainingSetup

    options: tuple[Parallel, ...] = ("ddp", "fsdp") if gpus > 1 else ("ddp",)
    found = []
    for parallel in options:
        kept, checkpointed = (
            _largest(model, TrainingSetup(gpus, parallel, each), memory_gib) for each in (False, True)
        )
        name = f"{parallel.upper()}, " if gpus > 1 else ""
        if kept:
            found.append(f"{name}micro-batch {kept}; with activation checkpointing {checkpointed}")
        elif checkpointed:
            found.append(f"{name}only with activation checkpointing, micro-batch {checkpointed}")
    if found:
        return ". ".join(found) + "."
    least = model.at(1, TrainingSetup(gpus, options[-1], checkpointing=True)) / GIB
    return f"nothing fits: one sample takes {least:.1f} GiB, but {memory_gib * (1 - RESERVE):.1f} GiB are available."


def _largest(model: "ModelMemory", training: "TrainingSetup", memory_gib: float) -> str:
    """Format the largest micro-batch, in brackets with gradient accumulation if that differs; "" if none fits."""
    from unclip.training.memory import MAX_MICRO_BATCH

    several = dataclasses.replace(training, accumulates=True)
    alone, added = (model.largest_micro_batch(each, memory_gib) for each in (training, several))
    texts = [f"{number:,}" + " or more" * (number == MAX_MICRO_BATCH) for number in (alone, added)]
    if not alone:
        return ""
    return texts[0] if alone == added else f"{texts[0]} ({texts[1]})"


COMMANDS = (plan_train,)
