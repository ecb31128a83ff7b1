"""The one thread that works with models: it answers quick queries in batches and, when there are none, works off the queue of accepted ones.

A model is never used by two threads. Long work steps aside for one batch of quick queries whenever it reports progress, between its shards or
steps, and the queue is looked at after every batch, so that neither kind can keep the other from its turn. Before every batch of sequences it is
asked whether anybody still wants the result.
"""

import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from influence.answering import OptionsRefused
from influence.errors import RequestError
from influence.service.answers import Stopped, answers, kind_of, measure
from influence.service.bodies import QueryBody
from influence.service.catalog import Catalog, OpenedRun
from influence.service.errors import ServiceError, busy, refused
from influence.service.metrics import Metrics
from influence.service.settings import Limits
from influence.service.store import LEASE_SECONDS, Query, QueryStore, Question, new_id
from influence.solving import ignore

log = logging.getLogger("influence.service")

PATIENCE = 0.02
"""How much of the time that a batch took the next one waits for one more query: those who got answers ask again, but not all at once. A client
that is alone is never waited for."""
MOST_PATIENCE_SECONDS = 0.1

POLL_SECONDS = 0.5
"""How often the queue is looked at: for queries of other processes, and for cancellations while work goes on."""

LOAD_AGAIN_SECONDS = 30.0
"""How often a run that is to be loaded at start and could not be is tried again."""

