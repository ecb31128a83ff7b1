"""Flax nnx modules: marks around their layers, by wrappers of the classes' methods that stand while a copy of the module is traced.

Known are `Linear`, `LinearGeneral`, `Embed`, `LayerNorm` and `RMSNorm`, called with one argument, also within `nnx.scan` and `nnx.remat`. Copies
carry their paths as an attribute; the user's module is not touched, and modules without that attribute pass through the wrappers unchanged.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ekfac.jax_marks import around, around_scale, place
from ekfac.jax_model import JaxModel

_PATH = "ekfac_path"
_tracing = threading.RLock()


def nnx_model(module: nnx.Module, *, call: Callable[[Any, Any], Any] | None = None, **options: Any) -> JaxModel:
    """The module as a model whose layers can be attributed.

    Its parameters are the `nnx.Param`s by their path, such as `blocks.mlp.kernel`; other state keeps the values it has. The module is called with the
    inputs alone, or by `call(module, inputs)`. `options` are those of `JaxModel`.
    """
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    leaves, structure = jax.tree_util.tree_flatten_with_path(parameters)
    names = [parameter_name(path) for path, _ in leaves]

    def apply(values: Mapping[str, jax.Array], inputs: jax.Array) -> Any:
        copy = nnx.merge(graph, jax.tree_util.tree_unflatten(structure, [values[name] for name in names]), rest)
        blocks = []
        for path, inner in nnx.iter_graph(copy):
            if isinstance(inner, nnx.Module):
                setattr(inner, _PATH, ".".join(map(str, path)))
                if isinstance(inner, nnx.Embed) and inner.dtype == inner.param_dtype:
                    # Alone among the layers it keeps the type that its table had when it was made, also where the model was moved to another.
                    inner.dtype = inner.embedding.get_value().dtype
                blocks += [type(inner)] if "__call__" in vars(type(inner)) else []
        with _marking(blocks):
            return copy(inputs) if call is None else call(copy, inputs)

    return JaxModel(apply, {name: value for name, (_, value) in zip(names, leaves, strict=True)}, **options)


def parameter_name(path: Any) -> str:
    steps = [getattr(step, "key", getattr(step, "idx", getattr(step, "name", None))) for step in path]
    return ".".join(str(step) for step in (steps[:-1] if steps[-1] == "value" else steps))


@contextmanager
def _marking(blocks: Iterable[Any]) -> Iterator[None]:
    """The wrappers in place, also of `blocks`, classes whose modules are not layers but places; for one thread at a time."""
    wrappers: dict[tuple[Any, str], Any] = {
        (nnx.Linear, "__call__"): _linear,
        (nnx.LinearGeneral, "__call__"): _linear,
        (nnx.Embed, "__call__"): _lookup,
        (nnx.Embed, "attend"): _head,
        (nnx.LayerNorm, "__call__"): _scale,
        (nnx.RMSNorm, "__call__"): _scale,
    }
    wrappers = {(kind, "__call__"): None for kind in blocks} | wrappers
    with _tracing:
        originals = [(kind, method, getattr(kind, method)) for kind, method in wrappers]
        try:
            for (kind, method, original), marked in zip(originals, wrappers.values(), strict=True):
                setattr(kind, method, _place_wrapper(original) if marked is None else _wrapper(original, marked))
            yield
        finally:
            for kind, method, original in originals:
                setattr(kind, method, original)


def _wrapper(original: Any, marked: Any) -> Any:
    def call(module: Any, *arguments: Any, **named: Any) -> Any:
        path = getattr(module, _PATH, None)
        if path is None or len(arguments) != 1 or named or not isinstance(arguments[0], jax.Array):
            return original(module, *arguments, **named)
        return marked(module, path, arguments[0], original)

    return call


def _place_wrapper(original: Any) -> Any:
    def call(module: Any, *arguments: Any, **named: Any) -> Any:
        given, path = original(module, *arguments, **named), getattr(module, _PATH, None)
        return place(given, layer=path) if path else given

    return call


def _named(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _layer(module: Any, path: str) -> str:
    return path or type(module).__name__


def _has(module: Any, name: str) -> bool:
    """Whether a parameter is there: one that is left out is None, or a variable that holds None."""
    value = getattr(module, name, None)
    return value is not None and (not isinstance(value, nnx.Variable) or value.get_value() is not None)


def _linear(module: Any, path: str, inputs: Any, original: Any) -> Any:
    if isinstance(module, nnx.LinearGeneral):
        axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
        if module.batch_axis or [axis % inputs.ndim for axis in axes] != list(range(inputs.ndim - len(axes), inputs.ndim)):
            return original(module, inputs)
    bias = _named(path, "bias") if _has(module, "bias") else None
    return around(inputs, lambda x: original(module, x), layer=_layer(module, path), use="linear", weight=_named(path, "kernel"), bias=bias)


def _lookup(module: Any, path: str, inputs: Any, original: Any) -> Any:
    return around(inputs, lambda x: original(module, x), layer=_layer(module, path), use="lookup", weight=_named(path, "embedding"))


def _head(module: Any, path: str, inputs: Any, original: Any) -> Any:
    return around(inputs, lambda x: original(module, x), layer=_layer(module, path), use="head", weight=_named(path, "embedding"))


def _scale(module: Any, path: str, inputs: Any, original: Any) -> Any:
    if not _has(module, "scale"):
        return original(module, inputs)
    more: dict[str, Any] = {"use_bias": False} if isinstance(module, nnx.LayerNorm) else {}
    bare = type(module)(
        module.num_features,
        epsilon=module.epsilon,
        use_scale=False,
        reduction_axes=module.reduction_axes,
        feature_axes=module.feature_axes,
        use_fast_variance=module.use_fast_variance,
        rngs=nnx.Rngs(0),
        **more,
    )
    return around_scale(
        inputs,
        lambda x: original(module, x),
        lambda x: original(bare, x.astype(jnp.promote_types(x.dtype, jnp.float32))),
        layer=_layer(module, path),
        weight=_named(path, "scale"),
        bias=_named(path, "bias") if _has(module, "bias") else None,
    )
