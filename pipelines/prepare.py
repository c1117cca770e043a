"""Checks before anything starts, and the pinning of a pipeline's inputs."""

import dataclasses

from pipelines import scene_server
from pipelines.composition import compose
from pipelines.config import PipelineConfig
from pipelines.records import tracking_uri
from tasks.stages.curate import pin_probes
from tasks.stages.download import pin_attempt
from tasks.stages.filter import check_settings
from tasks.stages.ingest import check_source
from tasks.stages.report import Limit
from tasks.store import Store
from tasks.tombstones import tombstones_digest
from unclip.config import fingerprint, to_dict
from unclip.training import curves


def prepare(config: PipelineConfig, retry_failed: bool = False) -> PipelineConfig:
    """Check everything that can be wrong before anything starts, and pin the inputs.

    Args:
        retry_failed: fetch again what failed for reasons that may have passed.

    Returns:
        The configuration with what the pipeline fills in: digests of the list, of the block lists and of the probes, limits
        for the report.

    Raises:
        UnclipError: what is wrong, and what to do.
    """
    tracking_uri(config)  # raises when there can be none
    store = Store(config.storage)
    store.check_writable()
    for node in compose(config).values():
        reference_curve = node.config.trainer.reference_curve if hasattr(node.config, "trainer") else None
        if reference_curve is not None:
            curves.read(reference_curve)
    ingest, download = config.ingest, config.download
    if config.scenes is not None:
        name = fingerprint(to_dict(config.scenes))[:16]
        urls = store.uri("scenes", f"{name}.parquet")
        if not store.exists("scenes", f"{name}.parquet"):
            scene_server.write_url_list(config.scenes, urls)
        ingest = dataclasses.replace(ingest, urls=urls)
        download = dataclasses.replace(download, allow_hosts=(*download.allow_hosts, config.scenes.address))
    ingest = dataclasses.replace(ingest, digest=check_source(ingest), tombstones=tombstones_digest(store))
    download = pin_attempt(store, download, retry_failed)
    limits = {**config.filter.limits(), **config.curate.limits()}
    report = dataclasses.replace(config.report, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))
    curate = pin_probes(config.curate)
    filter = dataclasses.replace(config.filter, digest=check_settings(config.filter))
    return dataclasses.replace(config, ingest=ingest, download=download, filter=filter, curate=curate, report=report)
