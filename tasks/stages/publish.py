"""Stage `publish`: publish a system's trained parts as one stack, in the store and in MLflow's registry."""

import dataclasses
import re
import time

from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from unclip.config import fingerprint, require
from unclip.systems.system import StackFiles, save_stack

SYSTEM = "{system}"


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    name: str = "{system}"
    """Name of the registered model; {system} stands for the name of the system."""
    alias: str = "latest-published"
    """Alias that is moved to the new version; `unclip sample` follows it."""

    def __post_init__(self) -> None:
        for setting in ("name", "alias"):
            value = getattr(self, setting)
            text = value.replace(SYSTEM, "x")
            require(bool(re.fullmatch(r"[\w.-]+", text)), setting, value, "letters, digits, dots, dashes, underscores")


def _pin(config: PublishConfig, pinning: Pinning) -> PublishConfig:
    return dataclasses.replace(config, name=config.name.replace(SYSTEM, pinning.config.system))


@stage("publish", version=5, pin=_pin, reads_snapshot=True)
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
