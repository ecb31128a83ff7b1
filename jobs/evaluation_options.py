"""Options that several metrics of `influence evaluate` share, in groups that go together, and what a metric needs of them before its work.

Everything that can be refused is refused here, before scores are computed or models trained.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.run import Run
from jobs.answers import Asked, measurements_of
from jobs.options import Debug, Json, Memory, ModelOption, RefineSequences, RefineSteps, open_within
from jobs.outcomes import Outcome

if TYPE_CHECKING:
    from influence.evaluation.recipe import Recipe
    from jobs.scoring import Tables

DEFAULT_METHODS = ("ekfac", "gradient-cosine", "bm25")

ScoreFiles = Annotated[
    list[str] | None,
    typer.Option("--scores", metavar="NAME=FILE", help=".npy file [queries, sequences] of another method's scores; may be repeated"),
]
Sizes = Annotated[
    list[str] | None, typer.Option("-k", help="how many sequences that come first: a number, or a share such as 1%; may be repeated (1%)")
]
Random = Annotated[int, typer.Option("--random", min=0, help="how many random sets of each size, for comparison")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Ray workers that train or solve; 0 (the default): this process")]
Address = Annotated[str | None, typer.Option("--address", help="address of a Ray cluster that trains or solves")]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How the run is opened, and where and how what was measured is told."""

    out: Annotated[Path | None, typer.Option("--out", help="directory for what is written; RUN/evaluations when left out")] = None
    model: ModelOption = None
    memory_budget: Memory = "16GiB"
    as_json: Json = False
    debug: Debug = False

    def run(self, place: str) -> Run:
        return open_within(place, self.model, self.memory_budget)

    def directory(self, run: Run) -> Path:
        """Where what an evaluation writes goes; checked before the work, made when there is something to write."""
        if self.out is None:
            run.directory.check_keeps_files("--out")
        path = self.out or run.directory.path / "evaluations"
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise RequestError(f"--out: {nearest} is not a directory that can be written to; name another one")
        return path

    def finish(self, outcome: Outcome) -> None:
        outcome.write()
        if self.as_json:
            print(json.dumps(outcome.to_json(), ensure_ascii=False, allow_nan=False))
        else:
            outcome.print(Console(markup=False, highlight=False, soft_wrap=True))


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which rankings are compared."""

    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="ekfac, ekfac-normalized, refined, index, index-normalized, gradient-cosine, gradient-dot or bm25; may be repeated",
        ),
    ] = None
    scores: ScoreFiles = None
    refine_steps: RefineSteps = RefineOptions.steps
    refine_sequences: RefineSequences = RefineOptions.sequences


@dataclass(frozen=True, kw_only=True)
class Training:
    """How models are trained again; what is left out is as the recipe says."""

    seeds: Annotated[int | None, typer.Option("--seeds", help="how many models of each set of sequences")] = None
    base: Annotated[
        str | None,
        typer.Option("--base", help="the model before it was trained on the data: a directory or hub id; left out, as recipe.json says"),
    ] = None
    epochs: Annotated[int | None, typer.Option("--epochs", help="passes over the sequences (3)")] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="sequences in a step (16)")] = None
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="highest learning rate of AdamW (5e-4)")] = None
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="weight decay of AdamW (0.01)")] = None
    workers: Workers = None
    address: Address = None

    @property
    def changed(self) -> Mapping[str, Any]:
        """What is to differ from the recipe."""
        names = ("base", "epochs", "batch_size", "learning_rate", "weight_decay")
        return given(**{name: getattr(self, name) for name in names})

    def recipe(self, run: Run) -> "Recipe":
        from influence.evaluation.recipe import read_recipe

        return read_recipe(Path(run.model_config.name), self.changed)

    @property
    def resources(self) -> ResourcesConfig:
        return resources(self.workers, self.address)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run, the queries asked of it, and the rankings to compare, all there is to be refused having been refused."""

    run: Run
    asked: Asked
    methods: tuple[str, ...]
    external: "Tables"  # of other methods' files
    refine: RefineOptions
    directory: Path  # for what is written

    @cached_property
    def tables(self) -> "Tables":
        """The scores of all rankings, computed when first needed."""
        from jobs.scoring import score_tables

        return score_tables(self.run, self.methods, self.asked, self.refine, self.external)


def comparison(run: Run, queries: Path, opening: Opening, scoring: Scoring, default: Sequence[str] = DEFAULT_METHODS) -> Comparison:
    """Raises RequestError for a method that there is not, a file of scores that does not fit, and a directory that cannot be written to."""
    from influence.evaluation.methods import check_method, read_scores

    methods = tuple(dict.fromkeys(scoring.method or default))
    for name in methods:
        check_method(name)
    files = named_files(scoring.scores or (), methods)
    directory = opening.directory(run)
    asked = measurements_of(run, None, None, None, None, queries)
    return Comparison(
        run=run,
        asked=asked,
        methods=methods,
        external={name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()},
        refine=RefineOptions(steps=scoring.refine_steps, sequences=scoring.refine_sequences),
        directory=directory,
    )


def named_files(scores: Sequence[str], methods: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE, as given. A name is one of its own, since it stands in the table, the plot and the JSON."""
    files: dict[str, Path] = {}
    for text in scores:
        name, equals, path = text.partition("=")
        if not equals or not path or not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
            raise RequestError(f"--scores: expected NAME=FILE.npy with a name of letters, digits and .+-_, got {text!r}")
        if name in files or name in methods or name == "random":
            raise RequestError(f"--scores: there are two methods called {name!r}; give this one another name")
        files[name] = Path(path)
    return files


def given(**options: Any) -> Mapping[str, Any]:
    """Those of the options that were given, by name."""
    return {name: value for name, value in options.items() if value is not None}


def resources(workers: int | None, address: str | None) -> ResourcesConfig:
    return ResourcesConfig(workers=workers or 0, address=address)
