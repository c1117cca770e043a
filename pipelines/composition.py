"""The DAG that a configuration asks for."""

from pipelines import dag as dags
from pipelines.config import PipelineConfig
from pipelines.systems.unclip import text_to_image
from tasks.stage import Run
from tasks.tracking import Tracker


def compose(config: PipelineConfig, run: Run | None = None) -> dags.Dag:
    """The DAG of a configuration; without a run, to look at only."""
    placeholder = Run("", "", config.storage, Tracker("", ""), "")
    return dags.compose(text_to_image, config, run or placeholder)
