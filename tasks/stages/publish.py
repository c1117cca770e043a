"""Stage `publish`: publish a system's trained parts as one stack, in the store and in MLflow's registry."""

import dataclasses
import re
import time

from tasks import promotion
from tasks.promotion import PromotionConfig
from tasks.published import NAME, Entry
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from unclip.config import fingerprint, require
from unclip.systems.system import StackFiles, save_stack

SYSTEM = "{system}"


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    name: str = "{system}"
    """Name of the registered model; {system} stands for the name of the system."""
    promotion: PromotionConfig = PromotionConfig()
    """Conditions under which the new version becomes the champion, which `unclip sample` takes."""

    def __post_init__(self) -> None:
        text = self.name.replace(SYSTEM, "x")
        require(bool(re.fullmatch(NAME, text)), "name", self.name, "letters, digits, dots, dashes, underscores")


def _pin(config: PublishConfig, pinning: Pinning) -> PublishConfig:
    return dataclasses.replace(config, name=config.name.replace(SYSTEM, pinning.config.system))


@stage("publish", version=6, pin=_pin, reads_snapshot=True)
def publish(
    context: StageContext,
    config: PublishConfig,
    dataset: Artifact,
    evaluate: Artifact,
    report: Artifact,
    *parts: Artifact,
) -> Output:
    """Save the evaluated system as a stack and register it, as champion if it beats the present one, else as challenger."""
    stack = StackFiles.of(evaluate.facts["stack"])
    folder = f"{context.folder}/stack"
    save_stack(folder, stack)
    snapshot = Snapshot.of(dataset.facts).digest
    context.log_dataset(snapshot, report.uri, {"snapshot": snapshot, "report": report.uri})
    digest = fingerprint(stack.system, [part.digest for part in (dataset, *parts)], dict(stack.sampling))
    made_of = {part.stage: part.fingerprint for part in (dataset, report, *parts, evaluate)}
    candidate = Entry(
        folder,
        digest,
        time.time(),
        system=stack.system,
        snapshot=snapshot,
        pipeline=context.run.pipeline,
        run=context.run.id,
        image_size=evaluate.facts["image_size"],
        metrics=evaluate.facts["metrics"][promotion.GROUP],
        stages={**made_of, context.stage: context.fingerprint},
    )
    outcome = promotion.publish(
        context,
        config.name,
        config.promotion,
        candidate,
        evaluate,
        register=lambda: context.tracker.register(folder, config.name),
    )
    return Output(folder, digest, outcome.facts(config.name))
