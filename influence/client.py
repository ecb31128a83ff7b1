"""Asking a service (`influence serve`) from Python: `Client`, and `AsyncClient` with the same methods to await.

What can be asked for, and what is said in which order, is written once: generators that yield what to send or how long to wait and get the responses.
The two clients carry them out. Knows HTTP, and neither runs nor models.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import quote

import httpx

from influence.errors import RequestError
from influence.result import InfluenceResult

P = ParamSpec("P")
T = TypeVar("T")

POLL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_REQUEST_SECONDS = 600.0
"""For one response: a service that answers at all does so in less, whatever the call as a whole may take."""
BUSY = (429, 503)


class ServerRefusal(RequestError):
    """The service refused the request: `status` of HTTP, `code` for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class ServerFailure(RuntimeError):
    """The service could not be reached, was too busy for too long, or failed."""


@dataclass(frozen=True, kw_only=True)
class _Send:
    method: str
    path: str
    body: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Pause:
    seconds: float


Heard = httpx.Response | httpx.TransportError | None
Conversation = Generator[_Send | _Pause, Heard, T]
"""Yields what to send, and gets the response or why there is none; or how long to pause, and gets None."""


@dataclass(frozen=True, kw_only=True)
class _Talk:
    """What a client can be asked for, as conversations; a request that meets a busy service or none is tried again `retries` times."""

    retries: int

    def query(self, /, run: str, prompt: str, completion: str, **options: Any) -> Conversation[InfluenceResult]:
        """The training sequences of `run` that most helped the model to say `completion` after `prompt`; options as in the body over HTTP."""
        return InfluenceResult.from_json((yield from self.ask(run, {"prompt": prompt, "completion": completion, **options})))

    def ask(self, run: str, body: dict[str, Any]) -> Conversation[dict[str, Any]]:
        """The result object for a body as HTTP takes it."""
        state = yield from self.submit(run, body)
        while state["state"] in ("queued", "running"):
            yield _Pause(seconds=POLL_SECONDS)
            state = yield from self.state(state["id"])
        if state["state"] != "done":
            error = state["error"] or {"code": state["state"], "message": f"the query was {state['state']}"}
            raise ServerRefusal(422, error["code"], error["message"])
        return dict(state["result"])

    def submit(self, run: str, body: dict[str, Any]) -> Conversation[dict[str, Any]]:
        """The state of the query, without waiting for it to finish; one that was answered at once is done."""
        response = yield from self._send(_Send(method="POST", path=f"/v1/runs/{_part(run)}/queries", body=body))
        if response.status_code == 202:
            return dict(response.json())
        result = response.json()
        return {"id": result["id"], "run": run, "state": "done", "result": result, "error": None}

    def state(self, query: str) -> Conversation[dict[str, Any]]:
        """Where a query stands, and its result."""
        return dict((yield from self._get(f"/v1/queries/{_part(query)}")).json())

    def queries(self, limit: int = 20) -> Conversation[list[dict[str, Any]]]:
        """Your latest queries, without their results."""
        return list((yield from self._get("/v1/queries", limit=limit)).json()["queries"])

    def cancel(self, query: str) -> Conversation[dict[str, Any]]:
        """Stops a query's work; one that is finished stays as it is. The state that it has now."""
        return dict((yield from self._send(_Send(method="DELETE", path=f"/v1/queries/{_part(query)}"))).json())

    def forget(self, query: str) -> Conversation[None]:
        """Removes a query with its result; afterwards there is none of this id, as there may have been none before."""
        try:
            yield from self._send(_Send(method="DELETE", path=f"/v1/queries/{_part(query)}", parameters={"forget": "true"}))
        except ServerRefusal as refusal:
            if refusal.status != 404:  # there is none: it may have been this request, whose response was lost, that removed it
                raise

    def report(self, query: str) -> Conversation[str]:
        """The HTML report of a result."""
        return (yield from self._get(f"/v1/queries/{_part(query)}/report")).text

    def words(self, query: str) -> Conversation[dict[str, Any]]:
        """What a result rests on, in sentences."""
        return dict((yield from self._get(f"/v1/queries/{_part(query)}/words")).json())

    def runs(self) -> Conversation[list[dict[str, Any]]]:
        """What is served."""
        return list((yield from self._get("/v1/runs")).json()["runs"])

    def run(self, run: str) -> Conversation[dict[str, Any]]:
        """What is served under this name, or why it cannot be."""
        return dict((yield from self._get(f"/v1/runs/{_part(run)}")).json())

    def layers(self, run: str) -> Conversation[dict[str, Any]]:
        """Every attributed layer and its factors."""
        return dict((yield from self._get(f"/v1/runs/{_part(run)}/layers")).json())

    def health(self, run: str) -> Conversation[dict[str, Any]]:
        """The training set as `influence health` found it."""
        return dict((yield from self._get(f"/v1/runs/{_part(run)}/health")).json())

    def run_report(self, run: str, about: Literal["run", "training-set"] = "run") -> Conversation[str]:
        """The HTML page about a run, or about its training set as `influence health` found it."""
        return (yield from self._get(f"/v1/runs/{_part(run)}/report", about=about)).text

    def sequence(self, run: str, name: str) -> Conversation[dict[str, Any]]:
        """A training sequence by its id."""
        return dict((yield from self._get(f"/v1/runs/{_part(run)}/sequences/{_part(name)}")).json())

    def tokens(self, run: str, prompt: str, completion: str) -> Conversation[dict[str, list[str]]]:
        """The tokens of a question before it is asked: what a span counts."""
        body = {"prompt": prompt, "completion": completion}
        return dict((yield from self._send(_Send(method="POST", path=f"/v1/runs/{_part(run)}/tokens", body=body))).json())

    def examples(self, run: str, count: int = 5, seed: int = 0) -> Conversation[list[dict[str, str]]]:
        """Questions to try: training sequences, their second half asked after the first."""
        return list((yield from self._get(f"/v1/runs/{_part(run)}/examples", count=count, seed=seed)).json()["examples"])

    def _get(self, path: str, **parameters: Any) -> Conversation[httpx.Response]:
        return (yield from self._send(_Send(method="GET", path=path, parameters=parameters or None)))

    def _send(self, request: _Send) -> Conversation[httpx.Response]:
        """The response, tried again after growing pauses or as long as the service says. Asking twice is safe: a question that waits is not
        queued again."""
        for attempt in range(self.retries + 1):
            heard = yield request
            last = attempt == self.retries
            if isinstance(heard, httpx.Response) and (heard.status_code not in BUSY or last):
                return _checked(heard)
            if last:
                raise ServerFailure(f"the service cannot be reached: {heard or type(heard).__name__}")
            pause = min(LONGEST_PAUSE_SECONDS, 0.25 * 2**attempt)
            asked = heard.headers.get("retry-after", "") if isinstance(heard, httpx.Response) else ""
            yield _Pause(seconds=float(asked) if asked.isdecimal() else pause * random.uniform(0.5, 1.0))
        raise AssertionError


