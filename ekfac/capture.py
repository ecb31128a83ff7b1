"""Capture for torch: every attributed layer's inputs and output gradients, handed over as the backward pass reaches the layer.

The model's parameters need no gradient meanwhile, so no weight gradient is computed; the graph starts at zero probes added to the outputs
of the first layers. One layer's record lives at a time (that of a head tied to its embedding until the embedding is reached), and the model is
left exactly as it was found.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.backend import Backend
from ekfac.layers import Layer, evaluation_mode, normalized
from ekfac.record import EmbeddingIO, LayerIO, LookupIO, Record, ScaleIO


def capture(
    model: nn.Module,
    layers: Sequence[Layer],
    loss: Callable[[], Tensor],
    mask: Tensor,
    consume: Callable[[Layer, Record], None],
) -> float:
    """Runs `loss` (a forward pass that returns the summed loss) and its backward pass; returns the loss.

    `consume(layer, record)` is called once for every layer, from the last to the first that the backward pass reaches; `mask` [N, T] tells
    the positions that the loss reaches. Records are float32 at least. Raises ValueError when a layer was called more than once, was not
    reached, or has another number of rows than the mask, and when the loss is not finite.
    """
    if isinstance(model, Backend):
        return model.capture(layers, loss, mask, consume)
    modules = dict(model.named_modules())
    scales = {layer.name: normalized(modules[layer.name]) for layer in layers if layer.kind == "scale"}
    probes: list[Tensor] = []
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    waiting = {layer.name: set(layer.modules) for layer in layers}

    def reached(layer: Layer, name: str, gradient: Tensor) -> None:
        gradients[name] = gradient
        waiting[layer.name].discard(name)
        if waiting[layer.name]:
            return
        with torch.no_grad():
            used = {name: (inputs.pop(name), gradients.pop(name)) for name in layer.modules}
            if layer.kind == "linear":
                record: Record = _linear_record(layer, *used[layer.name], mask)
            elif layer.kind == "scale":
                record = _scale_record(layer, scales[layer.name](used[layer.name][0]), used[layer.name][1], mask)
            else:
                record = _embedding_record(layer, used, modules, mask)
            consume(layer, record)

    def probed(layer: Layer, name: str, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if name in inputs:
            raise ValueError(f"layer {name!r} was called twice in one forward pass: leave it out of the layers")
        inputs[name] = arguments[0].detach()
        if len(output) == 1 != len(mask) and isinstance(modules[name], nn.Embedding):  # one row of positions for the whole batch
            output = output.expand(len(mask), *output.shape[1:])
        if not output.requires_grad:  # nothing before this layer needs a gradient: the graph starts here
            probes.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
            output = output + probes[-1]
        output.register_hook(lambda gradient: reached(layer, name, gradient))  # type: ignore[no-untyped-call]
        return output

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.enable_grad())
        for layer in layers:
            for name in layer.modules:
                hook = modules[name].register_forward_hook(
                    lambda _, arguments, output, layer=layer, name=name: probed(layer, name, arguments, output)
                )
                stack.callback(hook.remove)
        value = loss()
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()}: the model's weights or its inputs give values that are not finite")
        torch.autograd.grad(value, probes, allow_unused=True)
    if unreached := sorted(name for name, left in waiting.items() if left):
        raise ValueError(f"the backward pass did not reach: {', '.join(unreached)}; leave these out of the layers")
    return float(value.detach())


def _linear_record(layer: Layer, activations: Tensor, gradient: Tensor, mask: Tensor) -> LayerIO:
    return LayerIO(
        activations=_float(_by_position(layer, activations, mask)),
        output_gradients=_float(_by_position(layer, gradient, mask)),
        mask=mask,
        bias=layer.bias,
    )


def _scale_record(layer: Layer, normalized: Tensor, gradient: Tensor, mask: Tensor) -> ScaleIO:
    shape = (*mask.shape, -1, layer.outputs)
    if normalized.shape[:2] != mask.shape:
        raise ValueError(
            f"layer {layer.name!r} saw the shape {tuple(normalized.shape)}, but the mask has {tuple(mask.shape)} positions: leave it out"
        )
    return ScaleIO(normalized=normalized.reshape(shape), output_gradients=_float(gradient).reshape(shape), mask=mask, bias=layer.bias)


def _embedding_record(layer: Layer, used: dict[str, tuple[Tensor, Tensor]], modules: dict[str, nn.Module], mask: Tensor) -> EmbeddingIO:
    lookup, head = None, None
    for name, (inputs, gradient) in used.items():
        module = modules[name]
        if not isinstance(module, nn.Embedding):
            head = _linear_record(layer, inputs, gradient, mask)
            continue
        rows = layer.lookup_factor * _float(_by_position(layer, gradient, mask))
        indices = inputs.expand(len(mask), -1) if len(inputs) == 1 else inputs.reshape(mask.shape)
        if module.padding_idx is not None:  # torch gives this row no gradient
            rows = rows * (indices != module.padding_idx)[:, :, None]
        lookup = LookupIO(indices=indices, row_gradients=rows)
    return EmbeddingIO(lookup=lookup, head=head, mask=mask, num_rows=layer.outputs)


def _by_position(layer: Layer, values: Tensor, mask: Tensor) -> Tensor:
    """[N, T, …] from whatever leading shape the model uses: [N, T, I], [N·T, I] or, for T = 1, [N, I]."""
    rows = values.numel() // values.shape[-1]
    if rows != mask.numel():
        raise ValueError(
            f"layer {layer.name!r} saw {rows} rows, but the mask has {tuple(mask.shape)} positions: leave it out of the layers"
        )
    return values.reshape(*mask.shape, -1)


def _float(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
