"""The command line. Every command checks what it was given before it starts anything; errors are one line and an exit code."""

from typing import Any

import click

from pipelines.commands import data, edit, exchange, plan_train, run, sample, takedown, train, ui
from unclip.errors import UnclipError

MODULES = (run, takedown, data, ui, sample, edit, exchange, train, plan_train)


class Commands(click.Group):
    """Prints the project's own errors as one line, with their exit code; a command's name may be two words."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if " ".join(arguments[:2]) in self.commands:
            arguments = [" ".join(arguments[:2]), *arguments[2:]]
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UnclipError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on where this one stopped", err=True)
            context.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="unclip")
def main() -> None:
    """Train text-to-image models the unCLIP way, from a list of URLs to pictures."""


for module in MODULES:
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main()
