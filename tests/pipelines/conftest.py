"""One finished demo for all slow tests that need one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a demo run that is done; UNCLIP_DEMO_STORAGE names one in which to go on."""
    storage = Path(os.environ.get("UNCLIP_DEMO_STORAGE") or tmp_path_factory.mktemp("demo"))
    subprocess.run([sys.executable, "-m", "pipelines", "run", "demo", "--storage", storage], cwd=ROOT, check=True)
    return storage
