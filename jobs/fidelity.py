"""The fidelity of indexes to exact EK-FAC: what was measured, as JSON and table.

Knows runs, queries and rankings; knows nothing of options.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from influence.errors import RequestError
from influence.evaluation.fidelity import RankingFidelity, ranking_fidelities
from influence.run import Run
from influence.run_directory import write_json
from jobs.answers import Asked
from jobs.outcomes import provenance
from jobs.progress import bar
from jobs.stages import sample_queries

SHOWN_DEPTHS = (50, 100, 200)


@dataclass(frozen=True, kw_only=True)
class FidelityOutcome:
    """What `influence evaluate RUN fidelity` measured."""

    run: Run
    rankings: tuple[RankingFidelity, ...]
    num_queries: int
    held_out: bool
    num_sequences: int
    seconds: float
    path: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": "fidelity",
            "run": str(self.run.directory),
            "rankings": [ranking.to_json() for ranking in self.rankings],
            "num_queries": self.num_queries,
            "queries_are": "held out" if self.held_out else "halves of training sequences",
            "num_sequences": self.num_sequences,
            "seconds": round(self.seconds, 3),
            "provenance": provenance(self.run),
        }

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.to_json())

    def print(self, console: Console) -> None:
        columns = ("ranking", "bytes", "NDCG@20", *(f"in {depth}" for depth in SHOWN_DEPTHS), "Spearman", "opponents")
        table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.SIMPLE, padding=(0, 1, 0, 0))  # fits 80 characters
        for ranking in self.rankings:
            shares = [_share(ranking.proponents.recall_at(10, depth)) for depth in SHOWN_DEPTHS]
            size = "" if ranking.bytes_per_sequence is None else f"{ranking.bytes_per_sequence:,}"
            opponents = "" if ranking.name == "BM25" else f"{ranking.opponents.ndcg_at_20:.3f}"
            table.add_row(ranking.name, size, f"{ranking.proponents.ndcg_at_20:.3f}", *shares, _share(ranking.spearman), opponents)
        console.print(table)
        console.print("NDCG@20, also of opponents; in N: the share of the exact top 10 in the first N; all before any rerank")
        console.print(
            f"against exact EK-FAC: {self.num_queries} queries, {self.num_sequences:,} of {len(self.run.training):,} sequences, "
            f"{self.seconds:.0f} s"
        )
        console.print(f"written: {self.path}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def measure_fidelity(run: Run, asked: Asked | None, num_sequences: int, directory: Path) -> FidelityOutcome:
    """With queries of the user's, or with halves of training sequences; over as many sequences, chosen by hash of their ids."""
    start = time.perf_counter()
    order = run.hash_order(run.index_config.seed)
    numbers = np.sort(order[run.live[order]][:num_sequences])
    queries: Sequence[Any] = [(None, measurement) for _, measurement in asked] if asked else sample_queries(run)
    if not queries:
        raise RequestError(
            f"there are no queries to measure {run.directory} with: give --queries FILE, for index.recall_queries is 0 or no sequence fits"
        )
    if len(numbers) < 2:
        raise RequestError(f"{run.directory} has fewer than two training sequences left: there is nothing to rank")
    own = [number for number, _ in queries]
    with bar("rows of every size") as progress:
        found = ranking_fidelities(run, [measurement for _, measurement in queries], numbers, own, progress.advance)
    return FidelityOutcome(
        run=run,
        rankings=tuple(found),
        num_queries=len(queries),
        held_out=asked is not None,
        num_sequences=len(numbers),
        seconds=time.perf_counter() - start,
        path=directory / "fidelity.json",
    )
