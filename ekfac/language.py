"""Language-model losses over batches of token sequences, with true labels or labels drawn from the model itself.

A sequence's loss is the cross-entropy summed over its counted tokens. Drawn labels make the Gauss-Newton Hessian out of squared
gradients (Grosse et al. 2023, section 2.2); the draw for a token depends on (seed, sequence key, position) alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekfac.hashing import keyed_uniforms


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Sequences padded on the right. No attention mask is kept: a causal model's counted positions never see what comes after them.

    Where sequences are packed and attention stays within documents, `segments` numbers them from 0 on in each sequence, and padding like one more;
    the model is told by positions that begin at 0 with each, which is how transformers' models take packed sequences apart.
    """

    tokens: Tensor  # [N, T] int64
    counted: Tensor  # [N, T] bool: this token's log-probability given the tokens before it is part of the loss; never the first
    keys: NDArray[np.uint64]  # [N]: sequence keys, from `key_of` their ids
    segments: Tensor | None = None  # [N, T] int64, ascending in steps of one; None where attention reaches back to the beginning
    weights: Tensor | None = None  # [N], at least 0: of each sequence's loss in the training loss; None where all are 1

    def __post_init__(self) -> None:
        if bool(self.counted[:, 0].any()):
            raise ValueError("the first token of a sequence cannot be counted: nothing before it predicts it")

    @property
    def reached(self) -> Tensor:
        """[N, T] bool: the positions that the loss reaches, those before the last counted token: with segments, before a token that is predicted
        in their own."""
        predicts = torch.cat([self.counted[:, 1:], torch.zeros_like(self.counted[:, :1])], 1)
        later = _sums_from(predicts.long())
        if self.segments is None:
            return later > 0
        of_segment = torch.zeros_like(later).scatter_add(1, self.segments, predicts.long())
        return later > (_sums_from(of_segment) - of_segment).gather(1, self.segments)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        given: dict[str, Any] = {"input_ids": self.tokens, "use_cache": False}
        return given if self.segments is None else {**given, "position_ids": _positions(self.segments)}

    def to(self, device: torch.device) -> "SequenceBatch":
        return SequenceBatch(
            tokens=self.tokens.to(device),
            counted=self.counted.to(device),
            keys=self.keys,
            segments=None if self.segments is None else self.segments.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )


def _sums_from(values: Tensor) -> Tensor:
    """[N, T]: the sum of each row's values from each place on."""
    return values.flip(1).cumsum(1).flip(1)


def _positions(segments: Tensor) -> Tensor:
    """[N, T]: the number of each position within its segment."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.diff(segments, prepend=segments[:, :1] - 1) != 0
    return places - (places * begins).cummax(1).values


Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the loss summed over the batch's sequences, a scalar with a graph."""


def true_label_loss(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Cross-entropy of the counted tokens, each sequence's times its weight, summed over the batch, in nats."""
    return weighted(token_losses(model, batch), batch).sum()


def weighted(losses: Tensor, batch: SequenceBatch) -> Tensor:
    """[N, T]: the losses of tokens, each times its sequence's weight."""
    return losses if batch.weights is None else losses * batch.weights.to(losses)[:, None]


def sequence_weights(batch: SequenceBatch) -> Tensor | None:
    """[N]: the weights of language-model batches."""
    return batch.weights


def token_losses(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """[N, T]: minus each counted token's log-probability in nats, zero at the others; weights make no difference."""
    return losses_by(model(**batch.inputs).logits, batch)


def losses_by(logits: Tensor, batch: SequenceBatch) -> Tensor:
    """`token_losses`, by these logits [N, T, V]."""
    return _losses_of(batch.tokens.roll(-1, 1), _log_probabilities(logits), batch.counted)


def _log_probabilities(logits: Tensor) -> Tensor:
    """[N, T, V]: at all positions, as to choose those before counted tokens costs more than it saves."""
    return torch.log_softmax(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=-1)


def _losses_of(following: Tensor, log_probabilities: Tensor, counted: Tensor) -> Tensor:
    """[N, T]: minus each counted token's log-probability, zero at the others, where `following` is the token after each position."""
    chosen = log_probabilities.gather(2, following[:, :, None])[:, :, 0].roll(1, 1)
    return torch.where(counted, -chosen, torch.zeros_like(chosen))


def at_each_counted(values: Tensor, batch: SequenceBatch) -> Tensor:
    """[M]: the sequences' values [N] at each of the M counted tokens, in row-major order."""
    return values[:, None].expand(batch.counted.shape)[batch.counted]


def drawn_label_loss(seed: int) -> Loss:
    """The same loss with every counted token replaced by one drawn from the model's own prediction of it, times the root of the sequence's weight.

    Squares of its gradients are those of the loss times the weight, as the Hessian of the weighted loss is.
    """

    def loss(model: nn.Module, batch: SequenceBatch) -> Tensor:
        log_probabilities = _log_probabilities(model(**batch.inputs).logits)
        uniforms = torch.from_numpy(keyed_uniforms(seed, batch.keys, batch.tokens.shape[1])).to(batch.tokens.device)
        drawn = _draw(log_probabilities.detach().flatten(0, 1), uniforms.roll(-1, 1).flatten())
        losses = _losses_of(drawn.view_as(batch.tokens), log_probabilities, batch.counted)
        return (losses if batch.weights is None else losses * batch.weights.sqrt().to(losses)[:, None]).sum()

    return loss


def _draw(log_probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: the first label whose cumulative probability exceeds uniform × total, [M] of [M, V].

    Cumulative sums of a few labels at a time, and within those that hold the label: of all labels they cost as much as the logits themselves.
    """
    probabilities, count = log_probabilities.exp(), log_probabilities.shape[1]
    stretch = max(1, math.isqrt(count))
    whole = count // stretch * stretch
    sums = torch.cat(
        [probabilities[:, :whole].reshape(-1, whole // stretch, stretch).sum(2), probabilities[:, whole:].sum(1, keepdim=True)], dim=1
    )
    before, left = _first_beyond(sums, uniforms.to(sums.dtype) * sums.sum(1))
    members = before[:, None] * stretch + torch.arange(stretch, device=sums.device)
    within = probabilities.gather(1, members.clamp(max=count - 1))
    found, _ = _first_beyond(within, left)
    return (before * stretch + found).clamp_(max=count - 1)


def _first_beyond(values: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """(the first place of each row up to which its values add up to more than the threshold, what the values before it leave of the threshold)."""
    cumulative = values.cumsum(1)
    places = torch.searchsorted(cumulative, thresholds[:, None], right=True).clamp_(max=values.shape[1] - 1)
    return places[:, 0], thresholds - (cumulative - values).gather(1, places)[:, 0]
