"""Capture for torch: every attributed layer's inputs and output gradients, handed over as the backward pass reaches the layer.

The model's parameters need no gradient meanwhile, so no weight gradient is computed; the graph starts at zero probes added to the outputs
of the first layers. One layer's record lives at a time, and the model is left exactly as it was found.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.layers import Layer, evaluation_mode
from ekfac.record import LayerIO


def capture(
    model: nn.Module,
    layers: Sequence[Layer],
    loss: Callable[[], Tensor],
    mask: Tensor,
    consume: Callable[[Layer, LayerIO], None],
) -> float:
    """Runs `loss` (a forward pass that returns the summed loss) and its backward pass; returns the loss.

    `consume(layer, record)` is called once for every layer, from the last to the first that the backward pass reaches; `mask` [N, T] tells
    the positions that the loss reaches. Records are float32 at least. Raises ValueError when a layer was called more than once, was not
    reached, or has another number of rows than the mask, and when the loss is not finite.
    """
    probes: list[Tensor] = []
    pending: dict[str, Tensor] = {}

    def reached(layer: Layer, gradient: Tensor) -> None:
        activations = pending.pop(layer.name)
        with torch.no_grad():
            consume(layer, _record(layer, activations, gradient, mask))

    def probed(layer: Layer, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if layer.name in pending:
            raise ValueError(f"layer {layer.name!r} was called twice in one forward pass: leave it out of the layers")
        pending[layer.name] = inputs[0].detach()
        if not output.requires_grad:  # nothing before this layer needs a gradient: the graph starts here
            probes.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
            output = output + probes[-1]
        output.register_hook(lambda gradient: reached(layer, gradient))  # type: ignore[no-untyped-call]
        return output

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.enable_grad())
        for layer in layers:
            hook = modules[layer.name].register_forward_hook(lambda _, inputs, output, layer=layer: probed(layer, inputs, output))
            stack.callback(hook.remove)
        value = loss()
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()}: the model's weights or its inputs give values that are not finite")
        torch.autograd.grad(value, probes, allow_unused=True)
    if pending:
        raise ValueError(f"the backward pass did not reach: {', '.join(sorted(pending))}; leave these out of the layers")
    return float(value.detach())


def _record(layer: Layer, activations: Tensor, gradient: Tensor, mask: Tensor) -> LayerIO:
    """The normal form, from whatever leading shape the model uses: [N, T, I], [N·T, I] or, for T = 1, [N, I]."""
    rows = activations.numel() // activations.shape[-1]
    if rows != mask.numel():
        raise ValueError(
            f"layer {layer.name!r} saw {rows} rows, but the mask has {tuple(mask.shape)} positions: leave it out of the layers"
        )
    return LayerIO(
        activations=_float(activations).reshape(*mask.shape, -1),
        output_gradients=_float(gradient).reshape(*mask.shape, -1),
        mask=mask,
        bias=layer.bias,
    )


def _float(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
