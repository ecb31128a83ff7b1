"""The linear datamodelling score of a run's answers beside those of other methods: what was measured, as JSON, table and plot.

Knows runs, banks and methods; knows nothing of options.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from influence.evaluation.bank import Bank
from influence.evaluation.dampings import scores_by_damping
from influence.evaluation.intervals import Estimate
from influence.evaluation.lds import (
    DatamodellingScore,
    Difference,
    difference,
    linear_datamodelling_score,
    noise_ceiling,
)
from influence.evaluation.methods import scores_by
from influence.evaluation.plot import score_plot
from influence.measurement import Measurement
from influence.refinement import RefineOptions
from influence.run import Run
from jobs.answers import Asked
from jobs.outcomes import plotted, where, write_plotted
from jobs.progress import bar


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one method says of every training sequence, and how long it took where it was computed here."""

    name: str
    table: NDArray[np.float64]  # [Q, N]
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's score, and its difference to the first method's."""

    name: str
    score: DatamodellingScore
    difference: Difference | None  # None for the first
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        against = self.difference
        return {
            "name": self.name,
            "lds": self.score.value,
            "interval": list(self.score.interval),
            "difference": None if against is None else {"lds": against.value, "interval": list(against.interval)},
            "per_query": self.score.per_query.tolist(),
            "seconds": None if self.seconds is None else round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class LdsOutcome:
    """What `influence evaluate RUN lds` measured, and the files of it."""

    runs: tuple[Run, ...]
    bank: Bank
    bank_path: Path
    queries: tuple[str, ...]  # ids
    methods: tuple[Measured, ...]
    ceiling: float | None
    out: Path

    def to_json(self) -> dict[str, Any]:
        found = {
            "averaged_over": [str(run.directory) for run in self.runs],
            "methods": [measured.to_json() for measured in self.methods],
            "ceiling": self.ceiling,
            "queries": list(self.queries),
            "num_subsets": self.bank.num_subsets,
            "num_seeds": self.bank.num_seeds,
            "num_sequences": len(self.runs[0].store),
            "bank": str(self.bank_path),
        }
        return plotted("lds", self.runs[0], self.out, found)

    def print(self, console: Console) -> None:
        first = self.methods[0].name
        table = Table("method", "LDS", "95%", f"less {first}", "95%, paired", "s")
        for measured in self.methods:
            against = measured.difference
            row = ["", ""] if against is None else [f"{against.value:+.3f}", _interval(against.interval, "+.3f")]
            seconds = "" if measured.seconds is None else f"{measured.seconds:.1f}"
            table.add_row(measured.name, f"{measured.score.value:.3f}", _interval(measured.score.interval, ".3f"), *row, seconds)
        console.print(table)
        ceiling = "not known from one seed" if self.ceiling is None else f"{self.ceiling:.3f}"
        console.print(f"{self._sizes}; noise ceiling {ceiling}")
        console.print(f"bank: {self.bank_path}")
        console.print(where(self.out, "lds"))

    def write(self) -> None:
        scores = {m.name: Estimate(value=m.score.value, interval=m.score.interval) for m in self.methods}
        title, axis = "How well scores predict the loss after retraining", f"linear datamodelling score and 95% interval\n{self._sizes}"
        write_plotted(self.out, "lds", self.to_json(), score_plot(scores, self.ceiling, title=title, axis=axis))

    @property
    def _sizes(self) -> str:
        seeds = "one seed each" if self.bank.num_seeds == 1 else f"{self.bank.num_seeds} seeds each"
        return (
            f"{self.bank.num_queries} queries, {self.bank.num_subsets} subsets of {len(self.runs[0].store):,} training sequences, {seeds}"
        )


def _interval(interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return f"{low:{form}} … {high:{form}}"


def scored(
    runs: Sequence[Run],
    methods: Sequence[str],
    measurements: Sequence[Measurement],
    refine: RefineOptions,
    external: Mapping[str, NDArray[np.float64]],
    dampings: Sequence[float] = (),
) -> list[Scores]:
    """The scores of all methods, then those of EK-FAC with each damping, with a progress bar for each that is computed; the external ones last."""
    found = []
    for method in methods:
        start = time.perf_counter()
        with bar(f"scores by {method}") as progress:
            table = scores_by(method, runs, measurements, refine, progress.advance)
        found.append(Scores(name=method, table=table, seconds=time.perf_counter() - start))
    if dampings:
        start = time.perf_counter()
        with bar("scores by damping") as progress:
            tables = scores_by_damping(dampings, runs, measurements, progress.advance)
        each = (time.perf_counter() - start) / len(tables)
        found += [Scores(name=f"ekfac, damping {damping:g}", table=table, seconds=each) for damping, table in tables.items()]
    return found + [Scores(name=name, table=table, seconds=None) for name, table in external.items()]


def measure_lds(runs: Sequence[Run], asked: Asked, scores: Sequence[Scores], bank: Bank, bank_path: Path, out: Path) -> LdsOutcome:
    """The score of each method against the bank, whose queries are those asked."""
    found = [linear_datamodelling_score(one.table, bank) for one in scores]
    methods = [
        Measured(name=one.name, score=score, difference=difference(score, found[0]) if place else None, seconds=one.seconds)
        for place, (one, score) in enumerate(zip(scores, found, strict=True))
    ]
    return LdsOutcome(
        runs=tuple(runs),
        bank=bank,
        bank_path=bank_path,
        queries=tuple(name for name, _ in asked),
        methods=tuple(methods),
        ceiling=noise_ceiling(bank),
        out=out,
    )
