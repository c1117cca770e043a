"""Results of the demo that the README promises."""

import json
from pathlib import Path

import pytest

from benchmarks import manipulations
from pipelines.published import find_stack
from unclip.systems.system import load_system
from unclip.systems.unclip.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def stack(demo: Path) -> Stack:
    return load_system(find_stack(str(demo), None))


def test_samples_of_the_demo_match_their_captions(demo: Path) -> None:
    summary = json.loads((demo / "results" / "demo" / "summary.json").read_text())
    rows = summary["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    assert summary["captions"]["heldout"] >= 256
    for attribute, least in {"colour": 0.90, "background": 0.95, "size": 0.90, "shape": 0.80}.items():
        assert summary["accuracy"][attribute] >= least, summary["accuracy"]
    assert set(summary["accuracy_unseen"]) >= {"colour", "background", "size", "shape"}


@pytest.mark.parametrize(
    ("name", "num", "least"),
    [
        ("reconstruction", 50, {"the same in all attributes": 0.9}),
        ("text_diff", 400, {"colour": 0.85, "place": 0.85, "colour, shape and place": 0.75}),
        ("interpolation", 30, {f"{what} moves one way": 0.8 for what in ("place", "size", "background")}),
        ("inpainting", 50, {"known pixels are the same": 1.0, "colour": 0.8, "background": 0.9}),
    ],
)
def test_manipulations_change_what_they_should_and_nothing_else(
    stack: Stack, name: str, num: int, least: dict[str, float]
) -> None:
    numbers = manipulations.MEASUREMENTS[name](stack, num).numbers
    assert all(numbers[what] >= share for what, share in least.items()), numbers
