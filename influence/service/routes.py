"""The HTTP routes. Each takes what it needs from the service and leaves the work to others."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Request, Response
from fastapi import Query as QueryParameter
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from influence.errors import RequestError
from influence.service import answers, bodies
from influence.service.catalog import (
    Catalog,
    OpenedRun,
    example_queries,
    facts_of,
    health_page,
    health_summary,
    layer_report,
    question_tokens,
    reading,
    run_page,
    sequence_facts,
)
from influence.service.engine import Answer, Engine
from influence.service.errors import ServiceError, not_found, refused
from influence.service.metrics import Metrics
from influence.service.settings import ServiceSettings
from influence.service.store import FINISHED, Query, QueryStore, Question, shown_sequences
from influence.service.tokens import User

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""For the report, which narrows it further to the hashes of its one style and one script."""

EVENT_SECONDS = 0.25
SILENCE_SECONDS = 15.0
"""After which an event stream says something, lest a proxy takes it for dead."""

Name = Annotated[str, Path(max_length=200, description="name of a run", examples=["demo"])]
Id = Annotated[str, Path(max_length=64, description="id of a query", examples=["3f0c4a4dc6a84a5b8a3f5d0a7b1f2c11"])]

T = TypeVar("T")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses, and those that any request can have, come with an error body."""
    said = {
        400: "the body is not JSON",
        401: "no token, or an unknown one",
        403: "the token has no scope for this, or the request comes from another origin",
        404: "there is no such run, query or sequence",
        409: "the run cannot be served as it stands: damaged, unfinished, or made from something else",
        413: "the body is too large",
        422: "the query cannot be answered as it stands",
        429: "too many accepted queries of one user; see Retry-After",
        503: "too much to do, or not ready; see Retry-After",
        504: "the answer took too long, and its work was stopped: the same again would take as long",
    }
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{bodies.ErrorBody.__name__}"}}}
    return {status: {"content": content, "description": said[status]} for status in (401, 403, 503, *statuses)}


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that routes use."""

    settings: ServiceSettings
    catalog: Catalog
    store: QueryStore
    engine: Engine
    metrics: Metrics

    def question(self, user: User, run: str, body: bodies.QueryBody) -> Question:
        """The query, checked as far as it can be without the model. Raises ServiceError."""
        try:
            answers.check_limits(body, self.settings.limits)
        except RequestError as error:
            raise refused(error, {}) from None
        runs = [run, *body.also]
        if len(set(runs)) < len(runs):
            raise ServiceError(422, "refused", f"also: each run counts once in an average, not {', '.join(runs)}")
        states = [self.catalog.state_of_index(name, refine=body.refine) for name in runs]
        return Question(
            user=user.name,
            run=run,
            places=tuple(self.catalog.place(name) for name in runs),
            question=answers.question_of([run, *states], body),
            kind=answers.kind_of(run, self.catalog.indexes(runs), body),
            body=body.model_dump(exclude_defaults=True),
        )

    def accept(self, question: Question) -> Query:
        """Queues the query. Raises 429 or 503 when too many are queued already."""
        query = self.store.accept(question)
        self.engine.wake()
        return query

    def found(self, user: User, name: str) -> Query:
        """The query of this id. Raises 404; also when it is another user's, or shows what was erased from its run since."""
        query = self.store.get(name)
        if query is not None and query.user != user.name and "admin" not in user.scopes:
            query = None
        if query is not None and query.result is not None and self._shows_erased(query):
            self.store.forget(name)
            query = None
        if query is None:
            raise not_found(f"there is no query {name!r} of yours: it was never accepted, or is forgotten")
        return query

    def finished(self, user: User, name: str) -> tuple[Query, dict[str, Any]]:
        """The query of this id with its result. Raises 404, or 409 when it has none."""
        query = self.found(user, name)
        if query.result is None:
            raise ServiceError(409, "unfinished", f"the query is {query.state}: it has no result")
        return query, json.loads(query.result)

    def _shows_erased(self, query: Query) -> bool:
        """Whether the result shows a sequence that was erased from its run. All results of before are looked through once; this one always,
        for an answer that was under way during the erasure may have been written after that. Of a run of the same name elsewhere nothing is known."""
        if query.places and (query.run not in self.catalog or self.catalog.place(query.run) != query.places[0]):
            return False
        erased = self.catalog.erased(query.run)
        self.store.forget_erased(query.run, len(erased), lambda: erased)
        return bool(erased) and not erased.isdisjoint(shown_sequences(json.loads(query.result or "")))


