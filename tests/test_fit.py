"""Fitted factors against the exact Fisher where EK-FAC is exact, and their independence of how the data was cut."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model
from torch import Tensor, nn

from ekfac import (
    Damping,
    LayerFactors,
    SequenceBatch,
    assemble,
    attributable_layers,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    fit,
    keyed_uniforms,
    merge,
    reached_positions,
    token_losses,
    true_label_loss,
)
from ekfac.language import _draw


def every_position(batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.ones(batch[0].shape[:2], dtype=torch.bool)


def paired_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its derivative at the model's output is the second half of the batch."""
    return (model(batch[0]) * batch[1]).sum()


def dense_fisher(model: nn.Module, batch: tuple[Tensor, Tensor], names: list[str]) -> Tensor:
    """Mean over sequences of ∇∇ᵀ over the named weights in order, by one autograd call a sequence."""
    rows = []
    for n in range(len(batch[0])):
        loss = paired_loss(model, (batch[0][n : n + 1], batch[1][n : n + 1]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [model.get_submodule(name).weight for name in names])]))
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(stacked)


def dense_block(factors: LayerFactors, dimension: int) -> Tensor:
    """(G + λI)⁻¹ of a layer as a matrix, column by column."""
    columns = torch.eye(dimension, dtype=torch.float64).reshape(dimension, *factors.eigenvalues.shape)
    return factors.precondition(columns).reshape(dimension, dimension).T


@pytest.fixture
def linear_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()


def test_ekfac_is_the_exact_fisher_of_a_deep_linear_network(linear_network: nn.Module) -> None:
    # Every input meets every output gradient, so that the two are independent and each layer's Fisher block is exactly A ⊗ G.
    inputs, gradients = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    pairs = list(itertools.product(range(6), range(5)))
    batch = (torch.stack([inputs[i] for i, _ in pairs])[:, None], torch.stack([gradients[j] for _, j in pairs])[:, None])
    damping = Damping(value=1e-3, kind="absolute")
    factors, _ = fit(linear_network, [batch], loss=paired_loss, mask=every_position, damping=damping)
    for name in ("0", "1"):
        fisher = dense_fisher(linear_network, batch, [name])
        exact = torch.linalg.inv(fisher + 1e-3 * torch.eye(len(fisher), dtype=torch.float64))
        torch.testing.assert_close(dense_block(factors[name], len(fisher)), exact, rtol=1e-7, atol=1e-9)


def test_ekfac_is_the_exact_fisher_of_one_sequence_of_one_token(linear_network: nn.Module) -> None:
    batch = (torch.randn(1, 1, 3, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64))
    factors, _ = fit(linear_network, [batch], loss=paired_loss, mask=every_position, damping=Damping(value=0.1))
    fisher = dense_fisher(linear_network, batch, ["1"])
    damping = 0.1 * torch.trace(fisher) / len(fisher)
    exact = torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=torch.float64))
    torch.testing.assert_close(dense_block(factors["1"], len(fisher)), exact, rtol=1e-8, atol=1e-8)


def test_corrected_eigenvalues_are_the_diagonal_of_the_fisher_in_the_eigenbasis(linear_network: nn.Module) -> None:
    batch = (torch.randn(7, 4, 3, dtype=torch.float64), torch.randn(7, 4, 2, dtype=torch.float64))
    factors, _ = fit(linear_network, [batch], loss=paired_loss, mask=every_position)
    for name in ("0", "1"):
        axes = torch.kron(factors[name].output_vectors, factors[name].input_vectors)
        fisher = dense_fisher(linear_network, batch, [name])
        torch.testing.assert_close(factors[name].eigenvalues.flatten(), (axes.T @ fisher @ axes).diagonal(), rtol=1e-10, atol=1e-12)


def batches_of(batch: SequenceBatch, groups: list[list[int]]) -> list[SequenceBatch]:
    """The same sequences in other batches, each as short as its longest sequence."""
    found = []
    for group in groups:
        length = int(batch.counted[group].nonzero()[:, 1].max()) + 1
        found.append(SequenceBatch(tokens=batch.tokens[group, :length], counted=batch.counted[group, :length], keys=batch.keys[group]))
    return found


