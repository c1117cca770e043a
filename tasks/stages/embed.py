"""Stage `embed`: CLIP embeddings of every kept pair, one table for each CLIP."""

import collections
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from PIL import Image
from torch import Tensor

from tasks import generations, ranges, rows, tables
from tasks.dataflow import exchange, run_all
from tasks.derived import (
    FILES_AT_ONCE,
    Shard,
    append_in_actors,
    part_name,
    read_shard,
    split_keys,
    write_missing,
)
from tasks.generations import MAX_LAYERS, MAX_NEW_ROWS, Generation, Sums
from tasks.index import INDEX, find_newest, index_files, index_identity
from tasks.places import KeptRows, write_places
from tasks.progress import Progress
from tasks.ranges import KeyRange
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
    changes = None
    if tables.version(table) is not None:
        kept = KeptRows(dedup.uri, *(facts[name] for name in ("images", "images_version", "index_version")))
        changes = _find_changes(context, dedup, table)
        missing = None if changes is None else _write_new_missing(context, kept, changes)
        changes = None if missing is None else changes
        places, num_todo = missing or write_missing(context, kept, num_kept, table, SCHEMA)
    if num_todo:
        _embed_rows(context, config, clip, facts, places, num_todo, table)
    earlier_keys = _save_keys(context, dedup, table, changes)
    context.tracker.metrics({"pairs": num_kept, "embedded_now": num_todo})
    facts = {**facts, "selection": dedup.uri, "embedded_now": num_todo}
    facts |= {"embeddings": table, "embeddings_version": tables.version(table)}
    facts |= {"layers": [*facts.get("layers", []), *earlier_keys]}
    # Rows and CLIP determine the embeddings.
    return Output(table, fingerprint(dedup.digest, name), facts)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Layers of the selection, and files of the tables, since an earlier refresh, after which all kept rows were embedded."""

    earlier: Generation
    selection: Sequence[str]
    embeddings: Sequence[str]
    """New files, of an attempt that was killed or of another pipeline."""
    all_index: Sequence[str]
    index: Sequence[str]


def _settings(table: str) -> str:
    """Fingerprint of the CLIP and its precision, after which the table is named."""
    return fingerprint(embed.version, table.rpartition("/")[2])


def _identities(images: str, table: str) -> list[str | None]:
    return [index_identity(images), tables.identity(table)]


def _find_changes(context: StageContext, dedup: Artifact, table: str) -> _Changes | None:
    """Find an earlier refresh of this table, from which nothing was removed since; None if there is none, or much has changed."""
    found, facts, embedded = ranges.layers(dedup.uri), dedup.facts, set(tables.files(table))

    def layers_known(earlier: Generation) -> tuple[int, int] | None:
        selection, version = earlier.read["selection"], earlier.read["embeddings_version"]
        is_earlier = selection in found and earlier.read["images"] == facts["images"]
        return (found.index(selection), version) if is_earlier else None

    earlier = generations.find(
        context.store, "embed", _settings(table), layers_known, _identities(facts["images"], table)
    )
    if earlier is None or len(earlier.others["keys"]) >= MAX_LAYERS:
        return None
    before = set(tables.files(table, earlier.read["embeddings_version"]))
    new = sorted(embedded - before)
    if not before <= embedded or sum(map(tables.num_rows, new)) > MAX_NEW_ROWS:
        return None
    all_index = index_files(facts["images"], facts["index_version"])
    known = set(index_files(facts["images"], earlier.read["index_version"]))
    return _Changes(
        earlier,
        found[found.index(earlier.read["selection"]) + 1 :],
        new,
        all_index,
        [uri for uri in all_index if uri not in known],
    )


def _write_new_missing(context: StageContext, kept: KeptRows, changes: _Changes) -> tuple[str, int] | None:
    """Write the places of the changed rows without an embedding; None if the table repeats rows. See `derived.write_missing`."""
    pending = pa.concat_tables(
        [pa.table({"key": pa.array([], pa.string())}), *(tables.read_file(uri, ["key"]) for uri in changes.embeddings)]
    )
    key_ranges, folder = ranges.ranges(changes.earlier.others["ranges"]), f"{context.intermediate}/missing"
    new = ranges.split_by_key(pending, len(key_ranges))
    known = [
        ranges.known_keys(changes.earlier.others["keys"], key_range, part["key"])
        for key_range, part in zip(key_ranges, new, strict=True)
    ]
    if any(map(len, known)) or tables.repeats(pending).num_rows:
        return None
    missing = functools.partial(_new_missing_rows, kept, changes, pending["key"].combine_chunks())
    found = run_all(functools.partial(_count_missing, missing), key_ranges)
    return folder, write_places(folder, key_ranges, missing, kept.num_files(), sum(found)) if sum(found) else 0


def _count_missing(missing: Callable[[KeyRange], pa.Table], key_range: KeyRange) -> int:
    return int(missing(key_range).num_rows)


def _new_missing_rows(kept: KeptRows, changes: _Changes, pending: pa.Array, key_range: KeyRange) -> pa.Table:
    if not changes.selection:
        return kept.place(pa.table({"key": pa.array([], pa.string()), "split": pa.array([], pa.string())}), _NO_PLACES)
    changed = ranges.read_layers(changes.selection, key_range, ["key", "status", "split"])
    wanted = changed.filter(pc.equal(changed["status"], rows.KEPT)).select(["key", "split"])
    embedded = ranges.known_keys(changes.earlier.others["keys"], key_range, wanted["key"])
    is_embedded = pc.is_in(wanted["key"], value_set=pa.concat_arrays([embedded, pending]))
    wanted = wanted.filter(pc.invert(is_embedded))
    if not wanted.num_rows:
        return kept.place(wanted, _NO_PLACES)
    index = find_newest(
        changes.all_index, changes.index, key_range, wanted["key"].combine_chunks(), ["key", "part", "row"]
    )
    return kept.place(wanted, index)


_NO_PLACES = pa.Table.from_batches([], INDEX).select(["key", "part", "row"])


def _save_keys(context: StageContext, dedup: Artifact, table: str, changes: _Changes | None) -> list[str]:
    """Write a look-up of the keys of the embeddings that are new, so that the next refresh does not read the others'.

    Returns:
        Folders of the look-ups of the others.
    """
    version, facts = tables.version(table), dedup.facts
    before = set(tables.files(table, changes.earlier.read["embeddings_version"])) if changes else set()
    new = [uri for uri in tables.files(table, version) if uri not in before]
    groups = [new[start : start + FILES_AT_ONCE] for start in range(0, len(new), FILES_AT_ONCE)]
    earlier: list[str] = changes.earlier.others["keys"] if changes else []
    count = changes.earlier.others["ranges"] if changes else ranges.range_count(dedup.uri)
    folder = f"{context.folder}/embedded" + (f"-since-{changes.earlier.name}" if changes else "")
    exchange(functools.partial(split_keys, count), groups, count, functools.partial(_look_up_keys, folder, count))
    read = {"selection": dedup.uri, "embeddings_version": version}
    read |= {name: facts[name] for name in ("images", "index_version")}
    others = {"keys": [*earlier, folder], "ranges": count}
    sums = Sums({"rows": facts["rows"], "reasons": {}}, 0)
    identities = _identities(facts["images"], table)
    generations.save(
        context, Generation(context.folder, _settings(table), dedup.uri, read, sums, 0, others, identities)
    )
    return earlier


def _look_up_keys(folder: str, count: int, output: int, pieces: list[pa.Table]) -> None:
    keys = pa.concat_tables([pa.table({"key": pa.array([], pa.string())}), *pieces])["key"]
    ranges.write_keys(folder, KeyRange(output, count), keys)


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

    def __init__(self, clip: Artifact, config: EmbedConfig, table: str, num_threads: int, progress: Progress) -> None:
        progress.begin()
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
