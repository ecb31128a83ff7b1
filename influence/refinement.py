"""Refined inverse-Hessian-vector products: (G + D)⁻¹∇f with the exact Gauss-Newton Hessian of training sequences, from the EK-FAC answer on.

G is the mean over a fixed set of training sequences, over all attributed parameters together; EK-FAC is the preconditioner. D is each layer's λ, or
the damping in the metric of the optimizer that trained the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from ekfac import LayerFactors, Solution, Vectors, conjugate_gradients, gauss_newton_product
from influence.attribution import AttributedModel, precondition
from influence.batches import BatchBudget, in_batches
from influence.errors import RequestError
from influence.sequences import TrainingSequence

TANGENT_TOKENS = {"cpu": 8192, "cuda": 262_144}
"""How many tokens times queries one batch of a Gauss-Newton product takes: more gain nothing."""


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """How far an answer is refined."""

    sequences: int = 512  # training sequences whose mean G is
    steps: int = 6  # at most so many conjugate-gradient steps
    tolerance: float = 0.05  # a query whose relative residual is this small is done
    training_share: float = 1.0  # what part of the steps the models took that are asked about: the optimizer's damping is divided by it

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.steps < 1:
            raise RequestError(f"refinement needs at least one step and one sequence, not {self.steps} and {self.sequences}")
        if not 0 <= self.tolerance < 1:
            raise RequestError(f"the tolerance of the refinement must be at least 0 and below 1, not {self.tolerance}")
        assert 0 < self.training_share <= 1


def refine(
    attributed: AttributedModel,
    gradients: Mapping[str, Tensor],
    factors: Mapping[str, LayerFactors],
    damping: Mapping[str, Tensor | float],
    sequences: Sequence[TrainingSequence],
    options: RefineOptions,
    progress: Callable[[int, int], None],
) -> Solution:
    """Solves (G + D) x = ∇f for all queries together; `gradients` are [Q, O, J] and D a number or [O, J] for each layer.

    A step costs about 4/3 Q + 1/3 times a plain forward and backward pass over `sequences`. `progress` is called with steps done and steps allowed,
    after each batch of a step, while the model is free for other work.
    """
    steps_done = 0

    def report(step: int) -> None:
        nonlocal steps_done
        steps_done = step
        progress(step, options.steps)

    damped = {
        name: replace(factors[name], damping=factors[name].diagonal(d) if isinstance(d, Tensor) else d) for name, d in damping.items()
    }

    def product(vectors: Vectors) -> Vectors:
        total = {name: damping[name] * vector for name, vector in vectors.items()}
        budget = _with_tangents(attributed, len(next(iter(vectors.values()))))
        for _, batch in in_batches(sequences, budget, attributed.device):
            for name, part in gauss_newton_product(attributed.model, attributed.layers, batch, vectors).items():
                total[name] += part / len(sequences)
            report(steps_done)
        return total

    try:
        return conjugate_gradients(
            gradients,
            product,
            lambda vectors: precondition(vectors, damped),
            tolerance=options.tolerance,
            max_steps=options.steps,
            progress=lambda step, _: report(step),
        )
    except ValueError as error:
        raise RequestError(f"the refinement failed: {error}") from None


def _with_tangents(attributed: AttributedModel, num_queries: int) -> BatchBudget:
    """The batches of a Gauss-Newton product: every query has activations and logits of its own."""
    budget = attributed.budget
    return replace(
        budget,
        max_tokens=max(1, TANGENT_TOKENS[attributed.device.type] // num_queries),
        bytes_per_token=budget.bytes_per_token * (1 + num_queries),
        bytes_per_sequence=0,
    )


def summary(solution: Solution, query: int) -> dict[str, float]:
    """How many steps a query took and how far its residual fell."""
    residuals = solution.residuals[:, query].tolist()
    steps = sum(after != before for before, after in pairwise(residuals))
    return {"steps": steps, "relative_residual": residuals[-1]}
