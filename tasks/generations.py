"""Generations: results of a stage that continue its result of an earlier refresh, so that a refresh costs what has changed.

A stage that can continue describes each of its results in `generation.json` in its folder: the settings that must not change,
what it has read, and sums over its rows. The next refresh looks for a finished result with the same settings that has read
earlier layers of the same table (`tasks.ranges`), works on the layers since then, and writes the rows that they change as one
more layer. Without such a result it works on all rows. Both ways lead to the same rows and the same digest.

Layers add up, and reading them takes longer. So a result begins anew, with all rows in one layer, when there are many
layers, or when the new ones hold a large share of the rows.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tasks import ranges, rows, tables
from tasks.ranges import KeyRange
from tasks.stage import StageContext
from tasks.store import Store
from unclip import files

MAX_LAYERS = 16
MAX_NEW_ROWS = 2_000_000
"""New rows whose keys or hashes one process holds; with more, a stage works on all rows."""
MAX_SHARE = 0.25
"""Largest share of the rows that later layers may add or change."""
_FILE = "generation.json"


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the rows of a table, from which those of changed rows can be subtracted."""

    counts: Mapping[str, Any]
    """See `rows.count`."""
    digest: int
    """See `tables.rows_digest`."""

    @classmethod
    def of(cls, table: pa.Table) -> "Sums":
        """Sums over a list or a selection; its digest leaves out the positions."""
        return cls(rows.count(table), tables.rows_digest(table.drop_columns("position")))

    @classmethod
    def total(cls, parts: Iterable["Sums"]) -> "Sums":
        listed = list(parts)
        return cls(rows.add_counts(part.counts for part in listed), sum(part.digest for part in listed))

    def minus(self, other: "Sums") -> "Sums":
        return Sums(rows.subtract_counts(self.counts, other.counts), self.digest - other.digest)

    @property
    def hex_digest(self) -> str:
        return tables.hex_digest(self.digest)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished result that a stage can continue."""

    folder: str
    """Folder of the stage's files."""
    settings: str
    """Fingerprint of the stage's version and of the settings that must not change."""
    table: str
    """Folder of the table that the stage wrote; see `ranges.layers`."""
    read: Mapping[str, Any]
    """Folders and versions of what the stage has read, by name."""
    sums: Sums
    changed: int
    """Rows in all layers of the table but the first."""
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other sums and sizes of the stage; JSON values."""
    identities: Sequence[str | None] = ()
    """Identities of the Delta tables whose versions `read` names (`tables.identity`): a table that was made anew counts its
    versions from the start again."""

    @property
    def name(self) -> str:
        """Start of the fingerprint of the stage, for the names of folders that continue this one."""
        return self.folder.rpartition("/")[2][:8]

    def begins_anew(self, num_changed: int) -> bool:
        """Return True if the next generation, with so many changed rows, should not be a layer on top of this one."""
        is_large = self.changed + num_changed > MAX_SHARE * max(1, self.sums.counts["rows"]["in"])
        return is_large or len(ranges.layers(self.table)) >= MAX_LAYERS


def save(context: StageContext, generation: Generation) -> None:
    """Describe the result that a stage is about to commit."""
    document = dataclasses.asdict(generation) | {"digest": generation.sums.hex_digest, "counts": generation.sums.counts}
    del document["sums"]
    files.write_json(f"{context.folder}/{_FILE}", context.store.portable(document))


def read(store: Store, folder: str) -> Generation | None:
    """Read the description of a result in the folder of a stage's files; None if it has none."""
    if not files.exists(f"{folder}/{_FILE}"):
        return None
    document = store.resolve(files.read_json(f"{folder}/{_FILE}"))
    sums = Sums(document.pop("counts"), int(document.pop("digest"), 16))
    return Generation(**document, sums=sums)


def find(
    store: Store,
    stage: str,
    settings: str,
    rank: Callable[[Generation], Any],
    identities: Sequence[str | None] = (),
) -> Generation | None:
    """Find the finished result of a stage to continue: of those with the same settings, the one of the largest rank.

    Args:
        rank: generation -> number or numbers to compare; None for a result that cannot be continued.
        identities: see `Generation`; results that have read other tables are passed over.
    """
    best: tuple[Any, float, Generation] | None = None
    for entry in files.walk(store.uri("stages", stage)):
        generation = read(store, store.uri("artifacts", stage, entry.name.removesuffix(".json")))
        if generation is None:
            continue
        is_same = generation.settings == settings and list(generation.identities) == list(identities)
        ranked = rank(generation) if is_same else None
        if ranked is not None and (best is None or (ranked, entry.modified) > best[:2]):
            best = ranked, entry.modified, generation
    return best[2] if best else None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of changed rows that a stage writes on top of an earlier generation."""

    earlier: Generation
    folder: str
    pairs: str
    """Folder of the list that the earlier generation has read; it has the same keys."""

    @classmethod
    def on(cls, earlier: Generation, context: StageContext, name: str, pairs: str) -> "Layer":
        return cls(earlier, f"{context.folder}/{name}-since-{earlier.name}", pairs)

    def key_ranges(self) -> list[KeyRange]:
        return ranges.ranges(ranges.range_count(self.earlier.table))

    def known(self, key_range: KeyRange, keys: pa.ChunkedArray) -> pa.Array:
        """Keys, among some of one range, that the earlier generation has."""
        return ranges.known_keys(ranges.layers(self.pairs), key_range, keys)

    def write(self, key_range: KeyRange, changed: pa.Table) -> tuple[Sums, Sums]:
        """Write the changed rows of one range; returns their sums and those of the rows that they replace.

        Args:
            changed: all rows of each key that has changed.
        """
        ranges.write_range(self.folder, key_range, changed)
        known = self.known(key_range, changed["key"])
        replaced = ranges.find_rows(self.earlier.table, known.to_pylist())
        return Sums.of(changed), Sums.of(replaced)

    def finish(self, written: Iterable[tuple[Sums, Sums]]) -> tuple[Sums, int]:
        """Make the folder a layer; returns the sums over all rows, and the number of rows in all layers but the first.

        Args:
            written: results of `write`.
        """
        parts = list(written)
        new, replaced = (Sums.total(part[number] for part in parts) for number in (0, 1))
        ranges.write_earlier(self.folder, ranges.layers(self.earlier.table))
        sums = Sums.total([self.earlier.sums.minus(replaced), new])
        return sums, self.earlier.changed + new.counts["rows"]["in"]
