"""Sparse rows as bytes: the largest numbers of a row, each by its place, its sign and one of two sizes.

Whitened gradients are heavy-tailed: an embedding's is that of the sequence's tokens alone, and of a linear layer's coordinates a few hold much of
the norm. What is left out is missed and nothing more, while rows that spread every number over all bits carry the noise of all of them.

The places are stored as Elias (1974) and Fano (1971) do: ascending, of each its last b bits, and of the rest, which only grows, one bit at the
rest plus the number of places before it. Then come the signs, which numbers are large, and the sizes of the large and of the others, two float32.
Sizes are means of √|x|, not of |x|: what was left out goes along with the smaller numbers rather than with the largest. They are scaled such that
the product of the row with its decoded form is the row's squared norm, so that estimates have the right size for a query that points along it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.sparse import csr_array

from ekfac import key_of, keyed_bits

LARGE = 8
"""One in so many of the kept numbers is large."""
SIZE_BYTES = 8
ROWS_AT_ONCE = 64
"""So many are decoded at once: about a megabyte of numbers, which a cache holds."""


@dataclass(frozen=True, kw_only=True)
class SparseFormat:
    """Rows of `length` numbers, of which `kept` are kept, with places whose last `low_bits` bits are stored as they are."""

    length: int
    kept: int
    low_bits: int

    @classmethod
    def within(cls, most_bytes: int, length: int) -> "SparseFormat":
        """The format that keeps most in at most so many bytes."""
        formats = []
        for low_bits in range(max(1, length.bit_length())):
            kept = max(0, min(length, 8 * (most_bytes - SIZE_BYTES) // (low_bits + 3)))
            while kept and cls(length=length, kept=kept, low_bits=low_bits).num_bytes > most_bytes:
                kept -= 1
            formats.append(cls(length=length, kept=kept, low_bits=low_bits))
        return max(formats, key=lambda some: some.kept)

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return sum(self._widths()) + SIZE_BYTES

    def _widths(self) -> list[int]:
        """Bytes of each plane of last bits, of the rests, of the signs, and of what is large."""
        plane = -(-self.kept // 8)
        return [plane] * self.low_bits + [-(-self._rest_bits // 8), plane, plane]

    @property
    def _rest_bits(self) -> int:
        return self.kept + (max(self.length, 1) - 1 >> self.low_bits)

    def encode(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows [N, L], which are finite, as bytes [N, num_bytes]."""
        places = np.stack([_largest(np.abs(row), self.kept) for row in rows]) if len(rows) else np.zeros((0, self.kept), dtype=np.int64)
        kept = np.take_along_axis(rows, places, axis=1)
        sizes = np.abs(kept).astype(np.float64)
        order = np.argsort(-sizes, axis=1, kind="stable")
        nonzero = (sizes > 0).sum(1, keepdims=True)
        num_large = np.where(nonzero == self.kept, -(-self.kept // LARGE), nonzero)  # a row of few numbers has no others but zeros
        large = np.empty(sizes.shape, dtype=np.bool_)
        np.put_along_axis(large, order, np.arange(self.kept) < num_large, axis=1)
        roots = np.sqrt(sizes)
        means = np.stack([(roots * some).sum(1) / np.maximum(some.sum(1), 1) for some in (large, ~large)], axis=1)
        product = (np.where(large, means[:, :1], means[:, 1:]) * sizes).sum(1)
        means *= (np.array([row @ row for row in rows]) / np.where(product > 0, product, 1))[:, None]
        rests = np.zeros((len(rows), self._rest_bits), dtype=np.bool_)
        np.put_along_axis(rests, (places >> self.low_bits) + np.arange(self.kept), True, axis=1)
        planes = [*((places >> bit & 1).astype(np.bool_) for bit in range(self.low_bits)), rests, kept >= 0, large]
        packed = [np.packbits(plane, axis=1, bitorder="little") for plane in planes]
        return np.concatenate([*packed, means.astype(np.float32).view(np.uint8)], axis=1)

    def decode(self, codes: NDArray[np.uint8]) -> csr_array:
        """The rows of these bytes, [N, L] in float32."""
        index = np.int32 if max(len(codes) * self.kept, self.length) < 2**31 else np.int64  # SciPy would take 64 bits for both
        places, numbers = np.empty((len(codes), self.kept), dtype=index), np.empty((len(codes), self.kept), dtype=np.float32)
        for first in range(0, len(codes), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            places[some], numbers[some] = self._decoded(codes[some])
        starts = (self.kept * np.arange(len(codes) + 1, dtype=np.int64)).astype(index)
        return csr_array((numbers.ravel(), places.ravel(), starts), shape=(len(codes), self.length))

    def _decoded(self, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        *planes, rests, signs, large = np.split(codes[:, :-SIZE_BYTES], np.cumsum(self._widths())[:-1], axis=1)
        bits = _bits(rests, self._rest_bits)
        bits[~bits.any(1), : self.kept] = 1  # bytes that were erased stand for zeros
        places = np.flatnonzero(bits).reshape(len(codes), self.kept)
        places -= np.arange(len(codes))[:, None] * self._rest_bits + np.arange(self.kept)
        for plane in reversed(planes):
            places <<= 1
            places += _bits(plane, self.kept)
        sizes = np.ascontiguousarray(codes[:, -SIZE_BYTES:]).view(np.float32)
        numbers = sizes[:, 1:] + _bits(large, self.kept) * (sizes[:, :1] - sizes[:, 1:])
        return places, numbers * (2 * _bits(signs, self.kept).astype(np.float32) - 1)

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


def _largest(sizes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the largest are, ascending; of equal ones the first."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _bits(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    return np.unpackbits(packed, axis=1, count=count, bitorder="little")
