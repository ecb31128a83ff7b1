"""Near-duplicates: sequences whose rows point the same way, so that a ranking can show them as one, and a training set be cleaned of them."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from indexing.rows import RowFormat, RowShards

ALIKE = 0.95
"""From which cosine of whitened gradients on two sequences are duplicates."""

SKETCH_BYTES = 512
WORD_BYTES = 8
ORDERS = 64
PAIRS_AT_ONCE = 2**12


def group_duplicates(rows: RowShards, numbers: Sequence[int], count: int) -> list[list[int]]:
    """The first `count` groups of a ranking: places in `numbers`; each joins the first group whose first member it duplicates.

    Ends before the place that would open one group more. The cosine of bit rows, and of sketches, is that of their angle: the share of signs in
    which they agree is 1 - angle / π.
    """
    groups: list[list[int]] = []
    firsts = np.empty((count, rows.format.bytes_per_row), dtype=np.uint8)
    for place, number in enumerate(numbers):
        own = rows.take(np.array([number]))
        cosines = _cosines(rows.format, firsts[: len(groups)], own)
        if len(cosines) and cosines.max() >= ALIKE:
            groups[int(cosines.argmax())].append(place)
        elif len(groups) == count:
            break
        else:
            firsts[len(groups)] = own[0]
            groups.append([place])
    return groups


def all_duplicates(rows: RowShards, allowed: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Every group of near-duplicates among the allowed rows [N]: their numbers, ascending. Rows that chains of duplicates connect are one group.

    The signs of a row are a sketch in which near-duplicates differ at one bit in ten. Rows are sorted by 64 bits of it, 64 times by others, and
    neighbours in any of these orders are compared: first their sketches, then, where these are alike, the whole rows. Takes 512 bytes a row and
    time in proportion to N log N. A pair at the threshold shares the first 20 bits of an order, enough to be neighbours among a million unrelated
    rows, with a probability of .12, and those of one of 64 orders with .9997.
    """
    numbers, sketch = _sketches(rows, allowed)
    pairs = np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *_neighbours(sketch)]), axis=0)
    alike = [
        pairs[some][_cosines(rows.format, *(rows.take(side) for side in numbers[pairs[some]].T)) >= ALIKE] for some in _parts(len(pairs))
    ]
    linked = np.concatenate([np.zeros((0, 2), dtype=np.int64), *alike])
    graph = coo_array((np.ones(len(linked), dtype=np.int8), (linked[:, 0], linked[:, 1])), shape=(len(numbers), len(numbers)))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    groups = np.split(numbers[order], np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def _sketches(rows: RowShards, allowed: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The numbers of the allowed rows that are not zero, and their signs, padded to a whole word at least."""
    kept_numbers, kept = [], []
    for first, block in rows.blocks():
        signs, scales = rows.format.sketch(block, SKETCH_BYTES)
        here = allowed[first : first + len(block)] & (scales > 0)
        kept_numbers.append(first + np.flatnonzero(here))
        kept.append(signs[here])
    signs = np.concatenate(kept)
    return np.concatenate(kept_numbers), np.pad(signs, ((0, 0), (0, max(0, WORD_BYTES - signs.shape[1]))))


def _neighbours(sketch: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """Pairs [P, 2] of places whose sketches are neighbours in some order, and alike."""
    num_bytes = sketch.shape[1]
    share = np.arccos(ALIKE) / np.pi
    most = 8 * num_bytes * share + 4 * np.sqrt(8 * num_bytes * share * (1 - share))  # four standard deviations of a sketch
    draw = np.random.default_rng(0)
    for _ in range(ORDERS):
        # Bytes from all over the row, whose parts belong to different layers.
        keys = np.ascontiguousarray(sketch[:, draw.permutation(num_bytes)[:WORD_BYTES]]).view(">u8")[:, 0]
        order = np.argsort(keys, kind="stable")
        for some in _parts(len(order) - 1):
            left, right = order[:-1][some], order[1:][some]
            near = np.bitwise_count(sketch[left] ^ sketch[right]).sum(1) <= most
            yield np.sort(np.stack([left[near], right[near]], axis=1), axis=1)


def _cosines(row_format: RowFormat, left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[P]: of encoded rows, pair by pair, or all of them with one; zero with a row of zeros."""
    if row_format.num_signs:
        differing = np.bitwise_count(row_format.signs(left) ^ row_format.signs(right)).sum(1)
        known = (row_format.scales(left) > 0) & (row_format.scales(right) > 0)
        return np.where(known, np.cos(np.pi * differing / row_format.num_signs), 0.0)
    ours, theirs = (_unit(row_format.decode(codes)) for codes in (left, right))
    return np.asarray((ours * theirs).sum(1, dtype=np.float64))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def _parts(count: int) -> Iterator[slice]:
    return (slice(first, min(first + PAIRS_AT_ONCE, count)) for first in range(0, count, PAIRS_AT_ONCE))
