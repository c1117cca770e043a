"""Near duplicates: images that look the same, by perceptual hash and mean colour, in time that grows with the rows alone.

A row is a near duplicate of an earlier row if at most `distance` of the 64 bits of their hashes differ and their colours
agree. A hash describes shapes in grey, so without the colour a pink arrow would be a copy of a blue one.

Two colours agree if no channel's cell (its level divided by COLOUR_CELL) differs by more than one. So levels that differ by
COLOUR_CELL or less agree, and levels that differ by 2 * COLOUR_CELL or more do not. An unknown colour agrees with all.
Measured (levels of 255, largest channel): the same image encoded again (JPEG and WebP of quality 30 to 95, PNG, half and
double size) differs by at most 4, in 99 % by at most 2; arrows that cover 10 % of a light background, in any two of 12
colours, differ by at least 9 (orange and yellow), half of the pairs by 17 and more. At 5 % that is 5 and 8.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from tasks.keys import hex_numbers

COLOUR_CELL = 4
MAX_DISTANCE = 7

_UNKNOWN = -1
_CHANNEL_BITS = 6  # 256 levels in cells of 4
_FEW = 1024  # hashes that are compared all with all
_PAIRS_AT_ONCE = 1 << 21
_SPREAD = np.arange(64) * 37 % 64  # the bits of a band are not those of neighbouring frequencies


def colour_cells(colours: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Cell of each colour (rrggbb, or null if unknown): [N] int32."""
    values = hex_numbers(colours, 6)[:, 0].astype(np.int64)
    levels = np.stack([values >> 16, values >> 8 & 255, values & 255]) // COLOUR_CELL
    cells = levels[0] << 2 * _CHANNEL_BITS | levels[1] << _CHANNEL_BITS | levels[2]
    return np.where(colours.is_valid(), cells, _UNKNOWN).astype(np.int32)


def near_duplicates(hashes: np.ndarray, distance: int, cells: np.ndarray | None = None) -> np.ndarray:
    """Mask of the rows that are near duplicates of an earlier row, which may be a near duplicate itself: [N] bool.

    Rows of the same hash and cell are one look, which stands for its earliest row. So many equal images cost no more than
    different ones.

    Args:
        hashes: [N] uint64, in the order of keys.
        cells: [N] int32, see `colour_cells`; by default all colours are unknown.
    """
    if cells is None:
        cells = np.full(len(hashes), _UNKNOWN, np.int32)
    looks, found = find_looks(hashes, cells)
    earlier = _Looks(hashes[looks], cells[looks], looks)
    earlier.compare_equal_hashes()
    if distance:
        earlier.compare_near_hashes(distance)
    found[looks[earlier.found]] = True
    return found


def near_to(hashes: np.ndarray, cells: np.ndarray, look: tuple[int, int], distance: int) -> np.ndarray:
    """Mask of the rows that are near duplicates of one look: [N] bool.

    Args:
        hashes: [N] uint64.
        cells: [N] int32, see `colour_cells`.
        look: hash and cell.
    """
    hash, cell = look
    near: np.ndarray = np.bitwise_count(hashes ^ np.uint64(hash)) <= distance
    if cell != _UNKNOWN:
        near &= (cells == _UNKNOWN) | _adjacent(np.maximum(cells, 0), np.full_like(cells, cell))
    return near


def agree_in_a_band(hashes: np.ndarray, looks: Sequence[tuple[tuple[int, int], int]]) -> np.ndarray:
    """Mask of the hashes that may be near one of some looks: [N] bool. All others are farther than each look's distance.

    Args:
        hashes: [N] uint64.
        looks: hash and cell, and the distance.
    """
    found = np.zeros(len(hashes), bool)
    spread = _spread(hashes)
    for distance in sorted({distance for _, distance in looks}):
        wanted = _spread(np.array([hash for (hash, _), each in looks if each == distance], np.uint64))
        for _, low, high in _bands(distance):
            found |= np.isin(_band(spread, low, high)[0], _band(wanted, low, high)[0])
    return found


