"""Command that trains and samples several systems on the same dataset, and compares them."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pipelines.options import CONFIG, JSON, PIPELINE, SET, STORAGE, complete, print_json
from pipelines.preset import system_names
from unclip.errors import ConfigError
from unclip.messages import redacted

if TYPE_CHECKING:
    from pipelines.comparison import Comparison, Entry, Row


def _complete(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    """Systems, and after a slash variants of one, that begin with the part after the last comma."""
    before, comma, last = start.rpartition(",")
    system, slash = last.partition("/")[:2]
    names = system_names()
    if slash and system in names:
        from pipelines.pipeline import find_pipeline

        names = [f"{system}/{name}" for name in find_pipeline(system).variants]
    return [CompletionItem(f"{before}{comma}{name}") for name in complete(names, last)]


@click.command()
@PIPELINE
@click.option(
    "--systems",
    metavar="A,B,...",
    shell_complete=_complete,
    help="Systems, and variants as SYSTEM/VARIANT, in the order of the table.  [default: all]",
)
@click.option(
    "--sweep",
    metavar="SETTING=A,B,...",
    help="Evaluate each system with each of these values; SETTING is a path or a shortcut such as guidance_scale.",
)
@click.option(
    "--equal",
    type=click.Choice(["samples", "flop"]),
    help="Train each system on as many samples, or for as many FLOPs, as the first.  [default: its own settings]",
)
@CONFIG
@SET
@STORAGE
@JSON
def compare(
    pipeline: str,
    systems: str | None,
    sweep: str | None,
    equal: Any,
    run_file: str | None,
    assignments: tuple[str, ...],
    storage: str | None,
    as_json: bool,
) -> None:
    """Train, sample and compare systems on the dataset of a PIPELINE.

    Systems are trained in one storage, comparison.side_by_side at a time; what they share is made once. The table and the figure
    are in results/PIPELINE-comparison. If a system fails, the others are compared, and the command ends with its exit code.

    To resume, run the same command again.
    """
    from pipelines import comparison as comparisons
    from pipelines import comparison_page
    from pipelines.side_by_side import run_entries

    swept = None if sweep is None else comparisons.Sweep.parse(sweep)
    names = () if systems is None else tuple(filter(None, (name.strip() for name in systems.split(","))))
    if systems is not None and not names:
        raise ConfigError(f"--systems: got {systems!r}, expected names of systems. Leave it out to compare all.")
    entries = comparisons.find_entries(pipeline, run_file, assignments, storage, names, swept, equal)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        failures = run_entries(pipeline, entries)
        if len(failures) == len(entries):
            raise comparisons.error_of(failures)
        result = comparisons.collect(pipeline, entries, failures, swept, equal)
        folder = _write(result, entries, _settings(run_file, assignments))
        click.echo(f"\n{comparison_page.text(result)}\n\nresults    {folder}")
    if as_json:
        print_json(_document(result, folder))
    if failures:
        raise comparisons.error_of(failures)


def _settings(run_file: str | None, assignments: Sequence[str]) -> list[str]:
    """Options that gave the settings, for the records: from any folder, and without credentials."""
    given = [] if run_file is None else ["--config", os.path.abspath(run_file)]
    return redacted([*given, *(word for each in assignments for word in ("--set", each))])  # type: ignore[no-any-return]


def _document(result: "Comparison", folder: str) -> dict[str, Any]:
    sweep = None if result.sweep is None else {"setting": result.sweep.setting, "values": list(result.sweep.values)}
    return {
        "pipeline": result.pipeline,
        "storage": result.storage,
        "equal": result.equal,
        "sweep": sweep,
        "captions": result.num_captions,
        "rows": [row.document() for row in result.rows],
        "failures": result.failures,
        "folder": folder,
    }


def _folder_name(result: "Comparison") -> str:
    """Name of the folder of results: one for each setting that is swept and each budget."""
    kind = "comparison" if result.sweep is None else f"sweep-{result.sweep.setting}"
    return "-".join([result.pipeline, kind, *([] if result.equal is None else ["equal", result.equal])])


def _command(result: "Comparison", entries: "Sequence[Entry]", settings: Sequence[str]) -> list[str]:
    """Words of the command that makes these results."""
    sweep = [] if result.sweep is None else ["--sweep", f"{result.sweep.setting}={','.join(result.sweep.values)}"]
    equal = [] if result.equal is None else ["--equal", result.equal]
    names = ",".join(dict.fromkeys(entry.name for entry in entries))
    return ["unclip compare", result.pipeline, "--systems", names, *sweep, *equal, *settings]


def _write(result: "Comparison", entries: "Sequence[Entry]", settings: Sequence[str]) -> str:
    """Write tables and figures to the folder of results and to MLflow; return the folder's URI.

    Args:
        settings: options of the command that gave the settings.
    """
    from pipelines import comparison_page
    from pipelines.comparison import settings_of
    from pipelines.records import close_run, open_run
    from tasks.lineage.previews import publish as publish_previews
    from tasks.store import Store
    from tasks.tracking import PREVIEWS
    from unclip import files, seals

    name = _folder_name(result)
    store, previews = Store(result.storage), {"images": comparison_page.draw_images(result)}
    folder = store.uri("results", name)
    contents = {} if result.sweep is None else {"sweep.png": comparison_page.draw_sweep(result)}
    figures = [*contents, f"{PREVIEWS}/images.png"]
    contents["table.png"] = comparison_page.draw_table(result)
    contents["table.md"] = comparison_page.markdown(result).encode()
    contents["table.html"] = comparison_page.page(result, figures).encode()
    command = _command(result, entries, settings)
    summary = {**_document(result, folder), "command": command, "artifacts": result.artifacts}
    store.check_links()
    files.delete(f"{folder}/{seals.MANIFEST}")
    for file_name, data in contents.items():
        files.write(f"{folder}/{file_name}", data)
    store.write_json(summary, "results", name, "summary.json")
    run = open_run(result.pipeline, entries[0].config, store)
    try:
        tracker = run.tracker.child(run.experiment_id, name, shows_rows=True)
        publish_previews(store, tracker, folder, previews, result.keys)
        seals.cover(folder)
        snapshot = store.portable(result.snapshot)
        tracker.dataset(result.pipeline, snapshot["digest"], snapshot["embeddings"], {"snapshot": snapshot})
        tracker.metrics({key: value for row in result.rows for key, value in _measured(row).items()})
        for file_name, data in contents.items():
            tracker.bytes(data, file_name)
        tracker.json(store.portable(summary), "summary.json")
        tracker.json(store.portable({"entries": settings_of(entries)}), "configs.json")
        tracker.end()
    finally:
        close_run(run, store, "failed" if result.failures else "done")
    return folder


def _measured(row: "Row") -> dict[str, float]:
    """Numbers of a row, with its name before theirs."""
    from tasks.tracking import flatten

    where = row.name if row.value is None else f"{row.name}.{row.value}"
    values = flatten(
        {key: value for key, value in row.document().items() if key not in ("trainings", "label", "value")}
    )
    return {f"{where}.{key}": value for key, value in values.items() if isinstance(value, (int, float))}


COMMANDS = (compare,)
