"""The whole path, from a run to an exact answer, for models of other kinds: against explicit inversion and autograd in float64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_run import POSITIONS, documents, perturbed, run_pipeline, tokenizer, write_jsonl
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN

from ekfac.parameters import as_parameters, as_vectors
from influence import QueryOptions, Run
from influence.config import ModelConfig
from influence.errors import RequestError
from influence.model import find_layers, load_model, model_fingerprint, model_without_weights
from influence.refinement import RefineOptions
from influence.sequences import TrainingSequence

# peft asks transformers for something by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

QUERY = ("Oslo lies on the", " Aker. The town")


def settings(directory: Path, model: Path, **of_model: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model), **of_model},
        "data": {"files": str(directory / "train.jsonl"), "sequence_length": POSITIONS, "sequences_per_shard": 8},
        "index": {"bytes_per_sequence": 1024, "recall_queries": 2},
        "run": {"dir": str(directory / "run")},
    }


def with_words(directory: Path) -> int:
    """Twelve documents and a tokenizer of them; how many tokens it knows."""
    rows = documents()[::3][:12]
    write_jsonl(directory / "train.jsonl", rows)
    words = tokenizer(row["text"] for row in rows)
    words.save_pretrained(directory / "model")
    return len(words)


def gradient(model: nn.Module, run: Run, sequence: TrainingSequence) -> dict[str, torch.Tensor]:
    """Of minus the counted tokens' log-probability, [O, J] by layer, by plain autograd."""
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
    log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    places = np.flatnonzero(sequence.counted) - 1
    layers = run.coverage.layers
    names = list(as_parameters(model, layers, {layer.name: torch.zeros(layer.shape) for layer in layers}))
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    parameters = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad(-log_probabilities[places, ids[0, places + 1]].sum(), parameters)
    return {name: vector.double() for name, vector in as_vectors(model, layers, dict(zip(names, found, strict=True))).items()}


def assert_answers_are_those_of_dense_inversion(run: Run) -> None:
    model, layers = run.language_model.model, run.coverage.layers
    if all(p.is_floating_point() for p in model.parameters()):  # quantized weights compute in their own dtype
        model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    measurement = run.measure(*QUERY)
    asked = gradient(model, run, measurement.parts[0][1])
    table = np.zeros((len(run.store), len(layers)))
    solved = {}
    for layer in layers:
        factor = run.factors[layer.name]
        left = torch.eye(layer.shape[0]).double() if factor.output_vectors is None else factor.output_vectors.double()
        right = torch.eye(layer.shape[1]).double() if factor.input_vectors is None else factor.input_vectors.double()
        damped = factor.eigenvalues.double() + factor.damping
        inverse = torch.where(damped > 0, 1 / damped, 0)
        solved[layer.name] = left @ ((left.T @ asked[layer.name] @ right) * inverse) @ right.T
    for number, sequence in enumerate(run.store):
        found = gradient(model, run, sequence)
        table[number] = [float((solved[layer.name] * found[layer.name]).sum()) for layer in layers]
    table /= len(run.store)
    everything = len(run.store)
    result = run.answer([measurement], QueryOptions(k=everything, candidates=everything))[0]
    scale = np.abs(table).sum(1).max()
    assert len(result.sequences) == everything
    for sequence in result.sequences:
        expected = table[run.store.ids.index(sequence.id)]
        np.testing.assert_allclose([sequence.layers[layer.name] for layer in layers], expected, rtol=2e-3, atol=1e-4 * scale)
        assert sum(share for _, share in sequence.tokens) == pytest.approx(sequence.score, rel=1e-4, abs=1e-5 * scale)
    exact = run.query(*QUERY, k=everything, exact=True).scores()
    for sequence in result.sequences:
        assert exact[sequence.id] == pytest.approx(sequence.score, rel=1e-3, abs=1e-5 * scale)


def test_mixture_of_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=with_words(tmp_path),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=POSITIONS,
    )
    model = perturbed(lambda: MixtralForCausalLM(config))
    model.model.layers[1].mlp.gate.weight.data[:] = 0  # type: ignore[index, union-attr]  # ties: no token reaches two of the experts
    model.save_pretrained(tmp_path / "model")
    run = run_pipeline(settings(tmp_path, tmp_path / "model"))
    assert run.coverage.share == 1
    assert len([layer for layer in run.coverage.layers if layer.expert is not None]) == 2 * 4 * 2
    lonely = [name for name, factor in run.factors.items() if float(factor.eigenvalues.max()) == 0]
    assert len(lonely) == 4
    assert all(".1.mlp.experts." in name for name in lonely)
    assert_answers_are_those_of_dense_inversion(run)
    refined = run.query(*QUERY, k=3, refine=RefineOptions(steps=2, sequences=4))
    assert all(np.isfinite(sequence.score) for sequence in refined.sequences)
    chosen = run.query(*QUERY, k=3, layers=["*.0.mlp.experts.2.*"])
    assert set(chosen.sequences[0].layers) == {f"model.layers.0.mlp.experts.2.{name}_proj" for name in ("gate_up", "down")}
    assert chosen.coverage["excluded"]["model.layers.1.mlp.experts.1.down_proj"] == "not selected by the query"


def llama(vocabulary: int, width: int = 8) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
    )
    return perturbed(lambda: LlamaForCausalLM(config))


