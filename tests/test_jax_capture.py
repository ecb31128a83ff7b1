"""JAX models give the layers, records, factors and derivatives that torch gives for the same weights, and exact gradients of their own."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax_twins
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import padded_batch
from flax import nnx
from flax.traverse_util import unflatten_dict
from flax_twins import POSITIONS, VOCABULARY, Twin, flax_parameters, stacked, torch_twin

import ekfac
from ekfac import (
    SequenceBatch,
    attributable_layers,
    capture,
    fit,
    gauss_newton_product,
    sequence_gradients,
    token_loss_derivatives,
    true_label_loss,
)
from ekfac.flax_linen import linen_model
from ekfac.flax_nnx import nnx_model
from ekfac.jax_marks import dense, head, lookup
from ekfac.jax_model import JaxModel
from ekfac.jax_torch import in_torch


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with flax_twins.wide():
        yield


def twin(layout: str = "plain") -> JaxModel:
    parameters = flax_parameters(torch_twin())
    parameters = stacked(parameters) if layout == "scanned" else parameters
    return linen_model(Twin(layout=layout), {"params": unflatten_dict(parameters, sep=".")}, longest=POSITIONS)


def torch_name(name: str) -> str:
    """Of a layer of the scanned twin: transformer.h.mlp.c_fc.1 is transformer.h.1.mlp.c_fc."""
    return re.sub(r"^transformer\.h\.(.*)\.(\d)$", r"transformer.h.\2.\1", name)


def run_once(model: torch.nn.Module) -> None:
    model(input_ids=torch.arange(1, 7)[None], use_cache=False)


def batch() -> SequenceBatch:
    found = padded_batch(lengths=(7, 4, 5, 7), prompt=2)
    return SequenceBatch(tokens=found.tokens % VOCABULARY, counted=found.counted, keys=found.keys)


def captured_gradients(model: torch.nn.Module, batch: SequenceBatch) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    layers = attributable_layers(model, run_once).layers
    order: list[str] = []

    def consume(layer: ekfac.Layer, record: ekfac.Record) -> None:
        order.append(layer.name)
        gradients[layer.name] = sequence_gradients(record)

    capture(model, layers, lambda: true_label_loss(model, batch), batch.reached, consume)
    assert order == [layer.name for layer in reversed(layers)] or not isinstance(model, JaxModel)
    return gradients


def oracle(model: JaxModel, batch: SequenceBatch, index: int) -> dict[str, jax.Array]:
    """The gradient of one sequence without its padding by parameter name: plain `jax.grad` of the model's own function."""
    length = int(batch.counted[index].nonzero().max()) + 1
    tokens, counted = jnp.asarray(batch.tokens[index, :length].numpy()), jnp.asarray(batch.counted[index, :length].numpy())

    def loss(parameters: Any) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(model.apply_function(parameters, tokens[None])[0, :-1])
        return -(jnp.take_along_axis(log_probabilities, tokens[1:, None], 1)[:, 0] * counted[1:]).sum()

    found: dict[str, jax.Array] = jax.jit(jax.grad(loss))(model.values)
    return found


@pytest.mark.parametrize("layout", [pytest.param("plain", marks=pytest.mark.slow), "scanned"])
def test_twins_have_the_same_layers_factors_and_gradients(layout: str) -> None:
    """To the rounding of float64: 1e-9 of the largest entry, since factors divide by small eigenvalues."""
    model, other, some = twin(layout), torch_twin(), batch()
    assert torch.allclose(model(input_ids=some.tokens).logits, other(input_ids=some.tokens).logits, atol=1e-12)
    gradients, expected = captured_gradients(model, some), captured_gradients(other, some)
    assert [torch_name(name) for name in gradients][::-1] == list(expected)[::-1] or set(map(torch_name, gradients)) == set(expected)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[torch_name(name)], atol=1e-11), name
    factors, coverage = fit(model, [some])
    others, covered = fit(other, [some])
    assert coverage.share == covered.share == 1
    for layer in coverage.layers:
        mine, twins = factors[layer.name], others[torch_name(layer.name)]
        assert torch.allclose(mine.eigenvalues, twins.eigenvalues, rtol=1e-9, atol=1e-12 * float(twins.eigenvalues.max()))
        vector = torch.sin(torch.arange(1.0, 1 + layer.shape[0] * layer.shape[1], dtype=torch.float64)).reshape(layer.shape)
        solved = twins.precondition(vector)
        assert torch.allclose(mine.precondition(vector), solved, atol=1e-9 * float(solved.abs().max())), layer.name


