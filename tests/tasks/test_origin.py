"""Origin of runs: the git commit is that of the code, or there is none."""

import subprocess
from pathlib import Path

import pytest

from tasks import origin
from tasks.origin import Code, _of_clone, code_of, run_tags


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Clone with a package, and a remote whose URL has a password."""
    package = tmp_path / "unclip"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@host.example/unclip")
    return tmp_path


def test_the_commit_of_a_clone_and_whether_it_was_changed(clone: Path) -> None:
    found = _of_clone(clone / "unclip", "0.1.0")
    commit = git(clone, "rev-parse", "HEAD")
    assert found == Code("0.1.0", commit, "main", False, "https://host.example/unclip")
    (clone / "notes.txt").write_text("not of the code")
    assert _of_clone(clone / "unclip", None).is_changed is False
    (clone / "unclip" / "new.py").write_text("")
    assert _of_clone(clone / "unclip", None).is_changed is True
    git(clone, "checkout", "--detach")
    assert _of_clone(clone / "unclip", None).branch is None


def test_f158_an_environment_inside_another_clone_has_no_commit(clone: Path, tmp_path: Path) -> None:
    """MLflow would take the commit of the clone that the code happens to lie in."""
    installed = clone / ".venv" / "site-packages" / "unclip"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert _of_clone(installed, "0.1.0") == Code("0.1.0")


def test_a_git_clone_runs_no_program_of_its_settings(clone: Path, tmp_path: Path) -> None:
    ran, program = tmp_path / "ran", tmp_path / "monitor"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    git(clone, "config", "core.fsmonitor", str(program))
    assert _of_clone(clone / "unclip", None).commit and not ran.exists()


def test_tags_are_those_of_mlflow_and_tell_the_version_again(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Code("0.1.0", "12ab", None, True, None)
    monkeypatch.setattr(origin, "code", lambda: here)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "someone")
    tags = run_tags("unclip run demo")
    assert tags["mlflow.source.name"] == "unclip run demo" and tags["mlflow.user"] == "someone"
    assert tags["mlflow.source.git.commit"] == "12ab" and tags["mlflow.source.git.dirty"] == "true"
    assert "mlflow.source.git.branch" not in tags and code_of(tags) == here


def test_a_run_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, clone: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert _of_clone(clone / "unclip", "1") == Code("1")
