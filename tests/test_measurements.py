"""What can be asked: each kind of measurement equals autograd of what it says it is, and each mistake is one clear line."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model
from safetensors.torch import save_file
from small_run import Influence, World, write_jsonl
from torch import Tensor, nn

from ekfac import (
    as_one_sequence,
    as_vectors,
    attributable_layers,
    capture,
    gradient_blocks,
    sequence_gradients,
    token_loss_derivatives,
    token_losses,
    true_label_loss,
)
from influence import Measurement, QueryOptions, RequestError, Run, open_run
from influence.attribution import AttributedModel, by_output_token, query_gradients, score_sequences
from influence.concentration import concentration, longest_run
from influence.measurement import Member, combine, measure_messages, with_function
from influence.report.layers import shares_by_family
from influence.report.words import memorised
from influence.service.bodies import QueryBody
from jobs.answers import asked_before, keep_answers, measurements_of
from jobs.remote import questions_of

PROMPT, COMPLETION = "Oslo lies on the", " Aker. The town is known"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def exact(run: Run) -> AttributedModel:
    """The run's model in float64, in which autograd and capture agree to the last digits."""
    model = copy.deepcopy(run.language_model.model).double()
    return AttributedModel(model=model, layers=run.coverage.layers, budget=run.attributed.budget, device=run.attributed.device)


def gradients(exact: AttributedModel, measurement: Measurement) -> dict[str, Tensor]:
    return {name: found[0] for name, found in query_gradients(exact, [measurement]).gradients.items()}


def by_autograd(exact: AttributedModel, value: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Minus the gradient of a number in the layers, [O, J]."""
    names, parameters = zip(*exact.model.named_parameters(), strict=True)
    found = torch.autograd.grad(-value(exact.model), parameters, allow_unused=True)
    full = {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}
    return as_vectors(exact.model, exact.layers, full)


def log_probabilities(model: nn.Module, tokens: np.ndarray) -> Tensor:
    """[T - 1]: of each token after the first."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(vector.abs().max()) for vector in expected.values())
    assert scale > 0
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, rtol=1e-9, atol=1e-10 * scale)


# --- log-probabilities ---


def test_several_spans_count_their_tokens_and_no_other(run: Run, exact: AttributedModel) -> None:
    measurement = run.measure(PROMPT, COMPLETION, span=[(0, 1), (2, 4)])
    whole = run.measure(PROMPT, COMPLETION).parts[0][1]
    places = np.flatnonzero(whole.counted)[[0, 2, 3]]
    assert np.flatnonzero(measurement.parts[0][1].counted).tolist() == places.tolist()
    assert_same(gradients(exact, measurement), by_autograd(exact, lambda m: log_probabilities(m, whole.tokens)[places - 1].sum()))


@pytest.mark.parametrize(
    ("span", "message"),
    [((0, 99), "0:99 does not lie within"), ([(0, 1), (3, 3)], "3:3 does not lie"), ([], "a span is"), ([(0, 1, 2)], "a span is")],
)
def test_span_that_is_none_is_refused(run: Run, span: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run.measure(PROMPT, COMPLETION, span=span)


def test_set_is_the_weighted_mean_of_its_queries(run: Run, exact: AttributedModel) -> None:
    members = [
        Member(name="a", weight=3.0, measurement=run.measure(PROMPT, COMPLETION)),
        Member(name="b", weight=1.0, measurement=run.measure("Lima", " lies on the Rímac.", contrast=" is a town.")),
    ]
    each = [gradients(exact, member.measurement) for member in members]
    assert_same(gradients(exact, combine(members, "mean")), {name: 0.75 * each[0][name] + 0.25 * each[1][name] for name in each[0]})
    assert_same(gradients(exact, combine(members, "sum")), {name: 3 * each[0][name] + each[1][name] for name in each[0]})
    result = run.answer([combine(members, "mean")], QueryOptions(k=3, bm25=True))[0]
    apart = [run.answer([member.measurement], QueryOptions(k=1))[0].query["log_probability"] for member in members]
    assert result.query["log_probability"] == pytest.approx(0.75 * apart[0] + 0.25 * apart[1], rel=1e-4)
    assert [one["log_probability"] for one in result.query["queries"]] == pytest.approx(apart, rel=1e-4)
    assert result.provenance["recall_at_10"] is None  # not measured for such queries


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], []], ids=["zero", "negative", "nan", "none"])
def test_set_without_a_mean_is_refused(run: Run, weights: list[float]) -> None:
    members = [Member(name=str(w), weight=w, measurement=run.measure(PROMPT, COMPLETION)) for w in weights]
    with pytest.raises(RequestError, match=r"weights of a set must be|set of queries is empty"):
        combine(members, "mean")


