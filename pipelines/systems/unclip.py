"""The pipeline from a list of URLs to pictures: which stage feeds which. A new stage is one line here."""

from typing import Any

from pipelines.dag import Binder
from tasks.stages.clip import clip
from tasks.stages.curate import curate
from tasks.stages.dedup import dedup
from tasks.stages.download import download
from tasks.stages.embed import embed
from tasks.stages.evaluate import evaluate
from tasks.stages.filter import filter
from tasks.stages.ingest import ingest
from tasks.stages.publish import publish
from tasks.stages.report import report
from tasks.stages.train import decoder, prior, upsampler


def text_to_image(bind: Binder) -> Any:
    """Compose the DAG; returns its last node."""
    pairs = bind(ingest)
    images = bind(download, pairs)
    filtered = bind(filter, images)
    unique = bind(dedup, filtered)
    frozen_clip = bind(clip, unique)
    embeddings = bind(embed, unique, frozen_clip)
    dataset = bind(curate, embeddings)
    generators = (bind(prior, dataset, frozen_clip), bind(decoder, dataset, frozen_clip))
    trained = (*generators, *bind.each(upsampler, dataset))
    evaluation = bind(evaluate, dataset, frozen_clip, *trained)
    page = bind(report, dataset)
    return bind(publish, dataset, evaluation, page, frozen_clip, *trained)


DATASET_STAGE = "report"
"""The last stage of a dataset refresh."""
