"""Weights of training sequences: the training loss is Σ w L, in curvature, gradients and scores, against autograd and retraining in float64."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model
from small_run import Influence, World, documents, run_pipeline, write_jsonl
from torch import Tensor, nn

from ekfac import (
    Record,
    SequenceBatch,
    attributable_layers,
    capture,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    fit,
    gauss_newton_product,
    inner_products,
    reached_positions,
    sequence_weights,
    token_loss_derivatives,
    true_label_loss,
)
from ekfac.layers import Layer
from influence.attribution import query_gradients, solve
from influence.batches import collate, in_batches
from influence.run import Run

LENGTHS = (7, 4, 5, 7)
WEIGHTS = (3.0, 1.0, 0.0, 2.0)


def weighted_batch(weights: tuple[float, ...] = WEIGHTS) -> SequenceBatch:
    batch = padded_batch(lengths=LENGTHS, prompt=2)
    return SequenceBatch(tokens=batch.tokens, counted=batch.counted, keys=batch.keys, weights=torch.tensor(weights, dtype=torch.float64))


def repeated_batch() -> SequenceBatch:
    """Each sequence as often as its weight says, drawing the same labels each time."""
    batch, rows = padded_batch(lengths=LENGTHS, prompt=2), np.repeat(np.arange(4), np.array(WEIGHTS, dtype=int))
    return SequenceBatch(tokens=batch.tokens[rows], counted=batch.counted[rows], keys=batch.keys[rows])


def layers_of(model: nn.Module, *patterns: str) -> tuple[Layer, ...]:
    return attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 6)[None], use_cache=False), patterns or ("*",)).layers


def near(architecture: str) -> dict[str, float]:
    """Of float64, but for the norms of some models, which compute in float32."""
    return {"rtol": 1e-9, "atol": 1e-11} if architecture in ("gpt2", "neox", "phi") else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi"])  # tied embeddings and biases, none, a head with a bias
def test_weight_counts_as_so_many_copies_in_the_fit(architecture: str) -> None:
    model = tiny_model(architecture)
    layers, loss = layers_of(model), drawn_label_loss(0)
    batches = [weighted_batch(), repeated_batch()]
    found, expected = (covariance_pass(model, layers, [b], loss, reached_positions, sequence_weights) for b in batches)
    for name in expected:
        torch.testing.assert_close(found[name].total.triu(), expected[name].total.triu(), **near(architecture))
    bases = {name: eigenbasis(covariance).vectors for name, covariance in expected.items()}
    sums, copies = (eigenvalue_pass(model, layers, bases, [b], loss, reached_positions) for b in batches)
    for name in copies:
        torch.testing.assert_close(sums[name].total, copies[name].total, **near(architecture))
        assert (sums[name].num_sequences, copies[name].num_sequences) == (4, 6)


def test_weight_counts_as_so_many_copies_in_the_gauss_newton_matrix() -> None:
    model = tiny_model("gpt2")
    layers = layers_of(model)
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn((2, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}
    found, expected = (gauss_newton_product(model, layers, batch, vectors) for batch in (weighted_batch(), repeated_batch()))
    for name in vectors:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


def test_factors_are_the_weighted_mean_of_squared_gradients_by_autograd() -> None:
    model, batch, name = tiny_model("neox"), weighted_batch((0.5, 2.0, 0.0, 1.25)), "gpt_neox.layers.1.mlp.dense_4h_to_h"
    factors = fit(model, [batch])[0][name]
    weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
    total = torch.zeros_like(factors.eigenvalues)
    for n in range(4):
        one = SequenceBatch(tokens=batch.tokens[n : n + 1], counted=batch.counted[n : n + 1], keys=batch.keys[n : n + 1])
        gradients = torch.autograd.grad(drawn_label_loss(0)(model, one), [weight, bias])
        total += float(batch.weights[n]) * factors.rotate(torch.cat([gradients[0], gradients[1][:, None]], 1)) ** 2  # type: ignore[index]
    torch.testing.assert_close(factors.eigenvalues, total / 4, rtol=1e-9, atol=1e-14)


def test_gradient_of_a_sequence_and_of_its_tokens_is_times_its_weight() -> None:
    model, batch = tiny_model("gpt2"), weighted_batch((0.5, 2.0, 0.0, 1.25))
    plain = padded_batch(lengths=LENGTHS, prompt=2)
    layers = layers_of(model, "*.mlp.*")
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn((1, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}

    def products(batch: SequenceBatch) -> Tensor:
        found: list[Tensor] = []

        def consume(layer: Layer, record: Record) -> None:
            found.append(inner_products(record, vectors[layer.name])[0])

        capture(model, layers, partial(true_label_loss, model, batch), batch.reached, consume)
        return torch.stack(found).sum(0)

    assert batch.weights is not None
    torch.testing.assert_close(products(batch), products(plain) * batch.weights, rtol=1e-9, atol=1e-11)
    one = {name: vector[0] for name, vector in vectors.items()}
    torch.testing.assert_close(token_loss_derivatives(model, layers, batch, one).sum(1), products(batch), rtol=1e-9, atol=1e-11)


class Softmax(nn.Module):
    """A linear head on fixed features of the last token: its training loss is convex, and its Gauss-Newton matrix is the Hessian."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(features))
        self.features = features
        self.head = nn.Linear(features.shape[1], len(features), bias=False).double()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.features[input_ids]))


