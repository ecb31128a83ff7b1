"""The command `influence evaluate RUN METRIC`: how far a run's answers can be trusted. A metric is a command of its own, with options of its own."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from typer.core import TyperGroup

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.run import Run
from jobs.answers import Asked, measurements_of
from jobs.options import AlsoRuns, Debug, Json, Memory, ModelOption, RefineSequences, RefineSteps, RunPlace, open_within
from jobs.progress import say

if TYPE_CHECKING:
    from influence.evaluation.bank import Bank
    from influence.evaluation.recipe import Recipe

FIDELITY_SEQUENCES = 5_000
PBRF_STEPS = 30
DEFAULT_METHODS = ("ekfac", "gradient-cosine", "bm25")


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


QueryFile = Annotated[
    Path, typer.Option("--queries", help="jsonl file of queries: id and prompt, completion; or text; or messages; or input_ids")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="ekfac, ekfac-normalized, refined, index, index-normalized, gradient-cosine, gradient-dot or bm25; may be repeated",
    ),
]
ScoreFiles = Annotated[
    list[str] | None,
    typer.Option("--scores", metavar="NAME=FILE", help=".npy file [queries, sequences] of another method's scores; may be repeated"),
]
Sizes = Annotated[
    list[str] | None, typer.Option("-k", help="how many sequences that come first: a number, or a share such as 1%; may be repeated (1%)")
]
Random = Annotated[int, typer.Option("--random", min=0, help="how many random sets of each size, for comparison")]
Out = Annotated[Path | None, typer.Option("--out", help="directory for what is written; RUN/evaluations when left out")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="the model before it was trained on the data: a directory or hub id; left out, as recipe.json says"),
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="how many models of each set of sequences")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="passes over the sequences (3)")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="sequences in a step (16)")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="highest learning rate of AdamW (5e-4)")]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", help="weight decay of AdamW (0.01)")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Ray workers that retrain; 0 (the default): this process")]
Address = Annotated[str | None, typer.Option("--address", help="address of a Ray cluster that retrains")]


class Outcome(Protocol):
    """What a metric measured."""

    def to_json(self) -> dict[str, Any]: ...

    def print(self, console: Console) -> None: ...

    def write(self) -> None: ...


def _finish(outcome: Outcome, as_json: bool) -> None:
    outcome.write()
    if as_json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        outcome.print(Console(markup=False, highlight=False, soft_wrap=True))


@evaluate.command()
def fidelity(
    context: typer.Context,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="jsonl file of queries; left out, halves of training sequences are asked")
    ] = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=2, help="over how many training sequences, chosen by hash of their ids")
    ] = FIDELITY_SEQUENCES,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How close the index, at several sizes, and other rankings come to exact EK-FAC."""
    from jobs.fidelity import measure_fidelity

    run = open_within(context.obj, model, memory_budget)
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries) if queries else None
    _finish(measure_fidelity(run, asked, sequences, directory), as_json)


