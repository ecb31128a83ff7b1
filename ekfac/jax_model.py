"""A JAX model as one that can be attributed: its layers, their records and its exact curvature, compiled once for each of a few shapes.

`JaxModel` takes a function from parameters and token ids to logits whose layers are marked (`ekfac.jax_marks`). Losses are computed in torch from the
logits, as for any model, and so mean the same; what JAX computed goes to torch without a copy where both have it in one memory. Its parameters are
torch's too: a copy of the model can be moved by torch's optimizers, and logits have derivatives by the parameters that need a gradient.

A batch is padded to one of a few shapes, so that there are few compilations. Each sequence is computed by itself (`jax.vmap`); where there are
several devices, each computes some of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import NamedSharding
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ekfac.backend import Backend, Products
from ekfac.jax_compiled import Apply, Output, Parameters, compiled
from ekfac.jax_devices import Layout, laid_out
from ekfac.jax_layers import Site, coverage
from ekfac.jax_records import record
from ekfac.jax_shapes import padded_positions, padded_sequences
from ekfac.jax_tape import Place, multiplications, places
from ekfac.jax_torch import all_to_torch, padded_to, to_jax, to_torch
from ekfac.jax_vectors import as_parameters, as_vectors
from ekfac.layers import Coverage, Layer
from ekfac.record import Record


@dataclass(kw_only=True)
class _Tape:
    """One forward pass, of which the backward pass is still to come."""

    places: Mapping[str, Place]  # those that are tapped
    given: tuple[Tensor, ...] = ()  # the logits, and what is watched
    shapes: tuple[tuple[int, ...], ...] = ()  # of these, padded
    pull: Any = None
    seen: Mapping[str, jax.Array] | None = None


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A parameter in JAX, and the state in which torch has the same values."""

    value: jax.Array
    state: tuple[int, int, torch.dtype]


