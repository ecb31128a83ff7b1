"""BM25 over the training sequences' texts: the lexical search that influence is shown beside."""

from collections.abc import Iterable, Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray


class LexicalSearch:
    """BM25 scores of every training sequence, in their order. Built from the texts; holds one posting per word and text."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._index = bm25s.BM25()
        tokens = bm25s.tokenize(list(texts), stopwords=None, show_progress=False)
        self._empty = not tokens.vocab
        if not self._empty:
            self._index.index(tokens, show_progress=False)

    def scores(self, query: str, num_sequences: int) -> NDArray[np.float64]:
        """[N]: zero for a text that shares no word with the query."""
        words = bm25s.tokenize([query], stopwords=None, show_progress=False, return_ids=False)[0]
        known = [word for word in words if not self._empty and word in self._index.vocab_dict]
        if not known:
            return np.zeros(num_sequences)
        return np.asarray(self._index.get_scores(known), dtype=np.float64)


def ranks(scores: NDArray[np.float64], numbers: Sequence[int]) -> list[int | None]:
    """The rank, from 1, of each of `numbers` by these scores, ties to the lower number; None where the score is zero."""
    order = np.argsort(-scores, kind="stable")
    places = np.empty(len(scores), dtype=np.int64)
    places[order] = np.arange(1, len(scores) + 1)
    return [int(places[number]) if scores[number] > 0 else None for number in numbers]
