"""Batches of sequences of similar length that fit a memory budget.

What a batch costs is estimated from the shapes of model and layers alone, so that the same budget always gives the same batches.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import BLOCK_NUMBERS, Backend, Layer, SequenceBatch, key_of
from ekfac.jax_shapes import padded_positions, padded_sequences
from influence.errors import RequestError
from influence.sequences import TrainingSequence

MAX_TOKENS = {"cpu": 1024, "cuda": 65_536}
"""Larger batches gain nothing on such a device."""

VECTORS_OF_A_BATCH = 32
"""More vectors than this make larger batches worth while."""


@dataclass(frozen=True, kw_only=True)
class BatchCosts:
    """The memory of a batch's activations, logits and per-sequence gradients."""

    bytes_per_token: int
    bytes_per_sequence: int
    padded: bool = False  # to few shapes, as a model of JAX has its batches

    def bytes_of(self, num_tokens: int, num_sequences: int = 1) -> int:
        return num_tokens * self.bytes_per_token + num_sequences * self.bytes_per_sequence


@dataclass(frozen=True, kw_only=True)
class BatchBudget(BatchCosts):
    """How much a batch may hold: its tokens, and the memory of its activations, logits and per-sequence gradients."""

    max_tokens: int
    memory_bytes: int

    def fits(self, num_sequences: int, num_positions: int) -> bool:
        """Whether such a batch may be made; one sequence may, however long, if it fits into memory."""
        if self.padded:
            num_sequences, num_positions = padded_sequences(num_sequences), padded_positions(num_positions)
        tokens = num_sequences * num_positions
        return (num_sequences == 1 or tokens <= self.max_tokens) and self.bytes_of(tokens, num_sequences) <= self.memory_bytes

    def beside(self, num_vectors: int, layers: Sequence[Layer]) -> "BatchBudget":
        """What is left for batches beside so many vectors over the layers.

        Products of many vectors with few gradients at once are bound by reading the vectors, so batches grow with the number of vectors.
        """
        taken = 4 * num_vectors * sum(layer.shape[0] * layer.shape[1] for layer in layers)
        return replace(
            self,
            max_tokens=self.max_tokens * min(4, max(1, num_vectors // VECTORS_OF_A_BATCH)),
            memory_bytes=max(self.memory_bytes - taken, self.memory_bytes // 8),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryUse(BatchCosts):
    """What a worker holds, estimated from shapes: the model, factors of its layers, and what a batch takes."""

    layers: tuple[Layer, ...]
    model_bytes: int

    def smallest(self, sequence_length: int) -> int:
        """What the worker needs when layers are worked on one by one, in batches of one sequence."""
        return self.model_bytes + max(factor_bytes([layer]) for layer in self.layers) + self.bytes_of(sequence_length)


def memory_use(layers: Sequence[Layer], model_bytes: int, vocabulary: int, *, padded: bool = False) -> MemoryUse:
    """The memory of a model with these layers.

    Counted are records of all layers twice over: a model of JAX has them all at once, beside what its backward pass needs; for others it is what
    autograd keeps.
    """
    width = sum(_numbers_per_token(layer) for layer in layers)
    return MemoryUse(
        layers=tuple(layers),
        model_bytes=model_bytes,
        bytes_per_token=4 * (2 * width + 4 * vocabulary),
        bytes_per_sequence=4 * 3 * max(min(layer.shape[0] * layer.shape[1], BLOCK_NUMBERS) for layer in layers),
        padded=padded,
    )


def model_memory(model: nn.Module, layers: Sequence[Layer]) -> MemoryUse:
    """`memory_use` of this model, which may be one without weights."""
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return memory_use(layers, model_bytes, int(getattr(model.config, "vocab_size", 0)), padded=isinstance(model, Backend))


def layer_groups(use: MemoryUse, memory_budget: int, sequence_length: int, device: str) -> list[tuple[Layer, ...]]:
    """The layers in their order, in as few groups as have factors that fit beside the model and a batch; one group where all of them do.

    A batch may be full, as far as it takes no more than a quarter of the memory beside the model, and holds one sequence at least.
    """
    left = memory_budget - use.model_bytes
    room = left - max(use.bytes_of(sequence_length), min(use.bytes_of(MAX_TOKENS[device]), left // 4))
    groups: list[list[Layer]] = []
    used, held = 0, set[str]()
    for layer in use.layers:
        used += _factor_bytes(layer, held)
        if not groups or used > room:
            groups.append([])
            held = set()
            used = _factor_bytes(layer, held)
        groups[-1].append(layer)
    return [tuple(group) for group in groups]


def batch_budget(use: MemoryUse, memory_budget: int, sequence_length: int, device: str) -> BatchBudget:
    """The budget for batches beside the model and the factors of any group of the layers, on a device of this type.

    Raises RequestError when not even one sequence fits, with the budget that would do.
    """
    if use.smallest(sequence_length) > memory_budget:
        raise RequestError(
            "resources.memory_budget is too small: the model, the factors of its largest layer and one sequence need "
            f"{-(-use.smallest(sequence_length) // 2**20):,} MiB (--memory-budget raises it; factors.layers leaves layers out)"
        )
    return budget_beside(use, layer_groups(use, memory_budget, sequence_length, device), memory_budget, device)


def budget_beside(use: MemoryUse, groups: Sequence[Sequence[Layer]], memory_budget: int, device: str) -> BatchBudget:
    """What is left for a batch beside the model and the factors of the largest group; nothing, where the memory does not suffice."""
    return BatchBudget(
        max_tokens=MAX_TOKENS[device],
        memory_bytes=memory_budget - use.model_bytes - max(map(factor_bytes, groups)),
        bytes_per_token=use.bytes_per_token,
        bytes_per_sequence=use.bytes_per_sequence,
        padded=use.padded,
    )


def factor_bytes(layers: Sequence[Layer]) -> int:
    """Eigenvectors or covariances, and for every weight either its sum of squares, or its corrected eigenvalue, its inverse, its whitening and
    the vectors of one query."""
    held: set[str] = set()
    return sum(_factor_bytes(layer, held) for layer in layers)


def _factor_bytes(layer: Layer, held: set[str]) -> int:
    """What the layer adds to those that share a side with it, whose names are in `held`, to which it adds its own."""
    outputs, inputs = layer.shape
    sizes = {
        "linear": {layer.output_name: outputs, layer.input_name: inputs},
        "embedding": {layer.input_name: inputs},
        "grouped": {layer.input_name: inputs},
        "scale": {},
    }[layer.kind]
    square = sum(size**2 for name, size in sizes.items() if name not in held)
    held |= {str(name) for name in sizes} if layer.is_block else set()
    return 20 * outputs * inputs + 8 * square


def covariance_sizes(layers: Iterable[Layer]) -> dict[str, int]:
    """The size of every covariance, by the names that layers give them; what several layers share is there once."""
    sizes = {}
    for layer in layers:
        outputs, inputs = layer.shape
        if layer.input_name:
            sizes[layer.input_name] = inputs
        if layer.output_name:
            sizes[layer.output_name] = outputs
    return sizes


def queries_at_once(budget: BatchBudget, layers: Sequence[Layer], copies: int = 1) -> int:
    """How many queries' vectors over these layers fit beside a full batch; `copies` says how many vectors each of them needs.

    While one layer is preconditioned, three more of its size are in memory; `solve` needs less.
    """
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    batch = min(budget.memory_bytes // 2, budget.bytes_of(budget.max_tokens))
    return max(1, (budget.memory_bytes - batch) // (4 * (copies * sum(sizes) + 3 * max(sizes))))


def _numbers_per_token(layer: Layer) -> int:
    """Of its record and its rotation; of an expert, on average over the tokens."""
    outputs, inputs = layer.unshared if layer.is_block else (layer.outputs, layer.inputs)
    numbers = {
        "linear": inputs + 3 * outputs,
        "embedding": 4 * layer.inputs,
        "grouped": layer.shape[0] * layer.shape[1],
        "scale": 4 * layer.outputs,
    }[layer.kind]
    return math.ceil(layer.routed * numbers)


def in_batches(
    sequences: Sequence[TrainingSequence], budget: BatchBudget, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], SequenceBatch]]:
    """(places in `sequences`, batch) over all of them, the longest first."""
    order = sorted(range(len(sequences)), key=lambda place: (-len(sequences[place].tokens), place))
    group: list[int] = []
    for place in order:
        if group and not budget.fits(len(group) + 1, len(sequences[group[0]].tokens)):
            yield np.array(group), collate([sequences[member] for member in group], device)
            group = []
        group.append(place)
    if group:
        yield np.array(group), collate([sequences[member] for member in group], device)


def collate(sequences: Sequence[TrainingSequence], device: torch.device) -> SequenceBatch:
    """One batch, padded on the right with token 0."""
    length = max(len(sequence.tokens) for sequence in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int64)
    counted = np.zeros((len(sequences), length), dtype=np.bool_)
    for place, sequence in enumerate(sequences):
        tokens[place, : len(sequence.tokens)] = sequence.tokens
        counted[place, : len(sequence.tokens)] = sequence.counted
    keys = np.array([key_of(sequence.id) for sequence in sequences], dtype=np.uint64)
    weights = [sequence.weight for sequence in sequences]
    return SequenceBatch(
        tokens=torch.from_numpy(tokens),
        counted=torch.from_numpy(counted),
        keys=keys,
        segments=_segments(sequences, length),
        weights=None if set(weights) == {1.0} else torch.tensor(weights, dtype=torch.float64),
    ).to(device)


def _segments(sequences: Sequence[TrainingSequence], length: int) -> torch.Tensor | None:
    """[N, length]: the number of each token's document within its sequence, padding being one more; None where attention knows no documents."""
    if all(sequence.starts is None for sequence in sequences):
        return None
    begins = np.zeros((len(sequences), length), dtype=np.int64)
    for place, sequence in enumerate(sequences):
        begins[place, [] if sequence.starts is None else sequence.starts] = 1
        begins[place, len(sequence.tokens) : len(sequence.tokens) + 1] = 1
    return torch.from_numpy(begins.cumsum(1))