def router(service: Service) -> APIRouter:
    """All routes but the page."""
    routes = APIRouter()
    of_run = APIRouter(prefix="/v1/runs/{run}", tags=["runs"], responses=errors(404, 409))
    of_query = APIRouter(prefix="/v1/queries/{id}", tags=["queries"], responses=errors(404))
    limits = service.settings.limits

    def read(run: str, what: Callable[[OpenedRun], T]) -> T:
        """`what` of the run, opened but not necessarily loaded. Raises 404, or 409 when a file of it cannot be read."""
        opened = service.catalog.opened(run)
        with reading(run, opened.names):
            return what(opened)

    @routes.get("/healthz", tags=["operation"], summary="Whether the process is alive", response_model=bodies.Health)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get(
        "/readyz",
        tags=["operation"],
        summary="Whether models, factors and indexes are loaded",
        response_model=bodies.Health,
        responses={503: {"model": bodies.Health, "description": "loading, or about to stop"}},
    )
    async def readyz(response: Response) -> dict[str, str]:
        if not service.engine.ready:
            response.status_code = 503
            response.headers["Retry-After"] = "2"
            return {"status": "stopping" if service.engine.draining else "loading"}
        return {"status": "ok"}

    @routes.get("/metrics", tags=["operation"], summary="Metrics for Prometheus", response_class=Response, responses=errors())
    def metrics() -> Response:
        service.metrics.waiting.set(service.engine.num_waiting)
        service.metrics.queued.set(service.store.num_unfinished())
        service.metrics.kept_bytes.set(service.catalog.kept_bytes)
        service.metrics.runs_loaded.set(service.catalog.num_loaded)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def facts(name: str) -> dict[str, Any]:
        most = {"k": limits.k, "candidates": limits.candidates, "query_tokens": limits.query_tokens}
        return facts_of(service.catalog, name, most)

    @routes.get("/v1/runs", tags=["runs"], summary="What is served", response_model=bodies.RunList, responses=errors())
    def runs() -> dict[str, Any]:
        return {"runs": [facts(name) for name in service.catalog.names()]}

    @routes.get(
        "/v1/runs/{run}",
        tags=["runs"],
        summary="A run: its coverage and its measured quality",
        response_model=bodies.RunFacts,
        responses=errors(404),
    )
    def one_run(run: Name) -> dict[str, Any]:
        return facts(run)

    @of_run.get("/layers", summary="Every attributed layer and its factors", response_model=bodies.LayerReport)
    def layers(run: Name) -> dict[str, Any]:
        return read(run, lambda opened: layer_report(opened.run))

    @of_run.get(
        "/report",
        summary="What the run is made of and how good it is, or what is known of its training set, as one HTML page",
        response_class=HTMLResponse,
        responses=errors(422),
    )
    def run_report(
        run: Name,
        about: Annotated[
            Literal["run", "training-set"], QueryParameter(description="the run, or its training set as `influence health` found it")
        ] = "run",
    ) -> HTMLResponse:
        opened = service.catalog.opened(run)
        page = health_page(opened) if about == "training-set" else run_page(opened, service.catalog.state_of_index(run, refine=False))
        return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})

    @of_run.get(
        "/health",
        summary="The training set as `influence health` found it; nothing is measured for a request",
        response_model=bodies.TrainingSetHealth,
    )
    def health(run: Name) -> dict[str, Any]:
        return health_summary(service.catalog.opened(run))

    @of_run.get("/sequences/{id:path}", summary="A training sequence", response_model=bodies.SequenceFacts)
    def sequence(run: Name, id: Annotated[str, Path(max_length=1_000, description="id of a sequence")]) -> dict[str, Any]:
        return read(run, lambda opened: sequence_facts(opened, id))

    @of_run.get(
        "/examples",
        summary="Queries to try: training sequences, their second half asked after the first",
        response_model=bodies.Examples,
        responses=errors(422),
    )
    def examples(
        run: Name,
        count: Annotated[int, QueryParameter(ge=1, le=50, description="how many")] = 5,
        seed: Annotated[int, QueryParameter(ge=0, le=2**31, description="another seed gives others")] = 0,
    ) -> dict[str, Any]:
        return read(run, lambda opened: {"examples": example_queries(opened.run, count, seed)})

    @of_run.post(
        "/tokens",
        summary="The tokens of a question, before it is asked: what a span counts",
        response_model=bodies.QuestionTokens,
        responses=errors(400, 413, 422),
    )
    def tokens(run: Name, body: bodies.TokensBody) -> dict[str, list[str]]:
        return read(run, lambda opened: question_tokens(opened.run, body.prompt, body.completion, limits.query_tokens))

    @routes.post(
        "/v1/runs/{run}/queries",
        tags=["queries"],
        summary="Ask which training sequences made a completion likely",
        response_model=None,
        responses={
            200: {"model": bodies.Result, "description": "the result, which is kept at Location"},
            202: {"model": bodies.QueryState, "description": "accepted: a scan or a refinement, to be followed at Location"},
            **errors(400, 404, 409, 413, 422, 429, 504),
        },
    )
    async def ask(run: Name, body: bodies.QueryBody, request: Request) -> Response:
        user: User = request.state.user
        line: dict[str, Any] = request.state.audit
        line["run"] = run
        if service.settings.log_queries:
            line["asked"] = body.model_dump(exclude_defaults=True)
        question = await run_in_threadpool(service.question, user, run, body)
        kept = await run_in_threadpool(service.store.answered, user.name, question.question)
        service.metrics.cache.labels("miss" if kept is None else "hit").inc()
        if kept is None and body.takes_long:
            query = await run_in_threadpool(service.accept, question)
            line["query"] = query.id
            headers = {"Location": f"/v1/queries/{query.id}", "Retry-After": "1"}
            return _json(json.dumps(query.to_json(), ensure_ascii=False), 202, headers)
        if kept is not None:
            name, text = kept.id, kept.result or ""
        else:
            name, text = await _waited_for(service.engine.ask(question, body), request, limits.request_seconds)
        line["query"] = name
        return _json(text, 200, {"Location": f"/v1/queries/{name}"})

    @of_query.get(
        "",
        summary="Where a query stands, and its result",
        response_model=bodies.QueryState,
    )
    def query(id: Id, request: Request) -> Response:
        return _json(json.dumps(service.found(request.state.user, id).to_json(), ensure_ascii=False), 200)

    @routes.get(
        "/v1/queries",
        tags=["queries"],
        summary="Your queries, the latest first, without their results",
        response_model=bodies.QueryList,
        responses=errors(422),
    )
    def queries(request: Request, limit: Annotated[int, QueryParameter(ge=1, le=200, description="how many")] = 20) -> dict[str, Any]:
        return {"queries": [query.to_json(with_result=False) for query in service.store.latest(request.state.user.name, limit)]}

    @of_query.delete(
        "",
        summary="Cancel a query, or forget it and its result",
        response_model=bodies.QueryState,
        responses=errors(422),
    )
    def cancel(
        id: Id,
        request: Request,
        forget: Annotated[
            bool, QueryParameter(description="remove the query with its result; else one that is finished stays as it is")
        ] = False,
    ) -> dict[str, Any]:
        found = service.found(request.state.user, id)
        service.store.cancel(id)
        service.engine.wake()
        left = service.store.get(id) or found
        if forget:
            service.store.forget(id)
        return left.to_json(with_result=False)

    @of_query.get(
        "/events",
        summary="Progress as server-sent events, until the query is finished",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "events `progress` and, last, `end`"}},
    )
    async def events(id: Id, request: Request) -> StreamingResponse:
        await run_in_threadpool(service.found, request.state.user, id)
        return StreamingResponse(_events(service, id), media_type="text/event-stream")

    @of_query.get(
        "/report",
        summary="The result as one HTML page",
        response_class=HTMLResponse,
        responses=errors(409, 422),
    )
    def report(id: Id, request: Request) -> HTMLResponse:
        found, result = service.finished(request.state.user, id)
        created = datetime.fromtimestamp(found.created, UTC).date().isoformat()
        try:
            page = answers.report(result, found.body, found.run, created)
        except ValueError as error:
            raise ServiceError(422, "refused", str(error)) from None
        return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})

    @of_query.get(
        "/words",
        summary="What the result rests on, in sentences",
        response_model=bodies.ResultWords,
        responses=errors(409),
    )
    def words(id: Id, request: Request) -> dict[str, Any]:
        return answers.in_words(service.finished(request.state.user, id)[1])

    for some in (of_run, of_query):
        routes.include_router(some)
    return routes


