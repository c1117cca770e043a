"""Invalid input ends a command before any work, with a non-zero exit code and a one-line remedy."""

import datetime
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.commands.train import train, trained_models
from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.preset import model_names, pipeline_names, system_names
from pipelines.records import TrackingUris, close_run, open_run, tracking_uris_of
from tasks import tables
from tasks.lock import Owner, lock
from tasks.run_records import HEARTBEAT, driver
from tasks.store import Store
from tests.pipelines.command_line import COMMANDS, call_apart, call_json, cpu_seconds_apart
from tests.pipelines.command_line import call as unclip
from tests.tasks.datasets import holders
from unclip import errors
from unclip.messages import without_credentials
from unclip.systems.unclip.sizes import MODEL_SIZES

ROOT = Path(__file__).resolve().parents[2]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def test_f25_a_missing_list(tmp_path: Path) -> None:
    result = unclip(
        "run", "text_to_image", "--set", f"ingest.urls={tmp_path}/none.parquet", "--storage", tmp_path / "s"
    )
    assert_refused(result, "none.parquet", "does not exist")


def test_as_a_program_it_reports_the_error_within_seconds(tmp_path: Path) -> None:
    before = cpu_seconds_apart()
    command = [sys.executable, "-m", "pipelines", "run", "text_to_image", "--storage", str(tmp_path / "s")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert_refused(result, "--set ingest.urls=")
    assert cpu_seconds_apart() - before < 30


def test_no_list_at_all(tmp_path: Path) -> None:
    assert_refused(unclip("run", "text_to_image", "--storage", tmp_path / "s"), "--set ingest.urls=")


def test_f25_a_table_without_a_url_column(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"URL": ["http://127.0.0.1:1/a.jpg"], "caption": ["a red circle"]}), path)
    result = unclip("run", "text_to_image", "--set", f"ingest.urls={path}", "--storage", tmp_path / "s")
    assert_refused(result, str(path), "no column 'url'", "Did you mean 'URL'?")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("prior.trainer.num_sample=3", ("prior.trainer.num_sample", "Did you mean 'num_samples'?")),
        ("prior.trainer.num_samples=many", ("prior.trainer.num_samples", "'many'", "int")),
        ("decoder.model.unet.image_size=18", ("decoder.model.unet.image_size", "18")),
        ("clip.model=ViT-B-23", ("clip.model", "ViT-B-23", "Did you mean 'ViT-B-")),
        ("dowload.retries=2", ("dowload", "Did you mean 'download'?")),
        ("prior", ("prior", "section.field=value")),
    ],
)
def test_an_invalid_setting(pairs: Path, tmp_path: Path, assignment: str, words: tuple[str, ...]) -> None:
    arguments = ["--set", f"ingest.urls={pairs}", "--set", assignment, "--storage", tmp_path / "s"]
    assert_refused(unclip("run", "text_to_image", *arguments), *words)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (
            ("prior.trainer.batch_size=3", "resources.num_workers=4"),
            "prior.trainer.batch_size: got 3, expected a multiple of 4",
        ),
        (
            ("upsamplers.64.trainer.batch_size=3", "resources.num_workers=2"),
            "upsamplers.64.trainer.batch_size: got 3, expected a multiple of 2",
        ),
        (
            ("clip.model=ViT-B-32", "clip.pretrained=opanai"),
            "knows no tag 'opanai' of ViT-B-32. Did you mean 'openai'?",
        ),
        (("clip.model=roberta-ViT-B-32",), "clip.model: got 'roberta-ViT-B-32', whose text tower is roberta-base"),
    ],
)
def test_what_a_training_cannot_do_is_told_before_anything_starts(
    tmp_path: Path, assignments: tuple[str, ...], words: str
) -> None:
    settings = [option for assignment in assignments for option in ("--set", assignment)]
    assert_refused(unclip("plan", "tiny", *settings, "--storage", tmp_path / "s"), words)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "▶ ✓ ✗ ███░ é 漢"), ("latin-1", "> + x ###. é ?"), ("ascii", "> + x ###. ? ?")],
)
def test_terminals_get_the_marks_that_they_can_show(encoding: str, shown: str) -> None:
    code = "from pipelines.console import tolerate_encodings; tolerate_encodings(); print('▶ ✓ ✗ ███░ é 漢')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert result.stdout.decode(encoding).strip() == shown


