"""Training sequences: documents tokenized and cut to length, kept in Parquet shards with stable ids.

Knows tokens, not models.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from influence.config import DataConfig
from influence.documents import Document
from influence.errors import RequestError

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("counted", pa.list_(pa.bool_())),
        ("text", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TrainingSequence:
    """What the model was trained on in one piece."""

    id: str
    document: str
    tokens: NDArray[np.int32]  # [T]
    counted: NDArray[np.bool_]  # [T]: whether the token's log-probability is part of the training loss; never the first
    text: str
    metadata: dict[str, Any]


def encode_pair(tokenizer: Any, prompt: str, completion: str, *, special_tokens: bool = True) -> tuple[list[int], list[bool]]:
    """Token ids of prompt + completion, tokenized as one text, and which of them reach into the completion.

    With `special_tokens`, the tokenizer adds those that begin or end a text, which do not count.
    """
    encoded = tokenizer(
        prompt + completion, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=special_tokens, verbose=False
    )
    pairs = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return encoded["input_ids"], [end > len(prompt) and not special for (_, end), special in pairs]


def tokenize(documents: Iterable[Document], tokenizer: Any, config: DataConfig) -> Iterator[TrainingSequence]:
    """Sequences of at most `config.sequence_length` tokens, in the order of the documents.

    Their ids are the documents' ids, followed by `:chunk` where a document gives several; packed sequences are called `packed-<number>`, and carry
    the metadata of the first document in them beside the ids of all.
    """
    encoded = (item for group in _groups(documents, 256) for item in _encode(group, tokenizer, config))
    if config.documents == "pack":
        yield from _packed(encoded, tokenizer, config.sequence_length)
        return
    for document, ids, counted, offsets in encoded:
        length = config.sequence_length
        starts = range(0, len(ids), length) if config.documents == "split" else range(min(1, len(ids)))
        for chunk, start in enumerate(starts):
            piece = slice(start, start + length)
            yield TrainingSequence(
                id=f"{document.id}:{chunk}" if len(starts) > 1 else document.id,
                document=document.id,
                tokens=np.array(ids[piece], dtype=np.int32),
                counted=_never_first(counted[piece]),
                text=_text_of(document, offsets[piece] if offsets else None, ids[piece], tokenizer),
                metadata=document.metadata,
            )


def _groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Consecutive tuples of `size` items, the last one shorter (itertools.batched, which Python 3.11 lacks)."""
    stream = iter(items)
    while group := tuple(islice(stream, size)):
        yield group


Encoded = tuple[Document, list[int], list[bool], list[tuple[int, int]] | None]


def _encode(documents: Sequence[Document], tokenizer: Any, config: DataConfig) -> Iterator[Encoded]:
    if config.input_ids is not None:
        for document in documents:
            ids = document.input_ids or []
            if ids and max(ids) >= len(tokenizer):
                raise RequestError(f"document {document.id!r} has token id {max(ids)}, but the tokenizer knows {len(tokenizer)} tokens")
            yield document, ids, [True] * len(ids), None
    elif config.prompt is not None:
        for document in documents:
            ids, counted = encode_pair(tokenizer, document.prompt or "", document.completion or "")
            yield document, ids, counted, None
    else:
        texts = [document.text or "" for document in documents]
        encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
        for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield document, ids, [True] * len(ids), offsets


def _text_of(document: Document, offsets: list[tuple[int, int]] | None, ids: list[int], tokenizer: Any) -> str:
    if offsets is None or document.text is None:
        return str(tokenizer.decode(ids))
    spans = [(start, end) for start, end in offsets if end > start]  # special tokens have empty ones
    return document.text[spans[0][0] : spans[-1][1]] if spans else ""


def _never_first(counted: list[bool]) -> NDArray[np.bool_]:
    result = np.array(counted, dtype=np.bool_)
    result[:1] = False
    return result


def _packed(encoded: Iterable[Encoded], tokenizer: Any, length: int) -> Iterator[TrainingSequence]:
    if tokenizer.eos_token_id is None:
        raise RequestError("documents: pack joins documents by the end-of-text token, and this tokenizer has none; take split or truncate")
    known: dict[str, dict[str, Any]] = {}

    def tokens_of_documents() -> Iterator[tuple[int, bool, str]]:
        for document, ids, counted, _ in encoded:
            known[document.id] = document.metadata
            for token, count in [*zip(ids, counted, strict=True), (tokenizer.eos_token_id, True)]:
                yield token, count, document.id

    stream = tokens_of_documents()
    for number in range(2**62):
        piece = list(islice(stream, length))
        if not piece:
            return
        tokens = [token for token, _, _ in piece]
        sources = list(dict.fromkeys(source for _, _, source in piece))
        yield TrainingSequence(
            id=f"packed-{number}",
            document=sources[0],
            tokens=np.array(tokens, dtype=np.int32),
            counted=_never_first([count for _, count, _ in piece]),
            text=str(tokenizer.decode(tokens)),
            metadata={**known[sources[0]], "documents": sources},
        )


