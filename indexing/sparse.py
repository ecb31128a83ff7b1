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

from ekfac import key_of, keyed_bits

BLOCK = 32
CROWD = 5
"""A block that holds so many kept places has a bit for each."""
LARGER = 8
"""One in so many of the kept numbers is larger, one in so many of these larger still, and so on."""
NUM_SIZES = 4
NUM_COUNTS = 3
DAMAGED = "a row of the index is damaged: `influence status RUN --verify` names the file"
MOST_PER_BYTE = 3
"""A kept number takes at least 2.7 bits: one in a block, its sign, and .7 for its size."""
MOST_LOW_BITS = 24
SAMPLED = 61
"""One number in so many tells about where the largest begin: to find these among few takes a quarter of the time that it takes among all."""


class DamagedRow(OSError):
    """The bytes of a row are none that were ever written as one."""


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
        return 8 * (self.num_bytes - self._head_bytes)

    @property
    def _head_bytes(self) -> int:
        return NUM_COUNTS * self._counts.itemsize + 4 * NUM_SIZES

    @property
    def _counts(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint16 if 8 * self.num_bytes < 2**16 else np.uint32)

    def bits_for(self, places: NDArray[np.int64]) -> int:
        """What numbers at these places take."""
        held = np.bincount(places // BLOCK)
        crowds = held[held >= CROWD]
        alone, blocks = len(places) - int(crowds.sum()), len(crowds)
        where = _bits_of_places(alone, self.length) + _bits_of_places(blocks, self._num_blocks) + BLOCK * blocks
        count, *larger = level_counts(len(places))
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
        bits = [*places_as_bits(alone, self.length), *places_as_bits(blocks, self._num_blocks), within, numbers >= 0]
        level, descending = np.zeros(len(numbers), dtype=np.int64), np.argsort(-np.abs(numbers), kind="stable")
        for number, few in enumerate(level_counts(len(numbers))[1:], start=1):
            level[descending[:few]] = number
            own = level[level >= number - 1] == number
            bits += places_as_bits(np.flatnonzero(own), len(own)) if number == 1 else [own]
        means = np.bincount(level, np.sqrt(np.abs(numbers)), NUM_SIZES) / np.maximum(np.bincount(level, minlength=NUM_SIZES), 1)
        product = means[level] @ np.abs(numbers)
        sizes = (means * (row @ row / (product if product > 0 else 1))).astype(np.float32)
        return np.array([len(alone), len(blocks), len(numbers)], dtype=self._counts).tobytes() + sizes.tobytes(), bits

    def _chosen(self, sizes: NDArray[np.float32]) -> NDArray[np.int64]:
        """Places, ascending, of the largest numbers, as many as there is room for; none of zeros."""
        most = min(len(sizes), self._most_kept)
        count = min(most, max(1, self.num_kept))
        places = largest(sizes, count)
        while self.bits_for(places) <= self.num_bits:
            if len(places) < count or count == most:  # all that are not zero, or as many as a row can tell of
                return places
            count = min(2 * count, most)
            places = largest(sizes, count)
        places, low, high = places[np.argsort(-sizes[places], kind="stable")], 0, len(places)
        while high - low > 1:  # there is room for `low` of them and not for `high`
            middle = (low + high) // 2
            low, high = (middle, high) if self.bits_for(places[:middle]) <= self.num_bits else (low, middle)
        return np.sort(places[:low])

    def counts(self, codes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[N, 3]: how many places each row tells one by one, how many blocks, and how many numbers it keeps.

        Raises DamagedRow for a row that cannot be.
        """
        counts = np.ascontiguousarray(codes[:, : self._head_bytes - 4 * NUM_SIZES]).view(self._counts).astype(np.int64)
        alone, blocks, kept = counts.T
        if (alone + CROWD * blocks > kept).any() or kept.max(initial=0) > self._most_kept:
            raise DamagedRow(DAMAGED)
        return counts

    def sizes(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, NUM_SIZES] in float32, the smallest first."""
        return np.ascontiguousarray(codes[:, self._head_bytes - 4 * NUM_SIZES : self._head_bytes]).view(np.float32)

    def bits(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Of each row the bytes with its places, signs and which of its numbers are larger: `indexing.sparse_reading` reads them."""
        return codes[:, self._head_bytes :]

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


def places_as_bits(places: NDArray[np.int64], universe: int) -> list[NDArray[np.bool_]]:
    """Ascending places below `universe`: the last bits of each, the lowest first, and the rests of all."""
    if not len(places):
        return []
    low_bits = num_low_bits(len(places), universe)
    rests = np.zeros(_bits_of_places(len(places), universe) - low_bits * len(places), dtype=np.bool_)
    rests[(places >> low_bits) + np.arange(len(places))] = True
    return [(places[:, None] >> np.arange(low_bits) & 1).astype(np.bool_).ravel(), rests]


def _bits_of_places(count: int, universe: int) -> int:
    low_bits = num_low_bits(count, universe)
    return low_bits * count + count + (universe - 1 >> low_bits) if count else 0


def num_low_bits(count: int, universe: int) -> int:
    """How many last bits of each of so many places below `universe` are told as they are."""
    low_bits = 0
    while low_bits < MOST_LOW_BITS and count << low_bits + 1 <= universe:
        low_bits += 1
    return low_bits


def level_counts(count: int) -> list[int]:
    """Of so many numbers how many have each size or a larger one, from the smallest size on."""
    return [-(-count // LARGER**level) for level in range(NUM_SIZES)]


def largest(sizes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the largest are that are not zero, ascending; of equal ones the first."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    sample = np.sort(sizes[::SAMPLED])
    places = np.flatnonzero(sizes >= sample[-min(len(sample), 2 + 5 * count // (4 * SAMPLED))])  # a few more, as far as a sample can tell
    if len(places) < count:
        places = np.arange(len(sizes))
    sizes = sizes[places]
    if count < len(sizes):
        least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
        above, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
        chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
        places, sizes = places[chosen], sizes[chosen]
    return places[sizes > 0]
