"""Command that estimates hours, bytes and cost of every stage, before a cluster is rented."""

import dataclasses

import click
from click.shell_completion import CompletionItem

from pipelines import estimate as estimates
from pipelines.estimate import Estimate, Machine, Prices, StageEstimate
from pipelines.options import CONFIG, JSON, NUMBER, SET, STORAGE, SYSTEM, complete, print_json
from pipelines.preset import pipeline_names
from pipelines.quantities import hours, number, parse_number
from pipelines.shipped_rates import CPUS_PER_GPU, SIZES
from unclip.config import require
from unclip.errors import ConfigError

COLUMNS = 100
"""Width of the table."""
CELL = 7
"""Width of a column."""


def _complete(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    """Pipelines that begin with `start`; the shell's files if there are none."""
    return [CompletionItem(name) for name in complete(pipeline_names(), start)] or [CompletionItem(start, type="file")]


@click.command()
@click.argument("pipeline", default="text_to_image", shell_complete=_complete)
@CONFIG
@SYSTEM
@SET
@STORAGE
@click.option(
    "--pairs",
    multiple=True,
    metavar="NUMBER",
    help="Rows of the list: a number such as 100M, or several with commas; repeatable. [default: 1M,10M,100M,650M]",
)
@click.option("--gpus", default=1, show_default=True, help="GPUs of the cluster; 0 embeds and trains on CPUs.")
@click.option("--cpus", type=int, help="CPUs of the cluster. [default: 16 for each GPU]")
@click.option(
    "--gpu-flops",
    default="400T",
    show_default=True,
    metavar="NUMBER",
    help="FLOPs per second that a GPU achieves in bf16, not its peak. The default is 40% of an H100's.",
)
@click.option("--price-gpu-hour", type=NUMBER, metavar="PRICE", help="Price of a GPU, its host included, for one hour.")
@click.option("--price-cpu-hour", type=NUMBER, metavar="PRICE", help="Price of a CPU for one hour.")
@click.option("--price-terabyte-month", type=NUMBER, metavar="PRICE", help="Price to store 10^12 bytes for a month.")
@JSON
def estimate(
    pipeline: str,
    run_file: str | None,
    system: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    pairs: tuple[str, ...],
    gpus: int,
    cpus: int | None,
    gpu_flops: str,
    price_gpu_hour: float | None,
    price_cpu_hour: float | None,
    price_terabyte_month: float | None,
    as_json: bool,
) -> None:
    """Estimate the hours, bytes and cost of every stage.

    PIPELINE is a name or a run file (TOML); it defaults to text_to_image. Rates come from the finished stages of the storage, if
    there are any, otherwise from tables shipped with unclip; a line for each stage says how it is computed. Starts and writes
    nothing. A cost needs a price; what has no price is free.
    """
    prices = {"gpu_hour": price_gpu_hour, "cpu_hour": price_cpu_hour, "terabyte_month": price_terabyte_month}
    for name, price in prices.items():
        require(price is None or price >= 0, f"--price-{name.replace('_', '-')}", price, "0 or more")
    require(gpus >= 0, "--gpus", gpus, "0 or more")
    require(cpus is None or cpus >= 1, "--cpus", cpus, "at least 1")
    flops = parse_number(gpu_flops, "--gpu-flops")
    if pipeline.endswith(".toml"):
        if run_file is not None:
            raise click.UsageError(f"--config: got {run_file} and the run file {pipeline}. Give one of them.")
        pipeline, run_file = "text_to_image", pipeline
    sizes = parse_sizes(pairs)

    from pipelines.config import load
    from pipelines.measured import measure
    from pipelines.workload import workload
    from tasks.store import Store

    # nothing depends on the list of URLs, which need not exist yet
    config = load(pipeline, run_file, ("ingest.urls=unknown", *assignments), storage, system)
    store = Store(config.storage)
    machine = Machine(gpus, cpus or CPUS_PER_GPU * max(gpus, 1), flops)
    given = {name: price for name, price in prices.items() if price is not None}
    priced = Prices(**given) if given else None
    work, measured = workload(config), measure(store, config, on_gpus=gpus > 0)
    found = [estimates.estimate(work, each, machine, measured, priced) for each in (sizes or list(SIZES))]
    if as_json:
        document = {"pipeline": pipeline, "storage": store.root, "machine": dataclasses.asdict(machine)}
        all_prices = None if priced is None else dataclasses.asdict(priced)
        print_json({**document, "prices": all_prices, "estimates": [dataclasses.asdict(each) for each in found]})
        return
    measured_stages = [stage.stage for stage in found[0].stages if stage.is_measured]
    click.echo(_heading(machine, priced))
    click.echo(f"Rates measured in {store.root}: {', '.join(measured_stages) or 'none'}; the others are shipped.\n")
    for line in table(found, COLUMNS):
        click.echo(line)
    click.echo(f"\nHow, for {number(found[-1].pairs)} pairs:")
    for stage in found[-1].stages:
        click.echo(f"{stage.stage}: {stage.how}")
    click.echo(f"total: {found[-1].how}")


def parse_sizes(texts: tuple[str, ...]) -> list[int]:
    """Parse numbers of pairs, several in one text separated by commas; sorted, each once.

    Raises:
        ConfigError: one of them is not a whole number, or is given with an unknown suffix.
    """
    found = set()
    for text in (each for several in texts for each in several.split(",")):
        value = parse_number(text, "--pairs")
        if abs(value - round(value)) > 1e-6 * value:
            raise ConfigError(f"--pairs: got {text!r}, expected a whole number of pairs.")
        found.add(round(value))
    return sorted(found)


def table(found: list[Estimate], width: int) -> list[str]:
    """Lines of a table: a row per stage, a group of columns per number of pairs; several tables if the groups do not fit."""
    has_cost = found[0].cost is not None
    headings = [f"{name:>{CELL}}" for name in ("hours", "bytes", *["cost"] * has_cost)]
    names = [stage.stage for stage in found[0].stages] + ["total"]
    name_width = max(map(len, names))
    per_table = max(1, (width - name_width) // (CELL * len(headings)))
    lines: list[str] = []
    for start in range(0, len(found), per_table):
        group = found[start : start + per_table]
        lines += [""] if start else []
        titles = (f"{number(each.pairs)} pairs" for each in group)
        lines.append(" " * name_width + "".join(f"{title:>{CELL * len(headings)}}" for title in titles))
        lines.append(" " * name_width + "".join(headings) * len(group))
        for name, *rows in zip(names, *((*each.stages, each) for each in group), strict=True):
            cells = [cell for row in rows for cell in _cells(row)]
            lines.append(f"{name:<{name_width}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    return lines


def _cells(row: Estimate | StageEstimate) -> list[str]:
    stored = "-" if not row.stored_bytes else number(row.stored_bytes)
    cells = ["-" if not row.hours else "<0.01" if row.hours < 0.01 else hours(row.hours), stored]
    if row.cost is not None:
        cells.append("<0.01" if 0 < row.cost < 0.01 else f"{row.cost:.2f}" if row.cost < 100 else number(row.cost))
    return cells


def _heading(machine: Machine, prices: Prices | None) -> str:
    gpus = f"{machine.gpus:,} GPUs of {number(machine.gpu_flops)} FLOP/s and " if machine.gpus else ""
    cost = "; cost of the work, and of one month of storage" if prices else ""
    return f"{gpus}{machine.cpus:,} CPUs. Hours of work, bytes that stay{cost}."


COMMANDS = (estimate,)
