"""The normal form of what a layer saw: its inputs and the gradients at its outputs.

Everything after capture is written once, for this form, in array operations that NumPy, torch and JAX share. This module
knows no framework and no model. There are four kinds of layers, and whatever the kind, the gradient of one sequence is a matrix [O, J]:

    linear      weight and bias of a linear map: `LayerIO`
    embedding   a table with one row a token (or position), looked up, or multiplied by as the model's head, or both when these are tied:
                `EmbeddingIO`
    scale       the elementwise weight and bias of a normalisation: `ScaleIO`
    grouped     several linear maps of equal shape side by side, each with inputs and outputs of its own, as in a convolution with groups: `GroupedIO`

Shapes here and in the other modules of this package: N sequences, T positions, I inputs of a layer (without the bias), J = I, or
I + 1 with a bias, O outputs (rows of a table), Q queries.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import array_api_compat

Array: TypeAlias = Any
"""An array of NumPy, torch or JAX; all arrays of one call come from the same library and device."""

Rows: TypeAlias = Any
"""Which rows of [O, J] a block of gradients holds: a slice, or an array of different numbers."""

BLOCK_NUMBERS = 2**22
"""At most so many numbers of the gradients of a layer are in memory at once on a CPU, 16 MiB in float32, and sixteen times as many elsewhere.

Fresh arrays of 32 MiB and more are mapped and cleared by the operating system each time, which costs several times what computing them does.
"""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where in their sequences the T entries of a record stand, when these are not simply all positions in their order: those that were routed to
    an expert, or all positions twice when a module was called twice."""

    indices: Array  # [N, T] whole numbers below `count`
    count: int  # how many positions the sequences have


class SharedTokens:
    """One side's tokens, which the records of several layers have in common: rotated once for all of them."""

    def __init__(self, beside: int) -> None:
        self.beside = beside
        """How many numbers these layers have on the other side, all together."""
        self._rotated: tuple[Array, Array] | None = None  # the vectors, and the tokens rotated by them

    def rotated(self, vectors: Array, rotate: Callable[[], Array]) -> Array:
        """What `rotate` gives, kept until other vectors are asked for."""
        if self._rotated is None or self._rotated[0] is not vectors:
            self._rotated = vectors, rotate()
        return self._rotated[1]


@dataclass(frozen=True, kw_only=True)
class LayerIO:
    """A linear layer's record for a batch of sequences.

    The gradient of sequence n's loss with respect to the weight and bias, as one [O, J] matrix, is the sum over positions of
    `output_gradient ⊗ (activation, 1)`. Positions that the loss does not reach have an output gradient of zero. T may be zero: an expert that
    no token reached.
    """

    activations: Array  # [N, T, I]
    output_gradients: Array  # [N, T, O]: derivative of the loss with respect to a zero probe added to the output
    mask: Array  # [N, T] bool: the positions that the loss reaches; covariances count these only
    bias: bool  # whether the layer has a bias: a further input that is always one
    places: Places | None = None
    shared_inputs: SharedTokens | None = None  # where other layers have the very same activations
    shared_outputs: SharedTokens | None = None  # where other layers have the very same output gradients


@dataclass(frozen=True, kw_only=True)
class LookupIO:
    """Which row of a table was looked up where, and the derivative of the loss with respect to it."""

    indices: Array  # [N, T] whole numbers below the number of rows
    row_gradients: Array  # [N, T, I]
    mask: Array | None = None  # [N, T] bool, where it is not that of the head
    places: Places | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingIO:
    """The record of a table [O, I]: its lookup, its use as a head (a linear layer with the same weight), or both when these are tied.

    The gradient is the sum over positions of `one_hot(index) ⊗ row_gradient`, plus the gradient of the head.
    """

    lookup: LookupIO | None
    head: LayerIO | None
    mask: Array  # [N, T] bool
    num_rows: int  # O


