"""Rows of training sequences for the index, a group of layers at a time where the factors of all do not fit into memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import true_label_loss
from indexing import FeatureSpec, RowFormat, feature_rows
from influence.attribution import AttributedModel
from influence.batches import in_batches
from influence.errors import RequestError
from influence.run import Run
from influence.sequences import TrainingSequence


def encoded_rows(
    run: Run, sequences: Sequence[TrainingSequence], spec: FeatureSpec, row_format: RowFormat
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The rows [N, bytes], encoded, of these sequences, and gᵀ(G + λI)⁻¹g of each, [N]. Raises RequestError for one that is not finite."""
    codes = np.empty((len(sequences), row_format.bytes_per_row), dtype=np.uint8)
    self_influence = np.empty(len(sequences), dtype=np.float64)
    for members, made, own in _rows(run, sequences, spec):
        self_influence[members] = own
        try:
            codes[members] = row_format.encode(made)
        except ValueError as error:
            names = ", ".join(sequences[number].id for number in members[:3])
            raise RequestError(f"{error}, among {names}, …: raise factors.damping") from None
    return codes, self_influence


def _rows(
    run: Run, sequences: Sequence[TrainingSequence], spec: FeatureSpec
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, NDArray[np.float64]]]:
    """(places in `sequences`, rows, gᵀ(G + λI)⁻¹g): of a batch, or with several groups of layers of what an eighth of the budget holds twice."""
    at_once = max(1, run.attributed.budget.memory_bytes // 8 // (8 * spec.row_length))
    for first in range(0, len(sequences), at_once):
        some = sequences[first : first + at_once]
        if len(run.layer_groups) == 1:
            (part,) = run.parts()
            for members, found, own in _batches(run, part, some, spec):
                yield first + members, found, own
            continue
        made, self_influence = torch.zeros(len(some), spec.row_length), np.zeros(len(some))
        for part in run.parts():
            for members, found, own in _batches(run, part, some, spec):
                made[torch.from_numpy(members)] += found
                self_influence[members] += own
        yield np.arange(first, first + len(some)), made, self_influence


def _batches(
    run: Run, part: AttributedModel, sequences: Sequence[TrainingSequence], spec: FeatureSpec
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, NDArray[np.float64]]]:
    held, signs = run.factors_of(part), run.spreaders_of(part, spec)
    for members, batch in in_batches(sequences, part.budget, part.device):
        found, own = feature_rows(part.model, part.layers, held.factors, spec, signs, true_label_loss, batch)
        yield members, found.cpu(), own.cpu().numpy()