@pytest.mark.slow
def test_twins_have_the_same_exact_curvature_and_token_shares() -> None:
    model, other, some = twin("scanned"), torch_twin(), batch()
    layers, others = attributable_layers(model, run_once).layers, attributable_layers(other, run_once).layers
    torch.manual_seed(0)
    vectors = {layer.name: torch.randn(3, *layer.shape, dtype=torch.float64) for layer in others}
    mine = {layer.name: vectors[torch_name(layer.name)] for layer in layers}
    expected = gauss_newton_product(other, others, some, vectors)
    for name, product in gauss_newton_product(model, layers, some, mine).items():
        assert torch.allclose(product, expected[torch_name(name)], rtol=1e-10, atol=1e-10), name
    shares = token_loss_derivatives(model, layers, some, {name: vector[0] for name, vector in mine.items()})
    assert torch.allclose(shares, token_loss_derivatives(other, others, some, {n: v[0] for n, v in vectors.items()}), atol=1e-10)
    some_layers = [layer for layer in layers if "mlp" in layer.name]  # of a stack, the others stay where they are
    few = gauss_newton_product(model, some_layers, some, mine)
    some_others = [layer for layer in others if "mlp" in layer.name]
    expected = gauss_newton_product(other, some_others, some, vectors)
    assert all(torch.allclose(product, expected[torch_name(name)], atol=1e-10) for name, product in few.items())


def test_products_of_a_forward_pass_are_counted_by_token_and_by_pair_of_tokens() -> None:
    """Of the weights of 2 blocks and the tied head; and of queries with keys, and of weights with values, whose width is 12 in each block."""
    found = twin("scanned").products()
    assert found.of_token == 2 * (12 * 36 + 12 * 12 + 2 * 12 * 48) + 12 * VOCABULARY
    assert found.of_pair == 2 * 2 * 12
    assert found.heads == found.tied == {"transformer.wte"}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        queries, keys, values = (nn.DenseGeneral((2, 3), use_bias=name == "v", name=name)(x) for name in "qkv")
        weights = jnp.tril(jnp.einsum("nqhd,nkhd->nhqk", nn.RMSNorm(name="q_norm")(queries), keys))
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(jnp.einsum("nhqk,nkhd->nqhd", weights, values))


class CustomNorm(nn.Module):
    """Of no known class, with a weight that one is added to."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        weight = self.param("scale", nn.initializers.normal(), (x.shape[-1],))
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + weight)


class Other(nn.Module):
    """Separate queries, keys and values, heads of their own, norms of other kinds, a head that is not tied, and what cannot be attributed."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(VOCABULARY, 5, name="embed")(tokens)
        x = x + nn.remat(Attention)(name="attention")(CustomNorm(name="norm")(x))
        twice = nn.Dense(5, name="twice")
        x = x + jnp.tanh(twice(jnp.tanh(twice(x))))
        x = x * self.param("temperature", nn.initializers.ones, (5,))
        x = x + nn.vmap(nn.Dense, in_axes=None, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)(
            5, name="experts"
        )(x).sum(0)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(x)


def perturbed(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)])


