"""Influence predicts what happens: scores against the proximal Bregman response function, solved directly.

One more copy of a sequence z in a training set of N moves the parameters to the minimum of
mean over sequences of KL(p_start ‖ p) + Σ_layers λ/2 ‖θ − θ_start‖² + (1/N) L(z, θ) (Grosse et al. 2023, section 2.1.1 and appendix C;
for a softmax the Bregman divergence of the cross-entropy is this KL divergence). The change of a completion's log-probability
there is what a score predicts.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model
from scipy.stats import pearsonr, spearmanr
from small_run import Influence, World, everything, run_pipeline, write_jsonl
from torch import Tensor, nn

from ekfac import Damping, LayerFactors, SequenceBatch, fit, true_label_loss
from influence.attribution import AttributedModel, precondition, query_gradients, scan
from influence.batches import BatchBudget, collate
from influence.evaluation.pbrf import TOLERANCE, agreement, in_float64
from influence.evaluation.pbrf import chosen as choose
from influence.evaluation.pbrf import response as solve
from influence.measurement import Measurement
from influence.refinement import RefineOptions, refine
from influence.sequences import TrainingSequence

N, T = 200, 6
CPU = torch.device("cpu")


def markov_sequences() -> list[TrainingSequence]:
    """Text with something to learn: a random Markov chain. The last sequence is the query."""
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)
    tokens = np.zeros((N + 1, T), dtype=np.int32)
    tokens[:, 0] = rng.integers(0, VOCABULARY, N + 1)
    for t in range(1, T):
        tokens[:, t] = [rng.choice(VOCABULARY, p=transitions[token]) for token in tokens[:, t - 1]]
    counted = np.arange(T) > 0
    return [TrainingSequence(id=str(n), document=str(n), tokens=row, counted=counted, text="", metadata={}) for n, row in enumerate(tokens)]


def train(model: nn.Module, batch: SequenceBatch) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (true_label_loss(model, batch) / N).backward()
        optimizer.step()


@contextmanager
def only_attributed(model: nn.Module, factors: dict[str, LayerFactors]) -> Iterator[list[tuple[nn.Parameter, Tensor, float]]]:
    """(parameter, its value at the start, λ) of every attributed layer; the others stay fixed."""
    model.requires_grad_(False)
    found = [(p, p.detach().clone(), factor.damping) for name, factor in factors.items() for p in model.get_submodule(name).parameters()]
    for parameter, _, _ in found:
        parameter.requires_grad_(True)
    yield found


def response(
    model: nn.Module,
    attributed: list[tuple[nn.Parameter, Tensor, float]],
    everything: SequenceBatch,
    copy: SequenceBatch,
    query: SequenceBatch,
) -> float:
    """The query's log-probability at the minimum of the objective with one more copy, minimised by L-BFGS from the start."""
    with torch.no_grad():
        for parameter, start, _ in attributed:
            parameter.copy_(start)
        before = model(input_ids=everything.tokens).logits[:, :-1].log_softmax(-1)
    parameters = [parameter for parameter, _, _ in attributed]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_grad=1e-8, tolerance_change=1e-12, history_size=50, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        now = model(input_ids=everything.tokens).logits[:, :-1].log_softmax(-1)
        divergence = (before.exp() * (before - now)).sum() / N
        proximity = sum((damping / 2 * (parameter - start).square().sum() for parameter, start, damping in attributed), torch.zeros(()))
        value = divergence + proximity + true_label_loss(model, copy) / N
        value.backward()
        return value

    optimizer.step(objective)
    assert max(float(p.grad.abs().max()) for p in parameters if p.grad is not None) < 1e-4
    with torch.no_grad():
        return -float(true_label_loss(model, query))


# Which layers, the least correlation, and the range of (change / score). With one layer EK-FAC stands for the whole curvature. With all of them it
# leaves out how layers make up for each other, and so overestimates: a dense Gauss-Newton solve over all layers gave a slope of .93 here, one by
# blocks .28, EK-FAC .20.
CASES = {"one layer": (["*.h.1.mlp.c_proj"], 0.95, (0.5, 1.5)), "all layers": (["*"], 0.8, (0.1, 1.5))}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "all layers")) for case in CASES])
def test_scores_predict_the_proximal_bregman_response(case: str) -> None:
    patterns, least_correlation, slopes = CASES[case]
    model, sequences = tiny_model("gpt2"), markov_sequences()
    everything, query = collate(sequences[:N], CPU), collate(sequences[N:], CPU)
    train(model, everything)
    tiny = copy.deepcopy(model)
    factors, coverage = fit(model, [everything], layers=patterns, damping=Damping(value=1.0))
    budget = BatchBudget(max_tokens=2000, memory_bytes=10**9, bytes_per_token=1, bytes_per_sequence=1)
    attributed = AttributedModel(model=model, layers=coverage.layers, budget=budget, device=CPU)
    asked = Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequences[N]),))
    scores = scan(attributed, precondition(query_gradients(attributed, [asked]).gradients, factors), sequences[:N])[0] / N
    order = np.argsort(scores)
    chosen = np.concatenate([order[-3:], order[50:150:33], order[:3]])
    with torch.no_grad():
        start = -float(true_label_loss(model, query))
    # The command's own solver, in coordinates whitened by EK-FAC, finds the minimum that plain L-BFGS over the parameters finds, which takes far more
    # steps; both stop at a thousandth or so of the way. It measures any number of queries at once.
    damping = {name: factor.damping for name, factor in factors.items()}
    problem = in_float64(tiny, coverage.layers, factors, damping, sequences[:N], N)
    found = [solve(problem, sequences[n], [asked, asked]) for n in chosen]
    assert max(one.residual for one in found) < TOLERANCE
    np.testing.assert_array_equal(*np.array([one.changes for one in found]).T)
    changes = np.array([one.changes[0] for one in found])
    with only_attributed(model, factors) as parameters:
        for place in (0, -1):
            plain = response(model, parameters, everything, collate([sequences[chosen[place]]], CPU), query) - start
            assert changes[place] == pytest.approx(plain, rel=0.01)
    predicted = scores[chosen]
    assert pearsonr(predicted, changes).statistic > least_correlation
    assert slopes[0] < float(predicted @ changes / (predicted @ predicted)) < slopes[1]

    # Refined, with the exact Gauss-Newton Hessian over all layers together, scores are right in order and in size.
    options = RefineOptions(sequences=N, steps=40, tolerance=1e-3)
    attributed = AttributedModel(model=tiny, layers=coverage.layers, budget=budget, device=CPU)
    gradients = query_gradients(attributed, [asked]).gradients
    solution = refine(attributed, gradients, factors, damping, sequences[:N], options, lambda done, total: None)
    refined = scan(attributed, solution.vectors, [sequences[n] for n in chosen])[0] / N
    assert pearsonr(refined, changes).statistic > 0.95
    assert 0.7 < float(refined @ changes / (refined @ refined)) < 1.3


