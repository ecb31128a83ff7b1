"""Asking a service (`influence serve`) from Python: `Client`, and `AsyncClient` with the same methods to await.

What is said and in which order is written once, as generators that yield what to send or how long to wait and get the responses; the two clients
carry them out. Knows HTTP, and neither runs nor models.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from influence.errors import RequestError
from influence.result import InfluenceResult

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
class _Patience:
    """How often a request is tried again that met a busy service or none."""

    retries: int

    def send(self, request: _Send) -> Conversation[httpx.Response]:
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

    def get(self, path: str, **parameters: Any) -> Conversation[Any]:
        response = yield from self.send(_Send(method="GET", path=path, parameters=parameters or None))
        return response.json()

    def submit(self, run: str, body: dict[str, Any]) -> Conversation[dict[str, Any]]:
        """The state of the query; one that was answered at once is done."""
        response = yield from self.send(_Send(method="POST", path=f"/v1/runs/{_part(run)}/queries", body=body))
        if response.status_code == 202:
            state: dict[str, Any] = response.json()
            return state
        result = response.json()
        return {"id": result["id"], "run": run, "state": "done", "result": result, "error": None}

    def wait(self, state: dict[str, Any]) -> Conversation[dict[str, Any]]:
        """The result object of a query, when it is finished."""
        while state["state"] in ("queued", "running"):
            yield _Pause(seconds=POLL_SECONDS)
            state = yield from self.get(f"/v1/queries/{_part(state['id'])}")
        if state["state"] != "done":
            error = state["error"] or {"code": state["state"], "message": f"the query was {state['state']}"}
            raise ServerRefusal(422, error["code"], error["message"])
        result: dict[str, Any] = state["result"]
        return result

    def ask(self, run: str, body: dict[str, Any]) -> Conversation[dict[str, Any]]:
        state = yield from self.submit(run, body)
        return (yield from self.wait(state))

    def query(self, run: str, body: dict[str, Any]) -> Conversation[InfluenceResult]:
        return InfluenceResult.from_json((yield from self.ask(run, body)))

    def runs(self) -> Conversation[list[dict[str, Any]]]:
        found = yield from self.get("/v1/runs")
        return list(found["runs"])

    def queries(self, limit: int) -> Conversation[list[dict[str, Any]]]:
        found = yield from self.get("/v1/queries", limit=limit)
        return list(found["queries"])

    def cancel(self, name: str) -> Conversation[dict[str, Any]]:
        response = yield from self.send(_Send(method="DELETE", path=f"/v1/queries/{_part(name)}"))
        return dict(response.json())

    def forget(self, name: str) -> Conversation[None]:
        try:
            yield from self.send(_Send(method="DELETE", path=f"/v1/queries/{_part(name)}", parameters={"forget": "true"}))
        except ServerRefusal as refusal:
            if refusal.status != 404:  # there is none: it may have been this request, whose response was lost, that removed it
                raise

    def sequence(self, run: str, name: str) -> Conversation[dict[str, Any]]:
        return dict((yield from self.get(f"/v1/runs/{_part(run)}/sequences/{_part(name)}")))

    def tokens(self, run: str, prompt: str, completion: str) -> Conversation[dict[str, list[str]]]:
        body = {"prompt": prompt, "completion": completion}
        response = yield from self.send(_Send(method="POST", path=f"/v1/runs/{_part(run)}/tokens", body=body))
        return dict(response.json())

    def examples(self, run: str, count: int, seed: int) -> Conversation[list[dict[str, str]]]:
        found = yield from self.get(f"/v1/runs/{_part(run)}/examples", count=count, seed=seed)
        return list(found["examples"])

    def report(self, name: str) -> Conversation[str]:
        response = yield from self.send(_Send(method="GET", path=f"/v1/queries/{_part(name)}/report"))
        return response.text

    def run_report(self, run: str) -> Conversation[str]:
        response = yield from self.send(_Send(method="GET", path=f"/v1/runs/{_part(run)}/report"))
        return response.text


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
        self._talk = _Patience(retries=retries)

    def _seconds_left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self._timeout_seconds:g} seconds; an accepted query goes on")
        return left


class Client(_Base):
    """A service at `url`. `timeout_seconds` is for a whole call, waiting for an accepted query included (None: as long as it takes); a busy or
    unreachable service is tried again `retries` times. The token is INFLUENCE_TOKEN when none is given.

    Methods raise ServerRefusal for a request that cannot be served, ServerFailure for a service that fails, TimeoutError.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float | None = 600.0, retries: int = 5) -> None:
        super().__init__(url, token, timeout_seconds, retries)
        self._http = httpx.Client(**self._settings)

    def query(self, run: str, prompt: str, completion: str, **options: Any) -> InfluenceResult:
        """The training sequences of `run` that most helped the model to say `completion` after `prompt`; options as in the body over HTTP."""
        return self._hold(self._talk.query(run, {"prompt": prompt, "completion": completion, **options}))

    def ask(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """The result object for a body as HTTP takes it."""
        return self._hold(self._talk.ask(run, body))

    def submit(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """The state of the query, without waiting for it to finish."""
        return self._hold(self._talk.submit(run, body))

    def state(self, query: str) -> dict[str, Any]:
        """Where a query stands, and its result."""
        return dict(self._hold(self._talk.get(f"/v1/queries/{_part(query)}")))

    def queries(self, limit: int = 20) -> list[dict[str, Any]]:
        """Your latest queries, without their results."""
        return self._hold(self._talk.queries(limit))

    def cancel(self, query: str) -> dict[str, Any]:
        """Stops a query's work; one that is finished stays as it is. The state that it has now."""
        return self._hold(self._talk.cancel(query))

    def forget(self, query: str) -> None:
        """Removes a query with its result; afterwards there is none of this id, as there may have been none before."""
        self._hold(self._talk.forget(query))

    def report(self, query: str) -> str:
        """The HTML report of a result."""
        return self._hold(self._talk.report(query))

    def words(self, query: str) -> dict[str, Any]:
        """What a result rests on, in sentences."""
        return dict(self._hold(self._talk.get(f"/v1/queries/{_part(query)}/words")))

    def tokens(self, run: str, prompt: str, completion: str) -> dict[str, list[str]]:
        """The tokens of a question before it is asked: what a span counts."""
        return self._hold(self._talk.tokens(run, prompt, completion))

    def examples(self, run: str, count: int = 5, seed: int = 0) -> list[dict[str, str]]:
        """Questions to try: training sequences, their second half asked after the first."""
        return self._hold(self._talk.examples(run, count, seed))

    def runs(self) -> list[dict[str, Any]]:
        """What is served."""
        return self._hold(self._talk.runs())

    def layers(self, run: str) -> dict[str, Any]:
        """Every attributed layer and its factors."""
        return dict(self._hold(self._talk.get(f"/v1/runs/{_part(run)}/layers")))

    def run_report(self, run: str) -> str:
        """The HTML page about a run."""
        return self._hold(self._talk.run_report(run))

    def sequence(self, run: str, name: str) -> dict[str, Any]:
        """A training sequence by its id."""
        return self._hold(self._talk.sequence(run, name))

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

    async def query(self, run: str, prompt: str, completion: str, **options: Any) -> InfluenceResult:
        """As `Client.query`."""
        return await self._hold(self._talk.query(run, {"prompt": prompt, "completion": completion, **options}))

    async def ask(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `Client.ask`."""
        return await self._hold(self._talk.ask(run, body))

    async def submit(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `Client.submit`."""
        return await self._hold(self._talk.submit(run, body))

    async def state(self, query: str) -> dict[str, Any]:
        """As `Client.state`."""
        return dict(await self._hold(self._talk.get(f"/v1/queries/{_part(query)}")))

    async def queries(self, limit: int = 20) -> list[dict[str, Any]]:
        """As `Client.queries`."""
        return await self._hold(self._talk.queries(limit))

    async def cancel(self, query: str) -> dict[str, Any]:
        """As `Client.cancel`."""
        return await self._hold(self._talk.cancel(query))

    async def forget(self, query: str) -> None:
        """As `Client.forget`."""
        await self._hold(self._talk.forget(query))

    async def report(self, query: str) -> str:
        """As `Client.report`."""
        return await self._hold(self._talk.report(query))

    async def words(self, query: str) -> dict[str, Any]:
        """As `Client.words`."""
        return dict(await self._hold(self._talk.get(f"/v1/queries/{_part(query)}/words")))

    async def tokens(self, run: str, prompt: str, completion: str) -> dict[str, list[str]]:
        """As `Client.tokens`."""
        return await self._hold(self._talk.tokens(run, prompt, completion))

    async def examples(self, run: str, count: int = 5, seed: int = 0) -> list[dict[str, str]]:
        """As `Client.examples`."""
        return await self._hold(self._talk.examples(run, count, seed))

    async def runs(self) -> list[dict[str, Any]]:
        """As `Client.runs`."""
        return await self._hold(self._talk.runs())

    async def layers(self, run: str) -> dict[str, Any]:
        """As `Client.layers`."""
        return dict(await self._hold(self._talk.get(f"/v1/runs/{_part(run)}/layers")))

    async def run_report(self, run: str) -> str:
        """As `Client.run_report`."""
        return await self._hold(self._talk.run_report(run))

    async def sequence(self, run: str, name: str) -> dict[str, Any]:
        """As `Client.sequence`."""
        return await self._hold(self._talk.sequence(run, name))

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
