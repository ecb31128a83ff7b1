"""The service over real HTTP: what it answers is what the command line answers, and whatever happens to it, every accepted query ends once."""

import gc
import json
import re
import shutil
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import Served, application, running, serving, until, without_times
from small_run import Influence, World, write_jsonl
from torch import nn
from transformers import GPT2LMHeadModel

from influence import run as run_module
from influence.answering import QueryOptions
from influence.filters import matching
from influence.measurement import Member, combine
from influence.refinement import RefineOptions
from influence.run import Run, open_run
from influence.service import Limits, ServiceSettings, create_app
from influence.service import catalog as catalog_module
from influence.service.catalog import Catalog, example_queries, resident_bytes
from influence.service.settings import named_runs
from influence.solving import solved

QUESTION = {"prompt": "Lisbon lies on", "completion": " the Tagus"}


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, in a directory called `small`."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "small"))


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("server")
    with serving(scratch / "log", run, "--state-dir", scratch / "state") as served:
        yield served


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, run: str = "small", **body: Any) -> httpx.Response:
    return http.post(f"/v1/runs/{run}/queries", json=QUESTION | body)


def finished_query(http: httpx.Client, name: str) -> dict[str, Any]:
    """The state of a query once it is finished."""

    def ended() -> Any:
        state = http.get(f"/v1/queries/{name}").json()
        return state if state["state"] not in ("queued", "running") else None

    return dict(until(ended))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal but for who asked, and for float32 sums in another order: scores to 1e-4 of the greatest."""
    found, expected = without_times(found), without_times(expected)
    assert found.keys() == expected.keys()
    for side in ("results", "opponents"):
        if side in expected:
            assert [one["id"] for one in found[side]] == [one["id"] for one in expected[side]]
            largest = max(abs(one["score"]) for one in expected[side])
            for one, other in zip(found[side], expected[side], strict=True):
                assert {k: v for k, v in one.items() if k in ("text", "metadata", "bm25_rank", "rank")} == {
                    k: v for k, v in other.items() if k in ("text", "metadata", "bm25_rank", "rank")
                }
                assert np.allclose([s for _, s in one["tokens"]], [s for _, s in other["tokens"]], rtol=0, atol=1e-4 * largest)
                assert np.allclose(list(one["layers"].values()), list(other["layers"].values()), rtol=0, atol=1e-4 * largest)
                assert one["score"] == pytest.approx(other["score"], rel=1e-4, abs=1e-4 * largest)
    assert found["query"]["tokens"] == expected["query"]["tokens"]
    assert found["query"]["log_probability"] == pytest.approx(expected["query"]["log_probability"], rel=1e-4)
    assert found["coverage"] == expected["coverage"]
    assert found["provenance"] == expected["provenance"]


# answers


def test_a_result_is_that_of_the_command_line(http: httpx.Client, run: Path, influence: Influence) -> None:
    response = ask(http, k=4, bm25=True, candidates=20, where="source = 'gazetteer'")
    assert response.status_code == 200
    words = ["query", run, *QUESTION.values(), "-k", 4, "--bm25", "--candidates", 20, "--where", "source = 'gazetteer'", "--json"]
    assert_same(response.json(), influence(*words).json)
    assert response.json()["provenance"]["run"] == "small"
    kept = http.get(response.headers["location"]).json()
    assert (kept["state"], kept["result"]) == ("done", response.json())


@pytest.mark.parametrize(
    "body",
    [
        {"k": 3, "opponents": True},
        {"k": 2, "both_ends": True},
        {"normalize": True, "k": 3},
        {"contrast": " the Aker", "k": 3},
        {"span": [0, 2], "k": 3},
        {"span": [[0, 1], [2, 3]], "k": 3},
        {"by_output_token": True, "k": 2},
        {"layers": ["*.mlp.*"], "k": 3},
    ],
    ids=json.dumps,
)
def test_every_option_means_what_it_means_in_python(http: httpx.Client, run: Path, body: dict[str, Any]) -> None:
    found = ask(http, **body).json()
    options = {key: value for key, value in body.items() if key not in ("both_ends", "layers")} | {"layers": tuple(body.get("layers", ()))}
    options["span"] = tuple(body["span"]) if "span" in body else None
    expected = open_run(run).query(*QUESTION.values(), **options).to_json()
    if body.get("both_ends"):
        expected["opponents"] = open_run(run).query(*QUESTION.values(), **options, opponents=True).to_json()["results"]
    assert_same(found, expected)


def test_text_tokens_and_sets_are_asked_too(http: httpx.Client, run: Path) -> None:
    opened = open_run(run)
    ids = opened.tokenizer("Oslo lies on the Aker.")["input_ids"]
    for body, measured in (
        ({"text": "Oslo lies on the Aker."}, opened.measure("", "Oslo lies on the Aker.")),
        ({"input_ids": ids}, opened.measure_tokens(ids)),
        (
            {"queries": [{"id": "a", "text": "Oslo lies on the Aker.", "weight": 3}, {"input_ids": ids}], "as_one": "sum"},
            combine(
                [
                    Member(name="a", weight=3, measurement=opened.measure("", "Oslo lies on the Aker.")),
                    Member(name="2", weight=1, measurement=opened.measure_tokens(ids)),
                ],
                "sum",
            ),
        ),
    ):
        found = http.post("/v1/runs/small/queries", json=body)
        assert found.json()["query"]["log_probability"] == pytest.approx(
            opened.answer([measured], QueryOptions())[0].query["log_probability"], rel=1e-4
        )


def test_concurrent_queries_are_answered_together_and_each_as_if_alone(http: httpx.Client, run: Path) -> None:
    opened = open_run(run)
    towns = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Tbilisi", "Dakar", "Lima", "Turin")
    before = _batches(http)
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda town: ask(http, prompt=f"{town} lies", completion=" on the river", k=3, candidates=12), towns))
    assert [answer.status_code for answer in answers] == [200] * 10
    after = _batches(http)
    assert after[1] - before[1] == 10
    assert after[0] - before[0] < 10, "some were answered together"
    for town, answer in zip(towns, answers, strict=True):
        expected = opened.query(f"{town} lies", " on the river", k=3, candidates=12)
        assert_same(answer.json(), expected.to_json())


def _batches(http: httpx.Client) -> tuple[float, float]:
    """(number of batches, number of queries in them) so far."""
    text = http.get("/metrics").text
    count, total = (re.search(rf"^influence_batch_size_{what} (\S+)", text, re.M) for what in ("count", "sum"))
    assert count
    assert total
    return float(count[1]), float(total[1])


def test_the_same_question_again_gives_the_kept_answer(http: httpx.Client) -> None:
    first, second = ask(http, k=7), ask(http, k=7)
    assert first.json() == second.json()
    assert 'influence_cache_total{outcome="hit"}' in http.get("/metrics").text


def test_a_scan_is_accepted_reported_and_answered(http: httpx.Client, run: Path) -> None:
    response = ask(http, exact=True, k=4)
    assert response.status_code == 202
    name = response.json()["id"]
    with http.stream("GET", f"/v1/queries/{name}/events") as stream:
        events = [line for line in stream.iter_lines() if line]
    assert events[-2] == "event: end"
    assert json.loads(events[-1].removeprefix("data: "))["state"] == "done"
    state = finished_query(http, name)
    assert state["progress"]["done"] == state["progress"]["total"] == 65
    assert_same(state["result"], open_run(run).query(*QUESTION.values(), exact=True, k=4).to_json())
    assert "<!DOCTYPE html>" in http.get(f"/v1/queries/{name}/report").text


def test_a_refinement_is_accepted_and_answered(http: httpx.Client, run: Path) -> None:
    response = ask(http, refine=True, refine_steps=2, refine_sequences=8, k=3)
    assert response.status_code == 202
    state = finished_query(http, response.json()["id"])
    assert state["state"] == "done", state["error"]
    assert state["result"]["provenance"]["refinement"]["sequences"] == 8


def test_what_is_served_says_how_good_it_is(http: httpx.Client, run: Path) -> None:
    (facts,) = http.get("/v1/runs").json()["runs"]
    assert facts == http.get("/v1/runs/small").json()
    assert (facts["name"], facts["state"], facts["sequences"], facts["metadata"]) == ("small", "loaded", 65, ["source"])
    assert facts["coverage"]["parameters_attributed"] == 1.0
    fidelity = open_run(run).fidelity
    assert fidelity is not None
    assert facts["fidelity"] == json.loads(json.dumps(fidelity.to_json()))


def test_sequences_and_layers_are_told(http: httpx.Client, run: Path) -> None:
    opened = open_run(run)
    sequence = http.get("/v1/runs/small/sequences/doc-00:0").json()
    assert sequence["text"] == opened.store[0].text
    assert sequence["documents"] == [part.to_json() for part in opened.store[0].parts]
    assert sequence["sequences_of_document"] == [name for name in opened.store.ids if name.startswith("doc-00")]
    report = http.get("/v1/runs/small/layers").json()
    assert [layer["name"] for layer in report["layers"]] == [layer.name for layer in opened.coverage.layers]
    assert all(layer["damping"] > 0 for layer in report["layers"])
    examples = http.get("/v1/runs/small/examples", params={"count": 3}).json()["examples"]
    assert len(examples) == 3
    for example in examples:
        assert opened.training[opened.store.ids.index(example["sequence"])].text.startswith(example["prompt"] + example["completion"])


def test_examples_of_other_seeds_keep_nothing_in_memory(run: Path) -> None:
    opened = open_run(run)
    first = example_queries(opened, 5, seed=0)  # reads what is kept: texts and ids
    tracemalloc.start()
    others = [example_queries(opened, 5, seed=seed) for seed in range(1, 201)]
    assert len({json.dumps(examples) for examples in others}) > 100
    del others
    gc.collect()  # what NumPy's generators leave in circles
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200 * 8 * len(opened.training) / 2, "less than half of an order of all sequences for each seed"
    assert example_queries(opened, 5, seed=0) == first


@pytest.mark.parametrize("refine", [None, RefineOptions(sequences=20, steps=2, tolerance=0)], ids=["scan", "refinement"])
def test_long_work_is_between_two_batches_whenever_it_reports(run: Path, refine: RefineOptions | None) -> None:
    opened = open_run(run)
    attributed = opened.attributed
    one_sequence = replace(attributed.budget, memory_bytes=1)  # a batch has one at least
    opened.__dict__["attributed"] = replace(attributed, budget=one_sequence)
    measurement = opened.measure(*QUESTION.values())
    found = solved(opened, opened.attributed, [measurement], None)
    passes_at_reports: list[int] = []
    with slow_models(0) as passes:
        reports: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            passes_at_reports.append(passes.count)
            reports.append((done, total))

        if refine:
            solved(opened, opened.attributed, [measurement], refine, progress)
        else:
            opened.exact_scores(found.vectors, 1, progress)
    between = np.diff(passes_at_reports)
    assert passes_at_reports[-1] >= 40
    assert between.max() <= (2 if refine else 1)  # a product with the Hessian goes through the model twice
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == reports[-1][1]


# refusals


def _post(http: httpx.Client, body: bytes) -> httpx.Response:
    return http.post("/v1/runs/small/queries", content=body, headers={"Content-Type": "application/json"})


REFUSED: list[tuple[int, str, Callable[[httpx.Client], httpx.Response]]] = [
    (400, "malformed", lambda http: _post(http, b"{")),
    (400, "malformed", lambda http: _post(http, b"\xff")),
    (400, "malformed", lambda http: _post(http, b"[" * 200_000)),
    (403, "forbidden", lambda http: http.get("/v1/runs", headers={"Host": "attacker.example"})),
    (403, "forbidden", lambda http: http.post("/v1/runs/small/queries", json=QUESTION, headers={"Origin": "https://attacker.example"})),
    (404, "not_found", lambda http: ask(http, run="other")),
    (405, "method_not_allowed", lambda http: ask(http, run="..")),
    (404, "not_found", lambda http: ask(http, run="%2e%2e")),
    (404, "not_found", lambda http: ask(http, run="..%2fsmall")),
    (404, "not_found", lambda http: http.get("/v1/runs/%2e%2e/layers")),
    (404, "not_found", lambda http: http.get("/v1/runs/small/sequences/../../../run.json")),
    (404, "not_found", lambda http: http.get("/v1/runs/small/sequences/doc-99")),
    (404, "not_found", lambda http: http.get("/v1/queries/doc-99")),
    (404, "not_found", lambda http: http.delete("/v1/queries/..%2fqueries.sqlite3")),
    (404, "not_found", lambda http: http.get("/nothing")),
    (404, "not_found", lambda http: ask(http, also=["other"])),
    (405, "method_not_allowed", lambda http: http.put("/v1/runs")),
    (413, "too_large", lambda http: ask(http, prompt="x" * 2**20)),
    (413, "too_large", lambda http: http.post("/v1/runs/small/queries", content=iter([b'{"prompt": "', b"x" * 2**20, b'"}']))),
    (422, "invalid", lambda http: ask(http, k=0)),
    (422, "invalid", lambda http: ask(http, k="10")),
    (422, "invalid", lambda http: ask(http, unknown=1)),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", json={"prompt": "a"})),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", content=b'{"prompt": "a", "completion": "b"}')),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", json={"text": "a", "input_ids": [1]})),
    (422, "refused", lambda http: ask(http, k=101)),
    (422, "refused", lambda http: ask(http, candidates=100_000)),
    (422, "refused", lambda http: ask(http, completion="")),
    (422, "refused", lambda http: ask(http, where="nonsense = 1")),
    (422, "refused", lambda http: ask(http, where="1; drop table metadata")),
    (422, "refused", lambda http: ask(http, layers=["nothing"])),
    (422, "refused", lambda http: ask(http, prompt="word " * 100)),
    (422, "invalid", lambda http: _post(http, b'{"prompt": "\\ud800", "completion": " half a character"}')),
    (422, "refused", lambda http: ask(http, also=["small"])),
    (422, "refused", lambda http: http.post("/v1/runs/small/queries", json={"input_ids": [1, 10**9]})),
    (422, "refused", lambda http: ask(http, span=[[0, 1], [2, 99]])),
    (422, "invalid", lambda http: ask(http, as_one="sum")),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", json={"queries": []})),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", json={"queries": [{"prompt": "a"}]})),
    (422, "refused", lambda http: http.post("/v1/runs/small/queries", json={"queries": [{"text": "a b c", "weight": 0.0}]})),
    (422, "refused", lambda http: http.post("/v1/runs/small/queries", json={"messages": [{"role": "assistant", "content": "a"}]})),
    (422, "invalid", lambda http: http.post("/v1/runs/small/queries", json={"messages": [{"role": "assistant"}]})),
]


@pytest.mark.parametrize(("status", "code", "request_"), REFUSED, ids=[str(place) for place in range(len(REFUSED))])
def test_a_wrong_request_is_one_message_without_a_path(
    http: httpx.Client, run: Path, status: int, code: str, request_: Callable[[httpx.Client], httpx.Response]
) -> None:
    response = request_(http)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    message = response.json()["error"]["message"]
    assert message
    assert "Traceback" not in message
    assert str(run.parent) not in message
    assert not re.search(r"/(tmp|root|home|work|usr)/", message)


def test_every_response_has_the_headers_of_safety(http: httpx.Client) -> None:
    for path in ("/healthz", "/v1/runs", "/nothing"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
    assert http.get("/v1/runs").headers["cache-control"] == "no-store"


def test_the_audit_log_tells_who_asked_what_kind_of_thing_and_not_the_text(http: httpx.Client, server: Served) -> None:
    name = ask(http, k=6).json()["id"]

    def told() -> list[dict[str, Any]]:  # after the answer was sent
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("query") == name]

    (line,) = until(told)
    assert (line["user"], line["status"], line["route"], line["run"]) == ("local", 200, "/v1/runs/{run}/queries", "small")
    assert "Tagus" not in server.log.read_text()


def test_openapi_names_every_route_with_examples(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/runs/{run}/queries", "/v1/queries/{id}", "/metrics", "/readyz"} <= document["paths"].keys()
    assert document["components"]["schemas"]["QueryBody"]["examples"]


# who may ask


@pytest.fixture
def guarded(run: Path, tmp_path: Path, influence: Influence) -> Iterator[tuple[httpx.Client, dict[str, str], Path]]:
    """A service with tokens of a user and of an administrator: client, tokens by name, the file of tokens."""
    file = tmp_path / "tokens.json"
    tokens = {
        name: influence("tokens", "add", name, "--scope", scope, "--tokens-file", file).out.strip()
        for name, scope in (("ada", "query"), ("root", "admin"))
    }
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state", tokens_file=file)
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, tokens, file


def test_tokens_open_what_their_scopes_say(guarded: tuple[httpx.Client, dict[str, str], Path], influence: Influence) -> None:
    http, tokens, file = guarded
    assert all(token not in file.read_text() for token in tokens.values())

    def status(path: str, token: str | None) -> int:
        return http.get(path, headers={"Authorization": f"Bearer {token}"} if token else {}).status_code

    assert [status("/v1/runs", token) for token in (None, "wrong", tokens["ada"], tokens["root"])] == [401, 401, 200, 200]
    assert [status("/metrics", token) for token in (None, tokens["ada"], tokens["root"])] == [401, 403, 200]
    assert [status(path, None) for path in ("/healthz", "/readyz", "/openapi.json")] == [200, 200, 200]
    assert http.get("/v1/runs").headers["www-authenticate"] == "Bearer"
    assert influence("tokens", "remove", "ada", "--tokens-file", file).status == 0
    assert status("/v1/runs", tokens["ada"]) == 401


def test_only_its_owner_and_an_administrator_see_and_forget_a_query(
    guarded: tuple[httpx.Client, dict[str, str], Path], influence: Influence
) -> None:
    http, tokens, file = guarded
    other = influence("tokens", "add", "eve", "--tokens-file", file).out.strip()
    as_user = {name: {"Authorization": f"Bearer {token}"} for name, token in (tokens | {"eve": other}).items()}
    name = http.post("/v1/runs/small/queries", json=QUESTION, headers=as_user["ada"]).json()["id"]
    paths = [f"/v1/queries/{name}", f"/v1/queries/{name}/events", f"/v1/queries/{name}/report"]
    for user, status in (("eve", 404), ("ada", 200), ("root", 200)):
        assert [http.get(path, headers=as_user[user]).status_code for path in paths] == [status] * 3
    forget = {"forget": "true"}
    assert http.delete(f"/v1/queries/{name}", params=forget, headers=as_user["eve"]).status_code == 404
    assert http.get(f"/v1/queries/{name}", headers=as_user["ada"]).status_code == 200
    assert http.delete(f"/v1/queries/{name}", params=forget, headers=as_user["root"]).status_code == 200
    assert http.get(f"/v1/queries/{name}", headers=as_user["ada"]).status_code == 404


def test_cancelling_what_has_just_finished_keeps_its_result_and_forgetting_does_not(http: httpx.Client) -> None:
    found = ask(http, k=8).json()
    address = f"/v1/queries/{found['id']}"
    for _ in range(2):
        assert http.delete(address).json()["state"] == "done"
    assert http.get(address).json()["result"] == found
    assert http.delete(address, params={"forget": "true"}).json()["state"] == "done"
    assert http.get(address).status_code == 404


def test_without_tokens_it_listens_to_its_own_machine_only(run: Path, influence: Influence) -> None:
    influence("serve", run, "--host", "0.0.0.0", "--port", "0").says("without tokens only this machine may ask")
    influence("serve", run.parent / "nothing").says("is not a run directory")
    influence("serve").says("give run directories, or --runs-dir")


# limits


def test_too_much_is_refused_with_when_to_come_back(run: Path, tmp_path: Path) -> None:
    limits = Limits(queued_per_user=2, job_seconds=1.0)
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state", limits=limits)
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, slow_models(0.3):
        answers = [ask(http, exact=True, k=k) for k in (1, 2, 3)]
        assert sorted(answer.status_code for answer in answers) == [202, 202, 429]
        assert all("retry-after" in answer.headers for answer in answers)
        states = [finished_query(http, answer.json()["id"]) for answer in answers if answer.status_code == 202]
        assert {state["error"]["code"] for state in states} == {"timeout"}


@dataclass
class Passes:
    """How many forward passes were made."""

    count: int = 0


@contextmanager
def slow_models(seconds: float) -> Iterator[Passes]:
    """Every forward pass of this process's models takes so much longer: a large model as far as time goes."""
    passes = Passes()

    def pause(module: nn.Module, _: object) -> None:
        if isinstance(module, GPT2LMHeadModel):
            passes.count += 1
            time.sleep(seconds)

    hook = nn.modules.module.register_module_forward_pre_hook(pause)
    yield passes
    hook.remove()


