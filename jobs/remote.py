"""`influence query --server`: the command line's questions, asked of a service, as many at once as it answers together."""

import asyncio
from pathlib import Path
from typing import Any

from influence.answering import QueryOptions
from influence.client import AsyncClient
from influence.errors import RequestError
from influence.result import InfluenceResult
from jobs.answers import combination, parse_span, read_queries, weight_of

AT_ONCE = 16

Questions = list[tuple[str, dict[str, Any]]]
"""(id of the query, what of a request's body says what is asked)."""


def questions_of(
    prompt: str | None, completion: str | None, contrast: str | None, span: str | None, queries: Path | None, as_one: str | None = None
) -> Questions:
    """What is asked: one question, or those of a file. Raises RequestError when neither or both are given."""
    if queries is None:
        if as_one is not None:
            raise RequestError("--as-one goes with --queries FILE, the set that is asked as one")
        if prompt is None or completion is None:
            raise RequestError("give PROMPT and COMPLETION, or --queries FILE")
        places = parse_span(span)
        body = {"prompt": prompt, "completion": completion, "contrast": contrast, "span": [list(place) for place in places or ()] or None}
        return [("query", {key: value for key, value in body.items() if value is not None})]
    if prompt is not None or contrast is not None or span is not None:
        raise RequestError("give a prompt and completion (with --contrast or --span), or --queries FILE, not both")
    asked = read_queries(queries)
    if as_one is None:
        return [(name, _body(item, place)) for name, item, place in asked]
    members = [{"id": name, **_body(item, place), "weight": weight_of(item, place)} for name, item, place in asked]
    return [("set", {"queries": members, "as_one": combination(as_one)})]


def _body(item: dict[str, Any], place: str) -> dict[str, Any]:
    for keys in (("messages",), ("input_ids",), ("text",), ("prompt", "completion")):
        if all(key in item for key in keys):
            return {key: item[key] for key in keys}
    raise RequestError(f"{place}: expected prompt and completion, or text, or messages, or input_ids; got {', '.join(item) or 'nothing'}")


def ask_server(server: str, run: str, questions: Questions, options: QueryOptions, also: list[str]) -> list[InfluenceResult]:
    """One result for each question, from the service at the address `server`."""
    return asyncio.run(_ask_all(server, run, [question | _plain(options) | {"also": also} for _, question in questions]))


async def _ask_all(server: str, run: str, bodies: list[dict[str, Any]]) -> list[InfluenceResult]:
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(client: AsyncClient, body: dict[str, Any]) -> InfluenceResult:
        async with places:
            return InfluenceResult.from_json(await client.ask(run, body))

    async with AsyncClient(server, timeout_seconds=None) as client:  # whoever asks for a scan waits for it, and can interrupt
        return list(await asyncio.gather(*(ask(client, body) for body in bodies)))


def _plain(options: QueryOptions) -> dict[str, Any]:
    """The options as a request's body says them."""
    plain = {**vars(options), "layers": list(options.layers), "refine": options.refine is not None}
    if options.refine is not None:
        plain |= {"refine_steps": options.refine.steps, "refine_sequences": options.refine.sequences}
    return plain
