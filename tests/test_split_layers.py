"""Blocks of linear layers: queries, keys and values of fused projections, gates of fused MLPs, heads; in names, gradients, factors and runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, padded_batch
from small_run import Influence, World, everything, write_yaml
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from ekfac import (
    Coverage,
    Layer,
    Record,
    SequenceBatch,
    attributable_layers,
    capture,
    covariance_pass,
    drawn_label_loss,
    fit,
    gauss_newton_product,
    reached_positions,
    sequence_gradients,
    token_loss_derivatives,
    true_label_loss,
)
from ekfac.parameters import as_parameters, as_vectors
from ekfac.projections import Split, numbers
from influence.batches import covariance_sizes, factor_bytes, layer_groups, model_memory
from influence.config import ModelConfig
from influence.model import find_layers, model_without_weights
from influence.refinement import RefineOptions
from influence.run import Run

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 10, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 10}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=16, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=VOCABULARY)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**LLAMA, pad_token_id=0, bos_token_id=0, eos_token_id=0)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=10, max_position_embeddings=64)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=4)),
    "falcon, one head of keys": lambda: FalconForCausalLM(FalconConfig(**SMALL, multi_query=True)),
    "falcon, grouped": lambda: FalconForCausalLM(FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon, alibi": lambda: FalconForCausalLM(FalconConfig(**SMALL, multi_query=False, alibi=True)),
    "persimmon": lambda: PersimmonForCausalLM(PersimmonConfig(**SMALL, intermediate_size=10, pad_token_id=0)),
    "bigcode, one head of keys": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**GPT2, multi_query=True)),
    "bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**GPT2, multi_query=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=10, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0)),
}


def model_of(family: str) -> nn.Module:
    """In float64, with weights large enough that no gradient is negligible."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[family]().to(torch.float64)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.config._attn_implementation = "eager"
    return model.eval()


def covered(model: nn.Module, split: Split, patterns: tuple[str, ...] = ("*",)) -> Coverage:
    return attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 8)[None], use_cache=False), patterns, split=split)


def captured(model: nn.Module, layers: tuple[Layer, ...], batch: SequenceBatch) -> dict[str, Record]:
    records: dict[str, Record] = {}
    capture(model, layers, lambda: true_label_loss(model, batch), batch.reached, lambda layer, record: records.update({layer.name: record}))
    return records