def test_no_more_candidates_than_allowed_are_reranked_asked_for_or_not(run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state", limits=Limits(candidates=3))
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        found = ask(http, k=2).json()
    assert found["provenance"]["candidates"] == 3
    asked = open_run(run).query(*QUESTION.values(), k=2, candidates=3)
    assert found["provenance"]["recall_at_10"] == asked.provenance["recall_at_10"]
    assert open_run(run).query(*QUESTION.values(), k=2).provenance["candidates"] > 3


def test_a_request_that_takes_too_long_is_stopped_and_so_is_its_work(run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state", limits=Limits(request_seconds=0.5))
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, slow_models(0.3) as passes:
        response = ask(http, candidates=60)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert "retry-after" not in response.headers
        time.sleep(0.7)
        done = passes.count
        time.sleep(1.0)
        assert passes.count == done, "nothing goes on that nobody waits for"


def test_a_cancelled_query_stops_its_work_and_ends_as_cancelled(run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, slow_models(0.4) as passes:
        name = ask(http, exact=True).json()["id"]
        until(lambda: passes.count > 0)
        assert http.delete(f"/v1/queries/{name}").json()["state"] == "cancelled"
        time.sleep(1.2)
        done = passes.count
        time.sleep(1.0)
        assert passes.count == done
        assert http.get(f"/v1/queries/{name}").json()["state"] == "cancelled"


def test_quick_queries_do_not_wait_for_a_scan_to_end(run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, slow_models(0.2):
        name = ask(http, exact=True).json()["id"]
        until(lambda: http.get(f"/v1/queries/{name}").json()["state"] == "running")
        assert ask(http, candidates=1, k=1).status_code == 200
        assert http.get(f"/v1/queries/{name}").json()["state"] == "running"
        assert finished_query(http, name)["state"] == "done"


def test_what_no_query_of_a_batch_can_be_answered_with_is_found_out_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions: list[str] = []

    def matching_slowly(metadata: Any, where: str) -> Any:
        conditions.append(where)
        time.sleep(0.3)
        return matching(metadata, where)

    monkeypatch.setattr(run_module, "matching", matching_slowly)
    settings = ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state", limits=Limits(batch_seconds=1.0))
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: ask(http, completion=f" {number}", where="absent = 1"), range(8)))
        alone = ask(http, where="absent = 1")
    assert {(answer.status_code, answer.text) for answer in answers} == {(422, alone.text)}
    assert "no such column" in alone.text
    assert len(conditions) <= 3, "one for each batch, and one for the query alone"


# what goes wrong around it


def test_a_state_directory_that_cannot_be_written_is_told_and_quick_queries_are_answered(run: Path, tmp_path: Path) -> None:
    app = create_app(ServiceSettings(runs=named_runs([run]), state_dir=tmp_path / "state"))
    store = app.state.service.store
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        (pages,) = store._rows("PRAGMA page_count")[0]
        store._rows(f"PRAGMA max_page_count = {pages}")
        found = [ask(http, k=k, completion=f" the Tagus and more of it {k}") for k in (1, 2, 3)]
        assert {answer.status_code for answer in found} == {200}
        refused = [ask(http, exact=True, k=k, prompt="Lisbon " * 3_000) for k in (1, 2)]
        assert {(one.status_code, one.json()["error"]["code"], one.headers["retry-after"]) for one in refused} == {
            (503, "unavailable", "30")
        }
        assert "full" in refused[0].json()["error"]["message"]
        store._rows("PRAGMA max_page_count = 1000000")
        accepted = ask(http, exact=True)
        assert accepted.status_code == 202
        assert finished_query(http, accepted.json()["id"])["state"] == "done"


NESTED = 200_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * NESTED + b"]" * NESTED + b"}",
        b'{"completion": " x", "k": ' + b"9" * 100_000 + b"}",
        b'{"completion": " x", "where": "' + b"(" * 15_000 + b'"}',
        b'{"completion": " x", "layers": ["' + b"*a" * 5_000 + b'"]}',
        b'{"completion": " x", "where": "/' + b"/a a" * 4_000 + b'"}',
        b'{"completion": " x", "prompt": "' + b"a " * 100_000 + b'"}',
        b"\xff\xfe",
        b"null",
    ],
    ids=["nested", "number", "parentheses", "glob", "path", "long", "bytes", "null"],
)
def test_whatever_stands_in_a_body_is_refused_soon_and_in_one_line(http: httpx.Client, body: bytes) -> None:
    start = time.monotonic()
    response = http.post("/v1/runs/small/queries", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert "\n" not in response.json()["error"]["message"]
    assert time.monotonic() - start < 20
    assert ask(http, k=1).status_code == 200


def test_tokens_are_told_of_no_more_text_than_can_be_asked(http: httpx.Client) -> None:
    response = http.post("/v1/runs/small/tokens", json={"completion": "a " * 50_000})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "refused")
    assert "at most 4096" in response.json()["error"]["message"]


