"""MLflow at the start of a run: an outage leaves the run untracked, a refusal ends the command with a remedy."""

import contextlib
import http.server
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.database import database_uri
from tasks.tracking import client
from tests.pipelines.command_line import call, call_apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """Folder with a list, and an MLflow database with an experiment of the pipeline's name, which was deleted."""
    folder = tmp_path_factory.mktemp("tracking")
    shutil.copy(pairs, folder)
    mlflow = client(database_uri(str(folder / "mlflow.db")))
    artifacts = (folder / "artifacts").as_uri()  # by default, the working folder
    mlflow.delete_experiment(mlflow.create_experiment("text_to_image", artifact_location=artifacts))
    return folder


def run(
    folder: Path, tracking_uri: str, reaches_ray: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a pipeline with a Ray that cannot start, so that it ends after what it tells MLflow."""
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **environment}
    arguments = ["--set", f"ingest.urls={folder / 'pairs.parquet'}", "--storage", folder / "storage"]
    pairs = str(folder / "pairs.parquet")
    command = call_apart if reaches_ray else call  # this process may have a cluster of tests
    result = command("run", "text_to_image", *arguments, RAY_TMPDIR=pairs, RAY_ADDRESS="", **environment)
    assert result.returncode == 2
    return result


def message(result: subprocess.CompletedProcess[str]) -> str:
    [line] = result.stderr.strip().splitlines()
    return line


@contextlib.contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """URI of a server that gives every request the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


def test_f111_ray_that_does_not_start_and_f113_a_deleted_experiment_that_is_restored(folder: Path) -> None:
    uri = database_uri(str(folder / "mlflow.db"))
    result = run(folder, uri, reaches_ray=True)
    line = message(result)
    assert line.startswith("error: cluster: Ray does not start on this machine: ")
    assert str(folder / "pairs.parquet") in line and "RAY_TMPDIR names another folder" in line
    assert "MLflow: the experiment text_to_image was deleted there; it is restored." in result.stdout
    assert "not tracked" not in result.stdout
    experiment = client(uri).get_experiment_by_name("text_to_image")
    assert experiment.lifecycle_stage == "active"
    [tracked] = client(uri).search_runs([experiment.experiment_id])
    assert tracked.info.status == "FAILED" and tracked.data.params["storage"]


def test_f113_an_mlflow_that_refuses_a_run_ends_the_command(folder: Path) -> None:
    newer, garbage = folder / "newer.db", folder / "garbage.db"
    newer.write_bytes((folder / "mlflow.db").read_bytes())
    with contextlib.closing(sqlite3.connect(newer)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
    garbage.write_text("no database" * 100)
    refusals = {
        "./mlruns": ("filesystem tracking backend", "mlflow migrate-filestore"),
        database_uri(str(newer)): ("found version 0123456789ab", "mlflow db upgrade"),
        database_uri(str(garbage)): ("file is not a database", "Correct tracking_uri"),
        database_uri(str(folder)): ("unable to open database file", "Correct tracking_uri"),
        "postgresql://me@127.0.0.1:9/runs": ("psycopg", "Correct tracking_uri"),
        "ftp://127.0.0.1": ("unsupported URI", "Correct tracking_uri"),
    }
    for uri, words in refusals.items():
        line = message(run(folder, uri))
        assert line.startswith("error: tracking_uri: MLflow at ") and all(word in line for word in words), line
    for status, words in {401: "401", 404: "404", 200: "not in a valid JSON format"}.items():
        with server(status, b"a page") as uri:
            line = message(run(folder, uri))
            assert f"error: tracking_uri: MLflow at {uri} refuses this run: " in line and words in line


def test_f113_an_outage_of_mlflow_leaves_a_run_untracked(folder: Path) -> None:
    with server(503, b"a page") as unavailable:
        for uri in (unavailable, "http://127.0.0.1:9", "http://nowhere.invalid:5000"):
            result = run(folder, uri, reaches_ray=True)
            assert f"MLflow at {uri} does not answer; this run is not tracked: " in result.stdout
            assert "Ray does not start" in result.stderr, "the run goes on"