def test_the_command_line_ends_in_no_encoding_error(tmp_path: Path) -> None:
    result = call_apart("estimate", "tiny", "--pairs", "1000", "--storage", tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "UnicodeEncodeError" not in result.stderr, result.stderr


def test_an_unknown_pipeline() -> None:
    assert_refused(unclip("run", "text_to_imge"), "text_to_imge", "Did you mean 'text_to_image'?")


def test_an_unknown_stage(tmp_path: Path) -> None:
    assert_refused(unclip("run", "tiny", "--until", "decode", "--storage", tmp_path), "--until", "'decode'", "decoder")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_model(tmp_path: Path) -> None:
    for model, nearest in (("upsampler", "upsampler-64"), ("upsampler-46", "upsampler-64"), ("decode", "decoder")):
        assert_refused(
            unclip("train", model, "tiny", "--storage", tmp_path),
            f"{model}: unknown model of tiny",
            f"mean {nearest!r}?",
        )
    assert_refused(
        unclip("train", "clip", "demo", "--storage", tmp_path), "clip: unknown model of demo", "Valid names: "
    )
    assert_refused(unclip("train", "prior", "demmo", "--storage", tmp_path), "demmo", "Did you mean 'demo'?")
    assert not list(tmp_path.iterdir())


def test_models_and_pipelines_are_completed() -> None:
    model, pipeline = (each for each in train.params if isinstance(each, click.Argument))

    def completed(argument: click.Argument, start: str) -> set[str]:
        return {item.value for item in argument.shell_complete(click.Context(train), start)}

    assert completed(model, "up") == {"upsampler-32", "upsampler-64"}
    assert completed(model, "") > {"prior", "decoder"} and completed(pipeline, "t") == {"text_to_image", "tiny"}


def test_completion_offers_the_models_that_pipelines_train() -> None:
    optional = {"glide": ["with_noised_clip=true"]}
    composed = [
        compose(load(name, None, ["ingest.urls=pairs.parquet", *optional.get(system, [])], None, system))
        for name in pipeline_names()
        for system in system_names()
    ]
    trained = {model for dag in composed for model in trained_models(dag)}
    assert set(model_names()) == trained - {"upsampler-256"}  # a default that no preset names


HEAVY = ("torch", "ray", "mlflow", "pyarrow", "numpy")


@pytest.mark.parametrize(
    ("arguments", "typed", "printed"),
    [
        (["--help"], None, "takedown"),
        (["plan", "train", "--help"], None, "--gpus"),
        (["estimate", "--help"], None, "--price-gpu-hour"),
        (["status", "--storage", "."], None, "a-run  tiny  1970-01-01"),
        ([], "unclip sta", "status"),
        ([], "unclip run tex", "text_to_image"),
        ([], "unclip estimate tex", "text_to_image"),
        ([], "unclip train upsampler-6", "upsampler-64"),
        ([], "unclip data sh", "show"),
        ([], "unclip ver", "verify"),
    ],
)
def test_commands_that_only_read_import_no_heavy_packages(
    tmp_path: Path, arguments: list[str], typed: str | None, printed: str
) -> None:
    """Checks imports rather than seconds, which depend on the machine."""
    record = {"pipeline": "tiny", "state": "done", "started": 0.0, "ended": 9.0, "host": "here", "pid": 1}
    Store(str(tmp_path)).write_json(record, "runs", "a-run", "run.json")
    event = {"stage": "ingest", "state": "done", "at": 1.0, "seconds": 1.0}
    Store(str(tmp_path)).write_json(event, "runs", "a-run", "ingest.json")
    script = f"""
import atexit, runpy, sys
atexit.register(lambda: print(*({set(HEAVY)} & set(sys.modules)), file=sys.stderr))
runpy.run_module("pipelines", run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TZ": "UTC"}
    if typed is not None:
        words = str(len(typed.split()) - 1)
        environment |= {"_UNCLIP_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": words}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "\n") and printed in result.stdout


def test_a_run_file_that_does_not_exist_or_is_not_toml(tmp_path: Path) -> None:
    assert_refused(unclip("run", "demo", "--config", tmp_path / "run.toml"), "run.toml", "no such run file")
    (tmp_path / "run.toml").write_text("a = = b")
    assert_refused(unclip("run", "demo", "--config", tmp_path / "run.toml"), "run.toml", "TOML")


def test_f31_an_unwritable_folder(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # also stops root, which ignores permissions
    result = unclip("run", "text_to_image", "--set", f"ingest.urls={pairs}", "--storage", tmp_path / "file" / "s")
    assert_refused(result, "file/s", "--storage")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        result = unclip("run", "tiny", "--set", f"scenes.port={port}", "--storage", tmp_path)
        assert time.monotonic() - started < 20
        assert_refused(result, str(port), "in use", "--set scenes.port=")
        assert not (tmp_path / "runs").exists()
        (tmp_path / "mlflow.db").touch()
        assert_refused(unclip("ui", "--storage", tmp_path, "--port", port), str(port), "in use", f"--port {port + 1}")


def test_f32_f72_another_run_uses_the_storage(tmp_path: Path) -> None:
    with lock(Store(str(tmp_path)), owner=Owner("somewhere", 7, None, None, "noon")):
        for storage in (tmp_path, f"file://{tmp_path}/"):
            result = unclip("run", "tiny", "--storage", storage)
            assert_refused(result, "another run is using this storage (pid 7 on somewhere since noon)", code=75)


def test_commands_that_need_a_finished_run(tmp_path: Path) -> None:
    assert_refused(unclip("sample", "a red circle", "--storage", tmp_path), "nothing has been published here")
    assert_refused(unclip("ui", "--storage", tmp_path), "no run has been tracked here")
    assert_refused(unclip("sample", "a red circle", "--num", 0, "--storage", tmp_path), "--num: got 0")
    assert_refused(unclip("sample", " ", "--storage", tmp_path), "caption: got an empty caption")
    result = unclip("status", "--storage", tmp_path)
    assert (result.returncode, result.stdout.startswith("no runs in")) == (0, True)


def test_plan_prints_the_configuration_and_every_stage_and_starts_nothing(pairs: Path, tmp_path: Path) -> None:
    arguments = [
        "text_to_image",
        "--set",
        f"ingest.urls={pairs}",
        "--set",
        "clip.pretrained=none",
        "--storage",
        tmp_path,
    ]
    result = unclip("plan", *arguments)
    assert result.returncode == 0, result.stderr
    configuration, _, stages = result.stdout.rpartition("\n}\n")
    assert json.loads(configuration + "}")["clip"]["pretrained"] is None
    for name in (
        "ingest",
        "download",
        "filter",
        "dedup",
        "clip",
        "embed",
        "curate",
        "prior",
        "decoder",
        "upsampler-256",
        "publish",
    ):
        assert f"\n{name} " in stages
    assert not (tmp_path / "runs").exists()
    mermaid = unclip("plan", *arguments, "--mermaid").stdout
    assert mermaid.startswith("flowchart LR") and "curate --> decoder" in mermaid and "clip --> prior" in mermaid
    assert unclip("plan", *arguments, "--picture", tmp_path / "dag.png").returncode == 0
    assert (tmp_path / "dag.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["run", "refresh", "plan", "status", "sample", "takedown", "verify", "gc", "ui"])
def test_help(command: str) -> None:
    result = unclip(command, "--help")
    assert result.returncode == 0 and "Usage:" in result.stdout and "--storage" in result.stdout


@pytest.mark.timeout(60)  # nothing asks the store
def test_an_object_store_needs_a_server_for_mlflow(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = unclip("run", "text_to_image", "--set", f"ingest.urls={pairs}", "--storage", "gs://bucket/prefix")
    assert_refused(result, "gs://bucket/prefix is not a local folder", "MLFLOW_TRACKING_URI")


def test_every_mlflow_of_the_environment_and_the_storage_is_searched_and_those_of_its_runs_once_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, own = Store(str(tmp_path)), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uris_of(store) == TrackingUris([], [])
    for number, record in enumerate(
        (
            {"mlflow_run": "a", "tracking_uri": None, "config": {"tracking_uri": None}},
            {"mlflow_run": "b", "tracking_uri": "http://me@a.example", "config": {}},
            {"mlflow_run": "c", "config": {"tracking_uri": "http://b.example/"}},
            {"mlflow_run": "d", "config": {"tracking_uri": "http://b.example"}},
            {"mlflow_run": "e", "tracking_uri": own, "config": {}},
        )
    ):
        store.write_json(record, "runs", f"{number}", "run.json")
    assert tracking_uris_of(store) == TrackingUris([own], ["http://me@a.example", "http://b.example/"])
    given = [None, "http://b.example"]
    assert tracking_uris_of(store, given) == TrackingUris(["http://b.example", own], ["http://me@a.example"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@a.example")
    uris = tracking_uris_of(store)
    assert uris == TrackingUris(["http://me:secret@a.example", own], ["http://b.example/"])
    assert [without_credentials(uri) for uri in uris.named] == ["http://a.example", own]


CANARY = "c4n4ry"


def test_f90_credentials_of_mlflow_are_used_and_neither_printed_nor_stored(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, storage = f"http://me:{CANARY}@127.0.0.1:9", tmp_path / "storage"
    settings = [f"tracking_uri={uri}", f"ingest.urls={pairs}"]
    planned = unclip("plan", "text_to_image", *(f"--set={setting}" for setting in settings), "--storage", storage)
    assert planned.returncode == 0 and '"tracking_uri": "http://127.0.0.1:9"' in planned.stdout
    config = load("text_to_image", None, settings, str(storage))
    store = Store(config.storage)
    run = open_run("text_to_image", config, store)
    assert run.tracker.tracking_uri == uri and CANARY not in repr(run)
    close_run(run, store, "failed")
    record = store.read_json("runs", run.id, "run.json")
    assert record["tracking_uri"] == record["config"]["tracking_uri"] == "http://127.0.0.1:9"
    shown = unclip("ui", "--storage", storage, MLFLOW_TRACKING_URI=uri)
    assert shown.stdout == "runs are tracked at http://127.0.0.1:9\n"
    printed = capsys.readouterr().out
    assert "MLflow at http://127.0.0.1:9 does not answer" in printed
    assert CANARY not in planned.stdout + planned.stderr + printed
    assert not holders(CANARY.encode(), storage)


def test_f90_a_password_that_makes_no_uri_is_not_quoted(pairs: Path, tmp_path: Path) -> None:
    arguments = ["--set", f"ingest.urls={pairs}", "--set", f"tracking_uri=http://me:{CANARY}/{CANARY}@a.example"]
    result = unclip("run", "text_to_image", *arguments, "--storage", tmp_path / "storage")
    assert_refused(result, "tracking_uri: got http://a.example, which has a part that is no port", "%2F")
    assert CANARY not in result.stderr


@pytest.mark.parametrize("name", ["storage", "ingest.urls"])
def test_f90_an_object_store_is_not_given_with_its_secret(name: str, pairs: Path, tmp_path: Path) -> None:
    settings = {"storage": tmp_path / "storage", "ingest.urls": pairs, name: f"s3://KEY:{CANARY}/{CANARY}@bucket/x"}
    changes = [
        "--set",
        f"ingest.urls={settings['ingest.urls']}",
        "--set",
        f"tracking_uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    for command in ("run", "plan"):
        result = unclip(command, "text_to_image", *changes, "--storage", settings["storage"])
        assert_refused(result, "s3://KEY@bucket/x: given with credentials", "AWS_SECRET_ACCESS_KEY")
        assert CANARY not in result.stdout + result.stderr


def test_f90_a_traceback_shows_no_credentials(tmp_path: Path) -> None:
    code = """
import pipelines.cli, tasks.run_records

def fail(*_):
    raise OSError("http://a:" + "c4n" + "4ry@b")

tasks.run_records.last_runs = fail
pipelines.cli.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "status", "--storage", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "OSError: http://b\n" in result.stderr and CANARY not in result.stderr


def test_f101_plan_reads_lists_and_run_files_as_people_have_them_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "A.CSV").write_text(" url, caption\nhttp://a.example/1, x y\n", "utf-16")
    (lists / "b.xlsx").write_bytes(b"PK")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "run.toml").write_text(f'[ingest]\nurls = "{lists}"\n', encoding)
        result = call_apart(
            "plan", "tiny", "--config", tmp_path / "run.toml", "--set", "scenes=none", "--storage", tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("left out b.xlsx") == 1


def test_plan_writes_nothing_and_matches_the_run(tmp_path: Path) -> None:
    storage = tmp_path / "folder" / "s"
    document = call_json("plan", "tiny", "--storage", storage)
    assert document["config"]["ingest"]["urls"].startswith(f"{storage}/scenes/")
    assert {stage["state"] for stage in document["stages"]} == {"to run"}
    assert {stage["name"]: stage["after"] for stage in document["stages"]}["download"] == ["ingest"]
    assert unclip("plan", "train", "--model-size", "demo").returncode == 0 and list(tmp_path.iterdir()) == []
    config = load("tiny", None, (), str(storage))
    planned = prepare(config, read_only=True)
    assert list(tmp_path.iterdir()) == []
    assert prepare(config) == planned == prepare(config, read_only=True)
    assert [path.name for path in storage.iterdir()] == ["scenes"]
    node = compose(planned)["ingest"]
    stage_fingerprint = node.stage.fingerprint(node.config, [], Store(str(storage)))
    artifact = {"stage": "ingest", "fingerprint": stage_fingerprint, "uri": "u", "digest": "d"}
    artifact |= {"facts": {}, "seconds": 2.0}
    Store(str(storage)).write_json(artifact, "stages", "ingest", f"{artifact['fingerprint']}.json")
    [ingest, download, *_] = call_json("plan", "tiny", "--storage", storage)["stages"]
    assert ingest == {"name": "ingest", "state": "cached", "why": "made in 2 s", "after": [], "digest": "d", "uri": "u"}
    assert (download["state"], download["digest"]) == ("to run", None)
    assert unclip("plan", "tiny", "--json", "--mermaid", "--storage", storage).returncode == 2


def test_f69_a_path_that_tables_cannot_have_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for command in (["run", "tiny"], ["plan", "tiny"], ["status"], ["takedown", "--key", "0" * 32]):
        assert_refused(unclip(*command, "--storage", tmp_path / "a%20b"), "a%20b", "'%20'", "Rename the folder")
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(unclip("plan", "tiny", "--storage", tmp_path / "file" / "s"), "file/s", "is a file", "--storage")


READING = [
    ["status"],
    ["data", "list"],
    ["data", "diff", "1"],
    ["data", "show", "0a1b2c"],
    ["takedown", "--key", "0" * 32],
    ["verify"],
    ["gc"],
    ["ui"],
    ["sample", "a red circle"],
    ["export", "new"],
]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_a_command_that_reads_refuses_a_wrong_storage_and_does_not_create_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    missing, other, file = tmp_path / "missing", tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "letters").mkdir()
    file.touch()
    for folder, reason in (
        (missing, "no such folder"),
        (other, "no pipeline has stored anything"),
        (file, "is a file"),
    ):
        assert_refused(unclip(*arguments, "--storage", folder), f"{folder}: ", reason, "with --storage")
    assert_refused(unclip(*arguments), f"{tmp_path}/unclip-data: no such folder")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "file"} and len(list(other.iterdir())) == 1