def test_a_run_that_is_removed_or_replaced_while_it_is_served_is_told_and_comes_back(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("one", "other"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    settings = ServiceSettings(
        runs=named_runs([tmp_path / "runs" / "one"]), runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", limits=Limits(batch=1)
    )
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert [ask(http, name).status_code for name in ("one", "other")] == [200, 200]
        for name in ("one", "other"):
            (tmp_path / "runs" / name).rename(tmp_path / name)
        gone = [ask(http, name, k=3) for name in ("one", "other")]
        assert [(one.status_code, one.json()["error"]["code"]) for one in gone] == [(409, "stale"), (404, "not_found")]
        assert all(str(tmp_path) not in one.text for one in gone)
        assert [facts["state"] for facts in http.get("/v1/runs").json()["runs"]] == ["unusable"]
        for name in ("one", "other"):
            (tmp_path / name).rename(tmp_path / "runs" / name)
        assert [ask(http, name, k=3).status_code for name in ("one", "other")] == [200, 200]


def test_two_runs_of_one_name_are_refused(finished: Path, tmp_path: Path, influence: Influence) -> None:
    for parent in ("a", "b"):
        shutil.copytree(finished, tmp_path / parent / "demo")
    message = "are both called demo: rename one"
    influence("serve", tmp_path / "a/demo", tmp_path / "b/demo").says(message)
    influence("serve", tmp_path / "a/demo", "--runs-dir", tmp_path / "b").says(message)


# changes of a run


@pytest.fixture
def own_run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "own"))


