"""The Python client and `influence query --server`: the results of a local run, and patience with a server that is busy or gone for a moment."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from served import application
from small_run import Influence, write_jsonl
from test_service import QUESTION, assert_same, run  # noqa: F401

from influence import AsyncClient, Client, InfluenceResult, ServerFailure, ServerRefusal
from influence import client as client_module
from influence.answering import QueryOptions
from influence.errors import RequestError
from influence.run import open_run
from influence.service import ServiceSettings
from influence.service.settings import named_runs
from jobs.remote import ask_server


@pytest.fixture(scope="module")
def url(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    with application(ServiceSettings(runs=named_runs([run]), state_dir=tmp_path_factory.mktemp("state"))) as address:
        yield address


def test_a_result_survives_its_journey_as_json(finished: Path) -> None:
    result = open_run(finished).query(*QUESTION.values(), k=3, bm25=True)
    assert InfluenceResult.from_json(json.loads(json.dumps(result.to_json()))).to_json() == json.loads(json.dumps(result.to_json()))


def test_the_client_gives_what_the_run_gives(url: str, run: Path) -> None:  # noqa: F811
    expected = open_run(run).query(*QUESTION.values(), k=3)
    with Client(url) as client:
        assert_same(client.query("small", *QUESTION.values(), k=3).to_json(), expected.to_json())
        exact = client.query("small", *QUESTION.values(), k=3, exact=True)
        assert_same(exact.to_json(), open_run(run).query(*QUESTION.values(), k=3, exact=True).to_json())
        assert client.state(exact.id)["state"] == "done"
        assert "<!DOCTYPE html>" in client.report(exact.id)
        assert client.queries(1)[0]["id"] == exact.id
        assert client.words(exact.id)["trust"]
        assert "".join(client.tokens("small", **QUESTION)["completion"]) == QUESTION["completion"]
        assert client.examples("small", 3, seed=1) == client.examples("small", 3, seed=1) != client.examples("small", 3)
        assert client.cancel(exact.id)["state"] == client.state(exact.id)["state"] == "done"
        client.forget(exact.id)
        with pytest.raises(ServerRefusal, match="forgotten"):
            client.state(exact.id)
        client.forget(exact.id)
        assert client.runs()[0]["name"] == "small"
        assert client.sequence("small", "doc-00:0")["document"] == "doc-00"
        assert client.run("small")["sequences"] == client.runs()[0]["sequences"]
        assert client.layers("small")["parameters_attributed"] == 1.0
        assert "<h1>Run small</h1>" in client.run_report("small")
        for about_health in (client.health, partial(client.run_report, about="training-set")):
            with pytest.raises(ServerRefusal, match="was not measured"):
                about_health("small")


def test_both_clients_can_be_asked_for_the_same_and_for_every_route(url: str) -> None:
    asked = {name for name in vars(Client) if not name.startswith("_")}
    assert asked == {name for name in vars(AsyncClient) if not name.startswith("_")}
    routes = {
        route["operationId"].split("_v1_")[0]
        for path, methods in httpx.get(f"{url}/openapi.json").json()["paths"].items()
        for route in methods.values()
        if path.startswith("/v1")
    }
    called = {"one_run": "run", "query": "state"}
    own = {"close", "query", "submit", "forget"}  # of several requests, or another way to ask one
    assert {called.get(route, route) for route in routes - {"events"}} == asked - own


def test_the_asynchronous_client_does_the_same(url: str) -> None:
    async def both() -> tuple[InfluenceResult, InfluenceResult, dict[str, Any]]:
        async with AsyncClient(url) as client:
            quick, exact = await asyncio.gather(
                client.query("small", *QUESTION.values(), k=3), client.query("small", *QUESTION.values(), k=3, exact=True)
            )
            assert await client.tokens("small", **QUESTION)
            assert len(await client.examples("small", 2)) == 2
            assert (await client.words(exact.id))["trust"]
            return quick, exact, await client.sequence("small", "doc-00:0")

    quick, exact, sequence = asyncio.run(both())
    with Client(url) as client:
        assert_same(quick.to_json(), client.query("small", *QUESTION.values(), k=3).to_json())
        assert_same(exact.to_json(), client.query("small", *QUESTION.values(), k=3, exact=True).to_json())
        assert sequence == client.sequence("small", "doc-00:0")


def test_a_refusal_says_what_the_service_says(url: str) -> None:
    with Client(url) as client, pytest.raises(ServerRefusal, match="no run is called 'other'") as refusal:
        client.query("other", *QUESTION.values())
    assert (refusal.value.status, refusal.value.code) == (404, "not_found")
    with Client(url) as client, pytest.raises(ServerRefusal, match="no attributed layer"):
        client.query("small", *QUESTION.values(), exact=True, layers=["nothing"])
    with pytest.raises(RequestError, match="begins with http"):
        Client("localhost:8000")


class _Moody(BaseHTTPRequestHandler):
    """Answers with these statuses, then with what it has; after `slow` it takes its time. Keeps what it was asked."""

    answers: list[int]
    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        status = type(self).answers.pop(0) if type(self).answers else 200
        body = b'{"runs": []}' if status == 200 else b'{"error": {"code": "busy", "message": "come back later"}}'
        if status == 200 and self.path.startswith("/v1/runs/slow"):
            time.sleep(2)
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_DELETE(self) -> None:
        """Does it, but the response is lost the first time."""
        type(self).asked.append(self.path)
        if len(type(self).asked) == 1:
            self.close_connection = True
            return
        body = b'{"error": {"code": "not_found", "message": "there is no such query"}}'
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def moody() -> Iterator[tuple[str, type[_Moody]]]:
    handler = type("Handler", (_Moody,), {"answers": [], "asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_server_is_asked_again_as_often_as_allowed(moody: tuple[str, type[_Moody]]) -> None:
    url, handler = moody
    handler.answers = [503, 429, 503]
    with Client(url, retries=3) as client:
        assert client.runs() == []
    handler.answers = [503] * 3
    with Client(url, retries=2) as client, pytest.raises(ServerFailure, match="come back later"):
        client.runs()


def test_what_took_too_long_is_not_asked_again(moody: tuple[str, type[_Moody]]) -> None:
    url, handler = moody
    handler.answers = [504, 200]
    with Client(url) as client, pytest.raises(ServerFailure):
        client.runs()
    assert len(handler.asked) == 1


def test_what_was_forgotten_by_a_request_whose_response_was_lost_is_forgotten(moody: tuple[str, type[_Moody]]) -> None:
    url, handler = moody
    with Client(url) as client:
        client.forget("one")
    assert handler.asked == ["/v1/queries/one?forget=true"] * 2


@pytest.mark.parametrize("name", ["../a/../b", "a b?c=d#e%2e", "..a", "./"])
def test_any_name_of_a_sequence_is_one_part_of_the_address(moody: tuple[str, type[_Moody]], name: str) -> None:
    url, handler = moody
    with Client(url) as client:
        client.sequence("small", name)
    (asked,) = handler.asked
    assert asked.startswith("/v1/runs/small/sequences/")
    assert unquote(asked.removeprefix("/v1/runs/small/sequences/")) == name


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_leads_elsewhere_is_refused(moody: tuple[str, type[_Moody]], name: str) -> None:
    url, handler = moody
    with Client(url) as client, pytest.raises(RequestError, match="expected a name"):
        client.sequence("small", name)
    assert handler.asked == []


def test_the_command_line_waits_for_a_scan_as_long_as_it_takes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a look takes an hour."""
    hours = iter(range(10**6))
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: 3_600.0 * next(hours), sleep=time.sleep))
    with Client(url) as client, pytest.raises(TimeoutError, match="within 600 seconds"):
        client.runs()
    (result,) = ask_server(url, "small", [("query", dict(QUESTION))], QueryOptions(exact=True, k=3), [])
    assert len(result.sequences) == 3


