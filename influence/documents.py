"""Reading documents: rows of jsonl, csv, parquet, arrow and text files, or of a hub data set, one at a time.

Knows columns and files; knows nothing of tokens.
"""

import csv
import glob
import gzip
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from influence.config import DataConfig
from influence.errors import RequestError
from influence.run_directory import file_digest

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One row: its id, what is to be tokenized (a text, a prompt and completion, or token ids) and its metadata."""

    id: str
    text: str | None
    prompt: str | None
    completion: str | None
    input_ids: list[int] | None
    metadata: Row


def read_documents(config: DataConfig, first_number: int = 0) -> Iterator[Document]:
    """The documents in the order of the files; those without an id are called by their number, from `first_number` on.

    Raises RequestError for a missing file or column, or a value of the wrong type, naming the row.
    """
    number = first_number
    for source, rows in _sources(config):
        for row in rows:
            yield _document(row, number, source, config)
            number += 1


def count_documents(config: DataConfig) -> int:
    """How many documents the files hold. Rows are not read: of files that have a row a line, the lines are counted.

    Empty lines, and csv cells of several lines, make that too many. Raises RequestError for files that are missing and for a hub data set,
    which is not fetched to be counted.
    """
    if _is_hub_name(config):
        raise RequestError(f"{config.files[0]!r} is no local file, whose rows can be counted")
    return sum(_count_rows(path, config) for path in _paths(config))


def _count_rows(path: Path, config: DataConfig) -> int:
    kind = _reader(path)
    try:
        if kind is _parquet:
            return int(pa.parquet.read_metadata(path).num_rows)
        if kind is _arrow or (kind is _text and config.sample_by != "line"):
            return sum(1 for _ in kind(path, config))
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            lines, last = 0, b"\n"
            while block := stream.read(2**20):
                lines, last = lines + block.count(b"\n"), block[-1:]
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    return lines + (last != b"\n") - (kind is _csv)


def data_fingerprint(config: DataConfig) -> str:
    """sha256 over the files' names and bytes in their order, or over a hub data set's name, split and own fingerprint."""
    total = hashlib.sha256()
    if _is_hub_name(config):
        total.update(json.dumps([config.files, config.split, str(_hub_dataset(config)._fingerprint)]).encode())
    else:
        for path in _paths(config):
            total.update(json.dumps([path.name, file_digest(path)]).encode())
    return "sha256:" + total.hexdigest()


def _document(row: Row, number: int, source: str, config: DataConfig) -> Document:
    place = f"{source}, row {number}"

    def text_of(column: str) -> str:
        if column not in row:
            raise RequestError(f"{place}: no column {column!r}; there are: {', '.join(sorted(map(str, row)))}")
        if not isinstance(row[column], str):
            raise RequestError(f"{place}: column {column!r} holds {type(row[column]).__name__}, expected text")
        return _encodable(row[column], column, place)

    missing = [column for column in config.metadata if column not in row]
    if missing:
        raise RequestError(f"{place}: no column {missing[0]!r} for metadata; there are: {', '.join(sorted(map(str, row)))}")
    identifier = _encodable(str(row[config.id]), config.id, place) if row.get(config.id) is not None else str(number)
    metadata = {column: _plain(row[column], column, place) for column in config.metadata}
    text = prompt = completion = ids = None
    if config.input_ids is not None:
        if config.input_ids not in row:
            raise RequestError(f"{place}: no column {config.input_ids!r}; there are: {', '.join(sorted(map(str, row)))}")
        ids = _token_ids(row[config.input_ids], config.input_ids, place)
    elif config.prompt is not None and config.completion is not None:
        prompt, completion = text_of(config.prompt), text_of(config.completion)
    else:
        text = text_of(config.text)
    return Document(id=identifier, text=text, prompt=prompt, completion=completion, input_ids=ids, metadata=metadata)


def _token_ids(value: Any, column: str, place: str) -> list[int]:
    if isinstance(value, str):  # csv has no lists
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        raise RequestError(f"{place}: column {column!r} must hold a list of token ids")
    return value


def _encodable(text: str, column: str, place: str) -> str:
    """JSON can spell half a character (such as "\\ud83d" alone), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{place}: column {column!r} holds half a character ({text[error.start]!r}, a lone surrogate) at {error.start}: repair the text"
        ) from None
    return text


