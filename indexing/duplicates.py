"""Near-duplicates: sequences whose rows point the same way, so that a ranking can show them as one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from indexing.rows import RowShards

ALIKE = 0.95
"""From which cosine of whitened gradients on two sequences are duplicates."""


def group_duplicates(rows: RowShards, numbers: Sequence[int], count: int) -> list[list[int]]:
    """The first `count` groups of a ranking: places in `numbers`; each joins the first group whose first member it duplicates.

    Ends before the place that would open one group more. The cosine of bit rows is that of their angle: the share of signs in which they
    agree is 1 - angle / π.
    """
    groups: list[list[int]] = []
    firsts = np.empty((0, rows.format.length), dtype=np.float32)
    for place, number in enumerate(numbers):
        own = _unit(rows.format.decode(rows.take(np.array([number]))))
        cosines = firsts @ own[0]
        if rows.format.encoding == "bit":
            cosines = np.sin(np.pi / 2 * np.clip(cosines, -1, 1))
        if len(cosines) and cosines.max() >= ALIKE:
            groups[int(cosines.argmax())].append(place)
        elif len(groups) == count:
            break
        else:
            groups.append([place])
            firsts = np.concatenate([firsts, own])
    return groups


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
