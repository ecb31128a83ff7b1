"""Reads sparse rows (`indexing.sparse`): their bits one after another, compiled by numba.

A search reads thousands of rows for each query. With NumPy that takes hundreds of short calls, which threads cannot share; compiled, it takes a
quarter of the time, and threads do not wait for each other. Compiled code looks at no bounds, so what a row says of itself is checked where it is
read: damaged bytes are refused with DamagedRow, or give other numbers at places that exist. Places are unsigned, as all that indexes an array is:
numba then has no negative index to allow for.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from indexing.sparse import BLOCK, DAMAGED, NUM_SIZES, DamagedRow, SparseFormat, level_counts, num_low_bits

F = TypeVar("F", bound=Callable[..., Any])
WORD = 56
"""So many bits at least are read at once, wherever they begin."""
PADDING = 8
"""Zero bytes behind a row's own, so that no word ends beyond."""
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
"""Times a power of two, its first six bits tell which."""
EXPONENTS = np.zeros(64, dtype=np.uint32)
EXPONENTS[[int(DE_BRUIJN) * 2**exponent % 2**64 >> 58 for exponent in range(64)]] = np.arange(64)


def _compiled(function: F) -> F:
    try:
        return cast(F, numba.njit(function, nogil=True, cache=True))
    except RuntimeError:  # there is no directory that the compiled code could be kept in
        return cast(F, numba.njit(function, nogil=True))


_num_low_bits, _level_counts = _compiled(num_low_bits), _compiled(level_counts)


def decode(row_format: SparseFormat, codes: NDArray[np.uint8]) -> csr_array:
    """What the rows of these bytes keep, [N, L] in float32."""
    kept = row_format.counts(codes)[:, 2]
    starts = np.concatenate([[0], np.cumsum(kept)])
    places, numbers = np.empty(starts[-1], dtype=np.uint32), np.empty(starts[-1], dtype=np.float32)
    _decode(*_parts(row_format, codes), starts, places, numbers)
    index = np.int32 if max(starts[-1], row_format.length) < 2**31 else np.int64  # SciPy would take 64 bits for both
    return csr_array((numbers, places.astype(index, copy=False), starts.astype(index)), shape=(len(codes), row_format.length))


