"""EK-FAC for one layer, in arrays: covariances, eigenbases, corrected eigenvalues, preconditioning and whitening.

The Gauss-Newton Hessian of the training loss (mean over sequences of the loss summed over a sequence's tokens), restricted to one
layer, is approximated as (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ: Q_A and Q_G are the eigenvectors of the covariances of the layer's
inputs and output gradients (K-FAC, Martens and Grosse 2015), and Λ are the second moments of per-sequence gradients along those
axes (George et al. 2018, arXiv 1806.03884; for language models Grosse et al. 2023, arXiv 2308.03296, section 2.4).

A side without eigenvectors (None) has the identity in their place: the rows of an embedding, the outputs of grouped maps, both sides of a scale. The
corrected eigenvalues are then second moments for every token and direction of the features, or for every single weight.

Knows neither a framework nor a model nor files; see `record` for the normal form and the letters of shapes.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import array_api_compat

from ekfac.record import Array, EmbeddingIO, GroupedIO, LayerIO, Record, aligned_product, gradient_blocks, lookup_mask


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Sum over counted positions of x xᵀ: a partial sum, merged with `+` in any grouping."""

    total: Array  # [D, D] float64: on and above the diagonal; what stands below it has no meaning
    num_positions: Any  # a whole number, which may still be on the device

    def __add__(self, other: "Covariance") -> "Covariance":
        return Covariance(total=self.total + other.total, num_positions=self.num_positions + other.num_positions)


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """Eigenvectors of a covariance, ascending by eigenvalue; each column's largest entry in absolute value is positive."""

    values: Array  # [D]
    vectors: Array  # [D, D], one eigenvector a column


@dataclass(frozen=True, kw_only=True)
class EigenvalueSum:
    """Sum over sequences of the squared gradient along each axis of the eigenbasis: a partial sum, merged with `+`."""

    total: Array  # [O, J] float64
    num_sequences: int

    def __add__(self, other: "EigenvalueSum") -> "EigenvalueSum":
        return EigenvalueSum(total=self.total + other.total, num_sequences=self.num_sequences + other.num_sequences)


@dataclass(frozen=True, kw_only=True)
class Damping:
    """What is added to a layer's corrected eigenvalues before they are inverted.

    `relative`: value × the layer's mean corrected eigenvalue (Grosse et al. use 0.1). `absolute`: the value itself, in the unit of
    the eigenvalues, squared nats per squared unit of the parameter.
    """

    value: float
    kind: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"damping must be a finite number of at least 0, not {self.value}")

    def of(self, eigenvalues: Array) -> float:
        """λ for a layer with these corrected eigenvalues."""
        if self.kind == "absolute":
            return self.value
        xp = array_api_compat.array_namespace(eigenvalues)
        return self.value * float(xp.mean(eigenvalues))


def input_covariance(record: LayerIO, before: Covariance | None = None, sequence_weights: Array | None = None) -> Covariance:
    """Σ over counted positions of w ā āᵀ with ā = (activation, 1 if there is a bias) and w the sequence's weight, 1 when left out: [J, J], added to
    `before`, which may be changed."""
    xp = array_api_compat.array_namespace(record.activations)
    weights = xp.astype(record.mask, record.activations.dtype)[:, :, None]
    if sequence_weights is not None:
        weights = weights * xp.astype(sequence_weights, weights.dtype)[:, None, None]
    return _covariance([(record.activations, weights)], record.bias, record.mask, before)


def output_covariance(record: LayerIO, before: Covariance | None = None) -> Covariance:
    """Σ over positions of g gᵀ, g the output gradient (zero where the loss does not reach), [O, O], added to `before`, which may be changed."""
    return _covariance([(record.output_gradients, None)], False, record.mask, before)


def feature_covariance(record: EmbeddingIO | GroupedIO, before: Covariance | None = None) -> Covariance:
    """Σ over counted positions of G_tᵀ G_t, with G_t [O, J] the share of position t in a table's gradient through its head and through its lookup.

    That is ‖output gradient‖² x̄ x̄ᵀ for the head's inputs x̄, or those of each of several maps side by side, and g gᵀ for the gradient g of a looked-up
    row: [J, J], added to `before`.
    """
    xp = array_api_compat.array_namespace(record.mask)
    if isinstance(record, GroupedIO):
        count, length, groups, inputs = record.activations.shape
        norms = xp.sum(record.output_gradients**2, axis=3) * xp.astype(record.mask, record.activations.dtype)[:, :, None]
        activations = xp.reshape(record.activations, (count, length * groups, inputs))
        return _covariance([(activations, xp.reshape(norms, (count, length * groups, 1)))], record.bias, record.mask, before)
    parts = []
    if record.head is not None:
        norms = xp.sum(record.head.output_gradients**2, axis=2)[:, :, None]
        parts.append((record.head.activations, norms * xp.astype(record.mask, norms.dtype)[:, :, None]))
    if record.lookup is not None:
        parts.append((record.lookup.row_gradients, xp.astype(lookup_mask(record), record.lookup.row_gradients.dtype)[:, :, None]))
    return _covariance(parts, record.head is not None and record.head.bias, record.mask, before)


