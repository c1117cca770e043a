"""A comparison of systems that run side by side: their order, and whole ones that are stopped and resumed."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import side_by_side
from pipelines.comparison import EVALUATE, Entry, find_entries
from pipelines.dag import up_to
from pipelines.pipeline import compose
from pipelines.side_by_side import Plan, _run_side_by_side, _Waiting, first_alone
from tasks.lock import TABLES
from tasks.snapshots import Snapshot
from tasks.stage import WAIT_SECONDS, Artifact
from tasks.stages.evaluate import heldout_pairs
from tasks.store import Store
from tasks.tombstones import Entry as Tombstone
from tasks.tombstones import write_entries
from tests.pipelines.command_line import ROOT, STORAGE_NAME, call_apart, read_record
from unclip.errors import AlreadyRunningError, StageError, StoppedError, StorageError

DATASET = ("ingest", "download", "filter", "dedup", "clip", "embed", "curate")


def entries_in(store: Store, *names: str) -> list[Entry]:
    return find_entries("tiny", None, ["scenes.port=8767"], store.root, names)


def make(store: Store, plan: Plan, *stages: str) -> None:
    """Commit results of stages, as if they had been made."""
    digests: dict[str, str] = {}
    for name, node in plan.dag.items():
        made_by = node.stage.fingerprint(node.config, [digests.get(parent, "") for parent in node.parents], store)
        digests[name] = f"{name} {made_by}"
        if name in stages:
            artifact = Artifact(name, made_by, store.uri(name), digests[name], {}, 1.0)
            store.write_json(dataclasses.asdict(artifact), "stages", name, f"{made_by}.json")


def test_an_entry_waits_for_what_another_makes_and_others_go_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    names = ("unclip", "unclip/text_embedding", "glide", "latent_diffusion", "imagen")
    plans = [Plan(entry, up_to(compose(entry.config), EVALUATE)) for entry in entries_in(store, *names)]
    unclip, text, glide, latent, imagen = plans
    make(store, unclip, *DATASET)
    assert first_alone(plans, [], store) is unclip
    assert first_alone([text, glide], [unclip], store) is None, "they need its decoder and its upsamplers"
    assert first_alone([text, glide, latent, imagen], [unclip], store) is latent
    assert first_alone([imagen], [unclip, latent], store) is None, "both are going to write tables"
    make(store, unclip, *DATASET, "upsampler-32", "upsampler-64")
    assert first_alone([text, glide], [unclip, latent], store) is glide
    make(store, unclip, *DATASET, "upsampler-32", "upsampler-64", "prior", "decoder")
    assert first_alone([text, glide], [unclip, latent], store) is text
    make(store, latent, *DATASET, "autoencoder", "latents")
    assert first_alone([imagen], [unclip, latent], store) is imagen


def test_a_takedown_changes_what_waiting_entries_claim(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    plans = [Plan.of(entry) for entry in entries_in(store, "unclip", "ddpm", "guided_diffusion")]
    make(store, plans[0], *DATASET)
    running = {"unclip": plans[0]}
    assert not any(TABLES in plan.claims(store) for plan in plans)
    waiting = _Waiting(plans[1:], store, None)
    write_entries(store, {Tombstone("key", "0" * 32, "")})
    assert waiting.take({}) is not plans[1] and TABLES in waiting.plans[0].claims(store)
    [other] = waiting.plans
    assert waiting.take({"ddpm": Plan.of(plans[1].entry)}) is None, "one of them makes the dataset anew"
    make(store, other, *DATASET)
    assert waiting.take({"ddpm": Plan.of(plans[1].entry), **running}) is None, "they share an upsampler"
    make(store, other, *DATASET, "upsampler-32", "upsampler-64")
    assert waiting.take({"ddpm": Plan.of(plans[1].entry), **running}) is other


def ends_of(store: Store, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, list[BaseException | None]]) -> Any:
    """Run entries, each of whose runs ends with the next of its outcomes; returns the errors, by label."""
    plans = [Plan.of(entry) for entry in entries_in(store, *outcomes)]

    def run(pipeline: str, config: Any, until: str, writes_results: bool, label: str) -> None:
        if error := outcomes[label].pop(0):
            raise error
        plan = next(plan for plan in plans if plan.entry.name == label)
        make(store, plan, *plan.dag)

    monkeypatch.setattr(side_by_side, "run_pipeline", run)
    monkeypatch.setattr(side_by_side, "start_ray", lambda configs: True)
    monkeypatch.setattr(side_by_side, "check_cluster", lambda config: None)
    monkeypatch.setattr(side_by_side, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(side_by_side, "RETRY_SECONDS", 0.01)
    failures = _run_side_by_side("tiny", plans, store, None)
    assert not any(outcomes.values())
    return failures


def test_an_entry_whose_tables_another_process_holds_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = AlreadyRunningError("a refresh uses the tables of this storage")
    failures = ends_of(Store(str(tmp_path)), monkeypatch, {"unclip": [held, held, None], "ddpm": [None]})
    assert failures == {}
    assert capsys.readouterr().out.count("unclip waits: a refresh uses") == 1


def test_an_entry_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(side_by_side.time, "monotonic", lambda: now[0])
    [plan] = [Plan.of(entry) for entry in entries_in(Store(str(tmp_path)), "ddpm")]
    waiting = _Waiting([], Store(str(tmp_path)), None)
    assert waiting.put_back(plan, AlreadyRunningError("held"))
    assert waiting.take({}) is None, "not at once"
    now[0] += WAIT_SECONDS
    assert waiting.take({}) is plan and not waiting.put_back(plan, AlreadyRunningError("held"))


def test_an_entry_that_breaks_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: dict[str, list[BaseException | None]] = {
        "unclip": [OSError("the bucket does not answer")],
        "ddpm": [StageError("denoiser failed")],
        "glide": [None],
    }
    failures = ends_of(Store(str(tmp_path)), monkeypatch, outcomes)
    assert {label: str(error) for label, error in failures.items()} == {
        "unclip": "OSError: the bucket does not answer",
        "ddpm": "denoiser failed",
    }
    assert "Traceback" in capsys.readouterr().out


def test_a_storage_that_does_not_answer_ends_no_entry_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    first, second = (Plan.of(entry) for entry in entries_in(store, "unclip", "ddpm"))
    waiting = _Waiting([second], store, None)

    def fail(*_: Any) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(side_by_side, "first_alone", fail)
    assert waiting.take({"unclip": first}) is None and waiting.plans == [second]
    with pytest.raises(StorageError):
        waiting.take({})


def test_each_entry_is_compared_once(tmp_path: Path) -> None:
    names = ("latent-diffusion", "latent_diffusion", "unclip/", "unc", "unclip/text_embedding")
    found = [entry.name for entry in entries_in(Store(str(tmp_path)), *names)]
    assert found == ["latent_diffusion", "unclip", "unclip/text_embedding"]


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
