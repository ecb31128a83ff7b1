"""BM25 by its formula; an index in files scores as the one in memory, to the same bytes, and holds no pickle."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from influence.lexical import index_texts, ranks, read_lexical, write_lexical

TEXTS = [
    "Lisbon lies on the Tagus, and the Tagus ends at Lisbon.",
    "Oslo lies on the Aker.",
    "",
    "Die Straße nach Łódź — naïve café, 日本語 — и дорога",
    "a b c ! ?",
    "the the the the",
]
QUERIES = ["Tagus", "the LISBON lies", "Łódź 日本語 дорога", "lies lies", "unheard words", "unheard Oslo", "a", "", "… !"]


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if len(word) > 1]


def bm25(query: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Lucene's: Σ over the query's words of idf · tf / (tf + 1.5 (.25 + .75 length / mean length))."""
    counts = [Counter(words(text)) for text in texts]
    mean_length = sum(count.total() for count in counts) / len(counts)

    def score(count: Counter[str], word: str) -> float:
        containing = sum(word in other for other in counts)
        idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
        return idf * count[word] / (count[word] + 1.5 * (0.25 + 0.75 * count.total() / mean_length)) if count[word] else 0.0

    return np.array([sum(score(count, word) for word in words(query)) for count in counts])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "lexical"
    made.mkdir()
    write_lexical(made, TEXTS)
    return made


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("query", QUERIES)
def test_scores_are_those_of_the_formula(query: str, directory: Path) -> None:
    found = read_lexical(directory).scores(query, len(TEXTS))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, bm25(query, TEXTS), rtol=1e-6)  # postings are float32


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ["one"], ["!", "one", "!"]], ids=["several", "one", "one word", "one with a word"])
def test_what_was_written_scores_as_what_is_in_memory(texts: list[str], tmp_path: Path) -> None:
    write_lexical(tmp_path, iter(texts))  # a stream will do
    written, kept = read_lexical(tmp_path), index_texts(texts)
    for query in [*QUERIES, *texts]:
        np.testing.assert_array_equal(written.scores(query, len(texts)), kept.scores(query, len(texts)))


@pytest.mark.parametrize("texts", [[""], ["!", "a b c", ""], []])
def test_texts_without_words_score_zero(texts: list[str], tmp_path: Path) -> None:
    write_lexical(tmp_path, texts)
    for search in (read_lexical(tmp_path), index_texts(texts)):
        for query in QUERIES:
            np.testing.assert_array_equal(search.scores(query, len(texts)), np.zeros(len(texts)))


def test_postings_are_mapped_not_read(directory: Path) -> None:
    index = read_lexical(directory)._index
    assert index is not None
    assert all(isinstance(index.scores[name], np.memmap) for name in ("data", "indices", "indptr"))


def test_no_file_is_a_pickle(directory: Path) -> None:
    assert {path.suffix for path in directory.iterdir()} == {".json", ".npy"}
    for path in directory.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert not np.load(path, allow_pickle=False).dtype.hasobject


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"])
def test_a_pickle_in_place_of_an_array_is_not_opened(name: str, directory: Path, tmp_path: Path) -> None:
    np.save(directory / name, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        read_lexical(directory)
    assert not (tmp_path / "sprung").exists()


def test_equal_texts_give_equal_bytes_in_any_process(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    code = "import json, pathlib, sys, influence.lexical as lexical; lexical.write_lexical(pathlib.Path(sys.argv[1]), json.load(sys.stdin))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(other)], input=json.dumps(TEXTS), text=True, check=True, env=environment)
    assert contents(directory) == contents(other)


def test_ranks_count_from_one_and_ties_go_to_the_lower_number() -> None:
    assert ranks(np.array([0.5, 2.0, 0.0, 0.5, 3.0]), [0, 1, 2, 3, 4]) == [3, 2, None, 4, 1]
    assert ranks(np.array([0.0]), [0, 0]) == [None, None]


def test_the_search_leaves_jax_alone():
    searched = "import sys; from influence.lexical import index_texts; index_texts(['some text']).scores('text', 1)"
    subprocess.run([sys.executable, "-c", f"{searched}; assert 'jax' not in sys.modules; import jax.numpy"], check=True)