def test_status_as_json(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert call_json("status", "--storage", tmp_path) == {"storage": str(tmp_path), "runs": []}
    for number, state in enumerate(("done", "failed", "running", "stopped")):
        record = {"pipeline": "tiny", "state": state, "started": 9.5, "host": socket.gethostname(), "pid": 2**30}
        store.write_json(record | ({"ended": 12.0} if state == "done" else {}), "runs", f"{number}", "run.json")
        for at, (name, event) in enumerate(
            (
                ("ingest", {"state": "done", "seconds": 1.5}),
                ("embed", {"state": "running"}),
                ("clip", {"state": "failed", "message": "why"}),
            )
        ):
            store.write_json({"stage": name, "at": at, **event}, "runs", f"{number}", f"{name}.json")
    runs = call_json("status", "--last", 3, "--storage", tmp_path)["runs"]
    assert [(run["id"], run["state"]) for run in runs] == [("1", "failed"), ("2", "killed"), ("3", "stopped")]
    assert [stage["state"] for stage in runs[0]["stages"]] == ["done", "killed", "failed"]
    assert [stage["state"] for stage in runs[2]["stages"]] == ["done", "stopped", "failed"]
    assert runs[0]["stages"][2] == {"name": "clip", "state": "failed", "seconds": None, "message": "why"}
    [first, *_] = call_json("status", "--storage", tmp_path)["runs"]
    assert runs[0]["ended"] is None and datetime.datetime.fromisoformat(first["ended"]).timestamp() == 12
    result = unclip("status", "--json", "--storage", tmp_path / "none")
    assert (result.returncode, result.stdout) == (2, "")


def test_f93_a_run_whose_machine_is_gone_counts_as_killed(tmp_path: Path) -> None:
    """The record of a pod that was killed says "running" for ever."""
    store = Store(str(tmp_path))
    now = time.time()
    for number, (change, at) in enumerate(
        (
            ({"host": "a-pod"}, now - 400),
            ({"host": "a-pod"}, now - 100),
            ({"host": "a-pod"}, None),
            ({"machine": "another container of the same name"}, now - 400),
            ({}, now - 400),  # this process; its heartbeat waits for a slow storage
            ({"process": "1"}, now),  # another process that has its number
        )
    ):
        record = {"pipeline": "tiny", "state": "running", "started": now - 1000, **driver(), **change}
        store.write_json(record, "runs", f"{number}", "run.json")
        store.write_json({"stage": "embed", "at": now, "state": "running"}, "runs", f"{number}", "embed.json")
        if at is not None:
            store.write_json({"at": at}, "runs", f"{number}", HEARTBEAT)
    expected = ["killed", "running", "killed", "killed", "running", "killed"]
    runs = call_json("status", "--last", 6, "--storage", tmp_path)["runs"]
    assert [run["state"] for run in runs] == [run["stages"][0]["state"] for run in runs] == expected


def test_f95_a_file_that_hides_a_package_is_named(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "tasks.py").write_text("")
    remedy = "Rename it, or start from another folder; docs/cluster.md says how to leave it out of a job."
    expected = f"{folder}/tasks.py hides the package 'tasks' of unclip, in {ROOT}/tasks. {remedy}"
    monkeypatch.chdir(folder)  # which Ray's workers search first, and in a job its driver too
    assert_refused(unclip("run", "text_to_image", "--set", f"ingest.urls={pairs}"), expected)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))}
    command = [sys.executable, "-m", "pipelines", "run", "text_to_image"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == f"ImportError: {expected}", result.stderr
    assert {path.name for path in folder.iterdir()} == {"tasks.py"}


def commands_of(group: click.Group, *above: str) -> set[str]:
    found: set[str] = set()
    for name, command in group.commands.items():
        inner = isinstance(command, click.Group)
        found |= commands_of(command, *above, name) if inner else {" ".join(("unclip", *above, name))}
    return found


def test_the_docs_list_all_commands_and_exit_codes() -> None:
    rows = [line.strip("| ").split(" | ") for line in COMMANDS.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    listed = {row[0].strip("`"): {int(code) for code in row[2].split(", ")} for row in rows if row[0].startswith("`")}
    assert listed.keys() == commands_of(main)
    codes = {int(row[0]): set(re.findall(r"`(\w+)`", " ".join(row[2:]))) for row in rows if row[0].isdigit()}
    raised: dict[int, set[str]] = {0: set(), 130: set()}
    for error in (errors.UnclipError, *errors.UnclipError.__subclasses__()):
        raised.setdefault(error.exit_code, set()).add(error.__name__)
    assert codes == raised and set.union(*listed.values()) < codes.keys()


def test_plan_train_prints_the_memory_of_each_gpu() -> None:
    result = unclip("plan", "train", "--model-size", "demo", "--gpus", 8, "--memory-gib", 0.25)
    assert result.returncode == 0, result.stderr
    heading, *rows = result.stdout.partition("\n\n")[0].splitlines()
    names = ["prior", "decoder", "upsampler-64"]
    assert [row.split()[0] for row in rows] == names and {len(row) for row in rows} == {len(heading)}
    assert rows[1].split()[1:3] == ["3,335,715", "0.7"]
    for name in names:
        assert f"\n{name}: 8 GPUs of 0.25 GiB: DDP, micro-batch " in result.stdout
    assert "8 GPUs of 0.001 GiB: nothing fits: one sample takes" in (
        unclip("plan", "train", "--model-size", "demo", "--gpus", 8, "--memory-gib", 0.001).stdout
    )
    alone = unclip("plan", "train", "--model-size", "demo").stdout
    assert "\nprior: 1 GPU of 80 GiB: micro-batch 4,096 or more; with" in alone and "FSDP" not in alone


def test_plan_train_refuses_invalid_options() -> None:
    assert_refused(unclip("plan", "train", "--model-size", "dale2"), "dale2", "Did you mean 'dalle2'?")
    for name, value in (("--gpus", "0"), ("--memory-gib", "0.0"), ("--micro-batch-size", "0")):
        assert_refused(unclip("plan", "train", "--model-size", "demo", name, value), f"{name}: got {value}, expected")
    options = unclip("plan", "train", "--help").stdout
    assert all(name in options for name in MODEL_SIZES) and "Usage: main plan train [OPTIONS] [PIPELINE]" in options
    assert "unclip plan train" in unclip("plan", "--help").stdout
    assert "plan train" in unclip("--help").stdout


def test_a_takedown_that_cannot_search_every_mlflow_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert_refused(unclip("takedown", "--storage", tmp_path), "got nothing to take down")
    assert_refused(unclip("takedown", "--key", "0" * 32, "--storage", tmp_path), "no images are stored here")
    images = pa.table({"key": ["0" * 32, "1" * 32]}).cast(pa.schema({"key": pa.string()}))
    for name in ("url", "sha256", "phash", "jpg"):
        images = images.append_column(name, pa.array([None, None], pa.string()))
    uri = f"{tmp_path}/images/recipe"
    tables.append_files(uri, [tables.write_part(uri, "a", images)], images.schema)
    result = unclip("takedown", "--key", "0" * 32, "--storage", tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and "1 rows taken down" in result.stdout
    missing = f"sqlite:///{tmp_path}/elsewhere.db"
    record = {"mlflow_run": "a", "tracking_uri": missing, "config": {}}
    Store(str(tmp_path)).write_json(record, "runs", "1", "run.json")
    found = call_json("takedown", "--key", "1" * 32, "--storage", tmp_path, code=1)
    assert list(found["unanswered"]) == [missing] and found["keys"] == ["1" * 32]
    result = unclip("takedown", "--key", "1" * 32, "--tracking-uri", missing, "--storage", tmp_path)
    assert result.returncode == 1 and "1 rows taken down" in result.stdout
    assert (
        f"MLflow at {missing} could not be searched completely: {tmp_path}/elsewhere.db does not exist" in result.stderr
    )
    assert tables.read(uri).num_rows == 0
