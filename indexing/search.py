"""Maximum-inner-product search over rows in two stages, and the blockwise exact search that is its oracle.

FAISS compares the query with a sketch of every row in memory: the signs of at most 6,144 of its numbers (RaBitQ; in float16 on a GPU when FAISS
has one). Then the whole rows of the best are read from disk. Knows nothing of what rows and queries mean.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.rows import RowFormat, RowShards

SKETCH_BYTES = 768
SKETCH_QUERY_BITS = 4
ROW_QUERY_BITS = 8
GPU_MOST_RESULTS = 2048
FEW_ROWS = 4000
"""So many rows have no sketch: all of them are compared whole."""


def held_bytes(row_format: RowFormat, num_rows: int) -> int:
    """Of each row that is held decoded in memory: few sparse ones, which are compared in half the time that way; zero where none is."""
    return 8 * row_format.num_kept if row_format.encoding == "sparse" and num_rows <= FEW_ROWS else 0


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows found for each query, best first. A row that is not there, because fewer are allowed than were wanted, has number -1."""

    numbers: NDArray[np.int64]  # [Q, K] row numbers
    scores: NDArray[np.float32]  # [Q, K] inner products, descending


class RowIndex:
    """Search over every row, times its weight in `weights` [N] if given.

    Building costs one pass over the rows and holds at most 776 bytes a row (12 KiB on a GPU). A search reads `shortlist` whole rows from disk, by
    default one in two hundred but at least 4,000; an index of no more rows than that has no sketch, all its rows are compared, and sparse ones are
    held in memory, eight bytes a number that is kept.
    """

    def __init__(self, rows: RowShards, weights: NDArray[np.float64] | None = None, shortlist: int | None = None) -> None:
        self.rows = rows
        self.weights = None if weights is None else weights.astype(np.float32)
        self.shortlist = shortlist or max(FEW_ROWS, rows.num_rows // 200)
        self._sketch: _Sketch | _GpuSketch | None = None
        if rows.num_rows > self.shortlist:
            self._sketch = (_GpuSketch if _faiss().get_num_gpus() > 0 else _Sketch)(rows, self.weights)

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Candidates:
        """The k rows of largest inner product for each query [Q, D], among those that are `allowed` [N] if that is given."""
        _check(queries, self.rows.format.length)
        numbers = np.full((len(queries), min(k, self.rows.num_rows)), -1, dtype=np.int64)
        scores = np.full(numbers.shape, -np.inf, dtype=np.float32)
        for asked, near in self._shortlists(queries, max(self.shortlist, k), allowed):
            found = best(self._exact(queries[asked], near), k)
            count = found.numbers.shape[1]
            numbers[asked, :count], scores[asked, :count] = near[found.numbers], found.scores
        return Candidates(numbers=numbers, scores=scores)

    def _shortlists(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None
    ) -> Iterable[tuple[slice, NDArray[np.int64]]]:
        """(which queries, numbers of the rows to compare with them, ascending)."""
        num_allowed = self.rows.num_rows if allowed is None else int(allowed.sum())
        if self._sketch is None or num_allowed <= count or (allowed is not None and not self._sketch.selects):
            return [(slice(None), np.arange(self.rows.num_rows) if allowed is None else np.flatnonzero(allowed))]
        found = self._sketch.search(queries, count, allowed)
        return [(slice(place, place + 1), np.sort(row)) for place, row in enumerate(found)]  # read from disk in order

    def _exact(self, queries: NDArray[np.float32], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = row_scores(queries, self.rows, numbers)
        return scores if self.weights is None else scores * self.weights[numbers]


class _Sketch:
    """The sketches of all rows in FAISS, one part for each thread, because FAISS scans for one query with one thread."""

    selects = True

    def __init__(self, rows: RowShards, weights: NDArray[np.float32] | None) -> None:
        self._format = rows.format
        threads = min(_faiss().omp_get_max_threads(), rows.num_rows)
        self._starts = np.linspace(0, rows.num_rows, threads + 1, dtype=np.int64)
        self._parts: list[Any] = []
        for first, signs, scales in _sketches(rows, weights):
            self._parts = self._parts or [_rabitq(8 * signs.shape[1], SKETCH_QUERY_BITS) for _ in range(threads)]
            for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
                own = slice(max(0, start - first), max(0, end - first))
                if len(scales[own]):
                    part.add_sa_codes(_rabitq_codes(signs[own], scales[own]))

    def search(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> list[NDArray[np.int64]]:
        """The numbers of about `count` rows for each query."""
        sketched, _ = _small(self._format.sketched(queries, SKETCH_BYTES))
        with ThreadPoolExecutor(len(self._parts), initializer=_faiss().omp_set_num_threads, initargs=(1,)) as threads:
            parts = list(threads.map(lambda place: self._search_part(place, sketched, count, allowed), range(len(self._parts))))
        numbers = np.concatenate([numbers for _, numbers in parts], axis=1)
        merged = best(np.concatenate([scores for scores, _ in parts], axis=1), count).numbers
        return [row[row >= 0] for row in np.take_along_axis(numbers, merged, axis=1)]

    def _search_part(
        self, place: int, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        faiss, part, start = _faiss(), self._parts[place], self._starts[place]
        parameters = faiss.RaBitQSearchParameters()
        parameters.qb = SKETCH_QUERY_BITS
        if allowed is not None:
            mask = np.packbits(allowed[start : self._starts[place + 1]], bitorder="little")  # it and the selector must outlive the search
            selector = faiss.IDSelectorBitmap(part.ntotal, faiss.swig_ptr(mask))
            parameters.sel = selector
        scores, numbers = part.search(queries, min(count, part.ntotal), params=parameters)
        return scores, np.where(numbers >= 0, numbers + start, -1)


class _GpuSketch:
    """The sketches of all rows in FAISS on a GPU, in float16."""

    selects = False  # FAISS knows no selection of rows there

    def __init__(self, rows: RowShards, weights: NDArray[np.float32] | None) -> None:
        faiss = _faiss()
        self._format = rows.format
        self._resources = faiss.StandardGpuResources()  # must live as long as the index
        settings = faiss.GpuIndexFlatConfig()
        settings.useFloat16 = True
        self._index: Any = None
        for _, signs, scales in _sketches(rows, weights):
            self._index = self._index or faiss.GpuIndexFlatIP(self._resources, 8 * signs.shape[1], settings)
            self._index.add((2 * np.unpackbits(signs, axis=1, bitorder="little").astype(np.float32) - 1) * scales[:, None])

    def search(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> list[NDArray[np.int64]]:
        """The numbers of the best `count` rows, at most 2,048, for each query."""
        assert allowed is None
        return list(self._index.search(self._format.sketched(queries, SKETCH_BYTES), min(count, GPU_MOST_RESULTS))[1])


def _sketches(rows: RowShards, weights: NDArray[np.float32] | None) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.float32]]]:
    """(number of the first row, signs, scales) of consecutive blocks."""
    for first, block in rows.blocks():
        signs, scales = rows.format.sketch(block, SKETCH_BYTES)
        yield first, signs, scales if weights is None else scales * weights[first : first + len(block)]


def _rabitq(num_bits: int, query_bits: int) -> Any:
    """An empty FAISS index of signs and scales for inner products with a float query, which it rounds to so many bits."""
    faiss = _faiss()
    index = faiss.IndexRaBitQ(num_bits, faiss.METRIC_INNER_PRODUCT)
    index.train(np.zeros((1, num_bits), dtype=np.float32))  # the point around which signs are taken: the origin
    index.qb = query_bits
    return index


def _rabitq_codes(signs: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """FAISS's own form of the same: the packed signs, ‖x - origin‖² - ‖x‖² = 0, and the scale for signs of norm 1."""
    factors = np.zeros((len(signs), 2), dtype=np.float32)
    factors[:, 1] = scales * np.sqrt(np.float32(8 * signs.shape[1]))
    return np.concatenate([signs, factors.view(np.uint8)], axis=1)


def row_scores(queries: NDArray[np.float32], rows: RowShards, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """The inner product of every query with the rows of these numbers, [Q, len(numbers)]; with bit rows, the query is rounded to eight bits."""
    _check(queries, rows.format.length)
    sparse, size = rows.format.encoding == "sparse", rows.format.bytes_per_row
    threads = _faiss().omp_get_max_threads() if sparse else 1  # FAISS and BLAS have their own
    if held_bytes(rows.format, rows.num_rows):
        return _side_by_side(lambda shard: np.asarray((shard @ queries.T).T), rows.held_sparse, threads)[:, numbers]
    if not len(numbers):
        return np.zeros((len(queries), 0), dtype=np.float32)
    bytes_each = {"bit": size, "sparse": 128 * size}.get(rows.format.encoding, 4 * rows.format.length)
    step = max(1, 64 * 2**20 // max(1, bytes_each))
    pieces = [numbers[first : first + step] for first in range(0, len(numbers), step)]
    return _side_by_side(lambda piece: _scores(queries, rows.take(piece), rows.format), pieces, threads)


def _side_by_side(scores: Callable[[Any], NDArray[np.float32]], parts: Sequence[Any], num_threads: int) -> NDArray[np.float32]:
    with ThreadPoolExecutor(num_threads) as threads:
        return np.concatenate(list(threads.map(scores, parts)), axis=1)


def _scores(queries: NDArray[np.float32], codes: NDArray[np.uint8], row_format: RowFormat) -> NDArray[np.float32]:
    if row_format.encoding == "sparse":
        return row_format.sparse_scores(codes, queries)
    if row_format.encoding != "bit":
        return queries @ row_format.decode(codes).T
    signs = codes[:, :-4]
    index = _rabitq(8 * signs.shape[1], ROW_QUERY_BITS)
    index.add_sa_codes(_rabitq_codes(signs, row_format.scales(codes)))
    small, sizes = _small(np.pad(queries, ((0, 0), (0, -row_format.length % 8))))
    found, numbers = index.search(small, len(codes))
    scores: NDArray[np.float32] = np.empty_like(found)
    np.put_along_axis(scores, numbers, found * sizes, axis=1)
    return scores


def _small(queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(queries of norm 1e-10, what their products are to be multiplied by, [Q, 1]).

    FAISS takes an inner product from a squared distance less ‖q‖²; of a query much longer than the rows nothing would be left of it.
    """
    sizes = 1e10 * np.linalg.norm(queries, axis=1, keepdims=True).astype(np.float64)
    return (queries / np.where(sizes > 0, sizes, 1)).astype(np.float32), sizes.astype(np.float32)


def exact_search(queries: NDArray[np.float32], rows: RowShards, k: int) -> Candidates:
    """What `RowIndex.search` approximates, by plain NumPy products over blocks of decoded rows; ties go to the lower number."""
    _check(queries, rows.format.length)
    return best(np.concatenate([queries @ rows.format.decode(block).T for _, block in rows.blocks()], axis=1), k)


def best(scores: NDArray[Any], k: int) -> Candidates:
    """The k largest scores of each row of [Q, N], ties to the lower number."""
    count = min(k, scores.shape[1])
    numbers = np.empty((len(scores), count), dtype=np.int64)
    for row, found in zip(scores, numbers, strict=True):
        least = np.partition(row, len(row) - count)[len(row) - count] if count else np.inf
        near = np.flatnonzero(row >= least)  # more than k only when some are equal
        found[:] = near[np.argsort(-row[near], kind="stable")[:count]]
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