@evaluate.command()
def lds(
    context: typer.Context,
    queries: QueryFile,
    bank: Annotated[Path | None, typer.Option("--bank", help=".npz file of retrained models: masks and query_losses")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="retrain models on random halves of the training sequences")] = False,
    subsets: Annotated[int | None, typer.Option("--subsets", help="how many random halves (32)")] = None,
    seeds: Seeds = None,
    base: Base = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    workers: Workers = None,
    address: Address = None,
    method: Methods = None,
    scores: ScoreFiles = None,
    damping: Annotated[
        list[float] | None,
        typer.Option("--damping", help="also EK-FAC with this damping, relative to each layer's mean eigenvalue; may be repeated"),
    ] = None,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    also: AlsoRuns = None,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The linear datamodelling score: predicted against real losses of models retrained on random halves of the data."""
    from influence.evaluation.dampings import check_dampings
    from influence.evaluation.methods import read_scores
    from jobs.lds import measure_lds, scored
    from jobs.retraining import check_whole

    changed = _given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, base=base)
    other = _given(subsets=subsets, seeds=seeds, workers=workers, address=address)
    if (bank is None) != retrain:
        raise RequestError("give --bank FILE.npz, or --retrain (with --base DIR) to make one" + (", not both" if retrain else ""))
    if bank is not None and (changed or other):
        raise RequestError(f"--{next(iter({**changed, **other})).replace('_', '-')} goes with --retrain, not with --bank")
    run = open_within(context.obj, model, memory_budget)
    runs = [run, *(open_within(one, None, memory_budget) for one in also or [])]
    for one in runs:
        check_whole(one, "lds")
    methods, files = _methods(method, scores)
    check_dampings(damping or [])
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    # Everything that can be refused is, before scores are computed; and these before models are retrained, which takes longest.
    places, share, make_bank = _given_bank(run, asked, bank) if bank else _halves(run, asked, _recipe(run, changed), other)
    asked = [asked[place] for place in places]
    tables = scored(
        runs,
        methods,
        [measurement for _, measurement in asked],
        replace(RefineOptions(steps=refine_steps, sequences=refine_sequences), training_share=share),
        {name: table[places] for name, table in external.items()},
        damping or [],
    )
    path, known = make_bank()
    _finish(measure_lds(runs, asked, tables, known, path, directory), as_json)


@evaluate.command()
def removal(
    context: typer.Context,
    queries: QueryFile,
    k: Sizes = None,
    random: Random = 3,
    seeds: Seeds = None,
    base: Base = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    workers: Workers = None,
    address: Address = None,
    method: Methods = None,
    scores: ScoreFiles = None,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Models retrained without the sequences that come first, by influence, by words and by chance: what that does to the query."""
    from influence.evaluation.changes import sizes_of
    from influence.evaluation.methods import read_scores
    from jobs.removal import measure_removal
    from jobs.retraining import check_whole, retraining_of
    from jobs.scoring import score_tables

    changed = _given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, base=base)
    run = open_within(context.obj, model, memory_budget)
    check_whole(run, "removal")
    run.directory.check_changeable()
    num_seeds = _at_least_one("--seeds", 1 if seeds is None else seeds)
    sizes = sizes_of(k or ["1%"], len(run.store))
    methods, files = _methods(method, scores, ("ekfac", "bm25"))
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    retraining = retraining_of(run, _recipe(run, changed), [measurement for _, measurement in asked], paired=True)
    refine = RefineOptions(steps=refine_steps, sequences=refine_sequences)
    tables = score_tables(run, methods, asked, refine, external)
    resources = _resources(workers, address)
    _finish(measure_removal(run, asked, tables, sizes, retraining, num_seeds, random, resources, directory), as_json)


