"""What leaving out the sequences that a method ranks first does to a query, once the model is trained without them.

Knows scores and banks; knows nothing of models. Legend: N training sequences, Q queries, S sets of sequences, D draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.evaluation.bank import Bank
from influence.evaluation.changes import RANDOM, Change, compared, first_of, random_set


@dataclass(frozen=True, kw_only=True)
class RemovalPlan:
    """Which models are to be trained. The first sees everything; a set that two rankings agree on is there once."""

    masks: NDArray[np.bool_]  # [S, N]: whether the sequence is trained on
    sets: dict[tuple[int, str], NDArray[np.int64]]  # (k, method) → [Q, D]: rows of the masks, without the k that are first for each query


def removal_plan(tables: Mapping[str, NDArray[np.float64]], ids: Sequence[str], sizes: Sequence[int], num_random: int) -> RemovalPlan:
    """For every size and method's scores [Q, N]; beside them `num_random` random sets of each size, the same for all queries."""
    num_queries = len(next(iter(tables.values())))
    masks: dict[bytes, tuple[int, NDArray[np.bool_]]] = {}

    def without(numbers: NDArray[np.int64]) -> int:
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[numbers] = False
        return masks.setdefault(mask.tobytes(), (len(masks), mask))[0]

    without(np.zeros(0, dtype=np.int64))
    sets: dict[tuple[int, str], NDArray[np.int64]] = {}
    for k in sizes:
        firsts = {method: first_of(scores, ids, k) for method, scores in tables.items()}
        # Query by query, so that of a command that is stopped some queries are done by every method.
        rows = [[without(first[query]) for first in firsts.values()] for query in range(num_queries)]
        sets |= {(k, method): np.array(rows)[:, [place]] for place, method in enumerate(tables)}
        if num_random:
            sets[k, RANDOM] = np.tile([without(random_set(ids, draw, k)) for draw in range(num_random)], (num_queries, 1))
    return RemovalPlan(masks=np.stack([mask for _, mask in masks.values()]), sets=sets)


def random_deviation(plan: RemovalPlan, bank: Bank) -> float | None:
    """The standard deviation, in nats, of a query's log-probability between models without random sets, of one size and seed: the noise of one model.

    None where there are less than two of them.
    """
    rows = [sets[0] for (_, method), sets in plan.sets.items() if method == RANDOM]
    if not rows or len(rows[0]) < 2:
        return None
    variances = [bank.losses[:, own].var(1, ddof=1) for own in rows]  # [R, Q] each
    return float(np.sqrt(np.mean(variances)))


def removal_changes(plan: RemovalPlan, bank: Bank) -> list[Change]:
    """What each removal did: means over seeds and draws, against the models of the same seeds that were trained on everything."""
    gained = -(bank.losses - bank.losses[:, :1]).mean(0)  # [S, Q]
    queries = np.arange(bank.num_queries)[:, None]
    return compared({name: gained[sets, queries].mean(1) for name, sets in plan.sets.items()})
