"""Capture for torch: every attributed layer's inputs and output gradients, handed over as the backward pass reaches the layer.

The model's parameters need no gradient meanwhile, so no weight gradient is computed; the graph starts at zero probes added to the outputs
of the first layers. One layer's record lives at a time (that of a head tied to its embedding until the embedding is reached, that of a module that is
called several times until its first call is reached), and the model is left exactly as it was found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.backend import Backend
from ekfac.convolution import CONVOLUTIONS, by_group, patches, places_first
from ekfac.experts import Routing, Taken, expert_records, own_forward
from ekfac.functional import LinearUses, own_weight
from ekfac.layers import KNOWN, Layer, evaluation_mode, normalized
from ekfac.projections import Ranges
from ekfac.record import EmbeddingIO, GroupedIO, LayerIO, LookupIO, Places, Record, ScaleIO, SharedTokens

Consume = Callable[[Layer, Record], None]


def capture(
    model: nn.Module,
    layers: Sequence[Layer],
    loss: Callable[[], Tensor],
    mask: Tensor,
    consume: Consume,
) -> float:
    """Runs `loss` (a forward pass that returns the summed loss) and its backward pass; returns the loss.

    `consume(layer, record)` is called once for every layer, from the last to the first that the backward pass reaches. `mask` [N, T] tells
    the positions that the loss reaches, or [N] the sequences; a layer that sees other positions than these, as an encoder's do, is reached by
    the loss where its output gradient is not zero, and a convolution everywhere. Records are float32 at least, each on its layer's device.
    Raises ValueError when a layer was not reached or what it saw cannot be told apart by sequence, and when the loss is not finite.
    """
    if isinstance(model, Backend):
        return model.capture(layers, loss, mask, consume)
    taking = _Taking(model, layers, mask, consume)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.enable_grad())
        taking.install(stack)
        value = loss()
        taking.in_backward = True
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()}: the model's weights or its inputs give values that are not finite")
        torch.autograd.grad(value, taking.probes, allow_unused=True)
    if unreached := taking.unreached():
        raise ValueError(f"the backward pass did not reach: {', '.join(unreached)}; leave these out of the layers")
    return float(value.detach())


@dataclass(kw_only=True)
class _Call:
    """One call of a module: its input, and the gradient at its output once that is known."""

    inputs: Tensor
    gradient: Tensor | None = None


@dataclass(kw_only=True)
class _Waiting:
    """The calls of a layer's modules."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)
    missing: int = 0  # gradients that are not known yet
    done: bool = False


