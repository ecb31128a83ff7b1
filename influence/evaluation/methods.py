"""Scores of every training sequence for every query, by the methods that an evaluation compares, or from a file."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from influence.attribution import gradient_norms, precondition, query_gradients
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.run import Run

METHODS = ("ekfac", "gradient-cosine", "gradient-dot", "bm25")

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


def scores_by(method: str, run: Run, measurements: Sequence[Measurement], progress: Progress) -> NDArray[np.float64]:
    """[Q, N]: positive where training on the sequence is said to raise the measurement; up to a positive factor of each query.

    Works through as many queries at a time as have gradients that fit into a quarter of the memory budget.
    """
    check_method(method)
    if method == "bm25":
        return np.stack([run.lexical.scores(f"{m.prompt}{m.completion}", len(run.store)) for m in measurements])
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in run.attributed.layers)
    at_once = max(1, run.memory_budget // 4 // (8 * parameters))
    groups = [measurements[first : first + at_once] for first in range(0, len(measurements), at_once)]
    scores = np.concatenate([_gradient_scores(method, run, group, progress) for group in groups])
    return scores / _norms(run) if method == "gradient-cosine" else scores


def check_method(method: str) -> None:
    """Raises RequestError for a method that is not one of METHODS."""
    if method not in METHODS:
        raise RequestError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")


def _gradient_scores(method: str, run: Run, measurements: Sequence[Measurement], progress: Progress) -> NDArray[np.float64]:
    gradients = query_gradients(run.attributed, measurements).gradients
    if method == "ekfac":
        return run.exact_scores(precondition(gradients, run.factors), progress=progress)
    return run.exact_scores(gradients, progress=progress)  # the query's own norm makes no difference to a ranking of sequences


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
