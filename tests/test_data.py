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
from influence.sequences import SequenceStore, TrainingSequence, encode_pair, tokenize, write_erased, write_sequences

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
    return [
        (
            s.id if ids else None,
            s.tokens.tolist(),
            s.counted.tolist(),
            s.text,
            s.metadata,
            [{**vars(part), "document": part.document if ids else None} for part in s.parts],
            None if s.starts is None else s.starts.tolist(),
            s.weight,
        )
        for s in found
    ]


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


def zstandard(path: Path) -> None:
    """As shards of corpora are: frames one after another."""
    lines = [json.dumps(row) + "\n" for row in ROWS]
    path.write_bytes(b"".join(pa.compress("".join(some).encode(), "zstd", asbytes=True) for some in (lines[:3], lines[3:])))


FORMATS: dict[str, Callable[[Path], Any]] = {
    "train.json": lambda path: write_jsonl(path, ROWS),
    "train.jsonl.gz": gzipped,
    "train.jsonl.zst": zstandard,
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


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_of_a_long_file_are_those_of_the_whole(end: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pieces = ["a" * length + end * breaks for length, breaks in generator.integers(0, [4000, 5], (1500, 2))]
    (tmp_path / "train.txt").write_text("".join(pieces), newline="")  # three blocks of a mebibyte
    expected = [one for one in "".join(pieces).replace("\r\n", "\n").split("\n\n") if one.strip()]
    assert [one.text for one in read_documents(config(tmp_path / "train.txt", sample_by="paragraph"))] == expected


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


PADDED = {"ids": [0, 0, 5, 6, 7, 8], "mask": [0, 0, 1, 1, 1, 1]}


def test_padding_is_taken_away_on_either_side(words: Any, tmp_path: Path) -> None:
    rows = [
        PADDED,
        {"ids": PADDED["ids"][::-1], "mask": PADDED["mask"][::-1]},
        {"ids": [9, 10], "mask": [True, True]},
        {"ids": [3], "mask": [0]},
    ]
    found = sequences(words, write_jsonl(tmp_path / "a.jsonl", rows), input_ids="ids", attention_mask="mask")
    assert [s.tokens.tolist() for s in found] == [[5, 6, 7, 8], [8, 7, 6, 5], [9, 10]]


def test_labels_and_masks_say_what_is_counted(words: Any, tmp_path: Path) -> None:
    rows = [{**PADDED, "labels": [-100, -100, -100, 6, -100, 8], "mine": [0, 0, 1, 1, 0, 1]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for column in ({"labels": "labels"}, {"counted": "mine"}):
        (found,) = sequences(words, path, input_ids="ids", attention_mask="mask", **column)
        assert found.counted.tolist() == [False, True, False, True]
        first, second = sequences(words, path, input_ids="ids", attention_mask="mask", sequence_length=3, **column)
        assert [first.counted.tolist(), second.counted.tolist()] == [[False, True, False], [False]]
        assert (second.parts[0].characters, second.parts[0].window, second.parts[0].windows) == (None, 2, 2)


WRONG_ROWS = [
    ({}, {"ids": [5, 320]}, "token id 320 is not one of the 320 that the tokenizer knows, 0 to 319"),
    ({}, {"ids": [5, -1]}, "column 'ids' must hold a list of token ids"),
    ({}, {"ids": [5, 1.5]}, "column 'ids' must hold a list of token ids"),
    ({}, {"ids": None}, "column 'ids' must hold a list"),
    ({}, {"other": [1]}, "no column 'ids'; there are: other"),
    (
        {"labels": "l"},
        {"ids": [5, 6], "l": [6, -100]},
        "column 'l' holds 6 at token 0, which is 5: a label is the token itself, not shifted",
    ),
    ({"labels": "l"}, {"ids": [5, 6], "l": [5]}, "column 'l' has 1 values for 2 token ids"),
    ({"counted": "c"}, {"ids": [5, 6], "c": [1, 2]}, "column 'c' must hold 1 or 0 for each token, not 2"),
    (
        {"attention_mask": "m"},
        {"ids": [5, 6, 7], "m": [1, 0, 1]},
        "column 'm' is 0 between tokens: padding stands before a sequence or after it",
    ),
]


@pytest.mark.parametrize(("settings", "row", "message"), WRONG_ROWS)
def test_tokens_that_cannot_be_are_refused_by_file_and_row(settings: Any, row: Any, message: str, words: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"ids": [1, 2], "l": [1, 2], "c": [1, 1], "m": [1, 1]}, row])
    with pytest.raises(RequestError) as refusal:
        sequences(words, path, input_ids="ids", **settings)
    assert f"{path}, row 1: {message}" in str(refusal.value)


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


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_every_window_knows_its_document_and_the_characters_it_spans(length: int, words: Any, tmp_path: Path) -> None:
    texts = {row["id"]: row["text"] for row in ROWS}
    found = sequences(words, write_jsonl(tmp_path / "train.jsonl", ROWS), sequence_length=length)
    for name, text in texts.items():
        windows = [s for s in found if s.document == name]
        assert [s.parts[0].window for s in windows] == list(range(1, len(windows) + 1))
        for window in windows:
            (part,) = window.parts
            assert (part.document, part.first, part.end, part.windows) == (name, 0, len(window.tokens), len(windows))
            assert part.characters is not None
            assert text[slice(*part.characters)] == window.text
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"id": row["id"], "p": row["text"][:9], "c": row["text"][9:]} for row in ROWS])
    both = sequences(words, pairs, prompt="p", completion="c", sequence_length=length)
    assert [s.parts for s in both] == [s.parts for s in found]  # of prompt and completion together