def test_what_is_appended_and_removed_is_seen_without_a_restart_and_no_request_is_dropped(
    own_run: Path, tmp_path: Path, influence: Influence
) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        statuses: list[int] = []
        ended = threading.Event()

        def keep_asking() -> None:
            while not ended.is_set():
                statuses.append(ask(http, "own", completion=f" the Tagus {len(statuses)}", k=2, candidates=5).status_code)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        new = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": "Lisbon lies on the Tagus, again and again.", "source": "note"}])
        assert influence("append", own_run, new).status == 0
        found = ask(http, "own", k=20).json()
        assert any(one["id"].startswith("new") for one in found["results"])
        (tmp_path / "ids").write_text("doc-00\n")
        assert influence("remove", own_run, "--ids", tmp_path / "ids").status == 0
        assert all(not one["id"].startswith("doc-00") for one in ask(http, "own", k=20).json()["results"])
        assert http.get("/v1/runs/own/sequences/doc-00:0").status_code == 404
        ended.set()
        asking.join()
        assert len(statuses) > 2
        assert set(statuses) == {200}


def test_results_that_show_what_was_erased_are_forgotten_and_others_kept(own_run: Path, tmp_path: Path, influence: Influence) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        shows = ask(http, "own", k=20).json()
        other = ask(http, "own", k=20, where="source = 'diary'").json()
        assert any(one["id"] == "doc-00:0" for one in shows["results"])
        (tmp_path / "ids").write_text("doc-00\n")
        assert influence("remove", own_run, "--ids", tmp_path / "ids", "--erase").status == 0
        assert http.get(f"/v1/queries/{shows['id']}").status_code == 404
        assert http.get(f"/v1/queries/{other['id']}").status_code == 200


