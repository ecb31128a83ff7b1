"""Twins: tiny transformers in Flax with the weights of models in torch, parameter by parameter."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
from transformers import GPT2Config, GPT2LMHeadModel

WIDTH, HEADS, POSITIONS, VOCABULARY = 12, 3, 20, 37


def attention(x: Any, joined: Any) -> Any:
    """Causal self-attention from the joined queries, keys and values."""
    sequences, length, width = x.shape
    queries, keys, values = (part.reshape(sequences, length, HEADS, width // HEADS) for part in jnp.split(joined, 3, -1))
    logits = jnp.einsum("nqhd,nkhd->nhqk", queries, keys) / jnp.sqrt(width // HEADS).astype(x.dtype)
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -1e30)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), values).reshape(x.shape)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(WIDTH, name="c_proj")(attention(x, nn.Dense(3 * WIDTH, name="c_attn")(x)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(WIDTH, name="c_proj")(nn.gelu(nn.Dense(4 * WIDTH, name="c_fc")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = x + Attention(name="attn")(nn.LayerNorm(epsilon=1e-5, name="ln_1")(x))
        return x + Mlp(name="mlp")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x)), None


class Blocks(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(self.num_layers):
            x, _ = Block(name=str(number))(x)
        return x


class Transformer(nn.Module):
    """`layout`: the blocks one by one, or scanned and rematerialised."""

    num_layers: int
    layout: str

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(VOCABULARY, WIDTH, name="wte")
        x = table(tokens) + nn.Embed(POSITIONS, WIDTH, name="wpe")(jnp.arange(tokens.shape[1])[None])
        if self.layout == "scanned":
            block = nn.remat(Block, prevent_cse=False)
            x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_layers)(name="h")(x, None)
        else:
            x = Blocks(self.num_layers, name="h")(x)
        return table.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


class Twin(nn.Module):
    """GPT-2, with torch's names of modules."""

    num_layers: int = 2
    layout: str = "plain"

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        return Transformer(self.num_layers, self.layout, name="transformer")(tokens)


def torch_twin(dtype: torch.dtype = torch.float64, num_layers: int = 2, vocabulary: int = VOCABULARY, positions: int = POSITIONS) -> GPT2LMHeadModel:
    """Weights are large enough that no gradient is negligible."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=WIDTH, n_layer=num_layers, n_head=HEADS, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GPT2LMHeadModel(config).to(dtype)
        for parameter in made.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    return made.eval()


def flax_name(name: str) -> str:
    """Of a parameter of torch's GPT-2."""
    owner, _, kind = name.rpartition(".")
    last = owner.split(".")[-1]
    if kind == "weight":
        kind = "embedding" if last in ("wte", "wpe") else "scale" if last.startswith("ln") else "kernel"
    return f"{owner}.{kind}"


def flax_parameters(model: GPT2LMHeadModel) -> dict[str, Any]:
    """By name, as arrays of JAX; float64 ones need `jax.enable_x64`."""
    return {flax_name(name): jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}


def stacked(parameters: dict[str, Any], num_layers: int = 2) -> dict[str, Any]:
    """The parameters of the blocks stacked on a leading axis, as a scan over them takes them."""
    first = "transformer.h.0."
    found = {name: value for name, value in parameters.items() if ".h." not in name}
    for name in parameters:
        if name.startswith(first):
            rest = name.removeprefix(first)
            found[f"transformer.h.{rest}"] = jnp.stack([parameters[f"transformer.h.{layer}.{rest}"] for layer in range(num_layers)])
    return found
