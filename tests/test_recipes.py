"""The recipes of CONTRIBUTING.md: their code works as it stands there, with the names that modules have now."""

import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines import dag as dags
from pipelines.dataset import IngestConfig
from pipelines.pipeline import Pipeline
from tasks import rows
from tasks.stage import Run
from tasks.stages import filter as filter_module
from tasks.tracking import Tracker
from tests.unclip.diffusion import test_samplers
from tests.unclip.evaluation import test_metrics
from unclip.diffusion import samplers
from unclip.evaluation import metrics
from unclip.models.text import TextShape
from unclip.systems.part import Shapes

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def recipe(heading: str) -> list[str]:
    """The blocks of Python in a section."""
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", section, re.M | re.S)]


def run_in(module: types.ModuleType, code: str) -> dict[str, Any]:
    """Names that a module has once the code stands in it."""
    names = dict(vars(module))
    exec(code, names)
    return names


def test_the_filter() -> None:
    _, _, code, _ = recipe("A filter")
    drops = run_in(filter_module, code)["_too_few_pixels"]
    table = pa.table({"original_width": [64, 64, None], "original_height": [64, 63, 9]})
    assert drops(table, types.SimpleNamespace(min_pixels=4096)).to_pylist() == [False, True, None]
    assert '"too_small"' in TEXT and "too_small" in rows.REASONS
    assert {"bad_aspect"} <= {each.reason for each in filter_module.FILTERS}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_sampler(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, _, test = recipe("A sampler")
    monkeypatch.setitem(samplers.SAMPLERS, "adams_bashforth", run_in(samplers, code)["adams_bashforth"])  # type: ignore[misc]
    run_in(test_samplers, test)["test_adams_bashforth_is_far_nearer_than_ddim"](schedule)
    test_samplers.test_deterministic_samplers_recover_mean_and_covariance("adams_bashforth", schedule, 25)  # type: ignore[arg-type]


def test_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    code, test = recipe("A metric")
    monkeypatch.setitem(metrics.METRICS, "diversity", run_in(metrics, code)["diversity"])  # type: ignore[arg-type]
    names = run_in(test_metrics, f"from unclip.evaluation.metrics import METRICS\n{test}")
    names["test_diversity_of_equal_and_of_orthogonal_images"]()


def test_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the run, which `tests/pipelines/test_toy_system.py` makes of much the same code."""
    system_code, pipeline_code, _ = recipe("A system")
    system, pipeline = types.ModuleType("unclip.systems.painter"), types.ModuleType("pipelines.systems.painter")
    for module, code in ((system, system_code), (pipeline, pipeline_code)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(code, vars(module))
    network = system.PAINTER.network(system.PainterConfig(), Shapes(8, TextShape(4, 8, 10)))
    assert network.build()(*network.inputs(2)).shape == (2, 3, 16, 16)
    objective = system.PainterObjective(system.PainterConfig(), 8)
    tensors = {"images": torch.zeros(2, 3, 16, 16), "text_embedding": torch.ones(2, 8)}
    assert objective.loss(objective.model, tensors, torch.Generator()) > 0
    assert system.PAINTER.build(objective.facts()).sizes == objective.model.sizes
    assert isinstance(pipeline.PIPELINE, Pipeline) and system.SYSTEM.name == "painter"
    config = pipeline.PIPELINE.config(ingest=IngestConfig(urls="pairs.parquet"), system="painter")
    dag = dags.compose(pipeline.PIPELINE.compose, config, Run("", "", "", Tracker("", ""), ""))
    assert {"curate", "painter", "evaluate", "publish"} <= dag.keys() and dag["painter"].stage.part is system.PAINTER