@pytest.mark.parametrize(("length", "overlap"), [(7, 1), (7, 3), (16, 15), (1000, 4)])
def test_overlap_is_context_and_every_token_but_the_first_counts_once(length: int, overlap: int, words: Any, tmp_path: Path) -> None:
    rows = [*ROWS, *({"id": f"short-{n}", "text": "no" + " Nobody" * n} for n in range(8))]
    found = sequences(words, write_jsonl(tmp_path / "train.jsonl", rows), sequence_length=length, overlap=overlap)
    for row in rows:
        tokens, windows = words(row["text"])["input_ids"], [s for s in found if s.document == row["id"]]
        counts, place = np.zeros(len(tokens), dtype=int), 0
        for number, window in enumerate(windows):
            assert window.tokens.tolist() == tokens[place : place + length]
            assert (window.parts[0].window, window.parts[0].windows) == (number + 1, len(windows))
            counts[place : place + len(window.tokens)] += window.counted
            assert window.counted.any() or len(tokens) == 1
            place += length - overlap
        assert counts.tolist() == [0, *[1] * (len(tokens) - 1)]


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


def test_text_that_is_not_kept_is_decoded_from_the_tokens(words: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [row for row in ROWS if row["text"].isascii()])  # no window ends within a character
    for name, keep in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        write_sequences(tmp_path / name, sequences(words, path, keep_text=keep), 4, keep_text=keep)
    stored = pa.parquet.read_table(tmp_path / "without/part-00000.parquet")
    assert stored["text"].null_count == len(stored)
    store = SequenceStore(tmp_path / "without", decode=words.decode)
    assert content(list(store)) == content(list(SequenceStore(tmp_path / "with")))
    (tmp_path / "erased").mkdir()
    write_erased(tmp_path / "erased", tmp_path / "without", {0, 2}, keep_text=False)
    erased = SequenceStore(tmp_path / "erased", decode=words.decode)
    assert [s.text for s in erased] == ["" if number in (0, 2) else s.text for number, s in enumerate(store)]


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
    (
        "a.csv.gz",
        gzip.compress(b"id,text\n" + bytes(range(48, 90)) * 50, mtime=0)[:-12],
        "a.csv.gz is not valid csv: Compressed file ended",
    ),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl cannot be read as text: 'utf-8' codec can't decode"),
    ("a.jsonl.gz", b"garbage", "a.jsonl.gz cannot be read as text: Not a gzipped file"),
    ("a.txt", b"\xff\xfe", "a.txt cannot be read as text: 'utf-8' codec can't decode"),
    ("a.txt.gz", gzip.compress(b"Lisbon lies. " * 50, mtime=0)[:-12], "a.txt.gz cannot be read as text: Compressed file ended"),
    ("a.jsonl.zst", b"garbage", "a.jsonl.zst cannot be read as text: ZSTD decompress failed"),
    ("a.jsonl.zst", pa.compress(b'{"text": "x"}' * 99, "zstd", asbytes=True)[:-5], "a.jsonl.zst cannot be read as text: Truncated"),
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
