"""Mixtures of experts: every expert's matrices and the router are layers, with each sequence's exact gradient, at the cost of the tokens routed."""

import pytest
import torch
from conftest import VOCABULARY, padded_batch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ekfac import (
    Coverage,
    Layer,
    LayerIO,
    Record,
    SequenceBatch,
    attributable_layers,
    capture,
    fit,
    gauss_newton_product,
    position_inner_products,
    sequence_gradients,
    token_loss_derivatives,
    true_label_loss,
)
from ekfac.parameters import as_parameters, as_vectors

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}

MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, intermediate_size=12, moe_intermediate_size=6, num_experts=5, num_experts_per_tok=2, mlp_only_layers=[0])
    ),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, intermediate_size=6, num_experts=5, num_experts_per_tok=3)
    ),
    # transposed matrices with biases, gates and values interleaved, a router with a bias
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SHAPE, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    ),
}


def mixture(name: str, implementation: str = "eager") -> nn.Module:
    """In float64, with weights large enough that no gradient is negligible."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES[name]().to(torch.float64)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_experts_implementation(implementation)
    return model.eval()


def covered(model: nn.Module) -> Coverage:
    return attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 12)[None], use_cache=False))


def captured(model: nn.Module, layers: tuple[Layer, ...], batch: SequenceBatch) -> dict[str, Record]:
    records: dict[str, Record] = {}
    capture(
        model, layers, lambda: true_label_loss(model, batch), batch.reached, lambda layer, record: records.__setitem__(layer.name, record)
    )
    return records


def single(batch: SequenceBatch, n: int) -> SequenceBatch:
    """The one sequence without its padding."""
    length = int(batch.counted[n].nonzero().max()) + 1
    return SequenceBatch(tokens=batch.tokens[n : n + 1, :length], counted=batch.counted[n : n + 1, :length], keys=batch.keys[n : n + 1])


def autograd(model: nn.Module, layers: tuple[Layer, ...], batch: SequenceBatch) -> dict[str, torch.Tensor]:
    names = list(as_parameters(model, layers, {layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in layers}))
    found = torch.autograd.grad(true_label_loss(model, batch), [model.get_parameter(name) for name in names])
    return as_vectors(model, layers, dict(zip(names, found, strict=True)))


@pytest.mark.parametrize("name", list(MIXTURES))
def test_gradients_of_experts_and_routers_equal_autograd_per_sequence(name: str) -> None:
    model = mixture(name)
    coverage = covered(model)
    missed = {full: p.numel() for full, p in model.named_parameters() if "sinks" in full}  # numbers that attention adds
    assert coverage.attributed == coverage.total - sum(missed.values())
    assert set(coverage.excluded) == ({f"model.layers.{n}.self_attn" for n in range(2)} if missed else set())
    batch = padded_batch(lengths=(7, 4, 5, 7))
    records = captured(model, coverage.layers, batch)
    assert [layer.name for layer in coverage.layers if layer.name.endswith("experts.3.gate_up_proj")]
    for n in range(4):
        expected = autograd(model, coverage.layers, single(batch, n))
        for layer in coverage.layers:
            found = sequence_gradients(records[layer.name])[n]
            # norms and routers compute in float32
            assert torch.allclose(found, expected[layer.name], rtol=1e-6, atol=1e-6), layer.name


def test_an_experts_record_holds_the_tokens_that_were_routed_to_it_and_nothing_else() -> None:
    model, batch = mixture("mixtral"), padded_batch(lengths=(7, 4, 5, 7))
    records = captured(model, covered(model).layers, batch)
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj" for expert in range(4)]
    masks = [record.mask for name in names if isinstance(record := records[name], LayerIO)]
    assert sum(int(mask.sum()) for mask in masks) == 2 * int(batch.reached.sum())  # two experts for each token that the loss reaches
    for name, mask in zip(names, masks, strict=True):
        record = records[name]
        assert isinstance(record, LayerIO)
        assert mask.shape[1] == mask.sum(1).max()
        assert record.places is not None
        for n in range(4):
            where = record.places.indices[n][mask[n]]
            assert batch.reached[n][where].all()
            assert len(where.unique()) == len(where)


def test_shares_of_an_expert_stand_at_their_positions() -> None:
    model, batch = mixture("mixtral"), padded_batch(lengths=(7, 4, 5, 7))
    coverage = covered(model)
    records = captured(model, coverage.layers, batch)
    dense = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        dense.append(arguments[1].reshape(4, 7, 2))

    handle = model.model.layers[1].mlp.experts.register_forward_hook(note)
    model(input_ids=batch.tokens)
    handle.remove()
    generator = torch.Generator().manual_seed(0)
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.gate_up_proj"
        vector = torch.randn((24, 8), dtype=torch.float64, generator=generator)
        shares = position_inner_products(records[name], vector)
        expected = torch.einsum("noj,oj->n", sequence_gradients(records[name]), vector)
        torch.testing.assert_close(shares.sum(1), expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(shares != 0, (dense[0] == expert).any(2) & batch.reached)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_implementations_of_the_experts_give_the_same_and_are_restored(implementation: str) -> None:
    model, batch = mixture("mixtral", implementation).float(), padded_batch()
    experts = model.model.layers[0].mlp.experts
    before = sorted(experts.__dict__)
    plain = float(true_label_loss(model, batch).detach())
    records, losses = {}, []
    layers = covered(model).layers
    losses.append(
        capture(
            model, layers, lambda: true_label_loss(model, batch), batch.reached, lambda layer, record: records.update({layer.name: record})
        )
    )
    assert losses[0] == pytest.approx(plain, rel=1e-6)
    assert sorted(experts.__dict__) == before
    expected = captured(mixture("mixtral").float(), layers, batch)
    for name, record in records.items():
        torch.testing.assert_close(sequence_gradients(record), sequence_gradients(expected[name]), rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_has_factors_of_zero_and_no_part_in_any_score() -> None:
    model, batch = mixture("mixtral"), padded_batch(lengths=(7, 4, 5, 7))
    gate = model.model.layers[1].mlp.gate
    gate.weight.data[:] = 0  # ties: the same two experts are always chosen
    used = set(gate(torch.ones((1, 8), dtype=torch.float64))[2].flatten().tolist())
    factors, coverage = fit(model, [batch])
    lonely = [f"model.layers.1.mlp.experts.{expert}.{name}" for expert in {0, 1, 2, 3} - used for name in ("gate_up_proj", "down_proj")]
    assert len(lonely) == 4
    assert set(lonely) <= {layer.name for layer in coverage.layers}
    for name, factor in factors.items():
        vector = torch.ones(factor.eigenvalues.shape, dtype=torch.float64)
        assert torch.isfinite(factor.precondition(vector)).all()
        assert (float(factor.eigenvalues.abs().max()) == 0) == (name in lonely)
    assert all(float(factors[name].precondition(torch.ones_like(factors[name].eigenvalues)).abs().max()) == 0 for name in lonely)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_gauss_newton_products_equal_the_jacobian_times_the_curvature(name: str) -> None:
    model, batch = mixture(name, "batched_mm"), padded_batch(lengths=(4, 3), num_positions=4, prompt=2)
    layers = attributable_layers(
        model, lambda m: m(input_ids=torch.arange(1, 12)[None], use_cache=False), ["*.1.mlp.*", "*.embed_tokens"]
    ).layers
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn((2, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}
    found = gauss_newton_product(model, layers, batch, vectors)
    expected = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    names = list(as_parameters(model, layers, vectors))
    model.set_experts_implementation("eager")
    for n in range(2):
        logits = model(input_ids=batch.tokens[n : n + 1], use_cache=False).logits[0]
        for t in batch.counted[n].nonzero()[:, 0].tolist():
            parameters = [model.get_parameter(name) for name in names]
            rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in logits[t - 1]]
            jacobian = as_vectors(
                model, layers, {name: torch.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}
            )
            p = logits[t - 1].detach().softmax(-1)
            change = sum(torch.einsum("voj,qoj->qv", jacobian[name], vectors[name]) for name in vectors)
            curved = change * p - p * (change @ p)[:, None]
            for name in expected:
                expected[name] += torch.einsum("qv,voj->qoj", curved, jacobian[name])
    largest = max(float(part.abs().max()) for part in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5 * largest)


def test_shares_by_predicted_token_sum_to_those_by_position() -> None:
    model, batch = mixture("qwen3-moe"), padded_batch(lengths=(7, 4, 5))
    layers = covered(model).layers
    records = captured(model, layers, batch)
    generator = torch.Generator().manual_seed(0)
    vector = {layer.name: torch.randn(layer.shape, dtype=torch.float64, generator=generator) for layer in layers}
    by_token = token_loss_derivatives(model, layers, batch, vector).sum(1)
    by_position = torch.stack([position_inner_products(records[layer.name], vector[layer.name]).sum(1) for layer in layers]).sum(0)
    torch.testing.assert_close(by_token, by_position, rtol=1e-5, atol=1e-5)


def test_one_expert_can_be_chosen_by_its_name() -> None:
    model = mixture("mixtral")
    coverage = attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 12)[None], use_cache=False), ["*.1.mlp.experts.3.*"])
    assert [layer.name for layer in coverage.layers] == [f"model.layers.1.mlp.experts.3.{name}" for name in ("gate_up_proj", "down_proj")]
    assert coverage.excluded["model.layers.1.mlp.experts.2.down_proj"] == "not selected by the layer patterns"
    batch = padded_batch()
    records = captured(model, coverage.layers, batch)
    expected = autograd(model, coverage.layers, single(batch, 0))
    for name, record in records.items():
        torch.testing.assert_close(sequence_gradients(record)[0], expected[name], rtol=1e-6, atol=1e-6)