def test_a_result_that_was_written_after_an_erasure_it_does_not_know_is_not_shown(
    own_run: Path, tmp_path: Path, influence: Influence
) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        shows = ask(http, "own", k=20)
        assert any(one["id"] == "doc-00:0" for one in shows.json()["results"])
        (tmp_path / "ids").write_text("doc-00\n")
        assert influence("remove", own_run, "--ids", tmp_path / "ids", "--erase").status == 0
        after = ask(http, "own", k=20).json()["id"]
        assert http.get(f"/v1/queries/{after}").status_code == 200  # the results of before were looked through
        with closing(sqlite3.connect(tmp_path / "state" / "queries.sqlite3")) as connection, connection:
            connection.execute("UPDATE queries SET result = ? WHERE id = ?", (shows.text, after))
        for path in ("", "/report", "/events"):
            assert http.get(f"/v1/queries/{after}{path}").status_code == 404


def test_a_scan_that_was_under_way_during_an_erasure_is_answered_without_what_was_erased(
    own_run: Path, tmp_path: Path, influence: Influence
) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    (tmp_path / "ids").write_text("doc-00\n")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        with slow_models(0.5) as passes:
            name = ask(http, "own", exact=True, k=65).json()["id"]
            until(lambda: passes.count > 1)
            assert influence("remove", own_run, "--ids", tmp_path / "ids", "--erase").status == 0
            assert http.get(f"/v1/queries/{name}").json()["state"] == "running"
        state = finished_query(http, name)
        assert state["state"] == "done"
        assert all(not one["id"].startswith("doc-00") for one in state["result"]["results"])


