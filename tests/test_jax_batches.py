"""Batches of a JAX model: few compilations for sequences of many lengths, and memory within the budget."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_twins import Sizes, Twin

from ekfac import attributable_layers, covariance_pass, drawn_label_loss, reached_positions
from ekfac.flax_linen import linen_model
from ekfac.jax_marks import dense, head, lookup
from ekfac.jax_model import JaxModel
from ekfac.jax_shapes import padded_positions, padded_sequences
from influence.batches import batch_budget, in_batches, model_memory
from influence.model import find_layers
from influence.sequences import TrainingSequence

CPU = torch.device("cpu")
VOCABULARY, LONGEST = 29, 64


def small_model() -> JaxModel:
    def apply(parameters: Any, tokens: Any) -> Any:
        x = lookup(tokens, parameters["embed.embedding"], layer="embed")
        return head(dense(x, parameters["inner.kernel"], layer="inner"), parameters["embed.embedding"], layer="embed")

    table, weight = (jax.random.normal(jax.random.key(rows), (rows, 3)) for rows in (VOCABULARY, 3))
    return JaxModel(apply, {"embed.embedding": table, "inner.kernel": weight}, longest=LONGEST)


def sequences(count: int, seed: int) -> list[TrainingSequence]:
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        tokens = rng.integers(0, VOCABULARY, rng.integers(2, LONGEST + 1)).astype(np.int32)
        name, counted = f"{seed}/{number}", np.arange(len(tokens)) > 0
        found.append(TrainingSequence(id=name, document=name, tokens=tokens, counted=counted, text="", metadata={}))
    return found


def test_a_pass_over_sequences_of_many_lengths_compiles_a_few_shapes() -> None:
    """Of positions there are eight up to 64; of sequences one for each of these, but in the last batch of a shard."""
    model = small_model()
    layers = find_layers(model, ["*"]).layers
    budget = replace(batch_budget(model_memory(model, layers), 2**30, LONGEST, "cpu"), max_tokens=256)
    num_batches, shards = 0, 4
    for shard in range(shards):
        batches = [batch for _, batch in in_batches(sequences(200, shard), budget, CPU)]
        covariance_pass(model, layers, batches, drawn_label_loss(0), reached_positions)
        num_batches += len(batches)
        if shard == 0:
            once = model.compiled.forward._cache_size()
    compiled = model.compiled.forward._cache_size()
    assert num_batches > 100
    assert compiled == model.compiled.backward._cache_size() <= 8 + shards
    assert compiled - once < shards  # other sequences, the same shapes but for the last batches


def test_which_layers_a_pass_works_on_makes_no_difference_to_what_is_compiled() -> None:
    model = small_model()
    layers = find_layers(model, ["*"]).layers
    budget = batch_budget(model_memory(model, layers), 2**30, LONGEST, "cpu")
    batches = [batch for _, batch in in_batches(sequences(4, 0), budget, CPU)]
    for some in (layers, layers[:1], layers[1:]):
        covariance_pass(model, some, batches, drawn_label_loss(0), reached_positions)
    assert model.compiled.forward._cache_size() == 1


@pytest.mark.parametrize("layout", ["scanned", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_batch_stays_within_the_memory_that_the_budget_counts(layout: str) -> None:
    """By XLA's own account of both compiled passes, with the padding; the logits and their gradient in torch come on top."""
    sizes = Sizes(width=64, heads=4, positions=64, vocabulary=500)
    module, some = Twin(sizes, layout), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), some))
    model = linen_model(
        module, jax.tree.map(lambda one: jnp.zeros(one.shape), shapes), longest=sizes.positions, vocab_size=sizes.vocabulary
    )
    layers = attributable_layers(model, lambda one: one(input_ids=torch.arange(1, 7)[None])).layers
    num_sequences, num_positions = 9, 33
    padded = padded_sequences(num_sequences), padded_positions(num_positions)
    assert padded == (12, 40)
    budget = batch_budget(model_memory(model, layers), 2**30, sizes.positions, "cpu")
    counted = budget.bytes_of(padded[0] * padded[1], padded[0])
    assert replace(budget, memory_bytes=counted).fits(num_sequences, num_positions)
    assert not replace(budget, memory_bytes=counted - 1).fits(num_sequences, num_positions)

    keys = tuple(sorted({key for layer in layers for key in model._site(layer).uses}))
    forward = model.compiled.forward.lower(model.values, jnp.zeros(padded, jnp.int32), keys, None).compile().memory_analysis()
    given, pull, _ = jax.eval_shape(lambda *some: model.compiled.forward(*some, keys, None), model.values, jnp.zeros(padded, jnp.int32))
    backward = model.compiled.backward.lower(pull, given).compile().memory_analysis()
    kept, torchs = forward.output_size_in_bytes, 3 * 4 * padded[0] * padded[1] * sizes.vocabulary
    peak = max(kept + forward.temp_size_in_bytes, kept + backward.output_size_in_bytes + backward.temp_size_in_bytes)
    assert counted / 4 < peak + torchs < counted
