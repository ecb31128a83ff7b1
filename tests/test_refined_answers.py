"""Refined answers, the damping of an optimizer, and answers averaged over several runs, on a real run in miniature."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import World, model, run_pipeline
from torch import nn

from ekfac import gauss_newton_product
from influence import QueryOptions, RefineOptions, RequestError, Run, answer, answer_both_ends, open_run, save_optimizer_state
from influence.attribution import query_gradients
from influence.batches import collate
from influence.optimizer_state import FILE, read_optimizer_state
from influence.solving import solved
from jobs.stages import create_run

QUERY = ("Lisbon lies on", " the Tagus.")
LAYER = "transformer.ln_f"
EXACTLY = RefineOptions(sequences=1000, steps=200, tolerance=1e-6)


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose model keeps the state of the optimizer that trained it, for three steps."""
    place = world.copy(tmp_path_factory.mktemp("trained"))
    network = model(320, seed=1)
    optimizer = train(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    network.save_pretrained(place.model)
    save_optimizer_state(network, optimizer, place.model, learning_rate_sum=3e-3)
    return run_pipeline(place.settings(place.model.parent / "run", factors={"damping": "optimizer"}, index={"recall_queries": 0}))


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for seed in range(3):
        ids = torch.randint(0, 320, (4, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def dense_scores(run: Run, damping: torch.Tensor) -> np.ndarray:
    """[N] (1/N) ∇fᵀ (G + D)⁻¹ ∇L over one layer, with G as a matrix over all sequences."""
    attributed = replace(run.attributed, layers=tuple(layer for layer in run.coverage.layers if layer.name == LAYER))
    gradient = query_gradients(attributed, [run.measure(*QUERY)]).gradients[LAYER].double()
    size = gradient.numel()
    axes = torch.eye(size).reshape(size, *gradient.shape[1:])
    matrix = torch.zeros((size, size), dtype=torch.float64)
    for sequence in run.store:
        found = gauss_newton_product(attributed.model, attributed.layers, collate([sequence], attributed.device), {LAYER: axes})
        matrix += found[LAYER].reshape(size, size).double() / len(run.store)
    solved = torch.linalg.solve(matrix + torch.diag(damping.double().flatten()), gradient.flatten())
    return run.exact_scores([(attributed, {LAYER: solved.float().reshape(gradient.shape)})], 1)[0] / len(run.store)


@pytest.mark.parametrize("which", ["run", "trained"])
def test_refined_scores_equal_a_dense_solution(which: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(which)
    damping = run.refining_damping[LAYER]
    shape = next(layer.shape for layer in run.coverage.layers if layer.name == LAYER)
    assert isinstance(damping, torch.Tensor) == (which == "trained")
    expected = dense_scores(run, torch.as_tensor(damping).expand(shape))
    result = run.query(*QUERY, k=len(run.store), exact=True, layers=(LAYER,), refine=EXACTLY)
    found = result.scores()
    # The model and the conjugate gradients compute in float32.
    np.testing.assert_allclose([found[name] for name in run.store.ids], expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert result.provenance["method"] == "refined"
    assert result.provenance["refinement"]["damping"] == ("optimizer" if which == "trained" else 0.1)
    assert result.provenance["refinement"]["relative_residual"] <= 1e-6


def test_one_step_is_the_ekfac_answer_at_another_length(run: Run) -> None:
    options = {"k": len(run.store), "exact": True}
    plain = run.query(*QUERY, **options)
    refined = run.query(*QUERY, **options, refine=RefineOptions(steps=1, sequences=1000))
    assert [s.id for s in refined.sequences] == [s.id for s in plain.sequences]
    ratios = [one.score / other.score for one, other in zip(refined.sequences, plain.sequences, strict=True)]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert refined.provenance["refinement"]["steps"] == 1
    assert refined.provenance["refinement"]["relative_residual"] > 0


def test_refined_candidates_come_from_the_index_and_are_reranked_exactly(run: Run) -> None:
    refine = RefineOptions(steps=4, sequences=32)
    everything = run.query(*QUERY, k=5, exact=True, refine=refine)
    by_index = run.query(*QUERY, k=5, candidates=len(run.store), refine=refine)
    assert [s.id for s in by_index.sequences] == [s.id for s in everything.sequences]
    np.testing.assert_allclose([s.score for s in by_index.sequences], [s.score for s in everything.sequences], rtol=1e-4)
    assert by_index.provenance["recall_at_10"] is None
    assert sum(by_index.sequences[0].layers.values()) == pytest.approx(by_index.sequences[0].score, rel=1e-6)
    assert sum(share for _, share in by_index.sequences[0].tokens) == pytest.approx(by_index.sequences[0].score, rel=1e-4)


def test_queries_are_refined_together_as_they_are_alone(run: Run) -> None:
    measurements = [run.measure(*QUERY), run.measure("We reached Oslo", " in the rain")]
    options = QueryOptions(k=3, exact=True, refine=RefineOptions(steps=3, sequences=16))
    for together, measurement in zip(run.answer(measurements, options), measurements, strict=True):
        (alone,) = run.answer([measurement], options)
        assert [s.id for s in together.sequences] == [s.id for s in alone.sequences]
        np.testing.assert_allclose([s.score for s in together.sequences], [s.score for s in alone.sequences], rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"sequences": 0}, {"tolerance": 1.0}])
def test_impossible_refinements_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="refine"):
        RefineOptions(**wrong)  # type: ignore[arg-type]


# the damping of an optimizer


def test_damping_of_an_optimizer_is_its_own_metric(trained: Run) -> None:
    state = load_file(Path(trained.model_config.name) / FILE)
    moment = state["exp_avg_sq.transformer.h.0.mlp.c_fc.weight"] / (1 - 0.999**3)
    tokens = trained.store.summary["counted_tokens"] / len(trained.store)
    expected = 1.5 * tokens * (moment.sqrt() + 1e-8) / 3e-3
    torch.testing.assert_close(trained.refining_damping["transformer.h.0.mlp.c_fc"][:, :-1], expected.T)  # type: ignore[index]
    tied = trained.refining_damping["transformer.wte"]
    assert isinstance(tied, torch.Tensor)
    assert tied.shape == (320, 16)


def test_shorter_training_is_damped_more(trained: Run) -> None:
    attributed = replace(trained.attributed, layers=tuple(layer for layer in trained.coverage.layers if layer.name == LAYER))
    measurements = [trained.measure(*QUERY)]
    gradients = query_gradients(attributed, measurements).gradients
    norms = []
    for share in (1.0, 0.01):
        [(_, vectors)] = solved(trained, attributed, measurements, replace(EXACTLY, training_share=share)).vectors
        norms.append(float(vectors[LAYER].norm()))
    damping = trained.refining_damping[LAYER]
    assert norms[1] < norms[0]
    torch.testing.assert_close(vectors[LAYER], gradients[LAYER] / (100 * damping), rtol=0.2, atol=1e-3 * norms[1])


def test_optimizer_without_second_moments_is_refused(tmp_path: Path) -> None:
    network = model(320)
    with pytest.raises(ValueError, match=r"SGD keeps no second moment of transformer\.wte\.weight"):
        save_optimizer_state(network, train(network, torch.optim.SGD(network.parameters(), lr=1e-3)), tmp_path, learning_rate_sum=1.0)
    assert list(tmp_path.iterdir()) == []


FACTS = {"betas": "0.9,0.999", "eps": "1e-8", "step": "3", "learning_rate_sum": "0.1"}


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({**FACTS, "step": "many"}, {"exp_avg_sq.a": torch.ones(1)}, "are not all numbers"),
        ({**FACTS, "learning_rate_sum": "0"}, {"exp_avg_sq.a": torch.ones(1)}, "are impossible"),
        ({"betas": "0.9,0.999"}, {"exp_avg_sq.a": torch.ones(1)}, "lacks eps, step, learning_rate_sum: write it with"),
        (FACTS, {"exp_avg.a": torch.ones(1)}, r"lacks tensors named exp_avg_sq\.\*"),
        (FACTS, {"exp_avg_sq.a": -torch.ones(1)}, "negative or not finite"),
    ],
)
def test_states_that_do_not_say_enough_are_refused(
    facts: dict[str, str], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / FILE, metadata=facts)
    with pytest.raises(RequestError, match=message):
        read_optimizer_state(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(RequestError, match="cannot be read as safetensors"):
        read_optimizer_state(tmp_path / FILE)


def test_state_of_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    save_file({"exp_avg_sq.transformer.wte.weight": torch.ones(2, 2)}, tmp_path / FILE, metadata=FACTS)
    state = read_optimizer_state(tmp_path / FILE)
    with pytest.raises(RequestError, match=r"has a shape \(2, 2\) of the second moment of transformer.wte.weight \(320, 16\)"):
        state.damping(run.language_model.model, run.coverage.layers, 10.0)


def test_damping_by_an_optimizer_that_left_no_state_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    from influence.config import load_config

    config = load_config(
        None,
        {"model.name": str(world.model), "data.files": str(world.data), "run.dir": str(tmp_path / "run"), "factors.damping": "optimizer"},
    )
    with pytest.raises(RequestError, match=r"factors\.damping is optimizer, but there is no optimizer\.safetensors in"):
        create_run(config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 32})}))
    assert not (tmp_path / "run").exists()


