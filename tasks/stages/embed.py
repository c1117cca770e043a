"""Stage `embed`: CLIP embeddings of every kept pair, one table for each CLIP."""

import collections
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from torch import Tensor

from tasks import tables
from tasks.snapshots import kept_keys
from tasks.stage import Artifact, Output, StageContext, stage
from unclip import files
from unclip.config import fingerprint, require
from unclip.errors import InputError, StageError
from unclip.models.clip import Clip
from unclip.training.precision import Precision, autocast

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "caption": pa.string(),
        "image_embedding": pa.list_(pa.float32()),
        "text_embedding": pa.list_(pa.float32()),
        "clip_score": pa.float32(),
        "tokens": pa.list_(pa.int32()),
    }
)
"""One row per kept pair. Embeddings have unit norm; clip_score is their dot product; tokens are the text encoder's input,
padded with zeros to its context length."""

BATCHES_AHEAD = 2  # decoded while one batch is computed


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    batch_size: int = 64
    """Pairs in one forward pass; the last batch is padded to this size, so that every pair is computed in the same way."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""
    shard_size: int = 2000
    """Pairs in one Parquet file, the unit that is repeated after a crash."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1")


@stage("embed", version=2, has_workers=True)
def embed(context: StageContext, config: EmbedConfig, dedup: Artifact, clip: Artifact) -> Output:
    """Embed the kept pairs that have no embedding by this CLIP yet."""
    table = context.store.uri("embeddings", fingerprint(clip.digest, config.precision)[:16])
    keys = kept_keys(dedup.uri)
    images = tuple(tables.files(dedup.facts["images"], dedup.facts["images_version"]))
    before = tables.version(table)
    embedded_keys = set() if before is None else set(tables.read(table, before, ["key"]).column("key").to_pylist())
    todo = [key for key in keys if key not in embedded_keys]
    if todo:
        _embed_rows(context, config, clip, images, todo, table)
    version = tables.version(table)
    if version is None:
        raise InputError("embed: got 0 kept pairs, expected at least 1. Loosen the filters, or add URLs.")

    rows = tables.read(table, version, columns=["key", "caption", "image_embedding", "clip_score"])
    wanted = rows.filter(pa.compute.is_in(rows.column("key"), value_set=pa.array(keys, pa.string())))
    if wanted.column("key").to_pylist() != keys:
        raise StageError(
            f"embed: {table} has {wanted.num_rows} rows for {len(keys)} kept pairs, or duplicates. Remove the table and rerun."
        )
    context.tracker.metrics({"pairs": len(keys), "embedded_now": len(todo)})
    facts = {**dedup.facts, "selection": dedup.uri, "embedded_now": len(todo)}
    facts |= {"embeddings": table, "embeddings_version": version}
    return Output(table, fingerprint(dedup.digest, tables.content_digest(wanted)), facts)


def _embed_rows(
    context: StageContext,
    config: EmbedConfig,
    clip: Artifact,
    images: Sequence[str],
    keys: Sequence[str],
    table: str,
) -> None:
    """Embed in actors, shard by shard, and commit all shards at once; reuse the finished shards of an earlier attempt."""
    resources = context.resources
    shards = [list(keys[start : start + config.shard_size]) for start in range(0, len(keys), config.shard_size)]
    num_actors = max(1, min(resources.num_workers, len(shards)))
    actor_options = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, "max_restarts": 3}
    actors = [
        Embedder.options(**actor_options, max_task_retries=3).remote(  # type: ignore[attr-defined]
            clip, config, images, table, resources.cpus_per_worker
        )
        for _ in range(num_actors)
    ]
    parts = []
    progress = context.progress(len(keys), "pairs").start()
    for part in ray.util.ActorPool(actors).map(lambda actor, shard: actor.embed.remote(shard), shards):
        parts.append(part)
        progress.update(part.rows)
    tables.append_files(table, parts, SCHEMA)


