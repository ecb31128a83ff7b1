"""From the bodies of requests to result objects: what `influence query --json` prints, with the names of runs for their paths.

Knows runs and measurements; knows nothing of queues, threads or HTTP.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from influence.answering import QueryOptions, answer, answer_both_ends, num_candidates
from influence.errors import RequestError
from influence.measurement import Measurement, Member, combine
from influence.report import words
from influence.result import report_page
from influence.run import Run
from influence.run_directory import digest
from influence.service.bodies import MemberBody, QueryBody
from influence.service.settings import Limits
from influence.solving import Progress

QUESTION = {"prompt", "completion", "text", "messages", "input_ids", "queries", "as_one", "contrast", "span"}
"""What may differ between queries that are answered together."""


class Stopped(Exception):
    """Raised out of work that nobody wants any more."""


def kind_of(run: str, indexes: Sequence[str], body: QueryBody) -> str:
    """Equal for queries that one gradient pass and one search can answer: of the same run and options, asked of indexes with these fingerprints."""
    return digest([run, *indexes, body.model_dump(exclude=QUESTION)])


def question_of(states: Sequence[str], body: QueryBody) -> str:
    """Equal for queries that have the same answer: the same body, asked of the same states of the indexes."""
    return digest([*states, body.model_dump()])


def check_limits(body: QueryBody, limits: Limits) -> None:
    """Raises RequestError for a query that asks for more than is allowed, as far as its body tells."""
    most = {
        "k": limits.k,
        "candidates": limits.candidates,
        "refine_steps": limits.refine_steps,
        "refine_sequences": limits.refine_sequences,
    }
    for name, limit in most.items():
        if (getattr(body, name) or 0) > limit:
            raise RequestError(f"{name} is {getattr(body, name)}, and this service allows at most {limit}")
    body.options()


def measure(run: Run, body: QueryBody, limits: Limits) -> Measurement:
    """What the query asks of the model. Raises RequestError when it cannot be asked, or has more tokens than are allowed."""
    if body.queries is not None:
        named = [(one.id or str(place), one) for place, one in enumerate(body.queries, 1)]
        members = [Member(name=name, weight=one.weight, measurement=_measured(run, one)) for name, one in named]
        measurement = combine(members, body.as_one)
        num_tokens = sum(len(sequence.tokens) for _, sequence in measurement.parts)
    else:
        measurement = _measured(run, body)
        num_tokens = max(len(sequence.tokens) for _, sequence in measurement.parts)
    if num_tokens > limits.query_tokens:
        raise RequestError(f"the query has {num_tokens} tokens, and this service allows at most {limits.query_tokens}")
    return measurement


def _measured(run: Run, body: QueryBody | MemberBody) -> Measurement:
    contrast, span = (body.contrast, body.span) if isinstance(body, QueryBody) else (None, None)
    if body.input_ids is not None:
        return run.measure_tokens(list(body.input_ids))
    if body.messages is not None:
        return run.measure_messages([{"role": one.role, "content": one.content} for one in body.messages], span=span)
    if body.text is not None:
        return run.measure("", body.text)
    return run.measure(body.prompt or "", body.completion or "", contrast=contrast, span=span)


def bounded_options(runs: Sequence[Run], body: QueryBody, limits: Limits) -> QueryOptions:
    """How the query is answered: when it does not say how many candidates, as many as the measured recall asks for, but no more than are allowed."""
    options = body.options()
    if options.exact or max(num_candidates(run, options, end) for run in runs for end in (False, True)) <= limits.candidates:
        return options
    return replace(options, candidates=limits.candidates)


def answers(
    runs: Mapping[str, Run],
    measurements: Sequence[Measurement],
    body: QueryBody,
    limits: Limits,
    progress: Progress,
    check: Callable[[], None],
) -> list[dict[str, Any]]:
    """One result object for each measurement, by the options of `body`. `check` is called before each batch and may raise `Stopped`."""
    opened = list(runs.values())
    options = bounded_options(opened, body, limits)
    names = {str(run.directory): name for name, run in runs.items()}
    with interruptible(opened, check):
        if body.both_ends:
            both = answer_both_ends(opened, measurements, options, progress)
            results = [for_.to_json() | {"opponents": against.to_json()["results"]} for for_, against in both]
        else:
            results = [result.to_json() for result in answer(opened, measurements, options, progress)]
    return [_named(result, names) for result in results]


def _named(result: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The result with the names of runs where their paths stand."""
    provenance = result["provenance"]
    provenance["run"] = names[provenance["run"]]
    for one in provenance.get("averaged_over", []):
        one["run"] = names[one["run"]]
    for shown in [*result["results"], *result.get("opponents", [])]:
        if "runs" in shown:
            shown["runs"] = {names.get(name, name): score for name, score in shown["runs"].items()}
    return result


@contextmanager
def interruptible(runs: Sequence[Run], check: Callable[[], None]) -> Iterator[None]:
    """Within it, `check` is called before every forward pass of the runs' models, which every batch of every kind of work begins with."""
    with ExitStack() as stack:
        for run in runs:
            stack.callback(run.language_model.model.register_forward_pre_hook(lambda _module, _arguments: check()).remove)
        yield


def in_words(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the result rests on, as the sentences of its report."""
    return {
        "trust": words.trust(result["provenance"]),
        "distribution": " ".join(filter(None, [words.tail_sentence(result["distribution"]), _memorised(result)])),
        "bm25": words.overlap(result.get("bm25")),
    }


def _memorised(result: Mapping[str, Any]) -> str:
    num_counted = sum(value is not None for value in result["query"]["token_log_probabilities"])
    return words.memorised(result["distribution"], result["results"], num_counted)


def report(result: Mapping[str, Any], body: Mapping[str, Any], run: str, created: str) -> str:
    """The HTML report of one result."""
    sides = {"results": [], "opponents": result["results"]} if body.get("opponents") else {"opponents": result.get("opponents", [])}
    return report_page([{**result, **sides}], run=run, created=created)
