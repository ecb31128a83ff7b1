"""What every backend must do, asked of torch and of Flax with the same weights and answered by an oracle in torch, in float64.

Where a law is about a batch, the oracle is plain autograd of torch's model on each sequence alone, without padding.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace

import flax_twins
import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, VOCABULARY, flax_parameters, stacked, torch_twin
from torch import Tensor, nn

from ekfac import (
    Backend,
    Layer,
    Record,
    SequenceBatch,
    as_parameters,
    as_vectors,
    attributable_layers,
    capture,
    fit,
    gauss_newton_product,
    layer_device,
    sequence_gradients,
    token_loss_derivatives,
    true_label_loss,
)
from influence.attribution import AttributedModel, function_values, query_gradients
from influence.batches import BatchBudget, collate
from influence.config import ModelConfig
from influence.directions import direction
from influence.evaluation.pbrf import in_float64, response
from influence.evaluation.retraining import RetrainingSettings, fine_tuned, query_losses
from influence.evaluation.tailpatch import patched
from influence.jax_model import load_flax, save_flax_model
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

MLP = ("transformer.h*mlp*",)


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with flax_twins.wide():
        yield


@pytest.fixture(scope="module", params=["torch", "scanned", pytest.param("nnx", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    twin = torch_twin()
    if request.param == "torch":
        return twin
    code, parameters, settings = CODE, stacked(flax_parameters(twin)), {**twin.config.to_dict(), "layout": "scanned"}
    if request.param == "nnx":
        code, parameters = CODE.replace("linen_twin", "nnx_twin"), flax_parameters(twin)
    place = save_flax_model(tmp_path_factory.mktemp("model"), unflatten_dict(parameters, sep="."), settings)
    return load_flax(ModelConfig(name=str(place), flax=code, dtype="float64"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    return torch_twin()


def torch_name(name: str) -> str:
    """Of a layer of the scanned twin: transformer.h.mlp.c_fc.1 is transformer.h.1.mlp.c_fc."""
    return re.sub(r"^transformer\.h\.(.*)\.(\d)$", r"transformer.h.\2.\1", name)


def in_torch(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {torch_name(name): vector for name, vector in vectors.items()}


def layers_of(model: nn.Module, *patterns: str) -> tuple[Layer, ...]:
    return attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 7)[None], use_cache=False), patterns or ("*",)).layers


def batch(weights: tuple[float, ...] | None = None) -> SequenceBatch:
    """Four sequences padded to seven positions, of which one counts nothing."""
    found = padded_batch(lengths=(7, 4, 5, 7), prompt=2)
    counted = found.counted.clone()
    counted[2] = False
    own = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return SequenceBatch(tokens=found.tokens % VOCABULARY, counted=counted, keys=found.keys, weights=own)


WEIGHTS = (2.0, 0.25, 3.0, 1.0)


def alone(some: SequenceBatch, place: int) -> SequenceBatch:
    """One sequence without its padding and without its weight."""
    places = some.counted[place].nonzero()
    length = int(places.max()) + 1 if len(places) else 2
    return SequenceBatch(tokens=some.tokens[place, None, :length], counted=some.counted[place, None, :length], keys=some.keys[place, None])


def gradients(model: nn.Module, layers: tuple[Layer, ...], some: SequenceBatch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def consume(layer: Layer, record: Record) -> None:
        found[layer.name] = sequence_gradients(record)

    capture(model, layers, lambda: true_label_loss(model, some), some.reached, consume)
    return in_torch(found)


def of_oracle(oracle: nn.Module, layers: tuple[Layer, ...], loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in oracle.named_parameters()]
    found = torch.autograd.grad(loss, [oracle.get_parameter(name) for name in names], allow_unused=True)
    whole = {n: torch.zeros_like(oracle.get_parameter(n)) if g is None else g for n, g in zip(names, found, strict=True)}
    return as_vectors(oracle, layers, whole)


def test_gradients_are_those_of_each_sequence_alone_times_its_weight(model: nn.Module, oracle: nn.Module) -> None:
    some = batch(WEIGHTS)
    found, own = gradients(model, layers_of(model), some), layers_of(oracle)
    assert set(found) == {layer.name for layer in own}
    for place, weight in enumerate(WEIGHTS):
        expected = of_oracle(oracle, own, weight * true_label_loss(oracle, alone(some, place)))
        for name, vector in expected.items():
            torch.testing.assert_close(found[name][place], vector, rtol=1e-9, atol=1e-11, msg=name)


def test_factors_do_not_depend_on_batches_their_order_or_their_padding(model: nn.Module) -> None:
    """To the rounding of float64; eigenvectors may be others, what they make is not."""
    some = batch()
    parts = [SequenceBatch(tokens=some.tokens[place], counted=some.counted[place], keys=some.keys[place]) for place in ([3, 1], [2, 0])]
    wider = [
        SequenceBatch(
            tokens=nn.functional.pad(part.tokens, (0, 3), value=5), counted=nn.functional.pad(part.counted, (0, 3)), keys=part.keys
        )
        for part in parts
    ]
    (one, coverage), (other, _) = fit(model, [some], layers=MLP), fit(model, wider, layers=MLP)
    for layer in coverage.layers:
        vector = torch.sin(torch.arange(1.0, 1 + layer.shape[0] * layer.shape[1], dtype=torch.float64)).reshape(layer.shape)
        expected = one[layer.name].precondition(vector)
        assert torch.allclose(other[layer.name].precondition(vector), expected, atol=1e-7 * float(expected.abs().max())), layer.name


def test_products_equal_the_dense_gauss_newton_matrix_of_weighted_sequences(model: nn.Module, oracle: nn.Module) -> None:
    some, own, layers = batch(WEIGHTS), layers_of(oracle, *MLP), layers_of(model, *MLP)
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn(3, *layer.shape, dtype=torch.float64, generator=generator) for layer in own}
    mine = {layer.name: vectors[torch_name(layer.name)] for layer in layers}
    found = in_torch(gauss_newton_product(model, layers, some, mine))
    expected = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    for place, weight in enumerate(WEIGHTS):
        logits = oracle(input_ids=some.tokens[place, None]).logits[0]
        for position in some.counted[place].nonzero()[:, 0].tolist():
            jacobian = [of_oracle_kept(oracle, own, value) for value in logits[position - 1]]
            p = logits[position - 1].detach().softmax(-1)
            changes = torch.stack([sum((row[n] * vectors[n]).flatten(1).sum(1) for n in row) for row in jacobian])  # [V, Q]
            curved = p[:, None] * (changes - (p[:, None] * changes).sum(0))
            for name in expected:
                expected[name] += weight * torch.einsum("vq,voi->qoi", curved, torch.stack([row[name] for row in jacobian]))
    for name, product in found.items():
        torch.testing.assert_close(product, expected[name], rtol=1e-9, atol=1e-9 * float(expected[name].abs().max()), msg=name)


def of_oracle_kept(oracle: nn.Module, layers: tuple[Layer, ...], value: Tensor) -> dict[str, Tensor]:
    names = list(as_parameters(oracle, layers, {layer.name: torch.zeros(layer.shape) for layer in layers}))
    found = torch.autograd.grad(value, [oracle.get_parameter(name) for name in names], retain_graph=True)
    return as_vectors(oracle, layers, dict(zip(names, found, strict=True)))


def test_shares_by_output_token_are_inner_products_with_each_tokens_own_gradient(model: nn.Module, oracle: nn.Module) -> None:
    some, own, layers = batch(WEIGHTS), layers_of(oracle), layers_of(model)
    generator = torch.Generator().manual_seed(1)
    vector = {layer.name: torch.randn(layer.shape, dtype=torch.float64, generator=generator) for layer in own}
    found = token_loss_derivatives(model, layers, some, {layer.name: vector[torch_name(layer.name)] for layer in layers})
    for place, position in some.counted.nonzero()[::3].tolist():
        logits = oracle(input_ids=some.tokens[place, None, : position + 1]).logits[0, position - 1]
        loss = -logits.log_softmax(-1)[some.tokens[place, position]] * WEIGHTS[place]
        expected = sum((g * vector[name]).sum() for name, g in of_oracle(oracle, own, loss).items())
        assert float(found[place, position]) == pytest.approx(float(expected), rel=1e-8, abs=1e-10)
    assert not found[~some.counted].any()


def test_parameters_and_vectors_are_two_forms_of_the_same(model: nn.Module) -> None:
    assert_two_forms(model)


def test_parameters_and_vectors_are_two_forms_of_the_same_in_every_architecture(architecture: str) -> None:
    assert_two_forms(tiny_model(architecture))


def assert_two_forms(model: nn.Module) -> None:
    layers = layers_of(model)
    own = as_vectors(model, layers, dict(model.named_parameters()))
    assert sum(vector.numel() for vector in own.values()) == sum(p.numel() for p in model.parameters())
    back = as_parameters(model, layers, own)
    assert set(back) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(back[name], parameter) for name, parameter in model.named_parameters())


def test_every_layer_has_a_device(model: nn.Module) -> None:
    assert {layer_device(model, layer) for layer in layers_of(model)} == {torch.device("cpu")}


@pytest.mark.parametrize(
    ("place", "reduce"),
    [("transformer.h.0", reduce) for reduce in ("mean", "last", "max")]
    + [(f"transformer.h.1.{part}", "mean") for part in ("mlp", "mlp.c_fc")],
)
def test_activation_of_a_direction_equals_autograd(model: nn.Module, oracle: nn.Module, place: str, reduce: str) -> None:
    """A whole block, a part of one, and a layer; values, and gradients sequence by sequence."""
    name = place
    if isinstance(model, Backend) and place not in model.output_names():
        name = re.sub(r"^(transformer\.h)\.(\d)\.(.*)$", r"\1.\3.\2", place)
    some = replace_counted(batch())
    vector = torch.sin(torch.arange(1.0, 1 + (48 if place.endswith("c_fc") else 12), dtype=torch.float64))
    mine, expected = (direction(one, vector, reduce, {}) for one in (name, place))  # type: ignore[arg-type]
    layers, own = layers_of(model), layers_of(oracle)
    budget = BatchBudget(max_tokens=100, memory_bytes=10**9, bytes_per_token=1, bytes_per_sequence=1)
    attributed = AttributedModel(model=model, layers=layers, budget=budget, device=torch.device("cpu"))
    asked_for = [replace(asked(sequence), function=mine) for sequence in of_batch(some)]
    found = in_torch(query_gradients(attributed, asked_for).gradients)
    for row, measurement in enumerate(asked_for):
        one = collate([measurement.parts[0][1]], torch.device("cpu"))
        value = expected.values(oracle, one)
        assert function_values(attributed, measurement) == pytest.approx(value.tolist(), rel=1e-9)
        for layer, wanted in of_oracle(oracle, own, -value.sum()).items():
            torch.testing.assert_close(found[layer][row], wanted, rtol=1e-8, atol=1e-11, msg=layer)


def of_batch(some: SequenceBatch) -> list[TrainingSequence]:
    rows = zip(some.tokens.numpy(), some.counted.numpy(), strict=True)
    return [
        TrainingSequence(id=str(n), document=str(n), tokens=tokens, counted=counted, text="", metadata={})
        for n, (tokens, counted) in enumerate(rows)
    ]


def replace_counted(some: SequenceBatch) -> SequenceBatch:
    """Every sequence counts something, of which an activation can be taken."""
    counted = some.counted.clone()
    counted[2, 1:4] = True
    return SequenceBatch(tokens=some.tokens, counted=counted, keys=some.keys)


def sequences(count: int = 6) -> list[TrainingSequence]:
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        tokens = rng.integers(1, VOCABULARY, 4 + number % 4).astype(np.int32)
        counted = np.arange(len(tokens)) > number % 2
        made = TrainingSequence(id=str(number), document=str(number), tokens=tokens, counted=counted, text="", metadata={})
        found.append(replace(made, weight=1.0 + number % 2))
    return found


def asked(sequence: TrainingSequence) -> Measurement:
    return Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequence),))


def as_torch(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that torch's twin would have: layers' vectors by torch's names."""
    return in_torch(as_vectors(model, layers_of(model), {name: p.detach() for name, p in model.named_parameters()}))