def test_a_kept_result_outlives_its_run(own_run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        found = ask(http, "own").json()
        (own_run / "run.json").write_text("{")
        assert ask(http, "own").status_code == 409
        assert http.get(f"/v1/queries/{found['id']}").json()["result"] == found
        shutil.rmtree(own_run)
        assert http.get(f"/v1/queries/{found['id']}").json()["result"] == found
        assert http.get(f"/v1/queries/{found['id']}/report").status_code == 200


def test_what_was_appended_is_checked_against_its_checksums(own_run: Path, tmp_path: Path, influence: Influence) -> None:
    new = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": "Lisbon lies on the Tagus, again and again.", "source": "note"}])
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert ask(http, "own").status_code == 200
        assert influence("append", own_run, new).status == 0
        (appended,) = (own_run / "rows").glob("append-*")
        _flip(appended / "rows.npy")
        response = ask(http, "own")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "stale")
        assert f"{appended.name}/rows.npy" in response.json()["error"]["message"]


def test_a_file_that_is_damaged_while_it_is_served_is_the_runs_fault(own_run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert ask(http, "own", where="source = 'diary'").status_code == 200
        (own_run / "sequences/all/part-00001.parquet").write_bytes(b"no table")
        response = ask(http, "own", where="source = 'gazetteer'")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "stale")
        assert "influence status --verify" in response.json()["error"]["message"]