PANEL = 128
"""Columns of a covariance that are computed at once. What lies below the panels' diagonal blocks is not, which halves the work for wide layers."""


def _covariance(parts: list[tuple[Array, Array | None]], bias: bool, mask: Array, before: Covariance | None) -> Covariance:
    """Σ over the parts, values [N, T, I] and weights [N, T, 1] or none, and their positions of w x xᵀ; with a bias, the first part's x has one more
    coordinate, which is one."""
    xp, size = array_api_compat.array_namespace(mask), parts[0][0].shape[2] + bias
    total = xp.zeros((size, size), dtype=xp.float64, device=array_api_compat.device(mask)) if before is None else before.total
    flats = [(_flat(values), None if weights is None else _flat(weights)) for values, weights in parts]
    for values, weights in flats:
        for first in range(0, values.shape[1], PANEL):
            columns = slice(first, min(first + PANEL, values.shape[1]))
            panel = values[:, columns] if weights is None else values[:, columns] * weights
            total = _added(total, (columns, slice(first, values.shape[1])), panel.T @ values[:, first:])
    values, weights = flats[0]
    if bias and weights is not None:
        total = _added(total, (slice(size), size - 1), xp.concat([weights[:, 0] @ values, xp.sum(weights)[None]]))
    return Covariance(total=total, num_positions=xp.count_nonzero(mask) + (before.num_positions if before else 0))


def _flat(values: Array) -> Array:
    """[N·T, I] of [N, T, I]; I is zero in a block of a bias alone."""
    xp = array_api_compat.array_namespace(values)
    return xp.reshape(values, (values.shape[0] * values.shape[1], values.shape[2]))


def _added(total: Array, where: Any, values: Array) -> Array:
    """`total` with values added there, changed in place where the library allows it."""
    if array_api_compat.is_jax_array(total):
        return total.at[where].add(values)
    total[where] += values
    return total


def eigenbasis(covariance: Covariance, dtype: str = "float64") -> Eigenbasis:
    """Eigenvectors of the mean covariance, computed in `dtype`: float32 takes half the time, and gives a basis as orthogonal as it can represent.

    That of no positions, as of an expert that no token reached, is the identity. Raises ValueError if an entry is not finite.
    """
    xp = array_api_compat.array_namespace(covariance.total)
    largest = float(xp.max(xp.abs(covariance.total)))
    if not math.isfinite(largest):
        raise ValueError("the covariance has entries that are not finite: the model gave non-finite activations or gradients")
    largest = largest or 1.0
    scaled = xp.astype(covariance.total / largest, getattr(xp, dtype))  # scaled, so that no entry of float32 underflows
    values, vectors = xp.linalg.eigh(xp.triu(scaled) + xp.triu(scaled, k=1).T)
    peaks = xp.argmax(xp.abs(vectors), axis=0)
    # eigh leaves the sign of a column open; fixing it keeps rows made from equal statistics comparable.
    signs = xp.sign(vectors[peaks, xp.arange(vectors.shape[1], device=array_api_compat.device(vectors))])
    return Eigenbasis(values=values * (largest / max(1, int(covariance.num_positions))), vectors=vectors * signs)