def test_a_copy_is_trained_as_torch_trains_it_and_the_model_stays(model: nn.Module, oracle: nn.Module) -> None:
    """AdamW with warm-up and clipped gradients, over two epochs of padded batches: to 1e-7, since AdamW divides by small second moments."""
    settings = RetrainingSettings(epochs=2, batch_size=4, learning_rate=3e-3, clip_norm=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained, expected = (fine_tuned(one, sequences(), settings, 3, left_out=[1]) for one in (model, oracle))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    wanted = as_torch(expected)
    for name, vector in as_torch(trained).items():
        torch.testing.assert_close(vector, wanted[name], rtol=1e-7, atol=1e-7, msg=name)
    queries = [asked(sequence) for sequence in sequences()[:2]]
    np.testing.assert_allclose(query_losses(trained, queries, 4), query_losses(expected, queries, 4), rtol=1e-7)
    assert abs(query_losses(trained, queries, 4) - query_losses(model, queries, 4)).min() > 1e-3


def test_a_tail_patch_moves_the_model_as_torch_does(model: nn.Module, oracle: nn.Module) -> None:
    queries = [asked(sequence) for sequence in sequences()[:3]]
    found, expected = (query_losses(patched(one, sequences()[3:], 0.1), queries, 4) for one in (model, oracle))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_the_proximal_bregman_response_is_that_of_torch(model: nn.Module, oracle: nn.Module) -> None:
    """Ten steps of L-BFGS, short of the end, whose line searches amplify rounding: to a thousandth, which the solver is asked for at its end."""
    some, changes = sequences(), []
    for one in (model, oracle):
        factors, coverage = fit(one, [batch()], layers=MLP)
        damping = {name: factor.damping for name, factor in factors.items()}
        problem = in_float64(one, coverage.layers, factors, damping, some, len(some))
        found = response(problem, some[0], [asked(sequence) for sequence in some[:2]], most_steps=10)
        changes.append(found.changes)
    assert abs(changes[0]).max() > 1e-4
    np.testing.assert_allclose(changes[0], changes[1], rtol=1e-3)


def test_a_deep_copy_has_parameters_of_its_own(model: nn.Module) -> None:
    some = batch()
    before = model(input_ids=some.tokens).logits.detach().clone()
    other = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(input_ids=some.tokens).logits.any()
    assert torch.equal(model(input_ids=some.tokens).logits, before)
