"""The whole DAG with a tiny configuration: run, run again, killed, and as a Ray job."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.compute as pc
import pytest

from pipelines import dag as dags
from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.published import find_stack
from tasks import ranges, tables, verification
from tasks.database import database_uri
from tasks.lineage.evaluations import REFERENCE
from tasks.snapshots import Snapshot
from tasks.stages.evaluate import heldout_pairs
from tasks.store import Store
from tasks.tracking import PREVIEW_KEYS, PREVIEWS
from tests.pipelines import sockets
from tests.pipelines.command_line import STORAGE_NAME, call, call_apart, call_json, cpu_seconds_apart, read_record
from tests.tasks.datasets import holders
from tests.unclip.damage import damaged
from unclip import files, imaging
from unclip.models.small_images import ImageSampling
from unclip.systems.glide.stack import GlideSampling, GlideStack
from unclip.systems.system import ClipFiles, StackFiles, load_system, sample_captions
from unclip.training.film import FILM_STRIP

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STAGES = [
    "ingest",
    "download",
    "filter",
    "dedup",
    "clip",
    "embed",
    "curate",
    "report",
    "prior",
    "decoder",
    "upsampler-32",
    "upsampler-64",
    "evaluate",
    "publish",
]

pytestmark = pytest.mark.timeout(900)


def run(*arguments: object) -> str:
    """Run a command; return its output."""
    result = call_apart(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_here(*arguments: object) -> str:
    """Run a command in this process; return its output."""
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def records(storage: Path) -> dict[str, dict[str, Any]]:
    """Return the newest artifact of each stage, and the newest reference."""
    found = {}
    for stage in (storage / "stages").iterdir():
        if made := sorted(stage.iterdir(), key=lambda path: path.stat().st_mtime):
            found[stage.name] = read_record(storage, "stages", stage.name, made[-1].name)
    return found


def states(storage: Path, *assignments: str) -> dict[str, str]:
    config = prepare(load("tiny", None, assignments, str(storage)))
    return {name: state.label for name, state in dags.states(compose(config), Store(str(storage))).items()}


RUN = ("run", "tiny", "--set", "resources.upsamplers.32.num_workers=2")
"""One training has two workers, which run on Ray Train."""
CANARY = "c4n4ry"
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Storage of a finished run, with what it printed; the sockets that it listened on, and places that hold the canary."""
    storage = tmp_path_factory.mktemp("finished") / STORAGE_NAME
    scratch = Path(f"/tmp/unclip-{os.getpid()}-run")  # socket paths must be short
    environment = {**os.environ, **dict.fromkeys(SECRETS, CANARY), "RAY_TMPDIR": str(scratch), "HOME": str(scratch)}
    environment["MPLCONFIGDIR"] = matplotlib.get_cachedir()
    scratch.mkdir()
    try:
        output = scratch / "printed.txt"
        command = [sys.executable, "-m", "pipelines", *RUN, "--storage", storage]
        with output.open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            with sockets.watched(process.pid) as listeners:
                code = process.wait()
        printed = output.read_text()
        assert code == 0, printed
        (storage / "printed.txt").write_text(printed)
        logs = [path for path in scratch.rglob("*") if path.is_file()]
        assert [path for path in logs if path.name.startswith("worker-")], "Ray's logs are elsewhere"
        found = [str(path) for path in holders(CANARY.encode(), scratch, storage)]
        left = {"canary": found, "tokens": [str(path) for path in logs if path.name == "auth_token"]}
        left["listeners"] = [
            [listener.process, listener.is_loopback, reached] for listener, reached in listeners.items()
        ]
        (storage / "left.json").write_text(json.dumps(left))
    finally:
        shutil.rmtree(scratch)
    yield storage


def test_a_run_goes_from_urls_to_images(finished: Path) -> None:
    """In a folder with an awkward name (F68)."""
    summary = read_record(finished, "results", "tiny", "summary.json")
    rows = summary["rows"]
    assert rows["in"] == 132 == rows["kept"] + rows["dropped"] + rows["failed"]
    assert rows["kept"] == 120
    reasons = summary["reasons"]
    assert sum(reasons.values()) == rows["dropped"] + rows["failed"]
    assert {"http_404", "not_an_image", "timeout", "blocked_address", "duplicate_image", "too_small"} <= reasons.keys()
    assert (
        set(summary["accuracy"])
        >= {"colour", "background", "size", "shape"}
        == set(summary["accuracy_unseen"]) - {"place"}
    )
    assert set(summary["seconds"]) == set(STAGES)
    assert (finished / "results" / "tiny" / "heldout.png").read_bytes().startswith(b"\x89PNG")
    printed = (finished / "printed.txt").read_text()
    for words in (
        "132 in = 120 kept",
        "held-out captions",
        "unclip ui --storage",
        "http_404",
        str(finished / "results"),
    ):
        assert words in printed


