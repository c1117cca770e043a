"""The summary of a run for people and programs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load
from pipelines.summary import print_summary, summarise, write_results
from tasks.stage import Artifact
from tasks.store import Store
from tasks.verification import state_of, survey
from unclip import files


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


def test_results_that_were_half_written_are_not_damaged(tmp_path: Path) -> None:
    store, path = Store(str(tmp_path)), ("results", "mine", "summary.json")

    def write(page: str, image: str, *stages: str) -> None:
        report, evaluated = Path(store.uri("report.html")), artifact("evaluate", images={"heldout": image})
        report.write_text(page)
        artifacts = {"report": dataclasses.replace(artifact("report"), uri=str(report)), "evaluate": evaluated}
        summary = {"pipeline": "mine", "seconds": {"report": 1.0}, "artifacts": dict.fromkeys(stages, "f")}
        write_results(summary, artifacts, store, ["report", "evaluate", "prior"])

    def states() -> set[str]:
        return {state_of(item) for item in survey(store)}

    image = store.uri("heldout.png")
    files.write(image, b"first")
    write("first", image, "report", "prior")
    assert states() == {"sound"}
    with pytest.raises(FileNotFoundError):  # as a kill between the report and the images
        write("second", store.uri("none.png"), "report")
    assert states() == {"sound", "not covered"}
    write("second", image, "report")
    assert states() == {"sound"} and files.read(store.uri("results", "mine", "report.html")) == b"second"
    assert store.read_json(*path)["artifacts"] == {"report": "f", "prior": "f"}, "what this run does not tell is kept"


def test_images_that_show_rows_are_copied_with_their_keys_until_a_takedown_deletes_them(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    evaluation = store.uri("artifacts", "evaluate", "f")
    evaluated = dataclasses.replace(artifact("evaluate", images={}), uri=evaluation)

    def write() -> list[str]:
        summary = {"pipeline": "mine", "seconds": {"evaluate": 1.0}, "artifacts": {"evaluate": "f"}}
        write_results(summary, {"evaluate": evaluated}, store, ["evaluate"])
        return store.list("results", "mine", "previews") if "previews" in store.list("results", "mine") else []

    files.write(f"{evaluation}/previews/reconstructions.png", b"picture")
    files.write_json(f"{evaluation}/previews/keys.json", ["k0", "k1"])
    assert write() == write() == ["keys.json", "reconstructions.png"]
    assert store.read_json("results", "mine", "previews", "keys.json") == ["k0", "k1"]
    files.delete(f"{evaluation}/previews")
    assert write() == [] and {state_of(item) for item in survey(store)} == {"sound"}


def test_the_summary_forgets_stages_that_the_pipeline_has_lost(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name, stages in (("upsampler-256", ["upsampler-256", "prior"]), ("prior", ["prior"])):
        summary = {"pipeline": "mine", "seconds": {name: 1.0}, "artifacts": {name: "f"}}
        write_results(summary, {}, store, stages)
    after = store.read_json("results", "mine", "summary.json")
    assert after["artifacts"] == {"prior": "f"} and after["seconds"] == {"prior": 1.0}


def test_the_summary_names_the_folder_of_results_below_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {"accuracy": {"heldout": {"colour": 1.0, "place": 0.5}}, "captions": {"heldout": 4}}
    evaluated = artifact("evaluate", clip_score={"heldout": 0.5}, metrics={}, intervals={}, **accuracy)
    curated = artifact(
        "curate", rows={"in": 4, "kept": 4, "dropped": 0, "failed": 0}, reasons={}, snapshot={"digest": "d"}
    )
    summary = summarise("mine", {"curate": curated, "evaluate": evaluated})
    print_summary(summary, Store("elsewhere"), load("text_to_image", None, ["ingest.urls=a.csv"]), "mine-glide")
    out = capsys.readouterr().out
    assert "place            0.500" in out and "results/mine-glide/heldout.png" in out


def test_f150_console_summary_and_page_tell_what_became_of_the_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "worse than version 1: accuracy.all <0.1> against 0.9"
    facts = {"name": "mine", "version": "2", "alias": "challenger", "reason": reason}
    store, page = Store(str(tmp_path)), tmp_path / "report.html"
    page.write_text("<h1>mine</h1>")
    artifacts = {
        "publish": artifact("publish", **facts),
        "report": dataclasses.replace(artifact("report"), uri=str(page)),
    }
    summary = summarise("mine", artifacts)
    assert summary["registered"] == facts
    write_results(summary, artifacts, store, ["publish", "report"])
    shown = files.read(store.uri("results", "mine", "report.html")).decode()
    assert shown.startswith(
        "<h1>mine</h1>\n<p>mine/2 is the challenger: worse than version 1: accuracy.all &lt;0.1&gt;"
    )
    assert page.read_text() == "<h1>mine</h1>"
    print_summary(summary, store, load("text_to_image", None, ["ingest.urls=a.csv"]))
    out = capsys.readouterr().out
    assert f"published  mine/2 is the challenger: {reason}\n" in out
    assert "unclip models promote mine@challenger" in out and "--model mine@challenger --out grid.png" in out
    champion = {**summary, "registered": {**facts, "alias": "champion", "reason": "the first champion"}}
    print_summary(champion, store, load("text_to_image", None, ["ingest.urls=a.csv"]))
    out = capsys.readouterr().out
    assert "published  mine/2 is the champion: the first champion\n" in out and "--model" not in out
