"""Layers whose factors do not fit into memory together are worked on in groups, a pass for each, with the same results."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import POSITIONS, World, run_pipeline
from torch import nn

from influence import QueryOptions, RefineOptions, RequestError, Run, open_run
from influence.batches import batch_budget, factor_bytes, layer_groups, model_memory, queries_at_once
from influence.config import load_config
from influence.result import InfluenceResult
from influence.solving import solved
from jobs.stages import STAGES, do_unit

LITTLE = 850_000  # bytes: the model, one sequence, and the factors of a quarter of the layers
QUERY = ("Lisbon lies on", " the Tagus.")


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def divided(run: Run) -> Run:
    opened = open_run(run.directory.path, memory_budget=LITTLE)
    assert len(opened.layer_groups) >= 3
    return opened


def test_every_layer_is_in_one_group_and_in_its_place(run: Run) -> None:
    layers = run.coverage.layers
    use = model_memory(run.language_model.model, layers)
    assert layer_groups(use, 2**40, POSITIONS, "cpu") == [layers]
    for budget in range(0, 4 * factor_bytes(layers), factor_bytes(layers) // 7):
        groups = layer_groups(use, budget, POSITIONS, "cpu")
        assert tuple(layer for group in groups for layer in group) == layers


def test_a_group_leaves_memory_for_batches(run: Run) -> None:
    model, layers = run.language_model.model, run.coverage.layers
    use = model_memory(model, layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for budget in (LITTLE, 2 * LITTLE, 40 * LITTLE):
        batches = batch_budget(use, budget, POSITIONS, "cpu")
        for group in layer_groups(use, budget, POSITIONS, "cpu"):
            left = budget - weights - factor_bytes(group)
            assert len(group) == 1 or left >= (budget - weights) / 4 or left >= batches.bytes_of(batches.max_tokens)
            assert batches.fits(1, POSITIONS)


def test_vectors_of_queries_fit_beside_a_batch(run: Run) -> None:
    model, layers = run.language_model.model, run.coverage.layers
    use = model_memory(model, layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    numbers = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    for budget in (2**23, 2**25, 2**30):
        batches = batch_budget(use, budget, POSITIONS, "cpu")
        count = queries_at_once(batches, layers)
        left = batches.beside(count, layers)
        assert weights + factor_bytes(layers) + 4 * count * numbers + left.memory_bytes <= budget
        assert left.fits(1, POSITIONS)
        assert queries_at_once(batches, layers, copies=10) <= count
    assert count > 1000
    assert left.max_tokens == 4 * batches.max_tokens == 4 * batches.beside(1, layers).max_tokens


def _same(one: InfluenceResult, other: InfluenceResult) -> None:
    assert [sequence.id for sequence in one.sequences] == [sequence.id for sequence in other.sequences]
    scale = abs(one.sequences[0].score)
    for left, right in zip(one.sequences, other.sequences, strict=True):
        assert list(left.layers) == list(right.layers)
        np.testing.assert_allclose(list(left.layers.values()), list(right.layers.values()), atol=1e-4 * scale)
        assert [token for token, _ in left.tokens] == [token for token, _ in right.tokens]
        np.testing.assert_allclose([share for _, share in left.tokens], [share for _, share in right.tokens], atol=1e-4 * scale)
    assert one.query["log_probability"] == pytest.approx(other.query["log_probability"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        QueryOptions(k=3),
        QueryOptions(k=3, exact=True, opponents=True),
        QueryOptions(k=3, normalize=True),
        QueryOptions(k=3, layers=("*.attn.*",)),
        QueryOptions(k=3, where="source = 'diary'"),
    ],
    ids=["index", "exact", "normalized", "layers", "where"],
)
def test_answers_do_not_depend_on_groups(run: Run, divided: Run, options: QueryOptions) -> None:
    measurements = [run.measure(*QUERY), run.measure("Oslo lies on", " the Aker.")]
    for one, other in zip(run.answer(measurements, options), divided.answer(measurements, options), strict=True):
        _same(one, other)


def test_rows_of_queries_do_not_depend_on_groups(run: Run, divided: Run) -> None:
    measurements = [run.measure(*QUERY)]
    one, other = (solved(opened, opened.attributed, measurements, None, rows=True).rows for opened in (run, divided))
    assert one is not None
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


@pytest.fixture(scope="module")
def made_in_groups(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pipeline(world.settings(tmp_path_factory.mktemp("groups") / "run", resources={"memory_budget": LITTLE}))


def test_a_run_larger_than_memory_has_the_same_factors_and_rows(run: Run, made_in_groups: Run) -> None:
    assert len(open_run(made_in_groups.directory.path, memory_budget=LITTLE).layer_groups) >= 3
    whole = open_run(made_in_groups.directory.path)
    for name, factor in whole.factors.items():
        expected = run.factors[name].eigenvalues
        np.testing.assert_allclose(sorted(factor.eigenvalues.flatten()), sorted(expected.flatten()), rtol=2e-2, atol=1e-3 * expected.max())
        assert factor.damping == pytest.approx(run.factors[name].damping, rel=1e-4)
    np.testing.assert_allclose(whole.self_influence, run.self_influence, rtol=1e-3)
    scores = [opened.exact_scores(solved(opened, opened.attributed, [run.measure(*QUERY)], None).vectors, 1)[0] for opened in (run, whole)]
    assert np.corrcoef(*scores)[0, 1] > 0.9999


def test_covariances_have_the_same_files_whatever_was_computed_together(run: Run, made_in_groups: Run) -> None:
    for stage, unit in (("covariances", "part-00000"), ("eigenvalues", "part-00000"), ("factors", "all")):
        names = [sorted(path.name for path in opened.directory.unit_path(stage, unit).iterdir()) for opened in (run, made_in_groups)]
        assert names[0] == names[1]


def test_refinement_that_needs_more_memory_is_refused(divided: Run) -> None:
    with pytest.raises(RequestError, match="refinement couples all layers, whose factors do not fit together"):
        divided.query(*QUERY, refine=RefineOptions(sequences=4, steps=1))


def test_a_budget_too_small_for_one_layer_is_refused_with_what_would_do(run: Run) -> None:
    model, layers = run.language_model.model, run.coverage.layers
    with pytest.raises(RequestError, match=r"the factors of its largest layer and one sequence need \d+ MiB"):
        batch_budget(model_memory(model, layers), 2**16, POSITIONS, "cpu")


def test_one_group_is_loaded_at_a_time(divided: Run) -> None:
    held = [divided.factors_of(part) for part in divided.parts()]
    assert [tuple(one.factors) for one in held] == [tuple(layer.name for layer in group) for group in divided.layer_groups]
    assert divided.factors_of(divided.parts()[-1]) is held[-1]
    assert divided.factors_of(divided.parts()[0]) is not held[0]


class LittleMemory:
    """As a hook before a model's forward pass: the exception of a GPU without memory for batches of more than so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.refused = num_tokens, 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].numel() > self.num_tokens:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_batches_that_do_not_fit_are_halved(run: Run, world: World, tmp_path: Path) -> None:
    opened = open_run(run.directory.path)
    memory = LittleMemory(2 * POSITIONS)
    opened.language_model.model.register_forward_pre_hook(memory, with_kwargs=True)
    expected, found = (one.query(*QUERY, k=5) for one in (run, opened))
    assert memory.refused >= 2
    _same(expected, found)


def test_units_of_work_are_done_with_smaller_batches(run: Run, world: World, tmp_path: Path) -> None:
    rows = next(stage for stage in STAGES if stage.name == "rows")
    unit = rows.units(run)[0]
    shutil.copytree(run.directory.path, tmp_path / "run", ignore=lambda place, _: [unit] if Path(place).name == "rows" else [])
    opened, memory = open_run(tmp_path / "run"), LittleMemory(2 * POSITIONS)
    opened.language_model.model.register_forward_pre_hook(memory, with_kwargs=True)
    settings = world.settings(tmp_path / "run")
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    do_unit(rows, opened, load_config(None, flat), unit)
    assert memory.refused >= 2
    np.testing.assert_allclose(opened.self_influence, run.self_influence, rtol=1e-4)


def test_a_sequence_that_does_not_fit_alone_is_an_error(run: Run) -> None:
    opened = open_run(run.directory.path)
    opened.language_model.model.register_forward_pre_hook(LittleMemory(2), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        opened.query(*QUERY, k=5)
