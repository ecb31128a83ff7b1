"""Maximum-inner-product search over rows: a flat FAISS index, and the blockwise exact search that is its oracle.

The flat index holds the rows in float16 just as they are on disk; on a GPU when FAISS has one. Knows nothing of what rows and queries mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.rows import RowShards


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows found for each query, best first."""

    numbers: NDArray[np.int64]  # [Q, K] row numbers
    scores: NDArray[np.float32]  # [Q, K] inner products, descending


class FlatIndex:
    """Flat FAISS search over every row, times its weight in `weights` [N] if given. Building costs one pass over the rows; it holds 2·N·D bytes."""

    def __init__(self, rows: RowShards, weights: NDArray[np.float64] | None = None) -> None:
        faiss = _faiss()
        self.num_rows = rows.num_rows
        self._index: Any
        if faiss.get_num_gpus() > 0:
            settings = faiss.GpuIndexFlatConfig()
            settings.useFloat16 = True
            self._resources = faiss.StandardGpuResources()  # must live as long as the index
            self._index = faiss.GpuIndexFlatIP(self._resources, rows.row_length, settings)
        else:
            self._index = faiss.IndexScalarQuantizer(rows.row_length, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        for first, block in rows.blocks():
            scale = np.float32(1) if weights is None else weights[first : first + len(block), None].astype(np.float32)
            self._index.add(block.astype(np.float32) * scale)

    def search(self, queries: NDArray[np.float32], k: int) -> Candidates:
        """The k rows of largest inner product for each query [Q, D]; all rows when there are fewer than k."""
        _check(queries, self._index.d)
        scores, numbers = self._index.search(np.ascontiguousarray(queries), min(k, self.num_rows))
        return Candidates(numbers=numbers, scores=scores)


def exact_search(queries: NDArray[np.float32], rows: RowShards, k: int) -> Candidates:
    """What `FlatIndex.search` returns, by plain NumPy products over blocks of rows; ties go to the lower number."""
    _check(queries, rows.row_length)
    return best(all_scores(queries, rows), k)


def all_scores(queries: NDArray[np.float32], rows: RowShards) -> NDArray[np.float32]:
    """The inner product of every query with every row, [Q, N]."""
    return np.concatenate([queries @ block.astype(np.float32).T for _, block in rows.blocks()], axis=1)


def best(scores: NDArray[Any], k: int) -> Candidates:
    """The k largest scores of each row of [Q, N], ties to the lower number."""
    numbers = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Candidates(numbers=numbers, scores=np.take_along_axis(scores, numbers, axis=1))


def recall(found: Iterable[Iterable[int]], truth: Iterable[Iterable[int]]) -> float:
    """The share of the true numbers that were found, averaged over queries."""
    shares = [len(set(one) & set(other)) / len(set(other)) for one, other in zip(found, truth, strict=True)]
    return sum(shares) / len(shares)


def _check(queries: NDArray[np.float32], row_length: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != row_length:
        raise ValueError(f"queries have shape {queries.shape}, but the rows have {row_length} numbers")
    if not np.isfinite(queries).all():
        raise ValueError("a query's row is not finite")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FAISS is not installed: install this package with the extra [cpu] or [gpu]") from error
    return faiss