def _json(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status, headers, media_type="application/json")


async def _waited_for(future: "Future[Answer]", request: Request, seconds: float) -> Answer:
    """The answer. When it takes too long, or the client goes away, its work is stopped."""
    answer: asyncio.Future[Any] = asyncio.wrap_future(future)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([answer, gone], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            name, text = answer.result()
            return name, text
        if gone.done():
            raise ServiceError(503, "gone", "the client went away")
        raise ServiceError(
            504, "timeout", f"the answer took longer than {seconds:g} seconds and its work was stopped: ask for fewer candidates or layers"
        )
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(service: Service, name: str) -> AsyncIterator[str]:
    """The state of a query whenever it changes, for a while."""
    before, silent, deadline = None, 0.0, time.monotonic() + service.settings.limits.stream_seconds
    while True:
        query = await run_in_threadpool(service.store.get, name)
        ended = query is None or query.state in FINISHED
        said = "{}" if query is None else json.dumps(query.to_json(with_result=False), ensure_ascii=True)
        if said != before or ended:
            yield f"event: {'end' if ended else 'progress'}\ndata: {said}\n\n"
            before, silent = said, 0.0
        elif silent >= SILENCE_SECONDS:
            yield ": still there\n\n"
            silent = 0.0
        if ended or service.engine.draining or time.monotonic() >= deadline:
            return
        await asyncio.sleep(EVENT_SECONDS)
        silent += EVENT_SECONDS
