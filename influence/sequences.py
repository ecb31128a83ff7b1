"""Training sequences: documents tokenized and cut to length, kept in Parquet shards with stable ids.

Knows tokens, not models.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from influence.chat import assistant_turns
from influence.config import DataConfig
from influence.documents import Document
from influence.errors import RequestError

T = TypeVar("T")

PART = pa.struct(
    [
        ("document", pa.string()),
        ("first", pa.int32()),
        ("end", pa.int32()),
        ("characters", pa.list_(pa.int64())),
        ("window", pa.int32()),
        ("windows", pa.int32()),
    ]
)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document", pa.string()),
        ("parts", pa.list_(PART)),
        ("tokens", pa.list_(pa.int32())),
        ("counted", pa.list_(pa.bool_())),
        ("starts", pa.list_(pa.int32())),
        ("weight", pa.float64()),
        ("text", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DocumentPart:
    """Where a stretch of a sequence's tokens stands in the document it comes from."""

    document: str
    first: int
    end: int  # of the sequence's tokens: the first and one more than the last
    characters: tuple[int, int] | None  # of the document's text, likewise; None where it came as token ids
    window: int
    windows: int  # the document's tokens are in so many sequences, of which this is number `window`, from 1

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.document,
            "tokens": [self.first, self.end],
            "span": None if self.characters is None else list(self.characters),
            "window": self.window,
            "windows": self.windows,
        }


@dataclass(frozen=True, kw_only=True)
class TrainingSequence:
    """What the model was trained on in one piece."""

    id: str
    document: str  # id of the row it is from, or of the first one in it
    tokens: NDArray[np.int32]  # [T]
    counted: NDArray[np.bool_]  # [T]: whether the token's log-probability is part of the training loss; never the first
    text: str
    metadata: dict[str, Any]
    parts: tuple[DocumentPart, ...] = ()
    starts: NDArray[np.int32] | None = None  # tokens after the first that see nothing before them; None: all see all before
    weight: float = 1.0  # of its loss in the training loss


def encode_pair(tokenizer: Any, prompt: str, completion: str, *, special_tokens: bool = True) -> tuple[list[int], list[bool]]:
    """Token ids of prompt + completion, tokenized as one text, and which of them reach into the completion.

    With `special_tokens`, the tokenizer adds those that begin or end a text, which do not count.
    """
    ids, inside, _ = _encode_stretches(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], special_tokens)
    return ids, inside


