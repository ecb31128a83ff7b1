"""The records of a JAX model's layers, from what was seen at their marks."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ekfac.jax_layers import Site
from ekfac.jax_tape import Place
from ekfac.layers import Layer
from ekfac.record import EmbeddingIO, LayerIO, LookupIO, Record, ScaleIO


def record(
    layer: Layer, site: Site, tapped: Mapping[str, Place], inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], mask: Tensor
) -> Record:
    def of(values: Mapping[str, Tensor], use: str, width: tuple[int, ...]) -> Tensor:
        found = values[f"{site.module}:{use}"][site.index]
        positions = found.numel() // (len(found) * prod(width))
        return found.reshape(len(found), positions, *width)[: len(mask), : mask.shape[1]]

    def linear(use: str) -> LayerIO:
        return LayerIO(
            activations=floating(of(inputs, use, (layer.inputs,))),
            output_gradients=floating(of(outputs, use, (layer.outputs,))),
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
            normalized=floating(of(inputs, "scale", width)),
            output_gradients=floating(of(outputs, "scale", width)),
            mask=mask,
            bias=layer.bias,
        )
    lookup = None
    if "lookup" in uses:
        indices, rows = of(inputs, "lookup", ()), floating(of(outputs, "lookup", (layer.inputs,)))
        lookup = LookupIO(indices=indices.long(), row_gradients=rows)
    head = linear("head" if "head" in uses else "linear") if uses - {"lookup"} else None
    return EmbeddingIO(lookup=lookup, head=head, mask=mask, num_rows=layer.outputs)


def _positions(shape: tuple[int, ...]) -> int:
    """Of a value marked in the trace of one sequence."""
    return shape[1] if shape[0] == 1 and len(shape) > 2 else shape[0]


def floating(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
