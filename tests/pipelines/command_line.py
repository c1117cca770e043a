"""The command line, for tests."""

import os
import subprocess

import pytest
from click.testing import CliRunner

from pipelines.cli import main


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: importing torch and Ray for each one would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())  # commands may set what their workers inherit
        result = CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)
