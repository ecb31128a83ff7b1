"""Reading documents: rows of jsonl, csv, parquet, arrow and text files, or of a hub data set, one at a time.

Knows columns and files; knows nothing of tokens.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from influence.config import DataConfig
from influence.errors import RequestError
from influence.run_directory import file_digest

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One row: its id, what is to be tokenized (a text, a prompt and completion, or a conversation) or is tokenized already, its weight and its
    metadata."""

    id: str
    place: str  # file and row, for whoever must be told
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Row] | None = None
    tools: list[Row] | None = None
    row: "TokenizedRow | None" = None
    weight: float = 1.0
    metadata: Row


@dataclass(frozen=True, kw_only=True)
class TokenizedRow:
    """Token ids without padding, which of them count (None: all that can), and where the documents in them begin (None: one document)."""

    input_ids: list[int]
    counted: list[bool] | None
    documents: list[tuple[int, str]] | None  # (number of its first token, id)


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
        with _open_bytes(path) as stream:
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
        total.update(json.dumps([config.files, config.split, _hub_fingerprint(config)]).encode())
    else:
        for path in _paths(config):
            total.update(json.dumps([path.name, file_digest(path)]).encode())
    return "sha256:" + total.hexdigest()


def _document(row: Row, number: int, source: str, config: DataConfig) -> Document:
    place = f"{source}, row {number}"

    def value_of(column: str, purpose: str = "") -> Any:
        if column not in row:
            raise RequestError(f"{place}: no column {column!r}{purpose}; there are: {', '.join(sorted(map(str, row)))}")
        return row[column]

    def text_of(column: str) -> str:
        value = value_of(column)
        if not isinstance(value, str):
            raise RequestError(f"{place}: column {column!r} holds {type(value).__name__}, expected text")
        return _encodable(value, column, place)

    identifier = _encodable(str(row[config.id]), config.id, place) if row.get(config.id) is not None else str(number)
    metadata = {column: _plain(value_of(column, " for metadata"), column, place) for column in config.metadata}
    weight = 1.0 if config.weight is None else _weight(value_of(config.weight), config.weight, place)
    content: dict[str, Any]
    if config.input_ids is not None:
        content = {"row": _tokenized_row(value_of, identifier, config, place)}
    elif config.messages is not None:
        content = {"messages": _objects(value_of(config.messages), config.messages, place)}
        if config.tools is not None and value_of(config.tools) not in (None, "", "[]", "null", []):
            content["tools"] = _objects(value_of(config.tools), config.tools, place)
    elif config.prompt is not None and config.completion is not None:
        content = {"prompt": text_of(config.prompt), "completion": text_of(config.completion)}
    else:
        content = {"text": text_of(config.text)}
    return Document(id=identifier, place=place, weight=weight, metadata=metadata, **content)


def _tokenized_row(value_of: Callable[[str], Any], identifier: str, config: DataConfig, place: str) -> TokenizedRow:
    assert config.input_ids is not None
    ids: list[int] = _list(value_of(config.input_ids), config.input_ids, place, "a list of token ids")
    if not all(_is_whole(token) and token >= 0 for token in ids):
        raise RequestError(f"{place}: column {config.input_ids!r} must hold a list of token ids")

    def beside(column: str | None, allowed: Callable[[Any], bool], what: str) -> list[Any] | None:
        if column is None:
            return None
        values = _list(value_of(column), column, place)
        if len(values) != len(ids):
            raise RequestError(f"{place}: column {column!r} has {len(values)} values for {len(ids)} token ids")
        if wrong := [value for value in values if not allowed(value)]:
            raise RequestError(f"{place}: column {column!r} must hold {what} for each token, not {wrong[0]!r}")
        return values

    mask = beside(config.attention_mask, lambda value: value in (0, 1), "1, or 0 at padding,")
    counted = beside(config.counted, lambda value: value in (0, 1), "1 or 0")
    labels = beside(config.labels, _is_whole, "a token id or -100")
    names = beside(config.document_ids, lambda value: isinstance(value, str) or _is_whole(value), "a number or a name")
    positions = beside(config.position_ids, _is_whole, "a position")
    real = slice(0, len(ids)) if mask is None else _real(mask, config.attention_mask, place)
    ids = ids[real]
    chosen: list[bool] | None = None if counted is None else [bool(value) for value in counted[real]]
    if labels is not None:
        for number, (label, token) in enumerate(zip(labels[real], ids, strict=True)):
            if label not in (token, -100):
                raise RequestError(
                    f"{place}: column {config.labels!r} holds {label} at token {number}, which is {token}: a label is the token itself, not "
                    "shifted, or -100 where it is not counted"
                )
        chosen = [label != -100 for label in labels[real]]
    documents = None
    if names is not None:
        documents = _by_name(names[real], identifier, config.document_ids, place)
    elif positions is not None:
        documents = _by_position(positions[real], identifier, config.position_ids, place)
    return TokenizedRow(input_ids=ids, counted=chosen, documents=documents)