@pytest.mark.slow
def test_linen_layers_of_many_kinds_have_their_exact_gradients() -> None:
    """Against `jax.grad`, sequence by sequence without padding, to the rounding of float64."""
    model = linen_model(Other(), perturbed(jax.jit(Other().init)(jax.random.key(0), jnp.zeros((1, 4), int))))
    some = batch()
    coverage = attributable_layers(model, run_once)
    assert {layer.name: layer.kind for layer in coverage.layers} == {
        "embed": "embedding",
        "norm": "scale",
        **dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.out"), "linear"),
        "attention.q_norm": "scale",
        "head": "embedding",
    }
    assert {layer.input_group for layer in coverage.layers if layer.name in ("attention.q", "attention.k")} == {"attention.q"}
    assert "called 2 times" in coverage.excluded["twice"]
    assert set(coverage.excluded) == {"twice", "temperature", "experts"}
    gradients = captured_gradients(model, some)
    for index in (0, 1):
        expected = oracle(model, some, index)
        for layer in coverage.layers:
            weight = expected[ekfac.parameters.parameter_names(model, layer)[0]]
            bias = f"{layer.name}.bias"
            matrix = weight[:, None] if layer.kind == "scale" else weight if layer.name == "embed" else weight.reshape(layer.inputs, -1).T
            if layer.bias:
                matrix = jnp.concatenate([matrix, expected[bias].reshape(-1, 1)], 1)
            assert torch.allclose(gradients[layer.name][index], torch.from_dlpack(matrix), atol=1e-11), layer.name


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(6, rngs=rngs, param_dtype=jnp.float64)
        self.up = nnx.Linear(6, 8, rngs=rngs, param_dtype=jnp.float64)
        self.down = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), use_bias=False, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any) -> Any:
        inner = jnp.tanh(self.up(self.norm(x)))
        return x + self.down(inner.reshape(*inner.shape[:2], 2, 4))