def test_a_weight_of_two_is_two_sequences() -> None:
    """Two thirds of the one objective are the other, so both have the same minimum."""
    model, sequences = tiny_model("gpt2").double(), markov_sequences()
    factors, coverage = fit(model, [collate(sequences[:20], CPU)], layers=["*.h.1.mlp.c_proj"], damping=Damping(value=1.0))
    asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequences[-1]),))]
    changes = []
    for others, scale in (([sequences[0], replace(sequences[1], weight=2.0)], 1.0), ([sequences[0], sequences[1], sequences[1]], 2 / 3)):
        damping = {name: scale * factor.damping for name, factor in factors.items()}
        problem = in_float64(model, coverage.layers, factors, damping, others, round(20 / scale))
        changes.append(solve(problem, sequences[2], asked).changes)
    assert abs(changes[0]) > 1e-6
    np.testing.assert_allclose(changes[0], changes[1], rtol=1e-2)  # as near to the minimum as the solver goes


def test_agreement_is_the_mean_of_the_queries_correlations() -> None:
    rng = np.random.default_rng(0)
    changes = rng.standard_normal((3, 12))
    scores = 2 * changes + 0.5 * rng.standard_normal((3, 12))
    found = agreement(scores, changes)
    expected = [pearsonr(*pair).statistic for pair in zip(scores, changes, strict=True)]
    assert found.correlation.value == pytest.approx(np.mean(expected))
    assert found.rank_correlation.value == pytest.approx(
        np.mean([spearmanr(*pair).statistic for pair in zip(scores, changes, strict=True)])
    )
    assert found.slope == pytest.approx(np.linalg.lstsq(scores.reshape(-1, 1), changes.ravel(), rcond=None)[0][0])
    assert found.correlation.interval is not None
    assert found.correlation.interval[0] < found.correlation.value < found.correlation.interval[1]


def test_half_of_the_copies_are_of_the_largest_influence_of_either_sign() -> None:
    scores = np.zeros((2, 20))
    scores[0, [3, 4]], scores[1, [9, 11]] = [5.0, -9.0], [-0.2, 0.1]
    order = np.arange(20)[::-1]
    assert set(choose(scores, order, 4)) == {4, 9, 19, 18}
    assert set(choose(scores, order, 20)) == set(range(20))


WRONG = [(["--copies", "2"], "--copies: a correlation needs from 3 to as many as the 65"), (["--copies", "66"], "not 66")]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_request_is_refused(words: list[str], message: str, influence: Influence, finished: Path, tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"text": "Oslo lies on the Aker."}])
    before = everything(finished)
    influence("evaluate", finished, "pbrf", "--queries", queries, *words).says(message)
    assert everything(finished) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_command_keeps_what_it_solved_and_says_how_scores_agree(influence: Influence, world: World, tmp_path: Path) -> None:
    """Over few layers, since it takes more steps the more there are."""
    run = run_pipeline(world.settings(tmp_path / "run", factors={"layers": ["*.h.1.mlp.*"]})).directory.path
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"id": "a", "text": "Oslo lies on the Aker."}, {"text": "Lima lies on the Tagus."}])
    words = ("evaluate", run, "pbrf", "--queries", queries, "--copies", 3, "--refine-steps", 3, "--json")
    answer = influence(*words).json
    assert [method["name"] for method in answer["methods"]] == ["ekfac", "refined", "gradient-dot"]
    assert np.array(answer["changes"]).shape == (2, 3)
    assert len(answer["copied"]) == 3
    next(run.glob("evaluations/pbrf-*/sequence-*")).rename(tmp_path / "lost")
    kept = {path: path.stat().st_mtime_ns for path in run.glob("evaluations/pbrf-*/*/response.npy")}
    assert len(kept) == 2
    assert influence(*words).json == answer
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert (run / "evaluations/pbrf.png").read_bytes().startswith(b"\x89PNG")
