"""How much data a run will have, and what it will take to store, from its files and a sample of their documents.

The sample goes through the functions that the run itself uses. Knows documents and tokens; knows no model.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from influence.config import DataConfig
from influence.documents import Document, count_documents, read_documents
from influence.lexical import write_lexical
from influence.sequences import SequenceStore, tokenize, write_sequences

SAMPLED_DOCUMENTS = 1000

BYTES_PER_POSTING = 8
"""A text's number and a score, for each word of it."""


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """The number of training sequences, and what one of them holds and costs on average."""

    sequences: int
    tokens: float
    counted_tokens: float
    stored_bytes: float
    """In the run directory, with its text."""
    lexical_bytes: float
    words: float
    """Different words of its text."""
    seconds: float
    """To read, tokenize and store it."""
    lexical_seconds: float
    basis: str
    """Where these numbers are from, in words."""


def sampled(config: DataConfig, tokenizer: Any) -> DataSize:
    """What the data's files hold: documents are counted, and the first 1,000 tokenized, stored and indexed as a run would.

    Raises RequestError for files that are missing or cannot be read.
    """
    count, sample = count_documents(config), list(islice(read_documents(config), SAMPLED_DOCUMENTS))
    more = max(1.0, count / max(1, len(sample)))
    with TemporaryDirectory() as scratch:
        return _stored(sample, more, tokenizer, config, Path(scratch))


def _stored(sample: Iterable[Document], more: float, tokenizer: Any, config: DataConfig, scratch: Path) -> DataSize:
    for part in ("sequences", "lexical"):
        (scratch / part).mkdir()
    start = time.perf_counter()
    sequences = tokenize(sample, tokenizer, config)
    write_sequences(scratch / "sequences", sequences, config.sequences_per_shard, keep_text=config.keep_text)
    written = time.perf_counter()
    store = SequenceStore(scratch / "sequences", decode=lambda tokens: str(tokenizer.decode(tokens)))
    texts = [sequence.text for sequence in store]
    before = time.perf_counter()
    write_lexical(scratch / "lexical", texts)
    indexed = time.perf_counter()
    postings = sum(path.stat().st_size for path in (scratch / "lexical").glob("[di][an][td]*.npy") if "indptr" not in path.name)
    vocabulary = _bytes_below(scratch / "lexical") - postings
    return DataSize(
        sequences=round(len(store) * more),
        tokens=store.summary["tokens"] / len(store),
        counted_tokens=store.summary["counted_tokens"] / len(store),
        stored_bytes=_bytes_below(scratch / "sequences") / len(store),
        lexical_bytes=(postings + vocabulary / math.sqrt(more)) / len(store),  # new words come about as the root of the words (Heaps' law)
        words=postings / BYTES_PER_POSTING / len(store),
        seconds=(written - start) / len(store),
        lexical_seconds=(indexed - before) / len(store),
        basis="all documents read" if more == 1 else f"documents counted, the first {SAMPLED_DOCUMENTS:,} read",
    )


def assumed(sequences: int, tokens: float, basis: str) -> DataSize:
    """So many sequences of English text, none of which was seen: a token takes 4 bytes on disk with its text, and every second one is a new word."""
    return DataSize(
        sequences=sequences,
        tokens=tokens,
        counted_tokens=max(1.0, tokens - 1),
        stored_bytes=4 * tokens + 40,
        lexical_bytes=BYTES_PER_POSTING * tokens / 2,
        words=tokens / 2,
        seconds=8e-6 * tokens,
        lexical_seconds=2e-6 * tokens,
        basis=basis,
    )


def resized(size: DataSize, sequences: int | None, tokens: float | None) -> DataSize:
    """The same kind of data in another number of sequences, or with another number of tokens in each."""
    longer = (tokens or size.tokens) / size.tokens
    return replace(
        size,
        sequences=size.sequences if sequences is None else sequences,
        tokens=size.tokens * longer,
        counted_tokens=max(1.0, size.counted_tokens * longer),
        stored_bytes=size.stored_bytes * longer,
        lexical_bytes=size.lexical_bytes * longer,
        words=size.words * longer,
        seconds=size.seconds * longer,
        lexical_seconds=size.lexical_seconds * longer,
        basis=size.basis + " (number or length of the sequences as given)",
    )


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
