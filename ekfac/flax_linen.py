"""Flax linen modules: marks around their layers, put there while the module is traced, and never on the module itself.

Known are `Dense`, `DenseGeneral` and `Embed` with their subclasses, and any module that owns one or two vectors, `scale` and `bias`, and does to its
input what a normalisation does; scanned, rematerialised and jitted modules too.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ekfac.jax_marks import around, around_scale, place
from ekfac.jax_model import JaxModel

_BARE = "without its parameters"


def linen_model(module: nn.Module, variables: Mapping[str, Any], *, call: Callable[..., Any] | None = None, **options: Any) -> JaxModel:
    """The module with these variables (as `module.init` gives them) as a model whose layers can be attributed.

    Parameters are named by their path, such as `h_0.mlp.kernel`. The module is called with the inputs alone, or by `call(apply, inputs)`, where
    `apply` is `module.apply` with its variables and further arguments may be given. `options` are those of `JaxModel`.
    """
    if "params" not in variables:
        raise ValueError(f"expected the variables of a linen module, with 'params'; got {', '.join(variables) or 'none'}")
    rest = {name: values for name, values in variables.items() if name != "params"}

    def apply(parameters: Mapping[str, jax.Array], inputs: jax.Array) -> Any:
        whole = {"params": unflatten_dict(dict(parameters), sep="."), **rest}
        with nn.intercept_methods(_with_marks):
            if call is None:
                return module.apply(whole, inputs)
            return call(lambda *arguments, **named: module.apply(whole, *arguments, **named), inputs)

    return JaxModel(apply, flatten_dict(dict(variables["params"]), sep="."), **options)


def _with_marks(call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any], context: Any) -> Any:
    module, method = context.module, context.method_name
    if module.name == _BARE or method not in ("__call__", "attend"):
        return call(*arguments, **named)
    if len(arguments) != 1 or named or not isinstance(arguments[0], jax.Array):
        return _placed(module, call(*arguments, **named))
    path = ".".join(module.path) or type(module).__name__
    prefix = ".".join([*module.path, ""]) if module.path else ""
    if isinstance(module, nn.Embed):
        use: Any = "lookup" if method == "__call__" else "head"
        return around(arguments[0], call, layer=path, use=use, weight=f"{prefix}embedding")
    if method != "__call__":
        return call(*arguments)
    if isinstance(module, nn.Dense) or (isinstance(module, nn.DenseGeneral) and _over_the_last(module, arguments[0].ndim)):
        bias = f"{prefix}bias" if module.use_bias else None
        return around(arguments[0], call, layer=path, use="linear", weight=f"{prefix}kernel", bias=bias)
    vectors = _vectors(module, arguments[0])
    if vectors is None:
        return _placed(module, call(*arguments))
    weight = next(name for name in vectors if name != "bias")
    bare = module.clone(parent=None, name=_BARE)

    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) and not _is_elementwise(bare, vectors, weight, arguments[0]):
        return _placed(module, call(*arguments))

    def normalized(inputs: jax.Array) -> jax.Array:
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        one, zero = ({name: jnp.full_like(value, number, wide) for name, value in vectors.items()} for number in (1.0, 0.0))
        zeros = {"bias": jnp.zeros_like(vectors["bias"], wide)} if "bias" in vectors else {}
        return bare.apply({"params": one | zeros}, inputs.astype(wide)) - bare.apply({"params": zero}, inputs.astype(wide))

    return around_scale(
        arguments[0],
        call,
        normalized,
        layer=path,
        weight=f"{prefix}{weight}",
        bias=f"{prefix}bias" if "bias" in vectors else None,
    )


def _placed(module: nn.Module, given: Any) -> Any:
    """What a module gives, marked as a place by the module's path."""
    return place(given, layer=".".join(module.path)) if module.path else given


def _is_elementwise(bare: nn.Module, vectors: Mapping[str, Any], weight: str, inputs: jax.Array) -> bool:
    """Whether the module's output is a value without the weight plus one times it, plus the bias, tried on made-up values."""
    size = inputs.shape[-1]
    with jax.ensure_compile_time_eval():
        values = jnp.sin(jnp.arange(1.0, 1 + prod(inputs.shape))).reshape(inputs.shape)
        trial = jnp.linspace(0.5, 1.5, size)

        def given(scale: Any, bias: Any) -> Any:
            return bare.apply({"params": {weight: scale} | ({"bias": bias} if "bias" in vectors else {})}, values)

        zeros, ones = jnp.zeros(size), jnp.ones(size)
        nothing = given(zeros, zeros)
        if getattr(nothing, "shape", None) != inputs.shape:
            return False
        expected = nothing + (given(ones, zeros) - nothing) * trial + (trial if "bias" in vectors else 0)
        return bool(jnp.allclose(given(trial, trial), expected, rtol=1e-3, atol=1e-5))


def _over_the_last(module: nn.DenseGeneral, num_dimensions: int) -> bool:
    """Whether a general dense layer contracts the last dimensions of its input, in their order, and has no batch dimensions."""
    axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
    return not module.batch_dims and [axis % num_dimensions for axis in axes] == list(range(num_dimensions - len(axes), num_dimensions))


def _vectors(module: nn.Module, inputs: jax.Array) -> dict[str, Any] | None:
    """The weight and bias of an elementwise scale, by name; None for another module."""
    own = dict(module.variables.get("params", {})) if module.scope is not None else {}
    weights = [name for name in own if name != "bias"]
    sizes = {getattr(value, "shape", None) for value in own.values()}
    if len(weights) != 1 or weights[0] not in ("scale", "weight", "kernel") or sizes != {inputs.shape[-1:]}:
        return None
    return own
