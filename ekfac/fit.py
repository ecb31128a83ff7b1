"""Fitting EK-FAC factors to a model, of torch or another `Backend`: two passes over batches, with a decomposition between them.

Each pass returns partial sums, so that passes over parts of the data merge with `+`. `fit` is the whole of it for a model and data that one
process can hold; it needs no files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ekfac.capture import capture
from ekfac.kronecker import (
    Covariance,
    Damping,
    Eigenbasis,
    EigenvalueSum,
    LayerFactors,
    eigenbasis,
    eigenvalue_sum,
    feature_covariance,
    input_covariance,
    layer_factors,
    output_covariance,
)
from ekfac.language import Loss, SequenceBatch, drawn_label_loss, sequence_weights
from ekfac.layers import Coverage, Layer, attributable_layers
from ekfac.projections import Split
from ekfac.record import EmbeddingIO, GroupedIO, LayerIO, Record

Mask = Callable[[Any], Tensor]
"""batch → [N, T] bool, the positions that the loss reaches, or [N] bool, the sequences."""

Weights = Callable[[Any], Tensor | None]
"""batch → [N]: how much each sequence counts; None where all count alike."""


class _Sum(Protocol):
    def __add__(self, other: Any) -> Any: ...


S = TypeVar("S", bound=_Sum)
B = TypeVar("B")


def merge(left: Mapping[str, S], right: Mapping[str, S]) -> dict[str, S]:
    """The sum of two passes' partial sums, name by name."""
    return {**left, **{name: left[name] + part if name in left else part for name, part in right.items()}}


def reached_positions(batch: SequenceBatch) -> Tensor:
    """The mask of language-model batches."""
    return batch.reached


def no_weights(_: Any) -> None:
    """Every sequence counts alike."""


def covariance_pass(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any], loss: Loss, mask: Mask, weights: Weights = no_weights
) -> dict[str, Covariance]:
    """The covariances of the layers' inputs and output gradients over the batches, by `Layer.input_name` and `output_name`.

    Inputs count by their sequences' `weights`; of output gradients, `loss` sees to it.
    """
    totals: dict[str, Covariance] = {}

    def consume(layer: Layer, record: Record, own: Tensor | None) -> None:
        inputs, outputs = str(layer.input_name), str(layer.output_name)
        if isinstance(record, EmbeddingIO | GroupedIO):
            totals[inputs] = feature_covariance(record, totals.get(inputs))
        elif isinstance(record, LayerIO):
            if layer.name == (layer.output_group or layer.name):
                totals[outputs] = output_covariance(record, totals.get(outputs))
            if layer.name == layer.input_group:
                totals[inputs] = input_covariance(record, totals.get(inputs), own)

    needed = [layer for layer in layers if layer.input_name]
    for batch in batches:
        capture(model, needed, partial(loss, model, batch), mask(batch), partial(consume, own=weights(batch)))
    return totals


def eigenvalue_pass(
    model: nn.Module, layers: Sequence[Layer], bases: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss, mask: Mask
) -> dict[str, EigenvalueSum]:
    """The sums behind the corrected eigenvalues, by layer name; `bases` are the eigenvectors by `Layer.input_name` and `output_name`."""
    totals: dict[str, EigenvalueSum] = {}

    def consume(layer: Layer, record: Record) -> None:
        vectors = of(bases, layer.input_name), of(bases, layer.output_name)
        totals[layer.name] = eigenvalue_sum(record, *vectors, layer.shape, totals.get(layer.name))

    for batch in batches:
        capture(model, layers, partial(loss, model, batch), mask(batch), consume)
    return totals


def of(bases: Mapping[str, B], name: str | None) -> B | None:
    """The basis of this name; None, which stands for the identity, for a side without one."""
    return None if name is None else bases[name]


def assemble(
    layers: Sequence[Layer],
    bases: Mapping[str, Eigenbasis],
    eigenvalues: Mapping[str, EigenvalueSum],
    damping: Damping,
    dtype: str = "float32",
) -> dict[str, LayerFactors]:
    """Each layer's factors, by layer name."""
    return {
        layer.name: layer_factors(of(bases, layer.input_name), of(bases, layer.output_name), eigenvalues[layer.name], damping, dtype)
        for layer in layers
    }


def fit(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss: Loss | None = None,
    mask: Mask = reached_positions,
    layers: Sequence[str] = ("*",),
    split: Split = "none",
    damping: Damping | None = None,
    seed: int = 0,
) -> tuple[dict[str, LayerFactors], Coverage]:
    """EK-FAC factors by layer name, and what they cover. The batches are gone through twice.

    `loss(model, batch)` is the loss summed over tokens and sequences, `mask(batch)` [N, T] the positions it reaches, or [N] the sequences where
    layers see positions of several kinds, as in encoders (`capture` says what is counted then); left out, the batches are `SequenceBatch`es
    and labels are drawn from the model with `seed`. `layers` are glob patterns of module names, `split` says whether linear layers are split, as
    `attributable_layers` does, `damping` is 0.1 of each layer's mean corrected eigenvalue when left out. Factors have the dtype of the model, float32
    at least. Raises ValueError for a model without attributable layers and for values that are not finite.
    """
    weights: Weights = sequence_weights if loss is None else no_weights
    loss = loss or drawn_label_loss(seed)
    positions = tuple(mask(batches[0]).shape)
    coverage = attributable_layers(model, lambda model: loss(model, batches[0]), layers, positions=positions, split=split)
    covariances = covariance_pass(model, coverage.layers, batches, loss, mask, weights)
    if covariances and not any(int(covariance.num_positions) for covariance in covariances.values()):
        raise ValueError("the loss reaches no position of the batches: no token is counted")
    dtype = "float64" if next(model.parameters()).dtype == torch.float64 else "float32"
    bases = {name: eigenbasis(covariance, dtype) for name, covariance in covariances.items()}
    vectors = {name: basis.vectors for name, basis in bases.items()}
    eigenvalues = eigenvalue_pass(model, coverage.layers, vectors, batches, loss, mask)
    return assemble(coverage.layers, bases, eigenvalues, damping or Damping(value=0.1), dtype), coverage
