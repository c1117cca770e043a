"""Stage `publish`: the trained models and the facts of their embeddings as one stack, in the store and in MLflow's registry."""

import dataclasses
import re
import time

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, load, require
from unclip.systems.unclip.stack import SamplingConfig, save_stack


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    name: str = "unclip"
    """Name of the registered model."""
    alias: str = "latest-published"
    """Alias that is moved to the new version; `unclip sample` follows it."""

    def __post_init__(self) -> None:
        for setting in ("name", "alias"):
            value = getattr(self, setting)
            require(bool(re.fullmatch(r"[\w.-]+", value)), setting, value, "letters, digits, dots, dashes, underscores")


@stage("publish", version=3)
def publish(
    context: StageContext,
    config: PublishConfig,
    dataset: Artifact,
    evaluate: Artifact,
    report: Artifact,
    clip: Artifact,
    prior: Artifact,
    decoder: Artifact,
    *upsamplers: Artifact,
) -> Output:
    """Gather the stack, register it in MLflow and move the alias to it."""
    models = {part.stage: part.uri for part in (prior, decoder, *upsamplers)}
    models["statistics"] = Snapshot.of(dataset.facts).statistics
    clip_model = clip.facts["model"]
    if clip_model.startswith("local-dir:"):
        models["clip"] = clip_model.removeprefix("local-dir:")
        clip_model = "local-dir:clip"
    folder = f"{context.folder}/stack"
    sampling = load(SamplingConfig, evaluate.facts["sampling"])
    names = [upsampler.stage for upsampler in upsamplers]
    save_stack(folder, models, clip_model, clip.facts["pretrained"], sampling, upsamplers=names)
    snapshot = prior.facts["snapshot"]
    context.tracker.dataset(context.run.pipeline, snapshot, report.uri, {"snapshot": snapshot, "report": report.uri})
    version = context.tracker.register(folder, "stack", config.name, config.alias)
    parts = (dataset, clip, prior, decoder, *upsamplers)
    digest = fingerprint([*(part.digest for part in parts), evaluate.facts["sampling"]])
    record = {"stack": folder, "digest": digest, "at": time.time()}
    context.store.write_json(record, "published", f"{config.name}.json")
    return Output(folder, digest, {"name": config.name, "alias": config.alias, "version": version})
