"""`influence evaluate RUN lds`: banks given and banks made, resumed to the same numbers, and one clear line for every mistake."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from small_run import Influence, World, command, everything, finish, model, write_jsonl

from influence.attribution import gradient_norms, precondition, query_gradients
from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.evaluation.bank import read_bank
from influence.evaluation.methods import METHODS, scores_by, tables_by
from influence.evaluation.recipe import Recipe
from influence.evaluation.retraining import RetrainingSettings, fine_tuned, query_losses, random_half
from influence.refinement import RefineOptions
from influence.run import Run, open_run
from influence.solving import in_groups
from jobs.answers import Asked, measurements_of
from jobs.executors import ray_connection
from jobs.retraining import retrain, retraining_of

QUERIES = [
    {"id": "pair", "prompt": "Lisbon lies on", "completion": " the Tagus."},
    {"text": "Oslo lies on the Aker."},
    {"id": 7, "text": "We reached Lima in the rain."},
]
N, Q, S = 65, len(QUERIES), 8
SHORT = RefineOptions(steps=2, sequences=8)
FEW = ("--subsets", 3, "--seeds", 1, "--epochs", 1)


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "queries.jsonl", QUERIES)


@pytest.fixture
def asked(run: Run, queries: Path) -> Asked:
    return measurements_of(run, None, None, None, None, queries)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Losses of two queries under models that were never trained."""
    rng = np.random.default_rng(0)
    masks, losses = np.argsort(rng.random((S, N)), axis=1) < N // 2, rng.standard_normal((2, S, 2))
    np.savez(tmp_path / "bank.npz", masks=masks, query_losses=losses + 2 * rng.standard_normal((S, 2)))
    return tmp_path / "bank.npz"


# with a bank


