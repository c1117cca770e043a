"""Datasets of any size for benchmarks: a list, an images table and an embeddings table, written through the tables' own code.

Images are a few distinct small JPEGs under random hashes. Rows are a function of the settings and of their number, and every
share, of duplicates, of failures, of short captions, is the same at every size; so the cost of a row can be compared. Hosts
are private addresses, which the download refuses before it connects.
"""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import measure
from tasks import rows, tables
from tasks.dataflow import run_all
from tasks.stages.download import IMAGES, DownloadConfig
from tasks.stages.ingest import LISTED, clean
from tasks.store import Store
from unclip import files

Skew = Literal["", "site", "caption", "hash", "colours", "bytes", "copies", "dense"]
SKEWS: dict[Skew, str] = {
    "site": "90 % of rows from one site",
    "caption": "one caption in half of the rows",
    "hash": "half of the images of one perceptual hash and colour",
    "colours": "half of the images of one perceptual hash, in all colours",
    "bytes": "half of the images of the same bytes",
    "copies": "half of the embeddings in one cluster, all copies",
    "dense": "half of the embeddings in one cluster, no copies",
}
"""Kind of uneven dataset -> description."""

PART_ROWS = 1000
"""Rows of a file of the images table, as the download stage writes them by default."""
IMAGE_SIZE = 48
MAX_CAPTION_REPEATS = 20
SEMANTIC_DISTANCE = 0.05

