"""Keys and hashes as numbers and bytes, for whole columns at once."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

KEY_DIGITS = 32
_HEX_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_HEX_VALUES = np.zeros(256, np.uint8)
_HEX_VALUES[_HEX_DIGITS] = np.arange(16)


def hex_numbers(column: pa.Array | pa.ChunkedArray, digits: int) -> np.ndarray:
    """Values of hex texts of equal length: [N, ceil(digits / 16)] uint64, most significant first; 0 for null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(array):
        return np.zeros((0, -(-digits // 16)), np.uint64)
    texts = pc.fill_null(array, "0" * digits).cast(pa.binary()).cast(pa.binary(digits))
    codes = np.frombuffer(texts.buffers()[1], np.uint8)[texts.offset * digits :][: len(texts) * digits]
    nibbles = _HEX_VALUES[codes].reshape(-1, digits)
    padded = np.pad(nibbles, ((0, 0), (-digits % 16, 0)))
    return (padded[:, ::2] << 4 | padded[:, 1::2]).copy().view(">u8").astype(np.uint64)


def key_texts(numbers: np.ndarray) -> pa.Array:
    """Keys of 32 hex digits, from [N, 2] uint64: inverse of `hex_numbers`."""
    octets = numbers.astype(">u8").view(np.uint8).reshape(-1)
    codes = _HEX_DIGITS[np.stack([octets >> 4, octets & 15], axis=1)].reshape(-1)
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * KEY_DIGITS
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(codes))


def key_octets(keys: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Keys of 32 hex digits as 16 bytes each."""
    octets = np.ascontiguousarray(hex_numbers(keys, KEY_DIGITS).astype(">u8"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(octets), [None, pa.py_buffer(octets)])


def pair_octets(high: pa.ChunkedArray, low: pa.ChunkedArray) -> pa.Array:
    """Keys as 16 bytes each that compare equal like the keys, from the two columns of numbers of `hex_numbers`."""
    numbers = np.stack([high.to_numpy(), low.to_numpy()], axis=1)
    return pa.Array.from_buffers(pa.binary(16), len(numbers), [None, pa.py_buffer(numbers)])


def octet_texts(keys: pa.ChunkedArray) -> pa.Array:
    """Keys of 32 hex digits, from 16 bytes each: inverse of `key_octets`."""
    array = keys.combine_chunks()
    octets = np.frombuffer(array.buffers()[1], np.uint8)[16 * array.offset :][: 16 * len(array)]
    return key_texts(octets.reshape(-1, 16).view(">u8").astype(np.uint64))
