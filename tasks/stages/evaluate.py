"""Stage `evaluate`: sample images of held-out captions with the whole system, and measure them.

The images are sampled and measured by `tasks.scoring`.

Letters: S resolution, M held-out rows, E width of embeddings.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks import tables
from tasks.lineage.evaluations import SCORES, blank_captions
from tasks.lineage.previews import publish as publish_previews
from tasks.prompts import read_suite
from tasks.reference import Reference, embeddings_reference, find_reference, read_embeddings
from tasks.scoring import Measured, Originals, Scoring, inception_features, sample_groups, scores_table
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.tombstones import load_tombstones
from unclip import files, imaging
from unclip.config import added, fingerprint, require, to_dict
from unclip.data import Places, RowReader
from unclip.errors import InputError
from unclip.evaluation import metrics, scenes
from unclip.evaluation.inception import read_weights
from unclip.evaluation.intervals import Estimate, intervals_of
from unclip.evaluation.metrics import Sampled
from unclip.systems.system import ClipFiles, StackFiles, find_system
from unclip.training import checkpoints

RECONSTRUCTIONS = "reconstructions"
"""Group of images that are sampled from the embeddings of held-out images."""
PROMPTS = "prompts"
"""Group of captions of the file of prompts, or start of its groups by category."""
HELDOUT_GROUPS = ("heldout", "repeated", RECONSTRUCTIONS)
"""Groups whose captions are those of the dataset's held-out rows."""
KEPT = "heldout.npy"
"""Images of held-out captions that are kept one by one, [N, S, S, 3] uint8."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `evaluate`; a system's pipeline adds the field `sampling`, of the system's own class."""

    num_captions: int = 256
    """Held-out captions to sample; fewer if the snapshot holds out fewer."""
    num_unseen: int = 0
    """Scene captions to sample whose combination of shape and colour is in no training image; for procedural scenes."""
    num_images: int = 48
    """Images of each group in its grid."""
    seed: int = 0
    """Seed for the noise and the unseen scenes."""
    system: str | None = None
    """Name of the system; filled in by the pipeline."""
    num_relations: int = added(0)
    """Scene captions of two objects in a relation to sample, whose attributes may get swapped; for procedural scenes."""
    num_repeated: int = added(0)
    """Held-out captions that are sampled several times each, for the diversity at a fixed caption; of scenes, those that name
    no place."""
    num_repeats: int = added(16)
    """Images of each of these captions."""
    num_kept: int = added(0)
    """Images of held-out captions that are kept one by one, besides the grid, for a comparison of systems."""
    num_reconstructed: int = added(0)
    """Held-out images that are sampled again from their embeddings, if the system can, and compared with the originals."""
    prompts: str | None = added(None)
    """File of captions to sample besides, by category; see `tasks.prompts`."""
    prompts_sha256: str | None = added(None)
    """Digest of that file; filled in by the pipeline."""
    inception: str | None = added(None)
    """File with the weights of Inception, for FID and KID; without it, distances are those of CLIP's embeddings alone."""

    def __post_init__(self) -> None:
        require(self.num_captions >= 1, "num_captions", self.num_captions, "at least 1")
        require(self.num_unseen >= 0, "num_unseen", self.num_unseen, "at least 0")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")
        require(0 <= self.seed < 2**64, "seed", self.seed, "0 to 2^64 - 1")
        require(self.num_relations >= 0, "num_relations", self.num_relations, "at least 0")
        require(self.num_repeated >= 0, "num_repeated", self.num_repeated, "at least 0")
        require(self.num_reconstructed >= 0, "num_reconstructed", self.num_reconstructed, "at least 0")
        require(self.num_repeats >= 2, "num_repeats", self.num_repeats, "at least 2")
        expected = f"0 to num_images, {self.num_images}"
        require(0 <= self.num_kept <= self.num_images, "num_kept", self.num_kept, expected)


