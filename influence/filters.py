"""Metadata filters: which training sequences fulfil a condition such as `source = 'web' and year < 2023`.

The condition is an expression of SQL that SQLite evaluates over a table in memory with a column for each metadata key. Whoever writes it may
be a stranger: it can read that table and call the functions below, no more, and what it costs is bounded. Knows metadata, not sequences.
"""

import difflib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import closing
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.errors import RequestError

# fmt: off
FUNCTIONS = frozenset([
    "->", "->>", "abs", "coalesce", "date", "datetime", "glob", "ifnull", "iif", "instr", "json_array_length", "json_extract", "json_type",
    "json_valid", "julianday", "length", "like", "lower", "max", "min", "nullif", "round", "sign", "strftime", "substr",
    "substring", "time", "typeof", "unicode", "upper",
])
# fmt: on
"""What a condition may call. Nothing here makes much text of little (as replace, hex and printf do) or tells of the machine."""

# SQLite cannot be stopped within one call of a function, so none may be slow: `like` costs the pattern's length times the text's.
LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 250,
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
INSTRUCTIONS_BETWEEN_CHECKS = 100
SEQUENCES_AT_ONCE = 10_000

NUMBER = "\x01number"
"""The column of the sequence's number, which conditions cannot read. The control character keeps it apart from metadata columns called `number`."""

_TOKEN = re.compile(r"""'[^']*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|\w[\w$]*|-(?!-)|/(?!\*)|[ \t\r\n()+*%&|~<>=!.,]""")


def matching(metadata: Iterable[Mapping[str, Any]], where: str, timeout_seconds: float = 10.0) -> NDArray[np.bool_]:
    """[N]: whether each sequence's metadata fulfil the condition, which neither false nor null does.

    A key that a sequence lacks is null, true and false are 1 and 0, lists and objects are JSON text, NaN is null. Names are compared without
    regard to case. A text that is a number, as all numbers of a CSV file are, is compared as one: '007' equals 7. Raises RequestError for a
    condition that cannot be read, that reads anything but metadata, or that takes longer than `timeout_seconds`; making the table comes before
    that (some 3 seconds for a million sequences).
    """
    expression = _without_double_quotes(where)
    with closing(sqlite3.connect(":memory:")) as connection:
        columns, num_sequences = _fill(connection, metadata)
        if not columns:
            raise RequestError("where: the sequences have no metadata to choose by; data.metadata names the columns that a run keeps")
        for limit, value in LIMITS.items():
            connection.setlimit(limit, value)
        deadline = time.monotonic() + timeout_seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS_BETWEEN_CHECKS)
        try:
            # What can stand both with and without parentheses is one expression: `1) or (1` and `1 limit 1` cannot.
            connection.set_authorizer(_authorizer(columns.keys()))
            connection.execute(f"EXPLAIN SELECT 1 FROM metadata WHERE {expression}").close()
            connection.set_authorizer(_authorizer({*columns, NUMBER}))
            found = connection.execute(f"SELECT {_quoted(NUMBER)} FROM metadata WHERE ({expression})")
            numbers = np.fromiter((number for (number,) in found), dtype=np.int64)
        except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError) as error:
            raise RequestError(f"where: {_explained(error, where, columns, timeout_seconds)}") from None
    result = np.zeros(num_sequences, dtype=np.bool_)
    result[numbers] = True
    return result


def _without_double_quotes(where: str) -> str:
    """The condition with `"name"` written as `` `name` ``: SQLite takes an unknown name for a text in the former, never in the latter.

    Raises RequestError where something other than an expression's words, quotes and operators stands.
    """
    if not where.strip():
        raise RequestError("where: the condition is empty; write one such as source = 'web' and year < 2023")
    longest = LIMITS[sqlite3.SQLITE_LIMIT_SQL_LENGTH]
    if len(where) > longest:
        raise RequestError(f"where: the condition has {len(where):,} characters; the longest that is read has {longest:,}")
    refused = _TOKEN.sub("", where)
    if refused:
        raise RequestError(
            f"where: {refused[0]!r} has no place in a condition: it is one SQL expression without ;, comments and parameters, its quotes closed"
        )
    return _TOKEN.sub(lambda token: _quoted(token[0][1:-1].replace('""', '"')) if token[0][0] == '"' else token[0], where)


