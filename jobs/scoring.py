"""Scores of methods and of files, with a progress bar for each scan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from influence.evaluation.methods import tables_by
from influence.measurement import Measurement
from influence.refinement import RefineOptions
from influence.run import Run
from influence.solving import Progress
from jobs.answers import Asked
from jobs.progress import bar

Tables = dict[str, NDArray[np.float64]]
"""Method → scores [queries, training sequences]."""


def score_tables(
    run: Run, methods: Sequence[str], asked: Asked, refine: RefineOptions, external: Mapping[str, NDArray[np.float64]]
) -> Tables:
    """The scores of all methods, the external ones last."""
    measurements: list[Measurement] = [measurement for _, measurement in asked]
    return {**tables_by(methods, run, measurements, refine, _watch), **external}


@contextmanager
def _watch(title: str) -> Iterator[Progress]:
    with bar(title) as progress:
        yield progress.advance
