"""Gradients of candidates that are kept between queries: scores do not depend on what is kept, and memory does not grow beyond what is allowed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from influence.answering import QueryOptions, selected
from influence.attribution import AttributedModel, Vectors, scan
from influence.batches import BatchBudget
from influence.kept_gradients import KeptGradients
from influence.run import Run


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return Run(finished)


@pytest.fixture(scope="module")
def exact(run: Run) -> tuple[AttributedModel, Vectors]:
    """The run's model in float64, and three random vectors."""
    double = replace(run.attributed, model=run.attributed.model.double(), budget=_small_batches(run.attributed.budget))
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn(3, *layer.shape, generator=generator, dtype=torch.float64) for layer in double.layers}
    return double, vectors


def _small_batches(budget: BatchBudget) -> BatchBudget:
    return replace(budget, max_tokens=160)


def test_scores_are_those_of_a_scan_whatever_was_kept_before(run: Run, exact: tuple[AttributedModel, Vectors]) -> None:
    attributed, vectors = exact
    kept = KeptGradients(attributed.layers)
    expected = scan(attributed, vectors, run.store.select(range(len(run.store))))
    size = 8 * sum(layer.shape[0] * layer.shape[1] for layer in attributed.layers)
    order = np.random.default_rng(1)
    for limit in (0, 5 * size, 30 * size, 12 * size):
        kept.limit(limit)
        assert kept.num_bytes <= limit
        for count in (1, 0, 11, 29):
            numbers = order.choice(len(run.store), count, replace=False).tolist()
            wanted = order.random((3, count)) < 0.6
            found = kept.scores([(attributed, vectors)], run.store, numbers, wanted)
            assert kept.num_bytes <= limit
            assert kept.num_bytes >= count * size or limit < count * size
            assert kept.num_bytes == sum(gradient.nbytes for gradient in kept._kept.values())
            # The same sums in float64 in another order.
            np.testing.assert_allclose(found[wanted], expected[:, numbers][wanted], rtol=0, atol=1e-12 * np.abs(expected).max())


def test_what_is_kept_needs_no_model(run: Run, exact: tuple[AttributedModel, Vectors]) -> None:
    attributed, vectors = exact
    kept = KeptGradients(attributed.layers)
    kept.limit(2**30)
    passes, everything = list[int](), np.ones((3, 3), dtype=np.bool_)
    handle = attributed.model.register_forward_pre_hook(lambda _module, _arguments: passes.append(1))
    try:
        first = kept.scores([(attributed, vectors)], run.store, [3, 1, 7], everything[:, :3])
        made = len(passes)
        again = kept.scores([(attributed, vectors)], run.store, [7, 3], everything[:, :2])
    finally:
        handle.remove()
    assert made > 0
    assert len(passes) == made
    np.testing.assert_allclose(again, first[:, [2, 0]], rtol=0, atol=1e-12 * np.abs(first).max())


def test_of_some_of_the_layers_nothing_is_kept(run: Run, exact: tuple[AttributedModel, Vectors]) -> None:
    attributed, vectors = exact
    kept = KeptGradients(attributed.layers)
    kept.limit(2**30)
    some = selected(attributed, ["*.mlp.*"])
    found = kept.scores(
        [(some, {layer.name: vectors[layer.name] for layer in some.layers})], run.store, [2, 5], np.ones((3, 2), dtype=np.bool_)
    )
    assert kept.num_bytes == 0
    np.testing.assert_allclose(found, scan(some, vectors, run.store.select([2, 5])), rtol=1e-12)


def test_answers_with_kept_gradients_are_those_without(finished: Path) -> None:
    keeping, plain = Run(finished), Run(finished)
    keeping.kept_gradients.limit(2**30)
    for completion in (" Tagus", " glass", " spring"):
        asked = [QueryOptions(k=5, opponents=opponents, candidates=12) for opponents in (False, True)]
        for options in asked:
            found, expected = (one.answer([one.measure("Lisbon lies on the", completion)], options)[0] for one in (keeping, plain))
            assert [s.id for s in found.sequences] == [s.id for s in expected.sequences]
            assert [s.score for s in found.sequences] == [s.score for s in expected.sequences], "shown scores come from a pass of their own"
    assert keeping.kept_gradients.num_bytes > 0
    assert plain.kept_gradients.num_bytes == 0
