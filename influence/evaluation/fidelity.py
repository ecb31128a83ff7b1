"""How close cheap rankings come to exact EK-FAC: rows of several sizes and encodings beside what others do, on a sample of the training sequences.

Needs the factors alone, so it also says what an index would be worth before it is built. Every ranking is of the same sequences for the same queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import Layer, Record, capture, layer_device, sequence_gradients, true_label_loss
from indexing import (
    Encoding,
    FeatureSpec,
    RowFormat,
    RowShards,
    feature_spec,
    is_mixed,
    query_rows,
    row_length_within,
    row_scores,
)
from influence import artifacts
from influence.attribution import AttributedModel, gradient_norms, query_gradients, scan, scan_parts
from influence.batches import in_batches
from influence.fidelity import EndFidelity, end_fidelity, rank_correlation, ranked_by
from influence.measurement import Measurement
from influence.rows import encoded_rows
from influence.run import Run
from influence.sequences import TrainingSequence
from influence.solving import Progress, in_groups, solved

SIZES = (1024, 2048, 4096, 8192, 16384)
"""Bytes a sequence of the rows that are compared."""

PROJECTED = 16
"""Rows and columns that a module's gradient is projected to in the way of other tools (LoGra, TRAK-like stores)."""


@dataclass(frozen=True, kw_only=True)
class RankingFidelity:
    """One way to rank, and how close it comes to exact EK-FAC before any rerank."""

    name: str
    bytes_per_sequence: int | None
    proponents: EndFidelity
    opponents: EndFidelity
    spearman: float | None

    def to_json(self) -> dict[str, Any]:
        ends = {"proponents": self.proponents, "opponents": self.opponents}
        return {
            "name": self.name,
            "bytes_per_sequence": self.bytes_per_sequence,
            "spearman": self.spearman,
            **{name: {"ndcg_at_20": end.ndcg_at_20, "recall": end.recall} for name, end in ends.items()},
        }


def ranking_fidelities(
    run: Run,
    measurements: Sequence[Measurement],
    numbers: NDArray[np.int64],
    own: Sequence[int | None],
    progress: Progress,
) -> list[RankingFidelity]:
    """How close each ranking of the sequences of these numbers comes to exact EK-FAC; `own` are the queries' own sequences, which do not count."""
    sequences = [run.store[int(number)] for number in numbers]
    exact, dots = _exact(run, measurements, sequences)
    hidden = np.array([[number == query for number in numbers] for query in own])

    def compared(name: str, size: int | None, scores: NDArray[Any]) -> RankingFidelity:
        ends = [
            end_fidelity(np.where(hidden, -np.inf, sign * exact), ranked_by(np.where(hidden, -np.inf, sign * scores))) for sign in (1, -1)
        ]
        spearman = rank_correlation(np.where(hidden, -np.inf, exact), scores)
        return RankingFidelity(name=name, bytes_per_sequence=size, proponents=ends[0], opponents=ends[1], spearman=spearman)

    found = [
        compared(f"{encoding} rows", row_format.bytes_per_row, scores)
        for encoding, row_format, scores in _row_scores(run, measurements, sequences, progress)
    ]
    others = _projections(run, measurements, sequences)
    found.append(compared(f"projections {PROJECTED} × {PROJECTED}", others[0], others[1]))
    norms = gradient_norms(run.attributed, sequences)
    found.append(compared("gradient cosine", None, dots / np.where(norms > 0, norms, 1)))
    lexical = [run.lexical.scores(f"{m.prompt}{m.completion}", len(run.store))[numbers] for m in measurements]
    found.append(compared("BM25", None, np.stack(lexical)))
    return found


