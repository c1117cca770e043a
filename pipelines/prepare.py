"""Checks before anything starts, and the pinning of a pipeline's inputs."""

import dataclasses

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.composition import compose
from pipelines.dataset import PipelineConfig
from pipelines.records import tracking_uri
from tasks.stage import Pinning
from tasks.store import Store
from unclip.config import fingerprint, to_dict


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
    if config.scenes is not None:
        config = _with_scenes(config, store)
    for node in compose(config).values():
        if node.stage.pin is not None:
            section = node.stage.pin(node.config, Pinning(store, config, retry_failed))
            config = dags.with_section(config, node.section, section)
    return config


def _with_scenes(config: PipelineConfig, store: Store) -> PipelineConfig:
    """Write the list of the procedural scenes, and let their server be asked."""
    assert config.scenes is not None
    name = fingerprint(to_dict(config.scenes))[:16]
    urls = store.uri("scenes", f"{name}.parquet")
    if not store.exists("scenes", f"{name}.parquet"):
        scene_server.write_url_list(config.scenes, urls)
    allow_hosts = (*config.download.allow_hosts, config.scenes.address)
    ingest = dataclasses.replace(config.ingest, urls=urls)
    return dataclasses.replace(
        config, ingest=ingest, download=dataclasses.replace(config.download, allow_hosts=allow_hosts)
    )
