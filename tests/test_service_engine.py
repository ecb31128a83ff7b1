"""The engine's thread and the queue below it, with work that takes no model: who gets a turn, and that everybody who waits hears of it."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from served import until

from influence.service import Limits, ServiceSettings, create_app, engine
from influence.service.answers import Stopped, kind_of
from influence.service.bodies import QueryBody
from influence.service.catalog import Catalog
from influence.service.engine import Answer, Engine
from influence.service.errors import ServiceError
from influence.service.metrics import Metrics
from influence.service.store import MOST_ATTEMPTS, Query, QueryStore, Question

Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class Work:
    """Stands in for the models: what is done for each batch, and the batches that were asked for."""

    do: Callable[[QueryBody, Progress, Callable[[], None]], dict[str, Any]] = lambda body, progress, check: {"for": body.prompt}
    batches: list[list[str]] = field(default_factory=list)

    def answered(
        self, run: str, bodies: Sequence[QueryBody], progress: Progress, check: Callable[[], None]
    ) -> list[dict[str, Any] | ServiceError]:
        self.batches.append([body.prompt or "" for body in bodies])
        return [self.do(body, progress, check) for body in bodies]


class Runs(Catalog):
    """Runs of these names, which are loaded when they are asked for unless they are broken."""

    def __init__(self, state_dir: Path, *names: str) -> None:
        super().__init__(ServiceSettings(state_dir=state_dir))
        self.served, self.there, self.broken = list(names), set[str](), set[str]()

    def names(self) -> list[str]:
        return self.served

    def places(self) -> dict[str, str]:
        return {name: f"/runs/{name}" for name in self.served}

    def indexes(self, names: Sequence[str]) -> list[str]:
        return [f"index of {name}" for name in names]

    def loaded(self, name: str) -> Any:
        if name in self.broken:
            raise ServiceError(409, "stale", "damaged")
        self.there.add(name)

    def is_loaded(self, name: str) -> bool:
        return name in self.there

    @property
    def num_loaded(self) -> int:
        return len(self.there)


@dataclass(frozen=True, kw_only=True)
class Service:
    engine: Engine
    store: QueryStore
    runs: Runs
    work: Work

    def accept(self, prompt: str, run: str = "small", **body: Any) -> str:
        asked = QueryBody(prompt=prompt, completion=" x", exact=True, **body)
        kind = kind_of(run, self.runs.indexes([run, *asked.also]), asked)
        places = tuple(f"/runs/{name}" for name in [run, *asked.also])
        question = Question(user="ada", run=run, places=places, question=prompt, kind=kind, body=asked.model_dump(exclude_defaults=True))
        name = self.store.accept(question).id
        self.engine.wake()
        return name

    def ask(self, prompt: str, kind: str = "quick") -> "Future[Answer]":
        body = QueryBody(prompt=prompt, completion=" x")
        return self.engine.ask(
            Question(user="ada", run="small", places=("/runs/small",), question=prompt, kind=kind, body=body.model_dump()), body
        )

    def query(self, name: str) -> Query:
        found = self.store.get(name)
        assert found is not None
        return found

    def ended(self, name: str) -> Query:
        until(lambda: self.query(name).finished is not None)
        return self.query(name)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def service(work: Work | None = None, limits: Limits | None = None, runs: Sequence[str] = ("small",)) -> Service:
        work, limits, catalog = work or Work(), limits or Limits(), Runs(tmp_path / "state", *runs)
        store = QueryStore(tmp_path / "state", limits)
        one = Service(engine=Engine(catalog, store, Metrics(), limits), store=store, runs=catalog, work=work)
        monkeypatch.setattr(one.engine, "_answered", work.answered)
        made.append(one)
        return one

    monkeypatch.setattr(engine, "POLL_SECONDS", 0.02)
    yield service
    for one in made:
        assert one.engine.stop(30)
        one.store.close()


# who gets a turn


def test_accepted_queries_run_while_quick_ones_never_stop_coming(make: Callable[..., Service]) -> None:
    service = make(Work(do=lambda body, progress, check: time.sleep(0.05) or {"for": body.prompt}), Limits(batch=1))
    service.engine.start([])
    name = service.accept("long")
    asked = [service.ask(str(number)) for number in range(60)]
    assert service.ended(name).state == "done"
    assert not asked[-1].done(), "quick ones still waited"
    assert [future.result(30)[1] for future in asked[:2]] == [
        json.dumps({"for": str(n), "id": future.result()[0]}) for n, future in enumerate(asked[:2])
    ]


def test_a_batch_waits_for_as_many_as_were_under_way_and_a_query_alone_for_nobody(make: Callable[..., Service]) -> None:
    service = make(Work(do=lambda body, progress, check: time.sleep(0.02) or {}), Limits(batch_seconds=0.5))
    service.engine.start([])
    start = time.monotonic()
    for number in range(3):
        service.ask(f"alone {number}").result(30)
    assert time.monotonic() - start < 0.5, "one of these would have waited as long for another"

    def client(name: int) -> None:
        for number in range(10):
            time.sleep(0.03 * name)  # they ask again at different times
            service.ask(f"{name} {number}").result(30)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(client, range(4)))
    sizes = [len(batch) for batch in service.work.batches[3:]]
    assert sum(sizes) == 40
    assert sizes.count(4) >= 5, sizes


def test_long_work_steps_aside_for_one_batch_at_a_time_and_that_time_is_not_its_own(make: Callable[..., Service]) -> None:
    turns: list[str] = []

    def do(body: QueryBody, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
        if not body.exact:
            turns.append("quick")
            time.sleep(0.3)
            return {}
        for step in range(4):
            until(lambda: service.engine.num_waiting)
            turns.append("long")
            progress(step, 4)
        return {}

    service = make(Work(do=do), Limits(batch=1, job_seconds=0.9))
    name = service.accept("long")
    service.engine.start([])
    until(lambda: service.query(name).state == "running")
    asked = [service.ask(str(number)) for number in range(6)]
    ended = service.ended(name)
    assert ended.state == "done", "four batches of 0.3 seconds are no part of its 0.9"
    assert turns[:8] == ["long", "quick"] * 4
    for future in asked:
        future.result(30)


def test_work_that_takes_too_long_fails_as_that(make: Callable[..., Service]) -> None:
    def do(body: QueryBody, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
        while True:
            time.sleep(0.05)
            check()

    service = make(Work(do=do), Limits(job_seconds=0.2))
    service.engine.start([])
    assert service.ended(service.accept("endless")).code == "timeout"


# faults


def test_a_result_that_is_no_json_fails_its_query_and_no_other(make: Callable[..., Service]) -> None:
    service = make(Work(do=lambda body, progress, check: {"score": float("nan") if body.prompt == "bad" else 1.0}))
    quick = {name: service.ask(name) for name in ("good", "bad")}
    names = {name: service.accept(name) for name in ("good", "bad")}
    service.engine.start([])
    assert json.loads(quick["good"].result(30)[1])["score"] == 1.0
    with pytest.raises(ServiceError, match="the query failed"):
        quick["bad"].result(30)
    assert service.ended(names["good"]).state == "done"
    assert (service.ended(names["bad"]).state, service.ended(names["bad"]).code) == ("failed", "failed")
    assert service.work.batches == [["good", "bad"]] * 2, "no batch is worked on again"


def test_a_kept_body_that_cannot_be_read_any_more_fails_alone(make: Callable[..., Service]) -> None:
    service = make()
    bad = service.store.accept(
        Question(user="ada", run="small", places=("/runs/small",), question="old", kind="scan", body={"prompt": "a", "dropped_option": 1})
    ).id
    good = service.accept("good")
    service.engine.start([])
    assert (service.ended(bad).code, service.ended(good).state) == ("invalid", "done")


def test_whoever_waits_hears_of_a_fault_of_the_engine_itself(make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = make()

    def keep(*_: object) -> None:
        raise RuntimeError("not one of SQLite's")

    monkeypatch.setattr(service.store, "keep", keep)
    asked = service.ask("quick")
    service.engine.start([])
    with pytest.raises(ServiceError, match="the query failed"):
        asked.result(30)


def test_queries_over_which_the_engine_fails_again_and_again_end_as_failed(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()

    def finish(*_: object) -> bool:
        raise RuntimeError("the result cannot be written")

    monkeypatch.setattr(service.store, "finish", finish)
    name = service.accept("poison")
    service.engine.start([])
    assert service.ended(name).state == "failed"
    assert service.work.batches == [["poison"]] * MOST_ATTEMPTS


# runs


def test_a_service_leaves_the_queries_of_runs_that_it_does_not_serve(make: Callable[..., Service]) -> None:
    one, other = make(runs=["small"]), make(runs=["large"])
    names = [one.accept("a", "small"), one.accept("b", "large"), one.accept("c", "small", also=["large"])]
    one.engine.start([])
    one.ended(names[0])
    time.sleep(0.2)
    assert [one.query(name).state for name in names] == ["done", "queued", "queued"]
    other.engine.start([])
    assert other.ended(names[1]).state == "done"
    time.sleep(0.2)
    assert one.query(names[2]).state == "queued", "neither serves both of its runs"


def test_it_is_not_ready_before_every_run_that_was_named_can_be_loaded(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "LOAD_AGAIN_SECONDS", 0.1)
    service = make(runs=["small", "damaged"])
    service.runs.broken.add("damaged")
    service.engine.start(["damaged", "small"])
    until(lambda: service.runs.is_loaded("small"))
    time.sleep(0.3)
    assert not service.engine.ready
    assert "damaged" in {getattr(record, "run", None) for record in caplog.records}
    service.runs.broken.clear()
    until(lambda: service.engine.ready)
    assert service.runs.there == {"small", "damaged"}


# the end


def test_a_stop_hands_work_back_at_once_and_is_no_attempt_even_when_the_work_does_not_listen(make: Callable[..., Service]) -> None:
    listens: list[bool] = []

    def do(body: QueryBody, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
        until(lambda: listens)
        check()
        raise Stopped

    service = make(Work(do=do))
    name = service.accept("long")
    service.engine.start([])
    until(lambda: service.work.batches)
    assert not service.engine.stop(0.1), "it says that the work has not ended: the store must not be closed yet"
    (claimed,) = service.store.claim("next", 8, {"small": "/runs/small"})
    assert claimed.id == name
    listens.append(True)
    until(lambda: service.engine.stop(1))
    assert service.store.held("next") == {name}, "the late worker took nothing from the next one"
    assert service.store._rows("SELECT attempts FROM queries") == [(1,)], "that of the next one"


def test_the_end_of_the_application_waits_beside_the_event_loop_and_leaves_the_store_to_work_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(ServiceSettings(runs_dir=tmp_path, state_dir=tmp_path / "state"))
    engine, store = app.state.service.engine, app.state.service.store
    stop, ticks = engine.stop, 0

    def slow_stop(timeout_seconds: float) -> bool:
        time.sleep(1.0)
        return False

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def live() -> None:
        async with app.router.lifespan_context(app):
            ticking = asyncio.create_task(tick())
        ticking.cancel()

    monkeypatch.setattr(engine, "stop", slow_stop)
    asyncio.run(live())
    assert ticks > 10
    assert store.num_unfinished() == 0, "it is open"
    assert stop(30)
    store.close()
