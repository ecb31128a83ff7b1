"""Which layers of a torch model can be attributed, and which parameters are left out and why.

A layer is linear (`nn.Linear`, a subclass, or a Hugging Face `Conv1D`), an embedding (a table that is looked up, the model's head, or both in
one when they are tied), or a scale (the elementwise weight and bias of a normalisation, known by what it does and not by its class). Linear too are
convolutions (those with groups are linear maps side by side), each expert's matrices in a mixture whose experts are one parameter, and a weight that
a module's own code multiplies by. Whether it really takes part and which layers share an input is found by running the model once.

A model made under torch's `FakeTensorMode`, whose tensors have shapes and no values, is judged alike, by trying copies of its modules on
made-up values.
"""

import copy
import fnmatch
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from ekfac.backend import Backend
from ekfac.convolution import CONVOLUTIONS, unfolded_size
from ekfac.experts import Matrix, expert_matrices, experts_forward, given
from ekfac.functional import LinearUses, own_weight
from ekfac.projections import Block, Ranges, Split, blocks, size_of

MAX_FACTOR_SIZE = 20_480
"""Larger covariances are refused: a float64 matrix of this size takes 3.4 GB, its eigenvectors as much again."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An attributed layer: its modules' names and the shape [outputs, inputs (+ 1)] of its gradient."""

    name: str
    kind: Literal["linear", "embedding", "scale", "grouped"]
    inputs: int
    outputs: int
    """Of an embedding, the number of its rows."""
    bias: bool
    input_group: str
    """Name of the first layer fed the very same tensor: linear layers that share it have one input covariance and one eigenbasis."""
    output_group: str | None = None
    """Of a layer that is split by its inputs, the name of the first block: all have one output covariance and one eigenbasis."""
    modules: tuple[str, ...]
    """The modules that use the layer's parameters: one, or the embedding and the head that is tied to it."""
    lookup_factor: float = 1.0
    """What an embedding's rows are multiplied by when they are looked up."""
    expert: int | None = None
    """Which expert of its module this is, and below the name of the parameter that holds the matrices of all."""
    parameter: str | None = None
    routed: float = 1.0
    """The share of the positions that would reach the layer were they spread evenly over the experts."""
    rows: Ranges | None = None
    """Of a block, which outputs of its module it has, and below which inputs; None stands for all."""
    columns: Ranges | None = None

    @property
    def is_block(self) -> bool:
        """Whether it is part of a linear map."""
        return self.rows is not None or self.columns is not None

    @property
    def known_as(self) -> tuple[str, ...]:
        """What people know it by: an expert or a block by its own name, any other layer by those of its modules."""
        return (self.name,) if self.expert is not None or self.is_block else self.modules

    @property
    def shape(self) -> tuple[int, int]:
        """(O, J): the shape of the layer's gradient, the bias as its last column."""
        return self.outputs, self.inputs + self.bias

    @property
    def unshared(self) -> tuple[int, int]:
        """Its outputs and inputs, without those that it shares as a block with the first block of its module, where they are counted."""
        outputs, inputs = self.shape
        return (
            0 if self.output_group not in (None, self.name) else outputs,
            0 if self.rows is not None and self.input_group != self.name else inputs,
        )

    @property
    def input_name(self) -> str | None:
        """Under which name the input covariance and eigenbasis stand, which layers with one input share; None where there are none."""
        features = f"features:{self.name}"
        return {"linear": f"input:{self.input_group}", "embedding": features, "grouped": features, "scale": None}[self.kind]

    @property
    def output_name(self) -> str | None:
        """Under which name the output-gradient covariance and eigenbasis stand; None where there are none."""
        return f"output:{self.output_group or self.name}" if self.kind == "linear" else None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What share of a model's parameters its attributed layers hold, and why each other module is left out."""

    layers: tuple[Layer, ...]
    attributed: int
    total: int
    excluded: dict[str, str]  # module name → reason
    whole: dict[str, str] = field(default_factory=dict)
    """Where layers are split, the linear layers of which this is not known how: module name → reason."""

    @property
    def share(self) -> float:
        return self.attributed / self.total


