"""The command `influence evaluate`: how far a run's answers can be trusted."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.living import Living
from influence.refinement import RefineOptions
from influence.run import Run
from jobs.answers import Asked, measurements_of
from jobs.options import AlsoRuns, Debug, Json, Memory, ModelOption, RefineSequences, RefineSteps, RunPlace, open_within
from jobs.progress import say

if TYPE_CHECKING:
    from influence.evaluation.bank import Bank
    from jobs.fidelity import FidelityOutcome
    from jobs.lds import LdsOutcome

KNOWN_METRICS = ("lds", "fidelity")
FIDELITY_SEQUENCES = 5_000
DEFAULT_METHODS = ("ekfac", "gradient-cosine", "bm25")
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay")
"""Options that are fields of `RetrainingSettings`."""


def evaluate(
    run: RunPlace,
    metric: Annotated[str, typer.Argument(help="lds, the linear datamodelling score; or fidelity of the index to exact EK-FAC")],
    queries: Annotated[
        Path | None,
        typer.Option("--queries", help="jsonl file of queries: id and prompt, completion; or text; or input_ids; lds needs it"),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option("--sequences", min=2, help="fidelity: over how many training sequences, chosen by hash of their ids (5000)"),
    ] = None,
    bank: Annotated[Path | None, typer.Option("--bank", help=".npz file of retrained models: masks and query_losses")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="retrain models on random halves of the training sequences")] = False,
    base: Annotated[str | None, typer.Option("--base", help="the model before it was trained on the data: a directory or hub id")] = None,
    subsets: Annotated[int | None, typer.Option("--subsets", help="how many random halves (32)")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="how many models of each half (2)")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="passes over the half (3)")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="sequences in a step (16)")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="highest learning rate of AdamW (5e-4)")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="weight decay of AdamW (0.01)")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Ray workers that retrain; 0 (the default): this process")] = None,
    address: Annotated[str | None, typer.Option("--address", help="address of a Ray cluster that retrains")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="ekfac, refined, index, gradient-cosine, gradient-dot or bm25; may be repeated (ekfac, gradient-cosine, bm25)"
        ),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", metavar="NAME=FILE", help=".npy file [queries, sequences] of another method's scores; may be repeated"),
    ] = None,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    also: AlsoRuns = None,
    out: Annotated[Path | None, typer.Option("--out", help="directory for what is written; RUN/evaluations when left out")] = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How far the answers can be trusted: their scores against what retraining without sequences really does."""
    if metric not in KNOWN_METRICS:
        raise RequestError(f"there is no metric {metric!r}; there is: {', '.join(KNOWN_METRICS)}")
    training = dict(zip(TRAINING, (epochs, batch_size, learning_rate, weight_decay), strict=True))
    other = {"base": base, "subsets": subsets, "seeds": seeds, "workers": workers, "address": address}
    given = {name: value for name, value in {**training, **other}.items() if value is not None}
    opened = open_within(run, model, memory_budget)
    outcome: FidelityOutcome | LdsOutcome
    if metric == "fidelity":
        for_lds = {"bank": bank, "retrain": retrain or None, "method": method, "scores": scores, "also": also, **given}
        _refuse_options(for_lds, "lds", metric)
        outcome = _evaluate_fidelity(opened, queries, sequences or FIDELITY_SEQUENCES, out)
    else:
        _refuse_options({"sequences": sequences}, "fidelity", metric)
        if queries is None:
            raise RequestError("lds needs --queries FILE: the queries whose losses the retrained models have")
        _check_source(bank, retrain, given)
        outcome = _evaluate_lds(
            runs=[opened, *(open_within(other, None, memory_budget) for other in also or [])],
            queries=queries,
            bank=bank,
            retraining=given,
            methods=tuple(dict.fromkeys(method or DEFAULT_METHODS)),
            refine=RefineOptions(steps=refine_steps, sequences=refine_sequences),
            scores=scores or (),
            out=out,
        )
    if as_json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        outcome.print(Console(markup=False, highlight=False, soft_wrap=True))


