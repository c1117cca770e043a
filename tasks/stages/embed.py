"""Stage `embed`: CLIP embeddings of every kept pair, one table for each CLIP."""

import collections
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from torch import Tensor

from tasks import rows, tables
from tasks.derived import Shard, append_in_actors, part_name, read_shard, write_missing
from tasks.places import KeptRows
from tasks.stage import Artifact, Output, StageContext, stage
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
        "tokens_lost": pa.int32(),
    }
)
"""One row per kept pair. Embeddings have unit norm; clip_score is their dot product; tokens are the text encoder's input,
padded with zeros to its context length; tokens_lost is the number of tokens beyond it, null in old rows."""

BATCHES_AHEAD = 2  # decoded while one batch is computed


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    batch_size: int = 64
    """Pairs in one forward pass; the last batch is padded to this size, so that every pair is computed in the same way."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@stage("embed", version=3, has_workers=True)
def embed(context: StageContext, config: EmbedConfig, dedup: Artifact, clip: Artifact) -> Output:
    """Embed the kept pairs that have no embedding by this CLIP yet.

    Files are in step with those of the images table; see `tasks.derived`.
    """
    facts, name = dedup.facts, fingerprint(clip.digest, config.precision)[:16]
    table = context.store.uri("embeddings", name)
    num_kept = facts["rows"][rows.KEPT]
    if not num_kept:
        raise InputError("embed: got 0 kept pairs, expected at least 1. Loosen the filters, or add URLs.")
    places, num_todo = facts["places"], num_kept
    if tables.version(table) is not None:
        kept = KeptRows(dedup.uri, *(facts[name] for name in ("images", "images_version", "index_version")))
        places, num_todo = write_missing(context, kept, num_kept, table, SCHEMA)
    if num_todo:
        _embed_rows(context, config, clip, facts, places, num_todo, table)
    context.tracker.metrics({"pairs": num_kept, "embedded_now": num_todo})
    facts = {**facts, "selection": dedup.uri, "embedded_now": num_todo}
    facts |= {"embeddings": table, "embeddings_version": tables.version(table)}
    # Rows and CLIP determine the embeddings.
    return Output(table, fingerprint(dedup.digest, name), facts)


def _embed_rows(
    context: StageContext,
    config: EmbedConfig,
    clip: Artifact,
    facts: Mapping[str, Any],
    places: str,
    num_rows: int,
    table: str,
) -> None:
    """Embed in actors, shard by shard, and commit shards as they are done; reuse the finished shards of an earlier attempt."""
    resources = context.resources
    embedder = Embedder.options(**resources.options(), scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
    start = functools.partial(embedder.remote, clip, config, table, resources.cpus_per_worker)
    images = (facts["images"], facts["images_version"])
    append_in_actors(context, start, _embed_shard, images, places, num_rows, table, SCHEMA, "pairs")


def _embed_shard(embedder: Any, shard: Shard) -> Any:
    return embedder.embed.remote(shard)


@ray.remote
class Embedder:
    """Holds one CLIP; embeds one shard per call."""

    def __init__(self, clip: Artifact, config: EmbedConfig, table: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clip = Clip.load(clip.facts["model"], clip.facts["pretrained"]).to(self.device)
        self.preprocess = Preprocess(self.clip.preprocess)
        self.config, self.table, self.num_threads = config, table, num_threads

    def embed(self, shard: Shard) -> Any:
        """Write one part file with a row for each row of the shard, in order; returns its description."""
        rows = read_shard(shard, ("caption", "jpg"), "embed").to_pylist()
        keys = [row["key"] for row in rows]
        size = self.config.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        pairs = zip(batches, self._decode_ahead(batches), strict=True)
        embedded = [self._embed_batch(batch, images) for batch, images in pairs]
        image_array, text_array, tokens, lost = (np.concatenate(arrays) for arrays in zip(*embedded, strict=True))
        if not len(rows) == len(image_array) == len(text_array) == len(shard.rows):
            raise StageError(f"embed: got {len(image_array)} embeddings for {len(rows)} pairs; nothing was written.")
        part = pa.table(
            {
                "key": keys,
                "caption": [row["caption"] for row in rows],
                "image_embedding": list(image_array),
                "text_embedding": list(text_array),
                "clip_score": (image_array * text_array).sum(axis=1),
                "tokens": list(tokens),
                "tokens_lost": lost,
            },
            schema=SCHEMA,
        )
        return tables.write_part(self.table, part_name(shard, keys, self.config.precision), part)

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
        """Image embeddings [N, E], text embeddings [N, E], tokens [N, L] and numbers of lost tokens [N] of N rows."""
        count = len(rows)
        padding = self.config.batch_size - count
        pixels = self.preprocess.standardize(images + images[-1:] * padding, self.device)
        captions = [row["caption"] for row in rows + rows[-1:] * padding]
        tokens = self.clip.tokenize(captions)
        lost = self.clip.count_lost(captions, tokens)
        with autocast(self.config.precision, self.device):
            image_embedding = self.clip.embed_images(pixels)
            text_embedding = self.clip.encode_text(tokens.to(self.device)).text_embedding
        return tuple(
            tensor[:count].cpu().numpy() for tensor in (image_embedding, text_embedding, tokens.int(), lost.int())
        )


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