def _plain(value: Any, column: str, place: str) -> Any:
    """A JSON value: dates and the like become text, and NaN, which JSON does not have and tables write for "missing", null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _encodable(str(value), column, place)


def _sources(config: DataConfig) -> Iterator[tuple[str, Iterator[Row]]]:
    if _is_hub_name(config):
        yield config.files[0], iter(_hub_dataset(config))
        return
    for path in _paths(config):
        yield str(path), _reader(path)(path, config)


def _is_hub_name(config: DataConfig) -> bool:
    """A single name without a suffix, a glob or a file behind it, such as `wikitext` or `someone/corpus`."""
    name = config.files[0]
    return len(config.files) == 1 and not Path(name).is_absolute() and not Path(name).suffix and not glob.has_magic(name)


def _hub_dataset(config: DataConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.files[0], split=config.split)
    except Exception as error:  # every failure of the hub client, of which there are many kinds, means the same to the user
        raise RequestError(
            f"{config.files[0]!r} is neither a file nor a hub data set with split {config.split!r} that can be reached: {error}"
        ) from None


def _paths(config: DataConfig) -> list[Path]:
    found: list[Path] = []
    for name in config.files:
        matches = sorted(Path(match) for match in glob.glob(name, recursive=True)) if glob.has_magic(name) else [Path(name)]  # noqa: PTH207 (absolute patterns)
        found += [inner for path in matches for inner in (_inside(path) if path.is_dir() else [path])]
        if not matches:
            raise RequestError(f"no file matches {name}")
    for path in found:
        if not path.is_file():
            raise RequestError(f"no data file at {path}")
        _reader(path)
    return found


def _inside(directory: Path) -> list[Path]:
    """The files of a directory that `Dataset.save_to_disk` wrote: those its state.json lists, for caches of later work lie beside them."""
    try:
        listed = json.loads((directory / "state.json").read_text(encoding="utf-8"))["_data_files"]
        files = [directory / file["filename"] for file in listed]
    except (OSError, ValueError, KeyError, TypeError):
        files = sorted(directory.glob("*.arrow"))
    if not files:
        raise RequestError(f"{directory} is a directory without .arrow files; name files or a glob such as {directory}/*.jsonl")
    return files


def _reader(path: Path) -> Callable[[Path, DataConfig], Iterator[Row]]:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _READERS:
        raise RequestError(f"{path}: files of type {suffix or '(none)'} are not read; known are {', '.join(_READERS)}, gzipped or not")
    return _READERS[suffix]


# What reading a file can meet that is not UTF-8, not gzip, cut short or damaged.
_UNREADABLE = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _jsonl(path: Path, _: DataConfig) -> Iterator[Row]:
    with _open_text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RequestError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
                yield row
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from None
        except _UNREADABLE as error:
            raise RequestError(f"{path} cannot be read as text: {error}") from None


def _csv(path: Path, _: DataConfig) -> Iterator[Row]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's own limit of 128 KiB is shorter than many documents
    with _open_text(path) as stream:
        try:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise RequestError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns")
                yield dict(row)
        except (csv.Error, *_UNREADABLE) as error:
            raise RequestError(f"{path} is not valid csv: {error}") from None


def _text(path: Path, config: DataConfig) -> Iterator[Row]:
    with _open_text(path) as stream:
        try:
            if config.sample_by == "line":
                pieces: Iterator[str] = (line.rstrip("\r\n") for line in stream)
            elif config.sample_by == "paragraph":
                pieces = iter(stream.read().replace("\r\n", "\n").split("\n\n"))
            else:
                pieces = iter([stream.read()])
            yield from ({config.text: piece} for piece in pieces if piece.strip())
        except _UNREADABLE as error:
            raise RequestError(f"{path} cannot be read as text: {error}") from None


def _parquet(path: Path, _: DataConfig) -> Iterator[Row]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path} is not a whole parquet file: {error}") from None


def _arrow(path: Path, _: DataConfig) -> Iterator[Row]:
    with pa.memory_map(str(path)) as source:
        try:
            try:
                stream = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                stream = (file.get_batch(number) for number in range(file.num_record_batches))
            for batch in stream:
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{path} is not a whole arrow file: {error}") from None


_READERS: dict[str, Callable[[Path, DataConfig], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
    ".text": _text,
    ".md": _text,
}
