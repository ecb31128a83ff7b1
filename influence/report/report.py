"""A report: one thing told as a page for people, as JSON for programs, and as tables for both.

Knows what it holds and how files appear whole; what the numbers mean is others' knowledge.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from influence.errors import RequestError
from influence.report.tables import Rows, Tables
from influence.run_directory import write_file

CSV, PARQUET = ".csv", ".parquet"

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Text that begins so is run by spreadsheets; in CSV it has an apostrophe before it."""

SHOWN_ROWS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What is to be told: `content` as plain JSON, `page` as HTML and `table_rows` as tables, the most important one first."""

    title: str
    content: Mapping[str, Any]
    page: Callable[[], str]
    table_rows: Callable[[], Tables]

    @cached_property
    def tables(self) -> Tables:
        """Rows by table; tables that would be empty are left out."""
        return {name: rows for name, rows in self.table_rows().items() if rows}

    def to_json(self) -> dict[str, Any]:
        return dict(self.content)

    def to_html(self, path: Path | str | None = None) -> str:
        """The page, one self-contained HTML document; also written to `path`, whole or not at all."""
        page = self.page()
        if path is not None:
            write_file(Path(path), page.encode())
        return page

    def to_pandas(self, table: str | None = None) -> Any:
        """One of the `tables`, the first when none is named. Raises ValueError for a name that is none of theirs."""
        import pandas as pd

        return pd.DataFrame(self._rows(table))

    def _rows(self, table: str | None) -> Rows:
        if table is None:
            return next(iter(self.tables.values()), [])
        if table not in self.tables:
            raise ValueError(f"there is no table {table!r} in this report; it has {', '.join(self.tables) or 'none'}")
        return self.tables[table]

    def write_tables(self, directory: Path | str, kind: str) -> list[Path]:
        """Every table as a file `<table>.csv` or `<table>.parquet` in the directory, which is made if missing; `kind` is the ending.

        In CSV, text that a spreadsheet would take for a formula has an apostrophe before it.
        """
        place = Path(directory)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{place} cannot be made: {error.strerror or error}") from None
        written = []
        for name, rows in self.tables.items():
            path = place / f"{name}{kind}"
            write_file(path, table_bytes(rows, kind))
            written.append(path)
        return written

    def _repr_html_(self) -> str:
        """For notebooks: the title, which tables there are, and the beginning of the first."""
        import html

        frame = self.to_pandas()
        more = f"<p>… {len(frame):,} rows</p>" if len(frame) > SHOWN_ROWS else ""
        about = f"<p><b>{html.escape(self.title)}</b>: {html.escape(', '.join(self.tables))}; .to_html(path) writes the page</p>"
        return about + str(frame.head(SHOWN_ROWS).to_html(index=False, escape=True)) + more


def table_bytes(rows: Rows, kind: str) -> bytes:
    """The rows as CSV or Parquet; a column holds null where a row has none of it, and values of mixed types are JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column([row.get(name) for row in rows], formulas=kind == CSV) for name in names})
    stream = io.BytesIO()
    if kind == CSV:
        pyarrow.csv.write_csv(table, stream)
    else:
        pyarrow.parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _column(values: list[Any], formulas: bool) -> pa.Array:
    plain = [value if value is None or isinstance(value, str | bool | int | float) else _as_json(value) for value in values]
    types = {str if isinstance(value, str) else bool if isinstance(value, bool) else float for value in plain if value is not None}
    if len(types) > 1:
        plain = [value if value is None or isinstance(value, str) else _as_json(value) for value in plain]
    elif any(isinstance(value, float) for value in plain):
        plain = [None if value is None else float(value) for value in plain]
    if str in types:
        plain = [_safe(value, formulas) if isinstance(value, str) else None for value in plain]
    return pa.array(plain)


def _safe(text: str, formulas: bool) -> str:
    whole = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no UTF-8
    return f"'{whole}" if formulas and whole.startswith(FORMULA) else whole


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
