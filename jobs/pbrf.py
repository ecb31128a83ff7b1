"""The proximal Bregman response, solved for some training sequences, beside what scores predict. As JSON, table and plot.

A unit is one copied sequence: what one more copy of it does to every query. Units are kept, so that a command that was stopped goes on where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.evaluation.bank import query_digest
from influence.evaluation.pbrf import Agreement, Problem, agreement, chosen, in_float64, response
from influence.evaluation.plot import score_plot
from influence.measurement import Measurement
from influence.refinement import RefineOptions
from influence.run import Run
from influence.run_directory import digest
from influence.solving import check_movable, check_refinable
from jobs.answers import Asked
from jobs.outcomes import plotted, where, write_plotted
from jobs.scoring import Tables, score_tables
from jobs.units import do_missing, do_unit, numbers_of

FORMAT = 1
"""Version of how a response is solved for. Another one starts anew."""

METHODS = ("ekfac", "refined", "gradient-dot")


@dataclass(frozen=True, kw_only=True)
class PbrfOutcome:
    """What `influence evaluate RUN pbrf` measured, and the files of it."""

    run: Run
    queries: tuple[str, ...]  # ids
    copied: tuple[str, ...]  # ids
    changes: NDArray[np.float64]  # [Q, C]
    scores: Tables  # [Q, C] each
    agreements: dict[str, Agreement]
    residual: float  # the largest
    num_sequences: int
    out: Path

    def to_json(self) -> dict[str, Any]:
        found = {
            "methods": [
                {
                    "name": name,
                    "correlation": found.correlation.to_json(),
                    "rank_correlation": found.rank_correlation.to_json(),
                    "slope": found.slope,
                    "scores": self.scores[name].tolist(),
                }
                for name, found in self.agreements.items()
            ],
            "queries": list(self.queries),
            "copied": list(self.copied),
            "changes": self.changes.tolist(),
            "largest_residual": self.residual,
            "num_sequences": self.num_sequences,
        }
        return plotted("pbrf", self.run, self.out, found, self.run.refining_damping_name)

    def print(self, console: Console) -> None:
        table = Table("scores", "correlation", "95%", "rank correlation", "95%", "changes / scores")
        for name, found in self.agreements.items():
            row = [
                cell
                for one in (found.correlation, found.rank_correlation)
                for cell in (f"{one.value:.3f}", "" if one.interval is None else f"{one.interval[0]:.3f} … {one.interval[1]:.3f}")
            ]
            table.add_row(name, *row, "" if name == "gradient-dot" else f"{found.slope:.3g}")
        console.print(table)
        console.print(
            f"{len(self.queries)} queries, one more copy of each of {len(self.copied)} sequences, divergence over {self.num_sequences} sequences; "
            f"every gradient fell to {self.residual:.1g} of its beginning or less"
        )
        console.print(where(self.out, "pbrf"))

    def write(self) -> None:
        scores = {name: found.correlation for name, found in self.agreements.items()}
        axis = f"correlation and 95% interval\n{len(self.queries)} queries, {len(self.copied)} sequences"
        image = score_plot(scores, None, title="How scores agree with the proximal Bregman response", axis=axis)
        write_plotted(self.out, "pbrf", self.to_json(), image)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What is solved for, but for the copied sequence."""

    run: str
    model: str
    flax: str | None
    memory_budget: int
    measurements: tuple[Measurement, ...]
    numbers: tuple[int, ...]  # of the sequences of the mean divergence
    fingerprint: str

    @property
    def place(self) -> str:
        """Where below the run directory its units are."""
        return f"evaluations/pbrf-{self.fingerprint[7:23]}"

    def unit_fingerprint(self, unit: str) -> str:
        return digest([self.fingerprint, unit])


class ResponseWork:
    """One worker's side: the run is opened with the first unit, and kept."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses

    @cached_property
    def run(self) -> Run:
        return Run(self.responses.run, model=self.responses.model, flax=self.responses.flax, memory_budget=self.responses.memory_budget)

    @cached_property
    def problem(self) -> Problem:
        run, attributed = self.run, self.run.attributed
        sequences = run.training.select(list(self.responses.numbers))
        return in_float64(attributed.model, attributed.layers, run.factors, run.refining_damping, sequences, len(run.training))

    def do(self, _: str, unit: str) -> None:
        do_unit(self.run, self.responses, unit, "response", lambda: self._response(int(unit.removeprefix("sequence-"))))

    def _response(self, number: int) -> NDArray[np.float64]:
        """[Q + 1]: the changes, and the residual."""
        found = response(self.problem, self.run.training[number], self.responses.measurements)
        return np.append(found.changes, found.residual)


def measure_pbrf(
    run: Run,
    asked: Asked,
    num_copies: int,
    refine: RefineOptions,
    external: Mapping[str, NDArray[np.float64]],
    resources: ResourcesConfig,
    out: Path,
) -> PbrfOutcome:
    """Solves what is missing of the responses; the mean divergence is over the sequences that refined answers average the Hessian over."""
    check_movable(run)
    check_refinable(run)
    if len(run.training) < num_copies or num_copies < 3:
        raise RequestError(
            f"--copies: a correlation needs from 3 to as many as the {len(run.training)} training sequences, not {num_copies}"
        )
    tables = score_tables(run, METHODS, asked, refine, external)
    numbers = np.sort(run.hash_order(run.factors_config.seed)[: refine.sequences])
    copies = chosen(tables["ekfac"], run.hash_order(run.index_config.seed), num_copies)
    responses = _responses(run, [measurement for _, measurement in asked], numbers)
    units = [f"sequence-{number:08d}" for number in copies]
    with run.directory.exclusive():
        do_missing(run, responses, units, ResponseWork(responses), resources, "proximal Bregman responses")
    kept = np.stack([numbers_of(run, responses, unit, "response") for unit in units], axis=1)
    changes, scores = kept[:-1], {name: table[:, copies] / len(run.training) for name, table in tables.items()}
    return PbrfOutcome(
        run=run,
        queries=tuple(name for name, _ in asked),
        copied=tuple(run.training.ids[number] for number in copies),
        changes=changes,
        scores=scores,
        agreements={name: agreement(values, changes) for name, values in scores.items()},
        residual=float(kept[-1].max()),
        num_sequences=len(numbers),
        out=out,
    )


def _responses(run: Run, measurements: Sequence[Measurement], numbers: NDArray[np.int64]) -> Responses:
    damping = [run.refining_damping_name, run.optimizer_digest]
    queries = [query_digest(measurement) for measurement in measurements]
    return Responses(
        run=str(run.directory.path.resolve()),
        model=run.model_config.name,
        flax=run.model_config.flax,
        memory_budget=run.memory_budget,
        measurements=tuple(measurements),
        numbers=tuple(numbers.tolist()),
        fingerprint=digest([FORMAT, run.fingerprints["factors"], damping, [run.training.ids[n] for n in numbers], queries]),
    )