def test_data_set_is_minus_its_loss_a_token(run: Run, exact: AttributedModel, tmp_path: Path) -> None:
    texts = ["We reached Quito in the rain.", "3 crates of silk shipped. " * 12]  # the second is longer than a sequence
    file = write_jsonl(tmp_path / "held-out.jsonl", [{"text": text} for text in texts])
    measurement = run.measure_data([str(file)])
    assert len(measurement.parts) > 2

    def mean(model: nn.Module) -> Tensor:
        each = [log_probabilities(model, sequence.tokens) for _, sequence in measurement.parts]
        return torch.cat(each).mean()

    assert_same(gradients(exact, measurement), by_autograd(exact, mean))
    result = run.answer([measurement], QueryOptions(k=2))[0]
    assert result.query["log_probability"] == pytest.approx(mean(exact.model).item(), rel=1e-4)
    assert "text" not in json.dumps(result.query)


# --- conversations ---


@pytest.fixture
def chatting(run: Run) -> object:
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_last_turn_of_a_conversation_is_measured_after_all_before_it(chatting: object) -> None:
    messages = [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "On the Aker."}]
    measurement = measure_messages(chatting, messages)
    assert (measurement.prompt, measurement.completion) == ("<user>Where is Oslo?<end><assistant>", "On the Aker.<end>")
    part = measurement.parts[0][1]
    counted = "".join(chatting.decode([token]) for token in part.tokens[part.counted])  # type: ignore[attr-defined]
    assert counted == measurement.completion


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "must be the assistant's, not the user's"),
        ([], "expected a list such as"),
        ([{"role": "assistant"}], "expected a list such as"),
        ("hello", "expected a list such as"),
    ],
)
def test_conversation_of_another_form_is_refused(chatting: object, messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        measure_messages(chatting, messages)  # type: ignore[arg-type]


def test_tokenizer_without_a_template_and_a_template_that_refuses_are_one_clear_line(run: Run, chatting: object) -> None:
    turn = [{"role": "assistant", "content": "On the Aker."}]
    with pytest.raises(RequestError, match="the tokenizer has no chat template"):
        run.measure_messages(turn)
    chatting.chat_template = "{{ raise_exception('roles must alternate') }}"  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="refuses the conversation: roles must alternate"):
        measure_messages(chatting, turn)


# --- functions of the model ---


