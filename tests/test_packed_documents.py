"""Packed documents that do not see each other: everything equals what the documents give alone, and answers name them."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model
from small_run import END, POSITIONS, World, documents, run_pipeline, tokenizer, write_jsonl
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from ekfac import (
    SequenceBatch,
    attributable_layers,
    capture,
    covariance_pass,
    gauss_newton_product,
    inner_products,
    reached_positions,
    token_loss_derivatives,
    token_losses,
    true_label_loss,
)
from influence.attribution import query_gradients, score_sequences, solve
from influence.batches import collate
from influence.config import DataConfig
from influence.documents import read_documents
from influence.errors import RequestError
from influence.model import LanguageModel, check_takes_documents_apart
from influence.report import words
from influence.result import InfluenceResult, report_page
from influence.run import Run, open_run
from influence.sequences import TrainingSequence, tokenize
from influence.service.bodies import SequenceFacts
from influence.service.catalog import OpenedRun, sequence_facts
from jobs.living import append, erase, remove

CPU = torch.device("cpu")
LENGTHS = ((4, 1, 3, 5), (2, 6), (7,))  # of the documents in three sequences, which are of unequal length


def packed_and_alone(separate: bool = True) -> tuple[SequenceBatch, SequenceBatch, list[int]]:
    """A batch of packed sequences, the documents in them as sequences of their own, and in which sequence each document is."""
    generator = np.random.default_rng(0)
    packed, alone, owners = [], [], []
    for row, lengths in enumerate(LENGTHS):
        tokens = generator.integers(1, VOCABULARY, sum(lengths)).astype(np.int32)
        begins = np.cumsum((0, *lengths[:-1]))
        counted = np.ones(len(tokens), dtype=np.bool_)
        counted[begins] = False
        counted[2] &= row != 1  # one that a prompt keeps from counting
        packed.append(sequence(f"p{row}", tokens, counted, begins[1:] if separate else None))
        for begin, length in zip(begins, lengths, strict=True):
            own = slice(begin, begin + length)
            alone.append(sequence(f"p{row}/{begin}", tokens[own], counted[own], None))
            owners.append(row)
    return collate(packed, CPU), collate(alone, CPU), owners


def sequence(name: str, tokens: Any, counted: Any, starts: Any) -> TrainingSequence:
    return TrainingSequence(id=name, document=name, tokens=tokens, counted=counted, text="", metadata={}, starts=starts)


def tolerance(architecture: str) -> float:
    return 1e-9 if architecture in ("gpt2", "neox", "phi") else 1e-5  # the norms of the others compute in float32


def test_losses_are_those_of_the_documents_alone(architecture: str) -> None:
    model, (packed, alone, owners) = tiny_model(architecture), packed_and_alone()
    with torch.no_grad():
        found, expected = token_losses(model, packed), token_losses(model, alone)
    for row, lengths in enumerate(LENGTHS):
        own = [expected[place, :length] for place, length in zip(np.flatnonzero(np.array(owners) == row), lengths, strict=True)]
        torch.testing.assert_close(found[row, : sum(lengths)], torch.cat(own), rtol=tolerance(architecture), atol=tolerance(architecture))
        assert not found[row, sum(lengths) :].any()


def test_without_segments_documents_see_what_is_before_them() -> None:
    model, (packed, _, _), (joined, _, _) = tiny_model("gpt2"), packed_and_alone(), packed_and_alone(separate=False)
    with torch.no_grad():
        found, other = token_losses(model, packed)[0, :4], token_losses(model, joined)[0, :4]
        torch.testing.assert_close(found, other)
        assert (token_losses(model, packed) - token_losses(model, joined))[0, 5:].abs().max() > 0.01


def test_gradients_and_covariances_are_sums_over_the_documents(architecture: str) -> None:
    model, (packed, alone, owners) = tiny_model(architecture), packed_and_alone()
    layers = attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 6)[None], use_cache=False)).layers
    generator = torch.Generator().manual_seed(1)
    vectors = {layer.name: torch.randn((1, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}

    def products(batch: SequenceBatch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        capture(
            model,
            layers,
            partial(true_label_loss, model, batch),
            batch.reached,
            lambda layer, record: found.update({layer.name: inner_products(record, vectors[layer.name])[0]}),
        )
        return found

    near = {"rtol": tolerance(architecture), "atol": 1e-5 if tolerance(architecture) > 1e-9 else 1e-9}
    expected = products(alone)
    for name, found in products(packed).items():
        torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64).index_add(0, torch.tensor(owners), expected[name]), **near)
    passes = [covariance_pass(model, layers, [batch], true_label_loss, reached_positions) for batch in (packed, alone)]
    for name, covariance in passes[0].items():
        assert int(covariance.num_positions) == int(passes[1][name].num_positions)
        torch.testing.assert_close(covariance.total, passes[1][name].total, **near)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_curvature_and_derivatives_are_those_of_the_documents(architecture: str) -> None:
    model, (packed, alone, owners) = tiny_model(architecture), packed_and_alone()
    layers = attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 6)[None], use_cache=False), ["*.0.*"]).layers
    generator = torch.Generator().manual_seed(2)
    vectors = {layer.name: torch.randn((2, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}
    found, expected = gauss_newton_product(model, layers, packed, vectors), gauss_newton_product(model, layers, alone, vectors)
    for name in vectors:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    one = {name: vector[0] for name, vector in vectors.items()}
    shares, own = (token_loss_derivatives(model, layers, batch, one) for batch in (packed, alone))
    torch.testing.assert_close(
        shares.sum(1), torch.zeros(3, dtype=torch.float64).index_add(0, torch.tensor(owners), own.sum(1)), rtol=1e-5, atol=1e-5
    )


def test_model_that_cannot_keep_documents_apart_is_refused(architecture: str) -> None:
    check_takes_documents_apart(LanguageModel(model=tiny_model(architecture), tokenizer=None))
    check_takes_documents_apart(LanguageModel(model=tiny_model(architecture).to(torch.bfloat16), tokenizer=None))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(RequestError, match=r"data\.attention is document, but the model does not"):
        check_takes_documents_apart(LanguageModel(model=mamba, tokenizer=None))


class Blind(nn.Module):
    """A model that takes positions and pays no attention to them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()  # type: ignore[operator, no-any-return]

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_model_that_takes_no_notice_of_positions_is_refused() -> None:
    with pytest.raises(RequestError, match="the model does not keep packed documents apart"):
        check_takes_documents_apart(LanguageModel(model=Blind(), tokenizer=None))


