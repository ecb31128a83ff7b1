"""A JAX model as one that can be attributed: its layers, their records and its exact curvature, compiled once for each of a few shapes.

`JaxModel` takes a function from parameters and token ids to logits whose layers are marked (`ekfac.jax_marks`). Losses are computed in torch from the
logits, as for any model, and so mean the same; what JAX computed goes to torch without a copy where both have it in one memory.

A batch is padded to one of a few shapes, so that there are few compilations. Each sequence is computed by itself (`jax.vmap`); where there are
several devices, each computes some of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor, nn

from ekfac.backend import Backend
from ekfac.jax_layers import Site, coverage
from ekfac.jax_tape import Place, places, run
from ekfac.layers import Coverage, Layer
from ekfac.record import EmbeddingIO, LayerIO, LookupIO, Record, ScaleIO

Parameters = Mapping[str, jax.Array]
Apply = Callable[[Parameters, jax.Array], jax.Array]
"""(parameters by name, inputs [N, T, …]) → outputs [N, T, V], each sequence's its own."""


@dataclass(kw_only=True)
class _Tape:
    """One forward pass, of which the backward pass is still to come."""

    places: Mapping[str, Place]  # those that are tapped
    logits: Tensor | None = None
    shape: tuple[int, ...] = ()  # of the logits, padded
    pull: Any = None
    seen: Mapping[str, jax.Array] | None = None