class Nnx(nnx.Module):
    """A block, two in a scan with rematerialisation, and a tied head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, 6, rngs=rngs, param_dtype=jnp.float64)
        self.first = Block(rngs)
        self.blocks = nnx.vmap(Block, in_axes=0)(rngs.split(2))
        self.last = nnx.RMSNorm(6, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, tokens: Any) -> Any:
        x = self.first(self.embed(tokens))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: Any, block: Block) -> Any:
            return nnx.remat(lambda block, x: block(x))(block, x)

        x = jnp.cumsum(through(x, self.blocks), 1)
        return self.embed.attend(self.last(x))


@pytest.mark.slow
def test_nnx_layers_have_their_exact_gradients_and_the_module_is_untouched() -> None:
    module = Nnx(nnx.Rngs(0))
    nnx.update(module, perturbed(nnx.state(module, nnx.Param)))
    before = nnx.graphdef(module)
    model, some = nnx_model(module), batch()
    gradients = captured_gradients(model, some)
    coverage = attributable_layers(model, run_once)
    assert coverage.share == 1
    assert [layer.name for layer in coverage.layers if layer.name.startswith("blocks")] == [
        f"blocks.{name}.{step}" for step in range(2) for name in ("norm", "up", "down")
    ]
    assert nnx.graphdef(module) == before
    assert nnx.Linear.__call__.__qualname__ == "Linear.__call__"
    for index in (0, 1):
        expected = oracle(model, some, index)
        vectors = model.as_vectors(coverage.layers, {name: torch.from_dlpack(value) for name, value in expected.items()})
        for name, gradient in gradients.items():
            assert torch.allclose(gradient[index], vectors[name], atol=1e-11), name


def test_a_plain_function_with_marked_layers_is_fitted() -> None:
    """With a loss of its own: least squares, of which the torch module of the same weights has the same factors."""
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    names = {"up.kernel": other[0].weight.T, "up.bias": other[0].bias, "down.kernel": other[2].weight.T, "down.bias": other[2].bias}
    values = {name: jnp.asarray(value.detach().numpy()) for name, value in names.items()}

    def apply(parameters: Any, inputs: Any) -> Any:
        hidden = jnp.tanh(jax.jit(lambda x: dense(x, parameters["up.kernel"], parameters["up.bias"], layer="up"))(inputs))
        return dense(hidden, parameters["down.kernel"], parameters["down.bias"], layer="down")

    inputs, targets = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)

    def loss(model: torch.nn.Module, given: Any) -> torch.Tensor:
        output = model(given[0])
        return (getattr(output, "logits", output) - given[1]).square().sum()

    def mask(given: Any) -> torch.Tensor:
        return torch.ones(given[0].shape[:2], dtype=torch.bool)

    factors, _ = fit(JaxModel(apply, values), [(inputs, targets)], loss=loss, mask=mask)
    expected, _ = fit(other, [(inputs, targets)], loss=loss, mask=mask)
    for name, place in (("up", "0"), ("down", "2")):
        assert torch.allclose(factors[name].eigenvalues, expected[place].eigenvalues, rtol=1e-9, atol=1e-12)


def test_a_classifier_with_a_loss_in_jax_has_the_eigenvalues_of_its_dense_fisher() -> None:
    """An input is one position, and the loss a function of JAX. In the basis of the covariances' eigenvectors, the diagonal of the mean of g gᵀ."""
    keys = jax.random.split(jax.random.key(0), 5)
    values = {
        name: jax.random.normal(key, shape)
        for name, key, shape in zip(("up.kernel", "up.bias", "out.kernel"), keys, ((4, 5), (5,), (5, 3)), strict=False)
    }
    inputs, labels = jax.random.normal(keys[3], (7, 4)), jax.random.randint(keys[4], (7,), 0, 3)

    def apply(parameters: Any, inputs: Any) -> Any:
        hidden = jnp.tanh(dense(inputs, parameters["up.kernel"], parameters["up.bias"], layer="up"))
        return dense(hidden, parameters["out.kernel"], layer="out")

    def cross_entropy(logits: Any, labels: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).sum()

    summed, model = in_torch(cross_entropy), JaxModel(apply, values)
    batches = [tuple(torch.from_dlpack(one)[part] for one in (inputs, labels)) for part in (slice(4), slice(4, 7))]
    factors, coverage = fit(
        model,
        batches,
        loss=lambda model, batch: summed(model(batch[0]).logits, batch[1]),
        mask=lambda batch: torch.ones(len(batch[0]), dtype=torch.bool),
    )
    assert [layer.name for layer in coverage.layers] == ["up", "out"]

    def alone(parameters: Any, one: Any, label: Any) -> Any:
        return cross_entropy(apply(parameters, one[None]), label[None])

    gradients = jax.vmap(jax.grad(alone), in_axes=(None, 0, 0))(values, inputs, labels)
    for layer in coverage.layers:
        mine = gradients[f"{layer.name}.kernel"].transpose(0, 2, 1)
        if layer.bias:
            mine = jnp.concatenate([mine, gradients[f"{layer.name}.bias"][:, :, None]], 2)
        fisher = np.einsum("na,nb->ab", *[np.asarray(mine).reshape(7, -1)] * 2) / 7
        found = factors[layer.name]
        assert found.input_vectors is not None
        assert found.output_vectors is not None
        basis = torch.kron(found.output_vectors, found.input_vectors).numpy()
        np.testing.assert_allclose(found.eigenvalues.flatten(), np.diag(basis.T @ fisher @ basis), rtol=1e-9, atol=1e-14)
        seen = np.asarray(inputs if layer.name == "up" else jnp.tanh(inputs @ values["up.kernel"] + values["up.bias"]))
        seen = np.concatenate([seen, np.ones((7, 1))], 1) if layer.bias else seen
        rotated = found.input_vectors.numpy().T @ (seen.T @ seen) @ found.input_vectors.numpy()
        assert abs(rotated - np.diag(np.diag(rotated))).max() < 1e-9 * rotated.max()