def attributable_layers(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    patterns: Sequence[str] = ("*",),
    *,
    positions: tuple[int, ...] | None = None,
    same_positions: bool = False,
    split: Split = "none",
) -> Coverage:
    """The layers of `model` that can be attributed and match one of the glob `patterns`, in the order of the model's modules.

    A pattern matches a layer by the name of any module that uses its parameters, and an expert by a name such as `mlp.experts.3.down_proj`. With
    `split` the blocks of linear layers are layers, with names such as `c_attn.q` (projections) or `c_attn.q.head3` (heads), which a pattern matches
    too; linear layers of attention whose blocks are not known stay whole, as `Coverage.whole` tells.
    `run` must call the model once on a small input; it is called without gradients. Where some of the model's parameters require a gradient and
    others do not, these are frozen and left out. `positions`, when given, is the shape (N,) or (N, T) of the mask of this input: layers whose
    inputs cannot be told apart by sequence are left out, and with `same_positions` those that see other positions than T. Raises ValueError when
    a pattern matches no layer that can be attributed, or nothing is left.
    """
    if isinstance(model, Backend):
        if split != "none":
            raise ValueError("layers of a JAX model are not split: take none")
        return model.attributable(run, patterns)
    modules = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    frozen = _frozen(model, modules)
    calls = _calls(model, modules, run)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers: list[Layer] = []
    excluded: dict[str, str] = {}
    whole: dict[str, str] = {}
    for names in _sharing(modules):
        reason = next((frozen[name] for name in names if name in frozen), None)
        judged = reason or _unplaced(names, modules, calls, positions, same_positions) or _judged(names, modules, calls, head)
        if isinstance(judged, str):
            excluded |= dict.fromkeys(names, judged)
        else:
            found = _blocks(judged[0], model, split) if len(judged) == 1 else None
            if isinstance(found, str):
                whole[judged[0].name] = found
            layers += found if isinstance(found, list) else judged
            excluded |= _left_over(names, modules, judged)
    known = [name for layer in layers for name in layer.known_as]
    for pattern in patterns:
        if not any(matches(layer, [pattern]) for layer in layers):
            raise ValueError(
                f"no attributable layer matches {pattern!r}; there are {len(layers)}, such as: {', '.join(known[:3]) or 'none'}"
            )
    if not layers:
        raise ValueError("the model has no layer that can be attributed: linear, embedding or scale, called in a forward pass")
    chosen = [layer for layer in layers if matches(layer, patterns)]
    kept = {name for layer in chosen for name in layer.modules}
    left = [layer for layer in layers if not matches(layer, patterns)]
    excluded |= {name: "not selected by the layer patterns" for layer in left for name in layer.known_as}
    return Coverage(
        layers=_grouped(chosen, calls),
        attributed=sum(layer.shape[0] * layer.shape[1] for layer in chosen),
        total=sum(p.numel() for p in model.parameters()),
        excluded=dict(sorted(excluded.items())),
        whole={name: reason for name, reason in whole.items() if name in kept},
    )