class _Taking:
    """The state of one capture: what has been seen of each layer, and what is still to come."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], mask: Tensor, consume: Consume) -> None:
        self.model, self.mask, self.consume = model, mask, consume
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.members: dict[str, list[Layer]] = {}  # by first module: a layer, or the blocks of one
        for layer in layers:
            if layer.expert is None:
                self.members.setdefault(layer.modules[0], []).append(layer)
        self.whole = [members[0] for members in self.members.values()]
        self.waiting = {name: _Waiting() for name in self.members}
        self.scales = {layer.name: normalized(self.modules[layer.name]) for layer in self.whole if layer.kind == "scale"}
        self.experts: dict[tuple[str, str], dict[int, Layer]] = {}
        for layer in layers:
            if layer.expert is not None and layer.parameter is not None:
                self.experts.setdefault((layer.modules[0], layer.parameter), {})[layer.expert] = layer
        self.experts_left = set(self.experts)
        self.probes: list[Tensor] = []
        self.probe_all = False
        self.in_backward = False

    def install(self, stack: ExitStack) -> None:
        """Hooks and forward passes, which the stack takes away again."""
        own: dict[str, Layer] = {}
        for layer in self.whole:
            for name in layer.modules:
                module = self.modules[name]
                if not isinstance(module, KNOWN) and own_weight(module) is not None:
                    own[name] = layer
                    continue
                hook = module.register_forward_hook(
                    lambda _, arguments, output, layer=layer, name=name: self.taken(layer, name, arguments[0], output)
                )
                stack.callback(hook.remove)
        if own:
            weights = {name: self.modules[name].weight for name in own}
            stack.enter_context(LinearUses(weights, lambda name, inputs, output: self.taken(own[name], name, inputs, output)))
        if self.experts:
            names = list(dict.fromkeys(name for name, _ in self.experts))
            stack.enter_context(own_forward(self.model, names, self.taken_from_experts))

    def unreached(self) -> list[str]:
        left = [name for name, waiting in self.waiting.items() if not waiting.done]
        return sorted([*left, *(f"{name}.*.{parameter}" for name, parameter in self.experts_left)])

    def taken(self, layer: Layer, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Notes a call of a module; the output to go on with."""
        if len(output) == 1 != len(self.mask) and isinstance(self.modules[name], nn.Embedding):  # one row of positions for the whole batch
            output = output.expand(len(self.mask), *output.shape[1:])
        output = self.probed(name, output)
        if self.in_backward:  # activations computed once more, for checkpoints
            return output
        call, waiting = _Call(inputs=inputs.detach()), self.waiting[layer.modules[0]]
        waiting.calls.setdefault(name, []).append(call)
        waiting.missing += 1

        def arrived(gradient: Tensor | None) -> None:
            if gradient is None:
                raise ValueError(f"no gradient reaches layer {name!r}: what follows it in the model is an operation without a derivative")
            call.inputs, call.gradient = call.inputs.to(gradient.device), gradient  # which may come from another device than the layer's
            waiting.missing -= 1
            if waiting.missing == 0 and set(waiting.calls) == set(layer.modules):
                waiting.done = True
                with torch.no_grad():
                    record = self.record(layer, waiting.calls)
                    waiting.calls = {}
                    for member, own in _members(self.members[layer.modules[0]], record):
                        self.consume(member, own)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return output

    def probed(self, name: str, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise ValueError(
                f"layer {name!r} was called without gradients, as under torch.no_grad() or in checkpoints with use_reentrant=True: "
                "leave it out of the layers"
            )
        if output.requires_grad and not self.probes:  # an input needs a gradient, so there is no telling where graphs start
            self.probe_all = True
        if not output.requires_grad or self.probe_all:  # nothing before this layer needs a gradient: the graph starts here
            self.probes.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
            output = output + self.probes[-1]
        return output

    def taken_from_experts(self, name: str) -> Taken:
        def taken(parameter: str, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
            layers = self.experts.get((name, parameter))
            if layers is None:
                return output
            output = self.probed(name, output)
            if self.in_backward:
                return output
            if len(inputs) % self.mask.numel():
                raise ValueError(f"{name!r} routed {len(inputs)} pairs, but the mask has {tuple(self.mask.shape)} positions: leave it out")

            def arrived(gradient: Tensor) -> None:
                self.experts_left.discard((name, parameter))
                mask, bias = _two_dimensional(self.mask.to(gradient.device)), next(iter(layers.values())).bias
                with torch.no_grad():
                    for expert, record in expert_records(
                        _float(inputs.detach().to(gradient.device)), _float(gradient), routing, mask, list(layers), bias
                    ):
                        self.consume(layers[expert], record)

            output.register_hook(arrived)  # type: ignore[no-untyped-call]
            return output

        return taken

    def record(self, layer: Layer, calls: dict[str, list[_Call]]) -> Record:
        mask = self.mask.to(next(call.inputs.device for some in calls.values() for call in some))
        if layer.kind == "linear":
            return _linear_record(layer, self.modules[layer.modules[0]], calls[layer.modules[0]], mask)
        if layer.kind == "grouped":
            return _grouped_record(self.modules[layer.name], _linear_record(layer, self.modules[layer.name], calls[layer.name], mask))
        if layer.kind == "scale":
            return _scale_record(layer, self.scales[layer.name], calls[layer.name], mask)
        lookup, head = None, None
        tables = [name for name in layer.modules if isinstance(self.modules[name], nn.Embedding)]
        if tables:
            lookups = [call for name in tables for call in calls[name]]
            lookup = _lookup(layer, self.modules[tables[0]], lookups, mask)
        for name in layer.modules:
            if name not in tables:
                head = _linear_record(layer, self.modules[name], calls[name], mask)
        own = lookup.mask if lookup is not None else None
        reached = head.mask if head is not None else own
        return EmbeddingIO(lookup=lookup, head=head, mask=_two_dimensional(mask) if reached is None else reached, num_rows=layer.outputs)


def _members(layers: Sequence[Layer], record: Record) -> Iterator[tuple[Layer, Record]]:
    """Each layer's own record, from that of the module whose blocks they are."""
    if not layers[0].is_block:
        yield layers[0], record
        return
    assert isinstance(record, LayerIO)
    by_rows = layers[0].rows is not None
    shared = SharedTokens(sum(layer.shape[0 if by_rows else 1] for layer in layers))
    for layer in layers:
        yield (
            layer,
            replace(
                record,
                activations=_some(record.activations, layer.columns),
                output_gradients=_some(record.output_gradients, layer.rows),
                bias=layer.bias,
                shared_inputs=shared if by_rows else None,
                shared_outputs=None if by_rows else shared,
            ),
        )


def _some(values: Tensor, ranges: Ranges | None) -> Tensor:
    """Those of the numbers in the last dimension."""
    if ranges is None:
        return values
    if len(ranges) > 1:
        return torch.cat([values[..., first:end] for first, end in ranges], -1)
    first, end = ranges[0] if ranges else (0, 0)
    return values[..., first:end]


def _linear_record(layer: Layer, module: nn.Module, calls: Sequence[_Call], mask: Tensor) -> LayerIO:
    parts = []
    for call in calls:
        inputs, gradient = call.inputs, _known(call.gradient)
        if isinstance(module, CONVOLUTIONS):
            activations, gradients = patches(module, inputs), places_first(gradient)
            reached = mask.reshape(len(mask), -1).any(1)[:, None].expand(activations.shape[:2])
        else:
            activations, gradients = (_by_position(layer, values, mask) for values in (inputs, gradient))
            reached = _reached(gradients, mask)
        parts.append((_float(activations), _float(gradients), reached))
    activations, gradients, reached = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    places = _repeated([len(part[2][0]) for part in parts], mask)
    return LayerIO(activations=activations, output_gradients=gradients, mask=reached, bias=layer.bias, places=places)


def _grouped_record(module: nn.Module, record: LayerIO) -> GroupedIO:
    """From the record of patches of all channels."""
    return GroupedIO(
        activations=by_group(module, record.activations),
        output_gradients=by_group(module, record.output_gradients),
        mask=record.mask,
        bias=record.bias,
        places=record.places,
    )


def _scale_record(layer: Layer, normalized: Callable[[Tensor], Tensor], calls: Sequence[_Call], mask: Tensor) -> ScaleIO:
    parts = []
    for call in calls:
        values, gradient = normalized(call.inputs), _float(_known(call.gradient))
        rows = values.numel() // values.shape[-1]
        if values.ndim == 2 and rows == mask.numel():
            shape: tuple[int, ...] = (*_two_dimensional(mask).shape, 1, layer.outputs)
        elif values.ndim >= 3 and len(values) == len(mask):
            shape = (*values.shape[:2], -1, layer.outputs)
        elif values.ndim == 2 and rows == len(mask):
            shape = (len(mask), 1, 1, layer.outputs)
        else:
            raise ValueError(
                f"layer {layer.name!r} saw the shape {tuple(values.shape)}, but the mask has {tuple(mask.shape)} positions: leave it out"
            )
        values, gradient = values.reshape(shape), gradient.reshape(shape)
        parts.append((values, gradient, _reached(gradient.flatten(2), mask)))
    values, gradients, reached = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    places = _repeated([len(part[2][0]) for part in parts], mask)
    return ScaleIO(normalized=values, output_gradients=gradients, mask=reached, bias=layer.bias, places=places)


def _lookup(layer: Layer, table: nn.Embedding, calls: Sequence[_Call], mask: Tensor) -> LookupIO:
    parts = []
    for call in calls:
        rows = layer.lookup_factor * _float(_by_position(layer, _known(call.gradient), mask))
        indices = call.inputs.expand(len(mask), -1) if len(call.inputs) == 1 else call.inputs.reshape(rows.shape[:2])
        if table.padding_idx is not None:  # torch gives this row no gradient
            rows = rows * (indices != table.padding_idx)[:, :, None]
        parts.append((indices, rows, _reached(rows, mask)))
    indices, rows, reached = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    return LookupIO(indices=indices, row_gradients=rows, mask=reached, places=_repeated([len(part[2][0]) for part in parts], mask))


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _by_position(layer: Layer, values: Tensor, mask: Tensor) -> Tensor:
    """[N, T, …] from whatever leading shape the model uses: [N, T, I], [N·T, I], [N, …, I] or, for T = 1, [N, I]."""
    rows, shape = values.numel() // values.shape[-1], _two_dimensional(mask).shape
    if rows == mask.numel():
        return values.reshape(*shape, -1)
    if len(values) == len(mask):
        return values.reshape(len(mask), rows // len(mask), -1)
    raise ValueError(f"layer {layer.name!r} saw {rows} rows, but the mask has {tuple(mask.shape)} positions: leave it out of the layers")


def _reached(gradients: Tensor, mask: Tensor) -> Tensor:
    """[N, T] bool: the mask, for a layer that sees its positions; for another, where the gradient is not zero."""
    mask = _two_dimensional(mask)
    return mask if gradients.shape[:2] == mask.shape else (gradients != 0).any(2)


def _two_dimensional(mask: Tensor) -> Tensor:
    return mask if mask.ndim == 2 else mask.reshape(len(mask), -1)


def _repeated(lengths: Sequence[int], mask: Tensor) -> Places | None:
    """Where entries stand in a record that several calls over the positions of the mask make."""
    count = _two_dimensional(mask).shape[1]
    if len(lengths) == 1 or any(length != count for length in lengths):
        return None
    indices = torch.arange(count, device=mask.device).repeat(len(lengths))
    return Places(indices=indices.expand(len(mask), -1), count=count)


def _float(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
