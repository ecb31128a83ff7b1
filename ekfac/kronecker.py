"""EK-FAC for one layer, in arrays: covariances, eigenbases, corrected eigenvalues, preconditioning and whitening.

The Gauss-Newton Hessian of the training loss (mean over sequences of the loss summed over a sequence's tokens), restricted to one
layer, is approximated as (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ: Q_A and Q_G are the eigenvectors of the covariances of the layer's
inputs and output gradients (K-FAC, Martens and Grosse 2015), and Λ are the second moments of per-sequence gradients along those
axes (George et al. 2018, arXiv 1806.03884; for language models Grosse et al. 2023, arXiv 2308.03296, section 2.4).

A side without eigenvectors (None) has the identity in their place: the rows of an embedding, both sides of a scale. The corrected eigenvalues are
then second moments for every token and direction of the features, or for every single weight.

Knows neither a framework nor a model nor files; see `record` for the normal form and the letters of shapes.
"""

from dataclasses import dataclass
from typing import Literal

import array_api_compat

from ekfac.record import Array, EmbeddingIO, LayerIO, Record, Rows, gradient_blocks


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Sum over counted positions of x xᵀ: a partial sum, merged with `+` in any grouping."""

    total: Array  # [D, D] float64
    num_positions: int

    def __add__(self, other: "Covariance") -> "Covariance":
        return Covariance(total=self.total + other.total, num_positions=self.num_positions + other.num_positions)


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """Eigenvectors of a covariance, ascending by eigenvalue; each column's largest entry in absolute value is positive."""

    values: Array  # [D] float64
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


def input_covariance(record: LayerIO) -> Covariance:
    """Σ over counted positions of ā āᵀ with ā = (activation, 1 if there is a bias): [J, J]."""
    xp = array_api_compat.array_namespace(record.activations)
    weights = xp.astype(record.mask, record.activations.dtype)
    inputs = record.activations * weights[:, :, None]
    if record.bias:
        inputs = xp.concat([inputs, weights[:, :, None]], axis=2)
    return _covariance(inputs, record.mask)


def output_covariance(record: LayerIO) -> Covariance:
    """Σ over counted positions of g gᵀ, g the output gradient: [O, O]."""
    xp = array_api_compat.array_namespace(record.output_gradients)
    weights = xp.astype(record.mask, record.output_gradients.dtype)
    return _covariance(record.output_gradients * weights[:, :, None], record.mask)


def feature_covariance(record: EmbeddingIO) -> Covariance:
    """Σ over counted positions of G_tᵀ G_t, with G_t [O, J] the share of position t in a table's gradient through its head and through its lookup.

    That is ‖output gradient‖² x̄ x̄ᵀ for the head's inputs x̄, and g gᵀ for the gradient g of a looked-up row: [J, J].
    """
    parts = []
    xp = array_api_compat.array_namespace(record.mask)
    if record.head is not None:
        norms = xp.sqrt(xp.sum(record.head.output_gradients**2, axis=2))
        weighted = record.head.activations * norms[:, :, None]
        parts.append(xp.concat([weighted, norms[:, :, None]], axis=2) if record.head.bias else weighted)
    if record.lookup is not None:
        gradients = record.lookup.row_gradients
        if missing := (parts[0].shape[2] - gradients.shape[2] if parts else 0):  # the column of the head's bias
            gradients = xp.concat([gradients, xp.zeros_like(gradients[:, :, :missing])], axis=2)
        parts.append(gradients)
    weights = xp.astype(record.mask, parts[0].dtype)[:, :, None]
    covariances = [_covariance(part * weights, record.mask) for part in parts]
    return Covariance(total=sum(part.total for part in covariances), num_positions=covariances[0].num_positions)


def _covariance(masked: Array, mask: Array) -> Covariance:
    xp = array_api_compat.array_namespace(masked)
    flat = xp.reshape(masked, (-1, masked.shape[-1]))
    return Covariance(total=xp.astype(flat.T @ flat, xp.float64), num_positions=int(xp.count_nonzero(mask)))