class JaxModel(Backend):
    """A function of parameters and inputs as a model whose layers can be attributed.

    `apply(parameters, inputs)` gives logits [N, T, V] for token ids [N, T] (or for any inputs [N, T, …]), or [N, V] for inputs [N, …] without
    positions, as a classifier does; its layers are marked, and parameters go by the names that the marks use. `longest` is how many positions the
    model knows, where it does not know any number of them. Parameters that lie on several devices stay as they are, with `batches` telling how
    inputs are laid over the devices; otherwise they are copied to every device there is, and the sequences of a batch are dealt out. Parameters
    that are `jax.ShapeDtypeStruct`s make a model that tells of its layers and computes nothing.
    """

    def __init__(
        self, apply: Apply, parameters: Parameters, *, longest: int | None = None, batches: NamedSharding | None = None, **config: Any
    ) -> None:
        super().__init__()
        self.apply_function = apply
        self.longest = longest
        self.config = SimpleNamespace(max_position_embeddings=longest, **config)
        self.has_values = not any(isinstance(value, jax.ShapeDtypeStruct) for value in parameters.values())
        with _precision(any(value.dtype == jnp.float64 for value in parameters.values())):
            values, self.layout = laid_out(parameters, batches) if self.has_values else (dict(parameters), Layout(batches=None))
            for name, value in values.items():
                _register(self, name, to_torch(value) if self.has_values else _without_values(value))
        self._kept = {name: _Kept(value=values[name], state=_state(parameter)) for name, parameter in self.named_parameters()}
        self._tape: _Tape | None = None
        self._watched: OrderedDict[int, tuple[Output, Callable[[Tensor], None]]] = OrderedDict()
        self._example: tuple[tuple[int, ...], Any] | None = None
        self._found: tuple[list[Place], tuple[int, ...]] | None = None
        self._sites: dict[str, Site] = {}
        self._covered: tuple[Site, ...] = ()
        self.compiled = compiled(apply)

    def __deepcopy__(self, memo: Any) -> "JaxModel":
        """With parameters of its own; what is compiled is shared."""
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name not in made.__dict__})
        made._kept, made._watched = {}, OrderedDict()
        for name, parameter in self.named_parameters():
            _register(made, name, parameter.detach().clone(), requires_grad=parameter.requires_grad)
        return made.train(self.training)

    @property
    def values(self) -> dict[str, jax.Array]:
        """The parameters by name, as torch has them now."""
        with self._precision():
            return {name: self._value(name, parameter) for name, parameter in self.named_parameters()}

    def _value(self, name: str, parameter: Tensor) -> jax.Array:
        kept = self._kept.get(name)
        # What torch may change while it is computed with is copied.
        return kept.value if kept is not None and kept.state == _state(parameter) else self.layout.everywhere(parameter.detach().clone())

    # as a model

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """An object with `logits` [N, T, V]."""
        if not self.has_values:
            self._trace(tuple(input_ids.shape[1:]), input_ids.dtype)
            return SimpleNamespace(logits=torch.empty((len(input_ids), *self._outputs_of_one[1:]), device="meta"))
        if self._tape is not None or self._watched:
            return SimpleNamespace(logits=self._through_tape(input_ids))
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad] if torch.is_grad_enabled() else []
        if names:
            given = dict(self.named_parameters())
            return SimpleNamespace(logits=_ByWeights.apply(self, input_ids, names, *(given[name] for name in names)))  # type: ignore[no-untyped-call]
        with self._precision():
            return SimpleNamespace(logits=self._cut(to_torch(self.compiled.logits(self.values, self._padded(input_ids))), input_ids))

    def on_output(self, name: str, hook: Callable[[Tensor], None]) -> RemovableHandle:
        if name not in self._outputs():
            raise ValueError(f"the model has no layer or place {name!r} that gives one vector for each position")
        if self._watched:
            raise ValueError("the model gives one output at a time besides its logits")
        handle = RemovableHandle(self._watched)
        self._watched[handle.id] = self._outputs()[name], hook
        return handle

    def output_names(self) -> list[str]:
        return list(self._outputs())

    def _outputs(self) -> dict[str, Output]:
        """What can be asked for: the outputs, one vector for each position, of layers and of places, by name with the steps of scans."""
        if self._found is None:
            self._trace_some_tokens()
        assert self._found is not None
        assert self._example is not None
        (length, *_), _ = self._example
        found: dict[str, Output] = {}
        twice: set[str] = set()
        for place in self._found[0]:
            vectors = len(place.shape) > 1 and prod(place.shape[:-1]) == length and place.obstacle is None
            if place.mark.side == "in" or place.mark.use == "head" or not vectors:
                continue
            for index in product(*map(range, place.lengths)):
                name = ".".join([place.mark.layer, *map(str, index)])
                if name in found and found[name] == (place.mark.key, index):
                    twice.add(name)
                if name not in found or place.mark.use != "place":
                    found[name] = place.mark.key, index
        return {name: output for name, output in found.items() if name not in twice}

    def _through_tape(self, inputs: Tensor) -> Tensor:
        """The logits; within a capture they and what is watched are put on the tape, and have a gradient."""
        tape = self._tape or _Tape(places={})
        if tape.given:
            raise ValueError("the loss calls the model twice: it must call it once")
        ((output, hook),) = self._watched.values() or ((None, None),)
        with self._precision():
            given, tape.pull, tape.seen = self.compiled.forward(self.values, self._padded(inputs), tuple(sorted(tape.places)), output)
            tape.shapes = tuple(one.shape for one in given)
            tape.given = tuple(self._cut(to_torch(one), inputs).requires_grad_(self._tape is not None) for one in given)
        if hook is not None:
            hook(tape.given[1])
        return tape.given[0]

    def get_input_embeddings(self) -> Any:
        """The table that is looked up first."""
        if self._found is None:
            self._trace_some_tokens()
        lookups = [place.mark for place in self._found[0] if place.mark.use == "lookup"] if self._found else []
        if not lookups or lookups[0].weight not in self._shapes():
            raise ValueError("the model looks up no embedding: is it a language model, and are its layers known?")
        return SimpleNamespace(weight=self.get_parameter(lookups[0].weight))

    def attributable(self, run: Callable[[nn.Module], Any], patterns: Sequence[str]) -> Coverage:
        if self._example is None or not self._sites:
            self._example = None
            with torch.no_grad():
                run(self)
        assert self._example is not None
        self._trace(*self._example)
        covered = self._judged(patterns)
        self._covered = tuple(self._sites[layer.name] for layer in covered.layers)
        return covered

    def _trace_some_tokens(self) -> None:
        self._trace((min(8, self.longest or 8),), torch.int64)

    def _trace(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        traced, given = self._traced(shape, dtype)
        positions = given[:2] == (1, shape[0]) and len(given) == 3
        if not positions and not (len(given) == 2 and given[0] == 1):
            raise ValueError(f"the model gave the shape {given} for inputs of {(1, *shape)}: expected logits [N, T, V]")
        self._found = list(places(traced.jaxpr)), given
        self._example = shape, dtype
        if not getattr(self.config, "vocab_size", 0):
            self.config.vocab_size = given[-1]  # what a batch's logits take depends on it
        self._judged(("*",))

    def _traced(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, tuple[int, ...]]:
        """The jaxpr for one such sequence, and the shape of what it gives."""
        with self._precision():
            inputs = to_jax(torch.zeros((1, *shape), dtype=dtype))
            traced, given = jax.make_jaxpr(self.apply_function, return_shape=True)(self._described(), inputs)
        return traced, tuple(given.shape)

    def _described(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in self.named_parameters()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    @property
    def _outputs_of_one(self) -> tuple[int, ...]:
        """The shape of what the model gives for the example, [1, T, V] or [1, V]."""
        assert self._found is not None
        return self._found[1]

    @property
    def _has_positions(self) -> bool:
        return len(self._outputs_of_one) == 3

    def _judged(self, patterns: Sequence[str]) -> Coverage:
        assert self._found is not None
        assert self._example is not None
        length = self._example[0][0] if self._has_positions else 1
        layers = [place for place in self._found[0] if place.mark.use != "place"]
        covered, self._sites = coverage(layers, self._shapes(), length, self._outputs_of_one[-1], patterns)
        return covered

    def products(self) -> Products:
        if not self._sites:
            self._trace_some_tokens()
        length = min(64, (self.longest or 128) // 2)
        embeddings = [site for site in self._sites.values() if site.layer.kind == "embedding"]
        tables = {site.layer.name: {key.rpartition(":")[2] for key in site.uses} for site in embeddings}
        once, twice = (multiplications(self._traced((length * times,), torch.int64)[0].jaxpr) for times in (1, 2))
        return Products(
            of_token=(4 * once - twice) // (2 * length),
            of_pair=(twice - 2 * once) // (2 * length**2),
            heads=frozenset(name for name, uses in tables.items() if uses != {"lookup"}),
            tied=frozenset(name for name, uses in tables.items() if len(uses) > 1),
        )

    def _site(self, layer: Layer) -> Site:
        if not self._sites:
            self._trace_some_tokens()
        if layer.name not in self._sites:
            raise ValueError(f"the model has no layer {layer.name!r}")
        return self._sites[layer.name]

    def capture(self, layers: Sequence[Layer], loss: Callable[[], Tensor], mask: Tensor, consume: Callable[[Layer, Record], None]) -> float:
        sites = {layer.name: self._site(layer) for layer in layers}
        assert self._found is not None
        # All that are covered, so that passes over some of them, and without scales, are one compilation.
        keys = {key for site in (*sites.values(), *self._covered) for key in site.uses}
        tapped = {place.mark.key: place for place in self._found[0] if place.mark.side == "out" and place.mark.key in keys}
        tape = self._tape = _Tape(places=tapped)
        try:
            with torch.enable_grad():
                value = loss()
        finally:
            self._tape = None
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()}: the model's weights or its inputs give values that are not finite")
        if tape.seen is None:
            raise ValueError("the loss does not call the model")
        mask = mask.reshape(len(mask), -1)
        if mask.shape[1] != (tape.given[0].shape[1] if self._has_positions else 1):
            raise ValueError(f"the mask has the shape {tuple(mask.shape)}, but the model sees {tuple(tape.given[0].shape[:-1])} positions")
        found = torch.autograd.grad(value, tape.given, allow_unused=True, materialize_grads=True)
        with self._precision(), torch.no_grad():
            padded = tuple(self.layout.dealt_out(padded_to(gradient, shape)) for gradient, shape in zip(found, tape.shapes, strict=True))
            gradients = self.compiled.backward(tape.pull, padded)
            tape.pull = None
            inputs, outputs = all_to_torch(tape.seen), all_to_torch(gradients)
            for layer in reversed(layers):
                consume(layer, record(layer, sites[layer.name], tapped, inputs, outputs, mask))
        return float(value.detach())

    def gauss_newton(self, layers: Sequence[Layer], tokens: Tensor, weights: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        num_queries = len(next(iter(vectors.values())))
        tangents = self.as_parameters(layers, vectors)
        room = padded_sequences(num_queries)
        with self._precision():
            inputs = self._padded(tokens)
            predicting = torch.zeros(inputs.shape[:2], dtype=torch.float32)
            predicting[: len(tokens), : tokens.shape[1] - 1] = weights[:, 1:].cpu()
            given = {name: self.layout.everywhere(padded_to(value, (room, *value.shape[1:]))) for name, value in tangents.items()}
            found = self._differentiated(self.compiled.product, self.values, inputs, self.layout.dealt_out(predicting), given)
            products = {name: value[:num_queries] for name, value in all_to_torch(found).items()}
        return self.as_vectors(layers, products)

    def directional(self, layers: Sequence[Layer], tokens: Tensor, vector: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        tangents = self.as_parameters(layers, vector)
        with self._precision():
            given = {name: self.layout.everywhere(value) for name, value in tangents.items()}
            logits, change = self._differentiated(self.compiled.derivative, self.values, self._padded(tokens), given)
            return self._cut(to_torch(logits), tokens), self._cut(to_torch(change), tokens)

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
        return as_parameters(map(self._site, layers), vectors, self._shapes())

    def as_vectors(self, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return as_vectors(map(self._site, layers), parameters, self._shapes())

    # between torch and JAX

    def _precision(self) -> AbstractContextManager[Any]:
        return _precision(any(parameter.dtype == torch.float64 for parameter in self.parameters()))

    def _padded(self, inputs: Tensor) -> jax.Array:
        """The inputs in one of few shapes: zeros after the sequences, and further sequences of zeros."""
        if self._found is None:
            self._trace(tuple(inputs.shape[1:]), inputs.dtype)
        shape = list(inputs.shape)
        shape[0] = padded_sequences(shape[0], multiple_of=self.layout.spread)
        if self._has_positions:
            shape[1] = padded_positions(shape[1], self.longest)
        with self._precision():
            return self.layout.dealt_out(padded_to(inputs, shape))

    def _cut(self, values: Tensor, like: Tensor) -> Tensor:
        return values[: len(like), : like.shape[1]] if self._has_positions else values[: len(like)]


class _ByWeights(torch.autograd.Function):
    """The logits of a `JaxModel`, with derivatives by some of its parameters."""

    @staticmethod
    def forward(context: Any, model: JaxModel, inputs: Tensor, names: Sequence[str], *_: Tensor) -> Tensor:
        with model._precision():
            values = model.values
            logits, context.pull = model.compiled.moved(values, model._padded(inputs), {name: values[name] for name in names})
            context.model, context.names, context.shape = model, names, logits.shape
            return model._cut(to_torch(logits), inputs)

    @staticmethod
    def backward(context: Any, *gradient: Tensor) -> Any:
        with _precision(gradient[0].dtype == torch.float64):
            whole = context.model.layout.dealt_out(padded_to(gradient[0], context.shape))
            found = all_to_torch(context.model.compiled.backward(context.pull, whole))
        return None, None, None, *(found[name] for name in context.names)


def _precision(wide: bool) -> AbstractContextManager[Any]:
    return jax.enable_x64(True) if wide else nullcontext()


def _register(model: nn.Module, name: str, value: Tensor, *, requires_grad: bool = False) -> None:
    """A torch parameter of this name, in the same memory."""
    *path, last = name.split(".")
    owner = model
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    owner.register_parameter(last, nn.Parameter(value, requires_grad=requires_grad))


def _without_values(value: Any) -> Tensor:
    return torch.empty(value.shape, dtype=getattr(torch, str(value.dtype)), device="meta")


def _state(parameter: Tensor) -> tuple[int, int, torch.dtype]:
    """What differs when the parameter's values do."""
    return parameter.data_ptr(), parameter._version, parameter.dtype
