"""Options shared by several commands."""

import json
import math
from typing import Any

import click

from pipelines.preset import pipeline_names, system_names

STORAGE = click.option(
    "--storage",
    metavar="FOLDER",
    envvar="UNCLIP_STORAGE",
    help="Folder or URI for data, models and results.",
)
MODEL = click.option(
    "--model",
    metavar="MODEL",
    help="Published model: NAME, NAME@ALIAS, NAME/VERSION or the folder of a stack.  "
    "[default: the champion promoted last in the storage]",
)
FOLLOW_LINKS = click.option(
    "--follow-links",
    is_flag=True,
    help="Delete also in folders of the storage's root that are links, which you have made yourself.",
)
TRACKING_URIS = click.option(
    "--tracking-uri",
    "tracking_uris",
    multiple=True,
    metavar="URI",
    help="Ask this MLflow, too; of those that only records of the storage name, none is asked. May be repeated.",
)
PIPELINE = click.argument("pipeline", shell_complete=lambda *given: complete(pipeline_names(), given[-1]))
CONFIG = click.option("--config", "run_file", metavar="TOML", help="Run file: settings that differ from the preset.")
SET = click.option(
    "--set", "assignments", metavar="SECTION.FIELD=VALUE", multiple=True, help="Override a setting; repeatable."
)
SYSTEM = click.option(
    "--system",
    metavar="NAME",
    shell_complete=lambda *given: complete(system_names(), given[-1]),
    help="Generative system to train, such as unclip; short for --set system=NAME.",
)


class _Finite(click.types.FloatParamType):
    """Number that is neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


NUMBER = _Finite()

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; docs/commands.md lists its keys.")


def say_links(links: dict[str, str]) -> None:
    """Say which links of a storage were not followed."""
    for name, place in links.items():
        click.echo(
            f"{name} is a link to {place}: nothing is deleted there. If you made the link, give --follow-links.",
            err=True,
        )


def print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complete(names: list[str], start: str) -> list[str]:
    """Return the names that begin with `start`."""
    return [name for name in names if name.startswith(start)]
