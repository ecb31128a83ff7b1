"""Sparse rows as bytes: the largest numbers of a row, each by its place, its sign and one of four sizes; as many as there is room for.

Whitened gradients are heavy-tailed: an embedding's is that of the sequence's tokens alone, and of a linear layer's coordinates a few hold much of
the norm. What is left out is missed and nothing more, while rows that spread every number over all bits carry the noise of all of them.

Places are ascending whole numbers, coded as Elias (1974) and Fano (1971) do: of each its last b bits, and of the rest, which only grows, one bit at
the rest plus the number of places before it. The kept places crowd together, in the embeddings of the sequence's tokens above all. A block of 32
places that holds five or more of them is therefore told by its own place among the blocks, and by a bit for each of its places.
Then come the signs, and which of the numbers are larger, which of these larger still, and so on. Sizes are means of √|x|, not of |x|: what was left
out goes along with the smaller numbers rather than with the largest. They are scaled such that the product of the row with its decoded form is
the row's squared norm, so that estimates have the right size for a query that points along it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.sparse import csr_array

from ekfac import key_of, keyed_bits

BLOCK = 32
CROWD = 5
"""A block that holds so many kept places has a bit for each."""
LARGER = 8
"""One in so many of the kept numbers is larger, one in so many of these larger still, and so on."""
NUM_SIZES = 4
ROWS_AT_ONCE = 32
"""So many are decoded at once."""
MOST_PER_BYTE = 3
"""A kept number takes at least 2.7 bits: one in a block, its sign, and .7 for its size."""
POWERS = np.exp2(np.arange(24, dtype=np.float32))
"""Whole numbers of so many bits are exact in float32."""


@dataclass(frozen=True, kw_only=True)
class SparseFormat:
    """Rows of `length` numbers in `num_bytes` bytes: four sizes, how many places are coded one by one and how many blocks, and the bits."""

    length: int
    num_bytes: int

    @classmethod
    def within(cls, most_bytes: int, length: int) -> "SparseFormat":
        """The format of at most so many bytes; of fewer where a whole row takes no more."""
        most = cls(length=length, num_bytes=max(0, most_bytes))
        if length > most._most_kept:
            return most
        whole = -(-most.bits_for(np.arange(length)) // 8) + most.num_bytes - most.num_bits // 8
        return cls(length=length, num_bytes=min(most.num_bytes, whole))

    @property
    def num_kept(self) -> int:
        """About how many numbers a row keeps: one for each byte. It is more where they crowd together."""
        return max(0, min(self.length, self.num_bits // 8))

    @property
    def _most_kept(self) -> int:
        return max(0, self.num_bits * MOST_PER_BYTE // 8)

    @property
    def num_bits(self) -> int:
        """What is left for places, signs and sizes."""
        return 8 * (self.num_bytes - 4 * NUM_SIZES - 2 * self._counts.itemsize)

    @property
    def _counts(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint16 if 8 * self.num_bytes < 2**16 else np.uint32)

    def bits_for(self, places: NDArray[np.int64]) -> int:
        """What numbers at these places take."""
        held = np.bincount(places // BLOCK)
        crowds = held[held >= CROWD]
        alone, blocks = len(places) - int(crowds.sum()), len(crowds)
        where = _bits_of_places(alone, self.length) + _bits_of_places(blocks, self._num_blocks) + BLOCK * blocks
        count, *larger = _levels(len(places))
        return where + count + _bits_of_places(larger[0], count) + sum(larger[:-1])

    @property
    def _num_blocks(self) -> int:
        return -(-self.length // BLOCK)

    def encode(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows [N, L], which are finite, as bytes [N, num_bytes]."""
        codes = np.zeros((len(rows), self.num_bytes), dtype=np.uint8)
        for row, code in zip(rows, codes, strict=True):
            head, bits = self._encoded(row)
            code[: len(head)] = np.frombuffer(head, dtype=np.uint8)
            packed = np.packbits(np.concatenate(bits), bitorder="little")
            code[len(head) : len(head) + len(packed)] = packed
        return codes

    def _encoded(self, row: NDArray[np.float32]) -> tuple[bytes, list[NDArray[np.bool_]]]:
        chosen = self._chosen(np.abs(row))
        held = np.bincount(chosen // BLOCK, minlength=self._num_blocks)
        blocks, crowded = np.flatnonzero(held >= CROWD), held[chosen // BLOCK] >= CROWD
        alone, among = chosen[~crowded], chosen[crowded]
        within = np.zeros(BLOCK * len(blocks), dtype=np.bool_)
        within[BLOCK * np.searchsorted(blocks, among // BLOCK) + among % BLOCK] = True
        numbers = row[np.concatenate([alone, among])].astype(np.float64)
        bits = [*_places_as_bits(alone, self.length), *_places_as_bits(blocks, self._num_blocks), within, numbers >= 0]
        level, descending = np.zeros(len(numbers), dtype=np.int64), np.argsort(-np.abs(numbers), kind="stable")
        for number, few in enumerate(_levels(len(numbers))[1:], start=1):
            level[descending[:few]] = number
            own = level[level >= number - 1] == number
            bits += _places_as_bits(np.flatnonzero(own), len(own)) if number == 1 else [own]
        means = np.bincount(level, np.sqrt(np.abs(numbers)), NUM_SIZES) / np.maximum(np.bincount(level, minlength=NUM_SIZES), 1)
        product = means[level] @ np.abs(numbers)
        sizes = (means * (row @ row / (product if product > 0 else 1))).astype(np.float32)
        return np.array([len(alone), len(blocks)], dtype=self._counts).tobytes() + sizes.tobytes(), bits

    def _chosen(self, sizes: NDArray[np.float32]) -> NDArray[np.int64]:
        """Places, ascending, of the largest numbers, as many as there is room for; none of zeros."""
        places = _largest(sizes, min(len(sizes), self._most_kept))
        places = places[sizes[places] > 0]
        if self.bits_for(places) <= self.num_bits:
            return places
        places, low, high = places[np.argsort(-sizes[places], kind="stable")], 0, len(places)
        while high - low > 1:  # there is room for `low` of them and not for `high`
            middle = (low + high) // 2
            low, high = (middle, high) if self.bits_for(places[:middle]) <= self.num_bits else (low, middle)
        return np.sort(places[:low])

    def decode(self, codes: NDArray[np.uint8]) -> csr_array:
        """The rows of these bytes, [N, L] in float32."""
        index = np.int32 if max(len(codes) * self._most_kept, self.length) < 2**31 else np.int64  # SciPy would take 64 bits for both
        parts = [self._decoded(codes[first : first + ROWS_AT_ONCE]) for first in range(0, len(codes), ROWS_AT_ONCE)]
        starts = np.cumsum(np.concatenate([[0], *(kept for kept, _, _ in parts)])).astype(index)
        places = np.concatenate([np.zeros(0, dtype=index), *(own for _, own, _ in parts)], dtype=index)
        numbers = np.concatenate([np.zeros(0, dtype=np.float32), *(own for _, _, own in parts)])
        return csr_array((numbers, places, starts), shape=(len(codes), self.length))

    def _decoded(self, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """How many numbers each row keeps; places and numbers of one row after the other, a row's in no order."""
        start, rows = 2 * self._counts.itemsize, np.arange(len(codes))
        head = start + 4 * NUM_SIZES
        alone, num_blocks = np.ascontiguousarray(codes[:, :start]).view(self._counts).astype(np.int64).T
        sizes, bits = np.ascontiguousarray(codes[:, start:head]).view(np.float32), _Bits(codes[:, head:])
        own = bits.places(alone, np.full_like(alone, self.length))
        blocks = bits.places(num_blocks, np.full_like(alone, self._num_blocks))
        within = np.flatnonzero(bits.take(BLOCK * num_blocks))  # a row's blocks follow those of the row before, and so do their places
        ends = np.searchsorted(within, BLOCK * np.concatenate([[0], np.cumsum(num_blocks)]))
        crowded, among = np.diff(ends), within + (BLOCK * (blocks - np.arange(len(blocks))))[within // BLOCK]
        pieces = zip(np.split(own, np.cumsum(alone)[:-1]), np.split(among, ends[1:-1]), strict=True)
        places = np.concatenate([piece for pair in pieces for piece in pair])
        kept = alone + crowded
        signs = 2 * bits.take(kept).astype(np.float32) - 1
        few = np.array([_levels(count)[1] for count in kept.tolist()])
        owner, larger = np.repeat(rows, few), bits.places(few, kept) + np.repeat(np.cumsum(kept) - kept, few)
        numbers = np.repeat(sizes[:, 0], kept)
        numbers[larger] = sizes[owner, 1]
        for level in range(2, NUM_SIZES):
            still = bits.take(np.bincount(owner, minlength=len(codes)))
            owner, larger = owner[still], larger[still]
            numbers[larger] = sizes[owner, level]
        return kept, places, numbers * signs

    def folded(self, rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
        """Rows [N, L] as [N, width], width even: cut into stretches that are summed with random signs, and mixed by a cosine transform.

        Inner products are kept on average, and no number is much larger than the others.
        """
        stretch, made = width - 1, np.zeros((len(rows), width), dtype=np.float32)  # odd, so that a layer's columns go around all numbers
        whole = self.length // stretch * stretch
        for row, own in zip(rows, made, strict=True):
            signed = row * self._fold_signs
            own[:stretch] = signed[:whole].reshape(-1, stretch).sum(0)
            own[: self.length - whole] += signed[whole:]
        return np.asarray(dct(made, norm="ortho"), dtype=np.float32)

    @cached_property
    def _fold_signs(self) -> NDArray[np.float32]:
        bits = keyed_bits(0, np.array([key_of("sketch")], dtype=np.uint64), self.length)[0]
        return np.where(bits & np.uint64(1), np.float32(1), np.float32(-1))


class _Bits:
    """The bits of several rows, which are read one after another; of every row as many as it has of what is read."""

    def __init__(self, codes: NDArray[np.uint8]) -> None:
        self._rows = list(np.unpackbits(codes, axis=1, bitorder="little").view(np.bool_))
        self._next = [0] * len(codes)

    def _pieces(self, counts: list[int]) -> list[NDArray[np.bool_]]:
        pieces = [row[first : first + count] for row, first, count in zip(self._rows, self._next, counts, strict=True)]
        self._next = [first + count for first, count in zip(self._next, counts, strict=True)]
        return pieces

    def take(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """So many bits of each row, those of one row after those of another."""
        return np.concatenate(self._pieces(counts.tolist()))

    def places(self, counts: NDArray[np.int64], universes: NDArray[np.int64]) -> NDArray[np.int64]:
        """What `_places_as_bits` wrote of so many places in each row."""
        shapes = np.array([_elias_fano(count, universe) for count, universe in zip(counts.tolist(), universes.tolist(), strict=True)])
        low_bits, num_rests = shapes.T
        planes = self._pieces((low_bits * counts).tolist())
        by_row = zip(low_bits.tolist(), counts.tolist(), planes, strict=True)
        last = [POWERS[:low] @ plane.reshape(low, count).astype(np.float32) for low, count, plane in by_row]
        ends = np.flatnonzero(self.take(num_rests)) - np.arange(counts.sum())
        starts = (np.cumsum(num_rests) - num_rests) - (np.cumsum(counts) - counts)
        places: NDArray[np.int64] = ends - np.repeat(starts, counts) << np.repeat(low_bits, counts)
        return places + np.concatenate(last).astype(np.int64)


def _places_as_bits(places: NDArray[np.int64], universe: int) -> list[NDArray[np.bool_]]:
    """Ascending places below `universe`: their last bits, the lowest first, and their rests."""
    low_bits, num_rests = _elias_fano(len(places), universe)
    rests = np.zeros(num_rests, dtype=np.bool_)
    rests[(places >> low_bits) + np.arange(len(places))] = True
    return [*((places >> bit & 1).astype(np.bool_) for bit in range(low_bits)), rests]


def _bits_of_places(count: int, universe: int) -> int:
    low_bits, num_rests = _elias_fano(count, universe)
    return low_bits * count + num_rests


def _elias_fano(count: int, universe: int) -> tuple[int, int]:
    """How many last bits each of so many places below `universe` has, and how many bits the rests take."""
    low_bits = min(len(POWERS), max(0, (universe // max(1, count)).bit_length() - 1))
    return low_bits, count + (max(0, universe - 1) >> low_bits) if count else 0


def _levels(count: int) -> list[int]:
    """Of so many numbers how many have each size or a larger one, from the smallest size on."""
    return [-(-count // LARGER**level) for level in range(NUM_SIZES)]


def _largest(sizes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the largest are, ascending; of equal ones the first."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
