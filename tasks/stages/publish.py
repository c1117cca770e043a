"""Stage `publish`: publish a system's trained parts as one stack, in the store and in MLflow's registry."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from tasks import flavour, model_card, promotion
from tasks.origin import code_of
from tasks.promotion import PromotionConfig
from tasks.published import NAME, Entry
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.tracking import Listing
from unclip import files
from unclip.config import fingerprint, require
from unclip.systems.system import ClipFiles, StackFiles, save_stack

SYSTEM = "{system}"
COLUMNS = 8
"""Columns of the captioned grids of `evaluate`."""


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
    folder = f"{context.folder}/{flavour.STACK}"
    save_stack(folder, stack)
    snapshot = Snapshot.of(dataset.facts).digest
    context.log_dataset(snapshot, report.uri, {"snapshot": snapshot, "report": report.uri})
    digest = fingerprint(stack.system, [part.digest for part in (dataset, *parts)], dict(stack.sampling))
    listing = _describe(context, config.name, digest, dataset, evaluate, stack)
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
        register=lambda tags: context.tracker.register(
            context.folder, config.name, dataclasses.replace(listing, tags={**listing.tags, **tags})
        ),
    )
    return Output(folder, digest, outcome.facts(config.name))


def _describe(
    context: StageContext, name: str, digest: str, dataset: Artifact, evaluate: Artifact, stack: StackFiles
) -> Listing:
    """Write the model card, its images and MLflow's files beside the stack; returns what MLflow shows of them."""
    record = ("runs", context.run.id, "run.json")
    settings = context.store.read_json(*record).get("config", {}) if context.store.exists(*record) else {}
    facts = model_card.Facts(
        name=name,
        system=stack.system,
        digest=digest,
        at=time.time(),
        parts=model_card.parts_of(f"{context.folder}/{flavour.STACK}", stack),
        clip=None if stack.clip is None else _in_words(stack.clip),
        snapshot=Snapshot.of(dataset.facts).digest,
        rows=dataset.facts["rows"],
        reasons=dataset.facts["reasons"],
        metrics=evaluate.facts["metrics"],
        intervals=evaluate.facts["intervals"],
        captions=evaluate.facts["captions"],
        counts=evaluate.facts["counts"],
        image_size=evaluate.facts["image_size"],
        images=model_card.copy_images(evaluate.facts["images"], context.folder),
        has_preview=_preview(context, evaluate, settings),
        sampling=stack.sampling,
        settings=context.store.portable(settings),
        code=code_of(context.run.tags),
        pipeline=context.run.pipeline,
    )
    files.write(f"{context.folder}/{model_card.CARD}", model_card.card(facts).encode())
    flavour.write(context.folder, context.tracker.run_id)
    return model_card.listing_of(facts)


def _in_words(clip: ClipFiles) -> str:
    """CLIP of a stack, for people."""
    return (
        "in the stack" if clip.model.startswith("local-dir:") else " ".join(filter(None, (clip.model, clip.pretrained)))
    )


def _preview(context: StageContext, evaluate: Artifact, settings: Mapping[str, Any]) -> bool:
    """Write the small image of a description, from the captioned grid of the first group; returns True if there is one."""
    group = next(iter(evaluate.facts["captions"]), None)
    if group not in evaluate.facts["images"]:
        return False
    shown = min(settings.get("evaluate", {}).get("num_images", 0), evaluate.facts["captions"][group])
    num_rows = -(-shown // COLUMNS)
    return model_card.write_preview(evaluate.facts["images"][group], context.folder, num_rows)