def _refuse_options(options: Mapping[str, Any], theirs: str, metric: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RequestError(f"--{given[0].replace('_', '-')} goes with {theirs}, not with {metric}")


def _evaluate_fidelity(run: Run, queries: Path | None, sequences: int, out: Path | None) -> "FidelityOutcome":
    from jobs.fidelity import measure_fidelity

    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries) if queries else None
    outcome = measure_fidelity(run, asked, sequences, directory)
    outcome.write()
    return outcome


def _check_source(bank: Path | None, retrain: bool, given: Mapping[str, Any]) -> None:
    """Either a bank or --retrain with --base; what belongs to the one does not go with the other."""
    if (bank is None) != retrain:
        raise RequestError("give --bank FILE.npz, or --retrain --base DIR to make one" + (", not both" if retrain else ""))
    if bank is not None and given:
        raise RequestError(f"--{next(iter(given)).replace('_', '-')} goes with --retrain, not with --bank")
    if retrain and "base" not in given:
        raise RequestError("--retrain needs --base: the model before it was trained on the data, as a directory or hub id")


def _evaluate_lds(
    *,
    runs: Sequence[Run],
    queries: Path,
    bank: Path | None,
    retraining: Mapping[str, Any],
    methods: Sequence[str],
    refine: RefineOptions,
    scores: Sequence[str],
    out: Path | None,
) -> "LdsOutcome":
    """Everything that can be refused is, before scores are computed; and these before models are retrained, which takes longest."""
    from influence.evaluation.methods import check_method, read_scores
    from jobs.lds import measure_lds, scored

    run = runs[0]
    for one in runs:
        if one.directory.living != Living():
            raise RequestError(
                f"sequences were appended to {one.directory} or removed from it: lds needs the training sequences, all and alone"
            )
    for method in methods:
        check_method(method)
    files = _named_files(scores, methods)
    directory = _directory_for(run, out)
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    places, share, make_bank = _retrained_bank(run, asked, retraining) if bank is None else _given_bank(run, asked, bank)
    asked = [asked[place] for place in places]
    tables = scored(
        runs,
        methods,
        [measurement for _, measurement in asked],
        replace(refine, training_share=share),
        {name: table[places] for name, table in external.items()},
    )
    path, known = make_bank()
    outcome = measure_lds(runs, asked, tables, known, path, directory)
    outcome.write()
    return outcome


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


def _retrained_bank(run: Run, asked: Asked, given: Mapping[str, Any]) -> Source:
    from influence.evaluation.bank import read_bank
    from influence.evaluation.retraining import RetrainingSettings
    from jobs.retraining import check_bank_size, retrain, retraining_of

    run.directory.check_changeable()
    num_subsets, num_seeds = given.get("subsets", 32), given.get("seeds", 2)
    check_bank_size(num_subsets, num_seeds, len(run.store))
    settings = RetrainingSettings(**{name: given[name] for name in TRAINING if name in given})
    resources = ResourcesConfig(workers=given.get("workers", 0), address=given.get("address"))
    retraining = retraining_of(run, given["base"], [measurement for _, measurement in asked], settings)

    def make() -> "tuple[Path, Bank]":
        path = retrain(run, retraining, num_subsets, num_seeds, resources)
        return path, read_bank(path)

    return list(range(len(asked))), 0.5, make


def _named_files(scores: Sequence[str], methods: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE, as given. A name is one of its own, since it stands in the table, the plot and the JSON."""
    files: dict[str, Path] = {}
    for text in scores:
        name, equals, path = text.partition("=")
        if not equals or not path or not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
            raise RequestError(f"--scores: expected NAME=FILE.npy with a name of letters, digits and .+-_, got {text!r}")
        if name in files or name in methods:
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
