"""EK-FAC scores for several dampings from one pass, and `influence evaluate RUN lds --damping`."""

from pathlib import Path

import numpy as np
import pytest
from small_run import Influence, write_jsonl

from influence import RequestError, Run
from influence.attribution import query_gradients
from influence.evaluation.dampings import check_dampings, scores_by_damping
from influence.evaluation.methods import scores_by
from influence.measurement import Measurement
from influence.refinement import RefineOptions
from influence.solving import ignore

QUERY = ("Lisbon lies on", " the Tagus.")


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return Run(finished)


def test_scores_of_every_damping_are_those_of_its_formula(run: Run) -> None:
    """Against Σ over the axes of q · x / (Λ + λ) in float64, from the gradients of queries and of training sequences one by one."""
    dampings, measurements = (1e-3, 0.1, 3.0), [run.measure(*QUERY), run.measure("", "The Tagus froze again.")]
    found = scores_by_damping([*dampings, 0.1], [run], measurements, ignore)
    numbers = [0, 7, 31, len(run.store) - 1]
    losses = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, run.store[number]),)) for number in numbers]
    queries = query_gradients(run.attributed, measurements, run.factors).gradients
    sequences = query_gradients(run.attributed, losses, run.factors).gradients  # of minus the log-probability: of the loss
    assert list(found) == list(dampings)
    for damping in dampings:
        expected = np.zeros((2, len(numbers)))
        for name, factor in run.factors.items():
            values = factor.eigenvalues.double().numpy()
            left, right = (gradients[name].double().numpy() for gradients in (queries, sequences))
            expected += np.einsum("qoj,noj->qn", left / (values + damping * values.mean()), right)
        # Gradients are float32 and their products sums of numbers of both signs: a few millionths of the largest score.
        np.testing.assert_allclose(found[damping][:, numbers], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    own = scores_by("ekfac", [run], measurements, RefineOptions(), ignore)
    np.testing.assert_allclose(found[0.1], own, rtol=1e-4, atol=1e-5 * np.abs(own).max())


def test_many_dampings_are_taken_some_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements = [run.measure(*QUERY), run.measure("", "The Tagus froze again.")]
    together = scores_by_damping([0.01, 0.1, 1.0], [run], measurements, ignore)
    monkeypatch.setattr("influence.solving.queries_at_once", lambda *_: 4)
    for damping, scores in scores_by_damping([0.01, 0.1, 1.0], [run], measurements, ignore).items():
        np.testing.assert_allclose(scores, together[damping], rtol=1e-4, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("wrong", [0.0, -0.1, float("nan"), float("inf")])
def test_dampings_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(RequestError, match="--damping: a damping is a number above 0"):
        check_dampings([0.1, wrong])


def test_lds_compares_dampings(influence: Influence, finished: Path, run: Run, tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": QUERY[0], "completion": QUERY[1]}, {"text": "The Tagus froze again."}])
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "bank.npz", masks=rng.random((12, len(run.store))) < 0.5, query_losses=rng.standard_normal((12, 2)))
    words = (
        "evaluate",
        finished,
        "lds",
        "--queries",
        queries,
        "--bank",
        tmp_path / "bank.npz",
        "--out",
        tmp_path / "out",
        "--method",
        "ekfac",
    )
    found = influence(*words, "--damping", 0.01, "--damping", 0.1, "--json").json["methods"]
    assert [method["name"] for method in found] == ["ekfac", "ekfac, damping 0.01", "ekfac, damping 0.1"]
    assert found[2]["lds"] == pytest.approx(found[0]["lds"], abs=0.02)  # the run's own damping; float32 may swap two subsets
    influence(*words, "--damping", 0).says("--damping: a damping is a number above 0")
