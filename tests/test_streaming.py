"""Data larger than the disk allows twice: read once as a stream, in bounded memory, with nothing left behind but tokens."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_run import Influence, World, documents, run_pipeline, tokenizer, write_jsonl

from influence.config import DataConfig
from influence.documents import data_fingerprint, read_documents
from influence.errors import RequestError
from influence.sequences import tokenize


def shards(directory: Path) -> Path:
    """A data set as on the hub: a directory of compressed shards."""
    directory.mkdir()
    rows = documents()
    for number in range(4):
        with gzip.open(directory / f"train-{number:05d}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows[number * 10 : number * 10 + 10])
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where `corpus` is the name of a data set, and nothing else is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return shards(tmp_path / "corpus")


def test_streamed_hub_data_set_gives_the_same_sequences_and_keeps_no_copy(hub: Path) -> None:
    words = tokenizer(row["text"] for row in documents())
    path = write_jsonl(hub.parent / "plain.jsonl", documents())

    def content(**settings: Any) -> list[Any]:
        config = DataConfig(sequence_length=32, metadata=["source"], **settings)
        return [(s.id, s.tokens.tolist(), s.text, s.metadata) for s in tokenize(read_documents(config), words, config)]

    assert content(files="corpus", streaming=True) == content(files=str(path))
    assert not list((hub.parent / "cache").rglob("*.arrow"))


def test_fingerprint_of_a_stream_is_that_of_its_files(hub: Path) -> None:
    config = DataConfig(files="corpus", streaming=True)
    before = data_fingerprint(config)
    assert data_fingerprint(config) == before
    with gzip.open(hub / "train-00001.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"text": "other"}\n')
    assert data_fingerprint(config) != before


def test_stream_that_breaks_off_is_told_in_one_line(hub: Path) -> None:
    last = hub / "train-00003.jsonl.gz"
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(RequestError, match="'corpus' cannot be read on: "):
        list(read_documents(DataConfig(files="corpus", streaming=True)))
    with pytest.raises(RequestError, match="'other' is neither a file nor a hub data set"):
        list(read_documents(DataConfig(files="other", streaming=True)))


def test_run_without_texts_answers_with_texts(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    run = run_pipeline(world.settings(tmp_path / "run", data={"keep_text": False}, index={"recall_queries": 0}))
    asked = ["query", "Lisbon lies on the", " Tagus", "-k", 5, "--exact", "--bm25", "--json"]
    found, expected = (influence(asked[0], place, *asked[1:]).json for place in (run.directory.path, finished))
    assert [one["id"] for one in found["results"]] == [one["id"] for one in expected["results"]]
    assert [one["text"] for one in found["results"]] == [one["text"] for one in expected["results"]]
    assert [one["bm25_rank"] for one in found["results"]] == [one["bm25_rank"] for one in expected["results"]]
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "new", "text": "Zagreb lies on the Sava.", "source": "new"}])
    assert influence("append", run.directory.path, more).status == 0
    best = influence("query", run.directory.path, "Zagreb lies on the", " Sava", "-k", 1, "--exact", "--bm25", "--json").json
    assert best["bm25"]["results"][0]["text"] == "Zagreb lies on the Sava."
    kept = b"".join(path.read_bytes() for path in (run.directory.path / "sequences").rglob("*.parquet"))
    assert b"Zagreb lies" not in kept


MEASURE = """
import resource, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from influence.config import DataConfig
from influence.documents import data_fingerprint, read_documents
from influence.sequences import tokenize, write_sequences

data, model, out, documents = sys.argv[1:]
config = DataConfig(files=data, sequence_length=256, documents=documents, keep_text=False, metadata=["source"])
words = PreTrainedTokenizerFast.from_pretrained(model)
data_fingerprint(config)
write_sequences(Path(out), tokenize(read_documents(config), words, config), 512, keep_text=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def large(path: Path, num_bytes: int) -> Path:
    """Documents of some five thousand characters each, compressed."""
    words, written, chance = [row["text"] for row in documents()], 0, random.Random(0)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as stream:
        while written < num_bytes:
            text = " ".join(chance.choices(words, k=80))
            written += stream.write(json.dumps({"text": text, "source": chance.random()}) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["split", "pack"])
def test_memory_does_not_grow_with_the_data_and_no_copy_is_written(cut: str, world: World, tmp_path: Path) -> None:
    peaks, sizes = [], []
    for name, size in (("small", 2 * 2**20), ("large", 12 * 2**20)):
        data = large(tmp_path / f"{name}.jsonl.gz", size)
        out, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
        out.mkdir()
        scratch.mkdir()
        environment: dict[str, Any] = {**os.environ, "TMPDIR": str(scratch), "HF_HOME": str(scratch), "TOKENIZERS_PARALLELISM": "false"}
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, data, world.model, out, cut], env=environment, capture_output=True, text=True, check=True
        )
        peaks.append(int(found.stdout))
        sizes.append(sum(path.stat().st_size for path in out.rglob("*.parquet")))
        assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) < 2**20
    # 10 MiB more of text are some 4 million tokens, 14 MiB of them, in 14,000 sequences, of which the ids stay in memory (110 bytes each)
    assert peaks[1] - peaks[0] < 8 * 2**20, peaks
    assert sizes[1] < 12 * 2**20, sizes