Answer = tuple[str, str]
"""(id under which it is kept, JSON of the result object)."""
Outcome = Answer | ServiceError


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A quick query that waits for its answer. Whoever gives up cancels the future."""

    question: Question
    body: QueryBody
    future: "Future[Answer]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Engine:
    """Answers what it is given until it is stopped."""

    def __init__(self, catalog: Catalog, store: QueryStore, metrics: Metrics, limits: Limits) -> None:
        self._catalog, self._store, self._metrics, self._limits = catalog, store, metrics, limits
        self._worker = new_id()
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._to_load: list[str] = []  # named at start and not loaded yet, or not loadable
        self._load_again = 0.0
        self._loading = True
        self._draining = False  # no accepted query is begun, and the one at work is handed back
        self._stopped = False
        self._beside_work = False  # a quick batch is answered while long work stands aside
        self._last_seconds = 0.0  # what the last quick batch took
        self._expected = 1  # how many quick queries were under way when it ended
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._work, self._renew)]

    # for other threads

    def start(self, load: Sequence[str]) -> None:
        """Begins to work, and first loads these runs."""
        self._to_load.extend(load)
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether everything that is loaded at start is loaded, as far as memory allows, and new work is taken."""
        return not (self._loading or self._to_load or self._draining)

    @property
    def draining(self) -> bool:
        return self._draining

    def ask(self, question: Question, body: QueryBody) -> "Future[Answer]":
        """The answer, later. Raises 503 when too many queries wait or the service is about to stop."""
        ticket = Ticket(question=question, body=body)
        with self._changed:
            if self._draining:
                raise busy("the service is about to stop", 5)
            if len(self._waiting) >= self._limits.waiting:
                raise busy(f"{len(self._waiting)} queries are waiting already", 1 + len(self._waiting) // self._limits.batch)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket.future

    def wake(self) -> None:
        """Says that a query was accepted."""
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Hands back the accepted query at work and begins no other; quick queries that wait are still answered."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self, timeout_seconds: float) -> bool:
        """Ends the work, and says whether it ended in time. What was accepted and not finished is queued for the next process."""
        deadline = time.monotonic() + timeout_seconds
        self.drain()
        try:
            self._store.hand_back(self._worker)  # before the work has ended: whoever stops the process may not wait for that
        except sqlite3.Error:
            log.exception("accepted queries could not be handed back: the next process takes them when their lease ends")
        self._stopped = True
        self.wake()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # the thread

    def _work(self) -> None:
        self._load()
        self._loading = False
        while not (self._stopped and not self._waiting):
            try:
                if self._to_load and time.monotonic() >= self._load_again:
                    self._load()
                answered = self._answer_waiting()
                worked = self._work_off_queue()
                if not answered and not worked:
                    with self._changed:
                        self._changed.wait_for(lambda: bool(self._waiting) or self._stopped, POLL_SECONDS)
            except Exception:
                log.exception("the engine goes on after an error")
                time.sleep(POLL_SECONDS)
        self._store.hand_back(self._worker)

    def _load(self) -> None:
        """Loads the runs that are named at start, as many as memory holds; those that cannot be loaded stay to be loaded."""
        failed = []
        for name in self._to_load:
            before = self._catalog.num_loaded
            try:
                if self._catalog.is_loaded(name):
                    continue
                self._catalog.loaded(name)
                if self._catalog.num_loaded <= before:  # another had to go for it: memory holds no more
                    break
            except ServiceError as error:
                failed.append(name)
                log.error("run cannot be served: not ready until it can be", extra={"run": name, "error": error.message})
            except Exception:
                failed.append(name)
                log.exception("run cannot be loaded: not ready until it can be", extra={"run": name})
        self._to_load, self._load_again = failed, time.monotonic() + LOAD_AGAIN_SECONDS

    def _renew(self) -> None:
        while self._threads[0].is_alive():
            try:
                self._store.renew(self._worker)
            except Exception:
                log.exception("the queue could not be written")
            self._threads[0].join(LEASE_SECONDS / 4)

    # quick queries

    def _answer_waiting(self) -> bool:
        """Answers the next batch of quick queries; whether there was one."""
        batch = self._next_batch()
        if not batch:
            return False
        try:
            self._answer(batch)
        finally:
            for ticket in batch:  # nobody waits for an answer that does not come
                _settle(ticket.future, _failed())
        return True

    def _answer(self, batch: Sequence[Ticket]) -> None:
        start = time.monotonic()
        for ticket in batch:
            self._metrics.stage_seconds.labels("wait").observe(start - ticket.since)

        def check() -> None:
            if all(ticket.future.cancelled() for ticket in batch):
                raise Stopped

        outcomes = self._outcomes(batch[0].question.run, [(new_id(), ticket.body) for ticket in batch], ignore, check)
        try:
            self._store.keep([(*one, ticket.question) for ticket, one in zip(batch, outcomes, strict=True) if isinstance(one, tuple)])
        except sqlite3.Error:
            log.exception("answers are given but could not be kept")
        self._expected = len(batch) + len(self._waiting)
        for ticket, one in zip(batch, outcomes, strict=True):
            _settle(ticket.future, one)
            self._metrics.queries.labels("done" if isinstance(one, tuple) else one.code).inc()
        self._last_seconds = time.monotonic() - start

    def _next_batch(self) -> list[Ticket]:
        """The query that waits longest and others of its kind, after a short wait until as many are there as were under way before."""
        with self._changed:
            while self._waiting and len(self._waiting) < min(self._expected, self._limits.batch):
                before = len(self._waiting)
                self._changed.wait(self._limits.batch_seconds + min(MOST_PATIENCE_SECONDS, PATIENCE * self._last_seconds))
                if len(self._waiting) == before:
                    break
            wanted = [ticket for ticket in self._waiting if not ticket.future.cancelled()]
            batch = [ticket for ticket in wanted if ticket.question.kind == wanted[0].question.kind][: self._limits.batch]
            self._waiting = deque(ticket for ticket in wanted if ticket not in batch)
            return batch

    # accepted queries

    def _work_off_queue(self) -> bool:
        """Works on the next accepted queries of one kind; whether there were any."""
        if self._draining:
            return False
        queries = self._store.claim(self._worker, self._limits.job_batch, self._catalog.places())
        if not queries:
            return False
        try:
            self._work_on(queries)
        except Exception:
            self._store.try_again(self._worker)
            raise
        return True

    def _work_on(self, queries: Sequence[Query]) -> None:
        watch = _Watch(self, time.monotonic() + self._limits.job_seconds)
        asked = []
        for query in queries:
            try:
                body = QueryBody.model_validate(query.body)
                self._check_same_indexes(query, body)
                asked.append((query, body))
            except ServiceError as error:
                self._end(query, error, watch)
            except ValidationError as error:
                message = f"the query cannot be read ({error.error_count()} faults): another version of the service accepted it; ask again"
                self._end(query, ServiceError(422, "invalid", message), watch)
        if not asked:
            return
        outcomes = self._outcomes(queries[0].run, [(query.id, body) for query, body in asked], watch.progress, watch.check)
        for (query, _), outcome in zip(asked, outcomes, strict=True):
            stopped = isinstance(outcome, ServiceError) and outcome.code == "stopped"
            if not (stopped and self._draining):
                self._end(query, outcome, watch)
        if self._draining:
            self._store.hand_back(self._worker)

    def _check_same_indexes(self, query: Query, body: QueryBody) -> None:
        """Raises 409 when a run was made anew since the query was accepted: it was asked of another index."""
        if kind_of(query.run, self._catalog.indexes([query.run, *body.also]), body) != query.kind:
            raise ServiceError(
                409, "stale", f"the run {query.run}, or one of `also`, was made anew since the query was accepted: ask again"
            )

    def _end(self, query: Query, outcome: Outcome, watch: "_Watch") -> None:
        if isinstance(outcome, tuple):
            ended = self._store.finish(self._worker, *outcome)
        elif outcome.code == "stopped" and watch.timed_out:
            message = f"the query took longer than {self._limits.job_seconds:g} seconds and was stopped"
            ended = self._store.fail(self._worker, query.id, "timeout", message)
        else:
            ended = self._store.fail(self._worker, query.id, outcome.code, outcome.message)
        how = "done" if isinstance(outcome, tuple) else "failed"
        if ended:
            log.info("query ended", extra={"query": query.id, "outcome": how})
        self._metrics.queries.labels(how if ended else "cancelled").inc()

    # both

    def _outcomes(
        self, run: str, asked: Sequence[tuple[str, QueryBody]], progress: Callable[[int, int], None], check: Callable[[], None]
    ) -> list[Outcome]:
        """The answer to each query, under its id, or an error; all are of one kind."""
        start = time.monotonic()
        self._metrics.batch_size.observe(len(asked))
        try:
            check()
            results = self._answered(run, [body for _, body in asked], progress, check)
            found = [_text(name, result) for (name, _), result in zip(asked, results, strict=True)]
        except ServiceError as error:
            found = [error] * len(asked)
        except Stopped:
            found = [ServiceError(503, "stopped", "the query was stopped")] * len(asked)
        except Exception:
            if len(asked) > 1:  # the fault of one is not that of the others
                return [outcome for one in asked for outcome in self._outcomes(run, [one], progress, check)]
            log.exception("a query failed", extra={"run": run})
            found = [_failed()]
        self._metrics.stage_seconds.labels("whole").observe(time.monotonic() - start)
        return found

    def _answered(
        self, run: str, bodies: Sequence[QueryBody], progress: Callable[[int, int], None], check: Callable[[], None], again: bool = True
    ) -> list[dict[str, Any] | ServiceError]:
        start = time.monotonic()
        with self._catalog.using([run, *bodies[0].also]) as opened:
            self._metrics.stage_seconds.labels("load").observe(time.monotonic() - start)
            erased = [one.run.directory.living.erased for one in opened.values()]
            found = self._answered_by(opened, run, bodies, progress, check, again)
            if not again or erased == [one.run.directory.living.erased for one in opened.values()]:
                return found
        return self._answered(run, bodies, progress, check, again=False)  # no answer shows what was erased meanwhile

    def _answered_by(
        self,
        opened: Mapping[str, OpenedRun],
        run: str,
        bodies: Sequence[QueryBody],
        progress: Callable[[int, int], None],
        check: Callable[[], None],
        again: bool,
    ) -> list[dict[str, Any] | ServiceError]:
        names = {path: name for one in opened.values() for path, name in one.names.items()}
        outcomes: list[dict[str, Any] | ServiceError | None] = [None] * len(bodies)
        measurements = {}
        for place, body in enumerate(bodies):
            try:
                measurements[place] = measure(opened[run].run, body, self._limits)
            except RequestError as error:
                outcomes[place] = refused(error, names)
        try:
            runs = {name: one.run for name, one in opened.items()}
            results = answers(runs, list(measurements.values()), bodies[0], self._limits, progress, check) if measurements else []
        except RequestError as error:
            if again and not all(one.run.is_current for one in opened.values()):  # the run changed under the query: ask it as it is now
                return self._answered(run, bodies, progress, check, again=False)
            if len(measurements) > 1 and not isinstance(error, OptionsRefused):
                raise
            return [outcome or refused(error, names) for outcome in outcomes]
        for place, result in zip(measurements, results, strict=True):
            outcomes[place] = result
        for stage in results[0]["provenance"]["stages"] if results else ():
            self._metrics.stage_seconds.labels(stage).observe(sum(result["provenance"]["stages"][stage] for result in results))
        return [outcome for outcome in outcomes if outcome is not None]

    # what long work asks for

    def step_aside(self) -> None:
        """Answers one batch of the quick queries that came meanwhile; the work goes on before the next."""
        if not self._waiting:
            return
        self._beside_work = True
        try:
            self._answer_waiting()
        finally:
            self._beside_work = False

    def unwanted(self) -> bool:
        """Whether the accepted queries at work were all cancelled, or are to be handed back."""
        return self._draining or not self._store.held(self._worker)

    def report(self, done: int, total: int) -> None:
        self._store.report(self._worker, done, total)

    @property
    def beside_work(self) -> bool:
        return self._beside_work


class _Watch:
    """What happens between the parts of long work."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        self._engine, self._deadline = engine, deadline
        self._checked = self._reported = 0.0
        self.timed_out = False

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._reported >= POLL_SECONDS or done == total:
            self._reported = now
            self._engine.report(done, total)
        self._engine.step_aside()
        self._deadline += time.monotonic() - now
        self.check()

    def check(self) -> None:
        """Raises Stopped when nobody wants the result or it takes too long. Quick queries that are answered meanwhile are no part of the work."""
        now = time.monotonic()
        if self._engine.beside_work or now - self._checked < POLL_SECONDS:
            return
        self._checked = now
        self.timed_out = now > self._deadline
        if self.timed_out or self._engine.unwanted():
            raise Stopped


def _text(name: str, result: dict[str, Any] | ServiceError) -> Outcome:
    """The result object's JSON, with the id under which it is kept."""
    if isinstance(result, ServiceError):
        return result
    try:
        return name, json.dumps(result | {"id": name}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        log.exception("a result cannot be written as JSON", extra={"query": name})
        return _failed()


def _failed() -> ServiceError:
    return ServiceError(500, "failed", "the query failed; the log of the service says why")


def _settle(future: "Future[Answer]", outcome: Outcome) -> None:
    try:
        if isinstance(outcome, tuple):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass  # whoever asked gave up at this very moment
