"""Batches of sequences of similar length that fit a memory budget.

What a batch costs is estimated from the shapes of model and layers alone, so that the same budget always gives the same batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import BLOCK_NUMBERS, Layer, SequenceBatch, key_of
from influence.errors import RequestError
from influence.sequences import TrainingSequence

MAX_TOKENS = {"cpu": 1024, "cuda": 65_536}
"""Larger batches gain nothing on such a device."""


@dataclass(frozen=True, kw_only=True)
class BatchBudget:
    """How much a batch may hold: its tokens, and the memory of its activations, logits and per-sequence gradients."""

    max_tokens: int
    memory_bytes: int
    bytes_per_token: int
    bytes_per_sequence: int

    def fits(self, num_sequences: int, num_positions: int) -> bool:
        tokens = num_sequences * num_positions
        return tokens <= self.max_tokens and tokens * self.bytes_per_token + num_sequences * self.bytes_per_sequence <= self.memory_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a worker holds beside a batch, and what a batch adds to it, estimated from shapes."""

    resident_bytes: int
    """The model, the factors of its layers, and what makes rows of them."""
    bytes_per_token: int
    bytes_per_sequence: int

    def smallest(self, sequence_length: int) -> int:
        """What the worker needs when batches are of one sequence."""
        return self.resident_bytes + sequence_length * self.bytes_per_token + self.bytes_per_sequence


def memory_use(layers: Sequence[Layer], parameter_bytes: int, vocabulary: int) -> MemoryUse:
    """The memory of a model with these layers, all of whose factors are held at once."""
    width = sum(_numbers_per_token(layer) for layer in layers)
    return MemoryUse(
        resident_bytes=parameter_bytes + sum(_factor_bytes(layer) for layer in layers),
        bytes_per_token=4 * (2 * width + 4 * vocabulary),
        bytes_per_sequence=4 * 3 * max(min(layer.shape[0] * layer.shape[1], BLOCK_NUMBERS) for layer in layers),
    )


def model_memory(model: nn.Module, layers: Sequence[Layer]) -> MemoryUse:
    """`memory_use` of this model, which may be one without weights."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return memory_use(layers, parameters, int(getattr(model.config, "vocab_size", 0)))


def batch_budget(model: nn.Module, layers: Sequence[Layer], memory_budget: int, sequence_length: int) -> BatchBudget:
    """The budget for batches beside the model, its factors and what makes rows of them.

    Raises RequestError when not even one sequence fits, with the budget that would do.
    """
    use = model_memory(model, layers)
    if use.smallest(sequence_length) > memory_budget:
        raise RequestError(
            f"resources.memory_budget is too small: the model, its factors and one sequence need {-(-use.smallest(sequence_length) // 2**20):,} MiB "
            "(--memory-budget raises it; factors.layers leaves layers out)"
        )
    return budget_beside(use, memory_budget, next(model.parameters()).device.type)


def budget_beside(use: MemoryUse, memory_budget: int, device: str) -> BatchBudget:
    """What is left for a batch on a device of this type."""
    return BatchBudget(
        max_tokens=MAX_TOKENS[device],
        memory_bytes=memory_budget - use.resident_bytes,
        bytes_per_token=use.bytes_per_token,
        bytes_per_sequence=use.bytes_per_sequence,
    )


def _numbers_per_token(layer: Layer) -> int:
    """Of its record and its rotation."""
    return {"linear": layer.inputs + 3 * layer.outputs, "embedding": 4 * layer.inputs, "scale": 4 * layer.outputs}[layer.kind]


def _factor_bytes(layer: Layer) -> int:
    """Eigenvectors, and for every weight its corrected eigenvalue, its whitening, and the bucket and sign of its place in a row."""
    outputs, inputs = layer.shape
    sides = {"linear": outputs**2 + inputs**2, "embedding": inputs**2, "scale": 0}[layer.kind]
    return 8 * sides + 20 * outputs * inputs


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
    return SequenceBatch(tokens=torch.from_numpy(tokens), counted=torch.from_numpy(counted), keys=keys).to(device)
