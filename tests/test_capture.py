"""Capture gives each sequence's exact gradient, layer by layer, and leaves the model as it was."""

import copy

import pytest
import torch
from conftest import padded_batch, tiny_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from ekfac import (
    Layer,
    Record,
    SequenceBatch,
    attributable_layers,
    capture,
    position_inner_products,
    sequence_gradients,
    true_label_loss,
)
from ekfac.parameters import as_vectors


def run_once(model: nn.Module) -> None:
    model(input_ids=torch.arange(1, 6)[None], use_cache=False)


def captured_gradients(model: nn.Module, batch: SequenceBatch) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    layers = attributable_layers(model, run_once).layers
    capture(
        model,
        layers,
        lambda: true_label_loss(model, batch),
        batch.reached,
        lambda layer, record: gradients.__setitem__(layer.name, sequence_gradients(record)),
    )
    return gradients


def autograd_gradient(model: nn.Module, name: str, batch: SequenceBatch, index: int) -> torch.Tensor:
    """[O, J] by plain autograd on the one sequence without its padding."""
    length = int(batch.counted[index].nonzero().max()) + 1
    single = SequenceBatch(
        tokens=batch.tokens[index : index + 1, :length],
        counted=batch.counted[index : index + 1, :length],
        keys=batch.keys[index : index + 1],
    )
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding) and getattr(model.lm_head, "bias", None) is not None and module.weight is model.lm_head.weight:
        module = model.lm_head  # the same weight, and the bias with it
    bias = getattr(module, "bias", None)
    parameters = [module.weight] + ([bias] if bias is not None else [])
    weight, *biases = torch.autograd.grad(true_label_loss(model, single), parameters)
    weight = weight.T if isinstance(module, Conv1D) else weight.reshape(len(weight), -1)
    return torch.cat([weight, biases[0][:, None]], 1) if biases else weight


@pytest.mark.parametrize("prompt", [0, 3])
def test_capture_equals_autograd_per_sequence(architecture: str, prompt: int) -> None:
    model = tiny_model(architecture)
    batch = padded_batch(lengths=(7, 4, 5, 7), prompt=prompt)
    gradients = captured_gradients(model, batch)
    assert len(gradients) >= 14
    tolerance = 1e-6 if architecture == "gemma2" else 1e-10  # whose norms compute in float32
    for name, gradient in gradients.items():
        for index in range(4):
            expected = autograd_gradient(model, name, batch, index)
            assert torch.allclose(gradient[index], expected, rtol=tolerance, atol=tolerance), name
            assert expected.abs().max() > 1e-6


def test_sequence_of_nothing_but_padding_has_zero_gradient() -> None:
    batch = padded_batch(lengths=(7, 1))
    assert not batch.counted[1].any()
    for gradient in captured_gradients(tiny_model("gpt2"), batch).values():
        assert gradient[1].abs().max() == 0


def test_layers_fed_one_tensor_share_an_input_group() -> None:
    groups = {layer.name: layer.input_group for layer in attributable_layers(tiny_model("llama"), run_once).layers}
    block = "model.layers.1."
    assert groups[block + "self_attn.v_proj"] == groups[block + "self_attn.k_proj"] == block + "self_attn.q_proj"
    assert groups[block + "mlp.up_proj"] == block + "mlp.gate_proj"
    assert groups[block + "mlp.down_proj"] == block + "mlp.down_proj"


def test_every_parameter_is_covered_once(architecture: str) -> None:
    model = tiny_model(architecture)
    coverage = attributable_layers(model, run_once)
    assert coverage.attributed == coverage.total == sum(p.numel() for p in model.parameters())
    assert coverage.excluded == {}


def test_what_is_left_out_is_named() -> None:
    model = tiny_model("gpt2")
    coverage = attributable_layers(model, run_once, ["*.h.*.attn.*", "*.h.*.mlp.*"])
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and "ln_" not in name)
    assert coverage.attributed == blocks
    assert coverage.total == sum(p.numel() for p in model.parameters())
    assert coverage.excluded["lm_head"] == coverage.excluded["transformer.wte"] == "not selected by the layer patterns"
    assert {"transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"} <= set(coverage.excluded)


def test_modules_of_other_kinds_are_left_out_with_the_reason() -> None:
    shape = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**shape, ffn_dim=12, word_embed_proj_dim=8, max_position_embeddings=16))
    mixtral = MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=12, num_key_value_heads=1, num_local_experts=2))
    del mixtral.model.layers[0].mlp.experts.has_gate  # what says how the experts compute
    mixtral.set_experts_implementation("eager")
    left_out = {type(model).__name__: attributable_layers(model, run_once).excluded for model in (opt, mixtral)}
    assert left_out == {
        "OPTForCausalLM": {"model.decoder.embed_positions": "embedding: not called with the numbers of its rows"},
        "MixtralForCausalLM": {"model.layers.0.mlp.experts": "MixtralExperts: weights of three dimensions, of a kind that is not known"},
    }


