"""EK-FAC scores for several dampings from one pass over the training sequences: in the eigenbasis a damping only changes what is divided by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import Damping, LayerFactors
from influence.answering import check_alike
from influence.attribution import AttributedModel, Part, query_gradients
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.run import Run
from influence.solving import Progress, in_groups

_Pair = tuple[float, Measurement]


def check_dampings(dampings: Sequence[float]) -> None:
    """Raises RequestError for one that is not a number above 0."""
    for damping in dampings:
        if not 0 < damping < float("inf"):
            raise RequestError(
                f"--damping: a damping is a number above 0, relative to each layer's mean corrected eigenvalue, not {damping}"
            )


def scores_by_damping(
    dampings: Sequence[float], runs: Sequence[Run], measurements: Sequence[Measurement], progress: Progress
) -> dict[float, NDArray[np.float64]]:
    """[Q, N] for each damping, relative to each layer's mean corrected eigenvalue: exact EK-FAC scores, averaged over the runs.

    All dampings share the gradients of queries and of training sequences, as many of them at a time as have vectors that fit into memory.
    """
    check_alike(runs)
    pairs = [(damping, measurement) for damping in dict.fromkeys(dampings) for measurement in measurements]
    tables = [_table(run, pairs, progress) for run in runs]
    scores = np.mean(tables, axis=0).reshape(-1, len(measurements), len(runs[0].store))
    return dict(zip(dict.fromkeys(dampings), scores, strict=True))


def _table(run: Run, pairs: Sequence[_Pair], progress: Progress) -> NDArray[np.float64]:
    groups = in_groups(pairs, run, None)
    return np.concatenate([run.exact_scores(_Solved(run=run, pairs=group), len(group), progress) for group in groups])


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """(G + λI)⁻¹∇f of each pair's measurement at its damping, made for each part of the layers when it is reached."""

    run: Run
    pairs: Sequence[_Pair]

    def __len__(self) -> int:
        return len(self.run.parts())

    def __iter__(self) -> Iterator[Part]:
        for part in self.run.parts():
            yield part, self._solve(part, self.run.factors_of(part).factors)

    def _solve(self, part: AttributedModel, factors: dict[str, LayerFactors]) -> dict[str, torch.Tensor]:
        asked = list({id(measurement): measurement for _, measurement in self.pairs}.values())
        places = {id(measurement): place for place, measurement in enumerate(asked)}
        gradients = query_gradients(part, asked, factors).gradients
        solved = {}
        for name in list(gradients):
            rotated, factor = gradients.pop(name), factors[name]
            dampings = {damping: Damping(value=damping).of(factor.eigenvalues.double()) for damping, _ in self.pairs}
            solved[name] = torch.stack(
                [replace(factor, damping=dampings[damping]).solve(rotated[places[id(measurement)]]) for damping, measurement in self.pairs]
            )
        return solved