def optimum(model: Softmax, batch: SequenceBatch, decay: float, flat: Tensor) -> Tensor:
    """The weights [V · D] at the minimum of Σ w L + decay/2 ‖θ‖², by Newton's method with dense matrices from `flat` on."""

    def loss(flat: Tensor) -> Tensor:
        logits = model.features[batch.tokens] @ flat.view_as(model.head.weight).T
        losses = -logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[:, :, 0] * batch.counted[:, 1:]
        assert batch.weights is not None
        return (losses.sum(1) * batch.weights).sum() + decay / 2 * flat @ flat

    while float((gradient := torch.func.grad(loss)(flat)).norm()) > 1e-11:
        flat = flat - torch.linalg.solve(torch.func.hessian(loss)(flat), gradient)
    return flat


def test_score_is_what_training_without_the_sequence_would_change() -> None:
    generator = torch.Generator().manual_seed(0)
    model, decay = Softmax(torch.randn(6, 3, dtype=torch.float64, generator=generator)), 0.5
    tokens = torch.randint(0, 6, (5, 6), generator=generator)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    weights, keys = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64), np.arange(5, dtype=np.uint64)
    batch = SequenceBatch(tokens=tokens, counted=counted, keys=keys, weights=weights)
    trained = optimum(model, batch, decay, torch.zeros(model.head.weight.numel(), dtype=torch.float64))
    model.head.weight.data = trained.view_as(model.head.weight).clone()
    layers = layers_of(model)
    size = trained.numel()
    eye = {"head": torch.eye(size, dtype=torch.float64).view(size, *model.head.weight.shape)}
    hessian = gauss_newton_product(model, layers, batch, eye)["head"].view(size, size) + decay * torch.eye(size, dtype=torch.float64)
    question = torch.randn(size, dtype=torch.float64, generator=generator)  # f(θ) = ⟨question, θ⟩
    vector = {"head": torch.linalg.solve(hessian, -question).view(1, *model.head.weight.shape)}
    scores: list[Tensor] = []
    capture(
        model,
        layers,
        partial(true_label_loss, model, batch),
        batch.reached,
        lambda _, r: scores.append(inner_products(r, vector["head"])[0]),
    )
    step = 1e-5
    for n in range(5):
        less, more = weights.clone(), weights.clone()
        less[n] *= 1 - step
        more[n] *= 1 + step
        changed = [
            optimum(model, SequenceBatch(tokens=tokens, counted=counted, keys=keys, weights=w), decay, trained) @ question
            for w in (less, more)
        ]
        assert float(scores[0][n]) == pytest.approx(float(changed[1] - changed[0]) / (2 * step), rel=1e-6)


# runs

ROWS = [{**row, "share": [0.5, 1, 2.5, 4][number % 4]} for number, row in enumerate(documents())]


@pytest.fixture(scope="module")
def weighted_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("weighted")
    data = {"files": str(write_jsonl(directory / "train.jsonl", ROWS)), "weight": "share"}
    settings = world.settings(directory / "run", data=data, model={"dtype": "float64"}, index={"recall_queries": 0})
    return run_pipeline(settings)