def _pin(config: Any, pinning: Pinning) -> Any:
    """Fill in the system, and check and pin the files that the settings name; workers read them by absolute paths.

    Raises:
        InputError: a file cannot be read, or is not what it should be.
    """
    system = pinning.config.system
    require(config.system in (None, system), "evaluate.system", config.system, f"{system}, the system of the pipeline")
    config = dataclasses.replace(config, system=system)
    if config.prompts is not None:
        digest = read_suite(config.prompts).digest
        expected = f"{digest}, that of {config.prompts}, or none"
        require(config.prompts_sha256 in (None, digest), "evaluate.prompts_sha256", config.prompts_sha256, expected)
        config = dataclasses.replace(config, prompts=_absolute(config.prompts), prompts_sha256=digest)
    if config.inception is not None:
        read_weights(config.inception)
        config = dataclasses.replace(config, inception=_absolute(config.inception))
    return config


def _absolute(uri: str) -> str:
    path = files.to_path(uri)
    return uri if path is None else str(path)


@stage("evaluate", version=5, has_workers=True, pin=_pin, shows_rows=True, reads_snapshot=True)
def evaluate(context: StageContext, config: Any, dataset: Artifact, clip: Artifact, *parts: Artifact) -> Output:
    """Sample held-out captions with the whole system and measure the images."""
    snapshot = Snapshot.of(dataset.facts)
    pairs = heldout_pairs(snapshot)
    captions = pairs["caption"].to_pylist()
    key_of = dict(zip(captions, pairs["key"].to_pylist(), strict=True))
    groups = {**caption_groups(config, captions), **prompt_groups(config)}
    if config.num_reconstructed and find_system(config.system).reconstructs:
        groups[RECONSTRUCTIONS] = captions[: config.num_reconstructed]
    stack = stack_files(config.system, parts, snapshot.statistics, to_dict(config.sampling))
    scoring = Scoring(config.seed, config.sampling.batch_size, config.num_images, config.inception)
    measuring_clip = ClipFiles(clip.facts["model"], clip.facts["pretrained"])
    sampled = sample_groups(
        groups,
        measuring_clip,
        stack,
        scoring,
        context.resources,
        context.progress(sum(map(len, groups.values())), "images"),
        embedded=("heldout",),
        reconstructed={RECONSTRUCTIONS: _originals(snapshot, pairs)} if RECONSTRUCTIONS in groups else {},
    )
    image_size = sampled["heldout"].shown.shape[1]
    references = _references(context, snapshot, scoring, image_size)
    with_own = {name: len(groups[name]) for name in ("heldout", RECONSTRUCTIONS) if name in groups}
    own = read_embeddings(snapshot, pairs.slice(0, max(with_own.values())))  # [at least as many as either, E]

    by_group = ("accuracy", "clip_score", "metrics", "intervals", "counts", "captions", "images", "seconds_per_image")
    facts: dict[str, Any] = {name: {} for name in by_group}
    estimates: dict[str, dict[str, Estimate]] = {}
    previews: dict[str, bytes] = {}
    for group, measured in sampled.items():
        given: dict[str, Any] = {name: reference.statistics for name, reference in references.items()}
        given["own"] = own[: with_own[group]] if group in with_own else None
        estimates[group], images = summarise(group, Sampled(groups[group], measured.features, **given), measured)
        values = metrics.values_of(estimates[group])
        facts["captions"][group] = len(groups[group])
        facts["metrics"][group] = values
        facts["intervals"][group] = {name: list(found) for name, found in intervals_of(estimates[group]).items()}
        facts["counts"][group] = {name: estimate.count for name, estimate in estimates[group].items()}
        facts["clip_score"][group] = values["clip_score"]
        accuracy = {name: values[f"accuracy.{name}"] for name in metrics.SCORED if f"accuracy.{name}" in values}
        if accuracy:
            facts["accuracy"][group] = accuracy
        if group in HELDOUT_GROUPS:
            previews[group] = grid_of(measured, groups[group])
        if group == RECONSTRUCTIONS:
            del images[group]
        facts["images"] |= {name: _publish(context, f"{name}.png", data) for name, data in images.items()}
        facts["seconds_per_image"][group] = measured.seconds / len(groups[group])
        if group == "heldout" and config.num_kept:
            facts["kept"] = _keep(context, measured, config.num_kept)
        context.tracker.metrics({f"{group}.{name.removeprefix('accuracy.')}": value for name, value in values.items()})
    shown = [caption for group in previews for caption in groups[group][: len(sampled[group].shown)]]
    keys = list(dict.fromkeys(key_of[caption] for caption in shown))
    publish_previews(context.store, context.tracker, context.folder, previews, keys)
    table = scores_table(groups, estimates, dict.fromkeys(HELDOUT_GROUPS, key_of))
    facts |= {"scores": _write_scores(context, table), "seed": scoring.seed, "batch_size": scoring.batch_size}
    facts["measured_by"] = {**dataclasses.asdict(measuring_clip), "digest": clip.digest}
    facts["image_size"] = image_size
    facts["references"] = {
        name: {"uri": found.uri, "digest": found.digest, "num_images": found.num_images}
        for name, found in references.items()
    }
    if measured_bits := bits_per_dim(stack):
        facts["bits_per_dim"] = measured_bits
        context.tracker.metrics({f"{part}.bits_per_dim": value for part, value in measured_bits.items()})
    facts["stack"] = stack.facts()
    digests = [measured.digests for measured in sampled.values()]
    return Output(context.folder, fingerprint(digests, facts["accuracy"]), facts)


