"""The command `influence report`: a page about queries, about a run or about its training set, and the same numbers as JSON, CSV and Parquet."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from influence.answering import QueryOptions
from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.report import Report
from influence.report.report import CSV, PARQUET
from influence.result import query_report
from influence.run import Run
from jobs.answers import answers_with_opponents, asked_before, measurements_of, writable_page
from jobs.health import kept_health
from jobs.options import (
    AlsoRuns,
    AsOne,
    ByOutputToken,
    Completion,
    Data,
    Debug,
    DirectionFile,
    Exact,
    Json,
    Memory,
    ModelOption,
    Normalize,
    Prompt,
    Queries,
    Reduce,
    Refine,
    RefineSequences,
    RefineSteps,
    RunPlace,
    Where,
    open_within,
    refinement,
)

Subject = Literal["queries", "run", "training-set"]

PAGES: dict[Subject, str] = {"queries": "report.html", "run": "report-run.html", "training-set": "report-training-set.html"}


def report(
    run: RunPlace,
    prompt: Prompt = None,
    completion: Completion = None,
    about: Annotated[
        str, typer.Option("--about", metavar="queries|run|training-set", help="what is reported: answers to queries, the run, its data")
    ] = "queries",
    queries: Queries = None,
    as_one: AsOne = None,
    data: Data = None,
    direction: DirectionFile = None,
    reduce: Reduce = None,
    k: Annotated[int, typer.Option("-k", help="how many sequences on either side")] = 10,
    exact: Exact = False,
    where: Where = None,
    normalize: Normalize = False,
    refine: Refine = False,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    also: AlsoRuns = None,
    by_output_token: ByOutputToken = False,
    out: Annotated[Path | None, typer.Option("--out", help="the HTML file; report.html in the run directory when left out")] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="DIR", help="also write every table of the report as a CSV file there")
    ] = None,
    parquet: Annotated[Path | None, typer.Option("--parquet", metavar="DIR", help="the same as Parquet files")] = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: queries with their proponents and opponents, layers, tokens and distribution; or the run, or its training set.

    Without a query, the queries asked of this run so far are reported.
    """
    subject = _subject(about)
    options = QueryOptions(
        k=k,
        exact=exact,
        where=where,
        normalize=normalize,
        refine=refinement(refine, refine_steps, refine_sequences),
        bm25=True,
        by_output_token=by_output_token,
    )
    if subject != "queries":
        _refuse_query_options(subject, prompt, queries, [as_one, data, direction, reduce, also], options)
    opened = open_within(run, model, memory_budget)
    if out is None:
        opened.directory.check_keeps_files("--out")
    page = writable_page(out or opened.directory.path / PAGES[subject])
    folders = {
        kind: _writable_folder(option, path) for option, kind, path in (("--csv", CSV, csv), ("--parquet", PARQUET, parquet)) if path
    }
    if subject == "run":
        found = opened.report()
    elif subject == "training-set":
        asked = None if queries is None else measurements_of(opened, None, None, None, None, queries, as_one="mean")[0][1]
        found = kept_health(opened, asked, None, k).report()
    else:
        runs = [opened, *(open_within(other, None, memory_budget) for other in also or [])]
        found = _of_queries(runs, prompt, completion, queries, as_one, data, direction, reduce, options)
    _written(found, page, folders, as_json)


def _subject(about: str) -> Subject:
    if about not in get_args(Subject):
        raise RequestError(f"--about: expected {', '.join(get_args(Subject)[:-1])} or {get_args(Subject)[-1]}, got {about!r}")
    return cast(Subject, about)


def _refuse_query_options(subject: Subject, prompt: str | None, queries: Path | None, others: list[Any], options: QueryOptions) -> None:
    plain = QueryOptions(bm25=True, k=options.k)
    if prompt is not None or any(others) or options != plain:
        raise RequestError(f"--about {subject} is not about single queries: leave out the query and its options")
    if subject == "run" and queries is not None:
        raise RequestError("--about run takes no --queries: the page is about the run itself")


def _writable_folder(option: str, path: Path) -> Path:
    """Before the work and not after it."""
    if path.exists() and not path.is_dir():
        raise RequestError(f"{option}: {path} is not a directory; name one for the tables")
    return path


def _of_queries(
    runs: list[Run],
    prompt: str | None,
    completion: str | None,
    queries: Path | None,
    as_one: str | None,
    data: list[str] | None,
    direction: Path | None,
    reduce: str | None,
    options: QueryOptions,
) -> Report:
    nothing_asked = prompt is None and queries is None and not data
    if nothing_asked and (as_one or direction or reduce):
        raise RequestError("--as-one goes with --queries FILE, --direction and --reduce with a query")
    asked = (
        asked_before(runs[0])
        if nothing_asked
        else measurements_of(runs[0], prompt, completion, None, None, queries, as_one=as_one, data=data, direction=direction, reduce=reduce)
    )
    return query_report(answers_with_opponents(runs, asked, options), run=runs[0].directory.name)


def _written(found: Report, page: Path, folders: dict[str, Path], as_json: bool) -> None:
    found.to_html(page)
    tables = [path for kind, folder in folders.items() for path in found.write_tables(folder, kind)]
    if as_json:
        told = {"report": str(page), "bytes": page.stat().st_size, "tables": [str(path) for path in tables]}
        print(json.dumps(told | found.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print(page, *tables, sep="\n")
