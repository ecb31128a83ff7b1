"""Rows as bytes: four encodings, and shards of them in `.npy` files, memory-mapped, which together are one table in the order of the shards.

Knows nothing of what the rows mean.
"""

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from indexing.sparse import SparseFormat

Encoding = Literal["float16", "int8", "bit", "sparse"]

SCALE_BYTES = 4
SPARSE_LENGTH = 2**20
SPARSE_NUMBERS_PER_BYTE = 128
MOST_SKETCH_BYTES = 768
SKETCH_SHARE = 16
"""The sketch of a sparse row takes one in so many of its bytes, and no more than the above."""
LARGEST_HALF = 65520
"""What float16 rounds to infinity."""
LARGEST = 1e18
"""Beyond which scales, and products with them, leave float32."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row x of `length` numbers is stored.

    float16: as it is. int8: round(x / s) with s = max|x| / 127, and s. bit: the signs of x, and s = ‖x‖² / ‖x‖₁, with which ⟨q, s·sign(x)⟩ has
    the right size for a q that points along x (RaBitQ, arXiv 2405.12497). sparse: the same of the row folded to few numbers, which is a sketch of
    it, and between these signs and s the largest numbers, as many as `most_bytes` hold (`indexing.sparse`). The scale s is the row's last four
    bytes, a float32.
    """

    encoding: Encoding
    length: int
    most_bytes: int = 0

    @cached_property
    def sparse(self) -> SparseFormat:
        """Of what a sparse row has beside its sketch."""
        return SparseFormat.within(self.most_bytes - self.sign_bytes - SCALE_BYTES, self.length)

    @property
    def num_kept(self) -> int:
        """How many of its numbers a row holds; a sparse one, about."""
        return self.sparse.num_kept if self.encoding == "sparse" else self.length

    @property
    def num_signs(self) -> int:
        """How many signs a row begins with: of its own numbers, or of those that a sparse one is folded to."""
        if self.encoding == "sparse":
            return 8 * max(1, min(MOST_SKETCH_BYTES, self.most_bytes // SKETCH_SHARE))
        return self.length if self.encoding == "bit" else 0

    @property
    def sign_bytes(self) -> int:
        return -(-self.num_signs // 8)

    @property
    def bytes_per_row(self) -> int:
        if self.encoding == "float16":
            return 2 * self.length
        if self.encoding == "sparse":
            return self.sign_bytes + self.sparse.num_bytes + SCALE_BYTES
        return SCALE_BYTES + (self.length if self.encoding == "int8" else self.sign_bytes)

    def encode(self, rows: Tensor) -> NDArray[np.uint8]:
        """Rows [N, D] as bytes [N, bytes_per_row]. Raises ValueError for a row that is not finite, or too large for float16."""
        values = rows.float().cpu().numpy()
        kind, most = (np.float16, LARGEST_HALF) if self.encoding == "float16" else (np.float32, LARGEST)
        largest = np.array([np.abs(row).max(initial=0) for row in values], dtype=np.float32)
        if not (largest < most).all():  # nor is nan
            number = int(np.flatnonzero(~(largest < most))[0])
            raise ValueError(f"row {number} of the batch is not finite in {kind.__name__} (its largest entry is {largest[number]:.3g})")
        if self.encoding == "float16":
            return values.astype(np.float16).view(np.uint8)
        if self.encoding == "sparse":
            folded = self.sparse.folded(values, self.num_signs)
            return np.concatenate([_signs(folded), self.sparse.encode(values), _as_bytes(_sign_scale(folded))], axis=1)
        if self.encoding == "int8":
            scales = largest / 127
            quantized = np.rint(values / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8).view(np.uint8)
            return np.concatenate([quantized, _as_bytes(scales)], axis=1)
        return np.concatenate([_signs(values), _as_bytes(_sign_scale(values))], axis=1)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows [N, D] in float32 of bytes [N, bytes_per_row]."""
        if self.encoding == "float16":
            return np.ascontiguousarray(codes).view(np.float16).astype(np.float32)
        if self.encoding == "int8":
            return codes[:, : self.length].view(np.int8) * self.scales(codes)[:, None]
        if self.encoding == "sparse":
            dense: NDArray[np.float32] = self.decode_sparse(codes).toarray()
            return dense
        bits = np.unpackbits(self.signs(codes), axis=1, count=self.length, bitorder="little")
        return (2 * bits.astype(np.float32) - 1) * self.scales(codes)[:, None]

    def scales(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N]: the scale of each row, but of those in float16."""
        return np.ascontiguousarray(codes[:, -SCALE_BYTES:]).view(np.float32)[:, 0]

    def signs(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The packed signs of bit rows, and those in the sketch of sparse ones, [N, sign_bytes]."""
        return codes[:, : self.sign_bytes]

    def decode_sparse(self, codes: NDArray[np.uint8]) -> csr_array:
        """What sparse rows keep, [N, D]."""
        from indexing.sparse_reading import decode  # numba takes a third of a second to import

        return decode(self.sparse, codes[:, self.sign_bytes : -SCALE_BYTES])

    def sparse_scores(self, codes: NDArray[np.uint8], queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inner product of every query [Q, D] with what sparse rows keep, [Q, N]."""
        from indexing.sparse_reading import scores

        return scores(self.sparse, codes[:, self.sign_bytes : -SCALE_BYTES], queries)

    def sketch(self, codes: NDArray[np.uint8], most_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The signs of `sketched` rows, packed [N, ≤ most_bytes], and a scale [N] for them."""
        if self.num_signs:
            return np.ascontiguousarray(self.signs(codes)[:, :: _stride(self.sign_bytes, most_bytes)]), self.scales(codes)
        values = self.sketched(self.decode(codes), most_bytes)
        return _signs(values), _sign_scale(values)

    def sketched(self, rows: NDArray[np.float32], most_bytes: int) -> NDArray[np.float32]:
        """Of rows [N, D], which are folded if they are sparse, the numbers whose signs are a sketch, [N, ≤ 8 most_bytes]: evenly spaced groups of
        eight, padded by zeros."""
        whole = self.sparse.folded(rows, self.num_signs) if self.encoding == "sparse" else rows
        padded = np.pad(whole, ((0, 0), (0, -whole.shape[1] % 8)))
        groups = np.arange(0, padded.shape[1] // 8, _stride(padded.shape[1] // 8, most_bytes))
        return np.ascontiguousarray(padded[:, (8 * groups[:, None] + np.arange(8)).ravel()])


def is_mixed(encoding: Encoding) -> bool:
    """Whether the numbers of rows are mixed until they are even: sparse ones are to be as uneven as they are."""
    return encoding != "sparse"


def row_length_within(encoding: Encoding, bytes_per_row: int) -> int:
    """How many numbers a row of at most so many bytes has; a sparse one keeps few of them."""
    if encoding == "float16":
        return bytes_per_row // 2
    if encoding == "sparse":
        length = max(SPARSE_LENGTH, SPARSE_NUMBERS_PER_BYTE * bytes_per_row)
        return length if RowFormat(encoding=encoding, length=length, most_bytes=bytes_per_row).num_kept else 0
    return max(0, bytes_per_row - SCALE_BYTES) * (1 if encoding == "int8" else 8)


def _stride(num_bytes: int, most_bytes: int) -> int:
    return max(1, -(-num_bytes // most_bytes))


def _signs(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(values >= 0, axis=1, bitorder="little")


def _sign_scale(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """‖x‖² / ‖x‖₁; zero for a row of zeros."""
    size = np.abs(values).sum(axis=1, dtype=np.float64)
    scale: NDArray[np.float32] = (np.square(values, dtype=np.float64).sum(axis=1) / np.where(size > 0, size, 1)).astype(np.float32)
    return scale


def _as_bytes(scales: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    return scales.astype(np.float32)[:, None].view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class RowShards:
    """The table [N, D] as memory-mapped shards of encoded rows."""

    format: RowFormat
    shards: tuple[NDArray[np.uint8], ...]

    @property
    def num_rows(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def blocks(self, block_bytes: int = 64 * 2**20) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number of the first row, encoded rows) for consecutive blocks of about that size."""
        step = max(1, block_bytes // self.format.bytes_per_row)
        first = 0
        for shard in self.shards:
            for start in range(0, len(shard), step):
                yield first + start, shard[start : start + step]
            first += len(shard)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The encoded rows of these numbers, in their order."""
        order = np.argsort(numbers, kind="stable")
        ends = np.searchsorted(numbers[order], self._starts)
        taken = np.empty((len(numbers), self.format.bytes_per_row), dtype=np.uint8)
        for shard in np.flatnonzero(np.diff(ends)):
            here = order[ends[shard] : ends[shard + 1]]
            taken[here] = self.shards[shard][numbers[here] - self._starts[shard]]
        return taken

    @cached_property
    def held_sparse(self) -> tuple[csr_array, ...]:
        """All rows, which are sparse and few, in memory, shard by shard: eight bytes a kept number."""
        return tuple(self.format.decode_sparse(shard) for shard in self.shards)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])


def open_rows(paths: Sequence[Path], row_format: RowFormat) -> RowShards:
    """The shards in `paths`, in this order. Raises ValueError for a file that does not hold rows of this format."""
    _allow_open_files(len(paths))
    shards = []
    for path in paths:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        if shard.dtype != np.uint8 or shard.ndim != 2 or shard.shape[1] != row_format.bytes_per_row:
            raise ValueError(
                f"{path} holds {shard.dtype} {shard.shape}, expected {row_format.encoding} rows of {row_format.bytes_per_row} bytes: "
                "rebuild the index"
            )
        shards.append(np.asarray(shard))  # a view of it: numpy.memmap itself takes ten times as long to index
    if not shards:
        raise ValueError("an index needs at least one shard of rows")
    return RowShards(format=row_format, shards=tuple(shards))


def _allow_open_files(count: int) -> None:
    """A mapped file stays open, and the usual limit is 1,024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 1024:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 1024 if hard == resource.RLIM_INFINITY else min(hard, count + 1024), hard))
