"""A sequence's row: its gradient, whitened in the eigenbasis, shrunk and spread by sparse random signs into buckets, layer by layer; mixed or not.

The inner product of two whitened gradients is their damped influence; the inner product of two rows estimates it, with a variance of about
‖x‖²‖y‖² / buckets a layer, from all the coordinates that share a bucket. Coordinates whose curvature Λ is small beside the damping λ add to
that variance as much as they have norm, and to the answer little: each is multiplied by √(Λ/(Λ+λ)), in rows and queries alike, which is what
the best linear estimate tends to when noise prevails. Every layer has its own range of buckets, in proportion to the squared norm that is left,
which minimises the variance and lets some layers be searched alone. The buckets of a range are mixed by a Hartley transform, which is
orthogonal: rows of a few large numbers, as of embeddings, become even, and lose less when they are rounded to signs. Sparse rows, of which the
largest numbers are kept, are not mixed, and have so many buckets that in a small model each coordinate has its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekfac import BLOCK_NUMBERS, Layer, LayerFactors, Loss, Record, Rows, SequenceBatch, capture, gradient_blocks, key_of, keyed_bits


@dataclass(frozen=True, kw_only=True)
class LayerBuckets:
    """Where one layer's whitened gradient [O, J] goes in a row: `width` buckets from `start` on."""

    name: str
    shape: tuple[int, int]
    start: int
    width: int


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """How rows are made: each layer's buckets, the seed of the random signs, and whether a layer's buckets are mixed, until they are even."""

    layers: tuple[LayerBuckets, ...]
    seed: int
    mixed: bool = True

    @property
    def row_length(self) -> int:
        return sum(layer.width for layer in self.layers)


