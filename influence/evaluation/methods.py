"""Scores of every training sequence for every query, by the methods that an evaluation compares, or from a file."""

import zipfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
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

METHODS = ("ekfac", "ekfac-normalized", "refined", "index", "index-normalized", "gradient-cosine", "gradient-dot", "bm25")

Watch = Callable[[str], AbstractContextManager[Progress]]
"""A title → a context whose progress people see."""


def scores_by(
    method: str, runs: Sequence[Run], measurements: Sequence[Measurement], refine: RefineOptions, progress: Progress
) -> NDArray[np.float64]:
    """[Q, N]: positive where training on the sequence is said to raise the measurement; up to a positive factor of each query.

    `index` is what a query gets: exact scores of the index's candidates at both ends, its estimates of the others. What is normalized is divided by
    the root of each sequence's self-influence. Scores are averaged over the runs, but for those of `bm25`, which knows texts only.
    """
    check_method(method)
    check_alike(runs)
    first = runs[0]
    if method == "bm25":
        return np.stack([first.lexical.scores(f"{m.prompt}{m.completion}", len(first.store)) for m in measurements])
    groups = in_groups(measurements, first, refine if method == "refined" else None)
    by_run = [np.concatenate([_gradient_scores(method, run, group, refine, progress) for group in groups]) for run in runs]
    return np.asarray(np.mean(by_run, axis=0))


def tables_by(
    methods: Sequence[str], run: Run, measurements: Sequence[Measurement], refine: RefineOptions, watch: Watch
) -> dict[str, NDArray[np.float64]]:
    """Scores [Q, N] by each method, as `scores_by` gives them; those of EK-FAC, normalized or through the index, from one scan."""
    scanned = {method for method in methods if method.split("-")[0] in ("ekfac", "index")}
    found = {}
    if scanned:
        with watch("scanning all sequences with EK-FAC") as progress:
            groups = in_groups(measurements, run, None)
            by_group = [_scanned(scanned, run, group, progress) for group in groups]
        found = {method: np.concatenate([one[method] for one in by_group]) for method in scanned}
    for method in methods:
        if method not in found:
            with watch(f"scores by {method}") as progress:
                found[method] = scores_by(method, [run], measurements, refine, progress)
    return {method: found[method] for method in methods}


def _scanned(methods: Collection[str], run: Run, measurements: Sequence[Measurement], progress: Progress) -> dict[str, NDArray[np.float64]]:
    through = any(method.startswith("index") for method in methods)
    solution = solved(run, run.attributed, measurements, None, rows=through)
    exact, rows = run.exact_scores(solution.vectors, len(measurements), progress), solution.rows
    found = {}
    for method in methods:
        kind, _, normalized = method.partition("-")
        if kind == "ekfac":
            found[method] = exact * run.normalizing_weights if normalized else exact
        else:
            assert rows is not None
            candidates = answered_candidates(run, rows, bool(normalized))
            found[method] = through_the_index(run, rows, exact, candidates, bool(normalized))
    return found


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
    kind, _, normalized = method.partition("-")
    found = solved(run, run.attributed, measurements, refine if kind == "refined" else None, progress, rows=kind == "index")
    if kind == "index":
        return _through_the_index(run, found, bool(normalized))
    scores = run.exact_scores(found.vectors, len(measurements), progress)
    return scores * run.normalizing_weights if normalized else scores


def _through_the_index(run: Run, found: Solved, normalized: bool) -> NDArray[np.float64]:
    assert found.rows is not None
    candidates = answered_candidates(run, found.rows, normalized)
    union = np.flatnonzero(candidates.any(0))
    exact = np.zeros(candidates.shape)
    exact[:, union] = scan_parts(found.vectors, run.store.select(union.tolist()))
    return through_the_index(run, found.rows, exact, candidates, normalized)


def answered_candidates(run: Run, rows: NDArray[np.float32], normalized: bool) -> NDArray[np.bool_]:
    """[Q, N]: the sequences that an answer to each query scores exactly, at both ends of the ranking."""
    candidates = np.zeros((len(rows), len(run.store)), dtype=np.bool_)
    index, options = run.normalized_index if normalized else run.index, QueryOptions(normalize=normalized)
    for sign in (1.0, -1.0):
        for query, numbers in enumerate(index.search(np.float32(sign) * rows, num_candidates(run, options, sign < 0)).numbers):
            candidates[query, numbers] = True
    return candidates


def through_the_index(
    run: Run, rows: NDArray[np.float32], exact: NDArray[np.float64], candidates: NDArray[np.bool_], normalized: bool
) -> NDArray[np.float64]:
    """[Q, N]: the exact scores of the candidates, the index's estimates of the others, normalized or not."""
    scores = np.where(candidates, exact, row_scores(rows, run.rows, np.arange(len(run.store))))
    return scores * run.normalizing_weights if normalized else scores


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
