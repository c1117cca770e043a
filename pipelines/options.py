"""Options that commands of more than one module take."""

import json
from typing import Any

import click

from pipelines.preset import pipeline_names

STORAGE = click.option(
    "--storage", metavar="FOLDER", envvar="UNCLIP_STORAGE", help="Folder or URI for everything the pipeline makes."
)
PIPELINE = click.argument("pipeline", shell_complete=lambda *given: complete(pipeline_names(), given[-1]))
CONFIG = click.option("--config", "run_file", metavar="TOML", help="Run file: what differs from the pipeline's preset.")
SET = click.option("--set", "assignments", metavar="SECTION.FIELD=VALUE", multiple=True, help="Override one setting.")

JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead; its keys are in docs/commands.md."
)


def print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))


def complete(names: list[str], start: str) -> list[str]:
    """Those that begin with what has been typed."""
    return [name for name in names if name.startswith(start)]
