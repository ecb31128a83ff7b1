"""Rows of training sequences for the index, a group of layers at a time where the factors of all do not fit into memory."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import true_label_loss
from indexing import FeatureSpec, RowFormat, feature_rows
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
    at_once = max(1, run.attributed.budget.memory_bytes // 8 // (4 * spec.row_length))
    for first in range(0, len(sequences), at_once):
        some = slice(first, first + at_once)
        made, self_influence[some] = _rows(run, sequences[some], spec)
        try:
            codes[some] = row_format.encode(made)
        except ValueError as error:
            names = ", ".join(sequence.id for sequence in sequences[some][:3])
            raise RequestError(f"{error}, among {names}, …: raise factors.damping") from None
    return codes, self_influence


def _rows(run: Run, sequences: Sequence[TrainingSequence], spec: FeatureSpec) -> tuple[torch.Tensor, NDArray[np.float64]]:
    made, self_influence = torch.zeros(len(sequences), spec.row_length), np.zeros(len(sequences))
    for part in run.parts():
        held, signs = run.factors_of(part), run.spreaders_of(part, spec)
        for members, batch in in_batches(sequences, part.budget, part.device):
            found, own = feature_rows(part.model, part.layers, held.factors, spec, signs, true_label_loss, batch)
            made[torch.from_numpy(members)] += found.cpu()
            self_influence[members] += own.cpu().numpy()
    return made, self_influence
