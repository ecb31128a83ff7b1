"""Accepted queries and kept results in SQLite: the queue that outlives the process.

    queued → running → done | failed
       ↖________/  ↘ cancelled          (a query that was handed back, or whose worker died, is queued again)

A worker holds the queries it works on by a lease that it renews; a worker that was killed stops renewing, and the next one takes over. Only the
holder can finish a query, so each ends once, whatever happens. Several processes of one machine may share the file, replicas or services of other
runs; each takes only the queries of runs that it serves, which are told by their places: two may have the same name.
"""

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence.errors import RequestError
from influence.service.errors import ServiceError, busy
from influence.service.settings import Limits

VERSION = 3
LEASE_SECONDS = 10.0
MOST_ATTEMPTS = 3
"""How many workers may die or fail over a query before it is taken for the cause."""
KEPT_SECONDS = 86_400.0
"""How long the result of an accepted query is kept at least, however many others its user asks."""

ABANDONED_SECONDS = 7 * KEPT_SECONDS
"""After which a query that waits for a run that nobody serves any more is given up."""

FINISHED = ("done", "failed", "cancelled")

_SCHEMA = """
CREATE TABLE queries (
    id TEXT PRIMARY KEY,
    user TEXT NOT NULL,
    run TEXT NOT NULL,
    places TEXT NOT NULL DEFAULT '[]',  -- JSON: where the run is, and those that its scores are averaged with
    question TEXT NOT NULL,             -- digest of the body and of the state of the index it is asked of
    kind TEXT NOT NULL,                 -- queries of one kind can be answered together
    body TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    created REAL NOT NULL,
    finished REAL,
    progress_done INTEGER NOT NULL DEFAULT 0,
    progress_total INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    lease REAL,                         -- until when the worker holds it
    result TEXT,
    code TEXT,
    message TEXT
) STRICT;
CREATE INDEX by_state ON queries (state, created);
CREATE INDEX by_question ON queries (user, question);
CREATE INDEX by_finished ON queries (user, finished, id);
CREATE TABLE erasures (run TEXT PRIMARY KEY, num_erased INTEGER NOT NULL) STRICT;  -- for how many results were looked through
"""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query as it is kept."""

    id: str
    user: str
    run: str
    places: tuple[str, ...]
    question: str
    kind: str
    body: dict[str, Any]
    state: str
    created: float
    finished: float | None
    done: int
    total: int
    result: str | None  # JSON
    code: str | None
    message: str | None

    def to_json(self, with_result: bool = True) -> dict[str, Any]:
        return {
            "id": self.id,
            "run": self.run,
            "state": self.state,
            "created": self.created,
            "finished": self.finished,
            "progress": {"done": self.done, "total": self.total},
            "request": self.body,
            "result": json.loads(self.result) if with_result and self.result is not None else None,
            "error": None if self.code is None else {"code": self.code, "message": self.message},
        }


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be kept of a query when it is accepted or answered."""

    user: str
    run: str
    places: tuple[str, ...]  # where the run is, and those that its scores are averaged with
    question: str
    kind: str
    body: Mapping[str, Any]