def direction_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("reduce", ["mean", "last", "max"])
@pytest.mark.parametrize("layer", ["transformer.h.0", "transformer.h.1.mlp.c_fc", "transformer.wte", "transformer.ln_f"])
def test_activation_of_a_direction_equals_autograd(run: Run, exact: AttributedModel, tmp_path: Path, layer: str, reduce: str) -> None:
    width = 64 if "c_fc" in layer else 16
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(width))
    file = direction_file(tmp_path / "feature.safetensors", {layer: vector})
    measurement = with_function(run.measure(PROMPT, COMPLETION), run.direction(file, reduce))  # type: ignore[arg-type]
    sequence = measurement.parts[0][1]

    def activation(model: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(input_ids=torch.from_numpy(sequence.tokens.astype(np.int64))[None])
        hook.remove()
        values = (seen[0].reshape(-1, width) @ vector.float().double())[sequence.counted]
        return {"mean": values.mean, "last": lambda: values[-1], "max": values.max}[reduce]()

    assert_same(gradients(exact, measurement), by_autograd(exact, activation))
    result = run.answer([measurement], QueryOptions(k=2, normalize=True))[0]
    assert result.unit == "activation/√nats"
    assert result.query["measured"]["value"] == pytest.approx(activation(exact.model).item(), rel=1e-3, abs=1e-4)


def test_queries_of_a_batch_keep_their_own_functions(run: Run, exact: AttributedModel, tmp_path: Path) -> None:
    file = direction_file(tmp_path / "feature.safetensors", {"transformer.h.0": torch.ones(16)})
    plain = run.measure(PROMPT, COMPLETION)
    asked = [
        plain,
        with_function(plain, run.direction(file)),
        run.measure("Lima", " lies"),
        with_function(plain, run.direction(file, "last")),
    ]
    together = query_gradients(exact, asked).gradients
    for place, measurement in enumerate(asked):
        assert_same({name: found[place] for name, found in together.items()}, gradients(exact, measurement))


def test_users_own_function_equals_autograd(run: Run, exact: AttributedModel) -> None:
    """The entropy of the prediction after the prompt's last token."""

    def entropy(model: nn.Module, batch: object) -> Tensor:
        predicted = model(input_ids=batch.tokens).logits[:, 3].log_softmax(-1)  # type: ignore[attr-defined]
        return -(predicted.exp() * predicted).sum(-1)

    measurement = run.measure_function(entropy, PROMPT, COMPLETION)
    ids = torch.from_numpy(measurement.parts[0][1].tokens.astype(np.int64))[None]

    def value(model: nn.Module) -> Tensor:
        predicted = model(input_ids=ids).logits[0, 3].log_softmax(-1)
        return -(predicted.exp() * predicted).sum()

    assert_same(gradients(exact, measurement), by_autograd(exact, value))
    result = run.query_function(entropy, PROMPT, COMPLETION, k=2, by_output_token=True)
    assert (result.unit, result.query["measured"]["value"]) == ("f", pytest.approx(value(exact.model).item(), rel=1e-4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, batch: model(input_ids=batch.tokens).logits.sum(), r"gave shape \(\), expected a tensor of shape \(1,\)"),
        (lambda model, batch: 3.0 * model(input_ids=batch.tokens).logits.sum().item(), "gave float"),
        (lambda model, batch: torch.zeros(len(batch.tokens)), "called the model 0 times"),
        (lambda model, batch: model(input_ids=batch.tokens).logits.detach()[:, 0, 0], "no gradient"),
    ],
    ids=["one number", "no tensor", "no model", "detached"],
)
def test_function_of_another_form_is_refused(run: Run, function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run.query_function(function, PROMPT, COMPLETION)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.h.00": torch.ones(16)}, "no module 'transformer.h.00'; the nearest are transformer.h.0"),
        ({"transformer.h.0": torch.ones(17)}, r"the vector has shape \(17,\), but transformer.h.0 gives 16 numbers"),
        ({"transformer.h.0": torch.ones(1, 16)}, r"the vector has shape \(1, 16\)"),
        ({"transformer.h.0": torch.zeros(16)}, "is all zero"),
        ({"transformer.h.0": torch.full((16,), torch.nan)}, "NaN"),
        ({"transformer.h.0": torch.ones(16), "transformer.h.1": torch.ones(16)}, "holds 2 tensors; expected one"),
        ({"transformer.drop.": torch.ones(16)}, "no module"),
        ({"transformer.h": torch.ones(16)}, "does not give one vector for each position"),
    ],
)
def test_direction_that_the_model_does_not_have_is_refused(run: Run, tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run.direction(direction_file(tmp_path / "feature.safetensors", tensors))


# --- by output token ---


def test_shares_by_output_token_are_the_gradients_of_each_tokens_own_loss(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch(prompt=2)
    layers = attributable_layers(model, lambda m: m(input_ids=batch.tokens)).layers
    draw = torch.Generator().manual_seed(1)
    vector = {layer.name: torch.randn(layer.shape, generator=draw, dtype=torch.float64) for layer in layers}
    found = token_loss_derivatives(model, layers, batch, vector)
    tolerance = 1e-9 if architecture in ("gpt2", "neox", "phi") else 1e-5  # the norms of the others compute in float32
    losses = token_losses(model, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for n, t in batch.counted.nonzero().tolist():
        grads = torch.autograd.grad(losses[n, t], parameters, retain_graph=True, allow_unused=True)
        full = {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, grads, strict=True)}
        own = as_vectors(model, layers, full)
        expected = sum((own[name] * vector[name]).sum() for name in vector)
        torch.testing.assert_close(found[n, t], expected, rtol=tolerance, atol=tolerance)
    assert not found[~batch.counted].any()


def test_both_ways_to_split_a_score_sum_to_it_also_over_some_layers(run: Run, exact: AttributedModel) -> None:
    some = AttributedModel(model=exact.model, layers=exact.layers[2:5], budget=exact.budget, device=exact.device)
    vectors = gradients(some, run.measure(PROMPT, COMPLETION))
    sequences = run.store.select([0, 5, 11])
    by_input = score_sequences(some, vectors, sequences)
    by_output = by_output_token(some, vectors, sequences)
    for place, sequence in enumerate(sequences):
        assert by_output.tokens[place].sum() == pytest.approx(by_input.totals[place], rel=1e-9)
        assert not by_output.tokens[place][~sequence.counted].any()
        assert np.abs(by_output.tokens[place] - by_input.tokens[place]).max() > 1e-6


def test_answer_says_which_side_its_tokens_are_of(influence: Influence, finished: Path) -> None:
    read, predicted = (
        influence("query", finished, PROMPT, COMPLETION, "-k", 2, "--json", *more).json for more in ([], ["--by-output-token"])
    )
    assert (read["provenance"]["tokens_by"], predicted["provenance"]["tokens_by"]) == ("input", "output")
    for one, other in zip(read["results"], predicted["results"], strict=True):
        assert one["score"] == other["score"]
        assert sum(share for _, share in other["tokens"]) == pytest.approx(other["score"], rel=1e-3, abs=1e-6)
        assert other["tokens"][0][1] == 0  # nothing predicts the first
        assert one["tokens"][0][1] != 0


def test_report_says_which_side_its_tokens_are_of_and_what_was_measured(influence: Influence, finished: Path, tmp_path: Path) -> None:
    page, read, predicted = tmp_path / "page.html", "the one <em>before</em> the token", "what learning to <em>predict</em> it did"
    assert influence("report", finished, PROMPT, COMPLETION, "-k", 1, "--out", page).status == 0
    assert read in page.read_text()
    assert predicted not in page.read_text()
    file = direction_file(tmp_path / "feature.safetensors", {"transformer.h.1": torch.ones(16)})
    arguments = ["-k", 1, "--out", page, "--by-output-token", "--direction", file]
    assert influence("report", finished, PROMPT, COMPLETION, *arguments).status == 0
    assert read not in page.read_text()
    assert predicted in page.read_text()
    assert "Measured was the <b>mean activation at transformer.h.1: " in page.read_text()


def test_gradient_of_a_batch_as_one_sequence_is_the_sum_of_its_sequences(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch()
    layers = attributable_layers(model, lambda m: m(input_ids=batch.tokens)).layers

    def check(_: object, record: object) -> None:
        whole = torch.cat([block[0] for _, block in gradient_blocks(as_one_sequence(record))])  # type: ignore[arg-type]
        each = sequence_gradients(record).sum(0)  # type: ignore[arg-type]
        rows = next(rows for rows, _ in gradient_blocks(as_one_sequence(record)))  # type: ignore[arg-type]
        expected = each if isinstance(rows, slice) else each[rows]
        torch.testing.assert_close(whole, expected)

    capture(model, layers, lambda: true_label_loss(model, batch), batch.reached, check)


# --- how far an answer is memorised ---


def test_concentration_tells_few_from_many() -> None:
    spread = concentration(np.ones(1000))
    assert spread["effective_sequences"] == pytest.approx(1000)
    assert spread["largest"] == pytest.approx({"1": 0.001, "10": 0.01, "100": 0.1})
    single = concentration(np.r_[np.zeros(999), 5.0])
    assert (single["effective_sequences"], single["largest"]["1"]) == (pytest.approx(1), 1.0)
    assert concentration(-np.ones(3))["largest"] == {}


def test_how_far_an_answer_is_memorised_is_said_in_numbers() -> None:
    spread = concentration(np.r_[np.full(10, 9.0), np.ones(10)])
    said = memorised(spread, [{"verbatim": 4}, {"verbatim": 2}, {"verbatim": 1}], 4)
    assert said.startswith("The 10 largest carry 90% of it, as if 12.2 sequences had equal influence.")
    assert said.endswith(
        "Of the 3 sequences shown as helpful, 1 holds all 4 counted tokens of the completion in a row, 2 at least half of them."
    )
    assert memorised({}, [], 4) == ""


def test_longest_run_is_that_of_a_search_by_hand() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        completion, sequence = draw.integers(0, 3, 6).astype(np.int32), draw.integers(0, 3, 20).astype(np.int32)
        runs = [
            length
            for length in range(1, 7)
            for a in range(7 - length)
            for b in range(21 - length)
            if (completion[a : a + length] == sequence[b : b + length]).all()
        ]
        assert longest_run(completion, sequence) == max(runs, default=0)


def test_training_text_as_completion_is_found_word_for_word(run: Run) -> None:
    text = run.store[8].text
    result = run.query(text[: len(text) // 2], text[len(text) // 2 :], k=len(run.store))
    counted = sum(value is not None for value in result.query["token_log_probabilities"])
    assert next(one.verbatim for one in result.sequences if one.id == run.store.ids[8]) == counted
    assert max(one.verbatim or 0 for one in result.sequences) == counted


def test_families_share_their_influence_among_blocks() -> None:
    low, high = {"h.0.mlp": 3.0, "h.1.mlp": 1.0, "wte": 0.0}, {"h.0.mlp": -1.0, "h.1.mlp": 2.0, "wte": 1.0}
    nothing = {"h.0.mlp": -1.0, "h.1.mlp": 0.0, "wte": 0.0}
    rows, shares = shares_by_family([("facts", [low, low]), ("facts", [nothing]), ("names", [high]), ("names", [low])])
    assert rows == ["0", "1", "wte"]
    assert shares == {"facts": pytest.approx([0.75, 0.25, 0]), "names": pytest.approx([(-0.5 + 0.75) / 2, (1 + 0.25) / 2, 0.25])}


def test_report_compares_families_that_the_queries_name(influence: Influence, finished: Path, tmp_path: Path) -> None:
    lines = [{"prompt": PROMPT, "completion": COMPLETION, "family": "<places>"}, {"text": "Lima lies on the Rímac.", "family": "rivers"}]
    page = tmp_path / "page.html"
    assert influence("report", finished, "--queries", write_jsonl(tmp_path / "q.jsonl", lines), "--out", page, "-k", 2).status == 0
    assert 'id="families"' in page.read_text()
    assert "&lt;places&gt; <small>1 query</small>" in page.read_text()
    assert influence("report", finished, "--queries", write_jsonl(tmp_path / "q.jsonl", lines[:1]), "--out", page, "-k", 2).status == 0
    assert 'id="families"' not in page.read_text()
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [lines[0] | {"family": 3}])
    influence("report", finished, "--queries", wrong, "--out", page).says("line 1: the family must be a name, not 3")


# --- the command line, and asking again ---


def test_command_asks_each_kind(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "set.jsonl", [{"prompt": PROMPT, "completion": COMPLETION, "weight": 2}, {"text": "Lima lies"}])
    file = direction_file(tmp_path / "feature.safetensors", {"transformer.h.1": torch.ones(16)})
    one = influence("query", finished, "--queries", queries, "--as-one", "mean", "--json", "-k", 2).json
    assert [member["weight"] for member in one["query"]["queries"]] == [2, 1]
    data = influence("query", finished, "--data", world.data, "--json", "-k", 2).json
    assert data["query"]["sequences"] > 40
    along = influence("query", finished, PROMPT, COMPLETION, "--direction", file, "--reduce", "max", "--span", "0:1,2:3", "--json").json
    assert (along["unit"], along["query"]["span"], along["query"]["measured"]["reduce"]) == ("activation", [[0, 1], [2, 3]], "max")


def test_report_of_a_set_lists_its_queries(influence: Influence, finished: Path, tmp_path: Path) -> None:
    lines = [{"id": "<first>", "prompt": PROMPT, "completion": COMPLETION, "weight": 2}, {"text": "Lima lies on the Rímac."}]
    page, file = tmp_path / "page.html", write_jsonl(tmp_path / "set.jsonl", lines)
    assert influence("report", finished, "--queries", file, "--as-one", "mean", "--out", page, "-k", 1).status == 0
    row = '<th scope="row">&lt;first&gt;</th><td dir="auto">Oslo lies on the<b> Aker. The town is known</b></td>'
    assert row in page.read_text()
    assert page.read_text().count("Lima lies on the Rímac.") >= 1


def test_what_a_file_asks_travels_to_a_server_as_a_body_that_it_takes(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "On the Aker."}]
    file = write_jsonl(tmp_path / "set.jsonl", [{"id": 3, "messages": turns, "weight": 2}, {"prompt": PROMPT, "completion": COMPLETION}])
    ((_, body),) = questions_of(None, None, None, None, file, "sum")
    taken = QueryBody.model_validate_json(json.dumps(body))
    assert (taken.as_one, [(one.id, one.weight) for one in taken.queries or []]) == ("sum", [("3", 2.0), ("2", 1.0)])
    assert [
        len(QueryBody.model_validate_json(json.dumps(one)).messages or []) for _, one in questions_of(None, None, None, None, file)
    ] == [2, 0]
    ((_, spans),) = questions_of(PROMPT, COMPLETION, None, "0:1,2:3", None)
    assert QueryBody.model_validate_json(json.dumps(spans)).span == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--as-one", "mean"], "--as-one goes with --queries"),
        (["--queries", "set.jsonl", "--as-one", "median"], "expected mean or sum"),
        (["a", "b", "--reduce", "max"], "--reduce goes with --direction"),
        (["a", "b", "--direction", "f.safetensors"], "cannot be read as safetensors"),
        (["a", "b", "--direction", "feature.safetensors", "--reduce", "min"], "expected mean, last, max"),
        (["a", "b", "--data", "set.jsonl"], "does not go with a prompt"),
        (["a", "b", "--span", "1-2"], "such as 0:3"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--queries", "weights.jsonl", "--as-one", "mean"], "line 1: the weight must be a number"),
        (["--queries", "chat.jsonl"], "line 1: the tokenizer has no chat template"),
        (["a", "b", "--direction", "feature.safetensors", "--server", "http://127.0.0.1:1"], "ask without --server"),
    ],
)
def test_request_that_cannot_be_met_is_one_line(
    influence: Influence, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    direction_file(tmp_path / "feature.safetensors", {"transformer.h.1": torch.ones(16)})
    write_jsonl(tmp_path / "set.jsonl", [{"text": "Lima lies"}])
    write_jsonl(tmp_path / "weights.jsonl", [{"text": "Lima lies", "weight": "much"}])
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "yes"}]}])
    influence("query", finished, *arguments).says(message)


