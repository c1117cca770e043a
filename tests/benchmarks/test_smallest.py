"""Every benchmark runs, at sizes that say nothing about speed; those of a finished demo are in tests/pipelines/test_demo.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = {
    "decode --pictures 2 --rounds 1": "img2dataset",
    "resize --pictures 1": "Hamming",
    "embed --model unclip-demo --pairs 8 --batch-size 4 --rounds 1": "ratio",
    "download --pictures 40 --rounds 1 --shard-size 20": "warm",
    "chaos --rows 300 --shard-size 100 --sites 4 --tarpits 1 --domains 1": "share",
    "convolution --sides 2 --batch-size 2 --rounds 1": "512",
    "training --rounds 1 --steps 1 --batch-size 2 --parts prior": "diffusers",
    "training --rounds 1 --steps 1 --batch-size 2 --parts latents": "diffusers",
    "tokens --size demo --rounds 1 --steps 1 --batch-size 2": "unclip is faster by",
    "evaluation --num-images 130 --image-size 32": "peak memory after the metrics",
}
"""Command -> text that its output has at the end."""


@pytest.mark.slow
@pytest.mark.parametrize("command", LINES)
def test_a_benchmark_runs(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command}".split()], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert LINES[command] in ended.stdout, ended.stdout
