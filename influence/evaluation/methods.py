"""Scores of every training sequence for every query, by the methods that an evaluation compares, or from a file."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexing import row_scores
from influence.answering import QueryOptions, check_alike, num_candidates
from influence.attribution import gradient_norms, query_gradients, scan_parts
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.refinement import RefineOptions
from influence.run import Run
from influence.solving import Progress, Solved, in_groups, solved

METHODS = ("ekfac", "refined", "index", "gradient-cosine", "gradient-dot", "bm25")


def scores_by(
    method: str, runs: Sequence[Run], measurements: Sequence[Measurement], refine: RefineOptions, progress: Progress
) -> NDArray[np.float64]:
    """[Q, N]: positive where training on the sequence is said to raise the measurement; up to a positive factor of each query.

    `index` is what a query gets: exact scores of the index's candidates at both ends, its estimates of the others. Scores are averaged over the runs,
    but for those of `bm25`, which knows texts only.
    """
    check_method(method)
    check_alike(runs)
    first = runs[0]
    if method == "bm25":
        return np.stack([first.lexical.scores(f"{m.prompt}{m.completion}", len(first.store)) for m in measurements])
    groups = in_groups(measurements, first, refine if method == "refined" else None)
    by_run = [np.concatenate([_gradient_scores(method, run, group, refine, progress) for group in groups]) for run in runs]
    return np.asarray(np.mean(by_run, axis=0))


def check_method(method: str) -> None:
    """Raises RequestError for a method that is not one of METHODS."""
    if method not in METHODS:
        raise RequestError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")


def _gradient_scores(
    method: str, run: Run, measurements: Sequence[Measurement], refine: RefineOptions, progress: Progress
) -> NDArray[np.float64]:
    if method in ("gradient-dot", "gradient-cosine"):
        gradients = [(run.attributed, query_gradients(run.attributed, measurements).gradients)]
        products = run.exact_scores(gradients, len(measurements), progress)
        return products / _norms(run) if method == "gradient-cosine" else products  # the query's own norm changes no ranking
    found = solved(run, run.attributed, measurements, refine if method == "refined" else None, progress, rows=method == "index")
    return _through_the_index(run, found) if method == "index" else run.exact_scores(found.vectors, len(measurements), progress)


def _through_the_index(run: Run, found: Solved) -> NDArray[np.float64]:
    rows = found.rows
    assert rows is not None
    scores = row_scores(rows, run.rows, np.arange(len(run.store))).astype(np.float64)
    candidates = np.zeros(scores.shape, dtype=np.bool_)
    for sign in (1.0, -1.0):
        for query, numbers in enumerate(run.index.search(np.float32(sign) * rows, num_candidates(run, QueryOptions(), sign < 0)).numbers):
            candidates[query, numbers] = True
    union = np.flatnonzero(candidates.any(0))
    exact = scan_parts(found.vectors, run.store.select(union.tolist()))
    scores[:, union] = np.where(candidates[:, union], exact, scores[:, union])
    return scores


def _norms(run: Run) -> NDArray[np.float64]:
    """[N]: of each sequence's gradient; 1 for a sequence without one, whose scores are zero."""
    norms = np.concatenate([gradient_norms(run.attributed, run.store.shard(shard)) for shard in range(run.store.num_shards)])
    return np.where(norms > 0, norms, 1.0)


def read_scores(path: Path, num_queries: int, num_sequences: int) -> NDArray[np.float64]:
    """Scores [Q, N] of another method from a `.npy` file. Nothing pickled is read.

    Raises RequestError when the file holds anything but finite numbers of that shape.
    """
    try:
        with path.open("rb") as stream:
            scores = np.load(stream, allow_pickle=False)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise RequestError(f"{path} is not an .npy file of plain numbers") from None
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "iuf":
        raise RequestError(f"{path} is not an .npy file of plain numbers")
    if scores.shape != (num_queries, num_sequences):
        raise RequestError(f"{path} has shape {list(scores.shape)}, expected {[num_queries, num_sequences]}: [queries, training sequences]")
    if not bool(np.isfinite(scores).all()):
        raise RequestError(f"{path} holds scores that are not finite")
    return scores.astype(np.float64)
