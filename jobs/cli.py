"""The command line `influence`.

Standard output carries results only (one JSON object with --json); progress and messages go to standard error. Exit status 0: done, 1: the work
failed, 2: the request was wrong, in one clear line.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from influence.answering import QueryOptions
from influence.config import is_url, load_config
from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.report import words
from influence.result import InfluenceResult
from influence.run import Run, open_run
from influence.run_facts import coverage_facts, data_facts, living_facts
from jobs.answers import answer_queries, keep_answers, measurements_of
from jobs.driver import run_all, stage_states
from jobs.evaluate import evaluate
from jobs.health import health
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
    Server,
    Where,
    open_within,
    refinement,
    with_config_options,
)
from jobs.plan import plan
from jobs.progress import progress_lines, say
from jobs.remote import ask_server, questions_of
from jobs.report import report
from jobs.serve import serve, tokens
from jobs.submit import jobs, submit

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Which training examples made this model say that?"
)


def _local_directory(text: str) -> Path:
    if is_url(str(text)):
        raise typer.BadParameter("the demo is made in a local directory")
    return Path(text)


Out = Annotated[Path, typer.Option("--out", parser=_local_directory, metavar="DIR", help="directory for everything the demo makes")]


def main() -> None:
    """The console script. Turns errors into one line and an exit status."""
    debug = "--debug" in sys.argv
    _quiet_libraries()
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on from here", 130)
    except TyperException as error:
        if len(sys.argv) == 1:  # the message is the help, which has lines
            say(error.format_message())
            sys.exit(error.exit_code)
        _fail(error.format_message(), error.exit_code)
    except RequestError as error:
        _fail(str(error), 2, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing more to say
        sys.exit(0)
    except Exception as error:
        _fail(f"{str(error) or 'no message'} ({type(error).__name__}; --debug shows where)", 1, debug)
    sys.exit(status or 0)


def _fail(message: str, status: int, debug: bool = False) -> None:
    """Ends the process with the message as one line, below the traceback of what happened when `debug` asks for it."""
    if debug:
        traceback.print_exc()
    say(f"error: {' '.join(message.split())}")
    sys.exit(status)


def _quiet_libraries() -> None:
    """Bars and notices of other libraries would mix with ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    workers: Annotated[int, typer.Option("--workers", min=0, help="Ray workers; 0 runs everything in this process")] = 0,
    flip: Annotated[
        float, typer.Option("--flip", metavar="SHARE", help="make so much of the planted statements wrong, for `evaluate mislabel`")
    ] = 0.0,
    flip_seed: Annotated[int, typer.Option("--flip-seed", min=0, help="which statements --flip makes wrong")] = 0,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="passes over the text that the model is trained for (12)")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole main job on real text, offline: data, model, factors, index, queries with known answers, report."""
    from jobs.demo.model import TrainingSettings
    from jobs.demo.run import run_demo

    training = TrainingSettings() if epochs is None else TrainingSettings(epochs=epochs)
    outcome = run_demo(out, workers, training, flip, flip_seed)
    if as_json:
        _print_json(outcome.to_json())
    else:
        outcome.print(Console())


@app.command()
@with_config_options
def run(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration; options given beside it win", show_default=False)] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="stop after this stage, such as factors")] = None,
    as_json: Json = False,
    debug: Debug = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Every stage that is not yet done, in order; after a crash, the same command goes on where it was."""
    settings = load_config(config, overrides)
    if (settings.resources.address or "").startswith(("http://", "https://")):
        raise RequestError(f"{settings.resources.address} is a jobs API: `influence submit` takes it; `run` takes auto or ray://HEAD:10001")
    start = time.monotonic()
    finished = run_all(settings, until)
    if as_json:
        _print_json(_status(finished) | {"seconds": round(time.monotonic() - start, 2)})
    else:
        _print_status(finished)


