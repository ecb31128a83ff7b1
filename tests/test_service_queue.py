"""The queue of accepted queries: each ends exactly once, with the right result, whatever becomes of the processes that work on it."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import serving, until
from test_service import QUESTION, ask, assert_same, finished_query

from influence.errors import RequestError
from influence.run import open_run
from influence.service import Limits
from influence.service import store as store_module
from influence.service.errors import ServiceError
from influence.service.store import MOST_ATTEMPTS, QueryStore, Question

RUNS = {"small": "/runs/small"}


def question(name: str = "one", user: str = "ada", kind: str = "scan") -> Question:
    return Question(user=user, run="small", places=("/runs/small",), question=name, kind=kind, body={"prompt": name, "completion": " x"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[QueryStore]:
    opened = QueryStore(tmp_path / "state", Limits())
    yield opened
    opened.close()


def state_of(store: QueryStore, name: str) -> str:
    found = store.get(name)
    assert found is not None
    return found.state


def test_a_query_goes_from_queued_to_running_to_done(store: QueryStore) -> None:
    name = store.accept(question()).id
    assert state_of(store, name) == "queued"
    (claimed,) = store.claim("worker", 8, RUNS)
    assert (claimed.id, claimed.body, state_of(store, name)) == (name, question().body, "running")
    assert store.finish("worker", name, '{"id": 1}')
    assert (state_of(store, name), store.claim("worker", 8, RUNS)) == ("done", [])


def test_queries_of_one_kind_are_claimed_together_oldest_first(store: QueryStore) -> None:
    names = [store.accept(question(str(number), kind="abab"[number])).id for number in range(4)]
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [names[0], names[2]]
    assert [query.id for query in store.claim("other", 1, RUNS)] == [names[1]]


def test_the_same_question_that_waits_is_not_queued_again_and_another_users_is(store: QueryStore) -> None:
    first = store.accept(question())
    assert store.accept(question()).id == first.id
    assert store.accept(question(user="eve")).id != first.id
    store.cancel(first.id)
    assert store.accept(question()).id != first.id


def test_only_the_holder_finishes_a_query_and_only_once(store: QueryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    name = store.accept(question()).id
    monkeypatch.setattr(store_module, "LEASE_SECONDS", -1.0)  # the worker is dead at once
    store.claim("dead", 8, RUNS)
    monkeypatch.undo()
    assert [query.id for query in store.claim("alive", 8, RUNS)] == [name]
    assert not store.finish("dead", name, '"late"'), "it was taken over"
    assert store.finish("alive", name, '"right"')
    assert not store.finish("alive", name, '"twice"')
    found = store.get(name)
    assert found is not None
    assert found.result == '"right"'


def test_a_query_that_ends_its_workers_fails_after_some_of_them(store: QueryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    name = store.accept(question()).id
    monkeypatch.setattr(store_module, "LEASE_SECONDS", -1.0)
    for _ in range(MOST_ATTEMPTS):
        assert len(store.claim("dead", 8, RUNS)) == 1
    assert (store.claim("alive", 8, RUNS), state_of(store, name)) == ([], "failed")


def test_what_is_handed_back_was_no_attempt(store: QueryStore) -> None:
    name = store.accept(question()).id
    for _ in range(2 * MOST_ATTEMPTS):
        assert len(store.claim("worker", 8, RUNS)) == 1
        store.hand_back("worker")
    assert state_of(store, name) == "queued"


def test_a_cancelled_query_is_held_no_more_and_cannot_be_finished(store: QueryStore) -> None:
    name = store.accept(question()).id
    store.claim("worker", 8, RUNS)
    assert store.held("worker") == {name}
    assert store.cancel(name)
    assert (store.held("worker"), store.finish("worker", name, "{}"), store.cancel(name)) == (set(), False, False)


def test_the_oldest_finished_queries_are_forgotten_and_unfinished_ones_never(tmp_path: Path) -> None:
    store = QueryStore(tmp_path, Limits(kept=2))
    waiting = store.accept(question("waiting")).id
    store.keep([(f"name-{number}", "{}", question(str(number))) for number in range(4)])
    assert [store.get(name) is not None for name in (waiting, "name-0", "name-1", "name-2", "name-3")] == [True, False, False, True, True]
    store.close()


def test_only_queries_of_the_given_runs_are_claimed_and_of_averages_only_those_over_them(store: QueryStore) -> None:
    single = store.accept(question("single")).id
    both = {**RUNS, "large": "/runs/large"}
    average = store.accept(replace(question("average", kind="average"), places=tuple(both.values()), body={"also": ["large"]})).id
    assert store.claim("other", 8, {"large": "/runs/large"}) == []
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [single]
    assert store.claim("worker", 8, RUNS) == []
    assert [query.id for query in store.claim("worker", 8, both)] == [average]


def test_another_run_of_the_same_name_is_another_services(store: QueryStore) -> None:
    name = store.accept(question()).id
    assert store.claim("other", 8, {"small": "/elsewhere/small"}) == []
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [name]


def test_a_query_of_a_run_that_nobody_serves_any_more_is_given_up_in_the_end(store: QueryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {"small": "/elsewhere/small"}
    old = store.accept(question("old")).id
    assert store.claim("other", 8, elsewhere) == []
    monkeypatch.setattr(store_module, "ABANDONED_SECONDS", -1.0)
    assert store.claim("other", 8, elsewhere) == []
    found = store.get(old)
    assert found is not None
    assert (found.state, found.code) == ("failed", "failed")
    served = store.accept(question("served")).id
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [served], "one that only waited long for its turn is not"


def test_a_full_disk_is_an_error_and_nothing_else_and_passes(store: QueryStore) -> None:
    before = store.accept(question("before")).id
    (pages,) = store._rows("PRAGMA page_count")[0]
    store._rows(f"PRAGMA max_page_count = {pages}")
    large = "x" * 100_000
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            store.keep([("large", large, question("large"))])
    assert store.get("large") is None
    store._rows("PRAGMA max_page_count = 100000")
    store.keep([("large", large, question("large"))])
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [before]


def test_a_queue_of_the_version_before_is_read(tmp_path: Path) -> None:
    store = QueryStore(tmp_path, Limits())
    name = store.accept(question()).id
    store.close()
    with closing(sqlite3.connect(tmp_path / "queries.sqlite3")) as connection, connection:
        connection.execute("ALTER TABLE queries DROP COLUMN places")
        connection.execute("PRAGMA user_version = 2")
    store = QueryStore(tmp_path, Limits())
    assert store.claim("worker", 8, {"large": "/runs/large"}) == []
    assert [query.id for query in store.claim("worker", 8, RUNS)] == [name]
    store.close()


def test_queries_that_were_tried_before_are_claimed_one_by_one(store: QueryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one that ends its worker fails alone, and the rest of its first batch are answered."""
    names = [store.accept(question(str(number))).id for number in range(4)]
    monkeypatch.setattr(store_module, "LEASE_SECONDS", -1.0)
    assert len(store.claim("dead", 8, RUNS)) == 4
    new = store.accept(question("new")).id
    for _ in range(MOST_ATTEMPTS - 1):
        assert [query.id for query in store.claim("dead", 8, RUNS)] == names[:1]
    monkeypatch.undo()
    claimed = [[query.id for query in store.claim("alive", 8, RUNS)] for _ in range(5)]
    assert claimed == [[names[1]], [names[2]], [names[3]], [new], []]
    assert state_of(store, names[0]) == "failed"


