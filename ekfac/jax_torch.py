"""Values between torch and JAX, and functions of JAX that torch differentiates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor


def to_torch(value: jax.Array) -> Tensor:
    """The array as a tensor in the same memory, on the first of its devices."""
    if len(value.sharding.device_set) > 1:
        first = min(value.sharding.device_set, key=lambda device: device.id)
        value = value.addressable_data(0) if value.is_fully_replicated else jax.device_put(value, first)
    found: Tensor = torch.utils.dlpack.from_dlpack(jax.block_until_ready(value))
    return found


def all_to_torch(values: Mapping[str, jax.Array]) -> dict[str, Tensor]:
    return {name: to_torch(value) for name, value in values.items()}


def to_jax(values: Tensor) -> jax.Array:
    """The tensor as an array; whole numbers as int32."""
    values = values.detach()
    if values.dtype == torch.int64:
        values = values.int()
    if values.device.type == "cpu":
        return jnp.array(values.float().numpy(), dtype="bfloat16") if values.dtype == torch.bfloat16 else jnp.asarray(values.numpy())
    return jax.dlpack.from_dlpack(values.contiguous())


def padded_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    """With zeros after the values in every dimension."""
    if tuple(values.shape) == tuple(shape):
        return values
    padded = values.new_zeros(tuple(shape))
    padded[tuple(slice(size) for size in values.shape)] = values
    return padded


def in_torch(function: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    """A function from arrays of JAX to one array, as a function of tensors that torch differentiates: a loss or a measurement of one's own.

    Whole numbers (int64 ones as int32) and truth values pass through without a derivative. It is compiled once for each shape.
    """

    def with_pull(given: tuple[jax.Array, ...], places: tuple[int, ...]) -> Any:
        def of(*some: jax.Array) -> jax.Array:
            whole = list(given)
            for place, value in zip(places, some, strict=True):
                whole[place] = value
            return function(*whole)

        return jax.vjp(of, *(given[place] for place in places))

    forward, plain = jax.jit(with_pull, static_argnums=1), jax.jit(function)
    backward = jax.jit(lambda pull, gradient: pull(gradient))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, wide: bool, *values: Tensor) -> Tensor:
            context.wide, context.count = wide, len(values)
            context.places = tuple(place for place, needed in enumerate(context.needs_input_grad[1:]) if needed)
            with jax.enable_x64(wide):
                value, context.pull = forward(tuple(map(to_jax, values)), context.places)
                return to_torch(value)

        @staticmethod
        def backward(context: Any, *gradient: Tensor) -> Any:
            with jax.enable_x64(context.wide):
                found = dict(zip(context.places, map(to_torch, backward(context.pull, to_jax(gradient[0]))), strict=True))
            return None, *(found.get(place) for place in range(context.count))

    def call(*values: Tensor) -> Tensor:
        wide = any(value.dtype == torch.float64 for value in values)
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return Function.apply(wide, *values)  # type: ignore[no-any-return, no-untyped-call]
        with jax.enable_x64(wide):
            return to_torch(plain(*map(to_jax, values)))

    return call