_LIST_FILE_ROWS = 250_000
_SITE_ROWS = 200
_PARTS_PER_TASK = 10
_NUM_JPEGS = 8
_TOKENS = 77
_NUM_BASES = 1021  # centres of clusters are sums of two of these vectors


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in a storage folder of its own."""

    root: str
    rows: int
    width: int = 256
    """Length of the embeddings."""
    has_images: bool = True
    """Rows have real JPEGs, rather than empty bytes."""
    skew: Skew = ""

    @property
    def list_uri(self) -> str:
        return f"{self.root}/list"

    @property
    def storage(self) -> str:
        return f"{self.root}/storage"

    @property
    def images(self) -> str:
        return Store(self.storage).uri("images", DownloadConfig().recipe)

    def starts(self) -> range:
        """First rows of the parts."""
        return range(0, self.rows, PART_ROWS)


def write_list(data: Dataset) -> None:
    """Write the list as Parquet files of a quarter of a million rows."""
    per_file = _LIST_FILE_ROWS // PART_ROWS
    starts = data.starts()
    for number in range(0, len(starts), per_file):
        table = pa.concat_tables(_listed(data, start) for start in starts[number : number + per_file])
        files.write(f"{data.list_uri}/{number:08d}.parquet", tables.parquet_bytes(table.select(["url", "caption"])))


def write_images(data: Dataset) -> int:
    """Write the images table, in the order of the list, with one part for each thousand rows; returns its version."""
    starts = data.starts()
    groups = [starts[number : number + _PARTS_PER_TASK] for number in range(0, len(starts), _PARTS_PER_TASK)]
    parts = run_all(functools.partial(_write_images, data), groups)
    return tables.append_files(data.images, [part for group in parts for part in group], IMAGES)


def write_embeddings(data: Dataset, table_uri: str, shards: Iterator[Any]) -> int:
    """Write one embeddings part for each shard, named and ordered as the stage embed does; returns the table's version.

    Args:
        shards: `tasks.derived.Shard`.
    """
    from tasks.stages.embed import SCHEMA

    parts = run_all(functools.partial(_write_embeddings, data, table_uri), list(shards))
    return tables.append_files(table_uri, parts, SCHEMA)


def _rng(start: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([start, purpose])


def _count(data: Dataset, start: int) -> int:
    return min(PART_ROWS, data.rows - start)


def _listed(data: Dataset, start: int) -> pa.Table:
    """Rows of the list of one part: url, caption, sha256."""
    count, rng = _count(data, start), _rng(start, 0)
    number = np.arange(start, start + count)
    site = number // _SITE_ROWS
    if data.skew == "site":
        site = np.where(number % 10 == 0, site, 0xFFFF01)
    octets = [pa.array(site >> shift & 255).cast(pa.string()) for shift in (16, 8, 0)]
    host = pc.binary_join_element_wise("10", *octets, ".")
    url = pc.binary_join_element_wise("http://", host, "/", pa.array(number).cast(pa.string()), ".jpg", "")
    return pa.table([url, _captions(data, number, rng), pa.repeat("", count), pa.nulls(count, pa.string())], LISTED)


def _captions(data: Dataset, number: np.ndarray, rng: np.random.Generator) -> pa.Array:
    words = [_vocabulary().take(pa.array(column)) for column in rng.integers(0, len(_vocabulary()), (6, len(number)))]
    captions = pc.binary_join_element_wise(*words, " ")
    # Each of these captions has twice as many rows as are allowed, whatever the size of the dataset.
    repeated = pc.binary_join_element_wise(
        "picture", "of", *(_vocabulary().take(pa.array(number // 2000 % modulus)) for modulus in (2999, 2003)), " "
    )
    captions = pc.if_else(pa.array(number % (1000 // MAX_CAPTION_REPEATS) == 7), repeated, captions)
    captions = pc.if_else(pa.array(number % 100 == 3), words[0], captions)  # too short
    captions = pc.if_else(pa.array(number % 100 == 4), "", captions)
    if data.skew == "caption":
        captions = pc.if_else(pa.array(number % 2 == 0), "an image of the shop", captions)
    return captions


@functools.cache
def _vocabulary() -> pa.Array:
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    syllables = [consonant + vowel for consonant in consonants for vowel in vowels]
    picked = np.random.default_rng(0).integers(0, len(syllables), (3000, 3))
    return pa.array(["".join(syllables[index] for index in word) for word in picked.tolist()])


def _write_images(data: Dataset, starts: Sequence[int]) -> list[tables.Part]:
    return [tables.write_part(data.images, f"{start:012d}", _images(data, start)) for start in starts]


def _images(data: Dataset, start: int) -> pa.Table:
    """Rows of the images table of one part: usable rows of the list, 4 % of which failed."""
    pairs = clean(_listed(data, start), start)
    count, rng = len(pairs), _rng(start, 1)
    place = np.arange(count)
    same_bytes, same_look = place.copy(), place.copy()
    same_bytes[place % 10 == 9] -= 5
    same_look[place % 20 == 6] -= 5
    sha256, phash, colour = _hex(rng, count, 32), _hex(rng, count, 8), _hex(rng, count, 3)
    sha256, phash, looks = sha256.take(same_bytes), phash.take(same_look), colour.take(same_look)
    is_skewed = pa.array(place % 2 == 0)
    if data.skew == "bytes":
        sha256 = pc.if_else(is_skewed, "ab" * 32, sha256)
    if data.skew in ("hash", "colours"):
        phash = pc.if_else(is_skewed, "cd" * 8, phash)
        looks = pc.if_else(is_skewed, "808080", looks) if data.skew == "hash" else colour
    jpegs, digests = _jpegs() if data.has_images else ([b""], [files.sha256(b"")])
    jpg = pa.array(place % len(jpegs))
    is_ok = pa.array(place % 25 != 11)
    small = place % 50 == 13
    columns: dict[str, Any] = {
        "width": pa.repeat(pa.scalar(IMAGE_SIZE, pa.int32()), count),
        "height": pa.repeat(pa.scalar(IMAGE_SIZE, pa.int32()), count),
        "original_width": pa.array(np.where(small, 20, rng.integers(400, 1000, count)), pa.int32()),
        "original_height": pa.array(np.where(place % 50 == 23, 4000, rng.integers(400, 1000, count)), pa.int32()),
        "sha256": sha256,
        "phash": phash,
        "colour": looks,
        "jpg": pa.array(jpegs, pa.binary()).take(jpg),
        "jpg_sha256": pa.array(digests).take(jpg),
    }
    columns = {name: pc.if_else(is_ok, column, pa.scalar(None, column.type)) for name, column in columns.items()}
    columns |= {name: pairs[name] for name in ("key", "url", "caption")}
    columns |= {"status": pc.if_else(is_ok, "ok", "failed")}
    columns |= {"reason": pc.if_else(is_ok, pa.scalar(None, pa.string()), "http_404")}
    columns |= dict.fromkeys(("final_url", "redirect_hosts"), pa.nulls(count, pa.string()))
    table = pa.table([columns[name] for name in IMAGES.names], IMAGES)
    return table.filter(pc.equal(pairs["status"], rows.KEPT)).combine_chunks()


def _hex(rng: np.random.Generator, count: int, num_bytes: int) -> pa.Array:
    """Random texts of hex digits."""
    offsets = np.arange(count + 1, dtype=np.int32) * num_bytes * 2
    text = rng.bytes(count * num_bytes).hex().encode()
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


@functools.cache
def _jpegs() -> tuple[list[bytes], list[str]]:
    """Distinct JPEGs of about 4 KB, and their sha256."""
    from PIL import Image

    found = []
    for data in measure.photographs(_NUM_JPEGS):
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(data)).resize((IMAGE_SIZE, IMAGE_SIZE))
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        found.append(buffer.getvalue())
    return found, [files.sha256(data) for data in found]


def _write_embeddings(data: Dataset, table_uri: str, shard: Any) -> tables.Part:
    from tasks.stages.embed import SCHEMA
    from unclip.config import fingerprint

    table = tables.read_rows(shard.uri, shard.rows.tolist(), ["key", "caption"])
    keys = table["key"].to_pylist()
    rng = _rng(int(keys[0], 16), 2)
    image = _embeddings(data, len(keys), rng)
    text = _unit(image + 1.5 * rng.standard_normal(image.shape, np.float32) / np.sqrt(data.width))
    tokens = rng.integers(1, 49408, (len(keys), _TOKENS), np.int32)
    tokens[np.arange(_TOKENS) >= rng.integers(8, 24, (len(keys), 1))] = 0
    columns = [table["key"], table["caption"], _lists(image), _lists(text), (image * text).sum(axis=1), _lists(tokens)]
    columns.append(np.zeros(len(keys), np.int32))  # tokens lost
    image_file = shard.uri.rpartition("/")[2].removesuffix(".parquet")
    name = f"{image_file}-{fingerprint(keys, 'fp32')[:16]}"
    return tables.write_part(table_uri, name, pa.table(columns, SCHEMA))


def _embeddings(data: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors [N, E] in clusters of about 100 rows; every 33rd is almost a copy of the one before."""
    cluster = rng.integers(0, data.rows // 100 + 1, count)
    spread = np.full((count, 1), 0.7, np.float32)
    if data.skew in ("copies", "dense"):
        cluster[::2] = 0
        spread[::2] = 0.05 if data.skew == "copies" else 0.3
    noise = rng.standard_normal((count, data.width), np.float32) / np.sqrt(data.width, dtype=np.float32)
    bases = _bases(data.width)
    centres = _unit(bases[cluster % _NUM_BASES] + bases[cluster // _NUM_BASES % _NUM_BASES][:, ::-1])
    found = centres + spread * noise
    copies = np.arange(1, count, 33)
    found[copies] = found[copies - 1] + 0.1 * noise[copies]
    return _unit(found)


@functools.cache
def _bases(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_NUM_BASES, width), np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled.astype(np.float32)


def _lists(values: np.ndarray) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
