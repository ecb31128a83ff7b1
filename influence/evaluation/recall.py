"""Where the sequences that are known to state the answer rank.

Knows scores and ids; knows nothing of models. Legend: N training sequences, Q queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from influence.errors import RequestError
from influence.evaluation.intervals import Estimate, mean


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Which sequences make a query's completion more likely, and which teach another one, as numbers; `kind` is what figures are averaged within."""

    kind: str
    states: NDArray[np.int64]  # at least one
    opposes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How well one ranking finds what is planted: means over queries."""

    first: Estimate  # share of queries whose first result states the answer
    reciprocal_rank: Estimate  # of the first result that does
    top_n: Estimate  # share of the first n results that do, n being how many there are
    median_rank: float  # over all that do
    opposed: Estimate | None  # share of the last n that oppose it, n being how many do; of queries that name some

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first.to_json(),
            "reciprocal_rank": self.reciprocal_rank.to_json(),
            "top_n": self.top_n.to_json(),
            "median_rank": self.median_rank,
            "opposed": None if self.opposed is None else self.opposed.to_json(),
        }


def planted_in(item: Mapping[str, Any], place: str, numbers: Mapping[str, Sequence[int]]) -> Planted:
    """What a line of the queries' file says: `states` and perhaps `opposes`, lists of ids of sequences or documents, and perhaps `kind`.

    `numbers` are those of the sequences by either id. Raises RequestError for a line that names none, or one that is not there.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for key in ("states", "opposes"):
        ids = item.get(key, [])
        if not isinstance(ids, list) or not all(isinstance(one, str | int) for one in ids):
            raise RequestError(f"{place}: {key} must be a list of ids, not {ids!r}")
        unknown = [one for one in ids if str(one) not in numbers]
        if unknown:
            raise RequestError(f"{place}: there is no training sequence or document {str(unknown[0])!r}, which {key} names")
        found[key] = np.array(sorted({number for one in ids for number in numbers[str(one)]}), dtype=np.int64)
    if not len(found["states"]):
        raise RequestError(f'{place}: "states" is missing: the ids of the training sequences that state the answer')
    kind = item.get("kind", "all")
    if not isinstance(kind, str):
        raise RequestError(f"{place}: the kind must be a name, not {kind!r}")
    return Planted(kind=kind, **found)


def numbers_by_id(ids: Sequence[str], documents: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the sequences by their own ids and by those of their documents."""
    found: dict[str, list[int]] = {}
    for number, names in enumerate(zip(ids, documents, strict=True)):
        for name in set(names):
            found.setdefault(name, []).append(number)
    return found


def recall(scores: NDArray[np.float64], planted: Sequence[Planted]) -> Recall:
    """The figures of one ranking, by scores [Q, N]. Equal scores share the mean of their ranks, so that telling nothing gains nothing."""
    ranks = rankdata(-scores, axis=1)  # [Q, N], the best is 1
    own = [np.sort(row[one.states]) for row, one in zip(ranks, planted, strict=True)]
    last = scores.shape[1] + 1 - ranks
    opposed = [float((row[one.opposes] <= len(one.opposes)).mean()) for row, one in zip(last, planted, strict=True) if len(one.opposes)]
    return Recall(
        first=mean(np.array([float(found[0] == 1) for found in own])),
        reciprocal_rank=mean(np.array([1 / found[0] for found in own])),
        top_n=mean(np.array([float((found <= len(found)).mean()) for found in own])),
        median_rank=float(np.median(np.concatenate(own))),
        opposed=mean(np.array(opposed)) if opposed else None,
    )
