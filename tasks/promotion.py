"""Promotion: a published version becomes the champion only if it is better than the present one.

Candidate and champion are compared image by image, on the same captions and the same noise. The champion is sampled anew for the
captions of the candidate's evaluation, unless it was before: the scores of a stack stay in the storage.

Letters: N captions.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import published, registry, tables
from tasks.published import CHALLENGER, SCORES, Entry, Record
from tasks.scoring import Scoring, sample_groups, scores_table
from tasks.stage import Artifact, Resources, StageContext
from tasks.store import Store
from tasks.tracking import Tracker
from unclip import files
from unclip.config import fingerprint, require
from unclip.errors import CheckpointError, StageError, StorageError, UnclipError
from unclip.evaluation import metrics
from unclip.evaluation.intervals import Difference, paired_difference
from unclip.evaluation.metrics import Sampled
from unclip.messages import reason_of
from unclip.models import clip as clip_models
from unclip.scratch import scratch_folder
from unclip.systems.system import ClipFiles, StackFiles, read_stack
from unclip.training import checkpoints

GROUP = "heldout"
"""Captions that decide."""
ACCURACY, CLIP_SCORE = "accuracy.all", "clip_score"
_SCORES_VERSION = 1
"""Raise it when code samples or scores the same stack otherwise."""
_ATTEMPTS = 20
"""Times that a decision is made again because another run has promoted meanwhile."""


@dataclasses.dataclass(frozen=True)
class PromotionConfig:
    """Conditions under which a new version becomes the champion."""

    metrics: tuple[str, ...] = ()
    """Per-image metrics, of which more is better, in each of which it must beat the champion; none takes accuracy.all where
    captions describe scenes, and clip_score otherwise."""
    confidence: float = 0.99
    """Confidence of the interval of the paired difference, which must lie above zero."""
    minima: dict[str, float] = dataclasses.field(default_factory=dict)
    """Least values of metrics of held-out captions, also for the first version."""
    always: bool = False
    """Promote every version, without a comparison."""

    def __post_init__(self) -> None:
        require(0.5 <= self.confidence < 1, "promotion.confidence", self.confidence, "0.5 or more, below 1")
        for name in self.metrics:
            is_error = name.startswith(("swapped.", "reconstruction_l1"))
            require(not is_error, "promotion.metrics", name, "metrics of which more is better")
        for name, value in self.minima.items():
            require(math.isfinite(value), f"promotion.minima.{name}", value, "a finite number")


@dataclasses.dataclass(frozen=True)
class Decision:
    """Outcome of a comparison."""

    is_better: bool
    reason: str
    """One sentence, for people."""
    differences: Mapping[str, Difference] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a publication."""

    entry: Entry
    alias: str
    """champion or challenger."""

    def facts(self, name: str) -> dict[str, Any]:
        """Facts of the stage."""
        return {"name": name, "version": self.entry.version, "alias": self.alias, "reason": self.entry.reason}


def compare(candidate: pa.Table, champion: pa.Table, config: PromotionConfig, label: str = "the champion") -> Decision:
    """Decide if a candidate beats the champion.

    Besides the interval, enough images must differ that their number could not come about by chance: k images that are all
    better have a probability of 2^(1-k) under equal models (sign test), where an interval of few values is too narrow.

    Args:
        candidate: [N] rows with a column for each per-image metric; nulls are left out pairwise.
        champion: the same for the champion, of the same captions and noise.
    """
    names = config.metrics or _default_metrics(candidate)
    least = math.ceil(1 - math.log2(1 - config.confidence))
    differences: dict[str, Difference] = {}
    for name in names:
        lacking = [who for who, table in (("it", candidate), (label, champion)) if name not in table.column_names]
        if lacking:
            known = ", ".join(column for column in candidate.column_names if _is_metric(candidate, column))
            return Decision(False, f"cannot be compared: {lacking[0]} has no {name}, only {known}", differences)
        one, other = _values(candidate, name), _values(champion, name)
        if int((~(one - other).isnan()).sum()) < 2:
            return Decision(False, f"cannot be compared with {label}: fewer than 2 captions have {name}", differences)
        found = differences[name] = paired_difference(one, other, config.confidence)
        num_different = int(((one - other).nan_to_num(0.0) != 0).sum())
        shown = (
            f"{label}: {name} {_mean(one):.3f} against {_mean(other):.3f}, difference {found.mean:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}] at {100 * config.confidence:g} % on {found.count:,} captions"
        )
        if not found.low > 0:
            worse = "worse" if found.high < 0 else "not clearly better"
            return Decision(False, f"{worse} than {shown}", differences)
        if num_different < least:
            few = f"too few images differ, {num_different} of the {least} needed, to be called better"
            return Decision(False, f"{few} than {shown}", differences)
    return Decision(True, f"better than {shown}", differences)


def lacks(values: Mapping[str, float], minima: Mapping[str, float]) -> str | None:
    """First minimum that metrics of held-out captions do not reach, as a sentence; None if all are reached."""
    for name, least in minima.items():
        value = values.get(name)
        if value is None or not value >= least:
            got = "is not measured" if value is None else f"is {value:.3f}"
            return f"{name} {got}, below the minimum {least:g}"
    return None


