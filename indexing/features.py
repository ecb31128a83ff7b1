"""A sequence's row: its gradient, whitened in the eigenbasis, shrunk and spread by sparse random signs into buckets, layer by layer, and mixed.

The inner product of two whitened gradients is their damped influence; the inner product of two rows estimates it, with a variance of about
‖x‖²‖y‖² / buckets a layer, from all the coordinates that share a bucket. Coordinates whose curvature Λ is small beside the damping λ add to
that variance as much as they have norm, and to the answer little: each is multiplied by √(Λ/(Λ+λ)), in rows and queries alike, which is what
the best linear estimate tends to when noise prevails. Every layer has its own range of buckets, in proportion to the squared norm that is left,
which minimises the variance and lets some layers be searched alone. The buckets of a range are mixed by a Hartley transform, which is
orthogonal: rows of a few large numbers, as of embeddings, become even, and lose less when they are rounded to signs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekfac import Layer, LayerFactors, Loss, Record, Rows, SequenceBatch, capture, gradient_blocks, key_of, keyed_bits


@dataclass(frozen=True, kw_only=True)
class LayerBuckets:
    """Where one layer's whitened gradient [O, J] goes in a row: `width` buckets from `start` on."""

    name: str
    shape: tuple[int, int]
    start: int
    width: int


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """How rows are made: each layer's buckets, and the seed of the random signs."""

    layers: tuple[LayerBuckets, ...]
    seed: int

    @property
    def row_length(self) -> int:
        return sum(layer.width for layer in self.layers)


def feature_spec(layers: Sequence[Layer], row_weights: Mapping[str, float], row_length: int, seed: int) -> FeatureSpec:
    """Buckets in proportion to `LayerFactors.row_weight`, at least one a layer and never more than a layer has coordinates.

    Rows are shorter than `row_length` when the layers have fewer coordinates in all. Raises ValueError when there are more layers than buckets.
    """
    if row_length < len(layers):
        raise ValueError(f"rows of {row_length} numbers are too short for {len(layers)} layers: raise index.bytes_per_sequence")
    sizes = np.array([layer.shape[0] * layer.shape[1] for layer in layers])
    weights = np.array([max(row_weights[layer.name], 1e-12) for layer in layers])
    widths = _shares(weights, sizes, min(row_length, int(sizes.sum())))
    starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    buckets = [
        LayerBuckets(name=layer.name, shape=layer.shape, start=int(start), width=int(width))
        for layer, start, width in zip(layers, starts, widths, strict=True)
    ]
    return FeatureSpec(layers=tuple(buckets), seed=seed)


