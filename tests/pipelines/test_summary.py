"""The summary of a run for people and programs."""

from typing import Any

import pytest

from pipelines.config import load
from pipelines.summary import print_summary, summarise
from tasks.stage import Artifact
from tasks.store import Store


def artifact(stage: str, **facts: Any) -> Artifact:
    return Artifact(stage, "f", "", "d", facts, 1.0)


def test_f54_the_lines_of_a_list_are_stated_and_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {"in": 50_006, "header": 1, "blank": 1, "continued": 2}
    counts = {"rows": {"in": 50_002, "kept": 50_000, "dropped": 0, "failed": 2}, "reasons": {"bad_quotes": 2}}
    curated = artifact("curate", **counts, snapshot={"digest": "d"})
    summary = summarise("mine", {"ingest": artifact("ingest", **counts, lines=lines), "curate": curated})
    assert summary["lines"] == lines
    print_summary(summary, Store("elsewhere"), load("text_to_image", None, ["ingest.urls=a.csv"]))
    out = capsys.readouterr().out
    assert "lines      50,006 in text files = 50,002 rows + 1 header + 1 blank + 2 continued" in out
    assert "2  bad_quotes" in out
    of_parquet = summarise("mine", {"ingest": artifact("ingest", **counts), "curate": curated})
    assert "lines" not in of_parquet
