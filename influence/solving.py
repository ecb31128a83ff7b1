"""(G + λI)⁻¹∇f of queries: by EK-FAC, some of the layers at a time where the factors of all do not fit into memory, or refined.

Knows runs and measurements; nothing of candidates, results or options other than the refinement's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import Solution
from indexing import query_rows
from influence.attribution import AttributedModel, Part, Parts, query_gradients, solve
from influence.batches import queries_at_once
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.refinement import RefineOptions, refine

if TYPE_CHECKING:
    from influence.run import Run

Progress = Callable[[int, int], None]
"""Called with (units of work done, units in all)."""


def ignore(done: int, total: int) -> None:
    """The progress that nobody watches."""


T = TypeVar("T")


def within_memory(runs: Sequence["Run"], work: Callable[[], T]) -> T:
    """`work()`, done again with batches half as large whenever a GPU has no memory left for them, as long as they hold more than one sequence."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            halved = [run.halve_batches() for run in runs]
            if not any(halved):
                raise
        torch.cuda.empty_cache()  # outside of the except clause, whose traceback holds on to tensors


@dataclass(frozen=True, kw_only=True)
class Solved:
    """(G + λI)⁻¹∇f of some queries, by EK-FAC or refined."""

    vectors: Parts  # [Q, O, J] by layer, for one part of the layers after the other
    rows: NDArray[np.float32] | None  # [Q, D], where they were wanted
    log_probabilities: list[list[NDArray[np.float64]]]
    refinement: Solution | None


@dataclass(frozen=True, kw_only=True)
class _ComputedAgain:
    """The vectors of parts that do not fit into memory together: each part's are computed whenever it is reached."""

    run: "Run"
    parts: Sequence[AttributedModel]
    measurements: Sequence[Measurement]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        for part in self.parts:
            factors = self.run.factors_of(part).factors
            yield part, solve(query_gradients(part, self.measurements, factors).gradients, factors)


def solved(
    run: "Run",
    attributed: AttributedModel,
    measurements: Sequence[Measurement],
    options: RefineOptions | None,
    progress: Progress = ignore,
    *,
    rows: bool = False,
) -> Solved:
    """(G + λI)⁻¹ of the queries' gradients by EK-FAC, or refined, with how that went; with their rows of the index where these are wanted."""
    if options is not None:
        return _refined(run, attributed, measurements, options, progress, rows=rows)
    parts = run.parts(attributed)
    made: list[NDArray[np.float32]] = []
    for part in parts if rows else parts[:1]:
        held = run.factors_of(part)
        found = query_gradients(part, measurements, held.factors)
        if rows:
            made.append(query_rows(found.gradients, run.features, held.spreaders))
    vectors: Parts = _ComputedAgain(run=run, parts=parts, measurements=measurements)
    if len(parts) == 1:
        vectors = [(parts[0], solve(found.gradients, held.factors))]
    return Solved(
        vectors=vectors,
        rows=np.asarray(sum(made), dtype=np.float32) if rows else None,
        log_probabilities=found.log_probabilities,
        refinement=None,
    )


def _refined(
    run: "Run", attributed: AttributedModel, measurements: Sequence[Measurement], options: RefineOptions, progress: Progress, *, rows: bool
) -> Solved:
    check_refinable(run)
    held = run.factors_of(attributed)
    order = run.hash_order(run.factors_config.seed)
    sequences = [run.training[int(number)] for number in np.sort(order[run.live[order]][: options.sequences])]
    if not sequences:
        raise RequestError(f"refine: every training sequence was removed from {run.directory}, and the exact Hessian is averaged over them")
    share = options.training_share if run.optimizer_state else 1.0
    damping = {layer.name: run.refining_damping[layer.name] / share for layer in attributed.layers}
    found = query_gradients(attributed, measurements)
    solution = refine(attributed, found.gradients, held.factors, damping, sequences, options, progress)
    made = None
    if rows:
        multiplied = {name: held.factors[name].multiply(vector) for name, vector in solution.vectors.items()}
        made = query_rows(multiplied, run.features, held.spreaders)
    return Solved(vectors=[(attributed, solution.vectors)], rows=made, log_probabilities=found.log_probabilities, refinement=solution)


def check_differentiable(run: "Run") -> None:
    """Raises RequestError when the model allows no derivatives along a vector over all layers: its numbers are too coarse, or on several devices."""
    if run.model_config.dtype in ("bfloat16", "float16"):
        raise RequestError(
            f"refinement and shares by output token need a run in float32 or float64, and {run.directory} is in {run.model_config.dtype}"
        )
    if run.language_model.is_divided:
        raise RequestError("refinement and shares by output token need the whole model on one device, and its layers lie on several")


def check_refinable(run: "Run") -> None:
    """Raises RequestError when answers of this run cannot be refined."""
    check_differentiable(run)
    if len(run.layer_groups) > 1:
        raise RequestError(
            f"refinement couples all layers, whose factors do not fit together into the memory budget of {run.memory_budget / 2**30:.1f} GiB: "
            "raise it (--memory-budget)"
        )


def check_movable(run: "Run") -> None:
    """Raises RequestError when the model's parameters cannot be moved and the model run again: those in few bits, or on several devices."""
    config = run.model_config
    found = f"quantized to {config.quantize}" if config.quantize else None
    if found is None and run.language_model.is_divided:
        found = "on several devices"
    if found is not None:
        raise RequestError(f"this moves a model's parameters and runs it again, and the model of {run.directory} is {found}")


def in_groups(measurements: Sequence[T], run: "Run", refine: RefineOptions | None) -> list[Sequence[T]]:
    """The measurements, or what else has one vector each, as many at a time as have vectors that fit into memory beside the model, the factors and
    a batch."""
    copies = 11 if refine else 1  # of a solver: solution, iterate, residual, direction, and products as parameters and as vectors
    at_once = min(queries_at_once(run.attributed.budget, group, copies) for group in run.layer_groups)
    return [measurements[first : first + at_once] for first in range(0, len(measurements), at_once)]
