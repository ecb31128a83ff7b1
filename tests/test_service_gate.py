"""The way into the service, which serves no run here: hosts, origins and event streams."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from served import application, until

from influence.service import Limits, ServiceSettings
from influence.service.settings import is_loopback
from influence.service.store import QueryStore, Question
from influence.service.tokens import add_token


def settings(tmp_path: Path, limits: Limits | None = None, tokens_file: Path | None = None) -> ServiceSettings:
    (tmp_path / "runs").mkdir()
    return ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", limits=limits or Limits(), tokens_file=tokens_file)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    with application(settings(tmp_path)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def test_every_loopback_address_that_can_be_listened_on_can_be_asked_by(http: httpx.Client) -> None:
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.2:8000", "[::1]:8000"):
        assert http.get("/v1/runs", headers={"Host": host}).status_code == 200, host
    for host in ("attacker.example", "10.0.0.1", "[2001:db8::1]", "127.0.0.1.attacker.example", ""):
        assert http.get("/v1/runs", headers={"Host": host}).status_code == 403, host
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "example.org")] == [True] * 3 + [False] * 2


def test_with_tokens_a_proxy_may_keep_the_name_it_was_asked_by(tmp_path: Path) -> None:
    headers = {"Host": "influence.example", "Authorization": f"Bearer {add_token(tmp_path / 'tokens.json', 'ada', ('query',))}"}
    with application(settings(tmp_path, tokens_file=tmp_path / "tokens.json")) as url:
        assert httpx.get(f"{url}/v1/runs", headers=headers).status_code == 200
        assert httpx.get(f"{url}/v1/runs", headers={"Host": "influence.example"}).status_code == 401


def test_requests_under_way_are_counted(http: httpx.Client) -> None:
    assert re.search(r"^influence_requests_under_way 1\.0$", http.get("/metrics").text, re.M), "this one"


def test_headers_that_are_no_address_are_refused_as_such(http: httpx.Client) -> None:
    for path in ("/v1/runs", "/healthz", "/nothing"):
        found = http.get(path, headers={"Host": "["})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "malformed")
    for origin in ("https://[", "null", "https://attacker.example"):
        assert http.delete("/v1/queries/any", headers={"Origin": origin}).status_code == 403, origin
    assert http.delete("/v1/queries/any", headers={"Origin": str(http.base_url)}).status_code == 404


def test_event_streams_are_no_requests_under_way_but_a_user_has_only_so_many_and_each_ends(tmp_path: Path) -> None:
    limits = Limits(requests=1, streams=2, stream_seconds=3.0)
    store = QueryStore(tmp_path / "state", limits)
    name = store.accept(Question(user="local", run="not served", places=("/nowhere",), question="", kind="scan", body={})).id
    store.close()
    with application(settings(tmp_path, limits)) as url, httpx.Client(base_url=url, timeout=30) as http, ExitStack() as stack:
        start = time.monotonic()
        streams = [stack.enter_context(http.stream("GET", f"/v1/queries/{name}/events")) for _ in range(2)]
        assert [stream.status_code for stream in streams] == [200, 200]
        refused = http.get(f"/v1/queries/{name}/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
        assert http.get("/v1/runs").status_code == 200
        assert all("event: progress" in stream.read().decode() for stream in streams), "they end by themselves"
        assert 2.0 < time.monotonic() - start < 20.0

        def again() -> bool:
            with http.stream("GET", f"/v1/queries/{name}/events") as stream:
                return stream.status_code == 200

        until(again)
