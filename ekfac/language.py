"""Language-model losses over batches of token sequences, with true labels or labels drawn from the model itself.

A sequence's loss is the cross-entropy summed over its counted tokens. Drawn labels make the Gauss-Newton Hessian out of squared
gradients (Grosse et al. 2023, section 2.2); the draw for a token depends on (seed, sequence key, position) alone.
"""

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
    """Sequences padded on the right. No attention mask is kept: a causal model's counted positions never see what comes after them."""

    tokens: Tensor  # [N, T] int64
    counted: Tensor  # [N, T] bool: this token's log-probability given the tokens before it is part of the loss; never the first
    keys: NDArray[np.uint64]  # [N]: sequence keys, from `key_of` their ids

    def __post_init__(self) -> None:
        if bool(self.counted[:, 0].any()):
            raise ValueError("the first token of a sequence cannot be counted: nothing before it predicts it")

    @property
    def reached(self) -> Tensor:
        """[N, T] bool: the positions that the loss reaches, those before the last counted token."""
        later = self.counted.flip(1).cumsum(1).flip(1)
        return torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], 1) > 0

    def to(self, device: torch.device) -> "SequenceBatch":
        return SequenceBatch(tokens=self.tokens.to(device), counted=self.counted.to(device), keys=self.keys)


Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the loss summed over the batch's sequences, a scalar with a graph."""


def true_label_loss(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Cross-entropy of the counted tokens, summed over the batch, in nats."""
    return token_losses(model, batch).sum()


def token_losses(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """[N, T]: minus each counted token's log-probability in nats, zero at the others."""
    return at_counted(counted_losses(model(input_ids=batch.tokens, use_cache=False).logits, batch), batch)


def counted_losses(logits: Tensor, batch: SequenceBatch) -> Tensor:
    """[M]: minus the log-probability of each of the M counted tokens, in row-major order, by these logits [N, T, V]."""
    return -_counted_log_probabilities(logits, batch).gather(1, batch.tokens[batch.counted][:, None])[:, 0]


def at_counted(values: Tensor, batch: SequenceBatch) -> Tensor:
    """[N, T]: the values [M] at the counted tokens, zero at the others."""
    return torch.zeros_like(batch.tokens, dtype=values.dtype).masked_scatter(batch.counted, values)


def drawn_label_loss(seed: int) -> Loss:
    """The same loss with every counted token replaced by one drawn from the model's own prediction of it."""

    def loss(model: nn.Module, batch: SequenceBatch) -> Tensor:
        log_probabilities = _counted_log_probabilities(model(input_ids=batch.tokens, use_cache=False).logits, batch)
        uniforms = torch.from_numpy(keyed_uniforms(seed, batch.keys, batch.tokens.shape[1]))
        labels = _draw(log_probabilities.detach(), uniforms.to(batch.tokens.device)[batch.counted])
        return -log_probabilities.gather(1, labels[:, None]).sum()

    return loss


def _draw(log_probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: the first label whose cumulative probability exceeds uniform × total."""
    cumulative = log_probabilities.exp().cumsum(1)
    thresholds = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=cumulative.shape[1] - 1)


def _counted_log_probabilities(logits: Tensor, batch: SequenceBatch) -> Tensor:
    """[M, V]: the log-probabilities that logits [N, T, V] give, at the M counted tokens in row-major order, from the positions before them."""
    logits = logits[:, :-1][batch.counted[:, 1:]]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits, dim=-1)
