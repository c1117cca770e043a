"""Checks that run before anything starts, and the pinning of a pipeline's inputs."""

import contextlib
import dataclasses
from typing import Any

from pipelines import dag as dags
from pipelines import scene_server
from pipelines.dag import Node
from pipelines.dataset import PipelineConfig
from pipelines.pipeline import compose
from pipelines.records import tracking_uri
from tasks.stage import Pinning
from tasks.store import Store
from unclip import files
from unclip.config import fingerprint, to_dict
from unclip.errors import ConfigError
from unclip.scratch import scratch_folder


def prepare(config: PipelineConfig, retry_failed: bool = False, read_only: bool = False) -> PipelineConfig:
    """Check all settings and inputs before anything starts, and pin the inputs.

    Args:
        retry_failed: download again the URLs that failed for transient reasons.
        read_only: write nothing to the storage, which need not exist yet.

    Returns:
        The configuration with the values that the pipeline fills in: digests of the list, the block lists and the probes,
        and limits for the report.

    Raises:
        UnclipError: a setting or an input is invalid.
    """
    tracking_uri(config)  # raises if there can be none
    store = Store(config.storage)
    if read_only:
        store.check_permissions()
    else:
        store.check_writable()
    with contextlib.ExitStack() as stack:
        urls = config.ingest.urls
        if config.scenes is not None:
            urls = store.uri("scenes", f"{fingerprint(to_dict(config.scenes))[:16]}.parquet")
            folder = str(stack.enter_context(scratch_folder("scenes"))) if read_only else None
            config = _with_scenes(config, urls, folder)
        for node in compose(config).values():
            if node.stage.pin is not None:
                workers = config.resources.of(node.stage.name).num_workers if node.stage.has_workers else 1
                section = _pin(node, Pinning(store, config, retry_failed, workers))
                config = dags.with_section(config, node.section, section)
    return dataclasses.replace(config, ingest=dataclasses.replace(config.ingest, urls=urls))


def _pin(node: Node, pinning: Pinning) -> Any:
    assert node.stage.pin is not None
    try:
        return node.stage.pin(node.config, pinning)
    except ConfigError as error:
        message, section = str(error), ".".join(node.section)
        raise ConfigError(message if message.startswith(f"{section}.") else f"{section}.{message}") from None


def _with_scenes(config: PipelineConfig, urls: str, folder: str | None) -> PipelineConfig:
    """Write the list of procedural scenes, and allow downloads from their server.

    Args:
        urls: URI of the list, which is written if it does not exist.
        folder: temporary folder to write it to instead; None writes to `urls`.
    """
    assert config.scenes is not None
    if not files.exists(urls):
        urls = urls if folder is None else f"{folder}/{urls.rpartition('/')[2]}"
        scene_server.write_url_list(config.scenes, urls)
    allow_hosts = (*config.download.allow_hosts, config.scenes.address)
    ingest = dataclasses.replace(config.ingest, urls=urls)
    return dataclasses.replace(
        config, ingest=ingest, download=dataclasses.replace(config.download, allow_hosts=allow_hosts)
    )
