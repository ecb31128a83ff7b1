"""The normal form of what a layer saw: its inputs and the gradients at its outputs.

Everything after capture is written once, for this form, in array operations that NumPy, torch and JAX share. This module
knows no framework and no model.

Shapes here and in the other modules of this package: N sequences, T positions, I inputs of a layer (without the bias), J = I, or
I + 1 with a bias, O outputs, Q queries.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of NumPy, torch or JAX; all arrays of one call come from the same library and device."""


@dataclass(frozen=True, kw_only=True)
class LayerIO:
    """One layer's record for a batch of sequences.

    The gradient of sequence n's loss with respect to the weight and bias, as one [O, J] matrix, is the sum over positions of
    `output_gradient ⊗ (activation, 1)`. Positions that the loss does not reach have an output gradient of zero.
    """

    activations: Array  # [N, T, I]
    output_gradients: Array  # [N, T, O]: derivative of the loss with respect to a zero probe added to the output
    mask: Array  # [N, T] bool: the positions that the loss reaches; covariances count these only
    bias: bool  # whether the layer has a bias: a further input that is always one


def apply_to_inputs(record: LayerIO, matrix: Array) -> Array:
    """(activation, 1) @ matrix for every position: [N, T, K] from a matrix [J, K], or [Q, N, T, K] from [Q, 1, J, K].

    Equals appending a column of ones to the activations when the layer has a bias, without copying them.
    """
    if not record.bias:
        return record.activations @ matrix
    return record.activations @ matrix[..., :-1, :] + matrix[..., -1:, :]


def sequence_gradients(record: LayerIO) -> Array:
    """Each sequence's exact gradient [N, O, J], summed over its positions. Costs N·T·O·I multiplications."""
    xp = array_api_compat.array_namespace(record.activations)
    gradients = xp.matmul(xp.matrix_transpose(record.output_gradients), record.activations)
    if not record.bias:
        return gradients
    return xp.concat([gradients, xp.sum(record.output_gradients, axis=1)[:, :, None]], axis=2)


def inner_products(record: LayerIO, vectors: Array) -> Array:
    """⟨vector q, gradient of sequence n⟩ for vectors [Q, O, J]: an array [Q, N]."""
    xp = array_api_compat.array_namespace(vectors)
    gradients = sequence_gradients(record)
    return xp.reshape(vectors, (vectors.shape[0], -1)) @ xp.reshape(gradients, (gradients.shape[0], -1)).T


def position_inner_products(record: LayerIO, vector: Array) -> Array:
    """⟨vector, this position's share of the gradient⟩ for one vector [O, J]: an array [N, T] whose row sums are `inner_products`."""
    xp = array_api_compat.array_namespace(vector)
    return xp.sum(record.output_gradients * apply_to_inputs(record, xp.matrix_transpose(vector)), axis=-1)
