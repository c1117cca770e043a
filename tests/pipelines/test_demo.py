"""What the README promises of the demo."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_draws_what_its_captions_say(demo: Path) -> None:
    summary = json.loads((demo / "results" / "demo" / "summary.json").read_text())
    rows = summary["rows"]
    assert rows["in"] == rows["kept"] + rows["dropped"] + rows["failed"]
    assert summary["captions"]["heldout"] >= 256
    for attribute, least in {"colour": 0.90, "background": 0.95, "size": 0.90, "shape": 0.80}.items():
        assert summary["accuracy"][attribute] >= least, summary["accuracy"]
    assert set(summary["accuracy_unseen"]) >= {"colour", "background", "size", "shape"}
