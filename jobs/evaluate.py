"""The command `influence evaluate RUN METRIC`: how far a run's answers can be trusted. A metric is a command of its own, with options of its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.run import Run
from jobs.answers import Asked, measurements_of
from jobs.evaluation_options import (
    Address,
    Comparison,
    Opening,
    Random,
    ScoreFiles,
    Scoring,
    Sizes,
    Training,
    Workers,
    comparison,
    given,
    resources,
)
from jobs.options import AlsoRuns, RefineSequences, RefineSteps, RequiredQueries, RunPlace, open_within, with_groups
from jobs.progress import say

if TYPE_CHECKING:
    from influence.evaluation.bank import Bank

FIDELITY_SEQUENCES = 5_000
PBRF_STEPS = 30


class _Metrics(TyperGroup):
    """RUN comes before the metric, and a metric that there is not is told with those that there are."""

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        if arguments[0] not in self.commands:
            raise RequestError(f"there is no metric {arguments[0]!r}; there are: {', '.join(self.commands)}")
        return super().resolve_command(context, arguments)


evaluate = typer.Typer(cls=_Metrics, no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def metric_of(context: typer.Context, run: RunPlace) -> None:
    """How far the answers can be trusted, by one of several metrics. Options come after it: influence evaluate RUN METRIC --help."""
    context.obj = run


@evaluate.command()
@with_groups
def fidelity(
    context: typer.Context,
    opening: Opening,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="jsonl file of queries; left out, halves of training sequences are asked")
    ] = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=2, help="over how many training sequences, chosen by hash of their ids")
    ] = FIDELITY_SEQUENCES,
) -> None:
    """How close the index, at several sizes, and other rankings come to exact EK-FAC."""
    from jobs.fidelity import measure_fidelity

    run = opening.run(context.obj)
    directory = opening.directory(run)
    asked = measurements_of(run, None, None, None, None, queries) if queries else None
    opening.finish(measure_fidelity(run, asked, sequences, directory))


@evaluate.command()
@with_groups
def lds(
    context: typer.Context,
    queries: RequiredQueries,
    training: Training,
    scoring: Scoring,
    opening: Opening,
    bank: Annotated[Path | None, typer.Option("--bank", help=".npz file of retrained models: masks and query_losses")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="retrain models on random halves of the training sequences")] = False,
    subsets: Annotated[int | None, typer.Option("--subsets", help="how many random halves (32)")] = None,
    damping: Annotated[
        list[float] | None,
        typer.Option("--damping", help="also EK-FAC with this damping, relative to each layer's mean eigenvalue; may be repeated"),
    ] = None,
    also: AlsoRuns = None,
) -> None:
    """The linear datamodelling score: predicted against real losses of models retrained on random halves of the data."""
    from influence.evaluation.dampings import check_dampings
    from jobs.lds import measure_lds, scored
    from jobs.retraining import check_whole

    if (bank is None) != retrain:
        raise RequestError("give --bank FILE.npz, or --retrain (with --base DIR) to make one" + (", not both" if retrain else ""))
    alone = {**training.changed, **given(subsets=subsets, seeds=training.seeds, workers=training.workers, address=training.address)}
    if bank is not None and alone:
        raise RequestError(f"--{next(iter(alone)).replace('_', '-')} goes with --retrain, not with --bank")
    run = opening.run(context.obj)
    runs = [run, *(open_within(one, None, opening.memory_budget) for one in also or [])]
    for one in runs:
        check_whole(one, "lds")
    check_dampings(damping or [])
    found = comparison(run, queries, opening, scoring)
    # Banks are read and bases checked before scores are computed; and these before models are retrained, which takes longest.
    places, share, make_bank = _given_bank(run, found.asked, bank) if bank else _halves(found, training, 32 if subsets is None else subsets)
    asked = [found.asked[place] for place in places]
    tables = scored(
        runs,
        found.methods,
        [measurement for _, measurement in asked],
        replace(found.refine, training_share=share),
        {name: table[places] for name, table in found.external.items()},
        damping or [],
    )
    path, known = make_bank()
    opening.finish(measure_lds(runs, asked, tables, known, path, found.directory))


Source = tuple[list[int], float, Callable[[], "tuple[Path, Bank]"]]
"""(places of the queries that are evaluated, share of the sequences that a model saw, what gives the bank of their losses and its path)."""


def _given_bank(run: Run, asked: Asked, path: Path) -> Source:
    from influence.evaluation.bank import check_sequences, queries_in_bank, read_bank

    bank = read_bank(path)
    if not bank.masks.any():
        raise RequestError(f"{path}: no sequence is in any subset: masks is all false")
    try:
        check_sequences(bank, run.store, len(run.store))
        found = queries_in_bank(bank, [measurement for _, measurement in asked])
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    if len(found) < len(asked):
        say(f"the bank has losses of {len(found)} queries: the first {len(found)} of {len(asked)} are evaluated")
    chosen = bank.with_queries([column for _, column in found])
    return [place for place, _ in found], float(bank.masks.mean()), lambda: (path, chosen)


def _halves(compared: Comparison, training: Training, num_subsets: int) -> Source:
    import numpy as np

    from influence.evaluation.retraining import random_half
    from jobs.retraining import check_bank_size, retrain, retraining_of

    run, num_seeds = compared.run, 2 if training.seeds is None else training.seeds
    run.directory.check_changeable()
    check_bank_size(num_subsets, num_seeds, len(run.store))
    retraining = retraining_of(run, training.recipe(run), [measurement for _, measurement in compared.asked], paired=False)

    def make() -> "tuple[Path, Bank]":
        masks = np.stack([random_half(run.store.ids, subset) for subset in range(num_subsets)])
        return retrain(run, retraining, masks, num_seeds, training.resources)

    return list(range(len(compared.asked))), 0.5, make


@evaluate.command()
@with_groups
def removal(
    context: typer.Context,
    queries: RequiredQueries,
    training: Training,
    scoring: Scoring,
    opening: Opening,
    k: Sizes = None,
    random: Random = 3,
) -> None:
    """Models retrained without the sequences that come first, by influence, by words and by chance: what that does to the query."""
    from influence.evaluation.changes import sizes_of
    from jobs.removal import measure_removal
    from jobs.retraining import check_whole, retraining_of

    run = opening.run(context.obj)
    check_whole(run, "removal")
    run.directory.check_changeable()
    num_seeds = 1 if training.seeds is None else training.seeds
    if num_seeds < 1:
        raise RequestError(f"--seeds must be at least 1, not {num_seeds}")
    sizes = sizes_of(k or ["1%"], len(run.store))
    found = comparison(run, queries, opening, scoring, ("ekfac", "bm25"))
    retraining = retraining_of(run, training.recipe(run), [measurement for _, measurement in found.asked], paired=True)
    directory, work = found.directory, training.resources
    opening.finish(measure_removal(run, found.asked, found.tables, sizes, retraining, num_seeds, random, work, directory))


@evaluate.command()
@with_groups
def tailpatch(
    context: typer.Context,
    queries: RequiredQueries,
    scoring: Scoring,
    opening: Opening,
    k: Sizes = None,
    step_size: Annotated[float, typer.Option("--step-size", help="of gradient descent, on the mean loss of a token")] = 0.1,
    random: Random = 3,
) -> None:
    """One training step on the sequences that come first, by influence, by words and by chance: what that does to the query."""
    from influence.evaluation.changes import sizes_of
    from jobs.tailpatch import measure_tailpatch

    if not 0 < step_size < float("inf"):
        raise RequestError(f"--step-size must be a number above 0, not {step_size}")
    run = opening.run(context.obj)
    sizes = sizes_of(k or ["1%"], len(run.store))
    found = comparison(run, queries, opening, scoring)
    opening.finish(measure_tailpatch(run, found.asked, found.tables, sizes, step_size, random, found.directory))


@evaluate.command()
@with_groups
def recall(
    context: typer.Context,
    queries: Annotated[
        Path,
        typer.Option(
            "--queries", help='jsonl file of queries, each with "states": ids of the sequences or documents that state the answer'
        ),
    ],
    scoring: Scoring,
    opening: Opening,
) -> None:
    """Where the sequences that are known to state the answer rank, by method and kind of query."""
    from jobs.recall import measure_recall, read_planted

    run = opening.run(context.obj)
    found = comparison(run, queries, opening, scoring)
    planted = read_planted(run, queries)
    opening.finish(measure_recall(run, planted, found.tables, found.directory))


@evaluate.command()
@with_groups
def mislabel(
    context: typer.Context,
    labels: Annotated[
        Path,
        typer.Option(
            "--labels", help="jsonl file: id of a training sequence, wrong (true, false), and perhaps prompt and completion: the label"
        ),
    ],
    opening: Opening,
) -> None:
    """How well influence tells training sequences with wrong labels from those with right ones."""
    from jobs.mislabel import measure_mislabel, read_labels

    run = opening.run(context.obj)
    directory = opening.directory(run)
    opening.finish(measure_mislabel(run, read_labels(run, labels), directory))


@evaluate.command()
@with_groups
def pbrf(
    context: typer.Context,
    queries: RequiredQueries,
    opening: Opening,
    copies: Annotated[int, typer.Option("--copies", help="of how many training sequences one more copy is made, one at a time")] = 20,
    refine_steps: RefineSteps = PBRF_STEPS,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    scores: ScoreFiles = None,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """The damped response to one more copy of a sequence, solved directly: how well scores predict it. For small models."""
    from jobs.pbrf import METHODS, measure_pbrf
    from jobs.retraining import check_whole

    run = opening.run(context.obj)
    check_whole(run, "pbrf")
    run.directory.check_changeable()
    scoring = Scoring(scores=scores, refine_steps=refine_steps, refine_sequences=refine_sequences)
    found = comparison(run, queries, opening, scoring, METHODS)
    refine = replace(found.refine, tolerance=0.001)
    opening.finish(measure_pbrf(run, found.asked, copies, refine, found.external, resources(workers, address), found.directory))