# runs

LENGTH = 24


@pytest.fixture(scope="module")
def packed_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("packed") / "run"
    data = {"documents": "pack", "attention": "document", "sequence_length": LENGTH}
    return run_pipeline(world.settings(directory, data=data, index={"recall_queries": 0}))


def test_answer_names_the_documents_of_a_pack_and_what_each_adds(packed_run: Run) -> None:
    result = packed_run.query("Lisbon lies on the", " Tagus", k=5, exact=True)
    texts = {row["id"]: row["text"] for row in documents()}
    for found in result.sequences:
        assert sum(part["score"] for part in found.documents) == pytest.approx(found.score, rel=1e-5, abs=1e-9)
        assert [part["tokens"][0] for part in found.documents] == [0, *(part["tokens"][1] for part in found.documents[:-1])]
        assert [part["id"] for part in found.documents] == found.metadata["documents"]
        for part in found.documents:
            inside = "".join(token for token, _ in found.tokens[slice(*part["tokens"])]).replace(END, "")
            assert texts[part["id"]][slice(*part["span"])] == inside
    best = result.sequences[0]
    assert any("Lisbon" in texts[part["id"]] for part in best.documents)


def test_page_and_service_say_which_documents_are_in_it(packed_run: Run) -> None:
    result = packed_run.query("Lisbon lies on the", " Tagus", k=2, exact=True)
    best = max(result.sequences[0].documents, key=lambda part: abs(part["score"]))
    told = f"{best['id']}, characters {best['span'][0]} to {best['span'][1]}"
    page = report_page([result.to_json()], run="run", created="2026-11-22")
    assert "documents in it" in page
    assert told in page
    assert InfluenceResult.from_json(result.to_json()) == result
    facts = sequence_facts(OpenedRun(name="run", run=packed_run, version=None), result.sequences[0].id)
    assert facts["documents"] == [{key: part[key] for key in part if key != "score"} for part in result.sequences[0].documents]
    assert SequenceFacts(**facts).documents == facts["documents"]


def test_origin_names_the_part_of_a_document_or_what_each_adds() -> None:
    part = {"id": "a", "tokens": [0, 9], "span": [1200, 1300], "window": 2, "windows": 3, "score": 0.5}
    assert words.origin([part]) == "a, characters 1,200 to 1,300, part 2 of 3"
    assert words.origin([{**part, "window": 1, "windows": 1}]) == ""
    other = {**part, "id": "b", "span": None, "windows": 1, "score": -2.0}
    assert words.origin([part, other]) == "b: −2.00; a, characters 1,200 to 1,300, part 2 of 3: +0.500"
    assert words.origin([part, *[other] * 7]).endswith("; 3 more")
    assert words.origin([]) == ""


def test_score_of_a_document_in_a_pack_is_that_of_the_document_alone(packed_run: Run) -> None:
    found = packed_run.query("Lisbon lies on the", " Tagus", k=3, exact=True).sequences[0]
    factors = packed_run.factors
    gradients = query_gradients(packed_run.attributed, [packed_run.measure("Lisbon lies on the", " Tagus")], factors).gradients
    vectors = {name: one[0] for name, one in solve(gradients, factors).items()}
    whole = packed_run.store[packed_run.store.ids.index(found.id)]
    pieces = [
        sequence(part.document, whole.tokens[part.first : part.end], whole.counted[part.first : part.end], None) for part in whole.parts
    ]
    alone = score_sequences(packed_run.attributed, vectors, [one for one in pieces if one.counted.any()]).totals / len(packed_run.training)
    expected = [part["score"] for part, one in zip(found.documents, pieces, strict=True) if one.counted.any()]
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-6)  # float32