@app.command()
def status(
    run: RunPlace,
    verify: Annotated[bool, typer.Option("--verify", help="also check every file against its checksum")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Stages, units done, throughput and time left; and what the run is made of."""
    opened = open_run(run)
    if verify:
        _verify(opened)
    if as_json:
        _print_json(_status(opened))
    else:
        _print_status(opened)


@app.command()
def query(
    run: RunPlace,
    prompt: Prompt = None,
    completion: Completion = None,
    k: Annotated[int, typer.Option("-k", help="how many sequences")] = 10,
    opponents: Annotated[bool, typer.Option("--opponents", help="the most negative sequences instead of the most positive")] = False,
    exact: Exact = False,
    contrast: Annotated[str | None, typer.Option("--contrast", help="another completion: explain the difference to it")] = None,
    span: Annotated[
        str | None, typer.Option("--span", metavar="A:B", help="only tokens A to B-1 of the completion; several spans as A:B,C:D")
    ] = None,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="only layers that match this glob; may be repeated")] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", help="how many of the index's best are reranked exactly; left out, as many as its measured recall asks for"
        ),
    ] = None,
    where: Where = None,
    queries: Queries = None,
    as_one: AsOne = None,
    data: Data = None,
    direction: DirectionFile = None,
    reduce: Reduce = None,
    by_output_token: ByOutputToken = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="colour each token by its share (red helps, teal hurts)")] = False,
    normalize: Normalize = False,
    refine: Refine = False,
    refine_steps: RefineSteps = RefineOptions.steps,
    refine_sequences: RefineSequences = RefineOptions.sequences,
    bm25: Annotated[bool, typer.Option("--bm25", help="show each sequence's rank in lexical search")] = False,
    also: AlsoRuns = None,
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    server: Server = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The most influential training sequences for a completion."""
    options = QueryOptions(
        k=k,
        opponents=opponents,
        exact=exact,
        layers=tuple(layers or ()),
        candidates=candidates,
        where=where,
        normalize=normalize,
        refine=refinement(refine, refine_steps, refine_sequences),
        bm25=bm25,
        by_output_token=by_output_token,
    )
    if server is not None:
        if model is not None:
            raise RequestError("--model is where this machine has the model; a server has its own: leave it out beside --server")
        if data or direction is not None or reduce is not None:
            raise RequestError("--data and --direction read files of this machine, which a server does not have: ask without --server")
        questions = questions_of(prompt, completion, contrast, span, queries, as_one)
        results = ask_server(server, str(run), questions, options, [str(other) for other in also or []])
        several = queries is not None and as_one is None
        _show_results(list(zip([name for name, _ in questions], results, strict=True)), several, as_json, tokens, bm25)
        return
    opened = open_within(run, model, memory_budget)
    asked = measurements_of(
        opened, prompt, completion, contrast, span, queries, as_one=as_one, data=data, direction=direction, reduce=reduce
    )
    results = answer_queries([opened, *(open_within(other, None, memory_budget) for other in also or [])], asked, options)
    keep_answers(opened, results, opponents)
    several = queries is not None and as_one is None
    _show_results([(name, result) for (name, _), result in zip(asked, results, strict=True)], several, as_json, tokens, bm25)


app.command()(with_config_options(plan))
app.command()(health)
app.command()(report)
app.command()(serve)
app.command()(tokens)
app.command()(with_config_options(submit))
app.add_typer(evaluate, name="evaluate")
app.add_typer(jobs, name="jobs")


@app.command()
def append(
    run: RunPlace,
    files: Annotated[list[str], typer.Argument(help="files of the same form as the run's own data")],
    model: ModelOption = None,
    memory_budget: Memory = "16GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add sequences to the index, without fitting the factors again."""
    from jobs import living

    done = living.append(open_within(run, model, memory_budget), files)
    if as_json:
        _print_json({"run": str(run), **done})
    else:
        print(f"{run}: appended {done['appended']:,} sequences; {done['sequences'] - done['removed']:,} are searched")


@app.command()
def remove(
    run: RunPlace,
    ids: Annotated[
        Path | None, typer.Option("--ids", help="file of ids, of sequences or documents: one a line, or jsonl with an id")
    ] = None,
    erase: Annotated[bool, typer.Option("--erase", help="also take what was removed, now or before, out of the run's files")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take sequences out of every answer from now on, and out of the files with --erase."""
    from jobs import living

    if ids is None and not erase:
        raise RequestError("give --ids FILE, the sequences to remove; or --erase, to take out of the files what was removed before")
    opened = open_run(run)
    done = living.remove(opened, living.read_ids(ids)) if ids else {}
    done |= living.erase(opened) if erase else {}
    if as_json:
        _print_json({"run": str(run), **done})
        return
    if ids:
        print(f"{run}: removed {done['removed_now']:,} sequences; {done['sequences'] - done['removed']:,} are searched")
    if erase:
        print(f"{run}: erased {done['erased_now']:,} sequences from the files")


def _show_results(results: list[tuple[str, InfluenceResult]], several: bool, as_json: bool, tokens: bool, bm25: bool) -> None:
    if several and as_json:
        _print_json({"queries": [result.to_json() | {"id": name} for name, result in results]})
    elif as_json:
        _print_json(results[0][1].to_json())
    else:
        for _, result in results:
            _print_result(result, tokens, bm25)


# what people see


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _verify(run: Run) -> None:
    for stage, state in stage_states(run).items():
        if state["done"]:
            units = run.directory.unit_names(stage)
            run.directory.bring(stage, units)
            for unit in units:
                run.directory.verify(stage, unit)


def _status(run: Run) -> dict[str, Any]:
    states = stage_states(run)
    finished = all(state["total"] is not None and state["done"] == state["total"] for state in states.values())
    status: dict[str, Any] = {"run": str(run.directory), "finished": finished, "stages": states, **run.description}
    if states["sequences"]["done"]:
        status["data"] = data_facts(run)
    if states["layers"]["done"]:
        status["coverage"] = coverage_facts(run)
    if finished:
        status["living"] = living_facts(run)
        status["fidelity"] = run.fidelity.to_json() if run.fidelity else None
    else:
        status["progress"] = run.directory.read_progress()
    return status


def _print_status(run: Run) -> None:
    status = _status(run)
    console = Console(markup=False, highlight=False, soft_wrap=True)  # a path may hold brackets, and must stay in one piece
    console.print(f"{status['run']}: {'finished' if status['finished'] else 'not finished'}")
    table = Table("stage", "done", "of")
    for name, state in status["stages"].items():
        table.add_row(name, str(state["done"]), "?" if state["total"] is None else str(state["total"]))
    console.print(table)
    if progress := status.get("progress"):
        for line in progress_lines(progress):
            console.print(line)
    if data := status.get("data"):
        console.print(f"data: {data['sequences']:,} sequences, {data['tokens']:,} tokens, {data['num_left_out']} left out")
    changes = list(status.get("living", {}).values())
    if any(changes):
        added, removed, erased = changes
        console.print(f"since then: {added:,} sequences appended, {removed:,} removed, {erased:,} of these erased from the files")
    if coverage := status.get("coverage"):
        share = coverage["parameters_attributed"]
        console.print(
            f"coverage: {share:.1%} of the parameters, in {len(coverage['layers'])} layers; {len(coverage['excluded'])} modules excluded"
            + (f", {len(coverage['whole'])} not split" if coverage["whole"] else "")
        )
    if status["finished"] and run.fidelity:
        end = run.fidelity.end(normalized=False, opponents=False)
        depths = "; ".join(f"{share:.3f} among {depth}" for depth, share in end.recall[max(k for k in end.recall if k <= 10)].items())
        console.print(
            f"fidelity of the index to exact EK-FAC, {run.fidelity.num_queries} queries: NDCG@20 {end.ndcg_at_20:.3f}, "
            f"of the exact top 10 {depths}; {end.candidates_for(10)} candidates are reranked for 10 results"
        )
        if run.fidelity.is_coarse:
            size = run.index_config.bytes_per_sequence
            wider = ", ".join(f"{times * size:,} would give about {share:.3f}" for times, share in run.fidelity.of_wider.items())
            wider = wider or "more would give more"
            console.print(
                f"the index is coarse for this model: NDCG@20 {end.ndcg_at_20:.3f} with {size:,} bytes a sequence; {wider} "
                f"(index.bytes_per_sequence; `influence evaluate {run.directory} fidelity` measures it)"
            )
    for name, value in status["fingerprints"].items():
        console.print(f"{name}: {value}")


def _print_result(result: InfluenceResult, tokens: bool, bm25: bool) -> None:
    console = Console(markup=False, highlight=False)
    query, provenance = result.query, result.provenance
    console.print(Text(f"{query['prompt']}", style="dim") + Text(query["completion"], style="bold"))
    if measured := words.measured(query.get("measured")):
        console.print(measured, style="dim")
    console.print(f"log-probability {query['log_probability']:.3f} nats", style="dim")
    largest = max((abs(share) for sequence in result.sequences for _, share in sequence.tokens), default=0.0)
    table = Table("rank", f"score ({result.unit})", "id", *(["bm25"] if bm25 else []), "text", show_lines=tokens)
    for sequence in result.sequences:
        text = _coloured(sequence.tokens, largest) if tokens else Text(" ".join(sequence.text.split())[:200])
        if origin := words.origin(sequence.documents):
            text += Text(f" ({origin})", style="dim")
        if sequence.duplicates:
            names = ", ".join(name for name, _ in sequence.duplicates[:3]) + (", …" if len(sequence.duplicates) > 3 else "")
            text += Text(f" (with {len(sequence.duplicates)} near-duplicates: {names})", style="dim")
        lexical = [str(sequence.bm25_rank or "-")] if bm25 else []
        table.add_row(str(sequence.rank), f"{sequence.score:+.4g}", Text(sequence.id), *lexical, text)
    console.print(table)
    if result.lexical:
        names = ", ".join(found["id"] for found in result.lexical["results"])
        console.print(
            f"BM25 shares {result.lexical['overlap']} of its first {len(result.lexical['results'])} with these: {names}", style="dim"
        )
    if tokens and provenance.get("tokens_by") == "output":
        console.print("a token is coloured by its share of the score as the one that was to be predicted", style="dim")
    num_counted = sum(value is not None for value in query["token_log_probabilities"])
    spread = words.tail_sentence(result.distribution), words.memorised(result.distribution, _verbatim(result), num_counted)
    console.print(" ".join(spread), style="dim")
    recall = provenance["recall_at_10"]
    if refinement := provenance.get("refinement"):
        console.print(
            f"refined in {refinement['steps']} steps to a relative residual of {refinement['relative_residual']:.2g}, with the exact Hessian of "
            f"{refinement['sequences']:,} sequences, damping {refinement['damping']}",
            style="dim",
        )
    console.print(
        f"searched {provenance['searched']:,} sequences, reranked {provenance['candidates']:,} exactly in {provenance['seconds']:.2f} s; "
        f"{result.coverage['parameters_attributed']:.1%} of the parameters; recall of the top 10 "
        + (
            "not measured for this kind of query"
            if recall is None
            else f"{recall:.3f}, NDCG@20 before the rerank {provenance['ndcg_at_20']:.3f}"
        ),
        style="dim",
    )


def _verbatim(result: InfluenceResult) -> list[dict[str, Any]]:
    return [{"verbatim": sequence.verbatim} for sequence in result.sequences if sequence.score > 0]


def _coloured(tokens: list[tuple[str, float]], largest: float) -> Text:
    """Red helps, teal hurts; the stronger the larger the token's share."""
    line = Text()
    for token, share in tokens:
        strength = round(200 * abs(share) / largest) if largest else 0
        colour = f"rgb({255},{255 - strength},{255 - strength})" if share > 0 else f"rgb({255 - strength},{255},{255 - strength // 4})"
        line.append(token, style=f"black on {colour}")
    return line


if __name__ == "__main__":
    main()