def test_a_function_of_jax_has_its_derivatives_in_torch() -> None:
    function = in_torch(lambda x, y, places: (jnp.sin(x) * y[places]).sum())
    x, y = (torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    places = torch.tensor([2, 0, 0, 1])
    x.requires_grad_(True)
    (3 * function(x, y, places)).backward()
    assert torch.allclose(x.grad, 3 * x.detach().cos() * y[places])  # type: ignore[arg-type]
    y.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, places), (x, y))
    assert not function(x.detach(), y.detach(), places).requires_grad


def small_model(dtype: Any) -> JaxModel:
    def apply(parameters: Any, tokens: Any) -> Any:
        x = lookup(tokens, parameters["embed.embedding"], layer="embed")
        return head(dense(x, parameters["inner.kernel"], layer="inner"), parameters["embed.embedding"], layer="embed")

    table, weight = (jax.random.normal(jax.random.key(rows), (rows, 3)).astype(dtype) for rows in (VOCABULARY, 3))
    return JaxModel(apply, {"embed.embedding": table, "inner.kernel": weight})


def test_a_model_in_bfloat16_has_records_in_float32() -> None:
    """Gradients to a few of bfloat16's 8 bits, of the largest."""
    exact, coarse = (captured_gradients(small_model(dtype), batch()) for dtype in (jnp.float64, jnp.bfloat16))
    for name, gradient in coarse.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient.double(), exact[name], atol=0.03 * float(exact[name].abs().max()))


def test_batches_of_many_shapes_are_few_compilations() -> None:
    model = small_model(jnp.float64)
    layers = attributable_layers(model, run_once).layers
    assert [layer.name for layer in layers] == ["embed", "inner"]
    for sequences, length in ((4, 9), (3, 12), (4, 16), (4, 11), (3, 15), (4, 10)):
        some = padded_batch(lengths=(length,) * sequences, num_positions=length)
        some = SequenceBatch(tokens=some.tokens % VOCABULARY, counted=some.counted, keys=some.keys)
        capture(model, layers, lambda some=some: true_label_loss(model, some), some.reached, lambda layer, record: None)  # type: ignore[misc]
    assert model.compiled.forward._cache_size() == model.compiled.backward._cache_size() == 2  # 3 and 4 sequences of 16


def refused(apply: Callable[..., Any], parameters: Any) -> str:
    with pytest.raises(ValueError) as caught:
        attributable_layers(JaxModel(apply, parameters), run_once)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_attributed_is_refused_in_a_line() -> None:
    table, weight = jnp.ones((VOCABULARY, 3)), jnp.ones((3, VOCABULARY))

    def looped(parameters: Any, tokens: Any) -> Any:
        x = parameters["embed"][tokens]
        x = jax.lax.while_loop(lambda state: state[0] < 3, lambda s: (s[0] + 1, dense(s[1], weight @ table, layer="loop")), (0, x))[1]
        return x @ parameters["head.kernel"]

    assert "there are 0" in refused(looped, {"embed": table, "head.kernel": weight})
    assert "expected logits" in refused(lambda parameters, tokens: parameters["embed"][tokens][0], {"embed": table})

    def shared(parameters: Any, tokens: Any) -> Any:
        x = lookup(tokens, parameters["embed.embedding"], layer="embed")
        return jax.lax.scan(lambda x, _: (dense(x, parameters["inner.kernel"], layer="inner"), None), x, None, length=3)[0] @ weight

    model = JaxModel(shared, {"embed.embedding": table, "inner.kernel": jnp.ones((3, 3))})
    assert "called 3 times" in attributable_layers(model, run_once).excluded["inner"]
    some, layers = batch(), attributable_layers(model, run_once).layers
    with pytest.raises(ValueError, match="not finite"):
        capture(model, layers, lambda: true_label_loss(model, some) / 0, some.reached, lambda *_: None)