@ray.remote
class Embedder:
    """Holds one CLIP; embeds one shard per call."""

    def __init__(
        self, clip: Artifact, config: EmbedConfig, images: Sequence[str], table: str, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clip = Clip.load(clip.facts["model"], clip.facts["pretrained"]).to(self.device)
        self.preprocess = Preprocess(self.clip.preprocess)
        self.config, self.images, self.table, self.num_threads = config, images, table, num_threads

    def embed(self, keys: list[str]) -> Any:
        """Write one part file with a row for each key, in order; returns its description."""
        rows = self._read(keys)
        size = self.config.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        pairs = zip(batches, self._decode_ahead(batches), strict=True)
        embedded = [self._embed_batch(batch, images) for batch, images in pairs]
        image_array, text_array, tokens = (np.concatenate(arrays) for arrays in zip(*embedded, strict=True))
        if not len(rows) == len(image_array) == len(text_array) or [row["key"] for row in rows] != keys:
            raise StageError(f"embed: got {len(image_array)} embeddings for {len(keys)} pairs; nothing was written.")
        part = pa.table(
            {
                "key": keys,
                "caption": [row["caption"] for row in rows],
                "image_embedding": list(image_array),
                "text_embedding": list(text_array),
                "clip_score": (image_array * text_array).sum(axis=1),
                "tokens": list(tokens),
            },
            schema=SCHEMA,
        )
        return tables.write_part(self.table, fingerprint(keys, self.config.precision), part)

    def _decode_ahead(self, batches: Sequence[list[dict[str, Any]]]) -> Iterator[list[np.ndarray]]:
        """Images of each batch, decoded in threads while earlier batches are computed."""
        with concurrent.futures.ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as pool:
            waiting: collections.deque[Iterator[np.ndarray]] = collections.deque()
            for batch in batches:
                waiting.append(pool.map(self.preprocess.decode, [row["jpg"] for row in batch]))
                if len(waiting) > BATCHES_AHEAD:
                    yield list(waiting.popleft())
            while waiting:
                yield list(waiting.popleft())

    @torch.no_grad()
    def _embed_batch(self, rows: list[dict[str, Any]], images: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Image embeddings [N, E], text embeddings [N, E] and tokens [N, L] of N rows."""
        count = len(rows)
        padding = self.config.batch_size - count
        pixels = self.preprocess.standardize(images + images[-1:] * padding, self.device)
        tokens = self.clip.tokenize([row["caption"] for row in rows + rows[-1:] * padding])
        with autocast(self.config.precision, self.device):
            image_embedding = self.clip.embed_images(pixels)
            text_embedding = self.clip.encode_text(tokens.to(self.device)).text_embedding
        return tuple(tensor[:count].cpu().numpy() for tensor in (image_embedding, text_embedding, tokens.int()))

    def _read(self, keys: list[str]) -> list[dict[str, Any]]:
        found = {row["key"]: row for row in _read_rows(self.images, keys)}
        missing = [key for key in keys if key not in found]
        if missing:
            raise StageError(f"embed: {len(missing)} images are missing from the images table, such as {missing[0]}.")
        return [found[key] for key in keys]


class Preprocess:
    """open_clip's preprocessing in two parts: image by image in any thread, then batch by batch on the model's device.

    The result is bitwise equal to that of open_clip.

    Letters: B batch, S resolution of CLIP's input.
    """

    def __init__(self, transform: Any) -> None:
        """Args:
            transform: the transform of an open_clip model; it ends with a `ToTensor` and a `Normalize`.

        Raises:
            StageError: the transform ends with other steps.
        """
        from torchvision.transforms import Compose, Normalize, ToTensor

        *steps, to_tensor, self._normalize = transform.transforms
        if not isinstance(to_tensor, ToTensor) or not isinstance(self._normalize, Normalize):
            raise StageError(
                f"embed: got preprocessing {transform}, expected it to end with ToTensor and Normalize. Install open_clip 3.x."
            )
        self._resize = Compose(steps)

    def decode(self, jpg: bytes) -> np.ndarray:
        """Decode and resize a JPEG to uint8 [S, S, 3]."""
        return np.asarray(self._resize(Image.open(io.BytesIO(jpg), formats=["JPEG"])))

    def standardize(self, images: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Normalise to float32 [B, 3, S, S] on the device; uint8 is copied there, a quarter of the size of float32."""
        levels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
        pixels = levels.to(torch.float32, memory_format=torch.contiguous_format)
        # Divide by tensors: given a Python number, GPUs multiply by its rounded inverse.
        maximum, mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
            for values in ([255.0], self._normalize.mean, self._normalize.std)
        )
        return pixels.div_(maximum).sub_(mean).div_(std)


def _read_rows(uris: Sequence[str], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Key, caption and jpg of the given keys, from the files that hold them."""
    key = pa.compute.field("key")
    # The bounds let the reader skip row groups by their statistics; with `isin` alone it reads every image.
    wanted = (key >= min(keys)) & (key <= max(keys)) & key.isin(pa.array(keys))
    for uri in uris:
        filesystem, path = files.locate(uri)
        read = functools.partial(
            pq.read_table, path, columns=["key", "caption", "jpg"], filesystem=filesystem, filters=wanted
        )
        yield from files.with_retries(uri, read).to_pylist()
