"""Composition of the DAG from a configuration."""

from pipelines import dag as dags
from pipelines.dataset import PipelineConfig
from pipelines.pipeline import find_pipeline
from tasks.stage import Run
from tasks.tracking import Tracker


def compose(config: PipelineConfig, run: Run | None = None) -> dags.Dag:
    """Compose the DAG of a configuration; without a run it can be inspected but not executed."""
    placeholder = Run("", "", config.storage, Tracker("", ""), "")
    return dags.compose(find_pipeline(config.system).compose, config, run or placeholder)
