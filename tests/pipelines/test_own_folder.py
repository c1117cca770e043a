"""The quick start with a folder of one's own images, run as it stands in the document."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.command_line import ROOT, read_record
from unclip import files

DOCUMENT = ROOT / "docs" / "data.md"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f103_the_quick_start_with_a_folder_of_images_runs_as_written(tmp_path: Path) -> None:
    [section] = re.findall(
        r"^## A folder of your own images\n(.*?)^## ", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL
    )
    [script] = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "photos").mkdir()
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((16, 16, 1), np.uint8))).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"a picture of number {number}")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "unclip"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m pipelines "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    storage = tmp_path / "unclip-data"
    counts = [
        read_record(storage, "stages", "curate", name)["facts"]["rows"]
        for name in files.names(f"{storage}/stages/curate")
    ]
    assert sorted((rows["in"], rows["kept"], rows["dropped"]) for rows in counts) == [(60, 59, 1), (60, 60, 0)]
