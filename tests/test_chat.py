"""Conversations as training data: the template's text, of which the assistant's turns alone are counted, and exactly these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from small_run import Influence, World, documents, run_pipeline, tokenizer, write_jsonl

from influence.answering import QueryOptions
from influence.chat import assistant_turns
from influence.config import DataConfig
from influence.documents import read_documents
from influence.errors import RequestError
from influence.run import open_run
from influence.sequences import TrainingSequence, tokenize

# As ChatML models write it: every turn alike, whatever follows.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same with transformers' own mark of what the assistant says, and with tools and calls of them.
MARKED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As Qwen3: a thought is shown in the last turn alone, so that earlier ones are written otherwise once another follows.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Where is Oslo — on which river?"},
    {"role": "assistant", "content": "On the Aker."},
    {"role": "tool", "content": '{"rain": 3}'},
    {"role": "assistant", "content": "It rains in café 日本."},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture
def words() -> Any:
    made = tokenizer(row["text"] for row in documents())
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def sequences(words: Any, path: Path, **settings: Any) -> list[TrainingSequence]:
    config = DataConfig(files=str(path), **{"messages": "messages", "sequence_length": 512, **settings})
    return list(tokenize(read_documents(config), words, config))


def counted_text(words: Any, sequence: TrainingSequence) -> str:
    return str(words.decode(sequence.tokens[sequence.counted]))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_assistants_turns_alone_are_counted(template: str, words: Any, tmp_path: Path) -> None:
    words.chat_template = template
    (found,) = sequences(words, write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    text = words.apply_chat_template(CHAT, tokenize=False)
    assert found.text == words.decode(found.tokens) == text
    end = "<|im_end|>\n" if template == PLAIN else "<|im_end|>"
    assert counted_text(words, found) == f"On the Aker.{end}It rains in café 日本.{end}"
    assert found.parts[0].characters == (0, len(text))


def test_marked_template_counts_the_tokens_that_transformers_does(words: Any, tmp_path: Path) -> None:
    words.chat_template = MARKED
    (found,) = sequences(words, write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    theirs = words.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert found.tokens.tolist() == theirs["input_ids"]
    assert found.counted.tolist() == [bool(one) for one in theirs["assistant_masks"]]


def test_two_ways_to_tell_the_turns_agree(words: Any) -> None:
    words.chat_template = PLAIN
    text, plain = assistant_turns(words, CHAT)
    words.chat_template = MARKED
    again, marked = assistant_turns(words, CHAT)
    assert again == text
    assert [(start, end - 1) for start, end in plain] == marked  # but for the line's end after the mark of the turn's


def test_tools_and_their_calls_are_written_by_the_template(words: Any, tmp_path: Path) -> None:
    words.chat_template = MARKED
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "rain", "arguments": {"place": "Oslo"}}}
    turns = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}, CHAT[4]]
    rows = [{"messages": turns, "tools": tools}, {"messages": CHAT[:3], "tools": None}]
    written = write_jsonl(tmp_path / "a.jsonl", rows)
    first, second = sequences(words, written, tools="tools")
    assert first.text.startswith("<|im_start|>system\n[{")
    assert "system\n[" not in second.text
    assert counted_text(words, first).startswith('<call>{"name": "rain", "arguments": {"place": "Oslo"}}</call><|im_end|>It rains')
    as_text = write_jsonl(
        tmp_path / "b.jsonl", [{"messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"] or [])} for row in rows]
    )
    # a table has every key in every row, null where the row does not have it
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": row["messages"]} for row in rows]), tmp_path / "c.parquet")
    assert [s.text for s in sequences(words, as_text, tools="tools")] == [first.text, second.text]
    without = [s.text for s in sequences(words, write_jsonl(tmp_path / "d.jsonl", [{"messages": row["messages"]} for row in rows]))]
    assert [s.text for s in sequences(words, tmp_path / "c.parquet")] == without


def test_template_that_writes_a_turn_otherwise_later_is_refused_by_row(words: Any, tmp_path: Path) -> None:
    words.chat_template = FORGETTING
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[:3]}, {"messages": CHAT}])
    with pytest.raises(RequestError) as refused:
        sequences(words, path)
    assert f"{path}, row 1: the chat template writes turn 3 otherwise once another follows it" in str(refused.value)
    (found,) = sequences(words, write_jsonl(path, [{"messages": CHAT[:3]}]))  # one turn, the last, is told exactly
    assert counted_text(words, found) == "<think>\n\n</think>\n\nOn the Aker.<|im_end|>\n"


def test_long_conversation_keeps_its_spans_in_every_window(words: Any, tmp_path: Path) -> None:
    words.chat_template = PLAIN
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "chat", "messages": CHAT}])
    (whole,) = sequences(words, path)
    windows = sequences(words, path, sequence_length=17)
    assert np.concatenate([s.tokens for s in windows]).tolist() == whole.tokens.tolist()
    assert [s.parts[0].windows for s in windows] == [len(windows)] * len(windows)
    for number, window in enumerate(windows):
        assert window.counted[1:].tolist() == whole.counted[17 * number + 1 : 17 * (number + 1)].tolist()


BAD = [
    ([], "must hold a list of objects"),
    ("hello", "must hold a list"),
    ([{"content": "x"}], "every turn has a role"),
    (CHAT[2:], "the conversation begins with the assistant, and where its words begin cannot be told from the text: put {% generation %}"),
    ([{"role": "user", "content": "half \ud83d"}], "half a character"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_conversation_of_another_form_is_refused_by_row(messages: Any, message: str, words: Any, tmp_path: Path) -> None:
    words.chat_template = PLAIN
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(RequestError, match=message) as refused:
        sequences(words, path)
    assert f"{path}, row 0: " in str(refused.value)


def test_run_on_conversations_answers_and_holds_to_its_template(influence: Influence, world: World, tmp_path: Path) -> None:
    own = world.copy(tmp_path)
    rows = [
        {"id": row["id"], "chat": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": row["text"]}]}
        for row in documents()
    ]
    data = {"files": str(write_jsonl(tmp_path / "chat.jsonl", rows)), "messages": "chat", "metadata": []}
    arguments = [
        "run",
        "--model",
        own.model,
        "--data",
        data["files"],
        "--messages",
        "chat",
        "--sequence-length",
        32,
        "--out",
        tmp_path / "run",
    ]
    influence(*arguments).says("the tokenizer has no chat template, so messages cannot be written as text: give prompt and completion")
    template = own.model / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run = run_pipeline(own.settings(tmp_path / "run", data=data, index={"recall_queries": 0}))
    (answer,) = run.answer(
        [run.measure_messages([{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "Lisbon"}])],
        QueryOptions(k=1, exact=True),
    )
    shown = answer.sequences[0]
    assert shown.documents[0]["id"] == shown.id.split(":")[0]
    written = {row["id"]: f"user: Tell me.\nassistant: {row['chat'][1]['content']}\n" for row in rows}
    assert written[shown.documents[0]["id"]][slice(*shown.documents[0]["span"])] == shown.text
    template.write_text(template.read_text().replace(": ", " - "))
    again = open_run(tmp_path / "run")
    with pytest.raises(RequestError, match=r"the tokenizer at .* is not the one"):
        again.query("Lisbon", " Tagus")
