"""Command that opens the MLflow UI."""

import os
import sys

import click

from pipelines.options import STORAGE
from unclip.errors import InputError
from unclip.messages import without_credentials


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port to serve on.")
@STORAGE
def ui(port: int, storage: str | None) -> None:
    """Serve the MLflow UI of a storage, on this machine only."""
    from pipelines.scene_server import check_port
    from pipelines.storage import open_tracked
    from tasks.database import ARTIFACTS, artifacts_uri, database_path, settle

    store, uri = open_tracked(storage)
    database = database_path(uri)
    if database is not None and not database.exists():
        raise InputError(
            f"{store.root}: no run has been tracked here. Run a pipeline first, or give its folder with --storage."
        )
    if uri.startswith("http"):
        click.echo(f"runs are tracked at {without_credentials(uri)}")
        return
    check_port(port, "--port")
    settle(store, uri)
    click.echo(f"http://127.0.0.1:{port}")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri  # all users of the machine see the arguments of a process
    hosts = f"127.0.0.1:{port},localhost:{port}"
    server = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    server += ["--default-artifact-root", artifacts_uri(uri) or store.uri(ARTIFACTS)]
    server += ["--allowed-hosts", hosts, "--workers", "1"]
    os.execve(sys.executable, [sys.executable, "-m", *server], environment)


COMMANDS = (ui,)
