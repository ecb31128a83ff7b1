"""Influence of training sequences on measurements: gradients of queries, exact EK-FAC scores, and their split by layer and by token.

A score is (1/N) ∇ℓ_qᵀ (G + λI)⁻¹ ∇L(z) with ℓ_q = minus the measurement: the change of the measurement, in nats, that one more copy of z in a
training set of N sequences is predicted to make. Positive: training on z helped. The functions here leave out the division by N.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekfac import (
    Layer,
    LayerFactors,
    Record,
    SequenceBatch,
    capture,
    gradient_blocks,
    inner_products,
    losses_by,
    position_inner_products,
    token_loss_derivatives,
    token_losses,
    true_label_loss,
    weighted,
)
from influence.batches import BatchBudget, in_batches
from influence.errors import RequestError
from influence.measurement import MeasuredFunction, Measurement
from influence.sequences import TrainingSequence


@dataclass(frozen=True, kw_only=True)
class AttributedModel:
    """A model with the layers that are attributed, its device, and what a batch may hold."""

    model: nn.Module
    layers: tuple[Layer, ...]
    budget: BatchBudget
    device: torch.device


Vectors = Mapping[str, Tensor]
"""Layer name → [Q, O, J]: a vector over the parameters of some layers for each query."""

Part = tuple[AttributedModel, Vectors]
"""Some of the layers, and vectors over their parameters."""


class Parts(Protocol):
    """The parts that scores are sums over, of all layers together; each may be made when it is reached."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Part]: ...


@dataclass(frozen=True, kw_only=True)
class QueryGradients:
    """What a capture pass over queries gives."""

    gradients: dict[str, Tensor]  # layer name → [Q, O, J]: of minus the measurement; in the eigenbasis if factors were given
    log_probabilities: list[list[NDArray[np.float64]]]  # query → part → [T]: of each counted token, zero at the others


@dataclass(frozen=True, kw_only=True)
class SequenceScores:
    """Exact scores of some sequences for one query; row sums of `layers` and sums of `tokens` are the scores."""

    layers: NDArray[np.float64]  # [K, L]
    tokens: list[NDArray[np.float64]]  # K arrays [T]: the share of each position, where that token is the input; or of each predicted token

    def times(self, weights: NDArray[np.float64]) -> "SequenceScores":
        """Each sequence's scores times its weight, [K]."""
        return SequenceScores(layers=self.layers * weights[:, None], tokens=[t * w for t, w in zip(self.tokens, weights, strict=True)])

    @property
    def totals(self) -> NDArray[np.float64]:
        return np.asarray(self.layers.sum(1))


def joined(parts: Sequence[SequenceScores]) -> SequenceScores:
    """The scores of the same sequences by all the layers, from those by groups of them."""
    return SequenceScores(
        layers=np.concatenate([part.layers for part in parts], axis=1),
        tokens=[np.sum(shares, axis=0) for shares in zip(*(part.tokens for part in parts), strict=True)],
    )


def mean_scores(scores: Sequence[SequenceScores]) -> SequenceScores:
    """The average of several models' scores of the same sequences for the same query."""
    layers = np.mean([one.layers for one in scores], axis=0)
    return SequenceScores(layers=layers, tokens=[np.mean(shares, axis=0) for shares in zip(*(one.tokens for one in scores), strict=True)])


def query_gradients(
    attributed: AttributedModel, measurements: Sequence[Measurement], factors: Mapping[str, LayerFactors] | None = None
) -> QueryGradients:
    """The gradients of the measurements in the layers, in the eigenbasis of the factors when these are given. Costs a capture pass over the queries.

    Rotating the tokens of a query on the way costs less than rotating its gradient afterwards, unless it is very long.
    """
    device = attributed.device
    owners = torch.tensor([query for query, measurement in enumerate(measurements) for _ in measurement.parts], device=device)
    weights = torch.tensor([weight for measurement in measurements for weight, _ in measurement.parts], dtype=torch.float64, device=device)
    sequences = [sequence for measurement in measurements for _, sequence in measurement.parts]
    functions = [measurement.function for measurement in measurements for _ in measurement.parts]
    gradients: dict[str, Tensor] = {}
    log_probabilities: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
    for function in dict.fromkeys(functions):  # a batch measures one thing
        own = np.array([place for place, other in enumerate(functions) if other is function])
        for places, batch in in_batches([sequences[place] for place in own], attributed.budget, device):
            members = own[places]
            chosen = torch.from_numpy(members).to(device)
            losses = _add_gradients(attributed, batch, function, factors, owners[chosen], weights[chosen], len(measurements), gradients)
            for member, row in zip(members, losses, strict=True):
                log_probabilities[member] = -row[: len(sequences[member].tokens)]
    parts = iter(log_probabilities)
    return QueryGradients(gradients=gradients, log_probabilities=[[next(parts) for _ in m.parts] for m in measurements])