def test_a_call_ends_at_its_time_limit(moody: tuple[str, type[_Moody]]) -> None:
    url, _ = moody
    start = time.monotonic()
    with Client(url, timeout_seconds=0.5) as client, pytest.raises(TimeoutError, match=r"no answer within 0\.5 seconds"):
        client.layers("slow")
    assert time.monotonic() - start < 1.5


def test_no_server_is_told_in_one_line(influence: Influence) -> None:
    with Client("http://127.0.0.1:9", retries=1) as client, pytest.raises(ServerFailure, match="cannot be reached"):
        client.runs()


def test_the_command_line_asks_a_server(url: str, run: Path, tmp_path: Path, influence: Influence) -> None:  # noqa: F811
    words = [*QUESTION.values(), "-k", 3, "--contrast", " the Aker", "--json"]
    assert_same(influence("query", "small", *words, "--server", url).json, influence("query", run, *words).json)
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"id": "a", **QUESTION}, {"id": "b", "text": "Oslo lies on the Aker."}])
    words = ["--queries", queries, "-k", 2, "--json"]
    there, here = influence("query", "small", *words, "--server", url).json, influence("query", run, *words).json
    assert [one["id"] for one in there["queries"]] == ["a", "b"]
    for one, other in zip(there["queries"], here["queries"], strict=True):
        assert_same(one, other)
    influence("query", "other", *QUESTION.values(), "--server", url).says("no run is called 'other'")
    influence("query", "small", *QUESTION.values(), "--server", url, "--model", "x").says("leave it out beside --server")
