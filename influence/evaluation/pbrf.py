"""The proximal Bregman response function, solved directly, and how well scores predict it (Grosse et al. 2023, section 2.1.1 and appendix C).

One more copy of a sequence z in a training set of N moves the parameters of the attributed layers to the minimum of

    mean over sequences of w KL(p ‖ p_θ) + ½ Σ D (θ - θ₀)² + (1/N) w L(z, θ),

p being the model's own predictions at θ₀ (for a softmax the Bregman divergence of the cross-entropy is this KL divergence), D the damping,
and w the sequences' weights. What that does to a query is what a score predicts. Values to values, in float64; knows nothing of files.
Legend: Q queries, C copied sequences.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from ekfac import Layer, LayerFactors, SequenceBatch, as_parameters, at_each_counted
from influence.batches import collate
from influence.evaluation.intervals import Estimate, central, resamples
from influence.evaluation.lds import spearman
from influence.evaluation.retraining import query_losses
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

BATCH_SIZE = 64
MOST_STEPS, STEPS_AT_ONCE = 100, 10
TOLERANCE = 1e-3
"""The gradient, in coordinates whitened by EK-FAC, falls to this share of what it is at the start."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The objective but for the copied sequence."""

    model: nn.Module  # at θ₀, in float64
    layers: tuple[Layer, ...]
    factors: Mapping[str, LayerFactors]  # in float64; they choose the coordinates of the search, not its end
    damping: Mapping[str, Tensor | float]  # D by layer name, [O, J] or one number
    sequences: Sequence[TrainingSequence]  # of the mean divergence
    num_training: int  # N


@dataclass(frozen=True, kw_only=True)
class Response:
    """Where one more copy leads."""

    changes: NDArray[np.float64]  # [Q]: of each measurement, in nats
    residual: float  # the gradient's norm at the end, relative to that at the start