def publish(
    context: StageContext,
    name: str,
    config: PromotionConfig,
    candidate: Entry,
    evaluation: Artifact,
    register: Callable[[Mapping[str, str]], str | None],
) -> Outcome:
    """Register a candidate, decide, and record it as champion or challenger.

    Args:
        candidate: the new version; its number is filled in.
        evaluation: artifact of `evaluate`, whose scores are the candidate's.
        register: makes a version with these tags in the registry, unless it has one with the same stack; returns its number,
            None if MLflow does not accept it.
    """
    store, tracker = context.store, context.tracker
    scores = Scores.of(context, name, evaluation)
    scores.remember(candidate, scores.table)
    known = tracker.attempt(lambda client: registry.with_digest(client, name, candidate.digest))
    version = known.version if known is not None else register(registry.tags_of(candidate))
    candidate = dataclasses.replace(candidate, version=version)
    for _ in range(_ATTEMPTS):
        # Outside of the lock, as it may sample.
        record = _present(tracker, published.read(store, name))
        decision = _decide(record, candidate, config, scores)
        with published.changing(store, name) as now:
            now = _present(tracker, now)
            if _digest(now.champion) != _digest(record.champion):
                continue
            changed = published.commit(
                store,
                _changed(now, candidate, decision),
                lambda changed: tracker.attempt(lambda client: registry.follow(client, changed)),
            )
        entry = changed.find(candidate.digest)
        assert entry is not None
        return Outcome(entry, (*changed.aliases_of(entry), CHALLENGER)[0])
    raise StageError(f"{name}: other runs promote versions faster than this one can be compared. Run it again alone.")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of stacks for the captions, noise and CLIP of one evaluation."""

    store: Store
    captions: Sequence[str]
    """Captions of the evaluation; "" for one that was taken down since, whose image counts for neither model."""
    scoring: Scoring
    clip: ClipFiles
    clip_digest: str
    image_size: int
    """Resolution of the candidate's images, pixels."""
    table: pa.Table
    """Scores of the candidate."""
    metrics: Mapping[str, float]
    """Metrics of the candidate."""
    resources: Resources
    fetch: Callable[[Entry], StackFiles]

    @classmethod
    def of(cls, context: StageContext, name: str, evaluation: Artifact) -> "Scores":
        facts = evaluation.facts
        table = tables.read_file(facts["scores"])
        table = _without_blanks(table.filter(pc.equal(table["group"], GROUP)))
        clip = dict(facts["measured_by"])
        digest = clip.pop("digest")
        return cls(
            context.store,
            table["caption"].to_pylist(),
            Scoring(facts["seed"], facts["batch_size"], 1),
            ClipFiles(**clip),
            digest,
            facts["image_size"],
            table,
            facts["metrics"][GROUP],
            context.run.resources.get("evaluate", context.resources),
            lambda entry: _stack_of(context, name, entry),
        )

    def path(self, entry: Entry) -> tuple[str, str]:
        """File with the scores of a stack. The captions are in its name only, as a digest: they may be taken down."""
        scoring = (_SCORES_VERSION, self.scoring.seed, self.scoring.batch_size, self.clip_digest)
        return SCORES, f"{entry.scores}-{fingerprint(list(self.captions), *scoring)[:32]}.parquet"

    def remember(self, entry: Entry, table: pa.Table) -> None:
        names = [column for column in table.column_names if _is_metric(table, column)]
        tables.write_file(self.store.uri(*self.path(entry)), table.select(names))

    def of_champion(self, champion: Entry) -> pa.Table:
        """Scores of the champion: those that the storage has, or else of images that are sampled now.

        Raises:
            UnclipError: it cannot be loaded or sampled, or its images have another size.
        """
        if champion.image_size not in (None, self.image_size):
            raise _other_size(champion.image_size, self.image_size)
        path = self.path(champion)
        if self.store.exists(*path):
            return tables.read_file(self.store.uri(*path))
        stand_in = next(filter(None, self.captions), "")  # so that the others keep their noise
        captions = [caption or stand_in for caption in self.captions]
        groups = {GROUP: captions}
        [measured] = sample_groups(groups, self.clip, self.fetch(champion), self.scoring, self.resources).values()
        size = measured.shown.shape[1]
        if size != self.image_size:
            raise _other_size(size, self.image_size)
        estimates = metrics.measure(Sampled(captions, measured.features))
        table = scores_table(groups, {GROUP: estimates})
        place = table.column_names.index("caption")
        table = _without_blanks(table.set_column(place, "caption", pa.array(self.captions, pa.string())))
        self.remember(champion, table)
        return table


class _GoneError(StorageError):
    """The files of a champion are nowhere."""