def _encode_stretches(
    tokenizer: Any, text: str, stretches: Sequence[tuple[int, int]], special_tokens: bool
) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
    """Token ids of the text, which of them reach into one of the stretches of its characters, and the characters of each."""
    encoded = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=special_tokens, verbose=False
    )
    inside = [
        not special and any(start < last and end > first for first, last in stretches)
        for (start, end), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    ]
    return encoded["input_ids"], inside, encoded["offset_mapping"]


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A row's tokens, and where they are from."""

    row: Document
    tokens: NDArray[np.int32]  # [T]
    counted: NDArray[np.bool_]  # [T]
    documents: Sequence[tuple[int, str]]  # (number of its first token, id), in order
    text: str | None = None
    offsets: NDArray[np.int64] | None = None  # [T, 2]: characters of the text; first = end for tokens that spell none of it

    def __len__(self) -> int:
        return len(self.tokens)

    def characters(self, first: int, end: int) -> tuple[int, int] | None:
        """From the first character of these tokens to the last, + 1; None where there is no text, or none of it is theirs."""
        if self.offsets is None:
            return None
        spelling = self.offsets[first:end][self.offsets[first:end, 1] > self.offsets[first:end, 0]]
        return (int(spelling[0, 0]), int(spelling[-1, 1])) if len(spelling) else None


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Tokens `first` to `end` - 1 of a row, which begins at token `place` of a stream that is cut into these windows."""

    encoded: _Encoded
    first: int
    end: int
    place: int
    windows: "_Windows"

    def parts(self, before: int) -> Iterator[DocumentPart]:
        """The documents in it; `before` tokens of the sequence come before."""
        starts = [first for first, _ in self.encoded.documents]
        for (first, name), last in zip(self.encoded.documents, [*starts[1:], len(self.encoded)], strict=True):
            inner = max(first, self.first), min(last, self.end)
            if inner[0] >= inner[1]:
                continue
            numbers = self.windows.that_hold(self.place + first, self.place + last)
            yield DocumentPart(
                document=name,
                first=before + inner[0] - self.first,
                end=before + inner[1] - self.first,
                characters=self.encoded.characters(*inner),
                window=1 + self.windows.number(self.place + self.first) - numbers.start,
                windows=len(numbers),
            )


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """How a stream of tokens is cut: window k holds tokens k · step to k · step + length - 1."""

    length: int
    overlap: int = 0
    count: int = 2**62

    @property
    def step(self) -> int:
        return self.length - self.overlap

    def number(self, token: int) -> int:
        """Of the window that begins at this token, or, without an overlap, of that which holds it."""
        return token // self.step

    def that_hold(self, first: int, end: int) -> range:
        """The numbers of the windows that hold some of these tokens."""
        return range(max(0, (first - self.length) // self.step + 1), min(self.count, (end - 1) // self.step + 1))


def _cut(num_tokens: int, config: DataConfig) -> _Windows:
    """The windows of a row: none lies within the one before."""
    windows = _Windows(length=config.sequence_length, overlap=config.overlap)
    needed = max(-(-(num_tokens - config.overlap) // windows.step), min(1, num_tokens))
    return replace(windows, count=min(1, needed) if config.documents == "truncate" else needed)


def tokenize(documents: Iterable[Document], tokenizer: Any, config: DataConfig) -> Iterator[TrainingSequence]:
    """Sequences of at most `config.sequence_length` tokens, in the order of the documents.

    Their ids are the rows' ids, followed by `:chunk` where a row gives several; packed sequences are called `packed-<number>`, and carry
    the metadata of the first document in them beside the ids of all. Raises RequestError for a row that cannot be tokenized, naming it.
    """
    encoded = (item for group in _groups(documents, 256) for item in _encode(group, tokenizer, config))
    if config.documents == "pack":
        yield from _packed(encoded, tokenizer, config)
        return
    for item in encoded:
        windows = _cut(len(item), config)
        for chunk in range(windows.count):
            start = chunk * windows.step
            piece = _Piece(encoded=item, first=start, end=min(start + windows.length, len(item)), place=0, windows=windows)
            name = f"{item.row.id}:{chunk}" if windows.count > 1 else item.row.id
            yield _sequence_of([piece], name, item.row.metadata, tokenizer, config, repeated=config.overlap if chunk else 0)


def _groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Consecutive tuples of `size` items, the last one shorter (itertools.batched, which Python 3.11 lacks)."""
    stream = iter(items)
    while group := tuple(islice(stream, size)):
        yield group


def _sequence_of(
    pieces: Sequence[_Piece], name: str, metadata: dict[str, Any], tokenizer: Any, config: DataConfig, repeated: int = 0
) -> TrainingSequence:
    tokens = np.concatenate([piece.encoded.tokens[piece.first : piece.end] for piece in pieces])
    counted = np.concatenate([piece.encoded.counted[piece.first : piece.end] for piece in pieces])
    counted[: max(1, repeated)] = False
    ends = np.cumsum([piece.end - piece.first for piece in pieces])
    parts = tuple(part for piece, end in zip(pieces, ends, strict=True) for part in piece.parts(int(end) - (piece.end - piece.first)))
    starts = np.array([part.first for part in parts[1:]], dtype=np.int32) if config.attention == "document" else None
    if starts is not None and config.counted is None and config.labels is None:
        counted[starts] = False
    return TrainingSequence(
        id=name,
        document=pieces[0].encoded.row.id,
        tokens=tokens,
        counted=counted,
        text=_text_of(pieces, tokens, tokenizer, config) if config.keep_text else "",
        metadata=metadata,
        parts=parts,
        starts=starts,
        weight=pieces[0].encoded.row.weight,
    )