def test_run_with_weights_is_the_fit_and_the_scores_of_the_weighted_loss(weighted_run: Run) -> None:
    run = weighted_run
    assert [s.weight for s in run.store] == [row["share"] for row in ROWS for s in run.store if s.document == row["id"]]
    batches = [batch for _, batch in in_batches(list(run.store), run.attributed.budget, run.attributed.device)]
    fitted = fit(run.attributed.model, batches)[0]
    for name, factor in run.factors.items():
        axis = factor.eigenvalues.sum(), fitted[name].eigenvalues.sum()
        torch.testing.assert_close(*axis, rtol=1e-6, atol=1e-12)
    query = "Lisbon lies on the", " Tagus"
    gradients = query_gradients(run.attributed, [run.measure(*query)], run.factors).gradients
    vectors = {name: one[0] for name, one in solve(gradients, run.factors).items()}
    found = run.query(*query, k=5, exact=True)
    own = {sequence.id: sequence for sequence in run.store}
    for result in found.sequences:
        one = own[result.id]
        plain = SequenceBatch(**{**vars(collate([one], run.attributed.device)), "weights": None})
        expected = sum(
            float((gradient * vectors[name]).sum()) for name, gradient in dense_gradients(run.attributed.model, run.coverage.layers, plain)
        )
        assert result.score == pytest.approx(one.weight * expected / len(run.training), rel=1e-8)
    whole = run.self_influence[run.store.ids.index(found.sequences[0].id)]
    assert run.normalizing_weights[run.store.ids.index(found.sequences[0].id)] == pytest.approx(1 / math.sqrt(whole))


def dense_gradients(model: nn.Module, layers: tuple[Layer, ...], batch: SequenceBatch) -> list[tuple[str, Tensor]]:
    """Of the summed loss, by autograd, as [O, J]."""
    model.requires_grad_(True)
    try:
        true_label_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        found = []
        for layer in layers:
            module = model.get_submodule(layer.name)
            weight = module.weight.grad.clone()
            if layer.kind == "linear":  # Conv1D holds its weight transposed
                weight = weight.T
            if layer.kind == "scale":
                weight = weight[:, None]
            parts = [weight] if getattr(module, "bias", None) is None else [weight, module.bias.grad[:, None]]
            found.append((layer.name, torch.cat(parts, 1)))
        return found
    finally:
        model.zero_grad()
        model.requires_grad_(False)


def test_health_shows_plain_losses_and_weighted_influence(weighted_run: Run) -> None:
    health = weighted_run.health(k=3)
    run = weighted_run
    place = 2
    one = run.store[place]
    batch = collate([one], run.attributed.device)
    plain = SequenceBatch(**{**vars(batch), "weights": None})
    with torch.no_grad():
        assert health.columns["loss"][place] == pytest.approx(float(true_label_loss(run.attributed.model, plain)) / one.counted.sum())
    assert health.columns["self_influence"][place] == pytest.approx(run.self_influence[place])


def test_sequences_of_weight_0_are_left_out_and_told(influence: Influence, world: World, tmp_path: Path) -> None:
    rows = [{**row, "share": 0 if number in (1, 5) else 1} for number, row in enumerate(ROWS[:12])]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    told = influence(
        "run", "--model", world.model, "--data", data, "--out", tmp_path / "run", "--weight", "share", "--sequence-length", 32,
        "--documents", "truncate", "--until", "sequences",
    )  # fmt: skip
    assert told.status == 0
    assert f"left out 2 sequences of weight 0: {rows[1]['id']}, {rows[5]['id']}" in told.err
    write_jsonl(data, [{**row, "share": 0} for row in rows])
    influence(
        "run", "--model", world.model, "--data", data, "--out", tmp_path / "none", "--weight", "share", "--sequence-length", 32,
        "--bytes-per-sequence", 1024, "--until", "sequences",
    ).says("every sequence of the data has weight 0", 2)  # fmt: skip


@pytest.mark.parametrize("value", [-1, "NaN", None, "much", True, [1]])
def test_weight_that_is_none_is_refused_by_row(value: Any, influence: Influence, world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [{**ROWS[0], "share": 1}, {**ROWS[1], "share": value}])
    influence(
        "run", "--model", world.model, "--data", data, "--out", tmp_path / "run", "--weight", "share", "--sequence-length", 32, "--until", "sequences"
    ).says(f"{data}, row 1: column 'share' must hold a weight, a finite number from 0, not {value!r}")  # fmt: skip