def autograd(model: nn.Module, layers: tuple[Layer, ...], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each whole layer [O, J]: as_parameters and as_vectors know nothing of blocks here."""
    names = list(as_parameters(model, layers, {layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in layers}))
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    return as_vectors(model, layers, dict(zip(names, found, strict=True)))


def of_block(layer: Layer, whole: Tensor) -> Tensor:
    """A block's part of its module's gradient [..., O, J], the bias being its last column."""
    if layer.columns is None:
        return whole[..., places(layer), :]
    return whole[..., -1:] if layer.bias else whole[..., places(layer)]


def single(batch: SequenceBatch, n: int) -> SequenceBatch:
    """The one sequence without its padding."""
    length = int(batch.counted[n].nonzero().max()) + 1
    return SequenceBatch(tokens=batch.tokens[n : n + 1, :length], counted=batch.counted[n : n + 1, :length], keys=batch.keys[n : n + 1])


def places(layer: Layer) -> list[int]:
    return list(numbers(layer.columns if layer.rows is None else layer.rows))


def influences(model: nn.Module, after: str, projections: list[str]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """For each head, that is four of the numbers that the module `after` is given: which outputs of the projections reach the head at the first
    position, and which at the last, each [T, O] of bool."""
    given: dict[str, Tensor] = {}

    def start(_: nn.Module, __: object, output: Tensor, name: str) -> Tensor:
        given[name] = output.detach().requires_grad_()
        return given[name]

    handles = [model.get_submodule(name).register_forward_hook(lambda *all, name=name: start(*all, name)) for name in projections]
    handles.append(model.get_submodule(after).register_forward_pre_hook(lambda _, arguments: given.update({after: arguments[0]})))
    model(input_ids=torch.arange(1, 8)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    weights, found = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for head in range(4):
        of = [given[after].reshape(7, 16)[position, 4 * head : 4 * head + 4] @ weights for position in (0, 6)]
        reached = [torch.autograd.grad(one, [given[name] for name in projections], retain_graph=True) for one in of]
        found.append({name: tuple(part[place].reshape(7, -1).abs() > 1e-9 for part in reached) for place, name in enumerate(projections)})
    return found


@pytest.mark.parametrize("family", list(MODELS))
def test_each_heads_output_depends_on_the_blocks_of_this_head_and_no_others(family: str) -> None:
    """At the first position a head gives its own value; at the last, keys and values of the first reach it, and no query but the last's."""
    model = model_of(family)
    coverage = covered(model, "heads")
    assert not coverage.whole
    blocks = [layer for layer in coverage.layers if layer.is_block and "gate_up" not in layer.name]
    (after,) = {layer.modules[0] for layer in blocks if layer.columns is not None}
    projections = sorted({layer.modules[0] for layer in blocks} - {after})
    for head, reached in enumerate(influences(model, after, projections)):
        assert places(next(layer for layer in blocks if layer.name == f"{after}.head{head}")) == list(range(4 * head, 4 * head + 4))
        by_part: dict[str, set[tuple[str, int]]] = {"q": set(), "k": set(), "v": set()}
        for name, (first, last) in reached.items():
            values = first[0]
            keys = last[0] & ~values
            queries = last[6] & ~keys & ~values
            for part, some in (("q", queries), ("k", keys), ("v", values)):
                by_part[part] |= {(name, number) for number in some.nonzero()[:, 0].tolist()}
        for part, expected in by_part.items():
            own = [layer for layer in blocks if layer.rows is not None and _part(layer) == part]
            found = [layer for layer in own if {(layer.modules[0], number) for number in places(layer)} == expected]
            assert len(found) == 1, (part, head)
            number = head if part == "q" else head * len(own) // 4
            assert found[0].name.endswith(f".head{number}")


def _part(layer: Layer) -> str:
    """q, k or v."""
    return layer.name.split(".")[-2].removesuffix("_proj")[-1:] if "_proj." in layer.name else layer.name.split(".")[-2]


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("split", ["projections", "heads"])
def test_gradients_of_blocks_are_parts_of_autograds_per_sequence_and_nothing_is_lost(family: str, split: Split) -> None:
    model, batch = model_of(family), padded_batch()
    whole, coverage = covered(model, "none"), covered(model, split)
    assert coverage.attributed == whole.attributed
    assert coverage.excluded == whole.excluded
    records = captured(model, coverage.layers, batch)
    for n in range(len(batch.tokens)):
        expected = autograd(model, whole.layers, true_label_loss(model, single(batch, n)))
        for layer in coverage.layers:
            own = expected[layer.modules[0]]
            # some norms compute in float32
            wanted = of_block(layer, own) if layer.is_block else own
            torch.testing.assert_close(sequence_gradients(records[layer.name])[n], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [7, 30, 64])  # tokens are rotated on both sides, on one, on none
@pytest.mark.parametrize(("family", "split"), [("gpt2", "projections"), ("gpt2", "heads"), ("gpt-neox", "heads"), ("phi3", "projections")])
def test_factors_of_blocks_are_those_of_their_own_gradients_densely(family: str, split: Split, length: int) -> None:
    """(G + λI)⁻¹ of every block, in NumPy: eigenvectors of its tokens' covariances, second moments of its gradients by autograd, one dense matrix.

    Norms of some models compute in float32, which the inverse of the smallest eigenvalues magnifies.
    """
    model = model_of(family)
    batch = padded_batch((length, length - 3, 2, length), length)
    patterns = ["*attn*", "*attention*", "*gate_up_proj"] if family != "gpt2" else ["*attn*"]
    patterns = [pattern for pattern in patterns if any(pattern.strip("*") in name for name, _ in model.named_modules())]
    factors, coverage = fit(model, [batch], layers=patterns, split=split)
    tokens: dict[str, tuple[Tensor, Tensor]] = {}

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        output.register_hook(lambda gradient: tokens.update({name: (arguments[0].detach(), gradient)}))  # type: ignore[no-untyped-call]

    split_modules = {layer.modules[0] for layer in coverage.layers if layer.is_block}
    handles = [model.get_submodule(name).register_forward_hook(lambda *all, name=name: note(*all, name)) for name in split_modules]
    drawn_label_loss(0)(model, batch).backward()
    for handle in handles:
        handle.remove()
    whole = attributable_layers(model, lambda m: m(input_ids=batch.tokens[:1]), patterns).layers
    per_sequence = [autograd(model, whole, drawn_label_loss(0)(model, single(batch, n))) for n in range(4)]
    generator = torch.Generator().manual_seed(1)
    blocks = [layer for layer in coverage.layers if layer.is_block]
    assert len(blocks) >= {"projections": 3, "heads": 16}[split]
    for layer in blocks[:: 1 if split == "projections" else 5] + blocks[-1:]:
        inputs, outputs = (side.reshape(-1, side.shape[-1])[batch.reached.flatten()] for side in tokens[layer.modules[0]])
        if layer.rows is None:
            inputs = inputs[:, places(layer)]
        else:
            outputs = outputs[:, places(layer)]
        if layer.bias:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        found = factors[layer.name]
        assert found.input_vectors is not None
        _is_basis_of(found.input_vectors, inputs.T @ inputs / len(inputs))
        _is_basis_of(found.output_vectors, outputs.T @ outputs / len(outputs))
        gradients = torch.stack([of_block(layer, some[layer.modules[0]]) for some in per_sequence])
        axes = np.kron(found.output_vectors.numpy(), found.input_vectors.numpy())
        moments = np.mean((gradients.flatten(1).numpy() @ axes) ** 2, axis=0)
        dense = axes @ np.diag(moments) @ axes.T + 0.1 * moments.mean() * np.eye(len(axes))
        vector = torch.randn(layer.shape, dtype=torch.float64, generator=generator)
        expected = torch.from_numpy(np.linalg.solve(dense, vector.flatten().numpy())).reshape(layer.shape)
        torch.testing.assert_close(found.precondition(vector), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _is_basis_of(vectors: Tensor, covariance: Tensor) -> None:
    """Orthogonal, and the covariance is diagonal in it: eigenvectors of eigenvalues that are equal, as those of zero, are not unique."""
    identity = torch.eye(len(covariance), dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-9)
    rotated = vectors.T @ covariance @ vectors
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-5 * float(rotated.abs().max()))


def test_a_split_has_one_covariance_of_the_side_that_blocks_share() -> None:
    coverage = covered(model_of("gpt2"), "heads")
    attention = [layer for layer in coverage.layers if ".attn." in layer.name]
    assert len(attention) == 3 * 4 + 4 + 1
    assert len({layer.input_name for layer in attention}) == 1 + 4 + 1
    assert len({layer.output_name for layer in attention}) == 12 + 1
    assert covered(model_of("llama"), "heads", ("*.q_proj.head3", "*.v_proj.head1")).layers[1].input_name == (
        "input:model.layers.0.self_attn.q_proj.head3"  # of the first that is chosen, whose module is fed the same
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox"])
def test_vectors_over_blocks_are_vectors_over_the_parameters(family: str) -> None:
    """The exact Gauss-Newton Hessian and derivatives know parameters only: blocks together are the whole layer, and some of them leave zeros."""
    model, batch = model_of(family), padded_batch((4, 3), 4)
    pattern = {"gpt2": "*.attn.*", "gpt-neox": "*.attention.*"}[family]
    whole, split = covered(model, "none", (pattern,)).layers, covered(model, "heads", (pattern,)).layers
    generator = torch.Generator().manual_seed(0)
    vectors = {layer.name: torch.randn((2, *layer.shape), dtype=torch.float64, generator=generator) for layer in whole}
    in_blocks = {layer.name: of_block(layer, vectors[layer.modules[0]]) for layer in split}
    for name, parameter in as_parameters(model, split, in_blocks).items():
        assert torch.equal(parameter, as_parameters(model, whole, vectors)[name])
    for name, vector in as_vectors(model, split, as_parameters(model, whole, vectors)).items():
        assert torch.equal(vector, in_blocks[name])
    expected = gauss_newton_product(model, whole, batch, vectors)
    found = gauss_newton_product(model, split, batch, in_blocks)
    for layer in split:
        torch.testing.assert_close(found[layer.name], of_block(layer, expected[layer.modules[0]]), rtol=1e-5, atol=1e-6)
    some = [layer for layer in split if layer.name.endswith("head2")]
    shares = token_loss_derivatives(model, some, batch, {layer.name: in_blocks[layer.name][0] for layer in some}).sum(1)
    records = captured(model, tuple(some), batch)
    by_layer = [torch.einsum("noj,oj->n", sequence_gradients(records[layer.name]), in_blocks[layer.name][0]) for layer in some]
    torch.testing.assert_close(shares, torch.stack(by_layer).sum(0), rtol=1e-5, atol=1e-6)


def test_blocks_are_chosen_by_their_names_or_their_modules() -> None:
    model = model_of("gpt2")
    names = [layer.name for layer in covered(model, "heads", ("*.head2",)).layers]
    assert names == [f"transformer.h.0.attn.{name}.head2" for name in ("c_attn.q", "c_attn.k", "c_attn.v", "c_proj")]
    coverage = covered(model, "projections", ("*.c_attn.q", "*.attn.c_proj"))
    assert [layer.name for layer in coverage.layers] == ["transformer.h.0.attn.c_attn.q", "transformer.h.0.attn.c_proj"]
    assert coverage.excluded["transformer.h.0.attn.c_attn.k"] == "not selected by the layer patterns"
    assert "transformer.h.0.attn.c_attn" not in coverage.excluded
    assert len(covered(model, "heads", ("*.c_attn",)).layers) == 12
    with pytest.raises(ValueError, match="no attributable layer matches"):
        covered(model, "heads", ("*.head4",))


def test_what_is_not_known_stays_whole_and_is_told() -> None:
    model = model_of("phi3")
    model.config.model_type = "of-my-own"
    coverage = covered(model, "projections")
    (name,) = coverage.whole
    assert name == "model.layers.0.self_attn.qkv_proj"
    assert coverage.whole[name] == "how a model of type of-my-own lays out its queries, keys and values is not known"
    assert {"gate", "up"} <= {layer.name.rpartition(".")[2] for layer in coverage.layers}
    assert name in {layer.name for layer in coverage.layers}
    model.config.head_dim = 3
    assert "not those of 4 heads of 3" in covered(model, "heads").whole["model.layers.0.self_attn.o_proj"]
    assert not covered(model, "none").whole


QUERY = ("Lisbon lies on the", " Tagus")


def test_a_run_by_heads_tells_scores_by_head(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "run.yaml", world.settings(tmp_path / "run", factors={"split_layers": "heads"}))
    assert influence("run", config, "--json").status == 0
    run, whole = Run(tmp_path / "run"), Run(finished)
    assert run.coverage.attributed == whole.coverage.attributed
    names = [layer.name for layer in run.coverage.layers]
    blocks = [f"transformer.h.{block}.attn.{name}" for block in range(2) for name in ("c_attn.q.head1", "c_proj.head1", "c_proj.bias")]
    assert set(blocks) < set(names)
    assert len(names) == len(whole.coverage.layers) + 2 * (3 * 2 - 1 + 2)
    count = len(run.training)
    answer = run.query(*QUERY, k=count, exact=True)
    first = answer.sequences[0]
    assert list(first.layers) == names
    assert sum(first.layers.values()) == pytest.approx(first.score, rel=1e-5)
    of_head = run.query(*QUERY, k=count, exact=True, layers=["*.h.1.attn.*.head1"])
    expected = {
        s.id: sum(share for name, share in s.layers.items() if ".h.1." in name and name.endswith("head1")) for s in answer.sequences
    }
    assert len(of_head.sequences[0].layers) == 4
    largest = max(map(abs, expected.values()))
    for sequence in of_head.sequences:
        assert sequence.score == pytest.approx(expected[sequence.id], rel=1e-4, abs=1e-6 * largest)
    assert of_head.coverage["excluded"]["transformer.h.1.attn.c_attn.q.head0"] == "not selected by the query"
    elsewhere = whole.query(*QUERY, k=count, exact=True).scores()
    ranks = [np.argsort(np.argsort([scores[name] for name in sorted(elsewhere)])) for scores in (elsewhere, answer.scores())]
    assert np.corrcoef(ranks)[0, 1] > 0.9
    refined = run.query(*QUERY, k=3, refine=RefineOptions(steps=2, sequences=4))
    assert all(np.isfinite(sequence.score) for sequence in refined.sequences)
    assert influence("status", tmp_path / "run", "--json").json["coverage"]["whole"] == {}
    assert influence("report", tmp_path / "run", "--about", "run", "--out", tmp_path / "page.html").status == 0


def test_a_run_is_of_one_split_and_those_made_before_are_of_none(
    influence: Influence, world: World, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert "split_layers" not in Run(finished).description["settings"]["factors"]  # as before there were splits
    before = everything(tmp_path / "run" / "factors")
    influence("run", write_yaml(tmp_path / "run.yaml", world.settings(tmp_path / "run")))
    assert everything(tmp_path / "run" / "factors") == before
    other = write_yaml(tmp_path / "other.yaml", world.settings(tmp_path / "run", factors={"split_layers": "projections"}))
    influence("run", other).says("split_layers")
    wrong = write_yaml(tmp_path / "wrong.yaml", world.settings(tmp_path / "run", factors={"split_layers": "halves"}))
    influence("run", wrong).says("factors.split_layers: Input should be 'none', 'projections' or 'heads'")
    flax = write_yaml(tmp_path / "flax.yaml", world.settings(tmp_path / "run", factors={"split_layers": "heads"}, model={"flax": "a.py:b"}))
    influence("run", flax).says("layers of a Flax model are not split")


@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
def test_a_plan_counts_blocks_as_the_run_makes_them(family: str, tmp_path: Path) -> None:
    model = model_of(family).float()
    model.config.save_pretrained(tmp_path)
    described = model_without_weights(ModelConfig(name=str(tmp_path)))
    coverage = find_layers(described, ["*"], "heads")
    assert coverage == find_layers(model, ["*"], "heads")
    sizes = covariance_sizes(coverage.layers)
    blocks = {name: size for name, size in sizes.items() if "att" in name}
    made = covariance_pass(model, coverage.layers, [padded_batch()], drawn_label_loss(0), reached_positions)
    assert {name: len(covariance.total) for name, covariance in made.items()} == sizes
    assert blocks
    use = model_memory(model, coverage.layers)
    (group,) = layer_groups(use, 2**30, 16, "cpu")
    square = sum(size**2 for size in sizes.values())
    assert factor_bytes(group) >= 8 * square + 20 * coverage.attributed
    whole = find_layers(model, ["*"])
    assert factor_bytes(group) < factor_bytes(whole.layers)
    groups = layer_groups(use, use.smallest(16) + 1, 16, "cpu")
    assert [layer for group in groups for layer in group] == list(coverage.layers)
    assert all(len(group) == 1 or factor_bytes(group) <= use.smallest(16) - use.model_bytes for group in groups)