def test_json_and_files_say_what_was_measured(influence: Influence, copy: Path, queries: Path, bank: Path, tmp_path: Path) -> None:
    own = np.random.default_rng(1).standard_normal((Q, N))
    np.save(tmp_path / "own.npy", own)
    outcome = influence("evaluate", copy, "lds", "--queries", queries, "--bank", bank, "--scores", f"own={tmp_path / 'own.npy'}", "--json")
    answer = outcome.json
    assert "the bank has losses of 2 queries: the first 2 of 3 are evaluated" in outcome.err
    assert [method["name"] for method in answer["methods"]] == ["ekfac", "gradient-cosine", "bm25", "own"]
    assert answer["queries"] == ["pair", "2"]
    assert (answer["num_subsets"], answer["num_seeds"], answer["num_sequences"]) == (S, 2, N)
    assert 0 < answer["ceiling"] < 1
    file = np.load(bank)
    for query in range(2):
        expected = spearmanr(-(own[query] @ file["masks"].T), file["query_losses"].mean(0)[:, query]).statistic
        assert answer["methods"][3]["per_query"][query] == pytest.approx(expected)
    first, *others = answer["methods"]
    assert first["difference"] is None
    for method in others:
        assert method["lds"] == pytest.approx(np.mean(method["per_query"]))
        assert method["difference"]["lds"] == pytest.approx(method["lds"] - first["lds"])
        low, high = method["difference"]["interval"]
        assert low <= high
    assert [method["seconds"] is None for method in answer["methods"]] == [False, False, False, True]
    assert json.loads((copy / "evaluations/lds.json").read_text()) == answer
    assert (copy / "evaluations/lds.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (copy / "evaluations").iterdir()) == ["lds.json", "lds.png"]


def test_people_see_a_table_and_where_the_files_are(
    influence: Influence, finished: Path, queries: Path, bank: Path, tmp_path: Path
) -> None:
    before, out = everything(finished), tmp_path / "new" / "place"
    words = ("--queries", queries, "--bank", bank, "--out", out, "--method", "gradient-dot", "--method", "bm25", "--method", "bm25")
    done = influence("evaluate", finished, "lds", *words)
    assert done.status == 0, done.err
    text = done.out
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [name for name in rows if name] == ["gradient-dot", "bm25"]
    assert f"2 queries, {S} subsets of {N} training sequences, 2 seeds each; noise ceiling 0." in text
    assert f"written: {out / 'lds.json'}, {out / 'lds.png'}" in text
    assert sorted(path.name for path in out.iterdir()) == ["lds.json", "lds.png"]
    assert everything(finished) == before


def test_methods_are_what_they_are_called(run: Run, asked: Asked) -> None:
    measurements = [measurement for _, measurement in asked]
    found = {method: scores_by(method, [run], measurements, SHORT, lambda done, total: None) for method in METHODS}
    gradients = query_gradients(run.attributed, measurements).gradients
    np.testing.assert_allclose(
        found["ekfac"], run.exact_scores([(run.attributed, precondition(gradients, run.factors))], len(measurements)), rtol=1e-4
    )  # rotated in another order
    norms = gradient_norms(run.attributed, list(run.store))
    np.testing.assert_allclose(found["gradient-cosine"] * norms, found["gradient-dot"], rtol=1e-4, atol=1e-6)
    result = run.query("Lisbon lies on", " the Tagus.", k=N, exact=True)
    scores = result.scores()
    np.testing.assert_allclose(found["ekfac"][0] / N, [scores[name] for name in run.store.ids], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found["bm25"][1], run.lexical.scores("Oslo lies on the Aker.", N))
    np.testing.assert_allclose(found["index"], found["ekfac"], rtol=1e-3, atol=1e-6)  # every sequence is a candidate
    normalized = run.query("Lisbon lies on", " the Tagus.", k=N, exact=True, normalize=True).scores()
    for name in ("ekfac-normalized", "index-normalized"):
        by_id = dict(zip(run.store.ids, found[name][0] / N, strict=True))
        np.testing.assert_allclose([by_id[one] for one in normalized], list(normalized.values()), rtol=1e-3, atol=1e-6)
    shared = tables_by(METHODS, run, measurements, SHORT, lambda title: nullcontext(lambda done, total: None))
    assert list(shared) == list(METHODS)
    for method in METHODS:
        np.testing.assert_allclose(shared[method], found[method], rtol=1e-4, atol=1e-6)
    refined = run.query("Lisbon lies on", " the Tagus.", k=N, exact=True, refine=SHORT)
    scores = refined.scores()
    np.testing.assert_allclose(found["refined"][0] / N, [scores[name] for name in run.store.ids], rtol=1e-3, atol=1e-6)


def test_methods_do_not_depend_on_how_many_queries_fit_at_once(finished: Path, asked: Asked) -> None:
    measurements = [measurement for _, measurement in asked]
    alone, together = open_run(finished), open_run(finished)
    assert alone.attributed.budget == together.attributed.budget
    little = replace(alone.attributed.budget, memory_bytes=1)  # one of each at a time
    alone.__dict__["attributed"] = replace(alone.attributed, budget=little)
    assert len(in_groups(measurements, alone, None)) == len(measurements) > len(in_groups(measurements, together, None))
    for method in ("ekfac", "gradient-cosine"):
        one, other = (scores_by(method, [opened], measurements, SHORT, lambda done, total: None) for opened in (alone, together))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


# wrong requests

WRONG = [
    (["recal"], "there is no metric 'recal'; there are: fidelity, lds, removal, tailpatch, recall, mislabel, pbrf"),
    (["lds"], "give --bank FILE.npz, or --retrain (with --base DIR) to make one"),
    (["lds", "--bank", "BANK", "--retrain", "--base", "BASE"], "or --retrain (with --base DIR) to make one, not both"),
    (["lds", "--retrain"], "retraining needs --base: the model before it was trained on the data"),
    (["lds", "--bank", "BANK", "--subsets", "8"], "--subsets goes with --retrain, not with --bank"),
    (["lds", "--bank", "BANK", "--learning-rate", "1e-3"], "--learning-rate goes with --retrain, not with --bank"),
    (
        ["lds", "--bank", "BANK", "--method", "ekafc"],
        "there is no method 'ekafc'; there are: ekfac, ekfac-normalized, refined, index, index-normalized, gradient-cosine, gradient-dot, bm25",
    ),
    (["lds", "--bank", "nowhere.npz"], "nowhere.npz cannot be read: No such file"),
    (["lds", "--bank", "QUERIES"], "is not a bank of retrained models: expected an .npz file of plain arrays"),
    (["lds", "--bank", "OTHER"], "subsets are of 64 training sequences, but the run has 65"),
    (["lds", "--bank", "BANK", "--scores", "own"], "--scores: expected NAME=FILE.npy with a name of letters, digits and .+-_, got 'own'"),
    (["lds", "--bank", "BANK", "--scores", "a$b=x.npy"], "--scores: expected NAME=FILE.npy"),
    (["lds", "--bank", "BANK", "--scores", "bm25=x.npy"], "--scores: there are two methods called 'bm25'"),
    (["lds", "--bank", "BANK", "--scores", "own=no.npy"], "no.npy cannot be read: No such file"),
    (["lds", "--bank", "BANK", "--scores", "own=BANK"], "is not an .npy file of plain numbers"),
    (["lds", "--bank", "BANK", "--out", "BANK"], "bank.npz is not a directory that can be written to"),
    (["lds", "--bank", "BANK", "--memory-budget", "much"], "--memory-budget: 'much' is not a size such as 4GiB"),
    (["lds", "--retrain", "--base", "./no"], "there is no model directory at"),
    (["lds", "--retrain", "--base", "MODEL"], "is the run's own model, already trained on the data"),
    (["lds", "--retrain", "--base", "BASE", "--subsets", "2"], "--subsets: a rank correlation needs at least 3 subsets, not 2"),
    (["lds", "--retrain", "--base", "BASE", "--seeds", "0"], "--seeds must be at least 1, not 0"),
    (["lds", "--retrain", "--base", "BASE", "--epochs", "0"], "epochs and batch size must be at least 1, not 0 and 16"),
    (["lds", "--retrain", "--base", "BASE", "--learning-rate", "nan"], "the learning rate must be a number above 0, not nan"),
    (["lds", "--retrain", "--base", "BASE", "--weight-decay", "-1"], "the weight decay must be a number from 0, not -1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_request_is_refused(
    arguments: list[str], message: str, influence: Influence, finished: Path, world: World, base: Path, queries: Path, bank: Path
) -> None:
    other = bank.with_name("other.npz")
    np.savez(other, masks=np.ones((S, N - 1), bool), query_losses=np.ones((1, S, 2)))
    places = {"BANK": bank, "OTHER": other, "BASE": base, "MODEL": world.model, "QUERIES": queries}
    words = [re.sub("|".join(places), lambda name: str(places[name[0]]), word) for word in arguments]
    before = everything(finished)
    influence("evaluate", finished, *words, "--queries", queries).says(message)
    assert everything(finished) == before


def test_base_of_another_vocabulary_is_refused(influence: Influence, finished: Path, base: Path, queries: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    words = ("evaluate", finished, "lds", "--queries", queries, "--retrain", "--base", other)
    influence(*words).says("has another vocabulary than the run's")


def test_run_that_is_not_finished_is_refused_before_models_are_retrained(
    influence: Influence, copy: Path, base: Path, queries: Path
) -> None:
    shutil.rmtree(copy / "factors")
    influence("evaluate", copy, "lds", "--queries", queries, "--retrain", "--base", base).says("is not finished: factors/all is missing")
    assert not (copy / "evaluations").exists()


# retraining


def test_halves_are_halves_and_do_not_depend_on_each_other_or_on_the_order() -> None:
    ids = [f"doc-{n}" for n in range(N)]
    halves = np.stack([random_half(ids, subset) for subset in range(200)])
    assert set(halves.sum(1)) == {N // 2}
    assert len({half.tobytes() for half in halves}) == 200
    np.testing.assert_array_equal(random_half(ids[::-1], 7)[::-1], halves[7])
    # Each sequence is in a half with probability 32/65, and each pair with (32·31)/(65·64): five standard deviations of 200 draws
    assert np.abs(halves.mean(0) - 32 / 65).max() < 5 * 0.5 / 200**0.5
    together = (halves[:, None] & halves[:, :, None]).mean(0)[np.triu_indices(N, 1)]
    assert np.abs(together - 32 * 31 / (65 * 64)).max() < 5 * 0.43 / 200**0.5


def test_fine_tuning_is_the_plain_loop_with_adamw(run: Run) -> None:
    """Against a loop written out with Hugging Face's own loss and torch's schedule, one sequence a batch, so that no padding is needed.

    In float64: a key's bias has no gradient but rounding, which Adam would divide by its own size.
    """
    base = model(320, seed=1).double()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {name: value.clone() for name, value in base.state_dict().items()}
    sequences = [run.store[number] for number in range(6)]
    settings = RetrainingSettings(epochs=2, batch_size=1, learning_rate=1e-3, weight_decay=0.1, warmup_share=0.25)
    state = torch.get_rng_state()
    found = fine_tuned(base, sequences, settings, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not found.training

    generator, other = torch.Generator().manual_seed(5), model(320, seed=1).double()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1)
    shares = [1 / 3, 2 / 3, 1, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, 11)])
    for _ in range(2):
        for place in torch.randperm(6, generator=generator).tolist():
            ids = torch.from_numpy(sequences[place].tokens.astype(np.int64))[None]
            optimizer.zero_grad()
            other(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            scheduler.step()
    for (name, one), two in zip(found.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8, msg=name)


def test_seed_governs_the_training(run: Run, asked: Asked) -> None:
    base, measurements = model(320, seed=1), [measurement for _, measurement in asked]
    settings = RetrainingSettings(epochs=1)
    losses = [query_losses(fine_tuned(base, list(run.store), settings, seed), measurements, 16) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert (losses[0] != losses[2]).all()
    assert (losses[0] < query_losses(base, measurements, 16)).mean() > 0.5  # it did learn something


def test_query_losses_are_minus_the_measurements(run: Run, asked: Asked) -> None:
    prompt, model = "Lisbon lies on", run.language_model.model
    expected = [-run.query(item.prompt, item.completion, k=1).query["log_probability"] for _, item in asked]
    np.testing.assert_allclose(query_losses(model, [item for _, item in asked], 2), expected, rtol=1e-5)
    one, other = query_losses(model, [run.measure(prompt, " the"), run.measure(prompt, " Po.")], 16)
    (between,) = query_losses(model, [run.measure(prompt, " the", contrast=" Po.")], 16)
    assert between == pytest.approx(one - other, rel=1e-4)


def test_training_that_diverges_is_refused(run: Run, asked: Asked) -> None:
    broken = model(320, seed=1)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="losses are not finite: training diverged; lower the learning rate"):
        query_losses(broken, [asked[0][1]], 16)


def units(run: Path) -> dict[str, int]:
    """When each retrained model's losses were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("evaluations/retrained-*/*/losses.npy")}


def test_bank_is_made_kept_and_extended(influence: Influence, copy: Path, base: Path, queries: Path) -> None:
    words = ("evaluate", copy, "lds", "--queries", queries, "--json")
    first = influence(*words, "--retrain", "--base", base, *FEW).json
    assert (len(first["queries"]), first["num_subsets"], first["num_seeds"], first["ceiling"]) == (Q, 3, 1, None)
    bank, before = read_bank(Path(first["bank"])), units(copy)
    np.testing.assert_array_equal(bank.masks, [random_half(open_run(copy).store.ids, subset) for subset in range(3)])
    again = influence(*words, "--bank", first["bank"]).json
    assert [m["lds"] for m in again["methods"]] == [m["lds"] for m in first["methods"]]

    more = influence(*words, "--retrain", "--base", base, "--subsets", 4, "--seeds", 2, "--epochs", 1, "--method", "bm25").json
    larger = read_bank(Path(more["bank"]))
    np.testing.assert_array_equal(larger.losses[:1, :3], bank.losses)
    assert len(units(copy)) == 8
    assert {name: units(copy)[name] for name in before} == before, "what was there is not trained again"
    assert more["ceiling"] is not None

    others = write_jsonl(queries.with_name("others.jsonl"), QUERIES[1:])
    fewer = influence("evaluate", copy, "lds", "--queries", others, "--json", "--bank", more["bank"], "--method", "bm25").json
    assert fewer["queries"] == ["1", "7"]
    assert fewer["methods"][0]["per_query"] == more["methods"][0]["per_query"][1:]
    stranger = write_jsonl(queries.with_name("stranger.jsonl"), [{"text": "Perth lies on the Swan."}])
    influence("evaluate", copy, "lds", "--queries", stranger, "--bank", more["bank"]).says("query 1 is not one of the 3 whose losses")

    verified = influence("status", copy, "--verify")
    assert (verified.status, verified.err) == (0, "")


def test_other_settings_do_not_mix(influence: Influence, copy: Path, base: Path, queries: Path) -> None:
    words = ("evaluate", copy, "lds", "--queries", queries, "--json", "--retrain", "--base", base, "--method", "bm25", "--subsets", 3)
    banks = [
        influence(*words, "--seeds", 1, "--epochs", 1, *options).json["bank"]
        for options in ((), ("--learning-rate", 1e-3), ("--batch-size", 8))
    ]
    assert len(set(banks)) == 3
    records = [json.loads((Path(bank).parent / "retraining.json").read_text()) for bank in banks]
    assert [record["settings"]["learning_rate"] for record in records] == [5e-4, 1e-3, 5e-4]
    losses = [read_bank(Path(bank)).losses for bank in banks]
    assert (losses[0] != losses[1]).all()
    assert (losses[0] != losses[2]).all()


def test_damaged_unit_is_refused_by_its_name(influence: Influence, copy: Path, base: Path, queries: Path) -> None:
    words = ("evaluate", copy, "lds", "--queries", queries, "--json", "--retrain", "--base", base, "--method", "bm25", *FEW)
    assert influence(*words).status == 0
    path = min(copy.glob("evaluations/retrained-*/*-seed-0/losses.npy"))
    path.write_bytes(b"")
    influence(*words).says(f"{path} is damaged: 0 bytes, expected")


def wait_for(pattern: str, place: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(place.glob(pattern)):
        assert process.poll() is None, f"the command ended before {pattern} appeared"
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.0005)


@pytest.mark.slow
def test_killed_retraining_goes_on_to_the_same_bank(influence: Influence, copy: Path, finished: Path, base: Path, queries: Path) -> None:
    words = ("--queries", queries, "--json", "--retrain", "--base", base, "--method", "bm25", "--subsets", 4, "--seeds", 1)
    process = command("evaluate", copy, "lds", *words)
    wait_for("evaluations/*/*-seed-0", copy, process)
    process.send_signal(signal.SIGSTOP)  # or it would be done before it is met
    influence("evaluate", copy, "lds", *words).says("another process is working on")
    process.send_signal(signal.SIGKILL)
    finish(process)
    (place,) = copy.glob("evaluations/retrained-*")
    (place / ".partial-left").mkdir(exist_ok=True)
    before = units(copy)
    assert 1 <= len(before) < 4
    resumed = influence("evaluate", copy, "lds", *words).json
    assert {name: units(copy)[name] for name in before} == before
    assert not list(place.glob(".partial-*"))
    undisturbed = Path(shutil.copytree(finished, copy.with_name("undisturbed")))
    other = influence("evaluate", undisturbed, "lds", *words).json
    assert Path(resumed["bank"]).read_bytes() == Path(other["bank"]).read_bytes()
    assert resumed["methods"][0]["per_query"] == other["methods"][0]["per_query"]


@pytest.fixture
def on_ray(forks: Path) -> Iterator[ResourcesConfig]:
    resources = ResourcesConfig(workers=2)
    connection: AbstractContextManager[int] = ray_connection(resources)
    with connection:
        yield resources


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Ray's notice of what a later version will do with accelerators
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves the log files of its processes open
def test_retraining_on_ray_gives_the_same_losses(finished: Path, base: Path, asked: Asked, on_ray: ResourcesConfig, tmp_path: Path) -> None:
    banks = []
    for name, resources in (("here", ResourcesConfig()), ("ray", on_ray)):
        opened = open_run(shutil.copytree(finished, tmp_path / name))
        recipe = Recipe(base=str(base), seed=0, settings=RetrainingSettings(epochs=1))
        retraining = retraining_of(opened, recipe, [measurement for _, measurement in asked], paired=False)
        masks = np.stack([random_half(opened.store.ids, subset) for subset in range(4)])
        banks.append(read_bank(retrain(opened, retraining, masks, 1, resources)[0]))
    np.testing.assert_array_equal(banks[0].masks, banks[1].masks)
    np.testing.assert_allclose(banks[0].losses, banks[1].losses, rtol=1e-3)  # workers may run more threads: sums in another order
