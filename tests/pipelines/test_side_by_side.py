"""A comparison of systems that run side by side, stopped and resumed."""

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.snapshots import Snapshot
from tasks.stages.evaluate import heldout_pairs
from tests.pipelines.command_line import ROOT, STORAGE_NAME, call_apart, read_record
from unclip.errors import StoppedError

COMPARE = ("compare", "tiny", "--systems", "unclip,unclip/text_embedding,latent_diffusion")


def start(storage: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipelines", *arguments, "--storage", str(storage)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_running(process: "subprocess.Popen[str]", storage: Path, *stages: str) -> None:
    deadline = time.monotonic() + 300
    while not is_running(storage, *stages):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def runs_of(storage: Path) -> list[dict[str, Any]]:
    """Records of runs, each with the events of its stages."""
    found = []
    for folder in sorted(path.parent for path in storage.glob("runs/*/run.json")):
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
    with start(storage, *COMPARE) as process:
        wait_until_running(process, storage, "decoder", "autoencoder")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == StoppedError.exit_code
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


@pytest.mark.slow  # trains two systems
def test_a_takedown_while_a_system_writes_tables_leaves_the_cluster_to_the_others(tmp_path: Path) -> None:
    storage, compare = tmp_path / STORAGE_NAME, ("compare", "tiny", "--systems", "latent_diffusion,unclip")
    with start(storage, *compare) as process:
        wait_until_running(process, storage, "latents")
        [curated] = (storage / "stages" / "curate").glob("*.json")
        facts = read_record(storage, "stages", "curate", curated.name)["facts"]
        key = heldout_pairs(Snapshot.of(facts))["key"][0].as_py()
        taken_down = call_apart("takedown", "--key", key, "--wait", 0, "--storage", storage)
        assert taken_down.returncode == 0 and not list((storage / "takedowns").glob("*.json")), taken_down.stdout
        output, _ = process.communicate(timeout=400)
    states = {run["system"]: run["state"] for run in runs_of(storage) if "evaluate" in run["stages"]}
    assert process.returncode != 0 and "takedown was recorded meanwhile" in output and "Traceback" not in output, output
    assert states["latent_diffusion"] == "failed" and states["unclip"] == "done", output
    assert "takedown carried out" in output and list((storage / "takedowns").glob("*.json"))

    again = call_apart(*compare, "--storage", storage)
    assert again.returncode == 0, again.stdout + again.stderr