def _originals(snapshot: Snapshot, rows: pa.Table) -> Originals:
    """Stored images of rows of `Snapshot.heldout_rows`."""
    reader = RowReader((snapshot.source("images", "jpg"),), Places([rows]))
    return lambda span: list(reader.read(np.arange(span.start, span.stop))["jpg"])


def _references(context: StageContext, snapshot: Snapshot, scoring: Scoring, image_size: int) -> dict[str, Reference]:
    """References of the snapshot by the field of `Sampled` that takes them; without held-out images, none."""
    found = {"reference": embeddings_reference(context.store, snapshot)}
    weights = scoring.inception
    if weights is not None:

        def measure(rows: pa.Table) -> torch.Tensor:
            originals = _originals(snapshot, rows)
            return inception_features(
                originals, rows.num_rows, weights, image_size, scoring.batch_size, context.resources
            )

        name = f"Inception of {image_size} pixels"
        found["inception_reference"] = find_reference(context.store, snapshot, name, measure)
    return {name: reference for name, reference in found.items() if reference is not None}


def _write_scores(context: StageContext, scores: pa.Table) -> str:
    """Write the scores of single images; captions of rows that are taken down meanwhile are blanked. Returns the URI."""
    uri = f"{context.folder}/{SCORES}"
    tables.write_file(uri, scores)
    blank_captions(context.folder, load_tombstones(context.store).keys)
    return uri


def bits_per_dim(stack: StackFiles) -> dict[str, float]:
    """Bits per dimension of held-out images by part, for parts that measured them when they were trained."""
    measured = {part: checkpoints.load_group(folder, "measured") for part, folder in stack.models.items()}
    return {part: found["bits_per_dim"].item() for part, found in measured.items() if "bits_per_dim" in found}


def stack_files(system: str, parts: Sequence[Artifact], statistics: str, sampling: dict[str, Any]) -> StackFiles:
    """Files of a system, from the artifacts of its parts; these may include a frozen CLIP."""
    models = {part.stage: part.uri for part in parts if "model" not in part.facts}
    clips = [ClipFiles(part.facts["model"], part.facts["pretrained"]) for part in parts if "model" in part.facts]
    return StackFiles(system, models, clips[0] if clips else None, statistics, sampling)


def heldout_pairs(snapshot: Snapshot) -> pa.Table:
    """Held-out pairs with different captions that no training pair has, each the first with its caption, in order of keys.

    Without such captions, returns the pairs of all captions of held-out pairs; without held-out pairs, training pairs. Chooses
    among the rows of `Snapshot.heldout_rows` and has their columns.
    """
    rows = snapshot.heldout_rows()
    first = pa.array(np.sort(np.unique(rows["caption"].to_numpy().astype(str), return_index=True)[1]))
    pairs = rows.take(first)
    fresh = pairs.filter(pc.invert(pairs["is_trained_on"]))
    return fresh if fresh.num_rows else pairs


def caption_groups(config: EvaluateConfig, heldout: Sequence[str]) -> dict[str, list[str]]:
    """Captions to sample, by group.

    Args:
        heldout: captions of `heldout_pairs`.
    """
    groups = {"heldout": list(heldout[: config.num_captions])}
    if config.num_unseen:
        groups["unseen"] = unseen_captions(config.num_unseen, config.seed)
    if config.num_relations:
        groups["relations"] = relation_captions(config.num_relations, config.seed)
    if config.num_repeated:
        chosen = without_place(heldout)[: config.num_repeated]
        groups["repeated"] = [caption for caption in chosen for _ in range(config.num_repeats)]
    return groups


