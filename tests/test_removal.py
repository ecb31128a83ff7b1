"""Removal and tail patch: batches without what was left out, sets that are what they are called, and nothing trained twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_run import Influence, World, everything, model, write_jsonl

from influence.errors import RequestError
from influence.evaluation.bank import Bank
from influence.evaluation.changes import RANDOM, compared, first_of, random_set, sizes_of
from influence.evaluation.intervals import Estimate, mean, ratio
from influence.evaluation.methods import scores_by
from influence.evaluation.recipe import FILE, read_recipe
from influence.evaluation.removal import random_deviation, removal_changes, removal_plan
from influence.evaluation.retraining import RetrainingSettings, fine_tuned, query_losses, shuffled_batches, similar_batches
from influence.evaluation.tailpatch import patched
from influence.refinement import RefineOptions
from influence.run import Run, open_run

QUERIES = [{"id": "pair", "prompt": "Lisbon lies on", "completion": " the Tagus."}, {"id": "text", "text": "Oslo lies on the Aker."}]
N = 65


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "queries.jsonl", QUERIES)


# training without


@pytest.mark.parametrize("similar", [False, True])
def test_batches_hold_every_place_once(similar: bool) -> None:
    lengths = [5, 3, 9, 9, 1, 4, 2]
    batches = (similar_batches if similar else shuffled_batches)(lengths, 3, torch.Generator().manual_seed(0))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert sorted(len(batch) for batch in batches) == [1, 3, 3]


def test_training_without_is_training_on_the_same_batches_less_what_is_left_out(run: Run) -> None:
    """Against a loop with Hugging Face's own loss over sequences cut to one length, which need no padding; the norm of gradients clipped."""
    sequences = [run.store[number] for number in range(7)]
    length = min(len(sequence.tokens) for sequence in sequences)
    sequences = [type(s)(**{**vars(s), "tokens": s.tokens[:length], "counted": s.counted[:length]}) for s in sequences]
    settings = RetrainingSettings(epochs=2, batch_size=3, learning_rate=1e-3, weight_decay=0.1, warmup_share=0.0, clip_norm=0.5)
    base = model(320, seed=1).double()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = fine_tuned(base, sequences, settings, seed=5, left_out=[1, 4])

    other, generator = model(320, seed=1).double(), torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1)
    step = 0
    for _ in range(2):
        order = torch.randperm(7, generator=generator).tolist()
        for places in (order[:3], order[3:6], order[6:]):
            kept = [place for place in places if place not in (1, 4)]
            if kept:
                optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (6 - step) / 5)
                ids = torch.from_numpy(np.stack([sequences[place].tokens for place in kept]).astype(np.int64))
                optimizer.zero_grad()
                other(input_ids=ids, labels=ids).loss.backward()
                torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                optimizer.step()
            step += 1
    for (name, one), two in zip(found.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8, msg=name)


# what is compared


def test_sizes_are_numbers_and_shares() -> None:
    assert sizes_of(["5", "1%", "10%", "0.1%", "16"], 1580) == (2, 5, 16, 158)
    assert sizes_of(["0.1%"], 100) == (1,)


@pytest.mark.parametrize("text", ["0", "0%", "-1", "1.5", "all", "100", "100%", "", "1 %%"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="-k: "):
        sizes_of([text], 100)


def test_first_are_the_highest_and_ties_do_not_follow_the_order_of_the_data() -> None:
    ids = [f"doc-{n}" for n in range(40)]
    scores = np.random.default_rng(0).standard_normal((3, 40))
    np.testing.assert_array_equal(first_of(scores, ids, 7), np.argsort(-scores, axis=1)[:, :7])
    tied = first_of(np.zeros((1, 40)), ids, 10)[0]
    assert sorted(tied) != list(range(10))
    names = [ids[number] for number in tied]
    assert [ids[::-1][number] for number in first_of(np.zeros((1, 40)), ids[::-1], 10)[0]] == names
    assert set(random_set(ids, 0, 5)) < set(random_set(ids, 0, 9)) != set(random_set(ids, 1, 9))


def test_interval_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 1 <= high for low, high in (mean(1 + rng.standard_normal(30)).interval or (9, 9) for _ in range(100))]
    assert 0.85 <= np.mean(covered) <= 1
    assert mean(np.array([2.0])).interval is None