def _part(name: str) -> str:
    """A name as one part of a path. Raises RequestError for one that a path cannot hold: dots lead elsewhere, however they are written."""
    if name in ("", ".", ".."):
        raise RequestError(f"expected a name, not {name!r}")
    return quote(name, safe="")


def _checked(response: httpx.Response) -> httpx.Response:
    """The response, if it is what was asked for. Raises ServerRefusal or ServerFailure with what the service says."""
    if response.is_success:
        return response
    try:
        error = response.json()["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "unknown", f"the server answered {response.status_code}, which is no answer of a service"
    if response.status_code >= 500:
        raise ServerFailure(message)
    raise ServerRefusal(response.status_code, code, message)


class _Base:
    def __init__(self, url: str, token: str | None, timeout_seconds: float | None, retries: int) -> None:
        token = token or os.environ.get("INFLUENCE_TOKEN")
        if not url.startswith(("http://", "https://")):
            raise RequestError(f"the address of a service begins with http:// or https://, not {url!r}")
        self._settings: dict[str, Any] = {
            "base_url": url,
            "timeout": LONGEST_REQUEST_SECONDS,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
        }
        self._timeout_seconds = math.inf if timeout_seconds is None else timeout_seconds
        self._talk = _Talk(retries=retries)

    def _seconds_left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self._timeout_seconds:g} seconds; an accepted query goes on")
        return left