def write_sequences(directory: Path, sequences: Iterable[TrainingSequence], per_shard: int, taken: Collection[str] = ()) -> None:
    """Fills `directory` with shards and their summary.json.

    Sequences without counted tokens teach the model nothing: they are left out, and named in the summary. Raises RequestError when an id comes twice
    or is `taken`, or nothing is left.
    """
    seen = set(taken)
    without: list[str] = []
    sizes: list[int] = []
    tokens = counted = 0

    def kept() -> Iterator[TrainingSequence]:
        for sequence in sequences:
            if sequence.id in seen:
                raise RequestError(
                    f"the id {sequence.id!r} is in the run already: remove it first to replace it, or take another id (data.id names their column)"
                    if sequence.id in taken
                    else f"the id {sequence.id!r} comes twice in the data: ids must differ (data.id names their column; without one, row numbers "
                    "are ids)"
                )
            seen.add(sequence.id)
            if sequence.counted.any():
                yield sequence
            else:
                without.append(sequence.id)

    for shard, group in enumerate(_groups(kept(), per_shard)):
        _write_shard(directory / shard_name(shard), group)
        sizes.append(len(group))
        tokens += sum(len(s.tokens) for s in group)
        counted += sum(int(s.counted.sum()) for s in group)
    if not sizes:
        raise RequestError("the data holds no sequence with a counted token: it is empty, or every document has fewer than two tokens")
    summary = {"shards": sizes, "tokens": tokens, "counted_tokens": counted, "num_left_out": len(without), "left_out": without[:20]}
    (directory / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _write_shard(path: Path, sequences: Iterable[TrainingSequence]) -> None:
    rows = [
        {
            "id": s.id,
            "document": s.document,
            "tokens": s.tokens,
            "counted": s.counted,
            "text": s.text,
            "metadata": json.dumps(s.metadata, ensure_ascii=False),
        }
        for s in sequences
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")


def write_erased(directory: Path, source: Path, erased: Collection[int]) -> None:
    """Fills `directory` with the sequences of the directory `source`, those of these numbers as their ids and those of their documents alone."""
    summary = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    store, first = SequenceStore(source), 0
    for shard, size in enumerate(summary["shards"]):
        kept = (_emptied(s) if first + place in erased else s for place, s in enumerate(store.shard(shard)))
        _write_shard(directory / shard_name(shard), kept)
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

    `summary`: the sequences in each shard; tokens, counted_tokens, num_left_out, and the ids of some left_out.
    """

    def __init__(self, *directories: Path) -> None:
        summaries = [json.loads((directory / "summary.json").read_text(encoding="utf-8")) for directory in directories]
        self.summary: dict[str, Any] = {key: sum((summary[key] for summary in summaries[1:]), summaries[0][key]) for key in summaries[0]}
        self._files = [
            directory / shard_name(n) for directory, s in zip(directories, summaries, strict=True) for n in range(len(s["shards"]))
        ]
        self.starts = np.concatenate([[0], np.cumsum(self.summary["shards"])])
        self._table = lru_cache(maxsize=16)(_read_table)

    @cached_property
    def ids(self) -> list[str]:
        """Every sequence's id, in order."""
        return self._column("id")

    @cached_property
    def documents(self) -> list[str]:
        """The id of every sequence's document, in order."""
        return self._column("document")

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
        return tuple(_sequence(row) for row in self._table(self._files[number]).to_pylist())

    def __getitem__(self, number: int) -> TrainingSequence:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sequence {number}: the run has {len(self)}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return _sequence(self._table(self._files[shard]).slice(number - int(self.starts[shard]), 1).to_pylist()[0])

    def select(self, numbers: Sequence[int]) -> list[TrainingSequence]:
        """The sequences of these numbers, in their order; each shard is read once."""
        found = {number: self[number] for number in sorted(numbers)}
        return [found[number] for number in numbers]

    def __iter__(self) -> Iterator[TrainingSequence]:
        for shard in range(self.num_shards):
            yield from self.shard(shard)


def _sequence(row: Mapping[str, Any]) -> TrainingSequence:
    return TrainingSequence(
        id=row["id"],
        document=row["document"],
        tokens=np.array(row["tokens"], dtype=np.int32),
        counted=np.array(row["counted"], dtype=np.bool_),
        text=row["text"],
        metadata=json.loads(row["metadata"]),
    )


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pa.parquet.read_table(path, columns=columns)
    except FileNotFoundError:
        raise RequestError(f"{path} is gone: sequences were erased since the run was opened; open it again") from None
