"""Twins: tiny transformers in Flax with the weights of models in torch, parameter by parameter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.experimental.compilation_cache import compilation_cache
from small_run import World, run_pipeline, small_world
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from influence.jax_model import save_flax_model

WIDTH, HEADS, POSITIONS, VOCABULARY = 12, 3, 20, 37


@dataclass(frozen=True)
class Sizes:
    width: int = WIDTH
    heads: int = HEADS
    positions: int = POSITIONS
    vocabulary: int = VOCABULARY
    num_layers: int = 2


def attention(x: Any, joined: Any, heads: int) -> Any:
    """Causal self-attention from the joined queries, keys and values."""
    sequences, length, width = x.shape
    queries, keys, values = (part.reshape(sequences, length, heads, width // heads) for part in jnp.split(joined, 3, -1))
    logits = jnp.einsum("nqhd,nkhd->nhqk", queries, keys) / jnp.sqrt(width // heads).astype(x.dtype)
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -1e30)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), values).reshape(x.shape)


class Attention(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(self.sizes.width, name="c_proj")(attention(x, nn.Dense(3 * self.sizes.width, name="c_attn")(x), self.sizes.heads))


class Mlp(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(self.sizes.width, name="c_proj")(nn.gelu(nn.Dense(4 * self.sizes.width, name="c_fc")(x)))


class Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = x + Attention(self.sizes, name="attn")(nn.LayerNorm(epsilon=1e-5, name="ln_1")(x))
        return x + Mlp(self.sizes, name="mlp")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x)), None


class Blocks(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(self.sizes.num_layers):
            x, _ = Block(self.sizes, name=str(number))(x)
        return x


class Transformer(nn.Module):
    """`layout`: the blocks one by one, or scanned and rematerialised."""

    sizes: Sizes
    layout: str

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(self.sizes.vocabulary, self.sizes.width, name="wte")
        x = table(tokens) + nn.Embed(self.sizes.positions, self.sizes.width, name="wpe")(jnp.arange(tokens.shape[1])[None])
        if self.layout == "scanned":
            block = nn.remat(Block, prevent_cse=False)
            x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.sizes.num_layers)(
                self.sizes, name="h"
            )(x, None)
        else:
            x = Blocks(self.sizes, name="h")(x)
        return table.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


class Twin(nn.Module):
    """GPT-2, with torch's names of modules."""

    sizes: Sizes = Sizes()
    layout: str = "plain"

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        return Transformer(self.sizes, self.layout, name="transformer")(tokens)


def sizes_of(settings: dict[str, Any]) -> Sizes:
    """From a GPT-2's config.json."""
    return Sizes(settings["n_embd"], settings["n_head"], settings["n_positions"], settings["vocab_size"], settings["n_layer"])


def linen_twin(settings: dict[str, Any]) -> Twin:
    """For the settings of a GPT-2 in its config.json."""
    return Twin(sizes_of(settings), settings.get("layout", "plain"))


class NnxAttention(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.heads = sizes.heads
        self.c_attn = nnx.Linear(sizes.width, 3 * sizes.width, rngs=rngs)
        self.c_proj = nnx.Linear(sizes.width, sizes.width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.c_proj(attention(x, self.c_attn(x), self.heads))


class NnxMlp(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.c_fc = nnx.Linear(sizes.width, 4 * sizes.width, rngs=rngs)
        self.c_proj = nnx.Linear(4 * sizes.width, sizes.width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.c_proj(nnx.gelu(self.c_fc(x)))


class NnxBlock(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(sizes.width, epsilon=1e-5, rngs=rngs)
        self.attn = NnxAttention(sizes, rngs)
        self.ln_2 = nnx.LayerNorm(sizes.width, epsilon=1e-5, rngs=rngs)
        self.mlp = NnxMlp(sizes, rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NnxTransformer(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        self.wpe = nnx.Embed(sizes.positions, sizes.width, rngs=rngs)
        self.h = nnx.List([NnxBlock(sizes, rngs) for _ in range(sizes.num_layers)])
        self.ln_f = nnx.LayerNorm(sizes.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1])[None])
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


class NnxTwin(nnx.Module):
    """As `Twin`, its blocks one by one."""

    def __init__(self, sizes: Sizes) -> None:
        self.transformer = NnxTransformer(sizes, nnx.Rngs(0))

    def __call__(self, tokens: Any) -> Any:
        return self.transformer(tokens)


def nnx_twin(settings: dict[str, Any]) -> NnxTwin:
    """As `linen_twin`."""
    return NnxTwin(sizes_of(settings))


def torch_twin(dtype: torch.dtype = torch.float64, sizes: Sizes = Sizes()) -> GPT2LMHeadModel:
    """Weights are large enough that no gradient is negligible."""
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.positions,
        n_embd=sizes.width,
        n_layer=sizes.num_layers,
        n_head=sizes.heads,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
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


CODE = f"{Path(__file__)}:linen_twin"


def twin_world(factory: pytest.TempPathFactory) -> World:
    """The session's model and data, the model in Flax; made on the first call."""
    world, directory = small_world(factory), factory.getbasetemp() / "flax-world"
    if not directory.exists():
        scratch = factory.mktemp("flax-world")
        model = GPT2LMHeadModel.from_pretrained(world.model)
        AutoTokenizer.from_pretrained(world.model).save_pretrained(scratch / "model")
        save_flax_model(scratch / "model", unflatten_dict(flax_parameters(model), sep="."), model.config.to_dict())
        scratch.rename(directory)
    return World(model=directory / "model", data=world.data)


def finished_twin(factory: pytest.TempPathFactory) -> Path:
    """The session's finished run of the twin; made on the first call."""
    directory, world = factory.getbasetemp() / "flax-finished", twin_world(factory)
    if not directory.exists():
        with quick_compilation(factory):
            run_pipeline(twin_settings(world, directory))
    return directory


def twin_settings(world: World, directory: Path, **changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run of the twin."""
    return world.settings(directory, model={"flax": CODE}, **changes)


def compilation_settings(factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Little optimization, and every compilation kept for the next model of the same shapes: compilation is most of the time."""
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextmanager
def quick_compilation(factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = compilation_settings(factory)
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextmanager
def wide() -> Iterator[None]:
    """JAX in float64, with little optimization: compilation is most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def stacked(parameters: dict[str, Any], num_layers: int = 2) -> dict[str, Any]:
    """The parameters of the blocks stacked on a leading axis, as a scan over them takes them."""
    first = "transformer.h.0."
    found = {name: value for name, value in parameters.items() if ".h." not in name}
    for name in parameters:
        if name.startswith(first):
            rest = name.removeprefix(first)
            found[f"transformer.h.{rest}"] = jnp.stack([parameters[f"transformer.h.{layer}.{rest}"] for layer in range(num_layers)])
    return found


class SmallNnx(nnx.Module):
    def __init__(self, width: int) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.embed.attend(x)


def nnx_small(settings: dict[str, Any]) -> Any:
    return SmallNnx(settings["width"]), lambda module, tokens: module(tokens)
