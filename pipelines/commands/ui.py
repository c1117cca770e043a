"""Command that serves the MLflow UI."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from typing import Any

import click

from pipelines.options import STORAGE
from unclip.errors import InputError, StorageError
from unclip.messages import without_credentials

START_SECONDS = 120.0
"""Time for the server to answer; on a busy machine MLflow takes half a minute to import."""
STOP_SECONDS = 10.0
SHOWN = 10
"""Other experiments that are listed."""
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port to serve on.")
@click.option("--no-open", is_flag=True, help="Only print the address; do not open a browser.")
@STORAGE
def ui(port: int, no_open: bool, storage: str | None) -> None:
    """Serve the MLflow UI of a storage, on this machine only.

    Once the server answers, the address of the runs of the last experiment is printed and opened in a browser. Ctrl-C ends it.
    """
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
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri  # all users of the machine see the arguments of a process
    hosts = f"127.0.0.1:{port},localhost:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--default-artifact-root", artifacts_uri(uri) or store.uri(ARTIFACTS)]
    command += ["--allowed-hosts", hosts, "--workers", "1"]
    root = f"http://127.0.0.1:{port}"
    with _stopped_at_exit(subprocess.Popen(command, env=environment, start_new_session=True)) as server:
        _wait(server, root)
        link, *others = _links(root)
        click.echo(link)
        for other in others[:SHOWN]:
            click.echo(f"also {other}")
        sys.stdout.flush()
        if not no_open and _has_display():
            webbrowser.open(link)
        code = server.wait()
    if code:
        raise StorageError(f"the MLflow server ended with exit code {code}; its messages are above.")


@contextlib.contextmanager
def _stopped_at_exit(server: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """End the server with all its processes when the block ends, also by Ctrl-C or SIGTERM, which end the block quietly."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield server
    except KeyboardInterrupt:
        sys.exit(0)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)
        signal.signal(signal.SIGTERM, previous)


def _wait(server: "subprocess.Popen[bytes]", root: str) -> None:
    """Wait until the server answers.

    Raises:
        StorageError: it has ended, or does not answer within START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise StorageError(
                f"the MLflow server ended with exit code {server.returncode}; its messages are above. A newer or older MLflow "
                "may have written the database."
            )
        with contextlib.suppress(OSError), _LOCAL.open(f"{root}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise StorageError(f"the MLflow server does not answer at {root} within {START_SECONDS:g} s.")


def _links(root: str) -> list[str]:
    """Addresses of the runs of each experiment, first that of the last run; the list of experiments if there is none.

    MLflow opens an experiment on its page for language models, which is empty for trainings, unless it is told otherwise: by the
    address, and for links on its other pages by a tag of the experiment.
    """
    from pipelines.records import KIND, KIND_TAG

    found = _ask(root, "experiments/search", {"max_results": 1000}).get("experiments", [])
    experiments = {each["experiment_id"]: each for each in found}
    order = ["attributes.start_time DESC"]
    last = _ask(root, "runs/search", {"experiment_ids": list(experiments), "max_results": 1, "order_by": order})
    chosen = [run["info"]["experiment_id"] for run in last.get("runs", [])]
    listed = [
        each for each in dict.fromkeys([*chosen, *experiments]) if each != "0" or each in chosen
    ]  # 0: MLflow's own
    for experiment_id in listed:
        if KIND_TAG not in {tag["key"] for tag in experiments[experiment_id].get("tags", [])}:
            tag = {"experiment_id": experiment_id, "key": KIND_TAG, "value": KIND}
            _ask(root, "experiments/set-experiment-tag", tag)
    links = [f"{root}/#/experiments/{urllib.parse.quote(each)}/runs?workflowType=machine_learning" for each in listed]
    return links or [f"{root}/#/experiments"]


def _ask(root: str, path: str, question: dict[str, Any]) -> dict[str, Any]:
    """Answer of the server's API; empty if it refuses."""
    data = json.dumps(question).encode()
    request = urllib.request.Request(f"{root}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with contextlib.suppress(OSError, ValueError), _LOCAL.open(request, timeout=30) as answer:
        return dict(json.loads(answer.read()))
    return {}


def _has_display() -> bool:
    """Return True if a browser can show something here, other than in the terminal."""
    return sys.platform in ("darwin", "win32") or bool(
        {"DISPLAY", "WAYLAND_DISPLAY"} & {k for k, v in os.environ.items() if v}
    )


COMMANDS = (ui,)