def test_what_was_asked_can_be_asked_again(finished: Path, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run.directory.path / "answers", ignore_errors=True)
    queries = write_jsonl(tmp_path / "set.jsonl", [{"text": "Lima lies on the"}, {"prompt": PROMPT, "completion": COMPLETION}])
    file = direction_file(tmp_path / "feature.safetensors", {"transformer.h.1": torch.ones(16)})
    asked = [
        measurements_of(run, PROMPT, COMPLETION, None, "0:1,2:3", None),
        measurements_of(run, None, None, None, None, queries, as_one="sum"),
        measurements_of(run, PROMPT, COMPLETION, None, None, None, direction=file, reduce="last"),
    ]
    measurements = [measurement for some in asked for _, measurement in some]
    keep_answers(run, run.answer(measurements, QueryOptions(k=1)), False)
    again = [measurement for _, measurement in asked_before(run)]
    assert {m.completion for m in again} == {m.completion for m in measurements}
    for measurement in measurements:
        same = next(m for m in again if (m.completion, m.span, m.unit) == (measurement.completion, measurement.span, measurement.unit))
        assert [w for w, _ in same.parts] == [w for w, _ in measurement.parts]
    file.unlink()
    assert len(asked_before(run)) == 2  # the direction is gone; the others can still be asked
