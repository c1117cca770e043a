"""`unclip gc` on a small storage."""

from pathlib import Path

from tasks.lock import lock
from tasks.store import Store
from tests.pipelines.command_line import call, call_json
from unclip import files


def test_f131_a_retired_mlflow_can_be_left_out(tmp_path: Path) -> None:
    store, old = Store(str(tmp_path)), "http://127.0.0.1:9"
    record = {"pipeline": "tiny", "state": "done", "host": "a", "pid": 1, "mlflow_run": "r", "config": {}}
    store.write_json({**record, "tracking_uri": old}, "runs", "r1", "run.json")
    fingerprint = "ab" * 32
    store.write_json({"stage": "prior", "facts": {}}, "stages", "prior", f"{fingerprint}.json")
    gc = ("gc", "--storage", store.root, "--days", 0, "--delete")
    named = ("--tracking-uri", old)
    result = call(*gc, *named, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert result.returncode == 2 and store.exists("stages", "prior", f"{fingerprint}.json")
    assert f"MLflow at {old} does not tell" in result.stderr and f"--without-mlflow {old} if" in result.stderr
    result = call(*gc)
    assert result.returncode == 2 and store.exists("stages", "prior", f"{fingerprint}.json")
    assert f"MLflow at {old} was not asked" in result.stderr and f"--tracking-uri {old} if it is yours" in result.stderr
    result = call(*gc, "--without-mlflow", "http://other:secret@host")
    assert result.returncode == 2 and "secret" not in result.stderr
    assert f"--without-mlflow: got http://host, expected an MLflow of this storage: {old}." in result.stderr
    with lock(store):
        assert call(*gc, *named, "--without-mlflow", old).returncode == 75
    document = call_json(*gc, "--without-mlflow", f"{old}/")
    assert [each["path"] for each in document["garbage"]] == [f"artifacts/prior/{fingerprint}"]
    assert not store.exists("stages", "prior", f"{fingerprint}.json")


def test_a_folder_of_the_root_that_is_a_link_is_followed_only_if_the_operator_says_so(tmp_path: Path) -> None:
    store, disk, fingerprint = Store(str(tmp_path / "copy")), tmp_path / "original", "ab" * 32
    files.write(f"{disk}/artifacts/prior/{fingerprint}/model", b"a")
    Path(store.root).mkdir()
    Path(store.uri("artifacts")).symlink_to(disk / "artifacts")
    gc = ("gc", "--storage", store.root, "--days", 0, "--delete")
    result = call(*gc)
    assert result.returncode == 0 and (disk / "artifacts" / "prior" / fingerprint / "model").exists()
    assert f"artifacts is a link to {disk}/artifacts: nothing is deleted there" in result.stderr
    assert "--follow-links" in result.stderr
    [deleted] = call_json(*gc, "--follow-links")["garbage"]
    assert deleted["path"] == f"artifacts/prior/{fingerprint}"
    assert list((disk / "artifacts" / "prior").iterdir()) == [] and Path(store.uri("artifacts")).is_symlink()