def prompt_groups(config: EvaluateConfig) -> dict[str, list[str]]:
    """Captions of the file of prompts, in a group for each category: `prompts.<category>`, or `prompts` without categories.

    Raises:
        InputError: the file cannot be read, or has changed since the run started.
    """
    if config.prompts is None:
        return {}
    suite = read_suite(config.prompts)
    if config.prompts_sha256 not in (None, suite.digest):
        raise InputError(f"{config.prompts}: has changed since the run started. Run the same command again.")
    return {f"{PROMPTS}.{name}" if name else PROMPTS: captions for name, captions in suite.categories.items()}


def without_place(captions: Sequence[str]) -> list[str]:
    """Captions that describe a scene of one object and name no place; without any, all captions."""
    parsed = ((caption, scenes.parse_caption(caption)) for caption in captions)
    found = [caption for caption, scene in parsed if scene and scene.place is None and scene.relation is None]
    return found or list(captions)


def relation_captions(count: int, seed: int) -> list[str]:
    """Captions of two objects in a relation, with combinations of shape and colour that occur in training data."""
    return scene_captions(count, seed, 2, variant="relations")


def unseen_captions(count: int, seed: int) -> list[str]:
    """Captions of scenes whose combination of shape and colour never occurs in the training data."""
    return scene_captions(count, seed, unseen=True)


def scene_captions(count: int, seed: int, *stream: int, **settings: Any) -> list[str]:
    """Captions of random scenes.

    Args:
        stream: numbers that make the random numbers others than those of other captions with this seed.
        settings: those of `scenes.random_scene`.
    """
    captions = []
    for index in range(count):
        rng = np.random.default_rng([seed, index, *stream])
        captions.append(scenes.caption(scenes.random_scene(rng, **settings), rng))
    return captions


def _keep(context: StageContext, measured: Measured, count: int) -> dict[str, Any]:
    """Write the first images of a group as [count, S, S, 3] uint8; return the URI, and which of them are right."""
    buffer, uri = io.BytesIO(), f"{context.folder}/{KEPT}"
    np.save(buffer, measured.shown[:count], allow_pickle=False)
    files.write(uri, buffer.getvalue())
    scores = measured.features.scenes
    return {"uri": uri, "correct": None if scores is None else scores.all_correct()[:count]}


def _publish(context: StageContext, name: str, data: bytes) -> str:
    """Write an image to the stage's folder and to MLflow; returns its URI."""
    files.write(f"{context.folder}/{name}", data)
    context.tracker.bytes(data, name)
    return f"{context.folder}/{name}"


def summarise(group: str, sampled: Sampled, measured: Measured) -> tuple[dict[str, Estimate], dict[str, bytes]]:
    """Compute the metrics of a group; also its images as PNGs, by name. Captions of rows are in none, since models are given
    away with them."""
    estimates = metrics.measure(sampled)
    images: dict[str, bytes] = {}
    if measured.features.scenes is not None:
        images[f"confusion_{group}"] = confusion_matrices(measured.features.scenes)
    images[group] = grid_of(measured, None if group in HELDOUT_GROUPS else sampled.captions)
    return estimates, images


def grid_of(measured: Measured, captions: Sequence[str] | None) -> bytes:
    """PNG of a group's first images, with their captions if given; those that are not as their captions say in a red frame."""
    scores, shown = measured.features.scenes, imaging.from_uint8(measured.shown)
    below = None if captions is None else captions[: len(shown)]
    marks = None if scores is None else scores.all_correct()
    return imaging.png(imaging.grid(shown, columns=8, captions=below, marks=marks))


def confusion_matrices(scores: metrics.SceneScores) -> bytes:
    """PNG of the confusion matrices of shapes, colours and sizes: expected against recognised."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    plots = figure.subplots(1, len(metrics.LABELS))
    for axes, (attribute, labels) in zip(plots, metrics.LABELS.items(), strict=True):
        counts = scores.confusion(attribute)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels) + 1), [*labels, "other"], rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(
            xlabel="recognised", ylabel="expected", title=f"{attribute}: {np.trace(counts) / counts.sum():.0%} right"
        )
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column,
                    row,
                    count,
                    ha="center",
                    va="center",
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()