def _text_of(pieces: Sequence[_Piece], tokens: NDArray[np.int32], tokenizer: Any, config: DataConfig) -> str:
    if config.documents == "pack" or pieces[0].encoded.text is None:
        return str(tokenizer.decode(tokens))
    spelled = pieces[0].encoded.characters(pieces[0].first, pieces[0].end)
    return pieces[0].encoded.text[slice(*spelled)] if spelled else ""


def _encode(rows: Sequence[Document], tokenizer: Any, config: DataConfig) -> Iterator[_Encoded]:
    if config.input_ids is not None:
        yield from (_encode_ids(row, len(tokenizer)) for row in rows)
    elif config.messages is not None or config.prompt is not None:
        for row in rows:
            text, stretches = _stretches(row, tokenizer)
            ids, inside, offsets = _encode_stretches(tokenizer, text, stretches, special_tokens=row.messages is None)
            yield _encoded(row, ids, inside, text, offsets)
    else:
        texts = [row.text or "" for row in rows]
        encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
        for row, text, ids, offsets in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield _encoded(row, ids, [True] * len(ids), text, offsets)


def _encoded(row: Document, ids: list[int], counted: list[bool], text: str, offsets: list[tuple[int, int]]) -> _Encoded:
    return _Encoded(
        row=row,
        tokens=np.array(ids, dtype=np.int32),
        counted=np.array(counted, dtype=np.bool_),
        documents=[(0, row.id)],
        text=text,
        offsets=np.array(offsets, dtype=np.int64).reshape(-1, 2),
    )


def _encode_ids(row: Document, known: int) -> _Encoded:
    assert row.row is not None
    ids = row.row.input_ids
    if ids and max(ids) >= known:
        raise RequestError(f"{row.place}: token id {max(ids)} is not one of the {known} that the tokenizer knows, 0 to {known - 1}")
    counted = [True] * len(ids) if row.row.counted is None else row.row.counted
    return _Encoded(
        row=row,
        tokens=np.array(ids, dtype=np.int32),
        counted=np.array(counted, dtype=np.bool_),
        documents=[(0, row.id)] if row.row.documents is None else row.row.documents,
    )


