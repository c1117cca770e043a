"""Stage `publish`: publish a system's trained parts as one stack, in the store and in MLflow's registry."""

import dataclasses
import re
import time

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require
from unclip.systems.system import StackFiles, save_stack


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


@stage("publish", version=5, reads_snapshot=True)
def publish(
    context: StageContext,
    config: PublishConfig,
    dataset: Artifact,
    evaluate: Artifact,
    report: Artifact,
    *parts: Artifact,
) -> Output:
    """Save the evaluated system as a stack, register it in MLflow and move the alias to it."""
    stack = StackFiles.of(evaluate.facts["stack"])
    folder = f"{context.folder}/stack"
    save_stack(folder, stack)
    snapshot = Snapshot.of(dataset.facts).digest
    context.log_dataset(snapshot, report.uri, {"snapshot": snapshot, "report": report.uri})
    version = context.tracker.register(folder, config.name, config.alias)
    digest = fingerprint(stack.system, [part.digest for part in (dataset, *parts)], dict(stack.sampling))
    record = {"stack": folder, "digest": digest, "at": time.time()}
    context.store.write_json(record, "published", f"{config.name}.json")
    return Output(folder, digest, {"name": config.name, "alias": config.alias, "version": version})