def test_f90_a_run_leaves_no_secret_of_its_environment(finished: Path) -> None:
    """Neither in the storage, nor in MLflow's database, nor in Ray's logs, nor on the console."""
    left = json.loads((finished / "left.json").read_text())
    assert left["canary"] == [] == left["tokens"]


def test_f91_a_run_listens_on_the_loopback_address_only(finished: Path) -> None:
    """Ray's processes, and the stores of the process groups of trainings."""
    listeners = json.loads((finished / "left.json").read_text())["listeners"]
    names = " ".join(process for process, _, _ in listeners)
    assert all(
        name in names for name in ("gcs_server", "raylet", "RuntimeEnvAgent", "TrainController", "RayTrainWorker")
    )
    assert [process for process, is_loopback, _ in listeners if not is_loopback] == []


@pytest.mark.skipif(sockets.own_address() is None, reason="this machine has a loopback address only")
def test_f91_no_socket_of_a_run_is_reached_from_another_address(finished: Path) -> None:
    listeners = json.loads((finished / "left.json").read_text())["listeners"]
    assert listeners and [process for process, _, is_reached in listeners if is_reached] == []


def test_tables_hold_every_row_once_and_embeddings_match_their_rows(finished: Path) -> None:
    artifacts_by_stage = records(finished)
    snapshot = artifacts_by_stage["curate"]["facts"]["snapshot"]
    images = tables.read(snapshot["images"], snapshot["images_version"], ["key", "caption", "jpg"])
    embeddings = tables.read(snapshot["embeddings"], snapshot["embeddings_version"])
    selection = ranges.read_all(snapshot["selection"])
    kept = selection.filter(pc.equal(selection.column("status"), "kept")).column("key").to_pylist()
    assert embeddings.column("key").to_pylist() == sorted(set(kept)) and len(kept) == 120
    assert len(set(images.column("key").to_pylist())) == images.num_rows
    captions = dict(zip(images.column("key").to_pylist(), images.column("caption").to_pylist(), strict=True))
    assert all(captions[row["key"]] == row["caption"] for row in embeddings.select(["key", "caption"]).to_pylist())

    from unclip.data import vectors
    from unclip.models.clip import Clip
    from unclip.training.batches import load_images

    clip = Clip.load(artifacts_by_stage["clip"]["facts"]["model"])
    jpgs = dict(zip(images.column("key").to_pylist(), images.column("jpg").to_pylist(), strict=True))
    some = embeddings.column("key").to_pylist()[::17]
    again = clip.embed_images(clip.resize(load_images([jpgs[key] for key in some], 64))).numpy()
    stored = vectors(embeddings.column("image_embedding"))[::17]
    assert ((again * stored).sum(axis=1) > 0.999).all()
    assert ((again @ stored.T).argmax(axis=1) == range(len(some))).all()