def _stretches(row: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A text, and the stretches of it that count."""
    if row.messages is None:
        prompt, completion = row.prompt or "", row.completion or ""
        return prompt + completion, [(len(prompt), len(prompt + completion))]
    if any(not isinstance(turn.get("role"), str) for turn in row.messages):
        raise RequestError(f"{row.place}: every turn has a role, such as user or assistant")
    try:
        text, stretches = assistant_turns(tokenizer, row.messages, row.tools)
        text.encode()
    except RequestError as error:
        raise RequestError(f"{row.place}: {error}") from None
    except UnicodeEncodeError as error:
        raise RequestError(f"{row.place}: the conversation holds half a character ({text[error.start]!r}, a lone surrogate)") from None
    return text, stretches


def _packed(encoded: Iterable[_Encoded], tokenizer: Any, config: DataConfig) -> Iterator[TrainingSequence]:
    if tokenizer.eos_token_id is None:
        raise RequestError("documents: pack joins documents by the end-of-text token, and this tokenizer has none; take split or truncate")
    windows, place = _Windows(length=config.sequence_length), 0
    pieces: list[_Piece] = []

    def sequence() -> TrainingSequence:
        first = pieces[0]
        sources = list(dict.fromkeys(piece.encoded.row.id for piece in pieces))
        name = f"packed-{windows.number(first.place + first.first)}"
        return _sequence_of(pieces, name, {**first.encoded.row.metadata, "documents": sources}, tokenizer, config)

    for item in (_with_end(one, tokenizer.eos_token_id) for one in encoded):
        first = 0
        while first < len(item):
            end = min(len(item), first + config.sequence_length - (place + first) % config.sequence_length)
            pieces.append(_Piece(encoded=item, first=first, end=end, place=place, windows=windows))
            first = end
            if (place + first) % config.sequence_length == 0:
                yield sequence()
                pieces = []
        place += len(item)
    if pieces:
        yield sequence()


def _with_end(item: _Encoded, end_token: int) -> _Encoded:
    """With the end-of-text token, which counts, behind it."""
    offsets = item.offsets
    if offsets is not None:
        last = int(offsets[:, 1].max(initial=0))
        offsets = np.concatenate([offsets, [[last, last]]])
    return replace(item, tokens=np.append(item.tokens, np.int32(end_token)), counted=np.append(item.counted, True), offsets=offsets)


def write_sequences(
    directory: Path, sequences: Iterable[TrainingSequence], per_shard: int, taken: Collection[str] = (), *, keep_text: bool = True
) -> None:
    """Fills `directory` with shards and their summary.json.

    Sequences without counted tokens, or of weight 0, teach the model nothing: they are left out, and named in the summary. Raises RequestError when
    an id comes twice or is `taken`, or nothing is left. Of all that passes through, ids alone are kept in memory.
    """
    seen = set(taken)
    without: list[str] = []
    sizes: list[int] = []
    tokens = counted = left_out = weightless = 0

    def kept() -> Iterator[TrainingSequence]:
        nonlocal left_out, weightless
        for sequence in sequences:
            if sequence.id in seen:
                raise RequestError(
                    f"the id {sequence.id!r} is in the run already: remove it first to replace it, or take another id (data.id names their column)"
                    if sequence.id in taken
                    else f"the id {sequence.id!r} comes twice in the data: ids must differ (data.id names their column; without one, row numbers "
                    "are ids)"
                )
            seen.add(sequence.id)
            if sequence.counted.any() and sequence.weight > 0:
                yield sequence
            else:
                left_out, weightless = left_out + 1, weightless + (sequence.weight == 0)
                without.extend([sequence.id] if left_out <= 20 else [])

    for shard, group in enumerate(_groups(kept(), per_shard)):
        _write_shard(directory / shard_name(shard), group, keep_text)
        sizes.append(len(group))
        tokens += sum(len(s.tokens) for s in group)
        counted += sum(int(s.counted.sum()) for s in group)
    if not sizes:
        raise RequestError(
            "every sequence of the data has weight 0: there is nothing the model was trained on"
            if 0 < weightless == left_out
            else "the data holds no sequence with a counted token: it is empty, or every document has fewer than two tokens"
        )
    summary = {
        "shards": sizes,
        "tokens": tokens,
        "counted_tokens": counted,
        "num_left_out": left_out,
        "num_weightless": weightless,
        "left_out": without,
    }
    (directory / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _write_shard(path: Path, sequences: Iterable[TrainingSequence], keep_text: bool) -> None:
    rows = [
        {
            "id": s.id,
            "document": s.document,
            "parts": [{**vars(part), "characters": part.characters and list(part.characters)} for part in s.parts],
            "tokens": s.tokens,
            "counted": s.counted,
            "starts": s.starts,
            "weight": s.weight,
            "text": s.text if keep_text or not len(s.tokens) else None,
            "metadata": json.dumps(s.metadata, ensure_ascii=False),
        }
        for s in sequences
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")


def write_erased(directory: Path, source: Path, erased: Collection[int], *, keep_text: bool = True) -> None:
    """Fills `directory` with the sequences of the directory `source`, those of these numbers as their ids and those of their documents alone."""
    summary = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    store, first = SequenceStore(source), 0
    for shard, size in enumerate(summary["shards"]):
        kept = (_emptied(s) if first + place in erased else s for place, s in enumerate(store.shard(shard)))
        _write_shard(directory / shard_name(shard), kept, keep_text)
        first += size
    (directory / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _emptied(sequence: TrainingSequence) -> TrainingSequence:
    nothing = np.zeros(0, dtype=np.int32)
    return TrainingSequence(
        id=sequence.id, document=sequence.document, tokens=nothing, counted=nothing.astype(np.bool_), text="", metadata={}
    )


def shard_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


class SequenceStore:
    """The sequences of one or several directories, by number (their order in the data) or shard.

    `summary`: the sequences in each shard; tokens, counted_tokens, num_left_out, num_weightless, and the ids of some left_out. `decode` gives the
    text of tokens where text was not kept.
    """

    def __init__(self, *directories: Path, decode: Callable[[NDArray[np.int32]], str] = lambda tokens: "") -> None:
        summaries = [json.loads((directory / "summary.json").read_text(encoding="utf-8")) for directory in directories]
        self.summary: dict[str, Any] = {key: sum((summary[key] for summary in summaries[1:]), summaries[0][key]) for key in summaries[0]}
        self._files = [
            directory / shard_name(n) for directory, s in zip(directories, summaries, strict=True) for n in range(len(s["shards"]))
        ]
        self.starts = np.concatenate([[0], np.cumsum(self.summary["shards"])])
        self._table = lru_cache(maxsize=16)(_read_table)
        self._decode = decode

    @cached_property
    def ids(self) -> list[str]:
        """Every sequence's id, in order."""
        return self._column("id")

    @cached_property
    def documents(self) -> list[str]:
        """The id of every sequence's row, in order."""
        return self._column("document")

    def documents_in(self) -> Iterator[list[str]]:
        """The ids of every sequence's row and of the documents in it, in order."""
        for path in self._files:
            for row in _read_table(path, ["document", "parts"]).to_pylist():
                yield list(dict.fromkeys([row["document"], *(part["document"] for part in row["parts"])]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Every sequence's number of tokens, in order."""
        columns = (_read_table(path, ["tokens"])["tokens"] for path in self._files)
        return np.concatenate([pa.compute.list_value_length(column).to_numpy().astype(np.int64) for column in columns])

    def metadata(self) -> Iterator[dict[str, Any]]:
        """Every sequence's metadata, in order."""
        return (json.loads(text) for text in self._column("metadata"))

    def _column(self, name: str) -> list[str]:
        columns = (_read_table(path, [name])[name] for path in self._files)
        return [value for column in columns for value in column.to_pylist()]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_shards(self) -> int:
        return len(self.summary["shards"])

    def shard(self, number: int) -> tuple[TrainingSequence, ...]:
        return tuple(self._sequence(row) for row in self._table(self._files[number]).to_pylist())

    def __getitem__(self, number: int) -> TrainingSequence:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sequence {number}: the run has {len(self)}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self._sequence(self._table(self._files[shard]).slice(number - int(self.starts[shard]), 1).to_pylist()[0])

    def select(self, numbers: Sequence[int]) -> list[TrainingSequence]:
        """The sequences of these numbers, in their order; each shard is read once."""
        found = {number: self[number] for number in sorted(numbers)}
        return [found[number] for number in numbers]

    def __iter__(self) -> Iterator[TrainingSequence]:
        for shard in range(self.num_shards):
            yield from self.shard(shard)

    def _sequence(self, row: Mapping[str, Any]) -> TrainingSequence:
        tokens = np.array(row["tokens"], dtype=np.int32)
        return TrainingSequence(
            id=row["id"],
            document=row["document"],
            tokens=tokens,
            counted=np.array(row["counted"], dtype=np.bool_),
            text=self._decode(tokens) if row["text"] is None else row["text"],
            metadata=json.loads(row["metadata"]),
            parts=tuple(DocumentPart(**{**part, "characters": part["characters"] and tuple(part["characters"])}) for part in row["parts"]),
            starts=None if row["starts"] is None else np.array(row["starts"], dtype=np.int32),
            weight=row["weight"],
        )


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pa.parquet.read_table(path, columns=columns)
    except FileNotFoundError:
        raise RequestError(f"{path} is gone: sequences were erased since the run was opened; open it again") from None