def _fill(connection: sqlite3.Connection, metadata: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], int]:
    """Makes the table. Returns its columns (name in the table: name in the metadata) and the number of sequences.

    Columns are numeric, which makes numbers of the texts that are numbers, as all are in csv, and leaves others. Their names are lower-case, so
    that SQLite's ROWID is never one of them.
    """
    connection.execute(f"CREATE TABLE metadata ({_quoted(NUMBER)} INTEGER PRIMARY KEY)")
    columns: dict[str, str] = {}
    num_sequences, rows = 0, iter(metadata)
    while batch := list(islice(rows, SEQUENCES_AT_ONCE)):
        try:
            for key in dict.fromkeys(chain.from_iterable(batch)):
                _add_column(connection, columns, key)
            into = ", ".join(map(_quoted, [NUMBER, *columns]))
            values = ([number, *[_value(row.get(key)) for key in columns.values()]] for number, row in enumerate(batch, num_sequences))
            connection.executemany(f"INSERT INTO metadata ({into}) VALUES ({', '.join('?' * (len(columns) + 1))})", values)
        except (sqlite3.Error, UnicodeEncodeError) as error:
            raise RequestError(f"where: the metadata cannot be searched: {_one_line(error)}") from None
        num_sequences += len(batch)
    return columns, num_sequences


def _add_column(connection: sqlite3.Connection, columns: dict[str, str], key: str) -> None:
    name = _folded(key)
    if name not in columns:
        connection.execute(f"ALTER TABLE metadata ADD COLUMN {_quoted(name)} NUMERIC")
    elif columns[name] != key:
        raise RequestError(f"where: the metadata columns {columns[name]!r} and {key!r} differ only in case, which SQL does not tell apart")
    columns[name] = key


def _folded(name: str) -> str:
    """The name in the case that SQLite compares in: of ASCII only."""
    return name.encode().lower().decode()


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _value(value: Any) -> str | int | float | None:
    if value is None or isinstance(value, str | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else float(str(value))  # as SQLite reads such a number in a condition
    return json.dumps(value, ensure_ascii=False)


def _authorizer(readable: Set[str]) -> Callable[[int, str | None, str | None, str | None, str | None], int]:
    """For one statement: it may be one SELECT, read these columns and call FUNCTIONS."""
    num_selects = 0

    def authorize(action: int, first: str | None, second: str | None, _database: str | None, _source: str | None) -> int:
        nonlocal num_selects
        if action == sqlite3.SQLITE_SELECT:
            num_selects += 1
            allowed = num_selects == 1
        elif action == sqlite3.SQLITE_READ:
            allowed = first == "metadata" and (second in readable or second == "")  # "" when a condition reads no column
        else:
            allowed = action == sqlite3.SQLITE_FUNCTION and second in FUNCTIONS
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return authorize


def _explained(error: Exception, where: str, columns: Mapping[str, str], timeout_seconds: float) -> str:
    """What SQLite said, and what to do."""
    said = _one_line(error).replace(NUMBER, "number")
    names = f"the metadata columns are {', '.join(map(repr, columns.values()))}"
    if said == "interrupted":
        return f"the condition took longer than {timeout_seconds:g} seconds and was stopped (sqlite: {said})"
    if unknown := re.match("no such column: (.*)", said):
        nearest = difflib.get_close_matches(_folded(unknown[1]), columns, n=1, cutoff=0.5)
        meant = f"; did you mean {columns[nearest[0]]!r}?" if nearest else ""
        text = "; text goes in single quotes" if f'"{unknown[1]}"' in where else ""
        return f"sqlite: {said}{meant}{text}; {names}"
    if "function" in said:
        return f"sqlite: {said}; a condition may call {', '.join(sorted(FUNCTIONS))}"
    if "not authorized" in said or "prohibited" in said:
        return f"sqlite: {said}; a condition has no SELECT in it and reads nothing but metadata; {names}"
    if "syntax error" in said or "incomplete" in said:
        return (
            f"sqlite: {said}; expected one SQL expression, text in single quotes, names that are no plain words in double quotes; {names}"
        )
    return f"sqlite: {said}"


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 200 else said[:199] + "…"