def _add_gradients(
    attributed: AttributedModel,
    batch: SequenceBatch,
    function: MeasuredFunction | None,
    factors: Mapping[str, LayerFactors] | None,
    owners: Tensor,
    weights: Tensor,
    num_queries: int,
    gradients: dict[str, Tensor],
) -> NDArray[np.float64]:
    """Adds each sequence's weighted gradient to its query's; returns the token losses [N, T]."""
    losses: list[Tensor] = []

    def loss() -> Tensor:
        if function is None:
            losses.append(token_losses(attributed.model, batch))
            return losses[0].sum()
        values, logits = _values(attributed.model, batch, function)
        losses.append(losses_by(logits.detach(), batch))
        return (0 * logits).sum() - values.sum()  # layers that the function does not use have a gradient too, of zero

    def consume(layer: Layer, record: Record) -> None:
        vectors = (factors[layer.name].input_vectors, factors[layer.name].output_vectors) if factors else (None, None)
        for rows, block in gradient_blocks(record, *vectors):
            if layer.name not in gradients:
                gradients[layer.name] = block.new_zeros((num_queries, *layer.shape))
            weighted, to = block * weights.to(block)[:, None, None], owners.to(block.device)
            if isinstance(rows, slice):
                gradients[layer.name][:, rows].index_add_(0, to, weighted)
            else:
                gradients[layer.name][:, rows] += block.new_zeros((num_queries, *block.shape[1:])).index_add_(0, to, weighted)

    reached = batch.reached if function is None else torch.ones_like(batch.counted)
    capture(attributed.model, attributed.layers, loss, reached, consume)
    return np.asarray(losses[0].detach().double().cpu().numpy())


def _values(model: nn.Module, batch: SequenceBatch, function: MeasuredFunction) -> tuple[Tensor, Tensor]:
    """The function's values [N], and the logits of the forward pass that it made. Raises RequestError for values of another form."""
    logits: list[Tensor] = []
    handle = model.register_forward_hook(lambda _module, _arguments, output: logits.append(output.logits))
    try:
        values = function.values(model, batch)
    finally:
        handle.remove()
    called, expected = f"the function {function.facts.get('function', function.unit)}", f"a tensor of shape ({len(batch.tokens)},)"
    if len(logits) != 1:
        raise RequestError(f"{called} called the model {len(logits)} times: it must call model(input_ids=batch.tokens) once")
    if not isinstance(values, Tensor) or values.shape != (len(batch.tokens),):
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RequestError(f"{called} gave {given}, expected {expected}: one number for each sequence of the batch")
    if torch.is_grad_enabled() and not values.requires_grad:
        raise RequestError(f"{called} gave values that do not depend on the model's layers: they have no gradient")
    return values, logits[0]


@torch.no_grad()
def function_values(attributed: AttributedModel, measurement: Measurement) -> list[float] | None:
    """The value of the measurement's function for each part; None where log-probabilities are measured. Costs a forward pass."""
    function = measurement.function
    if function is None:
        return None
    found = [0.0] * len(measurement.parts)
    for members, batch in in_batches([sequence for _, sequence in measurement.parts], attributed.budget, attributed.device):
        for member, value in zip(members, _values(attributed.model, batch, function)[0].double().cpu().numpy(), strict=True):
            found[member] = float(value)
    return found


SOLVED_NUMBERS = 2**20
"""So many numbers of queries' vectors are solved at once, or one query's: what caches hold, and enough to keep a GPU busy."""


