"""How close an approximate ranking comes to the exact one: NDCG, recall by depth, and rank correlation; and how many candidates that asks for.

Plain arrays of scores; knows neither runs nor rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing import best

WANTED = (1, 10, 50, 100)
"""Sizes k of the exact top that recall is measured for."""

DEPTHS = (10, 20, 50, 100, 200, 400, 800, 1600)
"""Numbers of candidates that it is measured among."""

ENOUGH = 0.99

WIDER = (2, 4)
"""How many times as long rows are considered when an index is measured."""

COARSE = 0.95
"""An NDCG@20 below which longer rows are worth their bytes: the default's is .99 on ordinary text (benchmarks/NOTES.md)."""

LEAST_CANDIDATES = 100
"""Completions of a few tokens are a little harder than the halves of sequences that the index is measured with (benchmarks/NOTES.md)."""


@dataclass(frozen=True, kw_only=True)
class EndFidelity:
    """One end of one kind of ranking, averaged over queries."""

    ndcg_at_20: float
    recall: dict[int, dict[int, float]]  # [k][depth]: the share of the exact top k among so many candidates

    def candidates_for(self, k: int) -> int:
        """The least measured depth that holds 99% of the exact top k, the greatest when none does; in proportion for a k beyond the measured."""
        measured = min((size for size in self.recall if size >= k), default=max(self.recall))
        depths = self.recall[measured]
        depth = min((depth for depth, share in depths.items() if share >= ENOUGH), default=max(depths))
        return max(LEAST_CANDIDATES, k, -(-depth * max(k, measured) // measured))

    def recall_at(self, k: int, depth: int) -> float | None:
        """The share of the exact top k found among `depth` candidates, from the greatest measured depth that is not greater; None without one."""
        depths = self.recall.get(k, {})
        return depths[max(d for d in depths if d <= depth)] if any(d <= depth for d in depths) else None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What was measured of an index with some queries, for rankings by score and by normalized score, from either end."""

    num_queries: int
    spearman: float | None  # of estimated with exact scores, over all sequences (a sample of them where there are many)
    ends: dict[str, EndFidelity]  # by `end_name`
    of_wider: dict[int, float] = field(default_factory=dict)  # NDCG@20 of proponents to expect of rows so many times as long

    @property
    def is_coarse(self) -> bool:
        """Whether the ranking before the rerank is clearly not that of exact scores, or 200 candidates miss some of its top 10."""
        end = self.end(normalized=False, opponents=False)
        return end.ndcg_at_20 < COARSE or (end.recall_at(10, 200) or 1) < ENOUGH

    def end(self, normalized: bool, opponents: bool) -> EndFidelity:
        return self.ends[end_name(normalized, opponents)]

    def to_json(self) -> dict[str, Any]:
        ends = {name: {"ndcg_at_20": end.ndcg_at_20, "recall": end.recall} for name, end in self.ends.items()}
        return {"queries": self.num_queries, "spearman": self.spearman, "rankings": ends, "ndcg_at_20_of_wider": self.of_wider}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Fidelity":
        ends = {
            name: EndFidelity(
                ndcg_at_20=end["ndcg_at_20"],
                recall={int(k): {int(depth): share for depth, share in depths.items()} for k, depths in end["recall"].items()},
            )
            for name, end in content["rankings"].items()
        }
        wider = {int(times): share for times, share in content.get("ndcg_at_20_of_wider", {}).items()}  # not measured by earlier versions
        return cls(num_queries=content["queries"], spearman=content["spearman"], ends=ends, of_wider=wider)


def end_name(normalized: bool, opponents: bool) -> str:
    return ("normalized " if normalized else "") + ("opponents" if opponents else "proponents")


def end_fidelity(exact: NDArray[Any], ranked: NDArray[np.int64]) -> EndFidelity:
    """Of a ranking's best [Q, K] numbers, best first and -1 where there are no more, against exact scores [Q, N], larger being better.

    A score of -inf stands for a sequence that does not count.
    """
    truths = [_order(row) for row in exact]
    lists = [row[row >= 0] for row in ranked]
    recall: dict[int, dict[int, float]] = {}
    for k in dict.fromkeys(min(k, min(len(truth) for truth in truths)) for k in WANTED):
        depths = [depth for depth in DEPTHS if depth >= k and depth <= ranked.shape[1]] or [ranked.shape[1]]
        shares = [[np.isin(truth[:k], found[:depth]).mean() for truth, found in zip(truths, lists, strict=True)] for depth in depths]
        recall[k] = {depth: float(np.mean(share)) for depth, share in zip(depths, shares, strict=True)}
    gains = [_ndcg(row, found, truth) for row, found, truth in zip(exact, lists, truths, strict=True)]
    return EndFidelity(ndcg_at_20=float(np.mean(gains)), recall=recall)


def ndcg_of_wider(exact: NDArray[Any], estimates: NDArray[Any], times: float) -> float:
    """The NDCG@20 to expect of rows `times` as long, from exact scores and estimates [Q, N] of the same sequences.

    An estimate is a share of the exact score, which shrinkage leaves, and an error that falls with the root of the length (`indexing.features`): so
    for rows that are mixed, not for sparse ones.
    """
    known = np.isfinite(exact)
    scores, found = np.where(known, exact, 0), np.where(known, estimates, 0)
    size = (scores**2).sum(1, keepdims=True)
    share = (scores * found).sum(1, keepdims=True) / np.where(size > 0, size, 1)
    expected = np.where(known, share * scores + (found - share * scores) / np.sqrt(times), -np.inf)
    return end_fidelity(exact, ranked_by(expected, 20)).ndcg_at_20


def _order(scores: NDArray[Any]) -> NDArray[np.int64]:
    order: NDArray[np.int64] = np.argsort(-scores, kind="stable")
    return np.asarray(order[np.isfinite(scores[order])])


def _ndcg(scores: NDArray[Any], found: NDArray[np.int64], truth: NDArray[np.int64], depth: int = 20) -> float:
    """Σ max(score, 0) / log₂(1 + place) over the first `depth` found, relative to the best order; 1 when no score is positive."""
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    ideal, actual = (float((np.maximum(scores[order[:depth]], 0) * discounts[: len(order[:depth])]).sum()) for order in (truth, found))
    return actual / ideal if ideal > 0 else 1.0


def rank_correlation(exact: NDArray[Any], estimates: NDArray[Any]) -> float | None:
    """Spearman's, [Q, N] each, averaged over the queries for which both vary; None when none does."""
    from scipy.stats import spearmanr  # here, since it takes seconds that every worker would wait for

    pairs = [(one, other) for one, other in _rows(exact, estimates) if np.ptp(one) > 0 and np.ptp(other) > 0]
    return float(np.mean([spearmanr(one, other).statistic for one, other in pairs])) if pairs else None


def _rows(exact: NDArray[Any], estimates: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    for one, other in zip(exact, estimates, strict=True):
        known = np.isfinite(one)
        yield one[known], other[known]


def ranked_by(scores: NDArray[Any], count: int = max(DEPTHS)) -> NDArray[np.int64]:
    """[Q, min(count, N)]: the numbers of the best by these scores [Q, N], best first."""
    return best(scores, count).numbers