def test_work_that_failed_is_queued_again_and_was_an_attempt(store: QueryStore) -> None:
    name = store.accept(question()).id
    for _ in range(MOST_ATTEMPTS):
        assert len(store.claim("worker", 8, RUNS)) == 1
        store.try_again("worker")
    assert (store.claim("worker", 8, RUNS), state_of(store, name)) == ([], "failed")


def test_one_user_does_not_push_out_the_results_of_another(tmp_path: Path) -> None:
    store = QueryStore(tmp_path, Limits(kept=2))
    store.keep([("hers", "{}", question("hers", user="eve"))])
    store.keep([(f"name-{number}", "{}", question(str(number))) for number in range(4)])
    assert [store.get(name) is not None for name in ("hers", "name-1", "name-2", "name-3")] == [True, False, True, True]
    store.close()


def test_the_result_of_an_accepted_query_is_kept_for_a_while_whatever_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = QueryStore(tmp_path, Limits(kept=2))
    name = store.accept(question("long")).id
    store.claim("worker", 8, RUNS)
    store.finish("worker", name, "{}")
    store.keep([(f"name-{number}", "{}", question(str(number))) for number in range(4)])
    assert state_of(store, name) == "done"
    monkeypatch.setattr(store_module, "KEPT_SECONDS", 0.0)
    store.keep([("last", "{}", question("last"))])
    assert store.get(name) is None
    store.close()


def test_forgetting_reads_the_index_and_not_the_results(store: QueryStore) -> None:
    plan = store._rows("EXPLAIN QUERY PLAN SELECT id FROM queries WHERE user = '' AND finished IS NOT NULL ORDER BY finished DESC")
    assert "COVERING INDEX by_finished" in plan[0][-1]


def test_too_many_of_one_user_or_of_all_are_refused_but_not_the_same_question_again(tmp_path: Path) -> None:
    store = QueryStore(tmp_path, Limits(queued_per_user=2, queued=3))
    first = store.accept(question("one")).id
    store.accept(question("two"))
    with pytest.raises(ServiceError) as refused:
        store.accept(question("three"))
    assert (refused.value.status, refused.value.retry_seconds) == (429, 30)
    store.accept(question("one", user="eve"))
    with pytest.raises(ServiceError) as refused:
        store.accept(question("one", user="bob"))
    assert (refused.value.status, refused.value.code) == (503, "busy")
    assert store.accept(question("one")).id == first
    store.close()


def test_queries_that_are_accepted_at_once_keep_to_the_limit(tmp_path: Path) -> None:
    stores = [QueryStore(tmp_path, Limits(queued_per_user=5)) for _ in range(4)]

    def accepted(number: int) -> bool:
        try:
            stores[number % 4].accept(question(str(number)))
        except ServiceError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(accepted, range(40))) == 5
    for store in stores:
        store.close()


