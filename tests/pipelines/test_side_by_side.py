"""A comparison of systems that run side by side, stopped and resumed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.command_line import ROOT, STORAGE_NAME, call_apart, read_record
from unclip.errors import StoppedError

COMPARE = ("compare", "tiny", "--systems", "unclip,unclip/text_embedding,latent_diffusion")


def runs_of(storage: Path) -> list[dict[str, Any]]:
    """Records of runs, each with the events of its stages."""
    found = []
    for folder in sorted((storage / "runs").iterdir()):
        events = [read_record(storage, "runs", folder.name, path.name) for path in folder.glob("*.json")]
        stages = {event["stage"]: event for event in events if "stage" in event}
        found.append({**read_record(storage, "runs", folder.name, "run.json"), "stages": stages})
    return found


def is_running(storage: Path, *stages: str) -> bool:
    running = [name for run in runs_of(storage) for name, event in run["stages"].items() if event["state"] == "running"]
    return set(stages) <= set(running)


@pytest.mark.slow  # trains two systems
def test_systems_run_side_by_side_stop_together_and_make_once_what_they_share(tmp_path: Path) -> None:
    storage = tmp_path / STORAGE_NAME
    command = [sys.executable, "-m", "pipelines", *COMPARE, "--storage", str(storage)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ.copy()) as process:
        deadline = time.monotonic() + 300
        while not ((storage / "runs").exists() and is_running(storage, "decoder", "autoencoder")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == StoppedError.exit_code
    assert Counter(run["state"] for run in runs_of(storage)) == {"done": 1, "stopped": 2}

    result = call_apart(*COMPARE, "--storage", storage)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = runs_of(storage)
    done = Counter(
        (name, event["fingerprint"])
        for run in runs
        for name, event in run["stages"].items()
        if event["state"] == "done"
    )
    assert set(done.values()) == {1}, done
    assert {"prior", "decoder", "autoencoder", "latent_diffusion"} <= {name for name, _ in done}
    latest = {
        (run["config"]["system"], run["config"]["evaluate"]["sampling"].get("image_embedding")): run
        for run in runs
        if "evaluate" in run["stages"]
    }
    first, second, latent = (
        latest["unclip", "prior"],
        latest["unclip", "text_embedding"],
        latest["latent_diffusion", None],
    )
    assert latent["started"] < first["ended"], "it shares nothing, so it does not wait"
    assert second["started"] > max(first["stages"][name]["at"] for name in ("prior", "decoder", "upsampler-64"))
    assert "unclip/text_embedding: decoder" in result.stdout
