"""Options that commands of more than one module take."""

import click

STORAGE = click.option(
    "--storage", metavar="FOLDER", envvar="UNCLIP_STORAGE", help="Folder or URI for everything the pipeline makes."
)
