"""Recall of planted sequences and detection of wrong labels: figures against plain loops and SciPy, and one clear line for every mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from small_run import Influence, everything, write_jsonl

from ekfac import as_vectors, true_label_loss
from influence.batches import collate
from influence.evaluation.mislabel import auc, opposition, self_influence
from influence.evaluation.recall import Planted, recall
from influence.run import Run, open_run

N = 65


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


# recall


def planted(states: list[int], opposes: list[int]) -> Planted:
    return Planted(kind="all", states=np.array(states), opposes=np.array(opposes, dtype=np.int64))


def test_figures_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((12, 30))
    wanted = [
        planted(rng.choice(15, 1 + query % 4, replace=False).tolist(), (15 + rng.choice(15, query % 3, replace=False)).tolist())
        for query in range(12)
    ]
    scores[:, :15] += 1
    found = recall(scores, wanted)
    orders = [np.argsort(-row).tolist() for row in scores]
    first = [order[0] in one.states for order, one in zip(orders, wanted, strict=True)]
    reciprocal = [
        1 / next(rank for rank, number in enumerate(order, 1) if number in one.states) for order, one in zip(orders, wanted, strict=True)
    ]
    top = [np.mean([number in one.states for number in order[: len(one.states)]]) for order, one in zip(orders, wanted, strict=True)]
    last = [
        np.mean([number in one.opposes for number in order[-len(one.opposes) :]])
        for order, one in zip(orders, wanted, strict=True)
        if len(one.opposes)
    ]
    assert found.first.value == pytest.approx(np.mean(first))
    assert found.reciprocal_rank.value == pytest.approx(np.mean(reciprocal))
    assert found.top_n.value == pytest.approx(np.mean(top))
    assert found.opposed is not None
    assert found.opposed.value == pytest.approx(np.mean(last))
    every = [order.index(number) + 1 for order, one in zip(orders, wanted, strict=True) for number in one.states]
    assert found.median_rank == np.median(every)
    assert found.reciprocal_rank.interval is not None
    assert found.reciprocal_rank.interval[0] < found.reciprocal_rank.value < found.reciprocal_rank.interval[1]


def test_scores_that_tell_nothing_find_nothing() -> None:
    found = recall(np.zeros((2, 30)), [planted([0], []), planted([3, 7], [])])
    assert (found.first.value, found.reciprocal_rank.value, found.top_n.value, found.opposed) == (0, pytest.approx(1 / 15.5), 0, None)


def test_recall_is_measured_by_kind_and_documents_stand_for_their_sequences(influence: Influence, copy: Path, run: Run) -> None:
    long = next(name for name in run.store.documents if run.store.documents.count(name) > 1)
    lines = [
        {"id": "a", "kind": "one", "prompt": "Lisbon lies on", "completion": " the Tagus.", "states": ["doc-00"], "opposes": ["doc-04"]},
        {"kind": "one", "text": "Oslo lies on the Aker.", "states": ["doc-04", "doc-05"]},
        {"kind": "two", "text": "Nobody in Lima sells cotton before spring.", "states": [long]},
    ]
    queries = write_jsonl(copy.with_name("queries.jsonl"), lines)
    words = ("evaluate", copy, "recall", "--queries", queries, "--json", "--method", "bm25", "--method", "ekfac", "--method", "index")
    answer = influence(*words).json
    assert {kind: found["num_queries"] for kind, found in answer["kinds"].items()} == {"one": 2, "two": 1}
    assert all(list(found["methods"]) == ["bm25", "ekfac", "index"] for found in answer["kinds"].values())
    ranking = run.query("", "Nobody in Lima sells cotton before spring.", k=N, exact=True).scores()
    ranks = [rank for rank, name in enumerate(ranking, 1) if name.startswith(f"{long}:")]
    assert len(ranks) == run.store.documents.count(long)
    found = answer["kinds"]["two"]["methods"]["ekfac"]
    assert (found["reciprocal_rank"]["value"], found["median_rank"]) == (pytest.approx(1 / ranks[0]), np.median(ranks))
    assert json.loads((copy / "evaluations/recall.json").read_text()) == answer
    assert (copy / "evaluations/recall.png").read_bytes().startswith(b"\x89PNG")


WRONG_LINES = [
    ({"text": "Oslo."}, '"states" is missing'),
    ({"text": "Oslo.", "states": []}, '"states" is missing'),
    ({"text": "Oslo.", "states": "doc-00"}, "states must be a list of ids, not 'doc-00'"),
    ({"text": "Oslo.", "states": ["nobody"]}, "there is no training sequence or document 'nobody', which states names"),
    ({"text": "Oslo.", "states": ["doc-00"], "opposes": [1.5]}, "opposes must be a list of ids"),
    ({"text": "Oslo.", "states": ["doc-00"], "kind": 3}, "the kind must be a name, not 3"),
    ({"states": ["doc-00"]}, "expected prompt and completion, or text"),
]


@pytest.mark.parametrize(("line", "message"), WRONG_LINES)
def test_wrong_line_is_refused(line: dict[str, object], message: str, influence: Influence, finished: Path, tmp_path: Path) -> None:
    before = everything(finished)
    influence("evaluate", finished, "recall", "--queries", write_jsonl(tmp_path / "q.jsonl", [line])).says(message)
    assert everything(finished) == before


# wrong labels


def test_area_equals_the_statistic_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(80) < 0.2
    scores = np.round(rng.standard_normal(80) + wrong, 1)  # with ties
    found = auc(scores, wrong)
    assert found.value == pytest.approx(mannwhitneyu(scores[wrong], scores[~wrong]).statistic / (wrong.sum() * (~wrong).sum()))
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1] <= 1
    assert auc(wrong.astype(float), wrong).value == 1
    assert auc(np.zeros(80), wrong).value == 0.5


def test_self_influence_of_a_label_is_its_own_gradients_product(run: Run) -> None:
    """Against plain autograd over the label's sequence; and for all tokens, the self-influence of the rows."""
    label = run.measure("Lisbon lies on", " the Tagus.")
    model, layers = run.language_model.model, run.coverage.layers
    model.requires_grad_(True)
    loss = true_label_loss(model, collate([label.parts[0][1]], run.language_model.device))
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    expected = sum(
        float((gradient * run.factors[name].precondition(gradient)).sum())
        for name, gradient in as_vectors(model, layers, gradients).items()
    )
    found = self_influence(run, [label], lambda done, total: None)
    assert found[0] == pytest.approx(expected / N, rel=1e-3)


