"""The cluster of a run: one of its own, however the command is started, or an existing one, which may be gone or incomplete."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.command_line import ROOT, call

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""First frame of an HTTP/2 server."""
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """Address of a server that gives this answer to every client, or none and stays connected."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        clients: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    clients.append(client)
                    if answer is not None:
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.close()


def refused(pairs: Path, storage: Path, *settings: str, **environment: str) -> str:
    """Message of a run that ends within seconds, before anything is written."""
    arguments = [word for setting in settings for word in ("--set", setting)]
    started = time.monotonic()
    result = call(
        "run", "text_to_image", "--set", f"ingest.urls={pairs}", *arguments, "--storage", storage, **environment
    )
    assert result.returncode == 2, result.stderr
    assert time.monotonic() - started < 30
    assert not list(storage.rglob("*"))
    [line] = result.stderr.strip().splitlines()
    return line


def test_f110_an_address_where_no_cluster_is(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.PATIENCE_SECONDS", 1.0)
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{probe.getsockname()[1]}"
    storage, silence = tmp_path / "storage", "timed out|no answer within 1 s"
    line = refused(pairs, storage, RAY_ADDRESS=closed)
    assert f"error: RAY_ADDRESS: no Ray cluster answers at {closed}: " in line
    assert "Connection refused" in line and "unset RAY_ADDRESS" in line
    assert "cluster.address: no Ray cluster answers at" in refused(pairs, storage, f"cluster.address=ray://{closed}")
    assert "nowhere.invalid" in refused(pairs, storage, RAY_ADDRESS="nowhere.invalid:6379")
    assert "Invalid address format" in refused(pairs, storage, RAY_ADDRESS="not-an-address")
    with server(HTTP) as address:
        assert "the server there is not one of Ray" in refused(pairs, storage, RAY_ADDRESS=address)
    for first in (None, SETTINGS):  # as a process that was stopped, and as a control store that hangs
        with server(first) as address:
            assert re.search(silence, refused(pairs, storage, RAY_ADDRESS=address))
    with socket.create_server(("0.0.0.0", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(4):  # further packets are dropped, as those to a machine that is off
            waiting = stack.enter_context(contextlib.closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        assert re.search(silence, refused(pairs, storage, RAY_ADDRESS=f"127.0.0.1:{port}"))


IN_RAY = """
import json, os, sys
import ray
from pipelines.cluster import start_ray
from pipelines.config import load

config = load("text_to_image", None, [f"ingest.urls={sys.argv[1]}", "cluster.num_cpus=2"], sys.argv[2])
assert start_ray([config]) and not start_ray([config]), "the second run uses the cluster of the first"

@ray.remote
def where():
    return os.getcwd(), sys.executable

node = ray._private.worker._global_node
print(json.dumps([*ray.get(where.remote(), timeout=60), node.get_session_dir_path(), node._get_object_spilling_config()]))
"""


def test_f111_f112_a_long_temporary_folder_and_uv_run_do_not_change_the_cluster(pairs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    # `uv run` for Ray: it looks for an ancestor with this command line
    (work / "run").write_text('"$@"\nexit $?\n')
    folder = tmp_path / ("scratch-of-a-scheduler-" * 5)
    folder.mkdir()
    foreign = {"RAY_RUNTIME_ENV_HOOK": "no.such.hook", "RAY_OVERRIDE_RESOURCES": '{"CPU": 0}'}
    environment = {**os.environ, **foreign, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_TMPDIR", None)
    command = [sys.executable, "-c", IN_RAY, str(pairs), str(tmp_path / "storage")]
    result = subprocess.run(
        ["uv", "run", *command], executable="/bin/sh", cwd=work, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    working_folder, python, session, spilling = json.loads(result.stdout.splitlines()[-1])
    assert (working_folder, python) == (str(work), sys.executable), "workers run as the driver does"
    assert session.startswith("/tmp/ray/session_")
    assert json.loads(spilling)["params"] == {"directory_path": str(folder / "ray")}, "/tmp may be small"