class Gated(nn.Module):
    """A norm with a gate, and an embedding, inside a model that gives its last layer a gate."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return self.weight * x / x.norm(dim=-1, keepdim=True) * (1 if gate is None else gate)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), Gated.Norm()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = self.table(input_ids)
        return self.norm(self.linear(x), x)


def test_what_cannot_be_tried_alone_is_left_out() -> None:
    model = Gated()
    assert attributable_layers(model, lambda m: m(torch.arange(1, 4)[None], False)).excluded == {
        "norm": "Norm: takes more than one argument"
    }
    model.table.weight.data[0] = 0
    only_zeros = attributable_layers(model, lambda m: m(torch.zeros((1, 3), dtype=torch.int64), False))
    assert "all rows that were tried are zero" in only_zeros.excluded["table"]


def test_norm_over_heads_before_positions_is_left_out() -> None:
    config = Gemma3TextConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    )
    coverage = attributable_layers(Gemma3ForCausalLM(config), run_once)
    reason = "Gemma3RMSNorm: its input has no position as its second dimension"
    assert coverage.excluded == {f"model.layers.0.self_attn.{name}_norm": reason for name in "qk"}


def test_tied_embedding_and_head_are_one_layer_known_by_either_name() -> None:
    for pattern in ("lm_head", "transformer.wte"):
        (layer,) = attributable_layers(tiny_model("gpt2"), run_once, [pattern]).layers
        assert layer.modules == ("transformer.wte", "lm_head")


def test_untied_head_is_attributed() -> None:
    assert "lm_head" in [layer.name for layer in attributable_layers(tiny_model("llama"), run_once).layers]


def test_model_is_left_as_it_was_found() -> None:
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
    random_state = torch.get_rng_state()
    captured_gradients(model, padded_batch())
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_model_is_restored_when_a_consumer_fails() -> None:
    model = tiny_model("gpt2")
    layers = attributable_layers(model, run_once).layers
    batch = padded_batch()

    def fail(*_: object) -> None:
        raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        capture(model, layers, lambda: true_label_loss(model, batch), batch.reached, fail)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_no_weight_gradient_is_computed_and_records_arrive_from_last_to_first() -> None:
    model = tiny_model("gpt2")
    layers = attributable_layers(model, run_once).layers
    batch = padded_batch()
    seen: list[str] = []
    capture(model, layers, lambda: true_label_loss(model, batch), batch.reached, lambda layer, _: seen.append(layer.name))
    assert seen == [layer.name for layer in reversed(layers)]
    assert all(p.grad is None for p in model.parameters())


def test_non_finite_weights_are_refused() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        captured_gradients(model, padded_batch())


class Twice(nn.Module):
    """A linear layer, a norm and a table that are each called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.norm, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.table(tokens.flip(1)).tanh()
        for _ in range(2):
            x = self.norm(torch.sin(self.linear(x)))
        return self.head(x)


def test_gradients_of_a_module_that_is_called_twice_are_summed_over_its_calls() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    tokens, mask = torch.randint(0, 9, (4, 5)), torch.arange(5)[None] < torch.tensor([5, 3, 4, 5])[:, None]
    coverage = attributable_layers(model, lambda m: m(tokens), positions=(4, 5), same_positions=True)
    assert coverage.attributed == coverage.total

    def loss(rows: slice) -> torch.Tensor:
        return (model(tokens[rows]).logsumexp(2) * mask[rows]).sum()

    def consume(layer: Layer, record: Record) -> None:
        gradients = sequence_gradients(record)
        vector = torch.linspace(-1, 1, layer.shape[0] * layer.shape[1], dtype=torch.float64).reshape(layer.shape)
        shares = position_inner_products(record, vector)
        assert shares.shape == mask.shape
        torch.testing.assert_close(shares.sum(1), torch.einsum("noj,oj->n", gradients, vector), rtol=1e-9, atol=1e-12)
        for n in range(4):
            names = [name for name, _ in model.named_parameters() if name.startswith(layer.name)]
            found = torch.autograd.grad(loss(slice(n, n + 1)), [model.get_parameter(name) for name in names])
            expected = as_vectors(model, [layer], dict(zip(names, found, strict=True)))[layer.name]
            torch.testing.assert_close(gradients[n], expected, rtol=1e-9, atol=1e-12)

    records: list[tuple[Layer, Record]] = []
    capture(model, coverage.layers, lambda: loss(slice(None)), mask, lambda *both: records.append(both))
    assert len(records) == 4
    for layer, record in records:
        consume(layer, record)


def test_pattern_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no attributable layer matches '\*\.mlpp\.\*'"):
        attributable_layers(tiny_model("gpt2"), run_once, ["*.mlpp.*"])