def _decide(record: Record, candidate: Entry, config: PromotionConfig, scores: Scores) -> Decision | None:
    """Decision about a candidate; None if it is the champion already."""
    champion = record.champion
    if champion is not None and champion.digest == candidate.digest:
        return None
    if config.always:
        return Decision(True, "promoted without a comparison, as publish.promotion.always asks")
    lack = lacks(scores.metrics, config.minima)
    if lack is not None:
        return Decision(False, lack)
    if champion is None:
        return Decision(True, "the first champion")
    label = f"version {champion.label}"
    try:
        return compare(scores.table, scores.of_champion(champion), config, label)
    except _GoneError as error:
        return Decision(True, f"takes the place of {label}, which is gone: {error}")
    except Exception as error:  # of many types, Ray's among them: the work of a whole run must not fail because of it
        cause = getattr(error, "cause", None) or error
        reason = str(cause) if isinstance(cause, UnclipError) else reason_of(cause)
        return Decision(False, f"cannot be compared with {label}: {reason}")


def _changed(record: Record, candidate: Entry, decision: Decision | None) -> Record:
    if decision is None:
        champion = record.champion
        assert champion is not None
        return record.with_version(dataclasses.replace(candidate, at=champion.at, reason=champion.reason))
    change = record.promote if decision.is_better else record.challenge
    return change(candidate, decision.reason)


def _present(tracker: Tracker, record: Record) -> Record:
    """Record as the registry has it, if MLflow answers."""
    return tracker.attempt(lambda client: registry.synced(client, record)) or record


def _stack_of(context: StageContext, name: str, entry: Entry) -> StackFiles:
    """Files of a published stack, where every node sees them.

    Raises:
        StorageError: they are nowhere, or MLflow, which alone has them, does not answer.
        CheckpointError: they are damaged.
    """
    if entry.stack and files.exists(f"{entry.stack}/stack.json"):
        return open_stack(entry.stack)
    tracker, store = context.tracker, context.store
    missing = f"{entry.stack or 'its stack'} is not in this storage"
    if entry.version is None:
        raise _GoneError(f"{missing}, and was never in MLflow")
    answer = tracker.attempt(lambda client: (registry.find_entry(client, name, entry),))
    if answer is None:
        raise StorageError(f"{missing}, and MLflow does not answer")
    [found] = answer
    if found is None:
        raise _GoneError(f"{missing}, nor in MLflow")
    with scratch_folder("champion") as scratch:
        folder = registry.stack_folder(store, tracker.tracking_uri, found, scratch)
        if not files.exists(f"{folder}/stack.json"):
            raise _GoneError(f"{missing}, and {folder} is not there")
        if not folder.startswith(str(scratch)):
            return open_stack(folder)
        shared = f"{context.intermediate}/champion"
        for each in files.walk(folder):
            files.copy(f"{folder}/{each.name}", f"{shared}/{each.name}")
        return open_stack(shared)


def open_stack(folder: str) -> StackFiles:
    """Read the files of a published stack, in a local folder or an object store.

    Raises:
        CheckpointError: `stack.json` is damaged or names other places.
    """
    if "://" not in folder:
        return read_stack(folder)
    facts = files.read_json(f"{folder}/stack.json")
    parts, clip = facts["parts"], facts["clip"]
    if not all(isinstance(part, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*", part) for part in parts):
        raise CheckpointError(f"{folder}/stack.json: got parts {parts!r}, expected names of folders in the stack.")
    if clip is not None:
        model = str(clip["model"])
        if model != "local-dir:clip" and not clip_models.is_named(model, clip["pretrained"]):
            raise CheckpointError(
                f"{folder}/stack.json: got a CLIP {model!r}, expected local-dir:clip or one by its name."
            )
        clip = ClipFiles(**{**clip, "model": f"local-dir:{folder}/clip" if model == "local-dir:clip" else model})
    has_statistics = files.exists(f"{folder}/statistics/{checkpoints.MANIFEST}")
    models = {part: f"{folder}/{part}" for part in parts}
    statistics = f"{folder}/statistics" if has_statistics else None
    return StackFiles(facts["system"], models, clip, statistics, facts["sampling"])


def _other_size(champion: int | None, candidate: int) -> CheckpointError:
    return CheckpointError(
        f"its images have {champion} pixels, those of the candidate {candidate}, so their scores cannot be compared"
    )


def _digest(entry: Entry | None) -> str | None:
    return None if entry is None else entry.digest


def _default_metrics(table: pa.Table) -> tuple[str, ...]:
    has_accuracy = ACCURACY in table.column_names and table[ACCURACY].null_count < table.num_rows
    return (ACCURACY if has_accuracy else CLIP_SCORE,)


def _is_metric(table: pa.Table, column: str) -> bool:
    return bool(pa.types.is_floating(table.schema.field(column).type))


def _without_blanks(table: pa.Table) -> pa.Table:
    """Scores, null where the caption is blank."""
    is_blank = pc.equal(table["caption"], "")
    for place, name in enumerate(table.column_names):
        if _is_metric(table, name):
            scores = table[name]
            table = table.set_column(place, name, pc.if_else(is_blank, pa.scalar(None, scores.type), scores))
    return table


def _values(table: pa.Table, name: str) -> torch.Tensor:
    """Column as [N] float64; NaN for nulls."""
    return torch.from_numpy(table[name].cast("float64").to_numpy().copy())


def _mean(values: torch.Tensor) -> float:
    return float(values.nanmean())
