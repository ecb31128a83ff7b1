"""BM25 over the training sequences' texts: the lexical search that influence is shown beside. Made once, kept in files, opened without reading them.

The files are those of bm25s (arrays as .npy, vocabulary and parameters as JSON; nothing is pickled) and `lexical.json`. Equal texts give equal
bytes under one version of bm25s, which writes that version down, and where orjson is installed alike, which it prefers and which spaces otherwise.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# bm25s starts jax where that is installed, to choose a top k that is not asked for here. That would take seconds of every process and
# most of a GPU's memory, and any process started later would be warned of a deadlock. So while it is imported there is no jax.
if "jax" in sys.modules:
    import bm25s
else:
    sys.modules["jax"] = None  # type: ignore[assignment]  # what the import system takes for "not installed"
    try:
        import bm25s
    finally:
        del sys.modules["jax"]


class LexicalSearch:
    """BM25 scores of every training sequence, in their order. The index holds one posting per word and text; None where no text has a word."""

    def __init__(self, index: bm25s.BM25 | None) -> None:
        self._index = index

    def scores(self, query: str, num_sequences: int) -> NDArray[np.float64]:
        """[N]: zero for a text that shares no word with the query."""
        words = bm25s.tokenize([query], stopwords=None, show_progress=False, return_ids=False)[0]
        known = [word for word in words if self._index is not None and word in self._index.vocab_dict]
        if self._index is None or not known:
            return np.zeros(num_sequences)
        return np.asarray(self._index.get_scores(known), dtype=np.float64)


def index_texts(texts: Iterable[str]) -> LexicalSearch:
    """The search over these texts. Takes memory for a number per word of them, not for the texts."""
    return LexicalSearch(_index(texts))


def write_lexical(directory: Path, texts: Iterable[str]) -> None:
    """Fills `directory` with the index of these texts."""
    index = _index(texts)
    (directory / "lexical.json").write_text(json.dumps({"empty": index is None}), encoding="utf-8")
    if index is not None:
        index.save(directory, allow_pickle=False)


def read_lexical(directory: Path) -> LexicalSearch:
    """The index that `write_lexical` wrote; its postings are mapped into memory, its vocabulary is read."""
    empty = json.loads((directory / "lexical.json").read_text(encoding="utf-8"))["empty"]
    return LexicalSearch(None if empty else bm25s.BM25.load(directory, mmap=True, allow_pickle=False))


def ranks(scores: NDArray[np.float64], numbers: Sequence[int]) -> list[int | None]:
    """The rank, from 1, of each of `numbers` by these scores, ties to the lower number; None where the score is zero."""
    return [_rank(scores, number) if scores[number] > 0 else None for number in numbers]


def _rank(scores: NDArray[np.float64], number: int) -> int:
    return 1 + int((scores > scores[number]).sum() + (scores[:number] == scores[number]).sum())


def _index(texts: Iterable[str]) -> bm25s.BM25 | None:
    tokens = bm25s.tokenize(texts, stopwords=None, show_progress=False)
    if not tokens.vocab:
        return None
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    return index