def solve(rotated: dict[str, Tensor], factors: Mapping[str, LayerFactors]) -> dict[str, Tensor]:
    """(G + λI)⁻¹ of each query's gradient, layer by layer, from gradients in the eigenbasis, in whose place they stand afterwards."""
    for name, gradients in rotated.items():
        factor, inverse = factors[name], factors[name].inverse()
        for some in torch.split(gradients, max(1, SOLVED_NUMBERS // inverse.numel())):
            some.copy_(factor.unrotate(some * inverse))
    return rotated


def precondition(gradients: Mapping[str, Tensor], factors: Mapping[str, LayerFactors]) -> dict[str, Tensor]:
    """(G + λI)⁻¹ of each query's gradient, layer by layer."""
    return {name: factors[name].precondition(gradient) for name, gradient in gradients.items()}


def score_sequences(
    attributed: AttributedModel, preconditioned: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
) -> SequenceScores:
    """Exact EK-FAC scores of `sequences` for one query's preconditioned gradient [O, J] per layer, by recomputing their gradients."""
    by_layer = np.zeros((len(sequences), len(attributed.layers)))
    by_token: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        columns, tokens, _ = score_batch(attributed, preconditioned, batch)
        by_layer[members] = columns
        for member, row in zip(members, tokens, strict=True):
            by_token[member] = row[: len(sequences[member].tokens)]
    return SequenceScores(layers=by_layer, tokens=by_token)


def score_batch(
    attributed: AttributedModel, preconditioned: Mapping[str, Tensor], batch: SequenceBatch
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Exact scores of a batch for one query's preconditioned gradient, by layer [N, L] and by token [N, T], and the token losses [N, T]."""
    columns: dict[str, Tensor] = {}
    tokens = torch.zeros(batch.tokens.shape, dtype=torch.float64, device=attributed.device)
    losses: list[Tensor] = []

    def loss() -> Tensor:
        losses.append(token_losses(attributed.model, batch))
        return weighted(losses[0], batch).sum()

    def consume(layer: Layer, record: Record) -> None:
        shares = position_inner_products(record, preconditioned[layer.name]).double().to(tokens.device)
        tokens.add_(shares)
        columns[layer.name] = shares.sum(1)

    capture(attributed.model, attributed.layers, loss, batch.reached, consume)
    by_layer = torch.stack([columns[layer.name] for layer in attributed.layers], 1)
    return by_layer.cpu().numpy(), tokens.cpu().numpy(), losses[0].detach().double().cpu().numpy()


def by_output_token(
    attributed: AttributedModel, preconditioned: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
) -> SequenceScores:
    """`score_sequences` with each token's share that of its own loss: what learning to predict it did. Exact, and as cheap as two forward passes."""
    scores, shares = score_sequences(attributed, preconditioned, sequences), [np.empty(0)] * len(sequences)
    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        found = token_loss_derivatives(attributed.model, attributed.layers, batch, preconditioned).double().cpu().numpy()
        for member, row in zip(members, found, strict=True):
            shares[member] = row[: len(sequences[member].tokens)]
    return replace(scores, tokens=shares)


def scan(
    attributed: AttributedModel,
    vectors: Vectors,
    sequences: Sequence[TrainingSequence],
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float64]:
    """⟨vector q, gradient of sequence n⟩ summed over layers, [Q, N], for vectors [Q, O, J] per layer: exact, without the index.

    With preconditioned queries these are the EK-FAC scores; with plain gradients, the dot products of the gradients. `progress` is called after
    each batch with how many sequences are done; the model is free for other work meanwhile.
    """
    scores, done = np.zeros((len(next(iter(vectors.values()))), len(sequences))), 0
    budget = attributed.budget.beside(len(scores), attributed.layers)
    for members, batch in in_batches(sequences, budget, attributed.device):
        products = _sum_over_layers(attributed, batch, lambda layer, record: inner_products(record, vectors[layer.name]))
        scores[:, members] = products.cpu().numpy()
        done += len(members)
        progress(done)
    return scores


def scan_parts(parts: Parts, sequences: Sequence[TrainingSequence]) -> NDArray[np.float64]:
    """`scan` by all layers, [Q, N]: a pass over the sequences for each part of them."""
    by_part = [scan(attributed, vectors, sequences) for attributed, vectors in parts]
    return np.asarray(np.sum(by_part, axis=0))


def gradient_norms(attributed: AttributedModel, sequences: Sequence[TrainingSequence]) -> NDArray[np.float64]:
    """The Euclidean norm of each sequence's gradient over the layers, [N]."""
    squares = np.zeros(len(sequences))
    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        found = _sum_over_layers(attributed, batch, lambda _, record: _squared_norms(record))
        squares[members] = found.cpu().numpy()
    return np.asarray(np.sqrt(squares))


def _squared_norms(record: Record) -> Tensor:
    return torch.stack([block.square().sum((1, 2)) for _, block in gradient_blocks(record)]).sum(0)


def _sum_over_layers(attributed: AttributedModel, batch: SequenceBatch, of: Callable[[Layer, Record], Tensor]) -> Tensor:
    """Σ over layers of `of(layer, record)` for the true labels of a batch, in float64."""
    parts: list[Tensor] = []

    def consume(layer: Layer, record: Record) -> None:
        part = of(layer, record).double().to(batch.tokens.device)
        parts[:] = [part + parts[0]] if parts else [part]

    capture(attributed.model, attributed.layers, partial(true_label_loss, attributed.model, batch), batch.reached, consume)
    return parts[0]
