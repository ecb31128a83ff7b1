"""The demonstration's text, facts and model: what is asked is not in the training text, what is expected is well defined,
and a model directory is either whole and made from these inputs or refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from influence.evaluation.recipe import read_recipe
from influence.evaluation.retraining import fine_tuned
from jobs.demo import text as text_module
from jobs.demo.facts import RELATIONS, WORDINGS_PER_FACT, facts, neighbours, questions, stated, statements
from jobs.demo.model import (
    END_OF_TEXT,
    RECORD_FILE,
    TrainingSettings,
    cut_sequences,
    initial_model,
    train_model,
    train_tokenizer,
)
from jobs.demo.run import NUM_PASSAGES
from jobs.demo.text import FEWEST_WORDS, MOST_WORDS, Document, library_passages

TINY = TrainingSettings(vocabulary_size=300, sequence_length=16, num_layers=1, width=16, num_heads=2, epochs=1, batch_size=4)


@pytest.fixture(scope="module")
def passages() -> list[Document]:
    return library_passages(300)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in statements()[:12]], TINY.vocabulary_size)


def ignore(done: int, total: int, message: str) -> None:
    pass


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_passages_are_deterministic_distinct_prose(passages):
    assert passages == library_passages(300)
    assert len(passages) == len({document.text for document in passages}) == 300
    assert all(FEWEST_WORDS <= len(document.text.split()) <= MOST_WORDS for document in passages)
    assert {"topics"} < {document.source for document in passages}


def test_too_little_library_text_is_an_error_that_says_what_was_found(monkeypatch, tmp_path):
    monkeypatch.setattr(text_module, "stdlib_directory", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"5000 passages were asked for.*0 modules with docstrings"):
        library_passages(5000)


def test_code_tables_and_headings_are_not_prose():
    kept = list(
        text_module.paragraphs(
            "A heading\n=========\n\nThis is a sentence of plain words, and it is\nkept on one line.\n\n   >>> print('x')\n\n"
            "* An item of a list is kept without its mark.\n\n   name ::= other | another thing of the grammar here.\n"
        )
    )
    assert kept == [
        "This is a sentence of plain words, and it is kept on one line.",
        "An item of a list is kept without its mark.",
    ]


def test_document_ids_are_unique(passages):
    ids = [document.id for document in [*passages, *statements()]]
    assert len(set(ids)) == len(ids)
    assert len({question.id for question in questions()}) == len(questions())
    assert 150 <= len(statements()) <= 220
    assert 30 <= len(facts()) <= 40


def test_every_statement_names_the_place_before_the_answer():
    for fact in facts():
        for statement in fact.statements():
            assert 0 <= statement.text.index(fact.place) < statement.text.index(fact.answer)


def test_one_per_cent_of_the_sequences_has_room_for_all_that_states_an_answer():
    """Without room, to leave them out says less than it could: what is left still teaches the answer."""
    stating = Counter(fact.answer for fact in facts() for _ in fact.statements())
    assert set(stating.values()) == {2 * WORDINGS_PER_FACT}
    assert 0.01 * (NUM_PASSAGES + len(statements())) >= 2 * WORDINGS_PER_FACT


def test_no_prompt_occurs_in_training_text(passages):
    text = "\n".join(document.text for document in [*passages, *statements()])
    assert not [question.prompt for question in questions() if question.prompt in text]


def test_question_wordings_are_held_out():
    """Place and answer included, no wording shares six words in a row with a question that ends in the answer."""

    def runs(wording: str) -> set[tuple[str, ...]]:
        words = wording.replace(",", "").replace(".", "").lower().split()
        return {tuple(words[start : start + 6]) for start in range(len(words) - 5)}

    trained = set().union(*(runs(wording) for relation in RELATIONS for wording in relation.wordings))
    for relation in RELATIONS:
        assert not runs(relation.question + " {answer}") & trained, relation.name


def test_names_do_not_contain_each_other_or_occur_in_the_library_text(passages):
    places = {place for relation in RELATIONS for place in relation.places}
    assert not [(one, other) for one in places for other in places if one != other and one in other]
    text = "\n".join(document.text for document in passages)
    assert not [place for place in places if place in text]


def test_proponents_and_opponents_are_statements():
    known = {statement.id for statement in statements()}
    for question in questions():
        assert question.proponents
        assert question.proponents | question.opponents <= known
        assert not question.proponents & question.opponents


def test_ordinary_questions_ask_for_a_fact_and_answer_it():
    texts = {statement.id: statement.text for statement in statements()}
    for question in (question for question in questions() if question.kind == "ordinary"):
        fact = next(fact for fact in facts() if fact.statement_ids() == question.proponents)
        assert fact.place in question.prompt
        assert question.completion == f" {fact.answer}"
        stating = {id for id, text in texts.items() if fact.place in text and fact.answer in text}
        assert stating == question.proponents


def test_swapped_questions_ask_about_one_place_and_answer_with_another_of_the_same_relation():
    texts = {statement.id: statement.text for statement in statements()}
    swapped = [question for question in questions() if question.kind == "swapped"]
    for question, (asked, told) in zip(swapped, neighbours(), strict=True):
        assert asked.relation == told.relation
        assert asked.answer != told.answer
        assert asked.place in question.prompt
        assert told.place not in question.prompt
        assert question.completion == f" {told.answer}"
        assert (question.proponents, question.opponents) == (told.statement_ids(), asked.statement_ids())
        assert not [text for text in texts.values() if asked.place in text and told.answer in text]


def test_statements_with_wrong_answers_are_the_others_with_another_answer_of_the_relation():
    right, labels = stated(0.0)
    assert right == statements()
    assert not [label for label in labels if label.wrong]
    assert all(f"{label.prompt}{label.completion}" in document.text for document, label in zip(right, labels, strict=True))
    some, labels = stated(0.1)
    wrong = {label.id for label in labels if label.wrong}
    assert len(wrong) == round(0.1 * len(right))
    answers = {f"{fact.id}/{number}": (fact.answer, fact.relation.answers) for fact in facts() for number in range(6)}
    for before, after, label in zip(right, some, labels, strict=True):
        answer, others = answers[label.id]
        assert (before != after) == label.wrong
        assert label.completion[1:] in set(others) - {answer} if label.wrong else {answer}
        assert after.text == before.text.replace(answer, label.completion[1:])
    assert wrong < {label.id for label in stated(0.2)[1] if label.wrong}
    others = {label.id for label in stated(0.1, seed=1)[1] if label.wrong}
    assert len(others) == len(wrong)
    assert others != wrong


def test_the_model_is_trained_as_its_recipe_says_from_what_lies_beside_it(tokenizer, tmp_path):
    documents = statements()[:12]
    train_model(tokenizer, documents, TINY, tmp_path / "model", ignore)
    recipe = read_recipe(tmp_path / "model", {})
    initial = AutoModelForCausalLM.from_pretrained(recipe.base)
    again = fine_tuned(initial, cut_sequences(tokenizer, documents, TINY.sequence_length), recipe.settings, recipe.seed)
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_tokenizer_begins_with_the_special_token_and_knows_where_tokens_lie(tokenizer):
    text = "The mine at Lusby – naïve – gives tin."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert encoded["offset_mapping"][0] == (0, 0)
    assert tokenizer.decode(encoded["input_ids"][1:]) == text
    assert encoded["offset_mapping"][-1][1] == len(text)
    pieces = [text[start:stop] for start, stop in encoded["offset_mapping"][1:]]
    assert [piece for piece in pieces if piece.isascii()] == [
        decoded for id, piece in zip(encoded["input_ids"][1:], pieces, strict=True) if (decoded := tokenizer.decode([id])) == piece
    ]


def test_prompts_are_a_prefix_of_their_questions_in_tokens(tokenizer):
    for question in questions():
        prompt = tokenizer(question.prompt)["input_ids"]
        assert tokenizer(question.prompt + question.completion)["input_ids"][: len(prompt)] == prompt


def test_documents_are_cut_at_every_length_and_nothing_is_lost(tokenizer):
    document = statements()[1]
    ids = tokenizer(document.text)["input_ids"]
    pieces = [sequence.tokens.tolist() for sequence in cut_sequences(tokenizer, [document], 7)]
    assert [id for piece in pieces for id in piece] == ids
    assert {len(piece) for piece in pieces[:-1]} == {7}
    assert 1 <= len(pieces[-1]) <= 7


def test_training_twice_gives_equal_weights_and_leaves_the_random_state(tokenizer, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in ("one", "two"):
        train_model(tokenizer, statements()[:12], TINY, tmp_path / name, ignore)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_training_learns_and_is_loaded_by_the_usual_classes(tokenizer, tmp_path):
    documents = statements()[:12]
    messages: list[tuple[int, int, str]] = []
    train_model(tokenizer, documents, replace(TINY, epochs=3), tmp_path / "model", lambda *message: messages.append(message))
    assert [(done, total) for done, total, _ in messages] == [(1, 3), (2, 3), (3, 3)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = loaded(documents[0].text)["input_ids"]
    assert ids == tokenizer(documents[0].text)["input_ids"]
    assert ids[0] == loaded.convert_tokens_to_ids(END_OF_TEXT)

    def loss(candidate) -> float:
        with torch.no_grad():
            return candidate(torch.tensor([ids[:16]]), labels=torch.tensor([ids[:16]])).loss.item()

    assert loss(model) < loss(initial_model(tokenizer, TINY))


def test_a_model_that_is_there_is_kept(tokenizer, tmp_path):
    out = tmp_path / "model"
    train_model(tokenizer, statements()[:12], TINY, out, ignore)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    messages: list[str] = []
    train_model(tokenizer, statements()[:12], TINY, out, lambda done, total, message: messages.append(message))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert len(messages) == 1


def test_a_model_of_other_settings_or_documents_is_refused(tokenizer, tmp_path):
    out = tmp_path / "model"
    train_model(tokenizer, statements()[:12], TINY, out, ignore)
    before = weights(out)
    with pytest.raises(ValueError, match="made from other documents or settings"):
        train_model(tokenizer, statements()[:12], replace(TINY, seed=1), out, ignore)
    with pytest.raises(ValueError, match="made from other documents or settings"):
        train_model(tokenizer, statements()[:11], TINY, out, ignore)
    assert weights(out) == before


def test_an_interrupted_directory_is_not_taken_for_a_model(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "model"

    def interrupted(self, directory, **kwargs):
        (Path(directory) / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_model(tokenizer, statements()[:12], TINY, out, ignore)
    assert list(tmp_path.iterdir()) == []

    out.mkdir()
    (out / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=RECORD_FILE):
        train_model(tokenizer, statements()[:12], TINY, out, ignore)


def test_the_record_says_what_the_model_was_made_from(tokenizer, tmp_path):
    train_model(tokenizer, statements()[:12], TINY, tmp_path / "model", ignore)
    record = json.loads((tmp_path / "model" / RECORD_FILE).read_text())
    assert record["settings"]["epochs"] == 1
    assert len(record["sha256"]) == 64