# several runs


def test_scores_of_several_runs_are_averaged(run: Run, trained: Run) -> None:
    options = QueryOptions(k=len(run.store), exact=True)
    measurement = run.measure(*QUERY)
    alone = [{s.id: s for s in one.answer([measurement], options)[0].sequences} for one in (run, trained)]
    (both,) = answer([run, trained], [measurement], options)
    for sequence in both.sequences:
        expected = [answers[sequence.id] for answers in alone]
        np.testing.assert_allclose(list(sequence.runs.values()), [s.score for s in expected], rtol=1e-5, atol=1e-9)
        assert sequence.score == pytest.approx(np.mean([s.score for s in expected]), rel=1e-5, abs=1e-9)
        assert sum(sequence.layers.values()) == pytest.approx(sequence.score, rel=1e-6, abs=1e-12)
    assert [s.score for s in both.sequences] == sorted((s.score for s in both.sequences), reverse=True)
    assert [one["run"] for one in both.provenance["averaged_over"]] == [str(run.directory), str(trained.directory)]


def test_candidates_of_several_runs_are_those_of_each(run: Run, trained: Run) -> None:
    (both,) = answer([run, trained], [run.measure(*QUERY)], QueryOptions(k=3, candidates=5))
    assert 5 <= both.provenance["candidates"] <= 10
    assert both.provenance["recall_at_10"] is None


def test_both_ends_are_what_each_alone_would_be(run: Run) -> None:
    measurement = run.measure(*QUERY)
    ((helping, hurting),) = answer_both_ends([run], [measurement], QueryOptions(k=4))
    for found, opponents in ((helping, False), (hurting, True)):
        (alone,) = run.answer([measurement], QueryOptions(k=4, opponents=opponents))
        assert [s.id for s in found.sequences] == [s.id for s in alone.sequences]
    assert helping.sequences[0].score > 0 > hurting.sequences[0].score


def test_runs_over_other_sequences_are_refused(run: Run, world: World, tmp_path: Path) -> None:
    other = world.copy(tmp_path)
    other.data.write_text("".join(other.data.read_text().splitlines(keepends=True)[:8]))
    different = run_pipeline(other.settings(tmp_path / "run", index={"recall_queries": 0}))
    with pytest.raises(RequestError, match="were made from other training sequences: their scores cannot be averaged"):
        answer([run, different], [run.measure(*QUERY)], QueryOptions())
    shutil.rmtree(tmp_path / "run")
