"""Questions and answers as the command line and the demo exchange them: files of queries, kept answers, and report pages.

Knows runs and files of queries; knows nothing of options or terminals.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from influence.answering import QueryOptions, answer, answer_both_ends
from influence.directions import Reduction
from influence.errors import RequestError
from influence.measurement import Combination, Measurement, Member, Spans, combine, question, with_function
from influence.result import InfluenceResult, query_report
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
    query_report(answers, run=run.directory.name).to_html(path)


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
    """The last twenty different questions. What cannot be asked again, because a file it needs is gone, is left out and named."""
    asked = [(answer["id"], answer["query"]) for answer in run.directory.answers()]
    if not asked:
        raise RequestError(f"nothing was asked of {run.directory} yet: give a prompt and a completion, or --queries FILE")
    latest = {json.dumps({**question(query), "tokens": None}, sort_keys=True): (name, query) for name, query in asked}
    again, refusals = [], []
    for name, query in list(latest.values())[-20:]:
        try:
            again.append((name, _asked_again(run, query)))
        except RequestError as error:
            say(f"warning: {name} cannot be asked again: {error}")
            refusals.append(error)
    if not again:
        raise refusals[-1]
    return again


def _asked_again(run: Run, query: Mapping[str, Any]) -> Measurement:
    if query.get("family") is not None:
        return replace(_asked_again(run, {**query, "family": None}), family=query["family"])
    if query.get("combined"):
        members = [Member(name=one["id"], weight=one["weight"], measurement=_asked_again(run, one)) for one in query["queries"]]
        return combine(members, query["combined"])
    measured = query.get("measured")
    if measured is not None:
        return with_function(_asked_again(run, {**query, "measured": None}), run.direction(measured["file"], measured["reduce"]))
    if "data" in query:
        return run.measure_data(query["data"])
    if "input_ids" in query:
        return run.measure_tokens(query["input_ids"])
    if "messages" in query:
        return run.measure_messages(query["messages"], span=query.get("span"))
    return run.measure(query["prompt"], query["completion"], contrast=query.get("contrast"), span=query.get("span"))


def measurements_of(
    run: Run,
    prompt: str | None,
    completion: str | None,
    contrast: str | None,
    span: str | None,
    queries: Path | None,
    *,
    as_one: str | None = None,
    data: Sequence[str] | None = None,
    direction: Path | None = None,
    reduce: str | None = None,
) -> Asked:
    """What is asked, as options say it. Raises RequestError for options that contradict each other."""
    if reduce is not None and direction is None:
        raise RequestError("--reduce goes with --direction: over which positions its activation is taken")
    if as_one is not None and queries is None:
        raise RequestError("--as-one goes with --queries FILE, the set that is asked as one")
    if data:
        given = {"a prompt": prompt, "--contrast": contrast, "--span": span, "--queries": queries, "--direction": direction}
        if beside := [name for name, value in given.items() if value is not None]:
            raise RequestError(f"--data asks for the loss on a data set: it does not go with {beside[0]}")
        return [("data", run.measure_data(data))]
    if queries is not None:
        if prompt is not None or contrast is not None or span is not None:
            raise RequestError("give a prompt and completion (with --contrast or --span), or --queries FILE, not both")
        asked = [(name, _measurement_of(run, item, place)) for name, item, place in read_queries(queries)]
        if as_one is not None:
            asked = [("set", _as_one(queries, asked, combination(as_one)))]
    elif prompt is None or completion is None:
        raise RequestError("give PROMPT and COMPLETION, or --queries FILE")
    else:
        asked = [("query", run.measure(prompt, completion, contrast=contrast, span=parse_span(span)))]
    if direction is None:
        return asked
    function = run.direction(direction, reduction(reduce))
    return [(name, with_function(measurement, function)) for name, measurement in asked]


def combination(name: str) -> Combination:
    if name not in get_args(Combination):
        raise RequestError(f"--as-one: expected {' or '.join(get_args(Combination))}, got {name!r}")
    return cast(Combination, name)


def reduction(name: str | None) -> Reduction:
    if name is not None and name not in get_args(Reduction):
        raise RequestError(f"--reduce: expected {', '.join(get_args(Reduction))}, got {name!r}")
    return cast(Reduction, name or "mean")


def _as_one(path: Path, asked: Asked, how: Combination) -> Measurement:
    weights = [weight_of(item, place) for _, item, place in read_queries(path)]
    members = [Member(name=name, weight=weight, measurement=one) for (name, one), weight in zip(asked, weights, strict=True)]
    try:
        return combine(members, how)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def weight_of(item: Mapping[str, Any], place: str) -> float:
    """The weight of a line in a set, 1 where it gives none."""
    weight = item.get("weight", 1)
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise RequestError(f"{place}: the weight must be a number, not {weight!r}")
    return float(weight)


def parse_span(span: str | None) -> Spans | None:
    """The span A:B, or several with commas between them, as pairs of numbers. Raises RequestError for anything else."""
    if span is None:
        return None
    found = [re.fullmatch(r"\s*(\d+):(\d+)\s*", one, re.ASCII) for one in span.split(",")]
    if not all(found):
        raise RequestError(f"--span: expected two token numbers such as 0:3, got {span!r} (several spans: 0:3,5:7)")
    return tuple((int(one[1]), int(one[2])) for one in found if one)


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
    family = item.get("family")
    try:
        if family is not None and not isinstance(family, str):
            raise RequestError(f"the family must be a name, not {family!r}")
        return replace(_asked_by(run, item), family=family)
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None


def _asked_by(run: Run, item: dict[str, Any]) -> Measurement:
    if "messages" in item:
        return run.measure_messages(item["messages"])
    if isinstance(item.get("input_ids"), list):
        return run.measure_tokens(item["input_ids"])
    if isinstance(item.get("text"), str):
        return run.measure("", item["text"])
    if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        return run.measure(item["prompt"], item["completion"])
    raise RequestError(f"expected prompt and completion, or text, or messages, or input_ids; got {', '.join(item) or 'nothing'}")