@evaluate.command()
def tailpatch(
    context: typer.Context,
    queries: QueryFile,
    k: Sizes = None,
    step_size: Annotated[float, typer.Option("--step-size", help="of gradient descent, on the mean loss of a token")] = 0.1,
    random: Random = 3,
    method: Methods = None,
    scores: ScoreFiles = None,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One training step on the sequences that come first, by influence, by words and by chance: what that does to the query."""
    from influence.evaluation.changes import sizes_of
    from influence.evaluation.methods import read_scores
    from jobs.scoring import score_tables
    from jobs.tailpatch import measure_tailpatch

    if not 0 < step_size < float("inf"):
        raise RequestError(f"--step-size must be a number above 0, not {step_size}")
    run = open_within(context.obj, model, memory_budget)
    sizes = sizes_of(k or ["1%"], len(run.store))
    methods, files = _methods(method, scores)
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    tables = score_tables(run, methods, asked, RefineOptions(steps=refine_steps, sequences=refine_sequences), external)
    _finish(measure_tailpatch(run, asked, tables, sizes, step_size, random, directory), as_json)


@evaluate.command()
def recall(
    context: typer.Context,
    queries: Annotated[
        Path,
        typer.Option(
            "--queries", help='jsonl file of queries, each with "states": ids of the sequences or documents that state the answer'
        ),
    ],
    method: Methods = None,
    scores: ScoreFiles = None,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Where the sequences that are known to state the answer rank, by method and kind of query."""
    from influence.evaluation.methods import read_scores
    from jobs.recall import measure_recall, read_planted
    from jobs.scoring import score_tables

    run = open_within(context.obj, model, memory_budget)
    methods, files = _methods(method, scores)
    directory = _directory_for(run, out)
    planted, asked = read_planted(run, queries), measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    tables = score_tables(run, methods, asked, RefineOptions(steps=refine_steps, sequences=refine_sequences), external)
    _finish(measure_recall(run, planted, tables, directory), as_json)


@evaluate.command()
def mislabel(
    context: typer.Context,
    labels: Annotated[
        Path,
        typer.Option(
            "--labels", help="jsonl file: id of a training sequence, wrong (true, false), and perhaps prompt and completion: the label"
        ),
    ],
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How well self-influence tells training sequences with wrong labels from those with right ones."""
    from jobs.mislabel import measure_mislabel, read_labels

    run = open_within(context.obj, model, memory_budget)
    directory = _directory_for(run, out)
    _finish(measure_mislabel(run, read_labels(run, labels), directory), as_json)


@evaluate.command()
def pbrf(
    context: typer.Context,
    queries: QueryFile,
    copies: Annotated[int, typer.Option("--copies", help="of how many training sequences one more copy is made, one at a time")] = 20,
    refine_steps: RefineSteps = PBRF_STEPS,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    scores: ScoreFiles = None,
    workers: Workers = None,
    address: Address = None,
    out: Out = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The damped response to one more copy of a sequence, solved directly: how well scores predict it. For small models."""
    from influence.evaluation.methods import read_scores
    from jobs.pbrf import METHODS, measure_pbrf
    from jobs.retraining import check_whole

    run = open_within(context.obj, model, memory_budget)
    check_whole(run, "pbrf")
    run.directory.check_changeable()
    _, files = _methods(METHODS, scores)
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    refine = RefineOptions(steps=refine_steps, sequences=refine_sequences, tolerance=0.001)
    _finish(measure_pbrf(run, asked, copies, refine, external, _resources(workers, address), directory), as_json)


def _given(**options: Any) -> dict[str, Any]:
    """Those of the options that were given, by name."""
    return {name: value for name, value in options.items() if value is not None}


def _at_least_one(option: str, number: int) -> int:
    if number < 1:
        raise RequestError(f"{option} must be at least 1, not {number}")
    return number


def _resources(workers: int | None, address: str | None) -> ResourcesConfig:
    return ResourcesConfig(workers=workers or 0, address=address)


def _recipe(run: Run, changed: Mapping[str, Any]) -> "Recipe":
    from influence.evaluation.recipe import read_recipe

    return read_recipe(Path(run.model_config.name), changed)


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


def _halves(run: Run, asked: Asked, recipe: "Recipe", given: Mapping[str, Any]) -> Source:
    import numpy as np

    from influence.evaluation.retraining import random_half
    from jobs.retraining import check_bank_size, retrain, retraining_of

    run.directory.check_changeable()
    num_subsets, num_seeds = given.get("subsets", 32), given.get("seeds", 2)
    check_bank_size(num_subsets, num_seeds, len(run.store))
    resources = _resources(given.get("workers"), given.get("address"))
    retraining = retraining_of(run, recipe, [measurement for _, measurement in asked], paired=False)

    def make() -> "tuple[Path, Bank]":
        masks = np.stack([random_half(run.store.ids, subset) for subset in range(num_subsets)])
        return retrain(run, retraining, masks, num_seeds, resources)

    return list(range(len(asked))), 0.5, make


def _methods(method: Sequence[str] | None, scores: Sequence[str] | None, default: Sequence[str] = DEFAULT_METHODS) -> Any:
    """The methods, and the files of others' scores by name."""
    from influence.evaluation.methods import check_method

    methods = tuple(dict.fromkeys(method or default))
    for name in methods:
        check_method(name)
    return methods, _named_files(scores or (), methods)


def _named_files(scores: Sequence[str], methods: Sequence[str]) -> dict[str, Path]:
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


def _directory_for(run: Run, out: Path | None) -> Path:
    """Where what an evaluation writes goes."""
    if out is None:
        run.directory.check_keeps_files("--out")
    return _writable_directory(out or run.directory.path / "evaluations")


def _writable_directory(path: Path) -> Path:
    """The path, checked before the work and not after it; it is made when there is something to write."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise RequestError(f"--out: {nearest} is not a directory that can be written to; name another one")
    return path