def feature_spec(layers: Sequence[Layer], row_weights: Mapping[str, float], row_length: int, seed: int, mixed: bool = True) -> FeatureSpec:
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
    return FeatureSpec(layers=tuple(buckets), seed=seed, mixed=mixed)


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
    """Whitens, shrinks and spreads one layer's gradients, given in the eigenbasis: each coordinate goes to one bucket, with a random sign.

    Coordinate (o, j) goes to bucket (o · stride + j) mod width, so that spreading is a sum over stretches of memory. The stride is the layer's J or
    a little more, such that a column's coordinates are spread evenly over all buckets: gradients have some heavy columns. A layer with as many
    buckets as coordinates is neither shrunk nor spread, so that nothing is approximated. Signs depend on (seed, layer name, coordinate) alone.
    """

    def __init__(self, buckets: LayerBuckets, spec: FeatureSpec, factor: LayerFactors) -> None:
        outputs, inputs = buckets.shape
        self.mixed = spec.mixed
        self.start, self.width = buckets.start, buckets.width
        self.exact = buckets.width == outputs * inputs
        self.stride = _stride(inputs, buckets.width)
        self.inverse = factor.inverse()
        self.weights = self.inverse.sqrt()
        if not (self.exact and self.mixed):
            self.weights *= factor.retained().sqrt()
        if not self.exact:
            for rows, signs in _random_signs(buckets, spec.seed):
                self.weights[rows] *= signs.to(self.weights.device)
        self.weights = self.weights.float()

    def nothing(self, count: int) -> Tensor:
        """The layer's range of `count` rows, [N, width], before anything is added to it."""
        return torch.zeros((count, self.width), device=self.weights.device)

    def add(self, own: Tensor, rows: Rows, gradients: Tensor) -> None:
        """Adds these rows of gradients in the eigenbasis, [N, rows, J], to the layer's range of rows, [N, width]."""
        weights = self.weights[rows]
        if self.exact:
            own.view(-1, *self.weights.shape)[:, rows] += gradients.to(own.dtype) * weights
        elif isinstance(rows, slice):
            at_once = max(1, FOLDED_NUMBERS[own.is_cpu] // weights.numel())
            for some, made in zip(torch.split(gradients, at_once), torch.split(own, at_once), strict=True):
                made += self._folded(some, weights, rows.start or 0)
        else:
            places = (rows[:, None] * self.stride + torch.arange(weights.shape[1], device=rows.device)) % self.width
            own.index_add_(1, places.flatten(), (gradients.to(own.dtype) * weights).flatten(1))

    def place(self, own: Tensor, made: Tensor) -> None:
        """Writes the layer's finished range into rows [N, D]: its Hartley transform Re F - Im F, F the orthonormal Fourier transform, if mixed."""
        if not self.mixed:
            made[:, self.start : self.start + self.width] = own
            return
        spectrum = torch.fft.fft(own, norm="ortho")
        made[:, self.start : self.start + self.width] = spectrum.real - spectrum.imag

    def _folded(self, gradients: Tensor, weights: Tensor, first_row: int) -> Tensor:
        """Consecutive rows, weighted, laid out one `stride` after another, and cut into stretches of `width` that are summed: [N, width]."""
        (count, outputs, inputs), before = gradients.shape, first_row * self.stride % self.width
        stretches = -(-(before + outputs * self.stride) // self.width)
        laid_out = weights.new_zeros((count, stretches * self.width))
        places = laid_out[:, before : before + outputs * self.stride].view(count, outputs, self.stride)[:, :, :inputs]
        torch.mul(gradients.to(weights.dtype), weights, out=places)
        return laid_out.view(count, stretches, self.width).sum(1)


def _random_signs(buckets: LayerBuckets, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, [rows, J] of 1 and -1), some rows at a time: their bits take many times the memory of the signs."""
    (outputs, inputs), key = buckets.shape, np.array([key_of(buckets.name)], dtype=np.uint64)
    at_once = max(1, BLOCK_NUMBERS // inputs)
    for first in range(0, outputs, at_once):
        rows = slice(first, min(first + at_once, outputs))
        bits = keyed_bits(seed, key, (rows.stop - first) * inputs, first * inputs)
        yield rows, torch.from_numpy(np.where(bits & np.uint64(1), np.float32(1), np.float32(-1)).reshape(-1, inputs))


FOLDED_NUMBERS = {True: 2**20, False: 2**26}
"""About so many numbers of gradients are spread at once, on a CPU or not: on one those that its cache holds."""


def _stride(inputs: int, width: int) -> int:
    """The length, from `inputs` to an eighth more, whose multiples modulo `width` are spread most evenly: the ratio is near the golden one."""

    def unevenness(stride: int) -> float:
        ratio = max(width / stride, stride / width) % 1
        return min(abs(ratio - (5**0.5 - 1) / 2), abs(ratio - (3 - 5**0.5) / 2))

    return min(range(inputs, inputs + inputs // 8 + 1), key=unevenness)


def spreaders(spec: FeatureSpec, factors: Mapping[str, LayerFactors]) -> dict[str, Spreader]:
    """The `Spreader` of every layer that has factors, by layer name, on their device."""
    return {buckets.name: Spreader(buckets, spec, factors[buckets.name]) for buckets in spec.layers if buckets.name in factors}


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

    Both are sums over layers: those of some layers, with zeros for the others, and those of the rest add up to those of all. One capture pass; one
    layer's gradients are in memory at a time.
    """
    made = torch.zeros((len(batch.tokens), spec.row_length), device=batch.tokens.device)
    self_influence = torch.zeros(len(batch.tokens), dtype=torch.float64, device=batch.tokens.device)

    def consume(layer: Layer, record: Record) -> None:
        factor, spreader = factors[layer.name], signs[layer.name]
        own, influence = spreader.nothing(len(made)), torch.zeros(len(made), dtype=torch.float64, device=spreader.weights.device)
        for rows, rotated in gradient_blocks(record, factor.input_vectors, factor.output_vectors):
            if rotated.shape[1] == 0:  # of an expert that no token reached
                continue
            spreader.add(own, rows, rotated)
            for n, gradient in enumerate(rotated):
                influence[n] += gradient.square_().flatten() @ spreader.inverse[rows].flatten()
        spreader.place(own, made)
        self_influence.add_(influence.to(self_influence.device))

    capture(model, layers, lambda: loss(model, batch), batch.reached, consume)
    return made, self_influence


def query_rows(gradients: Mapping[str, Tensor], spec: FeatureSpec, signs: Mapping[str, Spreader]) -> NDArray[np.float32]:
    """Rows [Q, D], in float32, of measurements' gradients [Q, O, J] in the eigenbasis.

    Their inner products with sequences' rows estimate ∇fᵀ(G + λI)⁻¹∇L. Layers that are missing leave zeros, so that only the others are searched;
    rows of some layers and rows of the others add up.
    """
    some = next(iter(gradients.values()))
    made = torch.zeros((len(some), spec.row_length), device=some.device)
    for name, gradient in gradients.items():
        own = signs[name].nothing(len(made))
        signs[name].add(own, slice(None), gradient)
        signs[name].place(own, made)
    return made.cpu().numpy()