def preconditioned(factors: dict[str, LayerFactors]) -> dict[str, Tensor]:
    """A fixed gradient through the factors: unlike eigenvectors, it does not depend on the choice within an eigenspace."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: factor.precondition(torch.randn(factor.eigenvalues.shape, generator=generator, dtype=torch.float64))
        for name, factor in factors.items()
    }


# In float64 the two sides differ by the order of sums alone; eigenvectors of close eigenvalues amplify that to at most about 1e-6.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


def test_factors_do_not_depend_on_batching_order_or_padding(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch(lengths=(7, 4, 5, 7, 3, 6))
    whole, _ = fit(model, [batch])
    for groups in ([[0], [1], [2], [3], [4], [5]], [[5, 2], [4, 1, 3], [0]]):
        parts, _ = fit(model, batches_of(batch, groups))
        for name, expected in preconditioned(whole).items():
            torch.testing.assert_close(preconditioned(parts)[name], expected, **TOLERANCE)


def test_factors_do_not_depend_on_shards() -> None:
    model, batch = tiny_model("llama"), padded_batch(lengths=(7, 4, 5, 7))
    shards = [batches_of(batch, [[0], [3]]), batches_of(batch, [[1, 2]])]
    layers = attributable_layers(model, lambda model: true_label_loss(model, batch)).layers
    loss = drawn_label_loss(0)
    covariances = merge(*(covariance_pass(model, layers, shard, loss, reached_positions) for shard in shards))
    bases = {name: eigenbasis(covariance) for name, covariance in covariances.items()}
    vectors = {name: basis.vectors for name, basis in bases.items()}
    sums = merge(*(eigenvalue_pass(model, layers, vectors, shard, loss, reached_positions) for shard in shards))
    merged = assemble(layers, bases, sums, Damping(value=0.1), "float64")
    whole, _ = fit(model, [batch])
    for name, expected in preconditioned(whole).items():
        torch.testing.assert_close(preconditioned(merged)[name], expected, **TOLERANCE)


def test_drawn_labels_follow_the_models_distribution() -> None:
    model = tiny_model("gpt2")
    one = padded_batch(lengths=(2,), num_positions=2)
    copies = 20_000
    many = SequenceBatch(
        tokens=one.tokens.expand(copies, 2), counted=one.counted.expand(copies, 2), keys=np.arange(copies, dtype=np.uint64)
    )
    with torch.no_grad():
        probabilities = model(input_ids=one.tokens).logits[0, 0].softmax(0)
        mean_loss = float(drawn_label_loss(0)(model, many)) / copies
    entropy = float(-(probabilities * probabilities.log()).sum())
    spread = float((probabilities * probabilities.log() ** 2).sum() - entropy**2) ** 0.5
    assert abs(mean_loss - entropy) < 4 * spread / copies**0.5  # four standard errors


@pytest.mark.parametrize("num_labels", [1, 2, 17, 64, 1000])
def test_a_label_is_the_first_whose_cumulative_probability_exceeds_the_uniform_number(num_labels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn((500, num_labels), dtype=torch.float64, generator=generator)
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    probabilities = scores.softmax(1).numpy()
    expected = [np.searchsorted(row.cumsum(), u * row.sum(), side="right") for row, u in zip(probabilities, uniforms.numpy(), strict=True)]
    assert _draw(scores.log_softmax(1), uniforms).tolist() == np.minimum(expected, num_labels - 1).tolist()


def test_drawn_labels_depend_on_seed_and_sequence_but_not_on_the_batch() -> None:
    model, batch = tiny_model("gpt2"), padded_batch(lengths=(7, 4, 5, 7))
    with torch.no_grad():
        whole = float(drawn_label_loss(0)(model, batch))
        parts = sum(float(drawn_label_loss(0)(model, part)) for part in batches_of(batch, [[2], [0, 3], [1]]))
        other = float(drawn_label_loss(1)(model, batch))
    assert parts == pytest.approx(whole, rel=1e-12)
    assert other != pytest.approx(whole, rel=1e-3)


def test_keyed_uniforms_are_uniform_and_stay_what_they_are() -> None:
    uniforms = keyed_uniforms(7, np.arange(400, dtype=np.uint64), 250)
    assert np.abs(np.histogram(uniforms, 20, (0, 1))[0] / uniforms.size - 0.05).max() < 0.003
    assert np.abs(np.corrcoef(uniforms[:2])[0, 1]) < 0.2
    # Labels drawn by one version must be drawn again by the next: these numbers never change.
    np.testing.assert_array_equal(
        keyed_uniforms(1, np.array([2], dtype=np.uint64), 3)[0], [0.9006109088931584, 0.28014258045387286, 0.007557212222805365]
    )


def test_token_losses_are_minus_log_probabilities_of_counted_tokens() -> None:
    model, batch = tiny_model("neox"), padded_batch(lengths=(7, 4), prompt=3)
    with torch.no_grad():
        losses = token_losses(model, batch)
        logits = model(input_ids=batch.tokens).logits.log_softmax(-1)
    for n, t in itertools.product(range(2), range(7)):
        expected = -logits[n, t - 1, batch.tokens[n, t]] if batch.counted[n, t] else 0.0
        assert float(losses[n, t]) == pytest.approx(float(expected), abs=1e-12)


def test_first_token_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="first token"):
        SequenceBatch(
            tokens=torch.ones((1, 2), dtype=torch.int64), counted=torch.ones((1, 2), dtype=torch.bool), keys=np.zeros(1, dtype=np.uint64)
        )


def test_a_fit_in_float32_preconditions_like_one_in_float64(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch(lengths=(7, 4, 5, 7))
    exact, _ = fit(model, [batch])
    rounded, coverage = fit(copy.deepcopy(model).float(), [batch])
    generator = torch.Generator().manual_seed(0)
    for layer in coverage.layers:
        gradient = torch.randn(layer.shape, generator=generator, dtype=torch.float64)
        expected, found = exact[layer.name].precondition(gradient), rounded[layer.name].precondition(gradient.float())
        assert rounded[layer.name].eigenvalues.dtype == torch.float32
        assert (found - expected).norm() < 2e-3 * expected.norm(), layer.name