def test_packing_here_and_packed_rows_are_the_same_sequences(tmp_path: Path) -> None:
    spelling = tokenizer(row["text"] for row in documents())
    text = write_jsonl(tmp_path / "text.jsonl", documents())
    ours = tokens_of(DataConfig(files=str(text), documents="pack", attention="document", sequence_length=LENGTH), spelling)
    rows = []
    for one in ours:
        names = [part.document for part in one.parts for _ in range(part.first, part.end)]
        positions = [place for part in one.parts for place in range(part.end - part.first)]
        rows.append({"id": one.id, "ids": one.tokens.tolist(), "names": names, "positions": positions})
    path = write_jsonl(tmp_path / "packed.jsonl", rows)
    for column in ({"document_ids": "names"}, {"position_ids": "positions"}):
        given = tokens_of(DataConfig(files=str(path), input_ids="ids", attention="document", sequence_length=LENGTH, **column), spelling)
        assert [(s.id, s.tokens.tolist(), s.counted.tolist(), list(s.starts)) for s in given] == [
            (s.id, s.tokens.tolist(), s.counted.tolist(), list(s.starts)) for s in ours
        ]
        assert [[(part.first, part.end) for part in s.parts] for s in given] == [[(part.first, part.end) for part in s.parts] for s in ours]
    assert [[part.document for part in s.parts] for s in given] == [[f"{s.id}/{n}" for n in range(len(s.parts))] for s in given]
    seen: dict[str, list[tuple[int, int]]] = {}
    for one in ours:
        for part in one.parts:
            seen.setdefault(part.document, []).append((part.window, part.windows))
    assert all(found == [(n, len(found)) for n in range(1, len(found) + 1)] for found in seen.values())
    assert max(len(found) for found in seen.values()) > 2


def tokens_of(config: DataConfig, spelling: Any) -> list[Any]:
    return list(tokenize(read_documents(config), spelling, config))


def test_packed_run_appends_removes_and_erases_by_document(packed_run: Run, tmp_path: Path) -> None:
    shutil.copytree(packed_run.directory.path, tmp_path / "run")
    new = write_jsonl(
        tmp_path / "new.jsonl", [{"id": f"new-{n}", "text": f"Zagreb lies on the Sava {n}.", "source": "new"} for n in range(6)]
    )
    append(open_run(tmp_path / "run"), [str(new)])
    run = open_run(tmp_path / "run")
    holding = [one.id for one in run.store if any(part.document == "new-3" for part in one.parts)]
    assert holding
    remove(run, ["new-3"])
    erase(open_run(tmp_path / "run"))
    again = open_run(tmp_path / "run")
    assert [again.store.ids[number] for number in np.flatnonzero(~again.live)] == holding
    assert all(not again.store[again.store.ids.index(name)].parts for name in holding)
    assert not set(holding) & {one.id for one in again.query("Zagreb lies on", " the Sava", k=30, exact=True).sequences}


WRONG = [
    ({"position_ids": "p"}, {"p": [0, 1, 3]}, "column 'p' holds 3 at token 2: positions go on by one, or begin anew at 0"),
    ({"position_ids": "p"}, {"p": [1, 2, 3]}, "column 'p' holds 1 at token 0"),
    ({"document_ids": "p"}, {"p": [0, 1, 0]}, "column 'p' comes back to document 0: the tokens of a document stand together"),
    ({"document_ids": "p"}, {"p": [0, 1]}, "column 'p' has 2 values for 3 token ids"),
    ({"document_ids": "p"}, {"p": [0, None, 0]}, "must hold a number or a name for each token, not None"),
]


@pytest.mark.parametrize(("settings", "row", "message"), WRONG)
def test_boundaries_that_cannot_be_are_refused_by_row(settings: Any, row: Any, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"ids": [4, 5, 6], **row}])
    config = DataConfig(files=str(path), input_ids="ids", attention="document", sequence_length=POSITIONS, **settings)
    with pytest.raises(RequestError) as refused:
        list(read_documents(config))
    assert f"{path}, row 0: " in str(refused.value)
    assert message in str(refused.value)


CONTRADICTIONS = [
    ({"attention": "document"}, "attention: document is for packed sequences"),
    ({"attention": "document", "input_ids": "a"}, "attention: document is for packed sequences"),
    ({"position_ids": "p", "input_ids": "a"}, "set attention: document"),
    ({"position_ids": "p", "document_ids": "d", "input_ids": "a", "attention": "document"}, "both say where documents begin"),
    ({"document_ids": "d", "input_ids": "a", "documents": "pack"}, "are packed already"),
    ({"document_ids": "d"}, "document_ids goes with input_ids"),
    ({"weight": "w", "documents": "pack"}, "joins documents of several weights"),
    ({"overlap": 3, "documents": "pack"}, "overlap is between the sequences of a document that is split"),
    ({"overlap": 512}, "overlap must be less than sequence_length, 512"),
    ({"messages": "m", "input_ids": "i"}, "name columns of one kind, messages or input_ids, not both"),
    ({"tools": "t"}, "they go with messages"),
    ({"labels": "l", "counted": "c", "input_ids": "i"}, "counted and labels say the same"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(files="a.jsonl", **settings)
