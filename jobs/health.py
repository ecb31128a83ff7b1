"""The command `influence health`: the training set in two passes, its files and its page.

What a pass has done stays in the run directory until the files are written, so that a command that was stopped goes on where it was.
"""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import load_file, save_file

from influence.errors import RequestError
from influence.health import PLACE, Arrays, Health, Keep, health_fingerprint, measure_health
from influence.measurement import Measurement
from influence.report import words
from influence.report.report import CSV, PARQUET
from influence.run import Run
from influence.run_directory import digest, write_file
from jobs.answers import measurements_of
from jobs.options import Debug, Json, Memory, ModelOption, RunPlace, open_within
from jobs.progress import bar

SHOWN = 20
"""Values of a metadata column in the terminal."""


def health(
    run: RunPlace,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="jsonl file of queries: influence over their mean, instead of over the training set")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="metadata column to sum by, the first also to judge outliers within; may be repeated"),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="how many sequences of each kind")] = 10,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="also write id and weight of each sequence, as .parquet or .csv")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="directory for what is written; RUN/evaluations/health when left out")] = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The training set in two passes: influence, self-influence, outliers, near-duplicates, shares by metadata and layer, weights."""
    _check_weights(weights)
    if k < 1:
        raise RequestError(f"k must be at least 1, not {k}")
    opened = open_within(run, model, memory_budget)
    if out is None:
        opened.directory.check_keeps_files("--out")
    directory = out or opened.directory.path.joinpath(*PLACE)
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"--out: {directory} is not a directory; name another one")
    asked = None
    if queries is not None:
        asked = measurements_of(opened, None, None, None, None, queries, as_one="mean")[0][1]
    found = kept_health(opened, asked, by, k)
    page = write_health(found, directory)
    if weights is not None:
        write_file(weights, _table_bytes(pa.table({name: list(values) for name, values in found.weights().items()}), weights.suffix))
    if as_json:
        print(json.dumps(found.to_json() | {"page": str(page)}, ensure_ascii=False, allow_nan=False))
    else:
        _print(found, page, weights)


def _check_weights(path: Path | None) -> None:
    """Before the work and not after it."""
    if path is not None and path.suffix not in (PARQUET, CSV):
        raise RequestError(f"--weights: {path} must end in {PARQUET} or {CSV}, which says what is written")
    if path is not None and not path.parent.is_dir():
        raise RequestError(f"--weights: there is no directory {path.parent} to write to; make it first")


def kept_health(run: Run, queries: Measurement | None, by: list[str] | None, k: int) -> Health:
    """The health of the run's sequences, a part that is done being kept in the run directory, if it is on a disk, in case the rest is stopped."""
    if not run.directory.is_local:
        with bar("training set") as progress:
            return measure_health(run, queries, by=by, k=k, progress=progress.advance)
    with run.directory.exclusive(), bar("training set") as progress:
        fingerprint = health_fingerprint(run, queries)
        place = f"evaluations/health-{fingerprint[7:23]}"
        found = measure_health(run, queries, by=by, k=k, keep=_keep(run, place, fingerprint), progress=progress.advance)
        for left in (run.directory.path / place).glob("gradient-*"):  # as large as the model, and of no use once all is scanned
            shutil.rmtree(left)
    return found


def _keep(run: Run, place: str, fingerprint: str) -> Keep:
    def keep(name: str, work: Callable[[], Arrays]) -> Arrays:
        own = digest([fingerprint, name])
        if not run.directory.is_done(place, name, own):
            run.directory.write_unit(place, name, own, partial(_write_arrays, work()))
        return dict(load_file(run.directory.unit_path(place, name) / "arrays.safetensors"))

    return keep


def _write_arrays(arrays: Arrays, directory: Path) -> None:
    save_file(arrays, directory / "arrays.safetensors")


def write_health(found: Health, directory: Path) -> Path:
    """The summary as JSON, a row a sequence in Parquet, and the page, each whole or not at all. Returns the page's path."""
    page = directory / "health.html"
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "health.json", json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False).encode())
    table = pa.table({name: list(values) for name, values in found.columns.items()})
    write_file(directory / "sequences.parquet", _table_bytes(table, PARQUET))
    found.report().to_html(page)
    return page


def _table_bytes(table: pa.Table, suffix: str) -> bytes:
    stream = io.BytesIO()
    if suffix == CSV:
        pyarrow.csv.write_csv(table, stream)
    else:
        pyarrow.parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _print(found: Health, page: Path, weights: Path | None) -> None:
    console, summary = Console(markup=False, highlight=False), found.summary
    about, duplicates, outliers = summary["about"], summary["duplicates"], summary["outliers"]
    target = "the mean log-probability of the training set" if about.get("training_set") else f"the {about['completion']}"
    console.print(f"{summary['sequences']:,} sequences, {summary['tokens']:,} counted tokens, loss {summary['loss']:.3f} nats a token")
    console.print(f"influence on {target}: {words.tail_sentence(summary['concentration'])}")
    for title, name in (("largest influence", "largest"), ("most negative influence", "most_negative")):
        console.print(_ranked(title, "influence", summary[name]))
    for kind, outlying in outliers.items():
        console.print(f"outliers by {kind.replace('_', '-')}: {outlying['above']:,} above, {outlying['below']:,} below")
    console.print(f"near-duplicates: {duplicates['sequences']:,} sequences in {duplicates['groups']:,} groups")
    for column, rows in summary["by"].items():
        table = Table(column, "sequences", "loss a token", "of self-influence", "of influence", "sum (nats)")
        for row in rows[:SHOWN]:
            shares = (words.percent(row["self_influence_share"]), words.percent(row["influence_share"]))
            total = f"{row['positive'] + row['negative']:+.4g}"
            table.add_row(Text(str(row["value"])), f"{row['sequences']:,}", f"{row['loss']:.3f}", *shares, total)
        console.print(table)
        if len(rows) > SHOWN:
            console.print(f"and {len(rows) - SHOWN:,} values of fewer sequences", style="dim")
    console.print(f"{page}", soft_wrap=True)
    if weights is not None:
        console.print(f"weights: {weights}", soft_wrap=True)


def _ranked(title: str, column: str, sequences: list[dict[str, Any]]) -> Table:
    table = Table("rank", f"{title} (nats)", "id", "loss a token", "text")
    for rank, one in enumerate(sequences, 1):
        table.add_row(str(rank), f"{one[column]:+.4g}", Text(one["id"]), f"{one['loss']:.3f}", Text(" ".join(one["text"].split())[:60]))
    return table