def test_an_accepted_query_is_not_answered_by_another_index_of_the_same_name(own_run: Path, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state", limits=Limits(job_batch=1))
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http, slow_models(0.2):
        first, second = (ask(http, "own", exact=True, k=k).json()["id"] for k in (1, 2))
        until(lambda: http.get(f"/v1/queries/{first}").json()["state"] == "running")
        description = json.loads((own_run / "run.json").read_text())
        description["settings"]["index"]["seed"] += 1
        (own_run / "run.json").write_text(json.dumps(description))
        state = finished_query(http, second)
        assert (state["state"], state["error"]["code"]) == ("failed", "stale")
        assert "made anew" in state["error"]["message"]


def test_the_state_of_an_index_holds_what_its_answers_depend_on(
    own_run: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> tuple[str, str]:
        catalog = Catalog(ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state"))
        return catalog.state_of_index("own", refine=False), catalog.state_of_index("own", refine=True)

    quick, refined = states()
    assert (quick, refined) == states()
    monkeypatch.setattr(catalog_module, "version", lambda _: "another")
    assert not {quick, refined} & set(states())
    monkeypatch.undo()
    monkeypatch.setattr(Run, "optimizer_digest", "sha256:another")
    assert states()[0] == quick
    assert states()[1] != refined


DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ("factors/all", lambda run: next((run / "factors/all").glob("*.safetensors")).write_bytes(b"not a file of tensors")),
    ("rows.npy", lambda run: _flip(run / "rows/part-00000/rows.npy")),
    ("eigenbasis.safetensors", lambda run: _flip(next((run / "eigenbases").glob("*/eigenbasis.safetensors")))),
    ("part-00000.parquet", lambda run: _flip(run / "sequences/all/part-00000.parquet")),
    ("fidelity.json", lambda run: (run / "fidelity/all/fidelity.json").unlink()),
    ("rows/part-00001", lambda run: _swap(run / "rows/part-00000", run / "rows/part-00001")),
    ("living.json", lambda run: (run / "living.json").write_text("{")),
    ("run.json", lambda run: (run / "run.json").write_text("{")),
]


def _flip(path: Path) -> None:
    """One bit near the end, the size as it was."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def _swap(one: Path, other: Path) -> None:
    """A file of one unit in place of the other's."""
    shutil.copy(one / "rows.npy", other / "rows.npy")


@pytest.mark.parametrize(("file", "damage"), DAMAGES, ids=[name for name, _ in DAMAGES])
def test_a_damaged_file_of_a_run_is_refused_by_name(own_run: Path, tmp_path: Path, file: str, damage: Callable[[Path], Any]) -> None:
    damage(own_run)
    settings = ServiceSettings(runs_dir=own_run.parent, state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        response = ask(http, "own")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "stale"), response.text
        assert file in response.json()["error"]["message"]
        assert str(tmp_path) not in response.text
        assert http.get("/v1/runs").status_code == 200


def test_another_model_than_the_runs_is_refused(world: World, own_run: Path, tmp_path: Path) -> None:
    description = json.loads((own_run / "run.json").read_text())
    copied = world.copy(tmp_path)
    description["sources"]["model"] = str(copied.model)
    (own_run / "run.json").write_text(json.dumps(description))
    (copied.model / "model.safetensors").unlink()
    settings = ServiceSettings(runs_dir=own_run.parent, state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        response = ask(http, "own")
        assert response.status_code == 409
        assert str(tmp_path) not in response.text


# several runs


def test_several_runs_are_served_side_by_side_and_the_least_used_is_released(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    (tmp_path / "runs" / "outside").symlink_to(finished)
    (tmp_path / "runs" / "empty").mkdir()
    settings = ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state")
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert [run["name"] for run in http.get("/v1/runs").json()["runs"]] == ["one", "three", "two"]
        assert {run["state"] for run in http.get("/v1/runs").json()["runs"]} == {"available"}
        for name in ("one", "two", "three"):
            assert ask(http, name).json()["provenance"]["run"] == name
        averaged = ask(http, "one", also=["two"]).json()
        assert [one["run"] for one in averaged["provenance"]["averaged_over"]] == ["one", "two"]
        assert set(averaged["results"][0]["runs"]) == {"one", "two"}
        assert ask(http, "outside").status_code == 404


def test_the_run_that_was_used_longest_ago_is_released_when_memory_is_short(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    room_for_two = 5 * resident_bytes(open_run(finished)) // 2
    catalog = Catalog(ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", memory_budget=room_for_two))
    for name in ("one", "two", "one", "three"):
        catalog.loaded(name)
    assert [catalog.is_loaded(name) for name in ("one", "two", "three")] == [True, False, True]


def test_gradients_of_candidates_are_kept_in_half_of_what_loaded_runs_leave(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    size = resident_bytes(open_run(finished))
    catalog = Catalog(ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", memory_budget=5 * size))
    options = QueryOptions(k=2, candidates=10)
    with catalog.using(["one"]) as opened:
        kept = opened["one"].run.kept_gradients
        assert kept.limit_bytes == 2 * size
        opened["one"].run.answer([opened["one"].run.measure(*QUESTION.values())], options)
        assert catalog.kept_bytes == kept.num_bytes > 0
    with catalog.using(["two"]) as opened:
        assert (kept.limit_bytes, opened["two"].run.kept_gradients.limit_bytes) == (3 * size // 4,) * 2
    with catalog.using(["one"]) as opened:
        assert opened["one"].run.kept_gradients is kept, "what was kept stays while the run is loaded"


def test_runs_that_do_not_fit_into_memory_together_are_not_averaged(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    room_for_two = 5 * resident_bytes(open_run(finished)) // 2
    settings = ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", memory_budget=room_for_two)
    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        response = ask(http, "one", also=["two", "three"])
        assert (response.status_code, response.json()["error"]["code"]) == (422, "refused")
        assert "3 of the 3 runs need" in response.json()["error"]["message"]
        assert ask(http, "one", also=["two"]).status_code == 200


def test_a_run_in_use_is_neither_released_nor_loaded_twice(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    room_for_two = 5 * resident_bytes(open_run(finished)) // 2
    catalog = Catalog(ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", memory_budget=room_for_two))
    with catalog.using(["one", "two"]) as outer:
        with catalog.using(["three"]):
            assert [catalog.is_loaded(name) for name in ("one", "two", "three")] == [True, True, True]
        with catalog.using(["one"]) as inner:
            assert inner["one"] is outer["one"]
    assert [catalog.is_loaded(name) for name in ("one", "two", "three")] == [True, True, False]


def test_a_run_that_was_appended_to_is_not_taken_for_the_least_used(finished: Path, tmp_path: Path, influence: Influence) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    room_for_two = 5 * resident_bytes(open_run(finished)) // 2
    catalog = Catalog(ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state", memory_budget=room_for_two))
    for name in ("one", "two"):
        catalog.loaded(name)
    new = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": "Lisbon lies on the Tagus, again and again.", "source": "note"}])
    assert influence("append", tmp_path / "runs" / "two", new).status == 0
    catalog.opened("two")
    catalog.loaded("three")
    assert [catalog.is_loaded(name) for name in ("one", "two", "three")] == [False, True, True]


# the training set


def test_health_is_served_as_it_was_left_in_the_run_until_that_changes(own_run: Path, tmp_path: Path, influence: Influence) -> None:
    settings = ServiceSettings(runs=named_runs([own_run]), state_dir=tmp_path / "state")
    paths = ("/v1/runs/own/health", "/v1/runs/own/report?about=training-set")

    def statuses() -> list[tuple[int, str]]:
        found = [http.get(path) for path in paths]
        return [(one.status_code, one.json()["error"]["code"] if one.status_code != 200 else "") for one in found]

    with application(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert statuses() == [(404, "not_found")] * 2
        assert http.get("/v1/runs/own").json()["health"] is False
        printed = influence("health", own_run, "--json", "-k", 3).json
        assert http.get("/v1/runs/own").json()["health"] is True
        found, page = (http.get(path) for path in paths)
        told = {**printed, "provenance": {**printed["provenance"], "run": "own"}}
        assert {key: value for key, value in found.json().items() if key in told} == {k: v for k, v in told.items() if k != "page"}
        assert page.headers["content-type"].startswith("text/html")
        assert unescape(printed["largest"][0]["id"]) in page.text
        assert str(own_run) not in found.text + page.text
        (tmp_path / "ids").write_text("doc-00\n")
        assert influence("remove", own_run, "--ids", tmp_path / "ids").status == 0
        assert statuses() == [(409, "stale")] * 2
        assert influence("health", own_run, "-k", 3).status == 0
        assert http.get(paths[0]).json()["sequences"] == printed["sequences"] - len(
            [n for n in open_run(own_run).store.ids if "doc-00" in n]
        )
        (own_run / "evaluations/health/health.json").write_text("{")
        assert statuses() == [(409, "stale")] * 2


# what the page asks for


def test_tokens_of_a_question_are_those_that_a_span_counts(http: httpx.Client, run: Path) -> None:
    found = http.post("/v1/runs/small/tokens", json=QUESTION).json()
    whole = open_run(run).query(*QUESTION.values(), k=1).to_json()["query"]
    assert [*found["prompt"], *found["completion"]] == whole["tokens"]
    assert len(found["completion"]) == sum(value is not None for value in whole["token_log_probabilities"])
    assert ask(http, k=1, span=[0, len(found["completion"])]).status_code == 200
    assert ask(http, k=1, span=[0, len(found["completion"]) + 1]).status_code == 422
    assert http.post("/v1/runs/small/tokens", json={"completion": ""}).json() == {"prompt": [], "completion": []}
    half = http.post("/v1/runs/small/tokens", content=b'{"completion": "\\ud83d"}', headers={"Content-Type": "application/json"})
    assert (half.status_code, half.json()["error"]["code"]) == (422, "invalid")


def test_what_a_result_rests_on_is_said_as_in_its_report(http: httpx.Client) -> None:
    answer = ask(http, bm25=True, k=3).json()
    said = http.get(f"/v1/queries/{answer['id']}/words").json()
    report = unescape(http.get(f"/v1/queries/{answer['id']}/report").text)
    assert len(said["trust"]) == 3
    assert all(sentence in report for sentence in [*said["trust"], said["distribution"], said["bm25"]])
    assert http.get("/v1/queries/unknown/words").status_code == 404