@dataclass(frozen=True, kw_only=True)
class ScaleIO:
    """The record of an elementwise map `normalized · weight (+ bias)`; H is the number of places a position has that share the weights.

    The gradient [O, J] holds the weight's in its first column and the bias's in its second.
    """

    normalized: Array  # [N, T, H, O]
    output_gradients: Array  # [N, T, H, O]
    mask: Array  # [N, T] bool
    bias: bool
    places: Places | None = None


@dataclass(frozen=True, kw_only=True)
class GroupedIO:
    """The record of H linear maps side by side, each from inputs of its own to P outputs.

    The gradient [O = H·P, J] has the rows of one map after those of another; each is the sum over positions of `output_gradient ⊗ (activation, 1)`.
    """

    activations: Array  # [N, T, H, I]
    output_gradients: Array  # [N, T, H, P]
    mask: Array  # [N, T] bool
    bias: bool
    places: Places | None = None


Record: TypeAlias = LayerIO | EmbeddingIO | ScaleIO | GroupedIO

Linear = TypeVar("Linear", bound=LayerIO | GroupedIO)


def apply_to_inputs(record: LayerIO, matrix: Array) -> Array:
    """(activation, 1) @ matrix for every position: [N, T, K] from a matrix [J, K].

    Equals appending a column of ones to the activations when the layer has a bias, without copying them.
    """
    if not record.bias:
        return record.activations @ matrix
    products = aligned_product(record.activations, matrix[:-1, :])[..., : matrix.shape[1]]
    products += matrix[-1:, :]
    return products


ALIGNED = 16
"""Numbers that a row of a product is a multiple of, where it can be chosen."""


def aligned_product(left: Array, right: Array) -> Array:
    """left [.., I] @ right [I, K], and then as many columns of zeros as make rows a multiple of ALIGNED numbers long.

    To write rows of another length takes products a third more time, and with a bias J is odd. Only torch can be told where to write, and only what
    is not differentiated: elsewhere it is left @ right.
    """
    size = right.shape[1]
    if size % ALIGNED == 0 or not array_api_compat.is_torch_array(left) or left.requires_grad:
        return left @ right
    import torch

    wide = left.new_empty((*left.shape[:-1], size + -size % ALIGNED))
    wide[..., size:] = 0
    torch.mm(left.flatten(0, -2), right, out=wide.flatten(0, -2)[:, :size])
    return wide


def gradient_blocks(
    record: Record, input_vectors: Array | None = None, output_vectors: Array | None = None
) -> Iterator[tuple[Rows, Array]]:
    """Each sequence's exact gradient, summed over its positions, as (rows, [N, rows, J]); rows that are left out are zero.

    With vectors [J, J] and [O, O] it is rotated: output_vectorsᵀ G input_vectors; None stands for the identity. Gradients that are large come
    in several blocks, and of a mere lookup only the rows that occur, so that [N, O, J] is never in memory; the rows of a table cannot be
    rotated. Scales give one block. A block is new: whoever takes it may change it.
    """
    if isinstance(record, LayerIO):
        yield from _linear_blocks(record, input_vectors, output_vectors)
    elif isinstance(record, EmbeddingIO):
        assert output_vectors is None, "the rows of a table are not rotated"
        yield from _table_blocks(record, input_vectors)
    elif isinstance(record, GroupedIO):
        assert output_vectors is None, "the outputs of maps side by side are not rotated"
        gradients = _grouped_gradients(record)
        yield slice(None), gradients if input_vectors is None else gradients @ input_vectors
    else:
        assert input_vectors is output_vectors is None, "a scale is not rotated"
        yield slice(None), _scale_gradients(record)


