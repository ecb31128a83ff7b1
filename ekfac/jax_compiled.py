"""What is compiled of a marked JAX model: functions from parameters and inputs, each sequence by itself (`jax.vmap`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ekfac.jax_tape import OUTPUT, places, run

Parameters = Mapping[str, jax.Array]
Apply = Callable[[Parameters, jax.Array], jax.Array]
"""(parameters by name, inputs [N, T, …]) → outputs [N, T, V], each sequence's its own; or [N, …] → [N, V], where there are no positions."""

Output = tuple[str, tuple[int, ...]]
"""The key of a mark, and the steps of the scans around it."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Each is compiled once for each shape of its inputs."""

    logits: Any  # (parameters, inputs) → logits
    forward: Any  # (parameters, inputs, keys, output) → `_taped`
    moved: Any  # (parameters, inputs, weights) → `_by_weights`
    backward: Any  # (what pulls gradients back, gradients) → the gradients there
    product: Any  # (parameters, inputs, weights of the tokens, vectors) → `_gauss_newton`
    derivative: Any  # (parameters, inputs, vector) → `_directional`


def compiled(apply: Apply) -> Compiled:
    return Compiled(
        logits=jax.jit(lambda parameters, inputs: _logits(apply, parameters, inputs)),
        forward=jax.jit(lambda parameters, inputs, keys, output: _taped(apply, parameters, inputs, keys, output), static_argnums=(2, 3)),
        moved=jax.jit(lambda parameters, inputs, weights: _by_weights(apply, parameters, inputs, weights)),
        backward=jax.jit(lambda pull, gradient: pull(gradient)[0]),
        product=jax.jit(lambda parameters, inputs, predicting, tangents: _gauss_newton(apply, parameters, inputs, predicting, tangents)),
        derivative=jax.jit(lambda parameters, inputs, tangents: _directional(apply, parameters, inputs, tangents)),
    )


def _logits(apply: Apply, parameters: Parameters, inputs: jax.Array) -> jax.Array:
    return jax.vmap(lambda sequence: apply(parameters, sequence[None])[0])(inputs)


def _taped(apply: Apply, parameters: Parameters, inputs: jax.Array, keys: tuple[str, ...], output: Output | None) -> Any:
    """The logits and the output that is asked for, what pulls their gradients back to the layers' outputs, and what went into the layers."""
    traced = jax.make_jaxpr(apply)(parameters, inputs[:1])
    tapped = {place.mark.key: place for place in places(traced.jaxpr) if place.mark.side == "out" and place.mark.key in keys}
    axes = {key: len(place.lengths) for key, place in tapped.items()}
    zeros = {key: jnp.zeros((*place.lengths, len(inputs), *place.shape), place.dtype) for key, place in tapped.items()}

    def one(taps: Any, sequence: jax.Array) -> Any:
        arguments = [*jax.tree.leaves(parameters), sequence[None]]
        (logits,), seen = run(traced.jaxpr, traced.consts, arguments, taps, output and output[0])
        if output is None:
            return (logits[0],), seen
        asked = seen.pop(OUTPUT)[output[1]]
        return (logits[0], asked.reshape(len(sequence), asked.shape[-1])), seen

    batched = jax.vmap(one, in_axes=(axes, 0), out_axes=(0, axes))
    return jax.vjp(lambda taps: batched(taps, inputs), zeros, has_aux=True)


def _by_weights(apply: Apply, parameters: Parameters, inputs: jax.Array, weights: Parameters) -> Any:
    """The logits, and what pulls their gradient back to the weights."""
    return jax.vjp(_of_weights(apply, parameters, inputs), weights)


def _of_weights(apply: Apply, parameters: Parameters, inputs: jax.Array) -> Callable[[Parameters], jax.Array]:
    def logits(weights: Parameters) -> jax.Array:
        found = _logits(apply, {**parameters, **weights}, inputs)
        return found.astype(jnp.promote_types(found.dtype, jnp.float32))

    return logits


def _some(parameters: Parameters, names: Sequence[str]) -> dict[str, jax.Array]:
    return {name: parameters[name] for name in names}


def _gauss_newton(apply: Apply, parameters: Parameters, inputs: jax.Array, predicting: jax.Array, tangents: Parameters) -> Any:
    """Products with the Gauss-Newton matrix, `predicting` [N, T] being the weights of the tokens' losses."""
    weights = _some(parameters, list(tangents))
    values, change = jax.linearize(_of_weights(apply, parameters, inputs), weights)
    pull = jax.linear_transpose(change, weights)
    probabilities, weight = jax.nn.softmax(values), predicting[:, :, None]

    def product(tangent: Parameters) -> Any:
        changed = change(tangent)
        return pull(weight * probabilities * (changed - (probabilities * changed).sum(-1, keepdims=True)))[0]

    return jax.vmap(product)(tangents)


def _directional(apply: Apply, parameters: Parameters, inputs: jax.Array, tangents: Parameters) -> Any:
    """The logits, and their derivative along the tangents."""
    weights = _some(parameters, list(tangents))
    return jax.jvp(_of_weights(apply, parameters, inputs), (weights,), (_some(tangents, list(weights)),))
