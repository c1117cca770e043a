"""Calls of the command line for tests."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from pipelines.cli import main
from tasks.store import Store

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ROOT / "docs" / "commands.md"
STORAGE_NAME = "st\u00f6r age#1 100%? [x]'&"
"""Name of a storage's folder, with letters that mean something in URIs, patterns and shells (F68)."""


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: importing torch and Ray for every command would take most of the time."""
    before = os.environ.copy()
    try:
        result = CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments])
    finally:  # commands may set variables for their workers to inherit
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def cpu_seconds_apart() -> float:
    """CPU time of all processes that this one has started and that have ended; other work on the machine does not change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def call_apart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: it may start a cluster, and this process may have one."""
    command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def call_json(*arguments: object, code: int = 0) -> Any:
    """Return the document that a command prints with --json; check its keys against docs/commands.md."""
    result = call(*arguments, "--json")
    assert result.returncode == code, result.stderr
    document = json.loads(result.stdout)
    words = [str(argument) for argument in arguments]
    name = " ".join(
        ["unclip", *words[: 1 + (words[0] in ("data", "models"))], *["--dry-run"] * ("--dry-run" in words), "--json"]
    )
    assert_alike(document, documented(name), name)
    return document


def documented(command: str) -> Any:
    """Example in docs/commands.md of the document that a command prints."""
    [text] = re.findall(rf"### `{command}`\n.*?```json\n(.*?)```", COMMANDS.read_text(), re.DOTALL)
    return json.loads(text)


def read_record(storage: Path, *parts: str) -> Any:
    """Read a record of a storage, with full paths."""
    return Store(str(storage)).read_json(*parts)


def assert_alike(found: Any, example: Any, where: str) -> None:
    """Check that two JSON documents have the same keys and types."""
    if found is None:
        return
    assert isinstance(found, (int, float) if isinstance(example, float) else type(example)), where
    if isinstance(example, dict) and example:
        assert found.keys() == example.keys(), where
        for name, value in found.items():
            assert_alike(value, example[name], f"{where} {name}")
    for item in found if isinstance(example, list) else ():
        assert_alike(item, example[0], f"{where} item")
