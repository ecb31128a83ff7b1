"""Gradients of training sequences that were candidates before, kept in memory: scoring one again is a product of vectors, and no pass of the model.

Of use where many queries are asked of a small model. Knows layers and sequences; nothing of queries, runs or requests.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekfac import Layer, Record, SequenceBatch, capture, gradient_blocks, true_label_loss
from influence.attribution import AttributedModel, Parts, scan_parts
from influence.batches import in_batches
from influence.sequences import SequenceStore


class KeptGradients:
    """The gradients over all of these layers of the sequences that were scored last, as many as `limit_bytes` hold; none until it is set.

    For one thread. Scores equal those of `scan_parts` but for the last digits, whether a gradient was kept or not.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
        self._layers = tuple(layers)
        self._ends = np.cumsum(sizes).tolist()
        self.limit_bytes = 0
        self.num_bytes = 0  # of what is kept at this moment
        self._kept: OrderedDict[int, Tensor] = OrderedDict()  # number of the sequence → [P]; the least recently used first

    def limit(self, limit_bytes: int) -> None:
        """Keeps no more than that from now on."""
        self.limit_bytes = limit_bytes
        self._make_room(0)

    def scores(self, parts: Parts, store: SequenceStore, numbers: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """⟨vector q, gradient of the sequence of that number⟩ summed over layers, [Q, len(numbers)], where it is `wanted`; elsewhere anything.

        Nothing is kept where the gradients of all these sequences are more than the limit, and of vectors over some of the layers, or on a GPU, whose
        memory is dearer than its passes.
        """
        alone = next(iter(parts)) if len(parts) == 1 else None
        if alone is None or alone[0].layers != self._layers or alone[0].device.type != "cpu":
            return scan_parts(parts, store.select(numbers))
        attributed, by_layer = alone
        dtype = reduce(torch.promote_types, [vector.dtype for vector in by_layer.values()])
        if len(numbers) * self._ends[-1] * dtype.itemsize > self.limit_bytes:
            return scan_parts(parts, store.select(numbers))
        vectors = torch.cat([by_layer[layer.name].to(dtype).flatten(1) for layer in self._layers], 1)
        scores = np.zeros((len(vectors), len(numbers)))
        known = [place for place, number in enumerate(numbers) if number in self._kept]
        new = [place for place, number in enumerate(numbers) if number not in self._kept]
        for place in known:
            self._kept.move_to_end(numbers[place])
            _multiply(vectors, self._kept[numbers[place]], wanted[:, place], scores[:, place])
        budget = attributed.budget.beside(2 * len(scores), attributed.layers)
        for members, batch in in_batches(store.select([numbers[place] for place in new]), budget, attributed.device):
            self._make_room(len(members) * self._ends[-1] * dtype.itemsize)
            gradients = self._gradients(attributed, batch, dtype)
            for place, gradient in zip([new[member] for member in members], gradients, strict=True):
                _multiply(vectors, gradient, wanted[:, place], scores[:, place])
                self._kept[numbers[place]] = gradient
                self.num_bytes += gradient.nbytes
        return scores

    def _make_room(self, num_bytes: int) -> None:
        while self._kept and self.num_bytes + num_bytes > self.limit_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _of_layers(self, gradient: Tensor) -> Iterator[tuple[Layer, Tensor]]:
        """Each layer with its share of the last axis."""
        for layer, first, end in zip(self._layers, [0, *self._ends[:-1]], self._ends, strict=True):
            yield layer, gradient[..., first:end]

    def _gradients(self, attributed: AttributedModel, batch: SequenceBatch, dtype: torch.dtype) -> list[Tensor]:
        """[P] for each sequence of the batch, each with memory of its own, that one can go without the others."""
        found = [torch.zeros(self._ends[-1], dtype=dtype) for _ in range(len(batch.tokens))]
        shares = [{layer.name: share.view(layer.shape) for layer, share in self._of_layers(one)} for one in found]

        def consume(layer: Layer, record: Record) -> None:
            for rows, block in gradient_blocks(record):
                for share, gradient in zip(shares, block, strict=True):
                    share[layer.name][rows] = gradient.to(dtype)

        capture(attributed.model, attributed.layers, partial(true_label_loss, attributed.model, batch), batch.reached, consume)
        return found


def _multiply(vectors: Tensor, gradient: Tensor, wanted: NDArray[np.bool_], scores: NDArray[np.float64]) -> None:
    """Sets the wanted ones of `scores` [Q] to the products of the vectors [Q, P] with the gradient [P].

    One by one: a gradient is read once for each query that wants it and copied nowhere, for memory is slower than the products.
    """
    for query in np.flatnonzero(wanted):
        scores[query] = torch.dot(vectors[query], gradient).item()