def _real(mask: list[Any], column: str | None, place: str) -> slice:
    """The stretch of tokens that are no padding."""
    found = [number for number, value in enumerate(mask) if value]
    if found and found[-1] - found[0] + 1 != len(found):
        raise RequestError(f"{place}: column {column!r} is 0 between tokens: padding stands before a sequence or after it")
    return slice(found[0], found[-1] + 1) if found else slice(0)


def _by_name(names: list[Any], row: str, column: str | None, place: str) -> list[tuple[int, str]]:
    """Documents of a packed row, each a stretch of tokens with the same name; a number is that of a document within its row."""
    starts = [number for number, name in enumerate(names) if number == 0 or name != names[number - 1]]
    found = [names[start] for start in starts]
    if len(set(found)) < len(found):
        again = next(name for place_, name in enumerate(found) if name in found[:place_])
        raise RequestError(f"{place}: column {column!r} comes back to document {again!r}: the tokens of a document stand together")
    return [(start, name if isinstance(name, str) else f"{row}/{name}") for start, name in zip(starts, found, strict=True)]


def _by_position(positions: list[int], row: str, column: str | None, place: str) -> list[tuple[int, str]]:
    """Documents of a packed row, each beginning where positions begin anew at 0."""
    for number, position in enumerate(positions):
        if position not in (0, positions[number - 1] + 1 if number else 0):
            raise RequestError(f"{place}: column {column!r} holds {position} at token {number}: positions go on by one, or begin anew at 0")
    starts = [number for number, position in enumerate(positions) if position == 0]
    return [(start, f"{row}/{count}") for count, start in enumerate(starts)]


def _weight(value: Any, column: str, place: str) -> float:
    try:
        weight = float("nan") if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not (math.isfinite(weight) and weight >= 0):
        raise RequestError(f"{place}: column {column!r} must hold a weight, a finite number from 0, not {value!r}")
    return weight


def _list(value: Any, column: str, place: str, what: str = "a list") -> list[Any]:
    if isinstance(value, str):  # csv has no lists
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list):
        raise RequestError(f"{place}: column {column!r} must hold {what}")
    return value


def _objects(value: Any, column: str, place: str) -> list[Row]:
    found = _list(value, column, place)
    if not found or not all(isinstance(one, dict) for one in found):
        raise RequestError(f'{place}: column {column!r} must hold a list of objects, as of turns: {{"role": …, "content": …}}')
    return [_without_nulls(one) for one in found]


def _without_nulls(value: Any) -> Any:
    """Arrow fills what an object does not have, and others in its column do, with null: to a template that would be something that is there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        yield config.files[0], _hub_rows(config)
        return
    for path in _paths(config):
        yield str(path), _reader(path)(path, config)


def _hub_rows(config: DataConfig) -> Iterator[Row]:
    rows = iter(_hub_dataset(config))
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except Exception as error:  # a stream can fail at any row
            raise RequestError(f"{config.files[0]!r} cannot be read on: {type(error).__name__}: {error}") from None


def _is_hub_name(config: DataConfig) -> bool:
    """A single name without a suffix, a glob or a file behind it, such as `wikitext` or `someone/corpus`."""
    name = config.files[0]
    return len(config.files) == 1 and not Path(name).is_absolute() and not Path(name).suffix and not glob.has_magic(name)


def _hub_dataset(config: DataConfig) -> Any:
    import datasets

    return _from_hub(config, lambda name: datasets.load_dataset(name, split=config.split, streaming=config.streaming))


def _hub_fingerprint(config: DataConfig) -> str:
    """Of what the hub has now: of a stream, which is not read for it, its files and their revision; else of the rows themselves."""
    import datasets

    if config.streaming:
        return str(_from_hub(config, lambda name: datasets.load_dataset_builder(name).hash))
    return str(_hub_dataset(config)._fingerprint)


def _from_hub(config: DataConfig, load: Callable[[str], Any]) -> Any:
    try:
        return load(config.files[0])
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
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    if suffix not in _READERS:
        raise RequestError(
            f"{path}: files of type {suffix or '(none)'} are not read; known are {', '.join(_READERS)}, also .gz or .zst of text"
        )
    return _READERS[suffix]


# What reading a file can meet that is not UTF-8, not compressed as its name says, cut short or damaged.
_UNREADABLE = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowException, OSError)


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".zst":
        return cast(IO[bytes], pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


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
                pieces = _paragraphs(stream)
            else:
                pieces = iter([stream.read()])
            yield from ({config.text: piece} for piece in pieces if piece.strip())
        except _UNREADABLE as error:
            raise RequestError(f"{path} cannot be read as text: {error}") from None


def _paragraphs(stream: IO[str]) -> Iterator[str]:
    """What stands between empty lines, block by block, so that a long file is never in memory."""
    rest = ""
    while block := stream.read(2**20):
        if block.endswith("\r"):  # the two halves of a line's end belong together
            block += stream.read(1)
        *whole, rest = (rest + block.replace("\r\n", "\n")).split("\n\n")
        yield from whole
    yield rest


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