def _exact(
    run: Run, measurements: Sequence[Measurement], sequences: Sequence[TrainingSequence]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """EK-FAC scores and dot products of plain gradients, [Q, N] each."""
    exact, dots = [], []
    for group in in_groups(measurements, run, None):
        found = solved(run, run.attributed, group, None)
        exact.append(scan_parts(found.vectors, sequences))
        dots.append(scan(run.attributed, query_gradients(run.attributed, group).gradients, sequences))
    return np.concatenate(exact), np.concatenate(dots)


def rows_of_queries(run: Run, measurements: Sequence[Measurement], spec: FeatureSpec) -> NDArray[np.float32]:
    """[Q, D]; the gradients are computed again for every size, because those of all queries together may not fit into memory."""
    made = np.zeros((len(measurements), spec.row_length), dtype=np.float32)
    for part in run.parts():
        factors, signs, first = run.factors_of(part).factors, run.spreaders_of(part, spec), 0
        for group in in_groups(measurements, run, None):
            made[first : first + len(group)] += query_rows(query_gradients(part, group, factors).gradients, spec, signs)
            first += len(group)
    return made


def _row_scores(
    run: Run, measurements: Sequence[Measurement], sequences: Sequence[TrainingSequence], progress: Progress
) -> list[tuple[Encoding, RowFormat, NDArray[np.float32]]]:
    """By encoding and size: estimates [Q, N] from rows made as the index makes them."""
    weights = {name: facts["row_weight"] for name, facts in artifacts.read_factor_summary(run.path_of("factors")).items()}
    wanted: list[tuple[Encoding, int]] = [("sparse", size) for size in SIZES]
    wanted += [("bit", 1024), ("bit", 8192), ("int8", 8192), ("float16", 8192)]
    found = []
    for place, (encoding, size) in enumerate(wanted):
        progress(place, len(wanted))
        length = row_length_within(encoding, size)
        spec = feature_spec(run.coverage.layers, weights, length, run.index_config.seed, mixed=is_mixed(encoding))
        row_format = RowFormat(encoding=encoding, length=spec.row_length, most_bytes=size)
        codes, _ = encoded_rows(run, sequences, spec, row_format)
        rows = RowShards(format=row_format, shards=(codes,))
        queries = rows_of_queries(run, measurements, spec)
        found.append((encoding, row_format, row_scores(queries, rows, np.arange(len(sequences)))))
    progress(len(wanted), len(wanted))
    return found


def _projections(run: Run, measurements: Sequence[Measurement], sequences: Sequence[TrainingSequence]) -> tuple[int, NDArray[np.float64]]:
    """Bytes a sequence, and scores [Q, N] in the way of tools that keep randomly projected gradients.

    Every linear layer's gradient is projected from both sides by Gaussian matrices, and products are taken in the inverse of the second moments
    of the projected training gradients, damped by a tenth of their mean eigenvalue.
    """
    linear = tuple(layer for layer in run.attributed.layers if layer.kind == "linear")
    attributed = AttributedModel(model=run.attributed.model, layers=linear, budget=run.attributed.budget, device=run.attributed.device)
    generator = torch.Generator().manual_seed(run.index_config.seed)
    sides = {
        layer.name: tuple(
            torch.randn(size, PROJECTED, generator=generator).to(layer_device(attributed.model, layer)) for size in layer.shape
        )
        for layer in linear
    }
    stored = {layer.name: torch.empty(len(sequences), PROJECTED**2) for layer in linear}

    def consume(members: NDArray[np.int64], layer: Layer, record: Record) -> None:
        stored[layer.name][members] = _projected(sequence_gradients(record), *sides[layer.name]).float().cpu()

    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        loss = partial(true_label_loss, attributed.model, batch)
        capture(attributed.model, linear, loss, batch.reached, partial(consume, members))
    asked: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in linear}
    for group in in_groups(measurements, run, None):
        for name, gradient in query_gradients(attributed, group).gradients.items():
            asked[name].append(_projected(gradient, *sides[name]).double().cpu())
    scores = np.zeros((len(measurements), len(sequences)))
    for layer in linear:
        rows = stored[layer.name].double()
        second_moments = rows.T @ rows / len(rows)
        damped = second_moments + 0.1 * second_moments.diagonal().mean() * torch.eye(PROJECTED**2, dtype=torch.float64)
        scores += (torch.linalg.solve(damped, torch.cat(asked[layer.name]).T).T @ rows.T).numpy()
    return 4 * PROJECTED**2 * len(linear), scores


def _projected(gradients: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ G right of every gradient [N, O, J], flattened."""
    return torch.einsum("op,noj,jq->npq", left.to(gradients.dtype), gradients, right.to(gradients.dtype)).flatten(1)
