"""How far influence is concentrated in few sequences, or spread over many; and whether a sequence holds a completion word for word.

Knows numbers and tokens, not models.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = (1, 10, 100)
"""The share of positive influence is told for so many of the most influential sequences."""


def concentration(scores: NDArray[np.float64]) -> dict[str, Any]:
    """A histogram of scores [N], and how much of the positive influence the top of their ranking holds.

    `effective_sequences` is (Σ p)² / Σ p² over the positive scores p: so many sequences of equal influence would be as concentrated.
    """
    counts, edges = np.histogram(scores, bins=50)
    positive = np.sort(np.maximum(scores, 0))[::-1]
    sums, tail, largest, effective = positive.cumsum(), [], {}, 0.0
    if len(sums) and sums[-1] > 0:
        takes = np.unique(np.geomspace(1, len(scores), 60).astype(np.int64))
        tail = [[float(take / len(scores)), float(sums[take - 1] / sums[-1])] for take in takes]
        largest = {str(take): float(sums[min(take, len(sums)) - 1] / sums[-1]) for take in LARGEST}
        effective = float(sums[-1] ** 2 / np.square(positive).sum())
    return {
        "num_sequences": len(scores),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "tail": tail,
        "largest": largest,
        "effective_sequences": effective,
    }


def longest_run(completion: NDArray[np.int32], sequence: NDArray[np.int32]) -> int:
    """How many of the completion's tokens, in a row, the sequence holds."""
    lengths, longest = np.zeros(len(sequence) + 1, dtype=np.int64), 0
    for token in completion:
        lengths[1:] = np.where(sequence == token, lengths[:-1] + 1, 0)
        longest = max(longest, int(lengths.max()))
    return longest