def scores(row_format: SparseFormat, codes: NDArray[np.uint8], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inner product of every query [Q, L] with what the rows of these bytes keep, [Q, N]."""
    products = np.empty((len(queries), len(codes)), dtype=np.float32)
    _scores(*_parts(row_format, codes), np.ascontiguousarray(queries), products)
    return products


def _parts(row_format: SparseFormat, codes: NDArray[np.uint8]) -> tuple[int, NDArray[np.int64], NDArray[np.float32], NDArray[np.uint8]]:
    return row_format.length, row_format.counts(codes), row_format.sizes(codes), row_format.bits(codes)


@_compiled
def _decode(
    length: int,
    counts: NDArray[np.int64],
    sizes: NDArray[np.float32],
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    places: NDArray[np.uint32],
    numbers: NDArray[np.float32],
) -> None:
    bits, scratch = np.zeros(codes.shape[1] + PADDING, dtype=np.uint8), np.empty(8 * codes.shape[1], dtype=np.uint32)
    for row in range(len(codes)):
        bits[: codes.shape[1]] = codes[row]
        own = slice(starts[row], starts[row + 1])
        _read(bits, length, counts[row], sizes[row], places[own], numbers[own], scratch)


@_compiled
def _scores(
    length: int,
    counts: NDArray[np.int64],
    sizes: NDArray[np.float32],
    codes: NDArray[np.uint8],
    queries: NDArray[np.float32],
    products: NDArray[np.float32],
) -> None:
    bits, scratch = np.zeros(codes.shape[1] + PADDING, dtype=np.uint8), np.empty(8 * codes.shape[1], dtype=np.uint32)
    places, numbers = np.empty(8 * codes.shape[1], dtype=np.uint32), np.empty(8 * codes.shape[1], dtype=np.float32)
    for row in range(len(codes)):
        bits[: codes.shape[1]] = codes[row]
        _read(bits, length, counts[row], sizes[row], places, numbers, scratch)
        for place in range(len(queries)):
            query, product = queries[place], np.float32(0)
            for kept in range(counts[row, 2]):
                product += query[places[kept]] * numbers[kept]
            products[place, row] = product


@_compiled
def _read(
    bits: NDArray[np.uint8],
    length: int,
    counts: NDArray[np.int64],
    sizes: NDArray[np.float32],
    places: NDArray[np.uint32],
    numbers: NDArray[np.float32],
    scratch: NDArray[np.uint32],
) -> None:
    """A row's places and numbers, in the order of the bits. `scratch` holds as many places."""
    alone, num_blocks, kept = counts
    at = _read_places(bits, 0, alone, length, places)
    at = _read_places(bits, at, num_blocks, -(-length // BLOCK), scratch)
    signs, count, within = at + BLOCK * num_blocks, alone, np.uint64(0)
    if signs + kept > 8 * (len(bits) - PADDING):
        raise DamagedRow(DAMAGED)
    for block in range(num_blocks):
        within = _word(bits, at) & np.uint64(2**BLOCK - 1)
        first = np.uint32(BLOCK) * scratch[block]
        while within and count < kept:
            places[count] = first + _lowest(within)
            if places[count] >= length:
                raise DamagedRow(DAMAGED)
            within &= within - np.uint64(1)
            count += 1
        at += BLOCK
    if count < kept or within:
        raise DamagedRow(DAMAGED)
    for place in range(kept):
        numbers[place] = sizes[0] if _bit(bits, signs + place) else -sizes[0]
    at += kept
    few = _level_counts(kept)[1]
    at = _read_places(bits, at, few, kept, scratch)
    for level in range(1, NUM_SIZES):
        count = 0
        if level + 1 < NUM_SIZES and at + few > 8 * (len(bits) - PADDING):
            raise DamagedRow(DAMAGED)
        for place in range(few):
            number = scratch[place]
            numbers[number] = sizes[level] if _bit(bits, signs + number) else -sizes[level]
            if level + 1 < NUM_SIZES and _bit(bits, at + place):
                scratch[count] = number
                count += 1
        at, few = at + few, count


@_compiled
def _read_places(bits: NDArray[np.uint8], at: int, count: int, universe: int, places: NDArray[np.uint32]) -> int:
    """The places that `places_as_bits` wrote from bit `at` on; where they end."""
    if count == 0:
        return at
    low_bits = _num_low_bits(count, universe)
    low, num_rests = np.uint64((1 << low_bits) - 1), count + ((universe - 1) >> low_bits)
    if at + low_bits * count + num_rests > 8 * (len(bits) - PADDING):
        raise DamagedRow(DAMAGED)
    for number in range(count):
        places[number] = _word(bits, at + low_bits * number) & low
    first, number, read = at + low_bits * count, 0, 0
    while number < count:
        rests = _word(bits, first + read) & np.uint64(2**WORD - 1)
        while rests and number < count:
            places[number] |= np.uint32(read + _lowest(rests) - number) << np.uint32(low_bits)
            if places[number] >= universe:
                raise DamagedRow(DAMAGED)
            rests &= rests - np.uint64(1)
            number += 1
        read += WORD
        if number < count and read >= num_rests:
            raise DamagedRow(DAMAGED)
    return first + num_rests


@_compiled
def _word(bits: NDArray[np.uint8], at: int) -> np.uint64:
    """The bits from this one on, the lowest first, of which at least `WORD` are there."""
    first, word = np.uint64(at >> 3), np.uint64(0)
    for byte in range(8):
        word |= np.uint64(bits[first + np.uint64(byte)]) << np.uint64(8 * byte)
    return word >> np.uint64(at & 7)


@_compiled
def _bit(bits: NDArray[np.uint8], at: int) -> bool:
    return bool(bits[np.uint64(at >> 3)] >> (at & 7) & 1)


@_compiled
def _lowest(word: np.uint64) -> np.uint32:
    """Which is the lowest bit that is set."""
    return EXPONENTS[((word & (~word + np.uint64(1))) * DE_BRUIJN) >> np.uint64(58)]  # type: ignore[no-any-return]