class QueryStore:
    """The queries of a service. Every method is one transaction; safe to call from several threads and processes."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        path = directory / "queries.sqlite3"
        try:  # queries and training text are nobody else's business; a directory that was there keeps its permissions
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as error:
            raise RequestError(f"{path} cannot be made ({error.strerror}): take another --state-dir") from None
        self._limits = limits
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction() as connection:
                found = connection.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    for statement in _SCHEMA.split(";\n"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                elif found == 2:
                    connection.execute("ALTER TABLE queries ADD COLUMN places TEXT NOT NULL DEFAULT '[]'")
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                elif found != VERSION:
                    raise RequestError(f"{path} was made by another version ({found}; this one reads {VERSION}): take another --state-dir")
        except sqlite3.DatabaseError as error:
            raise RequestError(f"{path} cannot be used as the queue ({error}): move it away or take another --state-dir") from None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    # for those who ask

    def accept(self, question: Question) -> Query:
        """Queues a query; when the same user's same question waits already, that one is returned. Raises 429 or 503 when too many wait."""
        with self._transaction() as connection:
            there = connection.execute(
                f"SELECT {_COLUMNS} FROM queries WHERE user = ? AND question = ? AND state IN ('queued', 'running')",
                (question.user, question.question),
            ).fetchone()
            if there:
                return _query(there)
            limits, unfinished = self._limits, "SELECT count(*) FROM queries WHERE state IN ('queued', 'running')"
            if connection.execute(f"{unfinished} AND user = ?", (question.user,)).fetchone()[0] >= limits.queued_per_user:
                raise ServiceError(429, "too_many", f"{limits.queued_per_user} of your queries are not finished", retry_seconds=30)
            if connection.execute(unfinished).fetchone()[0] >= limits.queued:
                raise busy(f"{limits.queued} accepted queries are not finished", 60)
            return _insert(connection, question, new_id(), "queued", None)

    def get(self, name: str) -> Query | None:
        rows = self._rows(f"SELECT {_COLUMNS} FROM queries WHERE id = ?", name)
        return _query(rows[0]) if rows else None

    def latest(self, user: str, limit: int) -> list[Query]:
        """The last queries of this user, the latest first, without their results."""
        columns = _COLUMNS.replace("result", "NULL")
        return [
            _query(row) for row in self._rows(f"SELECT {columns} FROM queries WHERE user = ? ORDER BY created DESC LIMIT ?", user, limit)
        ]

    def answered(self, user: str, question: str) -> Query | None:
        """The result that is kept for this user's same question, if there is one."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM queries WHERE user = ? AND question = ? AND state = 'done' LIMIT 1", user, question)
        return _query(rows[0]) if rows else None

    def keep(self, answers: Sequence[tuple[str, str, Question]]) -> None:
        """Keeps results (id, JSON, question) of queries that were answered at once."""
        with self._transaction() as connection:
            for name, result, question in answers:
                _insert(connection, question, name, "done", result)
            for user in {question.user for _, _, question in answers}:
                self._forget_oldest(connection, user)

    def cancel(self, name: str) -> bool:
        """Whether the query was unfinished, which it is no more."""
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE queries SET state = 'cancelled', finished = ?, worker = NULL WHERE id = ? AND state IN ('queued', 'running')",
                (time.time(), name),
            )
            return changed.rowcount == 1

    def forget(self, name: str) -> None:
        """Removes a query and its result."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM queries WHERE id = ?", (name,))

    def forget_erased(self, run: str, num_erased: int, ids: Callable[[], Collection[str]]) -> None:
        """Removes the results of the run that show one of the sequences `ids()`, the `num_erased` ones that are erased from its files; looks
        only when there are more of them than the last time."""
        seen = self._rows("SELECT num_erased FROM erasures WHERE run = ?", run)
        if num_erased == (seen[0][0] if seen else 0):
            return
        erased = set(ids())
        results = self._rows("SELECT id, result FROM queries WHERE run = ? AND state = 'done'", run)
        names = [(name,) for name, result in results if not erased.isdisjoint(shown_sequences(json.loads(result)))]
        with self._transaction() as connection:
            connection.executemany("DELETE FROM queries WHERE id = ?", names)
            connection.execute("INSERT OR REPLACE INTO erasures VALUES (?, ?)", (run, num_erased))

    def num_unfinished(self) -> int:
        """Accepted queries that are not finished."""
        return int(self._rows("SELECT count(*) FROM queries WHERE state IN ('queued', 'running')")[0][0])

    # for workers

    def claim(self, worker: str, most: int, runs: Mapping[str, str]) -> list[Query]:
        """The oldest query that waits, or whose worker died, and others of its kind, at most so many; they are this worker's now. Only those that
        need no other than these runs, name by place. One that was tried before comes alone, so that it takes no other with it if it ends its
        worker again."""
        now, served = time.time(), (json.dumps(list(runs)), json.dumps(list(runs)), json.dumps(list(runs.values())))
        waiting = (
            "(state = 'queued' OR (state = 'running' AND lease < ?)) AND run IN (SELECT value FROM json_each(?)) "
            "AND NOT EXISTS (SELECT 1 FROM json_each(body, '$.also') WHERE value NOT IN (SELECT value FROM json_each(?))) "
            "AND NOT EXISTS (SELECT 1 FROM json_each(places) WHERE value NOT IN (SELECT value FROM json_each(?)))"
        )
        with self._transaction() as connection:
            connection.execute(
                "UPDATE queries SET state = 'failed', code = 'failed', message = ?, finished = ?, worker = NULL "
                "WHERE (state = 'queued' OR (state = 'running' AND lease < ?)) AND attempts >= ?",
                (f"the service ended or failed {MOST_ATTEMPTS} times while it worked on this query", now, now, MOST_ATTEMPTS),
            )
            connection.execute(
                f"UPDATE queries SET state = 'failed', code = 'failed', message = ?, finished = ? WHERE state = 'queued' AND created < ? "
                f"AND NOT ({waiting})",
                (f"nobody has served the run for {ABANDONED_SECONDS / 86_400:g} days", now, now - ABANDONED_SECONDS, now, *served),
            )
            first = connection.execute(
                f"SELECT id, run, places, kind, attempts FROM queries WHERE {waiting} ORDER BY created LIMIT 1", (now, *served)
            ).fetchone()
            if first is None:
                return []
            name, run, places, kind, attempts = first
            names = [(name,)]
            if attempts == 0:
                names = connection.execute(
                    f"SELECT id FROM queries WHERE {waiting} AND run = ? AND places = ? AND kind = ? AND attempts = 0 ORDER BY created LIMIT ?",
                    (now, *served, run, places, kind, most),
                ).fetchall()
            connection.executemany(
                "UPDATE queries SET state = 'running', worker = ?, lease = ?, attempts = attempts + 1 WHERE id = ?",
                [(worker, now + LEASE_SECONDS, name) for (name,) in names],
            )
            rows = [connection.execute(f"SELECT {_COLUMNS} FROM queries WHERE id = ?", name).fetchone() for name in names]
        return [_query(row) for row in rows]

    def renew(self, worker: str) -> None:
        """Holds what this worker has for another while."""
        with self._transaction() as connection:
            connection.execute("UPDATE queries SET lease = ? WHERE worker = ? AND state = 'running'", (time.time() + LEASE_SECONDS, worker))

    def held(self, worker: str) -> set[str]:
        """Ids of what this worker still has to finish; a cancelled query is not among them."""
        return {name for (name,) in self._rows("SELECT id FROM queries WHERE worker = ? AND state = 'running'", worker)}

    def report(self, worker: str, done: int, total: int) -> None:
        """Writes down how far the worker's queries are."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE queries SET progress_done = ?, progress_total = ? WHERE worker = ? AND state = 'running'", (done, total, worker)
            )

    def finish(self, worker: str, name: str, result: str) -> bool:
        """Gives a query its result, if the worker still holds it."""
        return self._end(worker, name, "done", result, None, None)

    def fail(self, worker: str, name: str, code: str, message: str) -> bool:
        return self._end(worker, name, "failed", None, code, message)

    def _end(self, worker: str, name: str, state: str, result: str | None, code: str | None, message: str | None) -> bool:
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE queries SET state = ?, result = ?, code = ?, message = ?, finished = ?, worker = NULL "
                "WHERE id = ? AND worker = ? AND state = 'running'",
                (state, result, code, message, time.time(), name, worker),
            )
            if changed.rowcount:
                self._forget_oldest(connection, connection.execute("SELECT user FROM queries WHERE id = ?", (name,)).fetchone()[0])
            return changed.rowcount == 1

    def hand_back(self, worker: str) -> None:
        """Queues again what this worker holds, as if it had never been taken."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE queries SET state = 'queued', worker = NULL, attempts = attempts - 1 WHERE worker = ? AND state = 'running'",
                (worker,),
            )

    def try_again(self, worker: str) -> None:
        """Queues again what this worker holds and failed over, which was an attempt."""
        with self._transaction() as connection:
            connection.execute("UPDATE queries SET state = 'queued', worker = NULL WHERE worker = ? AND state = 'running'", (worker,))

    def _forget_oldest(self, connection: sqlite3.Connection, user: str) -> None:
        """Forgets what this user has more than may be kept; of accepted queries, which were attempted, only those of some age."""
        connection.execute(
            "DELETE FROM queries WHERE (attempts = 0 OR finished < ?) AND id IN "
            "(SELECT id FROM queries WHERE user = ? AND finished IS NOT NULL ORDER BY finished DESC LIMIT -1 OFFSET ?)",
            (time.time() - KEPT_SECONDS, user, self._limits.kept),
        )


