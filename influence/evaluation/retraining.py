"""Training on all or part of the training set: the subsets, the training of one model, and the losses of queries under it.

Values to values; knows nothing of files or of who does the work. Legend: N training sequences, Q queries.
"""

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import key_of, keyed_bits, token_losses, true_label_loss
from influence.batches import collate
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

EpochDone = Callable[[int, int, str], None]
"""Called after each epoch with (epochs done, epochs in all, the training loss in words)."""

StepDone = Callable[[int, nn.Module], None]
"""Called after each step with (steps done, the model as it is then)."""


@dataclass(frozen=True, kw_only=True)
class RetrainingSettings:
    """How a model is trained with AdamW. The learning rate rises over `warmup_share` of the steps, then falls to zero, both linearly."""

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    clip_norm: float | None = None  # the largest Euclidean norm of a step's gradient
    similar_lengths: bool = False  # batches of sequences of similar length, or of any

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise RequestError(f"epochs and batch size must be at least 1, not {self.epochs} and {self.batch_size}")
        if not 0 < self.learning_rate < float("inf"):
            raise RequestError(f"the learning rate must be a number above 0, not {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise RequestError(f"the weight decay must be a number from 0, not {self.weight_decay}")
        if not 0 <= self.warmup_share <= 1:
            raise RequestError(f"the share of the steps that warm up must be between 0 and 1, not {self.warmup_share}")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise RequestError(f"the norm that gradients are clipped to must be a number above 0, not {self.clip_norm}")


def random_half(ids: Sequence[str], subset: int) -> NDArray[np.bool_]:
    """[N]: which sequences are in the random half of number `subset`; drawn from their ids and that number alone. An odd one is left out."""
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[random_order(ids, f"half {subset}")[: len(ids) // 2]] = True
    return mask


def random_order(ids: Sequence[str], name: str) -> NDArray[np.int64]:
    """[N]: the numbers of the sequences in a random order that depends on their ids and the order's name alone."""
    keys = np.array([key_of(identifier) for identifier in ids], dtype=np.uint64)
    return np.argsort(keyed_bits(key_of(name), keys, 1)[:, 0], kind="stable")


def mask_name(mask: NDArray[np.bool_]) -> str:
    """A name for the set of sequences: the beginning of its sha256."""
    return hashlib.sha256(len(mask).to_bytes(8, "little") + np.packbits(mask).tobytes()).hexdigest()[:16]


def fine_tuned(
    base: nn.Module,
    sequences: Sequence[TrainingSequence],
    settings: RetrainingSettings,
    seed: int,
    *,
    left_out: Collection[int] = (),
    epoch_done: EpochDone = lambda done, total, note: None,
    step_done: StepDone = lambda done, model: None,
) -> nn.Module:
    """A copy of `base` trained on `sequences`: in each step on the mean loss over the counted tokens of a batch, each sequence's times its
    weight.

    `seed` governs the order of the batches, and dropout where the model has any; torch's random state is left as it was. Those `left_out`, places in
    `sequences`, are missing from the batches that there would be with them: all else stays as it was, so that two such models differ by what was left
    out and not by the order of what was not.
    """
    model = copy.deepcopy(base).requires_grad_(True)
    device, missing = next(model.parameters()).device, frozenset(left_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    rates = learning_rates(settings, len(sequences))
    steps_per_epoch = len(rates) // settings.epochs
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed seeds the GPUs too
        torch.manual_seed(seed)
        model.train()
        losses = torch.zeros((), device=device)
        for step, places in enumerate(_batches([len(sequence.tokens) for sequence in sequences], settings, seed)):
            if kept := [sequences[place] for place in places if place not in missing]:
                for group in optimizer.param_groups:
                    group["lr"] = rates[step]
                batch = collate(kept, device)
                optimizer.zero_grad(set_to_none=True)
                loss = true_label_loss(model, batch) / batch.counted.sum()
                loss.backward()  # type: ignore[no-untyped-call]
                if settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
                optimizer.step()
                losses += loss.detach()
            step_done(step + 1, model)
            if (step + 1) % steps_per_epoch == 0:
                note = f"training loss {losses.item() / steps_per_epoch:.2f} nats a token"
                epoch_done((step + 1) // steps_per_epoch, settings.epochs, note)
                losses.zero_()
    return model.eval()


def _batches(lengths: Sequence[int], settings: RetrainingSettings, seed: int) -> Iterator[list[int]]:
    """The places of every sequence once in each epoch, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = similar_batches if settings.similar_lengths else shuffled_batches
    for _ in range(settings.epochs):
        yield from order(lengths, settings.batch_size, generator)


def shuffled_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Every place once, in random order."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def similar_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Every place once, in batches of similar length, in random order; places of equal length are mixed anew each time."""
    noise = torch.rand(len(lengths), generator=generator).tolist()
    places = sorted(range(len(lengths)), key=lambda place: lengths[place] + 4 * noise[place])
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]


def learning_rates(settings: RetrainingSettings, num_sequences: int) -> list[float]:
    """Of each step."""
    num_steps = settings.epochs * -(-num_sequences // settings.batch_size)
    return [settings.learning_rate * _schedule(step, num_steps, settings.warmup_share) for step in range(num_steps)]


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
