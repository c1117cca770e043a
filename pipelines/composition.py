"""The DAG that a configuration asks for."""

from pipelines import dag as dags
from pipelines.dataset import PipelineConfig
from pipelines.pipeline import pipeline_of
from tasks.stage import Run
from tasks.tracking import Tracker


def compose(config: PipelineConfig, run: Run | None = None) -> dags.Dag:
    """The DAG of a configuration; without a run, to look at only."""
    placeholder = Run("", "", config.storage, Tracker("", ""), "")
    return dags.compose(pipeline_of(config.system).compose, config, run or placeholder)
