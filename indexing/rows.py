"""Rows on disk: shards of float16 numbers in `.npy` files, memory-mapped, which together are one table in the order of the shards.

Knows nothing of what the rows mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def encode_rows(rows: Tensor) -> NDArray[np.float16]:
    """Rows in float16. Raises ValueError for a row that is not finite, or too large for float16."""
    encoded: NDArray[np.float16] = rows.half().cpu().numpy()
    if not np.isfinite(encoded).all():
        number = int(np.flatnonzero(~np.isfinite(encoded).all(axis=1))[0])
        raise ValueError(f"row {number} of the batch is not finite in float16 (its largest entry is {rows[number].abs().max().item():.3g})")
    return encoded


@dataclass(frozen=True, kw_only=True)
class RowShards:
    """The table [N, D] as memory-mapped shards."""

    shards: tuple[NDArray[np.float16], ...]

    @property
    def num_rows(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def row_length(self) -> int:
        return int(self.shards[0].shape[1])

    def blocks(self, block_bytes: int = 64 * 2**20) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """(number of the first row, rows) for consecutive blocks of about that size."""
        step = max(1, block_bytes // (2 * self.row_length))
        first = 0
        for shard in self.shards:
            for start in range(0, len(shard), step):
                yield first + start, shard[start : start + step]
            first += len(shard)


def open_rows(paths: Sequence[Path], row_length: int) -> RowShards:
    """The shards in `paths`, in this order. Raises ValueError for a file that does not hold float16 rows of this length."""
    shards = []
    for path in paths:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        if shard.dtype != np.float16 or shard.ndim != 2 or shard.shape[1] != row_length:
            raise ValueError(f"{path} holds {shard.dtype} {shard.shape}, expected float16 rows of {row_length} numbers: rebuild the index")
        shards.append(shard)
    if not shards:
        raise ValueError("an index needs at least one shard of rows")
    return RowShards(shards=tuple(shards))
