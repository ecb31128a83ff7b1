"""The tail patch: what one step of training on the sequences that a method ranks first does to a query, after Chang et al. 2024 (arXiv 2410.17413).

Values to values; knows nothing of files. Legend: N training sequences, Q queries.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import token_losses
from influence.batches import collate
from influence.errors import RequestError
from influence.evaluation.changes import RANDOM, Change, compared, first_of, random_set
from influence.evaluation.retraining import query_losses
from influence.measurement import Measurement
from influence.sequences import SequenceStore, TrainingSequence
from influence.solving import Progress

BATCH_SIZE = 16


def patched(model: nn.Module, sequences: Sequence[TrainingSequence], step_size: float) -> nn.Module:
    """A copy of the model moved by step size × gradient down the mean loss over the counted tokens of the sequences, without dropout."""
    changed = copy.deepcopy(model).requires_grad_(True).eval()
    batch = collate(sequences, next(changed.parameters()).device)
    (token_losses(changed, batch).sum() / batch.counted.sum()).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(changed.parameters(), lr=step_size).step()
    return changed.requires_grad_(False)


def tail_patches(
    model: nn.Module,
    store: SequenceStore,
    measurements: Sequence[Measurement],
    tables: Mapping[str, NDArray[np.float64]],
    sizes: Sequence[int],
    step_size: float,
    num_random: int,
    progress: Progress,
) -> list[Change]:
    """For every size and method's scores [Q, N], and for the mean over `num_random` random sets. Raises RequestError when a step is too long."""
    before = query_losses(model, measurements, BATCH_SIZE)
    num_steps, done = len(sizes) * (len(tables) * len(measurements) + num_random), 0

    def gained(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        nonlocal done
        try:
            after = query_losses(patched(model, store.select(numbers.tolist()), step_size), measurements, BATCH_SIZE)
        except RequestError:
            raise RequestError(f"after a step of size {step_size:g} the model's losses are not finite: lower --step-size") from None
        done += 1
        progress(done, num_steps)
        return before - after

    per_query: dict[tuple[int, str], NDArray[np.float64]] = {}
    for k in sizes:
        for method, scores in tables.items():
            first = first_of(scores, store.ids, k)
            per_query[k, method] = np.array([gained(numbers)[query] for query, numbers in enumerate(first)])
        if num_random:
            per_query[k, RANDOM] = np.mean([gained(random_set(store.ids, draw, k)) for draw in range(num_random)], axis=0)
    return compared(per_query)
