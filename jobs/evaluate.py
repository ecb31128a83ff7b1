"""The command `influence evaluate`: how far a run's answers can be trusted."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from influence.config import ResourcesConfig, parse_bytes
from influence.errors import RequestError
from influence.run import Run, open_run
from jobs.answers import Asked, measurements_of
from jobs.progress import say

if TYPE_CHECKING:
    from influence.evaluation.bank import Bank
    from jobs.lds import LdsOutcome

KNOWN_METRICS = ("lds",)
DEFAULT_METHODS = ("ekfac", "gradient-cosine", "bm25")
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay")
"""Options that are fields of `RetrainingSettings`."""


def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory")],
    metric: Annotated[str, typer.Argument(help="what is measured: lds, the linear datamodelling score")],
    queries: Annotated[Path, typer.Option("--queries", help="jsonl file of queries: id and prompt, completion; or text; or input_ids")],
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
        typer.Option("--method", help="ekfac, gradient-cosine, gradient-dot or bm25; may be repeated (all but gradient-dot)"),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", metavar="NAME=FILE", help=".npy file [queries, sequences] of another method's scores; may be repeated"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="directory for lds.json and lds.png; RUN/evaluations when left out")] = None,
    model: Annotated[str | None, typer.Option("--model", help="where the model is now, if it moved; its weights must be the same")] = None,
    memory_budget: Annotated[str, typer.Option("--memory-budget", help="memory for model, factors and batches")] = "16GiB",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on standard output and nothing else there")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """How far the answers can be trusted: their scores against what retraining without sequences really does."""
    if metric not in KNOWN_METRICS:
        raise RequestError(f"there is no metric {metric!r}; there is: {', '.join(KNOWN_METRICS)}")
    training = dict(zip(TRAINING, (epochs, batch_size, learning_rate, weight_decay), strict=True))
    other = {"base": base, "subsets": subsets, "seeds": seeds, "workers": workers, "address": address}
    given = {name: value for name, value in {**training, **other}.items() if value is not None}
    _check_source(bank, retrain, given)
    outcome = _evaluate_lds(
        run=_open(run, model, memory_budget),
        queries=queries,
        bank=bank,
        retraining=given,
        methods=tuple(dict.fromkeys(method or DEFAULT_METHODS)),
        scores=scores or (),
        out=out,
    )
    if as_json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        outcome.print(Console(markup=False, highlight=False, soft_wrap=True))


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
    run: Run,
    queries: Path,
    bank: Path | None,
    retraining: Mapping[str, Any],
    methods: Sequence[str],
    scores: Sequence[str],
    out: Path | None,
) -> "LdsOutcome":
    """Everything that can be refused is, before scores are computed; and these before models are retrained, which takes longest."""
    from influence.evaluation.methods import check_method, read_scores
    from jobs.lds import measure_lds, scored

    for method in methods:
        check_method(method)
    files = _named_files(scores, methods)
    directory = _writable_directory(out or run.directory.path / "evaluations")
    asked = measurements_of(run, None, None, None, None, queries)
    external = {name: read_scores(path, len(asked), len(run.store)) for name, path in files.items()}
    places, make_bank = _retrained_bank(run, asked, retraining) if bank is None else _given_bank(run, asked, bank)
    asked = [asked[place] for place in places]
    tables = scored(run, methods, [measurement for _, measurement in asked], {name: table[places] for name, table in external.items()})
    path, known = make_bank()
    outcome = measure_lds(run, asked, tables, known, path, directory)
    outcome.write()
    return outcome


Source = tuple[list[int], Callable[[], "tuple[Path, Bank]"]]
"""(places of the queries that are evaluated, what gives the bank of their losses and its path)."""


def _given_bank(run: Run, asked: Asked, path: Path) -> Source:
    from influence.evaluation.bank import check_sequences, queries_in_bank, read_bank

    bank = read_bank(path)
    try:
        check_sequences(bank, run.store, len(run.store))
        found = queries_in_bank(bank, [measurement for _, measurement in asked])
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    if len(found) < len(asked):
        say(f"the bank has losses of {len(found)} queries: the first {len(found)} of {len(asked)} are evaluated")
    chosen = bank.with_queries([column for _, column in found])
    return [place for place, _ in found], lambda: (path, chosen)


def _retrained_bank(run: Run, asked: Asked, given: Mapping[str, Any]) -> Source:
    from influence.evaluation.bank import read_bank
    from influence.evaluation.retraining import RetrainingSettings
    from jobs.retraining import check_bank_size, retrain, retraining_of

    num_subsets, num_seeds = given.get("subsets", 32), given.get("seeds", 2)
    check_bank_size(num_subsets, num_seeds, len(run.store))
    settings = RetrainingSettings(**{name: given[name] for name in TRAINING if name in given})
    resources = ResourcesConfig(workers=given.get("workers", 0), address=given.get("address"))
    retraining = retraining_of(run, given["base"], [measurement for _, measurement in asked], settings)

    def make() -> "tuple[Path, Bank]":
        path = retrain(run, retraining, num_subsets, num_seeds, resources)
        return path, read_bank(path)

    return list(range(len(asked))), make


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


def _writable_directory(path: Path) -> Path:
    """The path, checked before the work and not after it; it is made when there is something to write."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise RequestError(f"--out: {nearest} is not a directory that can be written to; name another one")
    return path


def _open(run: Path, model: str | None, memory_budget: str) -> Run:
    budget = parse_bytes(memory_budget)  # what is not a size comes back as it is
    if not isinstance(budget, int) or budget <= 0:
        raise RequestError(f"--memory-budget: {memory_budget!r} is not a size such as 4GiB")
    return open_run(run, model=model, memory_budget=budget)