def _linear_blocks(record: LayerIO, input_vectors: Array | None, output_vectors: Array | None) -> Iterator[tuple[Rows, Array]]:
    """On either side, rotates the tokens first when that takes fewer multiplications than rotating the gradients, as the shape alone decides."""
    xp, gradients = array_api_compat.array_namespace(record.activations), record.output_gradients
    num_sequences, num_positions, num_rows = gradients.shape
    if num_positions == 0:  # an expert that no token reached: there is nothing to stream through memory
        yield slice(0, 0), _linear_gradients(record)[:, :0]
        return
    parts = _blocks_of(num_rows, num_sequences * (record.activations.shape[2] + record.bias), gradients)
    if input_vectors is None or output_vectors is None:
        assert input_vectors is output_vectors is None, "linear layers have an eigenbasis on both sides"
        for part in parts:
            yield part, _linear_gradients(replace(record, output_gradients=gradients[:, :, part]))
        return
    inputs = record.shared_inputs or SharedTokens(output_vectors.shape[0])
    outputs = record.shared_outputs or SharedTokens(input_vectors.shape[0])
    rotated_inputs = None
    if num_positions < inputs.beside:
        rotated_inputs = inputs.rotated(input_vectors, lambda: apply_to_inputs(record, input_vectors))

    def rotated(some: Array) -> Array:
        """The gradients of some rows, rotated on the inputs' side."""
        if rotated_inputs is None:
            return _linear_gradients(replace(record, output_gradients=some)) @ input_vectors
        return xp.matmul(xp.matrix_transpose(some), rotated_inputs)

    if num_positions < outputs.beside:
        rotated_outputs = outputs.rotated(output_vectors, lambda: gradients @ output_vectors)
        for part in parts:
            yield part, rotated(rotated_outputs[:, :, part])
    else:
        whole = rotated(gradients)
        for part in parts:
            yield part, output_vectors[:, part].T @ whole


def _linear_gradients(record: LayerIO) -> Array:
    xp = array_api_compat.array_namespace(record.activations)
    gradients = xp.matmul(xp.matrix_transpose(record.output_gradients), record.activations)
    if not record.bias:
        return gradients
    return xp.concat([gradients, xp.sum(record.output_gradients, axis=1)[:, :, None]], axis=2)


def _table_blocks(record: EmbeddingIO, vectors: Array | None) -> Iterator[tuple[Rows, Array]]:
    xp, device = array_api_compat.array_namespace(record.mask), array_api_compat.device(record.mask)
    head, lookup = record.head, record.lookup
    if lookup is not None and vectors is not None:
        rotated = lookup.row_gradients @ vectors[: lookup.row_gradients.shape[-1], :]
        lookup = replace(lookup, row_gradients=rotated)
    mask = lookup_mask(record)
    if head is None:
        assert lookup is not None
        rows, gradients = xp.unique_values(lookup.indices[mask]), lookup.row_gradients
        for part in _blocks_of(rows.shape[0], gradients.shape[0] * gradients.shape[2], gradients):
            some = rows[part]
            nothing = xp.zeros((gradients.shape[0], some.shape[0], gradients.shape[2]), dtype=gradients.dtype, device=device)
            yield some, _with_lookups(nothing, lookup, mask, some)
        return
    inputs = _table_inputs(head, vectors)
    for part in _blocks_of(record.num_rows, inputs.shape[0] * inputs.shape[2], inputs):
        block = xp.matmul(xp.matrix_transpose(head.output_gradients[:, :, part]), inputs)
        some = xp.arange(part.start, part.stop, device=device)
        yield part, (block if lookup is None else _with_lookups(block, lookup, mask, some))


