"""`ekfac` on models that are no causal language models, and however a model computes: each sequence's gradient against autograd on it alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model
from small_run import perturbed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from ekfac import (
    Coverage,
    EmbeddingIO,
    GroupedIO,
    Layer,
    LayerIO,
    Record,
    as_one_sequence,
    attributable_layers,
    capture,
    fit,
    inner_products,
    position_inner_products,
    sequence_gradients,
    true_label_loss,
)
from ekfac.parameters import as_parameters, as_vectors

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]

ENCODER = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def enlarged(make: Callable[[], nn.Module]) -> Any:
    """In float64, `perturbed`."""
    return perturbed(lambda: make().to(torch.float64))


def records_of(model: nn.Module, layers: tuple[Layer, ...], loss: Loss, batch: Batch, mask: Tensor) -> dict[str, Record]:
    records: dict[str, Record] = {}
    capture(model, layers, lambda: loss(model, batch), mask, lambda layer, record: records.__setitem__(layer.name, record))
    return records


def assert_gradients_equal_autograd(
    model: nn.Module, coverage: Coverage, loss: Loss, batch: Batch, mask: Tensor, tolerance: float = 1e-9
) -> dict[str, Record]:
    records, layers = records_of(model, coverage.layers, loss, batch, mask), coverage.layers
    names = list(as_parameters(model, layers, {layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in layers}))
    for n in range(len(mask)):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        found = torch.autograd.grad(loss(model, one), [model.get_parameter(name) for name in names])
        expected = as_vectors(model, layers, dict(zip(names, found, strict=True)))
        for layer in layers:
            torch.testing.assert_close(sequence_gradients(records[layer.name])[n], expected[layer.name], rtol=tolerance, atol=tolerance)
    assert all(float(sequence_gradients(record).abs().max()) > 1e-6 for record in records.values())
    return records


def tokens(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(seed))


def classified(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["tokens"], attention_mask=batch["attended"]).logits
    return functional.cross_entropy(logits, batch["labels"], reduction="sum")


def test_encoder_with_a_classifier() -> None:
    model = enlarged(lambda: BertForSequenceClassification(BertConfig(**ENCODER, max_position_embeddings=16, num_labels=3)))
    attended = (torch.arange(6)[None] < torch.tensor([6, 3, 5, 2])[:, None]).long()
    batch = {"tokens": tokens((4, 6)) * attended, "attended": attended, "labels": torch.tensor([0, 2, 1, 1])}
    every = torch.ones(4, dtype=torch.bool)
    coverage = attributable_layers(model, lambda m: classified(m, batch), positions=(4,))
    assert coverage.excluded == {}
    records = assert_gradients_equal_autograd(model, coverage, classified, batch, every)
    # keys and values of the first block: all that is attended to; outputs of the last: what the classifier reads
    first, last = records["bert.encoder.layer.0.attention.self.value"], records["bert.encoder.layer.1.output.dense"]
    assert torch.equal(first.mask, attended.bool())
    assert torch.equal(last.mask, torch.arange(6)[None].expand(4, -1) == 0)
    factors, fitted = fit(model, [batch], loss=classified, mask=lambda _: every)
    assert fitted.share == 1
    assert all(torch.isfinite(factor.precondition(torch.ones_like(factor.eigenvalues))).all() for factor in factors.values())


def generated(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["tokens"], attention_mask=batch["attended"], decoder_input_ids=batch["given"], use_cache=False).logits
    return (functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none") * batch["counted"]).sum()


def test_encoder_and_decoder_of_other_lengths() -> None:
    config = T5Config(vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0, tie_word_embeddings=True)
    model = enlarged(lambda: T5ForConditionalGeneration(config))
    attended = (torch.arange(7)[None] < torch.tensor([7, 3, 5])[:, None]).long()
    counted = (torch.arange(4)[None] < torch.tensor([4, 4, 2])[:, None]).long()
    batch = {
        "tokens": tokens((3, 7)) * attended,
        "attended": attended,
        "given": tokens((3, 4), 1),
        "labels": tokens((3, 4), 2),
        "counted": counted,
    }
    mask = counted.bool()
    coverage = attributable_layers(model, lambda m: generated(m, batch), positions=(3, 4))
    assert {name.rpartition(".")[2] for name in coverage.excluded} == {"relative_attention_bias"}
    assert all("cannot be told apart by sequence" in reason for reason in coverage.excluded.values())
    records = assert_gradients_equal_autograd(model, coverage, generated, batch, mask, 1e-6)  # its norms compute in float32
    shared = records["encoder.embed_tokens"]
    assert isinstance(shared, EmbeddingIO)
    assert shared.lookup is not None
    assert shared.lookup.indices.shape == (3, 7 + 4)  # two lookups and a head
    assert torch.equal(records["encoder.block.0.layer.0.SelfAttention.v"].mask, attended.bool())
    assert torch.equal(records["decoder.block.0.layer.0.SelfAttention.v"].mask, mask)


def test_blocks_that_share_their_weights() -> None:
    model = enlarged(lambda: AlbertModel(AlbertConfig(**ENCODER, embedding_size=6, num_hidden_groups=1), add_pooling_layer=False))
    batch = {"tokens": tokens((3, 5))}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["tokens"]).last_hidden_state.sin().sum()

    mask = torch.ones((3, 5), dtype=torch.bool)
    coverage = attributable_layers(model, lambda m: loss(m, batch), positions=(3, 5), same_positions=True)
    assert coverage.excluded == {}
    records = assert_gradients_equal_autograd(model, coverage, loss, batch, mask)
    record = records["encoder.albert_layer_groups.0.albert_layers.0.ffn"]
    assert isinstance(record, LayerIO)
    assert record.activations.shape[:2] == (3, 2 * 5)


class Images(nn.Module):
    """Convolutions of several shapes over pictures, and one over what is left of them as a line."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.second = nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular", bias=False)
        self.line = nn.Conv1d(4, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = functional.max_pool2d(torch.tanh(self.second(x)), 2)
        return self.head(torch.sin(self.line(x.flatten(2))).mean(2))


def labelled(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def test_convolutions() -> None:
    model = enlarged(Images)
    batch = {"x": torch.randn((4, 2, 9, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(0)), "y": torch.arange(4) % 3}
    every = torch.ones(4, dtype=torch.bool)
    coverage = attributable_layers(model, lambda m: labelled(m, batch), positions=(4,))
    assert coverage.attributed == coverage.total
    records = assert_gradients_equal_autograd(model, coverage, labelled, batch, every)
    assert all(bool(record.mask.all()) for record in records.values())  # every place of a picture counts
    factors, _ = fit(model, [batch], loss=labelled, mask=lambda _: every)
    assert factors["first"].eigenvalues.shape == (3, 2 * 3 * 2 + 1)


class Films(nn.Module):
    """Convolutions with groups in one, two and three dimensions, one of them of each channel by itself and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.film = nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1))
        self.film_groups = nn.Conv3d(4, 6, (1, 2, 2), groups=2, bias=False, padding_mode="replicate", padding=(0, 1, 0))
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding="same")
        self.line = nn.Conv1d(6, 9, 2, groups=3, stride=2)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.film_groups(torch.sin(self.film(x)))).sum(2)
        x = torch.tanh(self.depthwise(torch.sin(self.depthwise(x))))
        return self.head(torch.sin(self.line(x.flatten(2))).mean(2))


def test_convolutions_with_groups_and_in_three_dimensions() -> None:
    """(G + λI)⁻¹ of a layer with groups is one-sided: eigenvectors of its patches, weighted by ‖output gradient‖², the identity over its outputs."""
    model = enlarged(Films)
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn((5, 2, 4, 5, 4), dtype=torch.float64, generator=generator), "y": torch.arange(5) % 3}
    every = torch.ones(5, dtype=torch.bool)
    coverage = attributable_layers(model, lambda m: labelled(m, batch), positions=(5,))
    assert coverage.attributed == coverage.total
    records = assert_gradients_equal_autograd(model, coverage, labelled, batch, every)
    factors, _ = fit(model, [batch], loss=labelled, mask=lambda _: every)
    for name in ("film_groups", "depthwise", "line"):
        layer, record = next(layer for layer in coverage.layers if layer.name == name), records[name]
        assert isinstance(record, GroupedIO)
        gradients, vector = sequence_gradients(record), torch.randn(layer.shape, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(position_inner_products(record, vector).sum(1), torch.einsum("noj,oj->n", gradients, vector))
        torch.testing.assert_close(inner_products(record, vector[None])[0], torch.einsum("noj,oj->n", gradients, vector))
        torch.testing.assert_close(sequence_gradients(as_one_sequence(record))[0], gradients.sum(0))
        inputs = record.activations.numpy()
        inputs = np.concatenate([inputs, np.ones_like(inputs[..., :1])], -1) if record.bias else inputs
        shares = np.einsum("nthp,nthj->nthpj", record.output_gradients.numpy(), inputs).reshape(-1, layer.shape[1])
        axes, factor = factors[name].input_vectors.numpy(), factors[name]
        assert factor.output_vectors is None
        rotated = axes.T @ (shares.T @ shares) @ axes
        np.testing.assert_allclose(axes.T @ axes, np.eye(len(axes)), atol=1e-9)
        np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-9 * rotated.max())
        dense = np.kron(np.eye(layer.outputs), axes)
        moments = np.mean((gradients.flatten(1).numpy() @ dense) ** 2, axis=0)
        curvature = dense @ np.diag(moments) @ dense.T + 0.1 * moments.mean() * np.eye(len(dense))
        expected = np.linalg.solve(curvature, vector.flatten().numpy()).reshape(layer.shape)
        np.testing.assert_allclose(factor.precondition(vector).numpy(), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())


def test_torch_transformer_layers_are_seen_although_they_have_a_shortcut_for_evaluation() -> None:
    model = enlarged(lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True))
    batch = {"x": torch.randn((3, 5, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    mask = torch.ones((3, 5), dtype=torch.bool)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).sin().sum()

    coverage = attributable_layers(model, lambda m: loss(m, batch), positions=(3, 5))
    assert {layer.name for layer in coverage.layers} == {"linear1", "linear2", "norm1", "norm2"}
    assert set(coverage.excluded) == {"self_attn", "self_attn.out_proj"}
    assert_gradients_equal_autograd(model, coverage, loss, batch, mask)
    assert torch.backends.mha.get_fastpath_enabled()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.before = reentrant, nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Any = checkpoint(self.block, self.before(x), use_reentrant=self.reentrant)
        return self.head(found)


@pytest.mark.parametrize("patterns", [["*"], ["block.2"]])
def test_activations_computed_again_for_checkpoints_are_noted_once(patterns: list[str]) -> None:
    model = enlarged(lambda: Checkpointed(False))
    batch = {"x": torch.randn((3, 5, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).sin().sum()

    coverage = attributable_layers(model, lambda m: loss(m, batch), patterns)
    assert_gradients_equal_autograd(model, coverage, loss, batch, torch.ones((3, 5), dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused() -> None:
    model = enlarged(lambda: Checkpointed(True))
    x = torch.ones((1, 2, 4), dtype=torch.float64)
    layers = attributable_layers(model, lambda m: m(x)).layers
    with pytest.raises(ValueError, match=r"'block.0' was called without gradients.*use_reentrant=True"):
        capture(model, layers, lambda: model(x).sum(), torch.ones((1, 2), dtype=torch.bool), lambda *_: None)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_a_layer_before_an_operation_without_a_derivative_is_refused_by_name() -> None:
    library = torch.library.Library("without_derivative", "DEF")  # as kernels of quantized weights are
    library.define("halved(Tensor x) -> Tensor")
    library.impl("halved", lambda x: x.detach() / 2, "CPU")

    class Halved(nn.Module):
        packed = False

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.without_derivative.halved(x) if self.packed else x / 2

    model, x = nn.Sequential(nn.Linear(4, 4), Halved(), nn.Linear(4, 4)), torch.ones((1, 2, 4))
    layers = attributable_layers(model, lambda m: m(x)).layers
    model[1].packed = True
    with pytest.raises(ValueError, match=r"no gradient reaches layer '0'"):
        capture(model, layers, lambda: model(x).sum(), torch.ones((1, 2), dtype=torch.bool), lambda *_: None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    batch = padded_batch()
    found: dict[str, Tensor] = {}
    layers = attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 12)[None], use_cache=False)).layers
    capture(
        model,
        layers,
        lambda: true_label_loss(model, batch),
        batch.reached,
        lambda layer, record: found.__setitem__(layer.name.removeprefix("_orig_mod."), sequence_gradients(record)),
    )
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


def test_compiled_models_give_the_same_as_plain_ones() -> None:
    expected = gradients(tiny_model("gpt2"))
    wrapped = torch.compile(tiny_model("gpt2"), backend="eager")
    in_place = tiny_model("gpt2")
    in_place.compile(backend="eager")
    for model in (wrapped, in_place):
        batch = padded_batch()
        model(input_ids=batch.tokens, use_cache=False)  # compiled, before there are hooks
        assert_same(gradients(model), expected, 1e-12)


def test_attention_kernels_and_checkpoints_of_hugging_face_change_nothing() -> None:
    plain = tiny_model("gpt2")
    expected = gradients(plain)
    plain.set_attn_implementation("eager")
    assert_same(gradients(plain), expected, 1e-10)
    plain.activation_checkpointing_enable()
    plain.train()
    assert_same(gradients(plain), expected, 1e-10)
    assert plain.training


def test_weights_in_bfloat16_give_gradients_in_float32_near_those_of_float64() -> None:
    expected = gradients(tiny_model("llama"))
    found = gradients(tiny_model("llama").to(torch.bfloat16))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert_same({name: gradient.double() for name, gradient in found.items()}, expected, 0.1)  # bfloat16 rounds by .004, in some ten steps