def _shares(weights: NDArray[np.float64], limits: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to `total`, between 1 and the limits and otherwise in proportion to the weights."""
    low, high = 0.0, float(total / weights.min())
    for _ in range(200):  # the scale at which the clipped shares reach the total; they only grow with it
        scale = (low + high) / 2
        low, high = (low, scale) if np.clip(scale * weights, 1, limits).sum() > total else (scale, high)
    exact = np.clip(low * weights, 1, limits)
    widths = np.floor(exact).astype(np.int64)
    spare = np.where(widths < limits, exact - widths, -1.0)
    for place in np.argsort(-spare, kind="stable")[: total - int(widths.sum())]:
        widths[place] += 1
    return widths


class Spreader:
    """The sparse random signs of one layer: each coordinate goes to one bucket, with a sign; buckets get equally many (to one).

    The signs are shrunk by `weights` [O, J]. A layer with as many buckets as coordinates is kept as it is, so that nothing is approximated. The
    assignment depends on (seed, layer name, coordinate) alone.
    """

    def __init__(self, buckets: LayerBuckets, seed: int, weights: Tensor) -> None:
        self.shape, self.start, self.width = buckets.shape, buckets.start, buckets.width
        size = buckets.shape[0] * buckets.shape[1]
        self.exact = buckets.width == size
        if self.exact:
            return
        bits = keyed_bits(seed, np.array([key_of(buckets.name)], dtype=np.uint64), size)[0]
        places = np.empty(size, dtype=np.int32)
        places[np.argsort(bits, kind="stable")] = np.arange(size, dtype=np.int32) % self.width
        signs = np.where(bits & np.uint64(1), np.float32(1), np.float32(-1)).reshape(buckets.shape)
        self.buckets = torch.from_numpy(places.reshape(buckets.shape)).to(weights.device)
        self.signs = torch.from_numpy(signs).to(weights.device) * weights.float()

    def add(self, target: Tensor, rows: Rows, whitened: Tensor) -> None:
        """Adds these rows of whitened gradients, [N, rows, J], to the layer's range of `target` [N, row length]."""
        own = target[:, self.start : self.start + self.width]
        if self.exact:
            own.view(-1, *self.shape)[:, rows] += whitened.to(target.dtype)
        else:
            own.index_add_(1, self.buckets[rows].flatten(), (whitened.to(target.dtype) * self.signs[rows]).flatten(1))


def spreaders(spec: FeatureSpec, factors: Mapping[str, LayerFactors]) -> dict[str, Spreader]:
    """Every layer's `Spreader`, by layer name, on the factors' device."""
    return {buckets.name: Spreader(buckets, spec.seed, factors[buckets.name].retained() ** 0.5) for buckets in spec.layers}


def _mixed(made: Tensor, spec: FeatureSpec) -> Tensor:
    """Each layer's range of rows [N, D] after the Hartley transform Re F - Im F, F the orthonormal Fourier transform."""
    spectra = [torch.fft.fft(made[:, layer.start : layer.start + layer.width], norm="ortho") for layer in spec.layers]
    return torch.cat([spectrum.real - spectrum.imag for spectrum in spectra], dim=1)


def feature_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    factors: Mapping[str, LayerFactors],
    spec: FeatureSpec,
    signs: Mapping[str, Spreader],
    loss: Loss,
    batch: SequenceBatch,
) -> tuple[Tensor, Tensor]:
    """Rows [N, D] of a batch of training sequences, and each one's self-influence gᵀ(G + λI)⁻¹g, [N], before it is spread.

    One capture pass; one layer's gradients are in memory at a time.
    """
    made = torch.zeros((len(batch.tokens), spec.row_length), device=batch.tokens.device)
    self_influence = torch.zeros(len(batch.tokens), dtype=torch.float64, device=batch.tokens.device)
    whitening = {name: factor.inverse() ** 0.5 for name, factor in factors.items()}

    def consume(layer: Layer, record: Record) -> None:
        factor = factors[layer.name]
        for rows, rotated in gradient_blocks(record, factor.input_vectors, factor.output_vectors):
            whitened = rotated * whitening[layer.name][rows]
            self_influence.add_(whitened.square().sum((1, 2)))
            signs[layer.name].add(made, rows, whitened)

    capture(model, layers, lambda: loss(model, batch), batch.reached, consume)
    return _mixed(made, spec), self_influence


def query_rows(
    vectors: Mapping[str, Tensor], factors: Mapping[str, LayerFactors], spec: FeatureSpec, signs: Mapping[str, Spreader]
) -> NDArray[np.float32]:
    """Rows [Q, D], in float32, whose inner products with sequences' rows estimate ⟨vector q, gradient⟩ for vectors [Q, O, J].

    Of a vector (G + λI)⁻¹∇f that is the whitened ∇f, shrunk like a row. Layers that are missing leave zeros, so that only the others are searched.
    """
    some = next(iter(vectors.values()))
    made = torch.zeros((len(some), spec.row_length), device=some.device)
    for name, vector in vectors.items():
        signs[name].add(made, slice(None), factors[name].unwhiten(vector))
    return _mixed(made, spec).cpu().numpy()