def in_float64(
    model: nn.Module,
    layers: Sequence[Layer],
    factors: Mapping[str, LayerFactors],
    damping: Mapping[str, Tensor | float],
    sequences: Sequence[TrainingSequence],
    num_training: int,
) -> Problem:
    """The problem of a copy of the model, whose own dtype does not matter."""

    def double(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    return Problem(
        model=copy.deepcopy(model).double().requires_grad_(False).eval(),
        layers=tuple(layers),
        factors={
            name: replace(
                one,
                input_vectors=double(one.input_vectors),
                output_vectors=double(one.output_vectors),
                eigenvalues=one.eigenvalues.double(),
            )
            for name, one in factors.items()
        },
        damping={name: d.double() if isinstance(d, Tensor) else d for name, d in damping.items()},
        sequences=sequences,
        num_training=num_training,
    )


def response(problem: Problem, copied: TrainingSequence, measurements: Sequence[Measurement], most_steps: int = MOST_STEPS) -> Response:
    """Minimises the objective by L-BFGS from θ₀. A step takes a forward and backward pass over the sequences, and a forward pass of the start.

    Raises RequestError when a query's loss is not finite there.
    """
    device = next(problem.model.parameters()).device
    places = {layer.name: torch.zeros(layer.shape, dtype=torch.float64, device=device, requires_grad=True) for layer in problem.layers}
    optimizer = torch.optim.LBFGS(
        list(places.values()), max_iter=STEPS_AT_ONCE, tolerance_grad=0, tolerance_change=0, history_size=30, line_search_fn="strong_wolfe"
    )
    norms: list[float] = []

    def objective() -> float:
        optimizer.zero_grad()
        value = _with_gradients(problem, copied, places)
        norms.append(float(torch.stack([u.grad.norm() for u in places.values() if u.grad is not None]).norm()))
        return value

    for _ in range(-(-most_steps // STEPS_AT_ONCE)):
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        if norms[-1] <= TOLERANCE * norms[0]:
            break
    moved = copy.deepcopy(problem.model)
    with torch.no_grad():
        for name, step in as_parameters(moved, problem.layers, _moves(problem, places)).items():
            moved.get_parameter(name).add_(step)
    before, after = (query_losses(model, measurements, BATCH_SIZE) for model in (problem.model, moved))
    return Response(changes=before - after, residual=norms[-1] / norms[0] if norms[0] else 0.0)


def _moves(problem: Problem, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ - θ₀ by layer, [O, J], from coordinates in which (G + λI) of EK-FAC is the identity."""
    return {name: problem.factors[name].unrotate(u * problem.factors[name].inverse() ** 0.5) for name, u in places.items()}


def _with_gradients(problem: Problem, copied: TrainingSequence, places: Mapping[str, Tensor]) -> float:
    """The objective, of which the gradients are left in the coordinates. Batch by batch, so that one batch's activations are in memory."""
    moves, device = _moves(problem, places), next(problem.model.parameters()).device
    cut = {name: move.detach().requires_grad_(True) for name, move in moves.items()}
    parameters = {
        name: problem.model.get_parameter(name) + step for name, step in as_parameters(problem.model, problem.layers, cut).items()
    }

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(problem.sequences), BATCH_SIZE):
            batch = collate(problem.sequences[first : first + BATCH_SIZE], device)
            with torch.no_grad():
                before = _log_predictions(problem.model, {}, batch)
            now = _log_predictions(problem.model, parameters, batch)
            yield _weighted((before.exp() * (before - now)).sum(1), batch) / len(problem.sequences)
        batch = collate([copied], device)
        now = _log_predictions(problem.model, parameters, batch)
        yield -_weighted(now.gather(1, batch.tokens[batch.counted][:, None])[:, 0], batch) / problem.num_training
        yield torch.stack([(problem.damping[name] / 2 * move.square()).sum() for name, move in cut.items()]).sum()

    value = 0.0
    for part in parts():
        part.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # the sum of θ₀ and the step is of all parts
        value += float(part.detach())
    torch.autograd.backward(list(moves.values()), [move.grad for move in cut.values()])
    return value


def _log_predictions(model: nn.Module, parameters: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
    """[M, V]: the log-probabilities of every token where a counted one is predicted."""
    output = functional_call(model, dict(parameters), kwargs=batch.inputs)
    predicted: Tensor = output.logits[:, :-1][batch.counted[:, 1:]]
    return predicted.log_softmax(-1)


def _weighted(values: Tensor, batch: SequenceBatch) -> Tensor:
    """The sum over counted tokens of values [M], each times its sequence's weight."""
    return (values if batch.weights is None else values * at_each_counted(batch.weights, batch).to(values)).sum()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How one method's scores agree with the responses: means over queries, and intervals over copied sequences."""

    correlation: Estimate  # Pearson's
    rank_correlation: Estimate
    slope: float  # how many times as large as its score a change was: least squares through zero over everything


def agreement(scores: NDArray[np.float64], changes: NDArray[np.float64]) -> Agreement:
    """Of scores and changes [Q, C], in nats both; the same resamples for every method, so that they can be compared."""
    drawn = resamples(scores.shape[1])
    found = []
    for correlation in (pearson, spearman):
        values = np.array([correlation(scores[:, some], changes[:, some]).mean() for some in drawn])
        found.append(Estimate(value=float(correlation(scores, changes).mean()), interval=central(values)))
    return Agreement(correlation=found[0], rank_correlation=found[1], slope=float((scores * changes).sum() / (scores**2).sum()))


def pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The correlation along the last axis; 0 where one side is constant."""
    left, right = left - left.mean(-1, keepdims=True), right - right.mean(-1, keepdims=True)
    scale = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    return np.asarray(np.divide((left * right).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0))


def chosen(scores: NDArray[np.float64], order: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """[C]: the numbers of the sequences to copy: half of them of the largest influence on the queries, either way, the others as `order` has them.

    `scores` are [Q, N]; each query counts alike.
    """
    scale = np.abs(scores).max(1, keepdims=True)
    largest = np.argsort(-(np.abs(scores) / np.where(scale > 0, scale, 1)).max(0), kind="stable")[: num // 2]
    others = [number for number in order.tolist() if number not in set(largest.tolist())]
    return np.sort(np.concatenate([largest, np.array(others[: num - len(largest)], dtype=np.int64)]))