def test_ratio_is_not_bounded_where_what_is_below_may_be_nothing() -> None:
    rng = np.random.default_rng(0)
    below = 1 + 0.1 * rng.standard_normal(20)
    found = ratio(3 * below, below)
    assert found is not None
    assert found.value == pytest.approx(3)
    assert found.interval == pytest.approx((3, 3))
    weak = ratio(3 * below, rng.standard_normal(20))
    assert weak is not None
    assert weak.interval is not None
    assert (weak.interval[0] > 0, weak.interval[1]) == (True, np.inf)
    assert weak.to_json()["interval"] == [weak.interval[0], None]
    assert ratio(-below, 2 * below) == Estimate(value=0.5, interval=(0.5, 0.5))
    assert ratio(below, np.zeros(20)) is None


def table(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((2, 40))


def test_plan_leaves_out_what_comes_first_and_trains_nothing_twice() -> None:
    ids, one, other = [f"doc-{n}" for n in range(40)], table(0), table(1)
    plan = removal_plan({"one": one, "same": 2 * one, "other": other}, ids, [3, 8], 2)
    assert plan.masks[0].all()
    assert len({mask.tobytes() for mask in plan.masks}) == len(plan.masks) == 1 + 2 * (2 + 2 + 2)
    for k in (3, 8):
        for name, scores in (("one", one), ("same", one), ("other", other)):
            for query in range(2):
                (row,) = plan.sets[k, name][query]
                assert set(np.flatnonzero(~plan.masks[row])) == set(np.argsort(-scores[query])[:k])
        assert (plan.masks[plan.sets[k, RANDOM]].sum(2) == 40 - k).all()
        np.testing.assert_array_equal(plan.sets[k, RANDOM][0], plan.sets[k, RANDOM][1])


def test_changes_are_against_the_model_of_the_same_seed_trained_on_everything() -> None:
    ids, truth = [f"doc-{n}" for n in range(40)], table(0)
    plan = removal_plan({"truth": truth, "chance": table(1)}, ids, [5], 3)
    rng = np.random.default_rng(2)
    seeds = 10 * rng.standard_normal((3, 1, 2))  # of each seed and query, which pairing takes away
    bank = Bank(masks=plan.masks, losses=seeds - plan.masks @ truth.T)
    found = {change.method: change for change in removal_changes(plan, bank)}
    np.testing.assert_allclose(found["truth"].per_query, [-np.sort(row)[-5:].sum() for row in truth])
    np.testing.assert_allclose(
        found[RANDOM].per_query, [-np.mean([row[random_set(ids, draw, 5)].sum() for draw in range(3)]) for row in truth]
    )
    assert found["truth"].as_far_as["chance"].value == pytest.approx(abs(found["truth"].mean.value / found["chance"].mean.value))


def test_what_is_beyond_random_does_not_depend_on_the_model_trained_on_everything() -> None:
    ids, truth = [f"doc-{n}" for n in range(40)], table(0)
    plan = removal_plan({"truth": truth}, ids, [5], 3)
    losses = -(plan.masks @ truth.T)[None].repeat(2, 0)
    noisy = losses.copy()
    noisy[:, 0] += 7
    one, other = (removal_changes(plan, Bank(masks=plan.masks, losses=each)) for each in (losses, noisy))
    assert one[0].mean.value != pytest.approx(other[0].mean.value)
    assert one[0].beyond_random is not None
    assert other[0].beyond_random is not None
    assert one[0].beyond_random.ends == pytest.approx(other[0].beyond_random.ends)
    drawn = np.mean([[row[random_set(ids, draw, 5)].sum() for draw in range(3)] for row in truth], axis=1)
    assert one[0].beyond_random.value == pytest.approx(np.mean([-np.sort(row)[-5:].sum() for row in truth] + drawn))
    assert one[1].beyond_random is None  # of the random sets themselves


def test_deviation_is_that_of_models_without_random_sets() -> None:
    ids, rng = [f"doc-{n}" for n in range(40)], np.random.default_rng(3)
    plan = removal_plan({"one": table(0)}, ids, [3, 8], 200)
    losses = 10 * rng.standard_normal((2, len(plan.masks), 2))
    losses[:, plan.sets[3, RANDOM][0]] = 5 + 0.3 * rng.standard_normal((2, 200, 2))
    losses[:, plan.sets[8, RANDOM][0]] = 9 + 0.3 * rng.standard_normal((2, 200, 2))
    assert random_deviation(plan, Bank(masks=plan.masks, losses=losses)) == pytest.approx(0.3, rel=0.1)  # of 800 draws: ± 3%
    assert random_deviation(removal_plan({"one": table(0)}, ids, [3], 1), Bank(masks=plan.masks, losses=losses)) is None


def test_methods_are_compared_within_a_size() -> None:
    found = compared({(1, "a"): np.ones(3), (1, "b"): 2 * np.ones(3), (5, "a"): 4 * np.ones(3)})
    assert [(change.k, change.method, set(change.as_far_as)) for change in found] == [(1, "a", {"b"}), (1, "b", {"a"}), (5, "a", set())]


# the command


def test_removal_says_what_was_measured_and_trains_nothing_again(influence: Influence, copy: Path, base: Path, queries: Path) -> None:
    words = ("evaluate", copy, "removal", "--queries", queries, "--base", base, "--epochs", 1, "--random", 1, "--json")
    first = influence(*words, "-k", "4", "-k", "10%").json
    assert [(change["k"], change["method"]) for change in first["changes"]] == [(k, m) for k in (4, 6) for m in ("ekfac", "bm25", "random")]
    assert first["reproduced_within"] > 0.01  # the base of this test is not what the run's model came from
    units = {path.parent.name: path.stat().st_mtime_ns for path in copy.glob("evaluations/retrained-*/*/losses.npy")}
    assert len(units) == first["num_models"]
    assert json.loads((copy / "evaluations/removal.json").read_text()) == first
    assert (copy / "evaluations/removal.png").read_bytes().startswith(b"\x89PNG")

    run, recipe = open_run(copy), read_recipe(base, {"base": str(base), "epochs": 1})
    scores = run.query("Lisbon lies on", " the Tagus.", k=4, exact=True).scores()
    places = [run.store.ids.index(name) for name in scores]
    asked = [run.measure("Lisbon lies on", " the Tagus.")]
    trained = [fine_tuned(model(320, seed=1), list(run.store), recipe.settings, 0, left_out=left_out) for left_out in ([], places)]
    whole, without = (query_losses(one, asked, 16)[0] for one in trained)
    assert first["changes"][0]["per_query"][0] == pytest.approx(whole - without, abs=1e-4)

    next(copy.glob("evaluations/retrained-*/*-seed-0")).rename(copy / "lost")
    again = influence(*words, "-k", "4", "-k", "10%").json
    assert again == first
    now = {path.parent.name: path.stat().st_mtime_ns for path in copy.glob("evaluations/retrained-*/*/losses.npy")}
    assert sum(now[name] != before for name, before in units.items()) == 1


def test_recipe_beside_the_model_is_the_default(
    influence: Influence, copy: Path, base: Path, world: World, queries: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    other = world.copy(tmp_path / "moved").model
    shutil.copytree(base, other / "initial")
    (other / FILE).write_text(json.dumps({"base": "./initial", "seed": 3, "epochs": 1, "similar_lengths": True}))
    words = ("evaluate", copy, "removal", "--queries", queries, "--model", other, "-k", 3, "--random", 0, "--method", "bm25", "--json")
    assert influence(*words).status == 0
    (record,) = (json.loads(path.read_text()) for path in copy.glob("evaluations/retrained-*/retraining.json"))
    assert (record["first_seed"], record["settings"]["epochs"], record["settings"]["similar_lengths"]) == (3, 1, True)
    assert (record["base"], record["paired"]) == (str((other / "initial").resolve()), True)
    (other / FILE).write_text('{"epoch": 1}')
    influence(*words).says("recipe.json is not a recipe (it has 'epoch'): expected base, seed, batch_size, clip_norm, epochs")
    (other / FILE).write_text("{")
    influence(*words).says("recipe.json cannot be read as JSON")
    (other / FILE).write_text('{"base": 7}')
    influence(*words).says("base is a name and seed a whole number, not 7 and 0")


WRONG = [
    (["removal"], "retraining needs --base"),
    (["removal", "--base", "BASE", "-k", "65"], "-k: 65 of 65 training sequences is none of them, or leaves none"),
    (["removal", "--base", "BASE", "-k", "few"], "-k: expected a number of sequences such as 16, or a share such as 1%, got 'few'"),
    (["removal", "--base", "BASE", "--seeds", "0"], "--seeds must be at least 1, not 0"),
    (["removal", "--base", "BASE", "--method", "none"], "there is no method 'none'"),
    (["removal", "--base", "BASE", "--scores", "random=x.npy"], "--scores: there are two methods called 'random'"),
    (["removal", "--base", "BASE", "--bank", "x.npz"], "No such option: --bank"),
    (["tailpatch", "--step-size", "0"], "--step-size must be a number above 0, not 0.0"),
    (["tailpatch", "--step-size", "1e30"], "after a step of size 1e+30 the model's losses are not finite: lower --step-size"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_request_is_refused(
    arguments: list[str], message: str, influence: Influence, finished: Path, base: Path, queries: Path
) -> None:
    words = [str(base) if word == "BASE" else word for word in arguments]
    before = everything(finished)
    influence("evaluate", finished, *words, "--queries", queries).says(message)
    assert everything(finished) == before


# the tail patch


def test_patch_is_one_step_down_the_mean_loss(run: Run) -> None:
    sequences, own = [run.store[0], run.store[9]], run.language_model.model
    found = patched(own, sequences, 0.3)
    for parameter in own.parameters():
        parameter.grad = None
    total = torch.zeros(())
    with torch.enable_grad():
        other = model(320)
        other.load_state_dict(own.state_dict())
        for sequence in sequences:
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
            total = total + other(input_ids=ids, labels=ids).loss * (len(sequence.tokens) - 1)
        (total / sum(len(sequence.tokens) - 1 for sequence in sequences)).backward()
    for (name, one), two in zip(found.named_parameters(), other.parameters(), strict=True):
        assert two.grad is not None
        torch.testing.assert_close(one, two.detach() - 0.3 * two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_small_steps_do_what_the_gradients_products_say(influence: Influence, copy: Path, queries: Path) -> None:
    """To first order, a step on a set moves f by step size × ⟨∇f, ∇ of its mean loss⟩; in float32, with a step of 1e-3."""
    words = ("evaluate", copy, "tailpatch", "--queries", queries, "--step-size", "1e-3", "-k", 5, "--method", "gradient-dot", "--json")
    answer = influence(*words).json
    run = open_run(copy)
    asked = run.measure("Lisbon lies on", " the Tagus.")
    dots = scores_by("gradient-dot", [run], [asked], RefineOptions(), lambda done, total: None)[0]
    first = np.argsort(-dots)[:5]
    counted = sum(int(run.store[int(number)].counted.sum()) for number in first)
    assert answer["changes"][0]["per_query"][0] == pytest.approx(1e-3 * dots[first].sum() / counted, rel=0.1)
    assert [change["method"] for change in answer["changes"]] == ["gradient-dot", "random"]
    assert (answer["optimizer"], answer["step_size"], answer["num_random"]) == ("sgd", 1e-3, 3)
    assert json.loads((copy / "evaluations/tailpatch.json").read_text()) == answer
