"""Retraining on part of the training set: the subsets, the fine-tuning of one model, and the losses of queries under it.

Values to values; knows nothing of files or of who does the work. Legend: N training sequences, Q queries.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import SequenceBatch, key_of, keyed_bits, token_losses, true_label_loss
from influence.batches import collate
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.sequences import TrainingSequence


@dataclass(frozen=True, kw_only=True)
class RetrainingSettings:
    """How a model is fine-tuned with AdamW. The learning rate rises over `warmup_share` of the steps, then falls to zero, both linearly."""

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise RequestError(f"epochs and batch size must be at least 1, not {self.epochs} and {self.batch_size}")
        if not 0 < self.learning_rate < float("inf"):
            raise RequestError(f"the learning rate must be a number above 0, not {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise RequestError(f"the weight decay must be a number from 0, not {self.weight_decay}")


def random_half(ids: Sequence[str], subset: int) -> NDArray[np.bool_]:
    """[N]: which sequences are in the random half of number `subset`; drawn from their ids and that number alone. An odd one is left out."""
    keys = np.array([key_of(identifier) for identifier in ids], dtype=np.uint64)
    bits = keyed_bits(key_of(f"half {subset}"), keys, 1)[:, 0]
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[np.argsort(bits, kind="stable")[: len(ids) // 2]] = True
    return mask


def fine_tuned(base: nn.Module, sequences: Sequence[TrainingSequence], settings: RetrainingSettings, seed: int) -> nn.Module:
    """A copy of `base` trained on `sequences`: in each step on the mean loss over the counted tokens of a batch, each sequence's times its weight.

    `seed` governs the order of the batches, and dropout where the model has any; torch's random state is left as it was.
    """
    model = copy.deepcopy(base).requires_grad_(True)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    num_steps = settings.epochs * -(-len(sequences) // settings.batch_size)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed seeds the GPUs too
        torch.manual_seed(seed)
        model.train()
        for step, batch in enumerate(_batches(sequences, settings, seed, device)):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, num_steps, settings.warmup_share)
            optimizer.zero_grad(set_to_none=True)
            (true_label_loss(model, batch) / batch.counted.sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def _batches(
    sequences: Sequence[TrainingSequence], settings: RetrainingSettings, seed: int, device: torch.device
) -> Iterator[SequenceBatch]:
    """Every sequence once in each epoch, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for first in range(0, len(order), settings.batch_size):
            yield collate([sequences[place] for place in order[first : first + settings.batch_size]], device)


def _schedule(step: int, num_steps: int, warmup_share: float) -> float:
    """The share of the learning rate in this step."""
    warmup = max(1.0, warmup_share * num_steps)
    return min((step + 1) / warmup, (num_steps - step) / max(1.0, num_steps - warmup), 1.0)


def query_losses(model: nn.Module, measurements: Sequence[Measurement], batch_size: int) -> NDArray[np.float64]:
    """[Q]: minus each measurement under the model, in nats: the loss summed over its counted tokens. Raises RequestError when one is not finite."""
    device = next(model.parameters()).device
    parts = [(query, weight, sequence) for query, m in enumerate(measurements) for weight, sequence in m.parts]
    losses = np.zeros(len(measurements))
    for first in range(0, len(parts), batch_size):
        group = parts[first : first + batch_size]
        with torch.no_grad():
            sums = token_losses(model, collate([sequence for _, _, sequence in group], device)).double().sum(1)
        for (query, weight, _), loss in zip(group, sums.tolist(), strict=True):
            losses[query] += weight * loss
    if not np.isfinite(losses).all():
        raise RequestError("the retrained model's losses are not finite: training diverged; lower the learning rate")
    return losses