_COLUMNS = "id, user, run, places, question, kind, body, state, created, finished, progress_done, progress_total, result, code, message"


def shown_sequences(result: Mapping[str, Any]) -> Iterator[str]:
    """The ids of all training sequences whose text or score a result object holds."""
    for shown in [*result["results"], *result.get("opponents", []), *result.get("bm25", {}).get("results", [])]:
        yield shown["id"]
        yield from (other["id"] for other in shown.get("duplicates", []))


def new_id() -> str:
    """128 random bits: an id that cannot be guessed."""
    return uuid.uuid4().hex


def _insert(connection: sqlite3.Connection, question: Question, name: str, state: str, result: str | None) -> Query:
    now = time.time()
    connection.execute(
        "INSERT INTO queries (id, user, run, places, question, kind, body, state, created, finished, result) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name,
            question.user,
            question.run,
            json.dumps(question.places),
            question.question,
            question.kind,
            json.dumps(question.body, ensure_ascii=True),
            state,
            now,
            now if state in FINISHED else None,
            result,
        ),
    )
    return _query(connection.execute(f"SELECT {_COLUMNS} FROM queries WHERE id = ?", (name,)).fetchone())


def _query(row: Sequence[Any]) -> Query:
    name, user, run, places, question, kind, body, state, created, finished, done, total, result, code, message = row
    return Query(
        id=name,
        user=user,
        run=run,
        places=tuple(json.loads(places)),
        question=question,
        kind=kind,
        body=json.loads(body),
        state=state,
        created=created,
        finished=finished,
        done=done,
        total=total,
        result=result,
        code=code,
        message=message,
    )