def _blocking(conversation: Callable[Concatenate[_Talk, P], Conversation[T]]) -> Callable[Concatenate["Client", P], T]:
    @wraps(conversation)
    def method(self: "Client", /, *arguments: P.args, **named: P.kwargs) -> T:
        return self._hold(conversation(self._talk, *arguments, **named))

    return method


def _awaited(conversation: Callable[Concatenate[_Talk, P], Conversation[T]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    @wraps(conversation)
    async def method(self: "AsyncClient", /, *arguments: P.args, **named: P.kwargs) -> T:
        return await self._hold(conversation(self._talk, *arguments, **named))

    return method


class Client(_Base):
    """A service at `url`. `timeout_seconds` is for a whole call, waiting for an accepted query included (None: as long as it takes); a busy or
    unreachable service is tried again `retries` times. The token is INFLUENCE_TOKEN when none is given.

    Methods raise ServerRefusal for a request that cannot be served, ServerFailure for a service that fails, TimeoutError.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float | None = 600.0, retries: int = 5) -> None:
        super().__init__(url, token, timeout_seconds, retries)
        self._http = httpx.Client(**self._settings)

    query = _blocking(_Talk.query)
    ask = _blocking(_Talk.ask)
    submit = _blocking(_Talk.submit)
    state = _blocking(_Talk.state)
    queries = _blocking(_Talk.queries)
    cancel = _blocking(_Talk.cancel)
    forget = _blocking(_Talk.forget)
    report = _blocking(_Talk.report)
    words = _blocking(_Talk.words)
    runs = _blocking(_Talk.runs)
    run = _blocking(_Talk.run)
    layers = _blocking(_Talk.layers)
    health = _blocking(_Talk.health)
    run_report = _blocking(_Talk.run_report)
    sequence = _blocking(_Talk.sequence)
    tokens = _blocking(_Talk.tokens)
    examples = _blocking(_Talk.examples)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hold(self, conversation: Conversation[T]) -> T:
        deadline = time.monotonic() + self._timeout_seconds
        heard: Heard = None
        try:
            while True:
                said = conversation.send(heard)
                left = self._seconds_left(deadline)
                heard = None
                if isinstance(said, _Pause):
                    time.sleep(min(said.seconds, left))
                    continue
                try:
                    seconds = min(left, LONGEST_REQUEST_SECONDS)
                    heard = self._http.request(said.method, said.path, json=said.body, params=said.parameters, timeout=seconds)
                except httpx.TransportError as error:
                    self._seconds_left(deadline)
                    heard = error
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


class AsyncClient(_Base):
    """`Client`, with methods to await."""

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float | None = 600.0, retries: int = 5) -> None:
        super().__init__(url, token, timeout_seconds, retries)
        self._http = httpx.AsyncClient(**self._settings)

    query = _awaited(_Talk.query)
    ask = _awaited(_Talk.ask)
    submit = _awaited(_Talk.submit)
    state = _awaited(_Talk.state)
    queries = _awaited(_Talk.queries)
    cancel = _awaited(_Talk.cancel)
    forget = _awaited(_Talk.forget)
    report = _awaited(_Talk.report)
    words = _awaited(_Talk.words)
    runs = _awaited(_Talk.runs)
    run = _awaited(_Talk.run)
    layers = _awaited(_Talk.layers)
    health = _awaited(_Talk.health)
    run_report = _awaited(_Talk.run_report)
    sequence = _awaited(_Talk.sequence)
    tokens = _awaited(_Talk.tokens)
    examples = _awaited(_Talk.examples)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _hold(self, conversation: Conversation[T]) -> T:
        deadline = time.monotonic() + self._timeout_seconds
        heard: Heard = None
        try:
            while True:
                said = conversation.send(heard)
                left = self._seconds_left(deadline)
                heard = None
                if isinstance(said, _Pause):
                    await asyncio.sleep(min(said.seconds, left))
                    continue
                try:
                    seconds = min(left, LONGEST_REQUEST_SECONDS)
                    heard = await self._http.request(said.method, said.path, json=said.body, params=said.parameters, timeout=seconds)
                except httpx.TransportError as error:
                    self._seconds_left(deadline)
                    heard = error
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
