"""The benchmark of scale, at sizes that say nothing about cost: every step runs and is reported."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling_steps import READERS, SCRIPTS, STEPS, run_step
from benchmarks.synthetic import SKEWS, Dataset, write_list
from tasks import ranges, rows
from tasks.stages.ingest import IngestConfig, read

STAGES = ("ingest", "download", "filter", "dedup", "embed", "curate", "report")
SIZES = (1200, 300)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Dataset]:
    root = tmp_path_factory.mktemp("scaling")
    return {size: Dataset(f"{root}/{size}", size, width=16, has_images=size == SIZES[0]) for size in SIZES}


@pytest.fixture(scope="module")
def points(cluster: None, datasets: dict[int, Dataset]) -> list[scaling.Point]:
    return [point for data in datasets.values() for point in scaling.measure_size(data, rounds=1, isolated=False)]


@pytest.mark.slow
def test_every_stage_and_reader_is_measured(points: list[scaling.Point], datasets: dict[int, Dataset]) -> None:
    for size, data in datasets.items():
        found = {point.step: point.figures for point in points if point.size == size}
        assert set(found) == {
            name for name, step in STEPS.items() if not step.is_setup and (data.has_images or not step.needs_images)
        }
        for name, figures in found.items():
            assert 0 < figures.rows <= size and figures.seconds > 0, name
    names = {point.step for point in points}
    assert set(READERS) < names
    assert all(any(name.startswith(stage) for name in names) for stage in STAGES)


@pytest.mark.slow
def test_the_stages_dropped_and_kept_the_rows_that_the_data_are_made_for(
    points: list[scaling.Point], datasets: dict[int, Dataset]
) -> None:
    root = Path(datasets[SIZES[0]].root)
    facts = {name: json.loads((root / f"{name}.json").read_text())["facts"] for name in ("dedup", "curate_semantic")}
    assert facts["dedup"]["rows"]["in"] == SIZES[0]
    expected = {"no_caption", "caption_too_short", "http_404", "too_small", "bad_aspect", "duplicate_image"}
    assert expected | {"near_duplicate"} <= set(facts["dedup"]["reasons"])
    assert facts["curate_semantic"]["reasons"]["semantic_duplicate"] > 0
    selection = ranges.read_all(json.loads((root / "curate.json").read_text())["uri"])
    assert rows.count(selection)["rows"]["kept"] > SIZES[0] / 2


@pytest.mark.slow
def test_scripts_keep_the_same_rows_as_the_stages(points: list[scaling.Point], datasets: dict[int, Dataset]) -> None:
    for name in SCRIPTS:
        assert run_step(name, datasets[SIZES[0]]).rows == SIZES[0]  # it compares the rows itself


@pytest.mark.slow
def test_the_report_judges_and_the_plot_has_a_line_for_each_step(
    points: list[scaling.Point], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # as if the sizes were those that goals are for, with a curve that rises by half
    by_step = {point.step: point for point in points if point.size == SIZES[0]}
    figures = dataclasses.replace(by_step["filter"].figures, rows=1000, seconds=1.0)
    sized = [
        scaling.Point(name, size, dataclasses.replace(figures, seconds=seconds), 3000.0)
        for name in by_step
        for size, seconds in ((scaling.BASE_ROWS, 1.0), (1_000_000, 1.5 if name == "filter" else 1.0))
    ]
    scaling.report(sized)
    printed = capsys.readouterr().out
    assert "worst is filter, 1.50 (at most 1.25: MISSED)" in printed
    assert "largest process, MB: 3,000.00 (at most 2,048: MISSED)" in printed
    assert "share of images alone: 1.00 (at least 0.5: met)" in printed
    assert all(name in printed for name in by_step)
    scaling.plot(sized, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_skewed_datasets_are_skewed(tmp_path: Path) -> None:
    assert set(scaling.SKEWED_STEPS) == set(SKEWS)
    shares = {}
    for skew in ("", "site", "caption"):
        data = Dataset(f"{tmp_path}/{skew or 'even'}", 1000, skew=skew)
        write_list(data)
        listed = next(read(IngestConfig(data.list_uri))).to_pylist()
        hosts = [row["url"].split("/")[2] for row in listed]
        captions = [row["caption"] for row in listed]
        shares[skew] = [max(map(values.count, values)) / len(values) for values in (hosts, captions)]
    assert shares["site"][0] == 0.9 and shares[""][0] < 0.3
    assert shares["caption"][1] == 0.5 and shares[""][1] < 0.1