class JaxModel(Backend):
    """A function of parameters and inputs as a model whose layers can be attributed.

    `apply(parameters, inputs)` gives logits [N, T, V] for token ids [N, T] (or for any inputs [N, T, …]); its layers are marked, and parameters go by
    the names that the marks use. `longest` is how many positions the model knows, where it does not know any number of them. Parameters that lie on
    several devices stay as they are, with `batches` telling how inputs are laid over the devices; otherwise they are copied to every device there is,
    and the sequences of a batch are dealt out.
    """

    def __init__(
        self, apply: Apply, parameters: Parameters, *, longest: int | None = None, batches: NamedSharding | None = None, **config: Any
    ) -> None:
        super().__init__()
        self.wide = any(value.dtype == jnp.float64 for value in parameters.values())
        self.apply_function = apply
        self.longest = longest
        self.config = SimpleNamespace(max_position_embeddings=longest, **config)
        with self._precision():
            self.values, self.batches = _laid_out(parameters, batches)
        self.device = _register(self, self.values)
        self._tape: _Tape | None = None
        self._example: tuple[tuple[int, ...], Any] | None = None
        self._found: tuple[list[Place], int] | None = None
        self._sites: dict[str, Site] = {}
        self._logits = jax.jit(jax.vmap(self._alone, in_axes=(None, 0)))
        self._forward = jax.jit(self._taped, static_argnames="keys")
        self._backward = jax.jit(lambda pull, gradient: pull(gradient)[0])
        self._product = jax.jit(self._gauss_newton)
        self._derivative = jax.jit(self._directional)

    # what is compiled

    def _alone(self, parameters: Parameters, inputs: jax.Array) -> jax.Array:
        return self.apply_function(parameters, inputs[None])[0]

    def _taped(self, parameters: Parameters, inputs: jax.Array, keys: tuple[str, ...]) -> Any:
        """The logits, what pulls their gradient back to the layers' outputs, and what went into the layers."""
        traced = jax.make_jaxpr(self.apply_function)(parameters, inputs[:1])
        tapped = {place.mark.key: place for place in places(traced.jaxpr) if place.mark.side == "out" and place.mark.key in keys}
        axes = {key: len(place.lengths) for key, place in tapped.items()}
        zeros = {key: jnp.zeros((*place.lengths, len(inputs), *place.shape), place.dtype) for key, place in tapped.items()}

        def one(taps: Any, sequence: jax.Array) -> Any:
            (logits,), seen = run(traced.jaxpr, traced.consts, [*jax.tree.leaves(parameters), sequence[None]], taps)
            return logits[0], seen

        batched = jax.vmap(one, in_axes=(axes, 0), out_axes=(0, axes))
        return jax.vjp(lambda taps: batched(taps, inputs), zeros, has_aux=True)

    def _of_weights(self, parameters: Parameters, inputs: jax.Array, names: Sequence[str]) -> tuple[Any, dict[str, jax.Array]]:
        def logits(weights: Parameters) -> jax.Array:
            found = jax.vmap(self._alone, in_axes=(None, 0))({**parameters, **weights}, inputs)
            return found.astype(jnp.promote_types(found.dtype, jnp.float32))

        return logits, {name: parameters[name] for name in names}

    def _gauss_newton(self, parameters: Parameters, inputs: jax.Array, predicting: jax.Array, tangents: Parameters) -> Any:
        logits, weights = self._of_weights(parameters, inputs, list(tangents))
        values, change = jax.linearize(logits, weights)
        pull = jax.linear_transpose(change, weights)
        probabilities = jax.nn.softmax(values) * predicting[:, :, None]

        def product(tangent: Parameters) -> Any:
            changed = change(tangent)
            return pull(probabilities * (changed - (probabilities * changed).sum(-1, keepdims=True)))[0]

        return jax.vmap(product)(tangents)

    def _directional(self, parameters: Parameters, inputs: jax.Array, tangents: Parameters) -> Any:
        logits, weights = self._of_weights(parameters, inputs, list(tangents))
        return jax.jvp(logits, (weights,), ({name: tangents[name] for name in weights},))

    # as a model

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """An object with `logits` [N, T, V]."""
        self._example = self._example or (tuple(input_ids.shape[1:]), input_ids.dtype)
        inputs = self._padded(input_ids)
        with self._precision():
            if self._tape is None:
                return SimpleNamespace(logits=_cut(_to_torch(self._logits(self.values, inputs)), input_ids))
            if self._tape.logits is not None:
                raise ValueError("the loss calls the model twice: it must call it once")
            tape = self._tape
            logits, tape.pull, tape.seen = self._forward(self.values, inputs, keys=tuple(sorted(tape.places)))
            tape.shape = logits.shape
            tape.logits = _cut(_to_torch(logits), input_ids).requires_grad_()
            return SimpleNamespace(logits=tape.logits)

    def get_input_embeddings(self) -> Any:
        """The table that is looked up first."""
        if self._found is None:
            self._trace((min(8, self.longest or 8),), torch.int64)
        lookups = [place.mark for place in self._found[0] if place.mark.use == "lookup"] if self._found else []
        if not lookups or lookups[0].weight not in self.values:
            raise ValueError("the model looks up no embedding: is it a language model, and are its layers known?")
        return SimpleNamespace(weight=self.get_parameter(lookups[0].weight))

    def attributable(self, run: Callable[[nn.Module], Any], patterns: Sequence[str]) -> Coverage:
        if self._example is None:
            with torch.no_grad():
                run(self)
        assert self._example is not None
        self._trace(*self._example)
        return self._judged(patterns)

    def _trace(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        with self._precision():
            inputs = _to_jax(torch.zeros((1, *shape), dtype=dtype))
            traced, given = jax.make_jaxpr(self.apply_function, return_shape=True)(self.values, inputs)
        if given.shape[:2] != (1, shape[0]) or len(given.shape) != 3:
            raise ValueError(f"the model gave the shape {given.shape} for inputs of {(1, *shape)}: expected logits [N, T, V]")
        self._found = list(places(traced.jaxpr)), given.shape[2]
        self._example = shape, dtype
        self._judged(("*",))

    def _judged(self, patterns: Sequence[str]) -> Coverage:
        assert self._found is not None
        assert self._example is not None
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        covered, self._sites = coverage(self._found[0], shapes, self._example[0][0], self._found[1], patterns)
        return covered

    def _site(self, layer: Layer) -> Site:
        if not self._sites:
            self._trace((min(8, self.longest or 8),), torch.int64)
        if layer.name not in self._sites:
            raise ValueError(f"the model has no layer {layer.name!r}")
        return self._sites[layer.name]

    def capture(self, layers: Sequence[Layer], loss: Callable[[], Tensor], mask: Tensor, consume: Callable[[Layer, Record], None]) -> float:
        sites = {layer.name: self._site(layer) for layer in layers}
        assert self._found is not None
        # Scales always: they cost little, and the passes with and without them are one compilation.
        tapping = [*sites.values(), *(site for site in self._sites.values() if site.layer.kind == "scale")]
        keys = {key for site in tapping for key in site.uses}
        tapped = {place.mark.key: place for place in self._found[0] if place.mark.side == "out" and place.mark.key in keys}
        tape = self._tape = _Tape(places=tapped)
        try:
            with torch.enable_grad():
                value = loss()
        finally:
            self._tape = None
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()}: the model's weights or its inputs give values that are not finite")
        if tape.logits is None or tape.seen is None:
            raise ValueError("the loss does not call the model")
        (gradient,) = torch.autograd.grad(value, tape.logits, allow_unused=True)
        with self._precision(), torch.no_grad():
            gradient = torch.zeros_like(tape.logits) if gradient is None else gradient
            gradients = self._backward(tape.pull, self._placed(_padded_to(gradient, tape.shape)))
            tape.pull = None
            inputs, outputs = _all_to_torch(tape.seen), _all_to_torch(gradients)
            for layer in reversed(layers):
                consume(layer, _record(layer, sites[layer.name], tapped, inputs, outputs, mask))
        return float(value.detach())

    def gauss_newton(self, layers: Sequence[Layer], tokens: Tensor, weights: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        num_queries = len(next(iter(vectors.values())))
        tangents = self.as_parameters(layers, vectors)
        room = _step_up(num_queries)
        with self._precision():
            inputs = self._padded(tokens)
            predicting = torch.zeros(inputs.shape[:2], dtype=torch.float32)
            predicting[: len(tokens), : tokens.shape[1] - 1] = weights[:, 1:].cpu()
            given = {name: self._everywhere(_padded_to(value, (room, *value.shape[1:]))) for name, value in tangents.items()}
            found = self._differentiated(self._product, self.values, inputs, self._placed(predicting), given)
            products = {name: value[:num_queries] for name, value in _all_to_torch(found).items()}
        return self.as_vectors(layers, products)

    def directional(self, layers: Sequence[Layer], tokens: Tensor, vector: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        tangents = self.as_parameters(layers, vector)
        with self._precision():
            given = {name: self._everywhere(value) for name, value in tangents.items()}
            logits, change = self._differentiated(self._derivative, self.values, self._padded(tokens), given)
            return _cut(_to_torch(logits), tokens), _cut(_to_torch(change), tokens)

    @staticmethod
    def _differentiated(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ValueError(
                "the model cannot be differentiated forward, because it holds a function with a derivative of its own (custom_vjp)"
            ) from None

    # its parameters

    def parameter_names(self, layer: Layer) -> tuple[str, str | None]:
        site = self._site(layer)
        return site.weight, site.bias

    def as_parameters(self, layers: Sequence[Layer], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in layers:
            site, vector = self._site(layer), vectors[layer.name]
            matrix = vector[..., 0] if layer.kind == "scale" else vector[..., : layer.inputs]
            parts = {site.weight: matrix.mT if site.transposed else matrix} | ({site.bias: vector[..., -1]} if site.bias else {})
            leading = vector.shape[:-2]
            for name, part in parts.items():
                shape = self.values[name].shape
                whole = found.setdefault(name, part.new_zeros((*leading, *shape)))
                _step_of(whole, len(leading), site.index).copy_(part.reshape(*leading, *shape[len(site.index) :]))
        return found

    def as_vectors(self, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer in layers:
            site = self._site(layer)
            matrix, leading = self._part(site, site.weight, parameters)
            if layer.kind == "scale":
                matrix = matrix[..., None]
            elif site.transposed:
                matrix = matrix.reshape(*leading, layer.inputs, layer.outputs).mT
            if site.bias is not None:
                bias, leading = self._part(site, site.bias, parameters)
                matrix = torch.cat([matrix, bias.reshape(*leading, layer.outputs, 1)], -1)
            found[layer.name] = matrix
        return found

    def _part(self, site: Site, name: str, parameters: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """The layer's own part of a parameter with further leading dimensions, and the sizes of these."""
        whole = parameters[name]
        num_leading = whole.ndim - self.values[name].ndim
        return _step_of(whole, num_leading, site.index), tuple(whole.shape[:num_leading])

    # between torch and JAX

    def _precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.wide else nullcontext()

    def _padded(self, inputs: Tensor) -> jax.Array:
        """The inputs in one of few shapes: zeros after the sequences, and further sequences of zeros."""
        sequences = -(-_step_up(len(inputs)) // self._spread()) * self._spread()
        positions = _quarter_step_up(inputs.shape[1])
        if self.longest is not None:
            positions = max(inputs.shape[1], min(positions, self.longest))
        with self._precision():
            return self._placed(_padded_to(inputs, (sequences, positions, *inputs.shape[2:])))

    def _spread(self) -> int:
        """Over how many devices the sequences of a batch are dealt out."""
        if self.batches is None or not self.batches.spec or self.batches.spec[0] is None:
            return 1
        axes = self.batches.spec[0]
        return prod(self.batches.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    def _placed(self, values: Tensor) -> jax.Array:
        found = _to_jax(values)
        return found if self.batches is None else jax.device_put(found, self.batches)

    def _everywhere(self, values: Tensor) -> jax.Array:
        found = _to_jax(values)
        return found if self.batches is None else jax.device_put(found, NamedSharding(self.batches.mesh, PartitionSpec()))


def _laid_out(parameters: Parameters, batches: NamedSharding | None) -> tuple[dict[str, jax.Array], NamedSharding | None]:
    """The parameters where they are computed with, and how batches are laid over the devices; None with one device."""
    values = {name: jnp.asarray(parameters[name]) for name in sorted(parameters)}
    meshes = [
        value.sharding.mesh for value in values.values() if isinstance(value.sharding, NamedSharding) and len(value.sharding.device_set) > 1
    ]
    if batches is None and meshes:
        batches = NamedSharding(meshes[0], PartitionSpec())
    if batches is None and len(jax.local_devices()) > 1:
        batches = NamedSharding(Mesh(np.array(jax.local_devices()), ("sequences",)), PartitionSpec("sequences"))
    if batches is not None:
        everywhere = NamedSharding(batches.mesh, PartitionSpec())
        values = {
            name: value if value.sharding.device_set == batches.device_set else jax.device_put(value, everywhere)
            for name, value in values.items()
        }
    return values, batches


def _register(model: nn.Module, values: Mapping[str, jax.Array]) -> torch.device:
    """Torch parameters of the same names and values, in the same memory where that can be; returns their device."""
    device = torch.device("cpu")
    for name, value in values.items():
        *path, last = name.split(".")
        owner = model
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        tensor = _to_torch(value)
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        device = tensor.device
    return device


def _record(
    layer: Layer, site: Site, tapped: Mapping[str, Place], inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], mask: Tensor
) -> Record:
    def of(values: Mapping[str, Tensor], use: str, width: tuple[int, ...]) -> Tensor:
        found = values[f"{site.module}:{use}"][site.index]
        positions = found.numel() // (len(found) * prod(width))
        return found.reshape(len(found), positions, *width)[: len(mask), : mask.shape[1]]

    def linear(use: str) -> LayerIO:
        return LayerIO(
            activations=_float(of(inputs, use, (layer.inputs,))),
            output_gradients=_float(of(outputs, use, (layer.outputs,))),
            mask=mask,
            bias=layer.bias,
        )

    uses = {key.rpartition(":")[2] for key in site.uses}
    if layer.kind == "linear":
        return linear("linear")
    if layer.kind == "scale":
        heads = prod(tapped[site.uses[0]].shape) // (layer.outputs * _positions(tapped[site.uses[0]].shape))
        width = (heads, layer.outputs)
        return ScaleIO(
            normalized=_float(of(inputs, "scale", width)), output_gradients=_float(of(outputs, "scale", width)), mask=mask, bias=layer.bias
        )
    lookup = None
    if "lookup" in uses:
        indices, rows = of(inputs, "lookup", ()), _float(of(outputs, "lookup", (layer.inputs,)))
        lookup = LookupIO(indices=indices.long(), row_gradients=rows)
    head = linear("head" if "head" in uses else "linear") if uses - {"lookup"} else None
    return EmbeddingIO(lookup=lookup, head=head, mask=mask, num_rows=layer.outputs)


def _positions(shape: tuple[int, ...]) -> int:
    """Of a value marked in the trace of one sequence."""
    return shape[1] if shape[0] == 1 and len(shape) > 2 else shape[0]


def _step_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …"""
    power: int = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power >= 4 else power


def _quarter_step_up(count: int) -> int:
    """The next of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, …: four steps from a power of two to the next."""
    step: int = max(8, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def _step_of(values: Tensor, dimension: int, index: Sequence[int]) -> Tensor:
    """A view of these steps of scans, whose dimensions begin at the given one."""
    for step in index:
        values = values.select(dimension, step)
    return values


def _padded_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(values.shape) == tuple(shape):
        return values
    padded = values.new_zeros(tuple(shape))
    padded[tuple(slice(size) for size in values.shape)] = values
    return padded


def _cut(values: Tensor, like: Tensor) -> Tensor:
    return values[: len(like), : like.shape[1]]


def _to_torch(value: jax.Array) -> Tensor:
    """The array as a tensor in the same memory, on the first of its devices."""
    if len(value.sharding.device_set) > 1:
        first = min(value.sharding.device_set, key=lambda device: device.id)
        value = value.addressable_data(0) if value.is_fully_replicated else jax.device_put(value, first)
    found: Tensor = torch.utils.dlpack.from_dlpack(jax.block_until_ready(value))
    return found


def _all_to_torch(values: Mapping[str, jax.Array]) -> dict[str, Tensor]:
    return {name: _to_torch(value) for name, value in values.items()}


def _to_jax(values: Tensor) -> jax.Array:
    """The tensor as an array; whole numbers as int32."""
    values = values.detach()
    if values.dtype == torch.int64:
        values = values.int()
    if values.device.type == "cpu":
        return jnp.array(values.float().numpy(), dtype="bfloat16") if values.dtype == torch.bfloat16 else jnp.asarray(values.numpy())
    return jax.dlpack.from_dlpack(values.contiguous())


def _float(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