def eigenbasis(covariance: Covariance) -> Eigenbasis:
    """Eigenvectors of the mean covariance, computed in float64.

    Raises ValueError if no position was counted or an entry is not finite.
    """
    xp = array_api_compat.array_namespace(covariance.total)
    if covariance.num_positions == 0:
        raise ValueError("a covariance of no positions has no eigenbasis: no token of the fitting sequences is counted")
    mean = covariance.total / covariance.num_positions
    if not bool(xp.all(xp.isfinite(mean))):
        raise ValueError("the covariance has entries that are not finite: the model gave non-finite activations or gradients")
    values, vectors = xp.linalg.eigh((mean + mean.T) / 2)
    largest = xp.argmax(xp.abs(vectors), axis=0)
    # eigh leaves the sign of a column open; fixing it keeps rows made from equal statistics comparable.
    signs = xp.sign(vectors[largest, xp.arange(vectors.shape[1], device=array_api_compat.device(vectors))])
    return Eigenbasis(values=values, vectors=vectors * signs)


def eigenvalue_sum(record: Record, input_vectors: Array | None, output_vectors: Array | None, shape: tuple[int, int]) -> EigenvalueSum:
    """Σ over sequences of (Q_Gᵀ G_n Q_A)², [O, J] = `shape`, from each sequence's exact gradient summed over its tokens."""
    xp = array_api_compat.array_namespace(record.mask)
    total = xp.zeros(shape, dtype=xp.float64, device=array_api_compat.device(record.mask))
    for rows, block in gradient_blocks(record, input_vectors, output_vectors):
        total = _add_rows(total, rows, xp.astype(xp.sum(block**2, axis=0), xp.float64))
    return EigenvalueSum(total=total, num_sequences=record.mask.shape[0])


def _add_rows(total: Array, rows: Rows, values: Array) -> Array:
    if array_api_compat.is_jax_array(total):
        return total.at[rows].add(values)
    total[rows] += values
    return total


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """What stands for (G + λI)⁻¹ in one layer. Gradients are [..., O, J] arrays."""

    input_vectors: Array | None  # [J, J]; None stands for the identity
    output_vectors: Array | None  # [O, O], likewise
    eigenvalues: Array  # [O, J] corrected: mean over sequences of the squared gradient along each axis
    damping: float | Array  # λ, absolute: one, or [O, J], one for each axis of the eigenbasis

    def rotate(self, gradients: Array) -> Array:
        """Q_Gᵀ V Q_A."""
        if self.output_vectors is not None:
            gradients = self.output_vectors.T @ gradients
        return gradients if self.input_vectors is None else gradients @ self.input_vectors

    def unrotate(self, rotated: Array) -> Array:
        """Q_G V Q_Aᵀ, which undoes `rotate`."""
        if self.output_vectors is not None:
            rotated = self.output_vectors @ rotated
        return rotated if self.input_vectors is None else rotated @ self.input_vectors.T

    def precondition(self, gradients: Array) -> Array:
        """(G + λI)⁻¹ v = Q_G ((Q_Gᵀ V Q_A) / (Λ + λ)) Q_Aᵀ (Grosse et al. 2023, equation 21).

        An axis with Λ + λ = 0 gets zero: no fitted sequence has a gradient there, so the inverse is not defined on it.
        """
        return self.unrotate(self.rotate(gradients) * self.inverse())

    def whiten(self, gradients: Array) -> Array:
        """(Q_Gᵀ V Q_A) / √(Λ + λ), in the eigenbasis: inner products of whitened gradients equal vᵀ (G + λI)⁻¹ w."""
        return self.rotate(gradients) * self.inverse() ** 0.5

    def unwhiten(self, vectors: Array) -> Array:
        """(Q_Gᵀ V Q_A) · √(Λ + λ), in the eigenbasis: its inner product with `whiten` of a gradient is vᵀ gradient."""
        return self.rotate(vectors) * (self.eigenvalues + self.damping) ** 0.5

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