def test_opposition_is_minus_the_influence_on_other_labels(run: Run) -> None:
    asked = [run.measure("Lisbon lies on", " the Tagus."), run.measure("Oslo lies on", " the Aker."), run.measure("Lima", " lies on")]
    sequences = [run.store[number] for number in (0, 7, 20)]
    scores = [run.query(one.prompt, one.completion, k=N, exact=True).scores() for one in asked]
    expected = [[0 if row == column else -scores[row][s.id] for column, s in enumerate(sequences)] for row in range(3)]
    np.testing.assert_allclose(opposition(run, asked, sequences), expected, rtol=1e-3, atol=1e-6)


def test_wrong_labels_are_ranked_by_every_score(influence: Influence, copy: Path, run: Run) -> None:
    lines = [
        {"id": run.store.ids[number], "wrong": number % 3 == 0, "prompt": "Lisbon lies", "completion": f" on the {number}."}
        for number in range(0, 20)
    ]
    labels = write_jsonl(copy.with_name("labels.jsonl"), lines)
    answer = influence("evaluate", copy, "mislabel", "--labels", labels, "--json").json
    of_labels = [
        "ranks by the next three, added",
        "self-influence of the label",
        "opposition to one other label",
        "opposition to all other labels",
        "loss of the label",
    ]
    names = [*of_labels, "self-influence", "loss"]
    assert [score["name"] for score in answer["scores"]] == names
    assert (answer["num_labels"], answer["num_wrong"]) == (20, 7)
    own, wrong = run.self_influence[:20], np.arange(20) % 3 == 0
    assert answer["scores"][5]["auc"] == pytest.approx(mannwhitneyu(own[wrong], own[~wrong]).statistic / (7 * 13))
    assert answer["scores"][5]["found_in_first"] == pytest.approx(wrong[np.argsort(-own)[:7]].mean())
    assert json.loads((copy / "evaluations/mislabel.json").read_text()) == answer
    assert (copy / "evaluations/mislabel.png").read_bytes().startswith(b"\x89PNG")
    bare = write_jsonl(copy.with_name("bare.jsonl"), [{"id": line["id"], "wrong": line["wrong"]} for line in lines])
    assert [s["name"] for s in influence("evaluate", copy, "mislabel", "--labels", bare, "--json").json["scores"]] == [
        "self-influence",
        "loss",
    ]


RIGHT, WRONG = {"id": "doc-02", "wrong": False}, {"id": "doc-04", "wrong": True}
WRONG_LABELS = [
    ([RIGHT], "of 1 labels none are wrong: there is nothing to tell apart"),
    ([WRONG], "of 1 labels all are wrong"),
    ([RIGHT, {"id": "nobody", "wrong": True}], "line 2: there is no training sequence 'nobody'"),
    ([RIGHT, {"wrong": True}], "line 2: there is no training sequence None"),
    ([RIGHT, WRONG, WRONG], "line 3: the sequence 'doc-04' comes twice"),
    ([RIGHT, {"id": "doc-04", "wrong": 1}], 'line 2: "wrong" must be true or false, not 1'),
    ([RIGHT, {**WRONG, "prompt": "Oslo lies", "completion": " on"}], "must be given for every label or for none"),
]


@pytest.mark.parametrize(("lines", "message"), WRONG_LABELS)
def test_wrong_labels_file_is_refused(
    lines: list[dict[str, object]], message: str, influence: Influence, finished: Path, tmp_path: Path
) -> None:
    before = everything(finished)
    influence("evaluate", finished, "mislabel", "--labels", write_jsonl(tmp_path / "labels.jsonl", lines)).says(message)
    assert everything(finished) == before
