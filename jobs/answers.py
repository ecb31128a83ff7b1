"""Questions and answers as the command line and the demo exchange them: files of queries, kept answers, and report pages.

Knows runs and files of queries; knows nothing of options or terminals.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from influence.answering import QueryOptions, answer, answer_both_ends
from influence.errors import RequestError
from influence.measurement import Measurement
from influence.result import InfluenceResult, report_page
from influence.run import Run
from influence.solving import Progress, ignore
from jobs.progress import bar, say

Asked = list[tuple[str, Measurement]]
"""(id of the query, what is measured)."""


def answer_queries(runs: Sequence[Run], asked: Asked, options: QueryOptions) -> list[InfluenceResult]:
    with _watched(options) as progress:
        return answer(runs, [measurement for _, measurement in asked], options, progress)


def answers_with_opponents(runs: Sequence[Run], asked: Asked, options: QueryOptions) -> list[dict[str, Any]]:
    """Each query's answer as JSON, its opponents beside its proponents, as the report shows them."""
    with _watched(options) as progress:
        both = answer_both_ends(runs, [measurement for _, measurement in asked], options, progress)
    return [
        for_.to_json() | {"id": name, "opponents": against.to_json()["results"]}
        for (name, _), (for_, against) in zip(asked, both, strict=True)
    ]


@contextmanager
def _watched(options: QueryOptions) -> Iterator[Progress]:
    """A bar for answers that take long: a refinement, and then a scan of everything."""
    if not (options.exact or options.refine):
        yield ignore
        return
    with bar("refining and scanning" if options.exact and options.refine else "exact scan" if options.exact else "refining") as progress:
        yield progress.advance


def write_page(path: Path, answers: list[dict[str, Any]], run: Run) -> None:
    """The report as a file that appears whole or not at all."""
    page = report_page(answers, run=run.directory.name, created=date.today().isoformat())
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(page, encoding="utf-8")
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def writable_page(path: Path) -> Path:
    """The path, checked before the work and not after it."""
    if path.is_dir():
        raise RequestError(f"--out: {path} is a directory; name the HTML file to write")
    if not path.parent.is_dir():
        raise RequestError(f"--out: there is no directory {path.parent} to write the report to; make it first")
    return path


def keep_answers(run: Run, results: list[InfluenceResult], opponents: bool) -> None:
    """Keeps the answers for `influence report`. Where they cannot be kept, in a run that may only be read, they are still given."""
    try:
        for result in results:
            run.directory.keep_answer(result.id, result.to_json() | {"opponents_asked": opponents})
    except OSError as error:
        say(f"warning: the answer is not kept for `influence report`: {error.filename or run.directory}: {error.strerror}")


def asked_before(run: Run) -> Asked:
    asked = [(answer["id"], answer["query"]) for answer in run.directory.answers()]
    if not asked:
        raise RequestError(f"nothing was asked of {run.directory} yet: give a prompt and a completion, or --queries FILE")
    what = ("prompt", "completion", "contrast", "span", "input_ids")
    latest = {json.dumps([query.get(key) for key in what]): (name, query) for name, query in asked}
    return [(name, _asked_again(run, query)) for name, query in list(latest.values())[-20:]]


def _asked_again(run: Run, query: dict[str, Any]) -> Measurement:
    if "input_ids" in query:
        return run.measure_tokens(query["input_ids"])
    span = query.get("span")
    return run.measure(
        query["prompt"], query["completion"], contrast=query.get("contrast"), span=(int(span[0]), int(span[1])) if span else None
    )


def measurements_of(
    run: Run, prompt: str | None, completion: str | None, contrast: str | None, span: str | None, queries: Path | None
) -> Asked:
    if queries is not None:
        if prompt is not None or contrast is not None or span is not None:
            raise RequestError("give a prompt and completion (with --contrast or --span), or --queries FILE, not both")
        return [(name, _measurement_of(run, item, place)) for name, item, place in read_queries(queries)]
    if prompt is None or completion is None:
        raise RequestError("give PROMPT and COMPLETION, or --queries FILE")
    return [("query", run.measure(prompt, completion, contrast=contrast, span=parse_span(span)))]


def parse_span(span: str | None) -> tuple[int, int] | None:
    """The span A:B as two numbers. Raises RequestError for anything else."""
    if span is None:
        return None
    first, colon, last = span.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise RequestError(f"--span: expected two token numbers such as 0:3, got {span!r}")
    return int(first), int(last)


def read_queries(path: Path) -> list[tuple[str, dict[str, Any], str]]:
    """(id, the line's object, where it stands) for each query of the file. Raises RequestError when it holds none, or something else."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(item, dict):
            raise RequestError(f"{path}, line {number}: expected a JSON object")
        found.append((str(number if item.get("id") is None else item["id"]), item, f"{path}, line {number}"))
    if not found:
        raise RequestError(f"{path} holds no query")
    return found


def _measurement_of(run: Run, item: dict[str, Any], place: str) -> Measurement:
    try:
        if isinstance(item.get("input_ids"), list):
            return run.measure_tokens(item["input_ids"])
        if isinstance(item.get("text"), str):
            return run.measure("", item["text"])
        if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
            return run.measure(item["prompt"], item["completion"])
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None
    raise RequestError(f"{place}: expected prompt and completion, or text, or input_ids; got {', '.join(item) or 'nothing'}")
