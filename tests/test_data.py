"""The same documents give the same sequences, whatever file they come in; and cutting them to length loses nothing."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from small_run import END, documents, tokenizer, write_jsonl

from influence.config import DataConfig
from influence.documents import read_documents
from influence.errors import RequestError
from influence.sequences import SequenceStore, TrainingSequence, encode_pair, tokenize, write_sequences

ROWS = [
    {"id": "first", "text": 'Commas, "quotes" and\ttabs.', "year": 1999},
    {"id": "second", "text": "Two lines:\nthe second — with a dash and 日本語.", "year": 2001},
    *({"id": row["id"], "text": row["text"], "year": 1900 + number} for number, row in enumerate(documents()[:8])),
]
TABLE = pa.Table.from_pylist(ROWS)


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer(row["text"] for row in documents())


def config(path: Path | list[Path], **settings: Any) -> DataConfig:
    names = [str(one) for one in path] if isinstance(path, list) else str(path)
    return DataConfig(files=names, **{"sequence_length": 16, **settings})


def sequences(words: Any, path: Path | list[Path], **settings: Any) -> list[TrainingSequence]:
    chosen = config(path, **settings)
    return list(tokenize(read_documents(chosen), words, chosen))


def content(found: list[TrainingSequence], ids: bool = True) -> list[tuple[Any, ...]]:
    return [(s.id if ids else None, s.tokens.tolist(), s.counted.tolist(), s.text, s.metadata) for s in found]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text", "year"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path, new: Callable[..., Any]) -> None:
    with path.open("wb") as sink, new(sink, TABLE.schema) as writer:
        for batch in TABLE.to_batches(max_chunksize=3):
            writer.write_batch(batch)


def save_to_disk(path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    write_arrow(path / "cache-0123456789abcdef.arrow", pa.ipc.new_stream)  # what `map` leaves there is no part of the data set


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


FORMATS: dict[str, Callable[[Path], Any]] = {
    "train.json": lambda path: write_jsonl(path, ROWS),
    "train.jsonl.gz": gzipped,
    "bom.jsonl": lambda path: path.write_text("\ufeff\n" + "\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8"),
    "train.csv": lambda path: write_csv(path, ","),
    "train.tsv": lambda path: write_csv(path, "\t"),
    "train.parquet": lambda path: pa.parquet.write_table(TABLE, path, row_group_size=3),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "saved": save_to_disk,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_table_of_the_same_rows_gives_the_same_sequences(name: str, words: Any, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    expected = sequences(words, write_jsonl(tmp_path / "plain.jsonl", ROWS), metadata=["year"])
    found = sequences(words, tmp_path / name, metadata=["year"])
    if name.endswith("sv"):  # text has no numbers
        found = [TrainingSequence(**{**vars(s), "metadata": {"year": int(s.metadata["year"])}}) for s in found]
    assert content(found) == content(expected)
    assert {s.document: s.metadata for s in found} == {row["id"]: {"year": row["year"]} for row in ROWS}


@pytest.mark.parametrize(("sample_by", "between"), [("line", "\n"), ("line", "\r\n"), ("paragraph", "\n\n"), ("paragraph", "\r\n\r\n")])
def test_text_files_give_the_same_sequences_but_for_their_ids(sample_by: str, between: str, words: Any, tmp_path: Path) -> None:
    rows = [row for row in ROWS if sample_by == "paragraph" or "\n" not in row["text"]]
    (tmp_path / "train.txt").write_text(between.join([*(row["text"] for row in rows), ""]), encoding="utf-8", newline="")
    expected = sequences(words, write_jsonl(tmp_path / "train.jsonl", rows))
    found = sequences(words, tmp_path / "train.txt", sample_by=sample_by)
    assert content(found, ids=False) == content(expected, ids=False)
    assert list(dict.fromkeys(s.document for s in found)) == [str(number) for number in range(len(rows))]


def test_text_by_document_is_one_document_a_file_in_the_order_of_the_glob(words: Any, tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number:02d}.md").write_text(row["text"], encoding="utf-8")
    expected = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS))
    assert content(sequences(words, tmp_path / "*.md", sample_by="document"), ids=False) == content(expected, ids=False)


def test_files_are_read_in_the_order_they_are_given(words: Any, tmp_path: Path) -> None:
    parts = [write_jsonl(tmp_path / f"{n}.jsonl", ROWS[n::2]) for n in (0, 1)]
    found = sequences(words, parts[::-1], documents="truncate")
    assert [s.id for s in found] == [row["id"] for row in [*ROWS[1::2], *ROWS[0::2]]]


def test_long_csv_fields_are_read_whole(words: Any, tmp_path: Path) -> None:
    text = "Lisbon lies on the Tagus. " * 8000
    (tmp_path / "train.csv").write_text(f"id,text\n1,{text}\n")
    assert next(read_documents(config(tmp_path / "train.csv"))).text == text


# what is counted


def test_text_counts_every_token_but_the_first_of_a_sequence(words: Any, tmp_path: Path) -> None:
    for sequence in sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS)):
        assert sequence.counted.tolist() == [False] + [True] * (len(sequence.tokens) - 1)


def test_pairs_count_the_completion_alone(words: Any, tmp_path: Path) -> None:
    rows = [{"p": "The river in Lisbon", "c": " is the Tagus."}, {"p": "", "c": "Oslo"}, {"p": "Nothing follows", "c": ""}]
    found = sequences(words, write_jsonl(tmp_path / "train.jsonl", rows), prompt="p", completion="c", sequence_length=64)
    for row, sequence in zip(rows, found, strict=True):
        counted = sequence.tokens[sequence.counted].tolist()
        assert words.decode(sequence.tokens) == row["p"] + row["c"]
        completion = [token for token, inside in zip(*encode_pair(words, row["p"], row["c"]), strict=True) if inside]
        assert counted == (completion[1:] if not row["p"] else completion)
        assert words.decode(completion) == row["c"]


def test_token_ids_are_taken_as_they_are(words: Any, tmp_path: Path) -> None:
    ids = [words(row["text"])["input_ids"] for row in ROWS]
    expected = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS))
    as_lists = write_jsonl(tmp_path / "ids.jsonl", [{"id": row["id"], "ids": one} for row, one in zip(ROWS, ids, strict=True)])
    pa.parquet.write_table(pa.table({"id": [row["id"] for row in ROWS], "ids": ids}), tmp_path / "ids.parquet")
    (tmp_path / "ids.csv").write_text("id,ids\n" + "".join(f'{row["id"]},"{one}"\n' for row, one in zip(ROWS, ids, strict=True)))
    for path in (as_lists, tmp_path / "ids.parquet", tmp_path / "ids.csv"):
        found = sequences(words, path, input_ids="ids")
        assert [(s.id, s.tokens.tolist(), s.counted.tolist()) for s in found] == [
            (s.id, s.tokens.tolist(), s.counted.tolist()) for s in expected
        ]


# cutting


@pytest.mark.parametrize("length", [2, 7, 16, 1000])
def test_split_loses_no_token_and_no_letter(length: int, words: Any, tmp_path: Path) -> None:
    found = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS), sequence_length=length)
    for row in ROWS:
        tokens = words(row["text"])["input_ids"]
        chunks = [s for s in found if s.document == row["id"]]
        assert np.concatenate([s.tokens for s in chunks]).tolist() == tokens
        assert [s.id for s in chunks] == ([f"{row['id']}:{n}" for n in range(len(chunks))] if len(chunks) > 1 else [row["id"]])
        assert all(len(s.tokens) == length for s in chunks[:-1])
        assert all(s.text in row["text"] for s in chunks)
        if row["text"].isascii():  # otherwise two chunks may share a character whose bytes are different tokens
            assert "".join(s.text for s in chunks) == row["text"]
            assert [words.decode(s.tokens) for s in chunks] == [s.text for s in chunks]


def test_truncate_keeps_the_beginning_of_each_document(words: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    found = sequences(words, path, documents="truncate", sequence_length=7)
    split = {s.document: s for s in reversed(sequences(words, path, sequence_length=7))}
    assert [s.id for s in found] == [row["id"] for row in ROWS]
    for sequence in found:
        assert sequence.tokens.tolist() == split[sequence.document].tokens.tolist()
        assert sequence.text == split[sequence.document].text


def test_pack_joins_documents_to_full_sequences_without_loss(words: Any, tmp_path: Path) -> None:
    found = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS), documents="pack", sequence_length=7)
    end = words.convert_tokens_to_ids(END)
    expected = [token for row in ROWS for token in [*words(row["text"])["input_ids"], end]]
    assert np.concatenate([s.tokens for s in found]).tolist() == expected
    assert {len(s.tokens) for s in found[:-1]} == {7}
    assert [s.id for s in found] == [f"packed-{n}" for n in range(len(found))]
    assert list(dict.fromkeys(name for s in found for name in s.metadata["documents"])) == [row["id"] for row in ROWS]


def test_pack_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    words = tokenizer(["a b"])
    words.eos_token = None
    with pytest.raises(RequestError, match="joins documents by the end-of-text token, and this tokenizer has none; take split or truncate"):
        sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS), documents="pack")


# keeping


@pytest.mark.parametrize("per_shard", [1, 3, 1000])
def test_store_gives_back_what_was_written_whatever_the_shard_size(per_shard: int, words: Any, tmp_path: Path) -> None:
    expected = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS), metadata=["year"])
    write_sequences(tmp_path, expected, per_shard)
    store = SequenceStore(tmp_path)
    assert content(list(store)) == content(expected)
    assert content([store[number] for number in range(len(store))]) == content(expected)
    assert store.ids == [s.id for s in expected]
    assert store.num_shards == -(-len(expected) // per_shard)
    with pytest.raises(IndexError):
        store[len(store)]


def test_sequences_without_counted_tokens_are_left_out_and_named(words: Any, tmp_path: Path) -> None:
    rows = [{"id": "one", "text": "x"}, *ROWS, {"id": "none", "text": ""}]
    write_sequences(tmp_path, sequences(words, write_jsonl(tmp_path / "train.jsonl", rows), sequence_length=64), 4)
    store = SequenceStore(tmp_path)
    assert store.ids == [row["id"] for row in ROWS]
    assert store.summary["left_out"] == ["one"]
    assert store.summary["counted_tokens"] == sum(int(s.counted.sum()) for s in store)
    assert store.summary["tokens"] == sum(len(s.tokens) for s in store)


# refused


BROKEN = [
    ("a.csv", b"id,text\n1\n", "a.csv, line 2: expected 2 columns"),
    ("a.csv", b"id,text\n1,x,y\n", "a.csv, line 2: expected 2 columns"),
    ("a.csv", b'id,text\n1,"x\n', "a.csv is not valid csv: unexpected end of data"),
    ("a.csv", b"id,text\n1,\xff\n", "a.csv is not valid csv: 'utf-8' codec can't decode"),
    ("a.csv", b"id,words\n1,x\n", "a.csv, row 0: no column 'text'; there are: id, words"),
    ("a.csv.gz", b"garbage", "a.csv.gz is not valid csv: Not a gzipped file"),
    ("a.csv.gz", gzip.compress(b"id,text\n" + bytes(range(48, 90)) * 50, mtime=0)[:-12], "a.csv.gz is not valid csv: Compressed file ended"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl cannot be read as text: 'utf-8' codec can't decode"),
    ("a.jsonl.gz", b"garbage", "a.jsonl.gz cannot be read as text: Not a gzipped file"),
    ("a.txt", b"\xff\xfe", "a.txt cannot be read as text: 'utf-8' codec can't decode"),
    ("a.txt.gz", gzip.compress(b"Lisbon lies. " * 50, mtime=0)[:-12], "a.txt.gz cannot be read as text: Compressed file ended"),
    ("a.parquet", b"garbage", "a.parquet is not a whole parquet file"),
    ("a.parquet", b"", "a.parquet is not a whole parquet file"),
    ("a.arrow", b"garbage", "a.arrow is not a whole arrow file"),
    ("a.arrow", b"", "a.arrow is not a whole arrow file"),
    ("a.xyz", b"text", "a.xyz: files of type .xyz are not read; known are .jsonl, .json, .csv"),
    ("a", b"text", "a: files of type (none) are not read; known are .jsonl"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_broken_file_is_refused_by_its_name(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError) as refusal:
        list(read_documents(config(tmp_path / name)))
    assert f"{tmp_path}/{message}" in str(refusal.value)


def test_half_a_parquet_file_is_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(TABLE, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="is not a whole parquet file"):
        list(read_documents(config(tmp_path / "a.parquet")))


def test_half_an_arrow_stream_is_refused(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_stream)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="is not a whole arrow file"):
        list(read_documents(config(tmp_path / "a.arrow")))
