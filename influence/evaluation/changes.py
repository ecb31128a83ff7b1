"""What acting on the sequences that methods rank first changed, and how far one method moves a query compared with another. Knows arrays only."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.errors import RequestError
from influence.evaluation.intervals import Estimate, mean, ratio
from influence.evaluation.retraining import random_order

RANDOM = "random"
"""What stands in the place of a method where sequences are drawn."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What acting on a method's k sequences changed: f after less f before, in nats, f being a query's log-probability."""

    method: str
    k: int
    per_query: NDArray[np.float64]  # [Q]
    mean: Estimate
    beyond_random: (
        Estimate | None
    )  # less that of acting on as many at random: what all models have in common goes out, the noise of the first too
    as_far_as: dict[str, Estimate]  # by another method: how many times as far this moved f as acting on its k, whichever way

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "k": self.k,
            "change": self.mean.value,
            "interval": None if self.mean.interval is None else list(self.mean.interval),
            "beyond_random": None if self.beyond_random is None else self.beyond_random.to_json(),
            "as_far_as": {method: one.to_json() for method, one in self.as_far_as.items()},
            "per_query": self.per_query.tolist(),
        }


def compared(per_query: Mapping[tuple[int, str], NDArray[np.float64]]) -> list[Change]:
    """The changes [Q] by (k, method), each beside the others of its k."""
    found = []
    for (k, method), values in per_query.items():
        ratios = {other: ratio(values, theirs) for (size, other), theirs in per_query.items() if size == k and other != method}
        far = {other: one for other, one in ratios.items() if one is not None}
        drawn = per_query.get((k, RANDOM)) if method != RANDOM else None
        beyond = None if drawn is None else mean(values - drawn)
        found.append(Change(method=method, k=k, per_query=values, mean=mean(values), beyond_random=beyond, as_far_as=far))
    return found


def sizes_of(texts: Sequence[str], num_sequences: int) -> tuple[int, ...]:
    """How many sequences each of "16", "1%" is, of so many, ascending. Raises RequestError for what is neither, for none, and for all of them."""
    sizes = set()
    for text in texts:
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text.strip(), re.ASCII)
        if not found:
            raise RequestError(f"-k: expected a number of sequences such as 16, or a share such as 1%, got {text!r}")
        size = int(found[1]) if found[1] else max(1, round(float(found[2]) / 100 * num_sequences)) if float(found[2]) else 0
        if not 0 < size < num_sequences:
            raise RequestError(f"-k: {text} of {num_sequences:,} training sequences is none of them, or leaves none")
        sizes.add(size)
    return tuple(sorted(sizes))


def first_of(scores: NDArray[np.float64], ids: Sequence[str], k: int) -> NDArray[np.int64]:
    """[Q, k]: the numbers of the highest scores, the highest first; among equal ones in a random order that depends on the ids alone."""
    order = random_order(ids, "ties")
    return order[np.argsort(-scores[:, order], axis=1, kind="stable")[:, :k]]


def random_set(ids: Sequence[str], draw: int, k: int) -> NDArray[np.int64]:
    """[k]: the numbers of the sequences in the random set of number `draw`, which holds the smaller ones of its number."""
    return random_order(ids, f"left out {draw}")[:k]
