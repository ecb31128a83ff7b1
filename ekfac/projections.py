"""Blocks of linear layers: the queries, keys and values of a fused projection, the gates of a fused MLP, and the heads of attention.

A block is some of the outputs of a linear map, or, of what stands after attention, some of its inputs. Which ones is known from the names of modules
and the model's configuration: how families of models lay out what they fuse. What is not known stays whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["none", "projections", "heads"]
"""Whether linear layers are whole, split into what is fused in them, or further into the heads of attention."""

Ranges = tuple[tuple[int, int], ...]
"""(first, last + 1) of outputs or inputs that belong together, in ascending order."""

QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
GATE_AND_UP = ("gate_up_proj",)
SEPARATE = {
    **dict.fromkeys(("q_proj", "query", "q_lin"), "queries"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "v_proj", "value", "v_lin"), "keys"),
}
AFTER = ("o_proj", "out_proj", "c_proj", "dense", "out_lin")

CONCATENATED = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "mpt", "phi3", "phi4_multimodal")
INTERLEAVED = ("gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode")
"""Model types in whose fused projection all queries stand before all keys and these before all values, and those in which each head of keys has its
queries, its keys and its values side by side. Checked against the dependence of each head's output on its inputs (`tests/test_split_layers.py`)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Part of a linear layer: what comes after the layer's name in its own, and which outputs or which inputs it has; None stands for all."""

    name: str
    rows: Ranges | None = None
    columns: Ranges | None = None


def blocks(name: str, inputs: int, outputs: int, bias: bool, config: Any, split: Split) -> tuple[Block, ...] | str | None:
    """The blocks of the linear layer `name` of a model with this configuration, the reason why they are not known, or None for a layer without.

    Every output and input is in one block. The bias of a layer that is split by its inputs belongs to none of them, and is a block of its own.
    """
    parent, leaf = name.rpartition(".")[0].rpartition(".")[2], name.rpartition(".")[2]
    if split == "none":
        return None
    if leaf in GATE_AND_UP:
        half = outputs // 2
        return (Block(name="gate", rows=((0, half),)), Block(name="up", rows=((half, outputs),))) if outputs == 2 * half else None
    fused = leaf in QKV
    if not fused and (split == "projections" or "att" not in name.lower()):
        return None
    after = leaf in AFTER and "att" in parent.lower()
    if not (fused or after or leaf in SEPARATE):
        return "in attention, but whether its heads stand in its outputs or inputs is not known"
    heads = getattr(config, "num_attention_heads", None)
    size = _head_size(config, heads)
    if not heads or not size:
        return "the model's configuration does not tell its heads"
    if after:
        return _after_attention(inputs, outputs, bias, heads, size)
    if not fused:
        count = heads if SEPARATE[leaf] == "queries" else outputs // size
        if outputs != count * size or count not in (heads, *_key_heads(config, heads)):
            return f"{outputs:,} outputs are not those of {heads} heads of {size}"
        return tuple(Block(name=f"head{head}", rows=((head * size, (head + 1) * size),)) for head in range(count))
    return _fused(outputs, heads, size, config, split)


def _head_size(config: Any, heads: int | None) -> int | None:
    width = getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (width // heads if width and heads else None)


def _key_heads(config: Any, heads: int) -> set[int]:
    """How many heads keys may have."""
    told = {getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")} - {None}
    return {*told, *({1} if getattr(config, "multi_query", False) else ())} or {heads}


def _fused(outputs: int, heads: int, size: int, config: Any, split: Split) -> tuple[Block, ...] | str:
    kind = getattr(config, "model_type", None)
    keys, rest = divmod(outputs - heads * size, 2 * size)
    if rest or keys not in {heads, *_key_heads(config, heads)} or heads % keys:
        return f"{outputs:,} outputs are not the queries, keys and values of {heads} heads of {size}"
    firsts: dict[str, Sequence[int]]
    if kind in CONCATENATED:
        firsts = {"q": range(0, heads), "k": range(heads, heads + keys), "v": range(heads + keys, heads + 2 * keys)}
    elif kind in INTERLEAVED:
        group = heads // keys + 2
        starts = range(0, keys * group, group)
        firsts = {
            "q": [start + one for start in starts for one in range(group - 2)],
            "k": [start + group - 2 for start in starts],
            "v": [start + group - 1 for start in starts],
        }
    else:
        return f"how a model of type {kind} lays out its queries, keys and values is not known"
    if split == "projections":
        return tuple(Block(name=part, rows=_ranges(places, size)) for part, places in firsts.items())
    return tuple(
        Block(name=f"{part}.head{head}", rows=_ranges([place], size))
        for part, places in firsts.items()
        for head, place in enumerate(places)
    )


def _ranges(places: Sequence[int], size: int) -> Ranges:
    """The ranges of the heads at these places, joined where one follows the other."""
    found: list[tuple[int, int]] = []
    for place in places:
        first, end = place * size, (place + 1) * size
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, end))
    return tuple(found)


def _after_attention(inputs: int, outputs: int, bias: bool, heads: int, size: int) -> tuple[Block, ...] | str:
    if inputs != heads * size:
        return f"{inputs:,} inputs are not those of {heads} heads of {size}"
    found = [Block(name=f"head{head}", columns=((head * size, (head + 1) * size),)) for head in range(heads)]
    return (*found, Block(name="bias", columns=())) if bias else tuple(found)


def size_of(ranges: Ranges) -> int:
    """How many outputs or inputs these are."""
    return sum(end - first for first, end in ranges)


def numbers(ranges: Ranges) -> Iterator[int]:
    """Each of them."""
    return (number for first, end in ranges for number in range(first, end))