def _blocks_of(num_rows: int, numbers_per_row: int, alike: Array) -> list[slice]:
    """The rows of a layer in as few and equal parts as keep their gradients within BLOCK_NUMBERS, on the device of `alike`."""
    on_cpu = array_api_compat.is_numpy_array(alike) or (array_api_compat.is_torch_array(alike) and alike.device.type == "cpu")
    most = max(1, int((1 if on_cpu else 16) * BLOCK_NUMBERS / numbers_per_row))
    num_parts = max(1, math.ceil(num_rows / most))
    ends = [num_rows * part // num_parts for part in range(num_parts + 1)]
    return [slice(first, end) for first, end in pairwise(ends) if first < end]


def lookup_mask(record: EmbeddingIO) -> Array:
    """[N, T] bool: the positions of the lookup that the loss reaches."""
    return record.mask if record.lookup is None or record.lookup.mask is None else record.lookup.mask


def _table_inputs(head: LayerIO, vectors: Array | None) -> Array:
    if vectors is not None:
        return apply_to_inputs(head, vectors)
    xp = array_api_compat.array_namespace(head.activations)
    return xp.concat([head.activations, xp.ones_like(head.activations[:, :, :1])], axis=2) if head.bias else head.activations


def _with_lookups(block: Array, lookup: LookupIO, mask: Array, rows: Array) -> Array:
    """`block` [N, rows, J] with every looked-up row's gradient added where its row is among the ascending `rows`."""
    xp = array_api_compat.array_namespace(block)
    num_sequences, num_rows = block.shape[0], block.shape[1]
    here = (lookup.indices >= rows[0]) & (lookup.indices <= rows[-1]) & mask
    sequences = xp.broadcast_to(xp.arange(num_sequences, device=array_api_compat.device(block))[:, None], here.shape)[here]
    places = sequences * num_rows + xp.searchsorted(rows, lookup.indices[here])
    added = lookup.row_gradients[here]
    if missing := block.shape[-1] - added.shape[-1]:  # the head has a bias, which no lookup touches
        added = xp.concat([added, xp.zeros_like(added[:, :missing])], axis=1)
    return xp.reshape(_scatter_add(xp.reshape(block, (num_sequences * num_rows, -1)), places, added), block.shape)


def _scatter_add(target: Array, places: Array, values: Array) -> Array:
    """target[places[m]] += values[m], places being repeated or not; `target` may be changed. The array standard has no such function."""
    if array_api_compat.is_torch_array(target):
        return target.index_add_(0, places, values)
    if array_api_compat.is_jax_array(target):
        return target.at[places].add(values)
    import numpy as np

    np.add.at(target, places, values)
    return target


def _scale_gradients(record: ScaleIO) -> Array:
    xp = array_api_compat.array_namespace(record.normalized)
    weight = xp.sum(record.output_gradients * record.normalized, axis=(1, 2))
    return xp.stack([weight, xp.sum(record.output_gradients, axis=(1, 2))], axis=2) if record.bias else weight[:, :, None]


def _grouped_gradients(record: GroupedIO) -> Array:
    """[N, H·P, J]."""
    xp = array_api_compat.array_namespace(record.activations)
    gradients = xp.permute_dims(record.output_gradients, (0, 2, 3, 1))
    found = gradients @ xp.permute_dims(record.activations, (0, 2, 1, 3))
    if record.bias:
        found = xp.concat([found, xp.sum(gradients, axis=3)[:, :, :, None]], axis=3)
    return xp.reshape(found, (found.shape[0], found.shape[1] * found.shape[2], found.shape[3]))


def sequence_gradients(record: Record) -> Array:
    """Each sequence's exact gradient [N, O, J], summed over its positions, whole: N·O·J numbers."""
    xp = array_api_compat.array_namespace(record.mask)
    if isinstance(record, EmbeddingIO) and record.head is None and record.lookup is not None:
        device, gradients = array_api_compat.device(record.mask), record.lookup.row_gradients
        nothing = xp.zeros((record.mask.shape[0], record.num_rows, gradients.shape[-1]), dtype=gradients.dtype, device=device)
        return _with_lookups(nothing, record.lookup, lookup_mask(record), xp.arange(record.num_rows, device=device))
    if isinstance(record, LayerIO):
        return _linear_gradients(record)
    return xp.concat([block for _, block in gradient_blocks(record)], axis=1)


def as_one_sequence(record: Record) -> Record:
    """The record of the whole batch as that of a single sequence: its gradient is the sum of theirs, for the price of one weight gradient.

    Where the entries stood in their sequences is not kept.
    """
    if isinstance(record, LayerIO | GroupedIO):
        return _linear_as_one(record)
    if isinstance(record, ScaleIO):
        return ScaleIO(
            normalized=_joined(record.normalized),
            output_gradients=_joined(record.output_gradients),
            mask=_joined(record.mask),
            bias=record.bias,
        )
    lookup, head = record.lookup, record.head
    return EmbeddingIO(
        lookup=lookup
        and LookupIO(indices=_joined(lookup.indices), row_gradients=_joined(lookup.row_gradients), mask=_joined(lookup_mask(record))),
        head=head and _linear_as_one(head),
        mask=_joined(record.mask),
        num_rows=record.num_rows,
    )


def _linear_as_one(record: Linear) -> Linear:
    return type(record)(
        activations=_joined(record.activations),
        output_gradients=_joined(record.output_gradients),
        mask=_joined(record.mask),
        bias=record.bias,
    )


def _joined(values: Array) -> Array:
    """[1, N·T, …] of [N, T, …]."""
    xp = array_api_compat.array_namespace(values)
    return xp.reshape(values, (1, values.shape[0] * values.shape[1], *values.shape[2:]))


def inner_products(record: Record, vectors: Array) -> Array:
    """⟨vector q, gradient of sequence n⟩ for vectors [Q, O, J]: an array [Q, N]."""
    xp = array_api_compat.array_namespace(vectors)
    products = xp.zeros((record.mask.shape[0], vectors.shape[0]), dtype=vectors.dtype, device=array_api_compat.device(vectors))
    for rows, block in gradient_blocks(record):
        # This order: fewer gradients than vectors at once are twice as fast on the left as on the right.
        products = products + xp.reshape(block, (block.shape[0], -1)) @ xp.reshape(vectors[:, rows], (vectors.shape[0], -1)).T
    return products.T


def position_inner_products(record: Record, vector: Array) -> Array:
    """⟨vector, this position's share of the gradient⟩ for one vector [O, J]: an array [N, T] whose row sums are `inner_products`.

    A looked-up row's share stands at the position where its token is the input.
    """
    xp = array_api_compat.array_namespace(vector)
    if isinstance(record, LayerIO):
        if not record.bias and record.activations.shape[-1] < record.output_gradients.shape[-1]:  # what is multiplied is the narrower side
            return _placed(xp.sum(record.activations * (record.output_gradients @ vector), axis=-1), record.places)
        return _placed(xp.sum(record.output_gradients * apply_to_inputs(record, xp.matrix_transpose(vector)), axis=-1), record.places)
    if isinstance(record, GroupedIO):
        matrices = xp.reshape(vector, (*record.output_gradients.shape[2:], vector.shape[1]))  # [H, P, J]
        weights = xp.matrix_transpose(matrices[:, :, :-1] if record.bias else matrices)
        values = xp.matmul(record.activations[:, :, :, None, :], weights)[:, :, :, 0, :]
        return _placed(
            xp.sum(record.output_gradients * (values + matrices[:, :, -1] if record.bias else values), axis=(2, 3)), record.places
        )
    if isinstance(record, ScaleIO):
        values = record.normalized * vector[:, 0] + (vector[:, 1] if record.bias else 0)
        return _placed(xp.sum(record.output_gradients * values, axis=(2, 3)), record.places)
    shares = []
    if record.head is not None:
        shares.append(position_inner_products(record.head, vector))
    if record.lookup is not None:
        gradients = record.lookup.row_gradients
        looked_up = xp.sum(gradients * vector[:, : gradients.shape[-1]][record.lookup.indices], axis=-1)
        shares.append(_placed(looked_up, record.lookup.places))
    return sum(shares[1:], shares[0])


def _placed(shares: Array, places: Places | None) -> Array:
    """[N, count]: the shares [N, T] added up where they stand."""
    if places is None:
        return shares
    xp, device, num_sequences = array_api_compat.array_namespace(shares), array_api_compat.device(shares), shares.shape[0]
    first = xp.arange(num_sequences, device=device)[:, None] * places.count
    nothing = xp.zeros((num_sequences * places.count,), dtype=shares.dtype, device=device)
    found = _scatter_add(nothing, xp.reshape(first + places.indices, (-1,)), xp.reshape(shares, (-1,)))
    return xp.reshape(found, (num_sequences, places.count))
