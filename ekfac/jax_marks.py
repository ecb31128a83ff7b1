"""Marks on a JAX model's layers: identities that tell which value goes into a layer and which comes out, and pass through every transformation.

A mark is `checkpoint_name` with a name of our own, so it is seen in the jaxpr of a traced model, also within scanned and rematerialised blocks, and
costs nothing in what is compiled. `ekfac.flax_linen` and `ekfac.flax_nnx` put marks around the layers of Flax models; a model that is a
plain function calls `dense`, `lookup`, `head` and `scale` in place of its own expressions, and `place` where an activation is to be asked about.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PREFIX = "ekfac:"

Use = Literal["linear", "lookup", "head", "scale", "place"]
"""Of a layer; a place is none, and has an output alone."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is marked: one side of one use of a layer's parameters."""

    layer: str
    use: Use
    side: Literal["in", "out"]  # of a scale, what it multiplies by its weight stands for the input
    weight: str  # the parameters' names
    bias: str | None

    @property
    def key(self) -> str:
        return f"{self.layer}:{self.use}"


def marked(value: Any, mark: Mark) -> Any:
    """`value` itself."""
    return checkpoint_name(value, PREFIX + json.dumps(asdict(mark)))


def read_mark(primitive: Any, parameters: dict[str, Any]) -> Mark | None:
    """The mark that an equation of a jaxpr is, if it is one."""
    name = parameters.get("name") if primitive.name == "name" else None
    return Mark(**json.loads(name.removeprefix(PREFIX))) if name is not None and name.startswith(PREFIX) else None


def around(inputs: Any, call: Callable[[Any], Any], *, layer: str, use: Use, weight: str, bias: str | None = None) -> Any:
    """call(inputs), with marks on what goes in and what comes out."""
    before = Mark(layer=layer, use=use, side="in", weight=weight, bias=bias)
    after = Mark(layer=layer, use=use, side="out", weight=weight, bias=bias)
    return marked(call(marked(inputs, before)), after)


def around_scale(
    inputs: Any, call: Callable[[Any], Any], normalized: Callable[[Any], Any], *, layer: str, weight: str, bias: str | None
) -> Any:
    """call(inputs), with marks on `normalized(inputs)`, which the call multiplies by its weight, and on what comes out."""
    marked(normalized(inputs), Mark(layer=layer, use="scale", side="in", weight=weight, bias=bias))
    return marked(call(inputs), Mark(layer=layer, use="scale", side="out", weight=weight, bias=bias))


def place(value: Any, *, layer: str) -> Any:
    """`value` itself, which can be asked about by this name: what a block gives, or a part of the model that is not a layer.

    Of a tuple its first, as of what the body of a scan gives; what is no array is left unmarked.
    """
    if type(value) is tuple and value:
        return (place(value[0], layer=layer), *value[1:])
    mark = Mark(layer=layer, use="place", side="out", weight="", bias=None)
    return marked(value, mark) if isinstance(value, jax.Array) else value


def dense(inputs: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, layer: str) -> jax.Array:
    """inputs @ weight + bias, for a weight [I, O]; the parameters' names are `layer`.kernel and `layer`.bias."""
    return around(
        inputs,
        lambda x: x @ weight if bias is None else x @ weight + bias,
        layer=layer,
        use="linear",
        weight=f"{layer}.kernel",
        bias=None if bias is None else f"{layer}.bias",
    )


def lookup(indices: jax.Array, table: jax.Array, *, layer: str) -> jax.Array:
    """table[indices], for a table [rows, I] of the name `layer`.embedding."""
    return around(indices, lambda i: jnp.take(table, i, axis=0), layer=layer, use="lookup", weight=f"{layer}.embedding")


def head(inputs: jax.Array, table: jax.Array, *, layer: str) -> jax.Array:
    """inputs @ tableᵀ, for the table of `lookup`: a head tied to the embedding."""
    return around(inputs, lambda x: x @ table.T, layer=layer, use="head", weight=f"{layer}.embedding")


def scale(normalized: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, layer: str) -> jax.Array:
    """normalized * weight + bias, elementwise in the last dimension; the parameters' names are `layer`.scale and `layer`.bias."""
    return around_scale(
        normalized,
        lambda x: x * weight if bias is None else x * weight + bias,
        lambda x: x,
        layer=layer,
        weight=f"{layer}.scale",
        bias=None if bias is None else f"{layer}.bias",
    )