def eigenvalue_sum(
    record: Record, input_vectors: Array | None, output_vectors: Array | None, shape: tuple[int, int], before: EigenvalueSum | None = None
) -> EigenvalueSum:
    """Σ over sequences of (Q_Gᵀ G_n Q_A)², [O, J] = `shape`, from each sequence's exact gradient summed over its tokens, added to `before`, which may
    be changed."""
    xp = array_api_compat.array_namespace(record.mask)
    total = xp.zeros(shape, dtype=xp.float64, device=array_api_compat.device(record.mask)) if before is None else before.total
    for rows, block in gradient_blocks(record, input_vectors, output_vectors):
        block *= block
        total = _added(total, rows, xp.sum(block, axis=0))
    return EigenvalueSum(total=total, num_sequences=record.mask.shape[0] + (before.num_sequences if before else 0))


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """What stands for (G + λI)⁻¹ in one layer. Gradients are [..., O, J] arrays."""

    input_vectors: Array | None  # [J, J]; None stands for the identity
    output_vectors: Array | None  # [O, O], likewise
    eigenvalues: Array  # [O, J] corrected: mean over sequences of the squared gradient along each axis
    damping: float | Array  # λ, absolute: one, or [O, J], one for each axis of the eigenbasis

    def rotate(self, gradients: Array) -> Array:
        """Q_Gᵀ V Q_A."""
        return _two_sided(None if self.output_vectors is None else self.output_vectors.T, gradients, self.input_vectors)

    def unrotate(self, rotated: Array) -> Array:
        """Q_G V Q_Aᵀ, which undoes `rotate`."""
        return _two_sided(self.output_vectors, rotated, None if self.input_vectors is None else self.input_vectors.T)

    def precondition(self, gradients: Array) -> Array:
        """(G + λI)⁻¹ v = Q_G ((Q_Gᵀ V Q_A) / (Λ + λ)) Q_Aᵀ (Grosse et al. 2023, equation 21).

        An axis with Λ + λ = 0 gets zero: no fitted sequence has a gradient there, so the inverse is not defined on it.
        """
        return self.solve(self.rotate(gradients))

    def solve(self, rotated: Array) -> Array:
        """`precondition` of a gradient that is in the eigenbasis already; the result is not."""
        return self.unrotate(rotated * self.inverse())

    def multiply(self, vectors: Array) -> Array:
        """(G + λI) v = (Q_Gᵀ V Q_A) · (Λ + λ), left in the eigenbasis: `solve` undoes it."""
        return self.rotate(vectors) * (self.eigenvalues + self.damping)

    def whiten(self, gradients: Array) -> Array:
        """(Q_Gᵀ V Q_A) / √(Λ + λ), in the eigenbasis: inner products of whitened gradients equal vᵀ (G + λI)⁻¹ w."""
        return self.rotate(gradients) * self.inverse() ** 0.5

    def diagonal(self, weights: Array) -> Array:
        """The diagonal, in the eigenbasis, of the matrix whose diagonal over the parameters is `weights` [O, J]: (Q_G∘Q_G)ᵀ W (Q_A∘Q_A)."""
        if self.output_vectors is not None:
            weights = (self.output_vectors**2).T @ weights
        return weights if self.input_vectors is None else weights @ self.input_vectors**2

    def inverse(self) -> Array:
        """1 / (Λ + λ), [O, J], zero where Λ + λ is zero."""
        xp = array_api_compat.array_namespace(self.eigenvalues)
        damped = self.eigenvalues + self.damping
        positive = damped > 0
        return xp.where(positive, 1 / xp.where(positive, damped, xp.ones_like(damped)), xp.zeros_like(damped))

    def effective_dimension(self) -> float:
        """Σ Λ / (Λ + λ): the mean squared norm of a whitened gradient over the fitted sequences."""
        xp = array_api_compat.array_namespace(self.eigenvalues)
        return float(xp.sum(self.retained()))

    def retained(self) -> Array:
        """Λ / (Λ + λ), [O, J]: the share of each coordinate that damping leaves, between 0 and 1."""
        return self.eigenvalues * self.inverse()

    def row_weight(self) -> float:
        """Σ (Λ / (Λ + λ))²: the mean squared norm of a whitened gradient each of whose coordinates is multiplied by √(Λ / (Λ + λ))."""
        xp = array_api_compat.array_namespace(self.eigenvalues)
        return float(xp.sum(self.retained() ** 2))


def _two_sided(left: Array | None, gradients: Array, right: Array | None) -> Array:
    """left @ gradients @ right, where None stands for the identity."""
    if right is not None:
        gradients = aligned_product(gradients, right)
    if left is not None:
        gradients = left @ gradients
    if right is None or gradients.shape[-1] == right.shape[1]:
        return gradients
    return array_api_compat.array_namespace(gradients).asarray(gradients[..., : right.shape[1]], copy=True)


def corrected_eigenvalues(sums: EigenvalueSum) -> Array:
    """Λ, [O, J] float64. Raises ValueError if no sequence was counted or an eigenvalue is not finite."""
    xp = array_api_compat.array_namespace(sums.total)
    if sums.num_sequences == 0:
        raise ValueError("corrected eigenvalues need at least one sequence")
    corrected = sums.total / sums.num_sequences
    if not bool(xp.all(xp.isfinite(corrected))):
        raise ValueError("a corrected eigenvalue is not finite: the model gave non-finite gradients")
    return corrected


def layer_factors(
    input_basis: Eigenbasis | None, output_basis: Eigenbasis | None, sums: EigenvalueSum, damping: Damping, dtype: str = "float32"
) -> LayerFactors:
    """The layer's factors from what the passes made. Raises ValueError if no sequence was counted or an eigenvalue is not finite."""
    corrected = corrected_eigenvalues(sums)
    xp = array_api_compat.array_namespace(corrected)
    target = getattr(xp, dtype)
    return LayerFactors(
        input_vectors=None if input_basis is None else xp.astype(input_basis.vectors, target),
        output_vectors=None if output_basis is None else xp.astype(output_basis.vectors, target),
        eigenvalues=xp.astype(corrected, target),
        damping=damping.of(corrected),
    )