def find_looks(hashes: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of the first row of each look (hash and cell), and the mask of all other rows."""
    order = np.lexsort((cells, hashes))  # stable
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(hashes[order]) != 0) | (np.diff(cells[order]) != 0)
    looks = np.sort(order[is_first])
    repeated = np.ones(len(hashes), bool)
    repeated[looks] = False
    return looks, repeated


def near_duplicate_looks(
    hashes: np.ndarray, cells: np.ndarray, distance: int, found: np.ndarray, partition: int, num_partitions: int
) -> np.ndarray:
    """Mask of looks that are near duplicates of an earlier look with another hash: [N] bool, includes `found`.

    Args:
        hashes, cells: of different looks, in the order of keys. All looks that `partitions_of` sends to this partition.
        distance: at least 1.
        found: mask of looks that need no search, because they are known to be near duplicates.
    """
    earlier = _Looks(hashes, cells, np.arange(len(hashes)), found)
    earlier.compare_near_hashes(distance, partition, num_partitions)
    return earlier.found


def partitions_of(hashes: np.ndarray, distance: int, num_partitions: int) -> np.ndarray:
    """Partitions in which a hash meets all hashes within `distance`: [N, distance + 1], with repetitions.

    Hashes that differ in at most `distance` bits agree in one of `distance + 1` bands. Equal bands meet in one partition.
    """
    spread = _spread(hashes)
    owners = [_owners(_band(spread, low, high)[0], band, num_partitions) for band, low, high in _bands(distance)]
    return np.stack(owners, axis=1)


class _Looks:
    """Looks by hash, to find out which ones have an earlier near duplicate.

    Hashes are numbered by their earliest row. Looks are sorted by the number of their hash and by cell.
    """

    def __init__(
        self, hashes: np.ndarray, cells: np.ndarray, rows: np.ndarray, found: np.ndarray | None = None
    ) -> None:
        """Group the looks by hash.

        Args:
            rows: [N] ascending; earliest row of each look.
            found: mask of looks that need no search.
        """
        self.found = np.zeros(len(hashes), bool) if found is None else found.copy()
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        by_time = np.argsort(first)
        number = np.empty(len(first), np.int64)
        number[by_time] = np.arange(len(first))
        self.hash_of = number[inverse]  # [N] number of each look's hash
        self.hashes, self.rows, self.cells = hashes[first[by_time]], rows, cells
        self.earliest = rows[first[by_time]]  # [H]
        self.first_look = first[by_time]  # [H]
        self.latest = np.zeros(len(first), rows.dtype)
        np.maximum.at(self.latest, self.hash_of, rows)
        self.earliest_unknown = np.full(len(first), np.iinfo(np.int64).max)
        unknown = np.flatnonzero(cells == _UNKNOWN)
        self.earliest_unknown[self.hash_of[unknown]] = rows[unknown]
        self.counts = np.bincount(self.hash_of, minlength=len(first))
        self.order = np.lexsort((cells, self.hash_of))
        self.starts = np.cumsum(self.counts) - self.counts
        self.codes = self._code(self.hash_of[self.order], cells[self.order])
        self.undecided = self.counts - np.bincount(self.hash_of[self.found], minlength=len(first))

    def compare_equal_hashes(self) -> None:
        """Compare looks that differ in colour alone."""
        others = np.flatnonzero((self.counts[self.hash_of] > 1) & ~self.found)
        self._compare(others, self.hash_of[others])

    def compare_near_hashes(self, distance: int, partition: int = 0, num_partitions: int = 1) -> None:
        """Compare looks whose hashes differ in 1 to `distance` bits.

        Hashes within `distance` bits agree in one of `distance + 1` bands of bits. From a distance of 3 on, the other bits
        are cut into four more bands, of which `distance - 3` may differ in one bit: if all four differed in more than
        allowed, that would be `distance + 1` bits. So a pair agrees in one of the first bands and, up to that bit, in one
        of the others. Only such pairs are compared, and a row's comparisons end when it is found. Random hashes
        meet by 22 bits or more, after 84 probes at a distance of 4 and 480 at 7.
        """
        if not len(self.hashes):
            return
        spread = _spread(self.hashes)
        if len(spread) <= _FEW:
            everything = np.arange(len(spread))
            self._probe(spread, distance, everything, np.zeros(len(spread), np.uint64), [0])
            return
        for band, low, high in _bands(distance):
            values, rest = _band(spread, low, high)
            here = np.flatnonzero(_owners(values, band, num_partitions) == partition)
            for keys, flips in _probes(values[here], rest[here], 64 - (high - low), distance):
                self._probe(spread, distance, here, keys, flips)

    def _probe(self, spread: np.ndarray, distance: int, here: np.ndarray, keys: np.ndarray, flips: list[int]) -> None:
        """Compare hashes whose keys are equal up to one of some differences.

        Args:
            here: [M] ascending numbers of the hashes that are compared.
            keys: [M] uint64.
            flips: differences of keys.
        """
        bits = max(8, len(here).bit_length() + 1) if len(here) > _FEW else 0
        buckets = _buckets(keys, bits)
        place_bits = np.uint64(max(1, len(here).bit_length()))
        packed = np.sort(buckets << place_bits | np.arange(len(here), dtype=np.uint64))
        order = (packed & ((np.uint64(1) << place_bits) - np.uint64(1))).astype(np.int64)
        members = here[order]  # by bucket, the earliest first
        ends = np.cumsum(np.bincount(buckets.astype(np.int64), minlength=1 << bits))
        ends = np.concatenate([[0], ends])
        undecided = self.undecided[members] > 0
        open_members, open_buckets = members[undecided], buckets[order[undecided]].astype(np.int64)
        for flip in flips:
            probed = open_buckets ^ int(_buckets(np.array([flip], np.uint64), bits)[0])
            begin, end, queries = ends[probed], ends[probed + 1], open_members
            width = 32
            while len(queries):
                go_on = (begin < end) & (self.undecided[queries] > 0)
                begin, end, queries = begin[go_on], end[go_on], queries[go_on]
                until = np.minimum(begin + width, end)
                for query, place in _expand(queries, begin, until):
                    candidate = members[place]
                    useful = self.earliest[candidate] < self.latest[query]
                    query, candidate = query[useful], candidate[useful]
                    near = np.bitwise_count(spread[query] ^ spread[candidate]) <= distance
                    near &= query != candidate
                    self._compare_hashes(query[near], candidate[near])
                begin, width = until, 8 * width

    def _compare_hashes(self, queries: np.ndarray, candidates: np.ndarray) -> None:
        """Compare all looks of hashes (by number) with those of other hashes."""
        starts = self.starts[queries]
        for candidate, place in _expand(candidates, starts, starts + self.counts[queries]):
            looks = self.order[place]
            undecided = ~self.found[looks]
            self._compare(looks[undecided], candidate[undecided])

    def _compare(self, looks: np.ndarray, hashes: np.ndarray) -> None:
        """Mark the looks that agree in colour with an earlier look of a hash (by number)."""
        rows, cells = self.rows[looks], self.cells[looks]
        may = self.earliest[hashes] < rows
        looks, hashes, rows, cells = looks[may], hashes[may], rows[may], cells[may]
        agree = (cells == _UNKNOWN) | (self.earliest_unknown[hashes] < rows)
        agree |= _adjacent(cells, self.cells[self.first_look[hashes]])
        self._mark(looks[agree])
        rest = ~agree & (self.counts[hashes] > 1)
        looks, hashes, rows, cells = looks[rest], hashes[rest], rows[rest], cells[rest]
        if not len(looks):
            return
        channels = _channels(cells)
        agree = np.zeros(len(looks), bool)
        for step in itertools.product((-1, 0, 1), repeat=3):
            beside = channels + np.array(step)[:, None]
            inside = ((beside >= 0) & (beside < 1 << _CHANNEL_BITS)).all(axis=0)
            code = self._code(hashes, beside[0] << 2 * _CHANNEL_BITS | beside[1] << _CHANNEL_BITS | beside[2])
            place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
            agree |= inside & (self.codes[place] == code) & (self.rows[self.order[place]] < rows)
        self._mark(looks[agree])

    def _mark(self, looks: np.ndarray) -> None:
        new = np.unique(looks[~self.found[looks]])
        self.found[new] = True
        np.subtract.at(self.undecided, self.hash_of[new], 1)

    @staticmethod
    def _code(hashes: np.ndarray, cells: np.ndarray) -> np.ndarray:
        codes: np.ndarray = hashes * (1 << 3 * _CHANNEL_BITS + 1) + cells + 1
        return codes


def _spread(hashes: np.ndarray) -> np.ndarray:
    """Hashes with their bits in another order, which changes no distance."""
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8), axis=1)
    return np.packbits(np.take(bits, _SPREAD, axis=1), axis=1).view(np.uint64)[:, 0]


def _bands(distance: int) -> Iterator[tuple[int, int, int]]:
    """Number, lowest bit and end of each of `distance + 1` bands of 64 bits."""
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    return ((band, low, high) for band, (low, high) in enumerate(itertools.pairwise(edges)))


def _band(spread: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of a band, and the other bits."""
    width = np.uint64(high - low)
    rotated = spread >> np.uint64(low) | (spread << np.uint64(64 - low) if low else np.uint64(0))
    return rotated & ((np.uint64(1) << width) - np.uint64(1)), rotated >> width


def _probes(
    values: np.ndarray, rest: np.ndarray, rest_bits: int, distance: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Keys, and their differences, of which near hashes with an equal first band have at least one in common."""
    if distance < 3:
        yield values, [0]
        return
    edges = np.linspace(0, rest_bits, 5).astype(int).tolist()
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        width = np.uint64(high - low)
        part = rest >> np.uint64(low) & ((np.uint64(1) << width) - np.uint64(1))
        flips = [0, *(1 << bit for bit in range(high - low))] if number < distance - 3 else [0]
        yield values << width | part, flips


def _owners(values: np.ndarray, band: int, num_partitions: int) -> np.ndarray:
    mixed = (values + np.uint64(band << 40)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)) % np.uint64(num_partitions)


def _buckets(keys: np.ndarray, bits: int) -> np.ndarray:
    """Bucket of each key, of `bits` bits: that of `a ^ b` is `bucket(a) ^ bucket(b)`, so probes in order read memory in order."""
    if not bits:
        return np.zeros_like(keys)
    folded = keys
    for shift in range(bits, 40, bits):
        folded = folded ^ keys >> np.uint64(shift)
    return folded & np.uint64((1 << bits) - 1)


def _expand(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of each value and the places from its begin to its end, some millions at once."""
    lengths = end - begin
    totals = np.cumsum(lengths)
    start = 0
    while start < len(values):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + _PAIRS_AT_ONCE, side="right")))
        sizes = lengths[start:stop]
        offsets = np.repeat(begin[start:stop] - (totals[start:stop] - sizes - done), sizes)
        yield np.repeat(values[start:stop], sizes), offsets + np.arange(len(offsets))
        start = stop


def _channels(cells: np.ndarray) -> np.ndarray:
    mask = (1 << _CHANNEL_BITS) - 1
    return np.stack([cells >> 2 * _CHANNEL_BITS, cells >> _CHANNEL_BITS & mask, cells & mask]).astype(np.int64)


def _adjacent(cells: np.ndarray, others: np.ndarray) -> np.ndarray:
    close: np.ndarray = (np.abs(_channels(cells) - _channels(others)) <= 1).all(axis=0)
    agree: np.ndarray = close & (others != _UNKNOWN)
    return agree