def test_mlflow_has_a_run_for_each_stage_and_the_published_stack(finished: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(database_uri(f"{finished}/mlflow.db"))
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["unclip.stage"]: run for run in runs if run is not parent}
    assert set(children) == set(STAGES)
    assert parent.data.params["prior.model.depth"] == "1" and parent.data.metrics["rows.kept"] == 120
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"config.json", "dag.mmd", "dag.png", "summary.json"} <= artifacts
    decoder = children["decoder"]
    assert {"loss", "samples_per_second"} <= decoder.data.metrics.keys()
    [dataset] = decoder.inputs.dataset_inputs
    assert dataset.dataset.digest == records(finished)["curate"]["digest"][:36]
    assert "previews" in {item.path for item in client.list_artifacts(decoder.info.run_id)}
    artifacts_by_stage = records(finished)
    assert decoder.data.tags["unclip.uri"].endswith(artifacts_by_stage["decoder"]["uri"].removeprefix(str(finished)))
    snapshot = Snapshot.of(artifacts_by_stage["curate"]["facts"])
    shown_keys = snapshot.heldout_rows()["key"].to_pylist()[:16]
    for stage in ("decoder", "upsampler-32", "upsampler-64"):  # a takedown finds the previews of a row by these keys
        shown = Path(client.download_artifacts(children[stage].info.run_id, PREVIEW_KEYS, str(tmp_path)))
        assert json.loads(shown.read_text()) == shown_keys != []
        folder = Path(artifacts_by_stage[stage]["uri"]).parent
        assert json.loads((folder / PREVIEW_KEYS).read_text()) == shown_keys
        strip = Path(client.download_artifacts(children[stage].info.run_id, f"{PREVIEWS}/{FILM_STRIP}", str(tmp_path)))
        assert strip.read_bytes() == (folder / PREVIEWS / FILM_STRIP).read_bytes()
    assert {"heldout.png", "confusion_heldout.png", "previews"} <= {
        item.path for item in client.list_artifacts(children["evaluate"].info.run_id)
    }
    version = client.get_model_version_by_alias("unclip-tiny", "champion")
    assert str(version.version) == "1" and version.tags["unclip.promotion"] == "the first champion"
    assert version.tags["unclip.snapshot"] == artifacts_by_stage["curate"]["digest"]
    assert version.tags["unclip.digest"] == artifacts_by_stage["publish"]["digest"]
    for each in runs:
        assert each.data.tags["mlflow.source.name"] == "unclip run tiny" and each.data.tags["mlflow.user"]
        assert each.data.tags["unclip.version"] == importlib.metadata.version("unclip")
    [dataset] = parent.inputs.dataset_inputs
    assert dataset.dataset.digest == artifacts_by_stage["curate"]["digest"][:36]
    for stage in ("prior", "decoder", "upsampler-32", "upsampler-64"):
        assert "system/cpu_utilization_percentage" in children[stage].data.metrics, stage
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_registered_version_has_a_card_a_logged_model_and_a_flavour_that_samples(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas

    tracking_uri = database_uri(f"{finished}/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    client = mlflow.MlflowClient(tracking_uri)
    version = client.get_model_version_by_alias("unclip-tiny", "champion")
    facts = records(finished)["evaluate"]["facts"]
    assert "120 kept" in version.description and f"{facts['captions']['heldout']} captions" in version.description
    assert "](model-versions/get-artifact?name=unclip-tiny&version=1&path=images/preview.png)" in version.description
    assert len(version.description) <= 5000 and client.get_registered_model("unclip-tiny").description
    [output] = client.get_run(version.run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert logged.status == "READY" and version.source == logged.artifact_location
    assert logged.tags["mlflow.note.content"] == version.description
    assert {metric.key: metric.value for metric in logged.metrics}["heldout.clip_score"] == pytest.approx(
        facts["metrics"]["heldout"]["clip_score"]
    )
    folder = Path(records(finished)["publish"]["uri"]).parent
    card = (folder / "README.md").read_text()
    assert card.startswith("# unclip-tiny") and str(finished) not in card
    assert all((folder / path).is_file() for path in re.findall(r"\]\((images/[^)]*)\)", card))

    model = mlflow.pyfunc.load_model("models:/unclip-tiny@champion")
    caption = "a large red circle"
    answer = model.predict(pandas.DataFrame({"caption": [caption] * 2, "seed": [5] * 2}))
    stack = load_system(find_stack(str(finished), "unclip-tiny"))
    expected = imaging.to_uint8(sample_captions(stack, [caption] * 2, seed=5))
    assert all((imaging.from_png(data) == image).all() for data, image in zip(answer["png"], expected, strict=True))


def test_an_evaluation_has_intervals_scores_and_a_reference(finished: Path) -> None:
    made = records(finished)
    facts = made["evaluate"]["facts"]
    assert facts["references"]["reference"]["uri"] == made[REFERENCE]["uri"]
    assert made[REFERENCE]["facts"]["snapshot"] == made["curate"]["digest"]
    heldout = facts["metrics"]["heldout"]
    expected = {"clip_score", "clip_r_precision", "clip_frechet_distance", "clip_kid", "cmmd", "clip_precision"}
    expected |= {"accuracy.all", "embedding_cosine", "embedding_recall_at_1", "clip_coverage"}
    assert expected <= heldout.keys() and not [name for name in heldout if "inception" in name]
    for group, intervals in facts["intervals"].items():
        for name, (low, high) in intervals.items():
            assert low <= facts["metrics"][group][name] <= high, (group, name)
    assert facts["intervals"]["heldout"]["clip_score"][0] < facts["intervals"]["heldout"]["clip_score"][1]
    assert facts["counts"]["heldout"]["clip_score"] == facts["captions"]["heldout"]
    scores = tables.read_file(facts["scores"])
    assert scores.num_rows == sum(facts["captions"].values())
    rows = scores.filter(pc.equal(scores["group"], "heldout"))
    assert pc.mean(rows["clip_score"]).as_py() == pytest.approx(heldout["clip_score"], abs=1e-6)
    assert pc.mean(rows["accuracy.all"]).as_py() == pytest.approx(heldout["accuracy.all"])
    snapshot = Snapshot.of(made["curate"]["facts"])
    captions = dict(zip(*(snapshot.heldout_rows()[name].to_pylist() for name in ("key", "caption")), strict=True))
    assert [captions[key] for key in rows["key"].to_pylist()] == rows["caption"].to_pylist()
    assert scores.filter(pc.equal(scores["group"], "unseen"))["key"].null_count == facts["captions"]["unseen"] > 0


def test_the_published_stack_samples_with_both_upsamplers(finished: Path) -> None:
    stack = load_system(records(finished)["publish"]["uri"])
    assert [(each.config.low_res_size, each.config.output_size) for each in stack.upsamplers] == [(16, 32), (32, 64)]
    assert sample_captions(stack, ["a large red circle"]).shape == (1, 3, 64, 64)
    assert len({records(finished)[f"upsampler-{resolution}"]["digest"] for resolution in (32, 64)}) == 2


def test_a_model_is_stored_once_and_mlflow_loads_the_registered_version(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    places: dict[str, set[int]] = {}
    for path in finished.rglob("*model.safetensors"):
        places.setdefault(files.digest(str(path)), set()).add(path.stat().st_ino)
    assert len(places) == 5 and {len(inodes) for inodes in places.values()} == {1}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database_uri(str(finished / "mlflow.db")))
    folder = str(download_artifacts("models:/unclip-tiny@champion"))
    assert "mlflow-artifacts" in folder and load_system(f"{folder}/stack").image_size == 64


@contextlib.contextmanager
def moved_away(path: Path) -> Iterator[None]:
    """Give a file another name for the duration of a block."""
    away = path.rename(path.with_suffix(".moved"))
    try:
        yield
    finally:
        away.rename(path)


def test_a_storage_is_covered_by_digests_and_400_flipped_bits_are_found(finished: Path) -> None:
    """F78, F79."""
    document = call_json("verify", "--storage", finished)
    assert document["problems"] == []
    assert set(document["not_covered"]) == {"artifact of MLflow", "database of MLflow"}
    items = [item for item in verification.survey(Store(str(finished))) if item.size < 1_000_000]
    covered = [item for item in items if verification.state_of(item) == "sound"]
    rng = random.Random(0)
    for _ in range(400):
        item = rng.choice(covered)
        with damaged(item.uri, rng.randrange(8 * item.size)):
            assert verification.state_of(item) == "damaged", item.uri

    [part, *_] = finished.glob("images/*/*.parquet")
    report = next((finished / "artifacts" / "report").rglob("report.html"))
    with damaged(part, rng.randrange(8 * part.stat().st_size)), moved_away(report):
        found = {problem["file"]: problem for problem in call_json("verify", "--storage", finished, code=1)["problems"]}
        assert {path: problem["problem"] for path, problem in found.items()} == {
            str(part): "damaged",
            str(report): "missing",
        }
        assert found[str(report)]["remedy"].endswith(f"`unclip run tiny --storage {shlex.quote(str(finished))}`")
        result = call("verify", "--storage", finished, "--jobs", 2)
        assert (
            result.returncode == 1
            and "2 damaged, missing or unreadable" in result.stdout
            and str(part) in result.stdout
        )
    assert run_here("verify", "--storage", finished).endswith("0 damaged, missing or unreadable\n")


def test_f81_a_refresh_with_nothing_new_keeps_the_summary(finished: Path) -> None:
    path = finished / "results" / "tiny" / "summary.json"
    before = path.read_text()
    assert "everything is up to date" in run_here("refresh", "tiny", "--storage", finished)
    assert path.read_text() == before and {"accuracy", "clip_score", "stack", "registered"} <= json.loads(before).keys()


def test_data_show_lists_all_models_trained_on_a_row(finished: Path) -> None:
    key = Snapshot.of(records(finished)["curate"]["facts"]).open_places("train").keys(np.arange(1))[0]
    printed = run_here("data", "show", key, "--storage", finished)
    assert "models prior, decoder, upsampler-32, upsampler-64" in printed
    assert "unclip-tiny/1    champion, version 1 (train)" in printed
    [model] = call_json("data", "show", key, "--storage", finished)["model_versions"]
    assert model["digest"] == records(finished)["publish"]["digest"]


def test_a_published_version_leads_back_to_its_dataset_its_list_and_the_runs_of_all_stages(finished: Path) -> None:
    shown = call_json("models", "show", "unclip-tiny", "--storage", finished)
    assert shown["version"] == "1" and shown["aliases"] == ["champion"] and shown["image_size"] == 64
    assert shown["snapshot"] == records(finished)["curate"]["digest"] == shown["lineage"]["snapshot"]
    [dataset] = shown["lineage"]["dataset_versions"]
    [run_id] = [path.name for path in (finished / "runs").iterdir() if (path / "publish.json").exists()]
    assert dataset["number"] == 1 and dataset["counts"]["kept"] == 120 and dataset["runs"] == [run_id]
    [urls] = dataset["lists"]
    assert urls.startswith(str(finished / "scenes")) and Path(urls).exists()
    stages = {stage["stage"]: stage for stage in shown["lineage"]["stages"]}
    assert set(stages) == set(STAGES) and {stage["run"] for stage in stages.values()} == {run_id}
    assert all(stage["fingerprint"] == records(finished)[name]["fingerprint"] for name, stage in stages.items())
    printed = run_here("models", "list", "--storage", finished)
    assert "unclip-tiny/1  champion" in printed and "the first champion" in printed


@pytest.mark.slow
def test_f150_a_candidate_is_compared_with_the_champion_which_is_sampled_for_it(finished: Path, tmp_path: Path) -> None:
    """Neither of these models has learned anything: fewer steps are not clearly better."""
    storage = tmp_path / STORAGE_NAME
    shutil.copytree(finished, storage)
    shutil.rmtree(storage / "scores")
    printed = run("run", "tiny", "--set", "evaluate.sampling.decoder.num_steps=1", "--storage", storage)
    assert "published  unclip-tiny/2 is the challenger: " in printed and "than version 1: accuracy.all" in printed
    assert "--model unclip-tiny@challenger" in printed and len(list((storage / "scores").iterdir())) == 2
    folders = {model: find_stack(str(storage), model) for model in (None, "unclip-tiny", "unclip-tiny@challenger")}
    assert folders[None] == folders["unclip-tiny"] != folders["unclip-tiny@challenger"]
    run_here("models", "promote", "unclip-tiny@challenger", "--storage", storage)
    assert find_stack(str(storage), None) == folders["unclip-tiny@challenger"]
    run_here("models", "rollback", "unclip-tiny", "--storage", storage)
    assert find_stack(str(storage), None) == folders[None]


def test_a_second_run_does_nothing_and_prints_the_same_summary(finished: Path) -> None:
    before = sorted((finished / "runs").iterdir())
    times = [cpu_seconds_apart()]
    for command in ("plan", "run"):
        printed = run(command, "tiny", "--storage", finished)
        times.append(cpu_seconds_apart())
    assert times[2] - times[1] < 3 * (times[1] - times[0]), "more than a plan, which starts nothing"
    assert sorted((finished / "runs").iterdir()) == before
    assert "everything is up to date" in printed and "132 in = 120 kept" in printed


@pytest.mark.parametrize(
    ("assignment", "to_run"),
    [
        ("prior.trainer.seed=1", {"prior", "evaluate", "publish"}),
        ("upsamplers.64.model.degradation.blur_prob=0.1", {"upsampler-64", "evaluate", "publish"}),
        ("upsamplers.64=none", {"evaluate", "publish"}),
        ("evaluate.seed=1", {"evaluate", "publish"}),
        ("resources.num_workers=2", set()),
        (
            "filter.min_side=33",
            {
                "filter",
                "dedup",
                "clip",
                "embed",
                "curate",
                "report",
                "prior",
                "decoder",
                "upsampler-32",
                "upsampler-64",
                "evaluate",
                "publish",
            },
        ),
    ],
)
def test_a_change_reruns_what_depends_on_it(finished: Path, assignment: str, to_run: set[str]) -> None:
    found = states(finished, assignment)
    assert {name for name, label in found.items() if label != "cached"} == to_run


def test_status_and_samples(finished: Path, tmp_path: Path) -> None:
    printed = run_here("status", "--storage", finished)
    assert "done" in printed and all(f" {name} " in printed for name in STAGES)
    caption = "a small yellow star on a purple background"
    grids = []
    for options in (["--seed", 1], ["--seed", 1, "--model", "unclip-tiny"], ["--seed", 2]):
        grid = tmp_path / "grid.png"
        run_here("sample", caption, "--num", 4, "--guidance-scale", 2, *options, "--out", grid, "--storage", finished)
        grids.append(grid.read_bytes())
    assert grids[0] == grids[1] != grids[2]
    # the stack includes the statistics of its dataset
    run_here("probe", tmp_path / "grid.png", "--components", "1,64", "--out", tmp_path / "p.png", "--storage", finished)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a cluster by `ray start --head`; yield the environment for its clients."""
    scratch = f"/tmp/unclip-{os.getpid()}"  # socket paths must be short
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_TMPDIR": scratch}
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **paths, **access, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8299"}
    head = "ray start --head --block --num-cpus=2 --port=6399 --dashboard-port=8299 --dashboard-agent-listen-port=52399"
    with open(tmp_path / "head.log", "w") as log:
        process = subprocess.Popen(
            head.split(), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while (listing := subprocess.run(["ray", "job", "list"], env=environment, capture_output=True)).returncode:
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, listing.stderr.decode()[-2000:]
            yield environment
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # `ray stop` takes half a minute
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.parametrize("stage", [pytest.param("clip", marks=pytest.mark.slow), "decoder"])
def test_f36_a_killed_run_resumed_as_a_ray_job_has_the_same_tables_and_models(
    finished: Path, tmp_path: Path, cluster: dict[str, str], stage: str
) -> None:
    """Kills the driver during a training; resumes by `ray job submit`. test_data_half.py covers kills elsewhere.

    CLIP is trained by a run from an empty storage, the decoder in a copy of the finished one.
    """
    storage = tmp_path / "storage"
    if stage == "decoder":
        shutil.copytree(finished, storage)
        for folder, name in itertools.product(("stages", "artifacts"), (stage, "evaluate", "publish")):
            shutil.rmtree(storage / folder / name)
    command = ["unclip", *RUN, "--storage", str(storage)]
    process = subprocess.Popen([sys.executable, "-m", "pipelines", *command[1:]], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any(storage.glob(f"artifacts/{stage}/*/checkpoints/*/manifest.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "killed" in run_here("status", "--storage", storage)
    assert stage not in records(storage)

    submit = ["ray", "job", "submit", "--working-dir", ".", "--", *command]
    job = subprocess.run(submit, cwd=ROOT, env=cluster, capture_output=True, text=True)
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-2000:]
    assert "succeeded" in job.stdout and "132 in = 120 kept" in job.stdout
    undisturbed = {name: record["digest"] for name, record in records(finished).items()}
    assert {name: record["digest"] for name, record in records(storage).items()} == undisturbed


def test_a_model_trained_by_itself_equals_the_one_that_the_pipeline_trains(finished: Path) -> None:
    expected = records(finished)["prior"]["digest"]
    for folder in ("stages", "artifacts"):
        shutil.rmtree(finished / folder / "prior")
    printed = run("train", "prior", "tiny", "--storage", finished)
    assert "✓ prior" in printed and (Path(printed.splitlines()[-1]) / "model.safetensors").exists()
    assert records(finished)["prior"]["digest"] == expected
    assert set(states(finished).values()) == {"cached"}
    logged = last_metrics(finished, "prior")
    assert {"relative_loss", "validation_loss", "validation_relative_loss", "gradient_norm"} <= set(logged)


GLIDE = ("tiny", "--system", "glide", "--set", "with_noised_clip=true")
GLIDE_STAGES = {"glide", "noised_clip", "evaluate", "publish"}


def test_glide_is_trained_on_the_dataset_of_unclip_and_shares_its_upsamplers(finished: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(finished, storage)
    for trained in ((), ("glide",), ("glide", "noised_clip")):
        for part in trained[-1:]:
            run_here("train", part, *GLIDE, "--storage", storage)
        document = call_json("plan", *GLIDE, "--storage", storage)
        assert {stage["name"] for stage in document["stages"] if stage["state"] != "cached"} == GLIDE_STAGES - {
            *trained
        }
    found = records(storage)
    models = {name: found[name]["uri"] for name in ("glide", "upsampler-32", "upsampler-64", "noised_clip")}
    clip = found["clip"]["facts"]
    system = GlideStack.load(StackFiles("glide", models, ClipFiles(clip["model"], clip["pretrained"])))
    settings = GlideSampling(glide=ImageSampling(num_steps=2, clip_guidance_scale=1.0))
    images = sample_captions(system, ["a red circle"], sampling=settings)
    assert system.noised_clip is not None and images.shape == (1, 3, 64, 64) and images.isfinite().all()


@pytest.mark.slow
def test_every_command_takes_a_stack_of_glide(finished: Path, tmp_path: Path) -> None:
    storage, out = tmp_path / STORAGE_NAME, tmp_path / "out.png"
    shutil.copytree(finished, storage)
    printed = run("run", *GLIDE, "--storage", storage)
    assert "held-out captions" in printed
    assert set(records(storage)) == {*STAGES, *GLIDE_STAGES, REFERENCE}
    assert "everything is up to date" in run("run", *GLIDE, "--storage", storage)
    assert call_json("verify", "--storage", storage)["problems"] == []
    caption, grids = "a small yellow star on a purple background", []
    for options in (
        [],
        ["--steps", 3],
        ["--guidance-scale", 2],
        ["--sampler", "ddpm"],
        ["--negative", "a red circle"],
        ["--set", "glide.clip_guidance_scale=2"],
        ["--image", out, "--strength", 0.5],
        ["--model", "unclip-tiny"],
    ):
        run_here("sample", caption, "--num", 1, *options, "--out", out, "--storage", storage)
        grids.append(out.read_bytes())
    assert len(set(grids)) == len(grids)
    given = tmp_path / "each" / "000.png"
    run_here("sample", caption, "--num", 1, "--each", given.parent, "--out", out, "--storage", storage)
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    mask_path = tmp_path / "mask.png"
    mask_path.write_bytes(imaging.png(mask))
    run_here(
        "inpaint", given, mask_path, caption, "--num", 2, "--out", tmp_path / "inpainted.png", "--storage", storage
    )
    refused = call("vary", given, "--out", tmp_path / "varied.png", "--storage", storage)
    assert refused.returncode == 2 and "of the system unclip" in refused.stderr
    key = json.loads((Path(records(storage)["glide"]["uri"]).parent / PREVIEW_KEYS).read_text())[0]
    document = call_json("takedown", "--key", key, "--storage", storage)
    assert {"glide", "publish"} <= {each["name"] for each in document["runs"]}
    assert "glide-tiny" in [model["name"] for model in document["models"]]


@pytest.mark.slow
def test_captions_and_reconstructions_of_a_row_that_is_taken_down_are_deleted_everywhere(
    finished: Path, tmp_path: Path
) -> None:
    storage, shown = tmp_path / STORAGE_NAME, [f"{PREVIEWS}/{name}.png" for name in ("heldout", "reconstructions")]
    shutil.copytree(finished, storage)
    run("run", "tiny", "--set", "evaluate.num_reconstructed=4", "--storage", storage)
    places = [path.parents[1] for path in storage.rglob(shown[1])]
    assert {path.relative_to(storage).parts[0] for path in places} == {"artifacts", "results", "mlflow-artifacts"}
    images = [(storage / "results" / "tiny" / each).read_bytes() for each in shown]
    keys = json.loads((storage / "results" / "tiny" / PREVIEW_KEYS).read_text())
    pairs = heldout_pairs(Snapshot.of(records(storage)["curate"]["facts"]))
    assert keys[:4] == pairs["key"].to_pylist()[:4]
    document = call_json("takedown", "--key", keys[1], "--storage", storage)
    [logged] = [path.parent.name for path in places if "mlflow-artifacts" in path.parts]
    assert logged in document["deleted_previews"]
    assert not any((path / PREVIEWS).exists() for path in places)
    assert not [path for path in storage.rglob("*") if path.is_file() and path.read_bytes() in images]
    [without_captions] = {path.read_bytes() for path in storage.glob("results/tiny/heldout.png")}
    published = [path.read_bytes() for path in storage.rglob("images/heldout.png")]
    assert without_captions in published and without_captions not in images
    assert call_json("verify", "--storage", storage)["problems"] == []


def last_metrics(storage: Path, stage: str) -> dict[str, float]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(database_uri(f"{storage}/mlflow.db"))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.runName = '{stage}'", order_by=["start_time DESC"]
    )
    return dict(runs[0].data.metrics)


@pytest.mark.parametrize(
    ("num_samples", "options"), [(6400, ()), pytest.param(9600, ("--on-ray",), marks=pytest.mark.slow)]
)
def test_sigterm_writes_a_checkpoint_from_which_training_resumes(
    finished: Path, num_samples: int, options: tuple[str, ...]
) -> None:
    before, known = set(finished.glob("runs/*")), set(finished.glob("artifacts/prior/*"))
    changes = {"num_samples": num_samples, "checkpoint_samples": num_samples}
    settings = [word for name, value in changes.items() for word in ("--set", f"prior.trainer.{name}={value}")]
    words = ["train", "prior", "tiny", *settings, "--storage", str(finished)]
    command = [sys.executable, "-m", "pipelines", *words, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not any(
        json.loads(path.read_text())["done"]
        for path in finished.glob("runs/*/progress/prior.json")
        if path.parents[1] not in before
    ):
        assert process.poll() is None, "the training ended before it could be stopped"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75 and "stopped as asked" in errors and "run the same command again" in errors
    [folder] = set(finished.glob("artifacts/prior/*")) - known
    [checkpoint] = folder.glob("checkpoints/*/manifest.json")
    assert 0 < int(checkpoint.parent.name) < num_samples
    assert run(*words).splitlines()[-1].endswith("/model")
    assert records(finished)["prior"]["facts"]["samples_seen"] == num_samples


def test_the_overfit_test_keeps_nothing_and_prints_a_diagnosis(finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    result = call("train", "prior", "tiny", "--overfit", 4, "--storage", finished)
    assert result.returncode == 0, result.stdout
    assert "400 steps on 4 rows" in result.stdout and "memorised" in result.stdout
    assert sorted(finished.rglob("*")) == before


def test_a_model_is_not_trained_before_its_dataset_exists(tmp_path: Path) -> None:
    result = call("train", "prior", "tiny", "--storage", tmp_path)
    assert result.returncode == 2
    assert "has no curate and no clip" in result.stderr and "unclip run tiny --until curate" in result.stderr


def test_the_ui_prints_the_address_of_the_runs_once_it_answers_and_ends_with_its_server(
    finished: Path, tmp_path: Path
) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "pipelines", "ui", "--storage", str(finished), "--port", "8800"]
    environment = {**os.environ, "BROWSER": str(browser), "DISPLAY": ":0"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell starts its background jobs with this signal ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        link = next(line.strip() for line in process.stdout if line.startswith("http"))
        found = re.fullmatch(
            r"(http://127\.0\.0\.1:8800)/#/experiments/(\d+)/runs\?workflowType=machine_learning", link
        )
        assert found
        answer = urllib.request.urlopen(
            f"{found[1]}/api/2.0/mlflow/experiments/get?experiment_id={found[2]}", timeout=10
        )
        assert json.loads(answer.read())["experiment"]["name"] == "tiny"
        version = "name=unclip-tiny&version=1&path=images/preview.png"
        image = urllib.request.urlopen(f"{found[1]}/model-versions/get-artifact?{version}", timeout=10)
        assert image.read(8) == b"\x89PNG\r\n\x1a\n"
        deadline = time.monotonic() + 20
        while not opened.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert opened.read_text().strip() == link
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen("http://127.0.0.1:8800/health", timeout=5)


def test_f82_after_gc_all_is_cached_and_works(finished: Path, tmp_path: Path) -> None:
    """The last test, since it deletes from the storage; a kill within the deletion leaves a good storage."""
    store = Store(str(finished))
    kept = sorted(finished.glob("stages/prior/*.json"), key=lambda path: path.stat().st_mtime)
    older = kept[0].with_name(f"{7:064x}.json")  # a copy that no run has reached
    shutil.copy(kept[0], older)
    shutil.copytree(finished / "artifacts" / "prior" / kept[0].stem, finished / "artifacts" / "prior" / older.stem)
    [orphan, *_] = [path.with_name("orphan.parquet") for path in finished.glob("images/*/*.parquet")]
    orphan.write_bytes(b"PAR1")
    assert call_json("gc", "--storage", finished)["garbage"] == [], "everything is new"
    listed = call_json("gc", "--storage", finished, "--days", 0)
    paths = {entry["path"]: entry["what"] for entry in listed["garbage"]}
    assert f"artifacts/prior/{older.stem}" in paths and str(orphan.relative_to(finished)) in paths
    for each in (kept[0], kept[-1]):
        assert f"artifacts/prior/{each.stem}" not in paths, "in results/ or the last one"
    assert orphan.exists() and not listed["is_deleted"]
    before = files.size(store.root)

    (tmp_path / "armed").mkdir()
    (tmp_path / "armed" / "1").write_text("within .*prior/[0-9a-f]*$")
    command = ("gc", "--storage", finished, "--days", 0, "--delete")
    assert call_apart(*command, UNCLIP_FAILPOINTS=str(tmp_path / "armed")).returncode == -signal.SIGKILL
    assert not older.exists() and (finished / "artifacts" / "prior" / older.stem).exists()
    assert call_json("verify", "--storage", finished)["problems"] == []
    freed = call_json(*command)
    assert freed["is_deleted"] and files.size(store.root) < before / 2 and not orphan.exists()

    assert call_json("verify", "--storage", finished)["problems"] == []
    assert set(states(finished).values()) == {"cached"}
    assert "everything is up to date" in run_here("run", "tiny", "--storage", finished)
    for model in (None, "unclip-tiny"):
        assert load_system(find_stack(str(finished), model)).image_size == 64
    key = Snapshot.of(records(finished)["curate"]["facts"]).open_places("train").keys(np.arange(1))[0]
    for words in (["data", "show", key], ["data", "list"], ["status"]):
        run_here(*words, "--storage", finished)
