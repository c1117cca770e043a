"""Stage `latents`: what the autoencoder makes of every kept image, in a table in step with the images.

Before it encodes anything, it measures how much of held-out images their reconstructions keep: what these lose, no generator of
latents can show.

Letters: D latent channels, s latent size, S resolution of the autoencoder's images.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch

from tasks import tables
from tasks.dataflow import run_all, run_in_actors
from tasks.derived import Derivation, DerivedTable, derive
from tasks.places import Block, blocks, open_block
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require
from unclip.data import Places, RowReader, half_bytes
from unclip.errors import InputError, StageError
from unclip.evaluation.metrics import ATTRIBUTES, SceneScores, score_scenes
from unclip.models.autoencoder import Autoencoder
from unclip.systems.autoencoder import AUTOENCODER
from unclip.systems.system import load_model
from unclip.training.batches import load_images
from unclip.training.precision import Precision, autocast

LATENT = pa.schema({"key": pa.string(), "latent": pa.binary()})
"""Table of an autoencoder without codes: `encode` of the image, [D, s, s] in half precision, as `unclip.data.half_bytes` stores
it; neither shifted nor scaled."""
CODES = pa.schema({"key": pa.string(), "codes": pa.list_(pa.int32())})
"""Table of an autoencoder with codes: `tokens` of the image, [s * s], row by row."""
STATISTICS_TASKS = 32
"""Tasks whose sums are added up."""


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    batch_size: int = 64
    """Images in one forward pass; the last batch is padded to this size, so that every image is computed in the same way."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""
    num_reconstructed: int = 256
    """Held-out images that are reconstructed to measure the autoencoder; fewer if the snapshot holds out fewer."""
    min_reconstruction_accuracy: float | None = None
    """Least share of reconstructions in which an attribute of the caption is right, for every attribute; below it, the run stops
    before a generator is trained. For captions of procedural scenes only; None measures alone."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.num_reconstructed >= 1, "num_reconstructed", self.num_reconstructed, "at least 1")
        least = self.min_reconstruction_accuracy
        require(least is None or 0 <= least <= 1, "min_reconstruction_accuracy", least, "0 to 1, or none")


class Reconstructions(NamedTuple):
    """Quality of the reconstructions of some images."""

    difference: float
    """Mean absolute difference of pixels in [-1, 1] from the original."""
    accuracy: dict[str, float]
    """Attribute -> share of reconstructions in which it is what the caption names; empty unless captions describe scenes."""
    original_accuracy: dict[str, float]
    """The same of the originals, which shows what the measurement itself allows."""


@stage("latents", version=1, has_workers=True)
def latents(context: StageContext, config: LatentsConfig, dataset: Artifact, autoencoder: Artifact) -> Output:
    """Measure the autoencoder on held-out images, and encode the kept images that it has not encoded yet."""
    snapshot = Snapshot.of(dataset.facts)
    model = load_autoencoder(autoencoder.uri).config
    found = _reconstruct(context, config, snapshot, autoencoder.uri)
    context.tracker.metrics({"reconstruction.difference": found.difference})
    context.tracker.metrics({f"reconstruction.{name}": value for name, value in found.accuracy.items()})
    check_reconstructions(found, config)

    shape: tuple[int, ...]
    schema, shape = LATENT, (model.latent_channels, model.latent_size, model.latent_size)
    if model.has_codes:
        schema, shape = CODES, (model.latent_size**2,)
    derivation = Derivation(
        name="latents",
        schema=schema,
        columns=("jpg",),
        load=functools.partial(LatentEncoder, autoencoder.uri, config.precision),
        settings=(autoencoder.digest, config.precision),
        batch_size=config.batch_size,
    )
    table, num_encoded = derive(context, dataset, derivation)
    facts = {**dataclasses.asdict(table), "rows": dataset.facts["rows"], "encoded_now": num_encoded}
    facts |= {"latent_shape": list(shape), "reconstruction": found._asdict(), "autoencoder": autoencoder.digest}
    if not model.has_codes:
        facts |= measure_statistics(table, shape)
        context.tracker.metrics({f"std.{channel}": value for channel, value in enumerate(facts["std"])})
    # Rows and autoencoder determine the latents.
    return Output(table.derived, fingerprint(dataset.digest, derivation.id), facts)


def load_autoencoder(folder: str) -> Autoencoder:
    """Load a trained autoencoder.

    Raises:
        CheckpointError: see `load_model`.
    """
    model = load_model(folder, (AUTOENCODER,))
    assert isinstance(model, Autoencoder)
    return model


class LatentEncoder:
    """Holds one autoencoder; encodes images as the columns of the table."""

    def __init__(self, autoencoder: str, precision: Precision, device: torch.device) -> None:
        self.model, self.precision, self.device = load_autoencoder(autoencoder).to(device), precision, device

    @torch.no_grad()
    def encode(self, rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        config = self.model.config
        images = load_images(list(rows["jpg"]), config.image_size).to(self.device)
        with autocast(self.precision, self.device):
            if config.has_codes:
                return {"codes": list(self.model.tokens(images).int().cpu().numpy())}
            encoded = self.model.encode(images).float().cpu().numpy()
        return {"latent": [half_bytes(each) for each in encoded]}


def check_reconstructions(found: Reconstructions, config: LatentsConfig) -> None:
    """Stop the run if reconstructions lose too much.

    Raises:
        InputError: accuracy cannot be measured, as captions describe no scenes.
        StageError: an attribute is right in too few reconstructions.
    """
    least = config.min_reconstruction_accuracy
    if least is None:
        return
    if not found.accuracy:
        raise InputError(
            f"latents.min_reconstruction_accuracy: got {least}, but captions of held-out images describe no procedural scenes, "
            "so accuracy cannot be measured. Set it to none."
        )
    worst = min(found.accuracy, key=lambda name: found.accuracy[name])
    if found.accuracy[worst] < least:
        raise StageError(
            f"latents: the {worst} is right in {found.accuracy[worst]:.3f} of the reconstructions of held-out images and in "
            f"{found.original_accuracy[worst]:.3f} of the originals, expected at least {least} "
            "(latents.min_reconstruction_accuracy). No generator of these latents can do better. Train the autoencoder on more "
            "samples (autoencoder.trainer.num_samples), or let it keep more: more autoencoder.model.latent_channels, a larger "
            "codebook_size, or fewer levels in channel_mult."
        )


def _reconstruct(context: StageContext, config: LatentsConfig, snapshot: Snapshot, autoencoder: str) -> Reconstructions:
    """Reconstruct held-out images, or training images if none are held out, and measure them."""
    listed = snapshot.heldout_rows().slice(0, config.num_reconstructed)
    reader = RowReader((snapshot.source("images", "jpg"),), Places([listed]))
    captions = listed["caption"].to_pylist()

    def batches() -> Iterator[tuple[list[bytes], list[str]]]:
        for start in range(0, len(captions), config.batch_size):
            some = captions[start : start + config.batch_size]
            yield list(reader.read(np.arange(start, start + len(some)))["jpg"]), some

    resources = context.resources
    reconstructor = Reconstructor.options(**resources.options())  # type: ignore[attr-defined]
    start = functools.partial(reconstructor.remote, autoencoder, config.precision, resources.cpus_per_worker)
    num_actors = min(resources.num_workers, math.ceil(len(captions) / config.batch_size))
    done = [result for _, result in run_in_actors(start, num_actors, _reconstruct_batch, batches())]
    difference = sum(total for total, _, _ in done) / len(captions)
    scored = [(scores, originals) for _, scores, originals in done if scores is not None]
    if len(scored) < len(done):  # some captions describe no scene
        return Reconstructions(difference, {}, {})
    reconstructed, original = (_accuracy([pair[index] for pair in scored]) for index in (0, 1))
    return Reconstructions(difference, reconstructed, original)


def _reconstruct_batch(reconstructor: Any, batch: tuple[list[bytes], list[str]]) -> Any:
    return reconstructor.measure.remote(*batch)


def _accuracy(batches: Sequence[SceneScores]) -> dict[str, float]:
    """Accuracy by attribute over all batches."""
    joined = SceneScores(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
    accuracy = joined.accuracy()
    return {name: accuracy[name] for name in ATTRIBUTES if name in accuracy}


@ray.remote
class Reconstructor:
    """Holds one autoencoder; reconstructs and measures one batch of images per call."""

    def __init__(self, autoencoder: str, precision: Precision, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.precision = load_autoencoder(autoencoder).to(self.device), precision

    @torch.no_grad()
    def measure(
        self, encoded: list[bytes], captions: list[str]
    ) -> tuple[float, SceneScores | None, SceneScores | None]:
        """Sum of the mean absolute differences, and the scenes that are measured in reconstructions and in originals."""
        images = load_images(encoded, self.model.config.image_size)  # [B, 3, S, S]
        with autocast(self.precision, self.device):
            found = self.model.decode(self.model.encode(images.to(self.device)))
        found = found.float().clamp(-1, 1).cpu()
        difference = float((found - images).abs().mean(dim=(1, 2, 3)).sum())
        return difference, score_scenes(found, captions), score_scenes(images, captions)


def measure_statistics(table: DerivedTable, shape: Sequence[int]) -> dict[str, list[float]]:
    """Mean and standard deviation of the training rows' latents, by channel: `mean` and `std`, [D] each."""
    uris = tables.files(table.derived, table.derived_version)
    found = blocks(table.places)
    groups = [found[start::STATISTICS_TASKS] for start in range(min(STATISTICS_TASKS, len(found)))]
    sums = run_all(functools.partial(_sums_of, table.places, uris, tuple(shape)), groups)
    counts, totals, squares = zip(*sums, strict=True)
    mean = np.sum(totals, axis=0) / sum(counts)
    variance = np.sum(squares, axis=0) / sum(counts) - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}


def _sums_of(
    places: str, uris: Sequence[str], shape: tuple[int, ...], group: Sequence[Block]
) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of values of each channel of the training rows, and their sums [D] and sums of squares [D], in float64."""
    count, total, squares = 0, np.zeros(shape[0]), np.zeros(shape[0])
    for block in group:
        listed = open_block(places, block, "train")
        file, row = (listed[f"latents_{name}"].to_numpy() for name in ("file", "row"))
        for number in np.unique(file).tolist():
            column = tables.read_file(uris[number], ["key", "latent"])["latent"].take(pa.array(row[file == number]))
            values = np.frombuffer(b"".join(column.to_pylist()), "<f2").astype(np.float64).reshape(-1, *shape)
            values = values.swapaxes(0, 1).reshape(shape[0], -1)  # [D, N s s]
            count += values.shape[1]
            total += values.sum(axis=1)
            squares += np.square(values).sum(axis=1)
    return count, total, squares