def save_adapter(base: nn.Module, directory: Path, alpha: int = 8) -> None:
    """LoRA on some of the base's layers, with matrices that are not zero."""
    lora = LoraConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    perturbed(lambda: get_peft_model(copy.deepcopy(base), lora)).save_pretrained(directory)


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_adapter(tmp_path: Path, quantize: str | None) -> None:
    base = llama(with_words(tmp_path), 64 if quantize else 8)
    base.save_pretrained(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter")
    of_model = {"adapter": str(tmp_path / "adapter"), **({"quantize": quantize} if quantize else {})}
    run = run_pipeline(settings(tmp_path, tmp_path / "model", **of_model))
    names = [f"{place}.lora_{matrix}.default" for place in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj") for matrix in "AB"]
    prefix = "base_model.model.model.layers"
    assert {layer.name for layer in run.coverage.layers} == {f"{prefix}.{block}.{name}" for block in range(2) for name in names}
    groups = {layer.name: layer.input_group for layer in run.coverage.layers}
    assert groups[f"{prefix}.0.self_attn.v_proj.lora_A.default"] == f"{prefix}.0.self_attn.q_proj.lora_A.default"
    reasons = {name: reason for name, reason in run.coverage.excluded.items() if name.endswith("q_proj.base_layer")}
    assert set(reasons.values()) == {"frozen: its parameters require no gradient"}
    assert_answers_are_those_of_dense_inversion(run)


def test_weights_in_4_bits_can_be_differentiated_after_a_pass_without_gradients(tmp_path: Path) -> None:
    base = llama(with_words(tmp_path), 64)
    base.save_pretrained(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter")
    loaded = load_model(ModelConfig(name=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), quantize="4bit"))
    own, tokens = model_fingerprint(loaded.model), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loaded.model(tokens)
    assert model_fingerprint(loaded.model) == own
    loaded.model(tokens).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in loaded.model.parameters() if p.requires_grad)


def test_weights_of_a_base_in_8_bits_are_frozen_and_its_adapter_is_attributed(tmp_path: Path) -> None:
    base = llama(with_words(tmp_path), 64)
    base.save_pretrained(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter")
    config = ModelConfig(name=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), quantize="8bit")
    loaded = load_model(config)
    assert len(find_layers(loaded.model, ["*"]).layers) == 12
    prints = {model_fingerprint(loaded.model)}
    loaded.model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.base_layer.SCB"] *= 1.5
    prints |= {model_fingerprint(loaded.model), model_fingerprint(load_model(config.model_copy(update={"quantize": None})).model)}
    assert len(prints) == 3


def test_fingerprint_covers_base_adapter_and_its_settings(tmp_path: Path) -> None:
    base = llama(with_words(tmp_path))
    base.save_pretrained(tmp_path / "model")
    for alpha in (8, 16):
        save_adapter(base, tmp_path / f"adapter-{alpha}", alpha)
    prints = set()
    for adapter in (None, "adapter-8", "adapter-16"):
        config = ModelConfig(name=str(tmp_path / "model"), adapter=adapter and str(tmp_path / adapter))
        prints.add(model_fingerprint(load_model(config).model))
        described = find_layers(model_without_weights(config), ["*"])
        assert described == find_layers(load_model(config).model, ["*"])  # what `influence plan` counts
    assert len(prints) == 3


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_a_gelu_of_many_operations_is_loaded_as_one_of_the_same_values_and_derivatives(tmp_path: Path, activation: str) -> None:
    config = GPT2Config(vocab_size=with_words(tmp_path), n_positions=16, n_embd=8, n_layer=2, n_head=2, activation_function=activation)
    plain = perturbed(lambda: GPT2LMHeadModel(config), 0).double().eval()
    plain.save_pretrained(tmp_path / "model")
    loaded = load_model(ModelConfig(name=str(tmp_path / "model"), dtype="float64")).model
    written_out = type(ACT2FN[activation])
    assert [sum(isinstance(module, written_out) for module in model.modules()) for model in (plain, loaded)] == [2, 0]
    tokens = torch.arange(1, 9)[None]
    losses = [model(input_ids=tokens, labels=tokens).loss for model in (plain, loaded)]
    found = [
        torch.autograd.grad(loss, [model.get_parameter(name) for name, _ in plain.named_parameters()])
        for loss, model in zip(losses, (plain, loaded), strict=True)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-9)


def test_what_is_no_adapter_of_the_model_is_refused(tmp_path: Path) -> None:
    base = llama(with_words(tmp_path))
    base.save_pretrained(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter")
    save_adapter(llama(60, 16), tmp_path / "wider")
    get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    for adapter, message in {
        "missing": "there is no adapter_config.json",
        "wider": "does not fit the model",
        "prompt": "whose parameters are inputs and no layers",
    }.items():
        with pytest.raises(RequestError, match=message):
            load_model(ModelConfig(name=str(tmp_path / "model"), adapter=str(tmp_path / adapter)))
    with pytest.raises(RequestError, match="is an adapter: give its base as the model"):
        load_model(ModelConfig(name=str(tmp_path / "adapter")))
    with pytest.raises(ValueError, match="quantize needs an adapter"):
        ModelConfig(name="base", quantize="4bit")
