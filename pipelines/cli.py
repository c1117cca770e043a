"""The command line. Every command checks its input before any work starts; an error is one line and an exit code."""

import sys
import traceback
from typing import Any

import click

from pipelines.commands import (
    compare,
    data,
    edit,
    estimate,
    exchange,
    gc,
    models,
    plan_train,
    run,
    sample,
    serve,
    takedown,
    train,
    ui,
    verify,
)
from pipelines.console import tolerate_encodings
from unclip.errors import UnclipError
from unclip.messages import without_credentials

MODULES = (
    run,
    compare,
    takedown,
    verify,
    gc,
    data,
    models,
    ui,
    sample,
    serve,
    edit,
    exchange,
    train,
    plan_train,
    estimate,
)


class Commands(click.Group):
    """Command group that prints the project's errors as one line with their exit code; command names may have two words."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if " ".join(arguments[:2]) in self.commands:
            arguments = [" ".join(arguments[:2]), *arguments[2:]]
        return super().resolve_command(context, arguments)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        tolerate_encodings()
        return super().main(*args, **kwargs)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UnclipError as error:
            click.secho(f"error: {without_credentials(str(error))}", fg="red", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to resume", err=True)
            context.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="unclip")
def main() -> None:
    """Train unCLIP text-to-image models, from a list of URLs to images."""
    sys.excepthook = _print_traceback


def _print_traceback(*error: Any) -> None:
    """Print an unexpected error, without credentials."""
    click.echo(without_credentials("".join(traceback.format_exception(*error))), err=True, nl=False)


for module in MODULES:
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main()
