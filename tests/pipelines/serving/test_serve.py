"""`unclip serve` in a process of its own: starts, answers, survives, stops."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from tests.pipelines.command_line import ROOT, call
from tests.pipelines.sockets import Listener, watched
from tests.unclip.systems import tiny_stacks
from unclip.imaging import to_uint8
from unclip.systems.system import load_system, sample_captions

PORT = 8791
CAPTION = "a red circle"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    tiny_stacks.publish(folder)
    return folder


@contextlib.contextmanager
def serving(storage: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pipelines", "serve", "--storage", storage, "--port", str(PORT)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 180
            while True:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/healthz", timeout=5),
                ):
                    break
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            process.wait(60)


def png() -> bytes:
    """Image with a transparent square."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[4:12, 3:9, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def children(pid: int) -> list[int]:
    """Process ids of all descendants."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [each for child in own for each in children(child)]


@pytest.mark.slow
def test_openais_client_and_every_signal(storage: Path, tmp_path: Path) -> None:
    """F167: a replica that is killed is started again. F168: all sockets listen on the loopback address only.

    F169: SIGTERM ends the server with 0, and its log has neither captions nor errors.
    """
    log = tmp_path / "log"
    with serving(storage, log) as process:
        client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{PORT}/v1", max_retries=0, timeout=60)
        found: dict[Listener, bool]
        with watched(process.pid) as found:
            answer = client.images.generate(prompt=CAPTION, n=2, extra_body={"seed": 5})
            varied = client.images.create_variation(image=png(), n=2)
            edited = client.images.edit(image=png(), prompt=CAPTION, response_format="b64_json")
            time.sleep(1.5)
        expected = to_uint8(sample_captions(load_system(storage / "stack"), [CAPTION] * 2, seed=5)).astype(int)
        for item, image in zip(answer.data or (), expected, strict=True):
            assert (
                abs(np.asarray(Image.open(io.BytesIO(b64decode(item.b64_json or "")))).astype(int) - image).max() <= 1
            )
        assert (len(varied.data or ()), len(edited.data or ())) == (2, 1)
        assert {listener.port for listener in found} >= {PORT} and len(found) > 5
        assert not [listener for listener, is_reached in found.items() if is_reached or not listener.is_loopback]

        replicas = [
            pid for pid in children(process.pid) if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(replicas) == 1
        os.kill(replicas[0], signal.SIGKILL)
        deadline = time.monotonic() + 120
        while True:
            try:
                again = client.images.generate(prompt=CAPTION, n=2, extra_body={"seed": 5})
                break
            except openai.InternalServerError as error:
                assert error.status_code == 503 and time.monotonic() < deadline, error
                time.sleep(1)
        assert (again.data or [None])[0] == (answer.data or [None])[0]

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    text = log.read_text()
    assert text.rstrip().endswith("stopped") and "POST /v1/images/generations 200" in text
    assert CAPTION not in text and "Traceback" not in text, text


def test_more_gpus_than_the_cluster_has_are_refused(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.connect", lambda: {"CPU": 2.0, "GPU": 1.0})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = call("serve", "--storage", storage, "--port", port, "--num-replicas", 2, "--gpus", 1)
    assert result.returncode == 2 and "need more GPUs than the cluster's 1" in result.stderr


def test_f169_what_keeps_the_server_from_starting_is_told_before_it_starts_anything(
    storage: Path, tmp_path: Path
) -> None:
    def refused(*options: object, folder: Path = storage) -> str:
        result = call("serve", "--storage", folder, "--port", PORT + 1, *options)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "published").mkdir()
    assert "nothing has been published" in refused(folder=tmp_path / "empty")
    assert "--model nobody" in refused("--model", "nobody")
    assert "--token-file" in refused("--host", "0.0.0.0")
    assert "--token-file" in refused("--host", "::")
    assert "no.such.host.invalid" in refused("--host", "no.such.host.invalid")
    assert "none cannot be read" in refused("--token-file", "none")
    for content in (b"", b"short", b"two words that are long enough", bytes(range(128, 160))):
        (tmp_path / "token").write_bytes(content)
        message = refused("--host", "0.0.0.0", "--token-file", tmp_path / "token")
        assert "at least 16" in message and "two words" not in message
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{port} is in use by another program" in refused("--port", port)