def matches(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a glob matches one of the layer's names, or of a block that of its module."""
    names = (*layer.known_as, *(layer.modules if layer.is_block else ()))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def expert_modules(layers: Iterable[Layer]) -> list[str]:
    """The names of the modules whose experts are among the layers."""
    return list(dict.fromkeys(layer.modules[0] for layer in layers if layer.expert is not None))


@dataclass(frozen=True, kw_only=True)
class _Call:
    inputs: Any  # the first positional argument, None when there was none
    alone: bool  # whether it was the only argument
    output: Any
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


def _frozen(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Why each module with frozen parameters is left out. In a model none of whose parameters requires a gradient, none is frozen."""
    if not any(p.requires_grad for p in model.parameters()):
        return {}
    found = {}
    for name, module in modules.items():
        flags = [p.requires_grad for p in module.parameters(recurse=False)]
        if not all(flags):
            found[name] = "some of its parameters are frozen" if any(flags) else "frozen: its parameters require no gradient"
    return found


def _calls(model: nn.Module, modules: dict[str, nn.Module], run: Callable[[nn.Module], Any]) -> dict[str, list[_Call]]:
    """What each module was called with and gave. The tensors are kept until all are known, so that their identities differ.

    Of a module that multiplies by its weight in its own code, the calls are the products.
    """
    seen: dict[str, list[_Call]] = {name: [] for name in modules}
    products: dict[str, list[_Call]] = {}

    def called(name: str, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        alone = len(arguments) == 1 and not named
        inputs = arguments[0] if arguments else None
        output = output.detach() if isinstance(output, Tensor) else output
        seen[name].append(_Call(inputs=inputs, alone=alone, output=output, arguments=arguments, named=named))

    def used(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        products.setdefault(name, []).append(_Call(inputs=inputs, alone=True, output=output))
        return output

    handles = [
        module.register_forward_hook(
            lambda _, arguments, named, output, name=name: called(name, arguments, named, output), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    weights = {name: own_weight(module) for name, module in modules.items() if not isinstance(module, KNOWN)}
    try:
        with evaluation_mode(model), torch.no_grad(), LinearUses({name: w for name, w in weights.items() if w is not None}, used):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {**seen, **products}


KNOWN = (nn.Linear, nn.Embedding, Conv1D, *CONVOLUTIONS)
"""Classes whose modules are judged by their calls alone."""


def _sharing(modules: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """The modules in groups that share a parameter, nearly all of them groups of one, in the order of their first members."""
    names: dict[str, list[str]] = {}
    groups: dict[int, list[str]] = {}
    for name, module in modules.items():
        own = [id(p) for p in module.parameters(recurse=False)]
        group = next((groups[p] for p in own if p in groups), [])
        group.append(name)
        groups |= dict.fromkeys(own, group)
        names.setdefault(group[0], group)
    return (tuple(group) for group in names.values())


def _unplaced(
    names: tuple[str, ...],
    modules: dict[str, nn.Module],
    calls: dict[str, list[_Call]],
    positions: tuple[int, ...] | None,
    same_positions: bool,
) -> str | None:
    """Why what the modules saw cannot be told apart by sequence and position; None when it can."""
    if positions is None:
        return None
    count, total = positions[0], math.prod(positions)
    for name in names:
        for call in calls[name]:
            if not isinstance(call.inputs, Tensor):
                continue
            shape = call.inputs.shape if isinstance(modules[name], nn.Embedding) else call.inputs.shape[:-1]
            if isinstance(modules[name], CONVOLUTIONS):
                shape = call.inputs.shape[:1]
            if isinstance(modules[name], nn.Embedding) and len(shape) == 2 and shape[0] == 1:
                shape = torch.Size((count, shape[1]))  # one row of positions for the whole batch
            rows = math.prod(shape)
            if same_positions and rows % total:
                return f"saw the shape {tuple(call.inputs.shape)}, where there are {positions[-1]} positions in a sequence"
            if rows not in (count, total) and (len(shape) < 2 or shape[0] != count):
                return f"saw the shape {tuple(call.inputs.shape)}, whose rows cannot be told apart by sequence"
    return None


def _judged(
    names: tuple[str, ...], modules: dict[str, nn.Module], calls: dict[str, list[_Call]], head: nn.Module | None
) -> list[Layer] | str:
    """The layers that these modules make, one unless they are experts, or the reason to leave them out."""
    names = tuple(name for name in names if calls[name])
    if not names:
        return "not called in the forward pass"
    for name in names:
        if any(not p.is_floating_point() for p in modules[name].parameters(recurse=False)):
            return "quantized weights, which have no gradient"
        if any(not isinstance(call.inputs, Tensor) or not isinstance(call.output, Tensor) for call in calls[name]):
            return "takes or gives something else than one tensor"
    if len(names) == 1 and (matrices := expert_matrices(modules[names[0]])) is not None:
        return _experts(names[0], modules[names[0]], matrices, calls[names[0]])
    tables = [name for name in names if isinstance(modules[name], nn.Embedding)]
    linear = [name for name in names if isinstance(modules[name], nn.Linear | Conv1D)]
    if len(names) > 1 and not (
        tables and len(linear) == len(names) - len(tables) <= 1 and all(isinstance(modules[n], nn.Linear) for n in linear)
    ):
        return f"{', '.join(names)} share their parameters, but are not an embedding and its head"
    judged: Layer | str
    if tables:
        tried = {_embedding(names, *_with_values(modules[name], calls[name][0]), linear, modules) for name in tables}
        judged = tried.pop() if len(tried) == 1 else f"{', '.join(tables)} share their rows, but not what these are multiplied by"
    elif isinstance(modules[names[0]], CONVOLUTIONS):
        judged = _convolution(names[0], modules[names[0]])
    elif linear or _multiplies(modules[names[0]], calls[names[0]][0]):
        judged = _linear(names[0], modules[names[0]], head)
    else:
        lengths = {
            call.inputs.shape[1] for calls in calls.values() for call in calls if isinstance(call.inputs, Tensor) and call.inputs.ndim == 3
        }
        judged = _scale(names[0], modules[names[0]], calls[names[0]], lengths)
    return judged if isinstance(judged, str) else [judged]


def _blocks(layer: Layer, model: nn.Module, split: Split) -> list[Layer] | str | None:
    """A layer for each block of a linear layer, the reason why they are not known, or None where it has none."""
    if layer.expert is not None or len(layer.modules) > 1 or not isinstance(model.get_submodule(layer.name), nn.Linear | Conv1D):
        return None
    own: Any = getattr(model, "config", None)
    config = own.get_text_config() if hasattr(own, "get_text_config") else own
    found = blocks(layer.name, layer.inputs, layer.outputs, layer.bias, config, split)
    if found is None or isinstance(found, str):
        return found
    made = [_block(layer, block) for block in found]
    widest = max(max(block.shape) for block in made)
    return made if widest <= MAX_FACTOR_SIZE else f"a covariance of {widest:,} × {widest:,} would be needed"


def _block(layer: Layer, block: Block) -> Layer:
    inputs = layer.inputs if block.columns is None else size_of(block.columns)
    outputs = layer.outputs if block.rows is None else size_of(block.rows)
    name = f"{layer.name}.{block.name}"
    return replace(
        layer,
        name=name,
        kind="linear",
        inputs=inputs,
        outputs=outputs,
        bias=layer.bias if block.columns is None else inputs == 0,
        input_group=name,
        rows=block.rows,
        columns=block.columns,
    )


def _multiplies(module: nn.Module, call: _Call) -> bool:
    """Whether the module multiplies by its own weight in code of its own, its calls being the products."""
    weight = own_weight(module)
    return weight is not None and call.inputs.shape[-1:] == weight.shape[1:] and call.output.shape[-1:] == weight.shape[:1]


def _left_over(names: tuple[str, ...], modules: dict[str, nn.Module], layers: list[Layer]) -> dict[str, str]:
    """Parameters of these modules that their layers do not hold, by name, each with the reason."""
    held = {layer.parameter or "weight" for layer in layers} | {f"{layer.parameter}_bias" for layer in layers}
    held |= {"bias"} if any(layer.bias for layer in layers) else set()
    own = {f"{name}.{own}": own for name in names for own, _ in modules[name].named_parameters(recurse=False)}
    return {full: "a parameter of a kind that is not attributed" for full, own in own.items() if own not in held}


def _experts(name: str, module: nn.Module, matrices: tuple[Matrix, Matrix], calls: list[_Call]) -> list[Layer] | str:
    """A layer for each expert's each matrix, if the module really computes what `experts_forward` does."""
    if len(calls) != 1:
        return f"{type(module).__name__}: called {len(calls)} times in one forward pass"
    call = calls[0]
    values = given(module, call.arguments, call.named)
    if values is None or getattr(module, "_is_expert_parallel", False):
        return f"{type(module).__name__}: experts, but not called with hidden states, the chosen experts and their weights"
    if not isinstance(call.output, FakeTensor):
        with torch.no_grad():
            expected = experts_forward(module, *values)
        scale, dtype = float(call.output.abs().max()), torch.promote_types(call.output.dtype, torch.float32)
        tolerance = 3e-2 if call.output.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if not torch.allclose(expected.to(dtype), call.output.to(dtype), rtol=tolerance, atol=tolerance * scale):
            return f"{type(module).__name__}: experts that compute something else than two products with an activation between"
    num_experts, widest = int(getattr(module, matrices[0].name).shape[0]), max(max(m.inputs, m.outputs) for m in matrices) + 1
    if widest > MAX_FACTOR_SIZE:
        return f"a covariance of {widest:,} × {widest:,} would be needed"
    return [
        Layer(
            name=f"{name}.{expert}.{matrix.name}",
            kind="linear",
            inputs=matrix.inputs,
            outputs=matrix.outputs,
            bias=matrix.bias is not None,
            input_group=f"{name}.{expert}.{matrix.name}",
            modules=(name,),
            expert=expert,
            parameter=matrix.name,
            routed=min(1.0, values[1].shape[-1] / num_experts),
        )
        for expert in range(num_experts)
        for matrix in matrices
    ]


def _convolution(name: str, module: Any) -> Layer | str:
    inputs, outputs, bias = unfolded_size(module), int(module.out_channels), module.bias is not None
    widest = max(inputs + bias, outputs if module.groups == 1 else 0)
    if widest > MAX_FACTOR_SIZE:
        return f"a covariance of {widest:,} × {widest:,} would be needed"
    kind: Literal["linear", "grouped"] = "linear" if module.groups == 1 else "grouped"
    return Layer(name=name, kind=kind, inputs=inputs, outputs=outputs, bias=bias, input_group=name, modules=(name,))


def _with_values(module: nn.Module, call: _Call) -> tuple[nn.Module, _Call]:
    """The module and its call; where tensors have no values, those of a copy of the module with made-up values."""
    if not isinstance(call.output, FakeTensor):
        return module, call
    values: dict[int, Any] = {id(p): nn.Parameter(_made_up(p), requires_grad=False) for p in module.parameters()}
    values |= {id(b): _made_up(b) if b.constant is None else b.constant for b in module.buffers() if isinstance(b, FakeTensor)}
    twin, inputs = copy.deepcopy(module, values), _made_up(call.inputs)
    return twin, _Call(inputs=inputs, alone=call.alone, output=twin(inputs))


def _made_up(like: Tensor) -> Tensor:
    """Values for a tensor of which only the shape is known: 0, 1, 2, … where they are whole numbers, else rows of a sine that all differ.

    The rows overlap in memory, so that those of the largest table take little.
    """
    if not like.is_floating_point():
        return torch.arange(like.numel()).reshape(like.shape)
    wave = torch.sin(torch.arange(1.0, 2 + sum(size - 1 for size in like.shape)))
    return wave.to(like.dtype).as_strided(like.shape, (1,) * like.ndim)


def _embedding(names: tuple[str, ...], table: nn.Module, call: _Call, heads: list[str], modules: dict[str, nn.Module]) -> Layer | str:
    weight: Any = table.weight
    if call.inputs.is_floating_point() or not bool(((call.inputs >= 0) & (call.inputs < len(weight))).all()):
        return "embedding: not called with the numbers of its rows"
    rows = weight[call.inputs.long()].detach()
    if rows.shape != call.output.shape or not bool(rows.any()):
        return "embedding: what it gives is not one row for each number, or all rows that were tried are zero"
    factor = float((rows.double() * call.output.double()).sum() / rows.double().square().sum())
    if not torch.allclose(factor * rows, call.output.to(rows.dtype), rtol=1e-2, atol=1e-6):
        return "embedding: what it gives is not a multiple of its rows"
    bias = bool(heads) and modules[heads[0]].bias is not None
    return Layer(
        name=names[0],
        kind="embedding",
        inputs=int(weight.shape[1]),
        outputs=int(weight.shape[0]),
        bias=bias,
        input_group=names[0],
        modules=names,
        lookup_factor=1.0 if abs(factor - 1) < 1e-3 else factor,
    )


def _linear(name: str, module: Any, head: nn.Module | None) -> Layer | str:
    if module.weight.ndim != 2:
        return f"{type(module).__name__}: its weight has {module.weight.ndim} dimensions"
    outputs, inputs = (int(size) for size in (reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape))
    bias = getattr(module, "bias", None) is not None
    table = module is head or outputs > MAX_FACTOR_SIZE  # a row of its own for each of many outputs, and no covariance between them
    if inputs + bias > MAX_FACTOR_SIZE:
        return f"a covariance of {inputs + bias:,} × {inputs + bias:,} would be needed"
    kind: Literal["linear", "embedding"] = "embedding" if table else "linear"
    return Layer(name=name, kind=kind, inputs=inputs, outputs=outputs, bias=bias, input_group=name, modules=(name,))


def _scale(name: str, module: nn.Module, calls: list[_Call], lengths: set[int]) -> Layer | str:
    """A module whose output is zero-weight output + (what the weight multiplies) · weight + bias, elementwise in the last dimension."""
    call = calls[0]
    own = dict(module.named_parameters(recurse=False))
    if any(p.ndim >= 3 for p in own.values()):
        return f"{type(module).__name__}: weights of three dimensions, of a kind that is not known"
    refusal = f"{type(module).__name__}: neither linear, nor an embedding, nor an elementwise scale"
    sizes = {p.shape for p in own.values()}
    if not {"weight"} <= set(own) <= {"weight", "bias"} or sizes != {call.output.shape[-1:]} or call.inputs.shape != call.output.shape:
        return refusal
    if not all(call.alone for call in calls):
        return f"{type(module).__name__}: takes more than one argument"
    if call.inputs.ndim > 3 and (call.inputs.shape[1] not in lengths or call.inputs.shape[2] in lengths):
        return f"{type(module).__name__}: its input has no position as its second dimension"
    module, call = _with_values(module, call)
    own = dict(module.named_parameters(recurse=False))
    inputs = call.inputs.to(torch.promote_types(call.inputs.dtype, torch.float32))
    trial = torch.linspace(0.5, 1.5, call.output.shape[-1]).to(inputs)
    rest = with_parameters(module, inputs.dtype, 0.0, 0.0)(inputs)
    expected = rest + normalized(module)(inputs) * trial + (trial if "bias" in own else 0)
    if not torch.allclose(with_parameters(module, inputs.dtype, trial, trial)(inputs), expected, rtol=1e-3, atol=1e-5):
        return refusal
    given = rest + normalized(module)(inputs) * own["weight"] + own.get("bias", 0)
    if not torch.allclose(given, call.output.to(inputs.dtype), rtol=2e-2, atol=2e-2):
        return refusal
    return Layer(name=name, kind="scale", inputs=1, outputs=call.output.shape[-1], bias="bias" in own, input_group=name, modules=(name,))


def normalized(scale: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a scale multiplies by its weight, as a function of its input: the difference that a weight of one makes to a weight of zero."""
    dtype = torch.promote_types(next(scale.parameters()).dtype, torch.float32)
    one, zero = with_parameters(scale, dtype, 1.0, 0.0), with_parameters(scale, dtype, 0.0, 0.0)
    return lambda inputs: one(inputs.to(dtype)) - zero(inputs.to(dtype))


@torch.no_grad()
def with_parameters(scale: nn.Module, dtype: torch.dtype, weight: Tensor | float, bias: Tensor | float) -> nn.Module:
    """A copy of the module with this weight and bias."""
    twin: Any = copy.deepcopy(scale).to(dtype)
    twin.weight.copy_(torch.as_tensor(weight))
    if getattr(twin, "bias", None) is not None:
        twin.bias.copy_(torch.as_tensor(bias))
    return cast(nn.Module, twin)


def _grouped(layers: list[Layer], calls: dict[str, list[_Call]]) -> tuple[Layer, ...]:
    leaders: dict[tuple[Any, ...], str] = {}
    found = []
    for layer in layers:
        if layer.columns is not None:
            layer = replace(layer, output_group=leaders.setdefault((layer.modules,), layer.name))
        elif layer.kind == "linear" and layer.expert is None:
            seen = tuple(id(call.inputs) for call in calls[layer.modules[0]])
            layer = replace(layer, input_group=leaders.setdefault((layer.inputs, layer.bias, *seen), layer.name))
        found.append(layer)
    return tuple(found)


def layer_device(model: nn.Module, layer: Layer) -> torch.device:
    """Where the layer's parameters are; all of a model's, unless it was placed on several devices."""
    if isinstance(model, Backend):  # whose layers need not be modules
        return model.get_parameter(model.parameter_names(layer)[0]).device
    return next(model.get_submodule(layer.modules[0]).parameters()).device


WITH_SHORTCUT = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no parameter requiring a gradient; both are restored, module by module, at the end.

    What was compiled runs as it was written, because compiled code does not call hooks; and torch's own transformer layers do not take the
    shortcut that calls none of their modules.
    """
    shortcuts = any(isinstance(module, WITH_SHORTCUT) for module in model.modules())  # others' threads are left alone where there is none
    fast = torch.backends.mha.get_fastpath_enabled()
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        if shortcuts:
            torch.backends.mha.set_fastpath_enabled(False)
        # Nothing is compiled before torch._dynamo is loaded, which takes seconds.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        if shortcuts:
            torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
