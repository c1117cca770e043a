"""Duplicates that new rows make among the rows of an earlier refresh, found without comparing the earlier rows again.

New rows meet earlier ones in two look-ups (`tasks.lookups`): all rows by the sha256 of their bytes, and of each look (hash and
colour) the first row. A row that is new changes the fate of others only within the group of its bytes, and of rows with its
hash; those are read and decided again. The result is that of `tasks.find_duplicates` on all rows.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from tasks import ranges
from tasks.find_duplicates import (
    BYTES,
    CAPTION,
    FIRST,
    LOOK,
    KeepCaptions,
    bytes_uri,
    looks_uri,
    partition,
    with_firsts,
)
from tasks.keys import pair_octets
from tasks.lookups import look_up, write_lookup
from tasks.near_duplicates import find_looks, near_duplicates
from unclip import files

_LOOKED_UP = ["hash", "cell", "high", "low", "digest", "digest_low"]


@dataclasses.dataclass(frozen=True)
class Lookups:
    """Look-ups of all layers of a selection."""

    folders: Sequence[str]
    count: int
    """Number of partitions of each."""
    has_looks: bool
    """Rows are compared by look as well."""

    def of_bytes(self, digests: np.ndarray) -> pa.Table:
        """Rows whose bytes have some digests (their first 64 bits)."""
        return self._find(bytes_uri, "digest", digests)

    def of_looks(self, hashes: np.ndarray) -> pa.Table:
        """The first row of each look with some hashes, by layer."""
        return self._find(looks_uri, "hash", hashes)

    def is_whole(self) -> bool:
        """Return True if no file is missing; takedowns delete them."""
        kinds = ("bytes", "looks") if self.has_looks else ("bytes",)
        folders = [f"{folder}/{kind}" for folder in self.folders for kind in kinds]
        return all(len(files.names(folder)) == self.count for folder in folders)

    def _find(self, uri_of: Callable[[str, int, int], str], by: str, values: np.ndarray) -> pa.Table:
        wanted = np.unique(values)
        owners = partition(wanted, self.count)
        found = []
        for index in np.unique(owners).tolist() or [0]:
            uris = [uri_of(folder, index, self.count) for folder in self.folders]
            found.append(look_up(uris, by, wanted[owners == index]))
        return pa.concat_tables(found).combine_chunks()


@dataclasses.dataclass(frozen=True)
class Changes:
    """Effects of new rows."""

    fates: pa.Table
    """Rows that are new, and others whose fate changes: high, low, reason and reason_before (see `find_duplicates`; -1 before
    for a new row), first_high, first_low."""
    looks: pa.Table
    """New rows that are the first with their bytes and have a hash: hash, cell, high, low, digest, digest_low."""


def find_changes(added: pa.Table, lookups: Lookups, captions: KeepCaptions) -> Changes | None:
    """Find the fates of new rows, and those of earlier rows that change.

    Args:
        added: columns of `find_duplicates.compared`, of keys that no look-up has.

    Returns:
        The changes; None if an earlier row must give way to one with the same bytes and another look: then others may return.
    """
    before = lookups.of_bytes(added["digest"].to_numpy()).select(added.column_names)
    after = pa.concat_tables([before, added]).combine_chunks()
    groups, groups_before = with_firsts(after, captions), with_firsts(before, captions)
    if _has_other_look(groups_before, groups):
        return None
    looks = None
    if lookups.has_looks:
        firsts = _firsts(groups)
        looks = lookups.of_looks(firsts["hash"].to_numpy())
        near_before = _near(looks, _firsts(groups_before))
        near_after = _near(looks, firsts)
        # Only the first row of a look can have been kept; those that gave way to another with their bytes are in a group.
        octets = pair_octets(looks["high"], looks["low"])
        flipped = ~np.isin(_bytes(octets), near_before) & np.isin(_bytes(octets), near_after)
        others = lookups.of_bytes(looks["digest"].to_numpy()[flipped]).select(added.column_names)
        known = _bytes(pair_octets(after["high"], after["low"]))
        others = others.filter(pa.array(~np.isin(_bytes(pair_octets(others["high"], others["low"])), known)))
        before, after = (pa.concat_tables([table, others]).combine_chunks() for table in (before, after))
        groups, groups_before = with_firsts(after, captions), with_firsts(before, captions)
        fates_before = _fates(groups_before, near_before)
        fates = _fates(groups, near_after)
    else:
        nothing = np.zeros(0, "V16")
        fates_before, fates = _fates(groups_before, nothing), _fates(groups, nothing)
    new = _firsts(groups)
    is_new = np.isin(_bytes(pair_octets(new["high"], new["low"])), _bytes(pair_octets(added["high"], added["low"])))
    return Changes(_changed(fates_before, fates), new.filter(pa.array(is_new)).select(_LOOKED_UP))


def write_lookups(folder: str, added: pa.Table, looks: pa.Table | None, count: int) -> None:
    """Write the look-ups of new rows.

    Args:
        added, looks: see `find_changes`.
    """
    for index, part in enumerate(ranges.split(added, partition(added["digest"].to_numpy(), count), count)):
        write_lookup(bytes_uri(folder, index, count), part, "digest")
    if looks is not None:
        looks = looks.take(pa.array(np.lexsort([looks["low"].to_numpy(), looks["high"].to_numpy()])))
        first, _ = find_looks(looks["hash"].to_numpy(), looks["cell"].to_numpy())
        looks = looks.take(pa.array(first))
        for index, part in enumerate(ranges.split(looks, partition(looks["hash"].to_numpy(), count), count)):
            write_lookup(looks_uri(folder, index, count), part, "hash")


def _bytes(octets: pa.Array) -> np.ndarray:
    """Keys as one value each, which can be compared: [N]."""
    return np.frombuffer(octets.buffers()[1], "V16", len(octets), 16 * octets.offset)


def _firsts(groups: pa.Table) -> pa.Table:
    """Rows that are compared by look: of each group, the first one, if it has a hash."""
    return groups.filter(pa.array(groups["is_first"].to_numpy() & groups["has_hash"].to_numpy()))


def _has_other_look(before: pa.Table, after: pa.Table) -> bool:
    """Return True if a group has got another first row that differs in its look from the one before."""
    old, new = (table.filter(table["is_first"]) for table in (before, after))
    if not old.num_rows:
        return False
    digests, sought = (_bytes(pair_octets(table["digest"], table["digest_low"])) for table in (new, old))
    order = np.argsort(digests)
    places = order[np.searchsorted(digests[order], sought)]  # every group before is among those after
    return any(
        (old[name].to_numpy(zero_copy_only=False) != new[name].to_numpy(zero_copy_only=False)[places]).any()
        for name in ("hash", "has_hash", "cell")
    )


def _near(looks: pa.Table, firsts: pa.Table) -> np.ndarray:
    """Keys, among the first rows of looks and of bytes, of the near duplicates of an earlier one."""
    names = ["high", "low", "hash", "cell"]
    table = pa.concat_tables([looks.select(names), firsts.select(names)]).combine_chunks()
    numbers = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
    _, places = np.unique(numbers, axis=0, return_index=True)  # in order of keys; a first row may be in both
    table = table.take(pa.array(places))
    found = near_duplicates(table["hash"].to_numpy(), 0, table["cell"].to_numpy())
    near = table.filter(pa.array(found))
    return _bytes(pair_octets(near["high"], near["low"]))


def _fates(groups: pa.Table, near: np.ndarray) -> pa.Table:
    """Reason of each row of some groups.

    Args:
        near: keys of the first rows that are near duplicates.
    """
    is_first, is_kept = groups["is_first"].to_numpy(), groups["is_kept"].to_numpy()
    is_near = np.isin(_bytes(pair_octets(groups["first_high"], groups["first_low"])), near)
    is_near &= groups["first_has_hash"].to_numpy()
    reason = np.where(is_kept, np.where(is_near, LOOK, np.where(is_first, FIRST, CAPTION)), BYTES)
    columns = {name: groups[name] for name in ("high", "low", "first_high", "first_low")}
    return pa.table({**columns, "reason": pa.array(reason, pa.int8())})


def _changed(before: pa.Table, after: pa.Table) -> pa.Table:
    """Rows after that are new, or whose reason or first row has changed."""
    old, new = (_bytes(pair_octets(table["high"], table["low"])) for table in (before, after))
    order = np.argsort(old)
    places = np.searchsorted(old[order], new).clip(max=max(0, len(old) - 1)) if len(old) else np.zeros(len(new), int)
    known = old[order][places] == new if len(old) else np.zeros(len(new), bool)
    source = order[places] if len(old) else places
    reason_before = np.full(len(new), -1, np.int8)
    is_same = np.zeros(len(new), bool)
    if len(old):
        reason_before = np.where(known, before["reason"].to_numpy()[source], -1).astype(np.int8)
        is_same = known.copy()
        for name in ("reason", "first_high", "first_low"):
            is_same &= before[name].to_numpy()[source] == after[name].to_numpy()
    return after.append_column("reason_before", pa.array(reason_before)).filter(pa.array(~is_same))