def test_what_it_makes_is_for_its_user_alone_and_what_was_there_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o755)
    for name, mode in (("made", 0o700), ("there", 0o755)):
        store = QueryStore(tmp_path / name, Limits())
        store.keep([("name", "{}", question())])
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir()} == {0o600}
        store.close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(RequestError, match=r"cannot be made .*: take another --state-dir"):
            QueryStore(directory, Limits())


def test_a_file_that_is_no_queue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queries.sqlite3").write_bytes(b"something else entirely, and long enough to be looked at" * 100)
    with pytest.raises(RequestError, match="cannot be used as the queue"):
        QueryStore(tmp_path, Limits(kept=1))


def test_a_queue_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "queries.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RequestError, match="another version"):
        QueryStore(tmp_path, Limits(kept=1))


def test_two_processes_that_claim_at_once_never_hold_the_same_query(tmp_path: Path) -> None:
    store = QueryStore(tmp_path, Limits())
    names = [store.accept(question(str(number))).id for number in range(40)]
    script = (
        "import sys, json; from pathlib import Path; from influence.service import Limits; from influence.service.store import QueryStore\n"
        "store, held = QueryStore(Path(sys.argv[1]), Limits()), []\n"
        "while claimed := store.claim(sys.argv[2], 1, {'small': '/runs/small'}): held += [query.id for query in claimed]\n"
        "print(json.dumps(held))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), worker], stdout=subprocess.PIPE, text=True) for worker in "ab"
    ]
    held = [json.loads(worker.communicate(timeout=60)[0]) for worker in workers]
    assert sorted(held[0] + held[1]) == sorted(names)
    store.close()


# whole servers


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "small"))


def wait_for_work(http: httpx.Client, names: list[str]) -> None:
    """Until one of the queries is no longer just queued."""
    until(lambda: any(http.get(f"/v1/queries/{name}").json()["state"] != "queued" for name in names))


@pytest.mark.slow
def test_killed_in_the_middle_of_its_queue_it_ends_every_query_once_after_a_restart(run: Path, tmp_path: Path) -> None:
    names: list[str] = []
    for round_ in range(2):
        with (
            serving(tmp_path / f"log-{round_}", run, "--state-dir", tmp_path / "state") as served,
            httpx.Client(base_url=served.url) as http,
        ):
            # the options differ, so that each is work of its own
            names += [ask(http, exact=True, k=1 + round_ + 2 * number).json()["id"] for number in range(5)]
            wait_for_work(http, names)
            served.kill()
    assert len(set(names)) == 10
    with serving(tmp_path / "log-last", run, "--state-dir", tmp_path / "state") as served, httpx.Client(base_url=served.url) as http:
        expected = open_run(run).query(*QUESTION.values(), exact=True, k=10).to_json()
        for name in names:
            state = finished_query(http, name)
            assert state["state"] == "done", state["error"]
            k = state["request"].get("k", 10)
            assert [one["id"] for one in state["result"]["results"]] == [one["id"] for one in expected["results"]][:k]
        assert_same(finished_query(http, names[-1])["result"], expected)
    logs = [json.loads(line) for log in tmp_path.glob("log-*") for line in log.read_text().splitlines() if line.startswith("{")]
    assert sorted(line["query"] for line in logs if line["message"] == "query ended") == sorted(names), "each ended once"


@pytest.mark.slow
def test_asked_to_stop_it_hands_its_work_back_and_ends_well(run: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", run, "--state-dir", tmp_path / "state") as served, httpx.Client(base_url=served.url) as http:
        names = [ask(http, exact=True, k=k).json()["id"] for k in range(1, 9)]
        start = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - start < 20
    store = QueryStore(tmp_path / "state", Limits())
    states = {name: state_of(store, name) for name in names}
    store.close()
    assert set(states.values()) <= {"queued", "done"}
    with serving(tmp_path / "log", run, "--state-dir", tmp_path / "state") as served, httpx.Client(base_url=served.url) as http:
        assert {finished_query(http, name)["state"] for name in names} == {"done"}


def test_with_json_the_address_is_one_object_on_standard_output(run: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "jobs.cli", "serve", str(run), "--port", "0", "--state-dir", str(tmp_path / "state"), "--json"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert httpx.get(f"{said['url']}healthz").json() == {"status": "ok"}
        assert said["runs"] == ["small"]
        process.terminate()
        assert (process.wait(60), process.stdout.read()) == (0, "")


def test_a_server_that_loads_is_alive_and_not_ready(run: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", run, "--state-dir", tmp_path / "state", ready=False) as served:
        statuses: list[tuple[int, int]] = []

        def look() -> Any:
            statuses.append((httpx.get(f"{served.url}/healthz").status_code, httpx.get(f"{served.url}/readyz").status_code))
            return statuses[-1][1] == 200

        until(look)
        assert statuses[0] == (200, 503)
        assert {alive for alive, _ in statuses} == {200}
