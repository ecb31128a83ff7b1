"""Parameters of a JAX model and vectors [O, J] of its layers, one made from the other; several layers may be parts of one stacked parameter."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ekfac.jax_layers import Shapes, Site


def as_parameters(sites: Iterable[Site], vectors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """As `ekfac.as_parameters`."""
    found: dict[str, Tensor] = {}
    for site in sites:
        layer, vector = site.layer, vectors[site.layer.name]
        matrix = vector[..., 0] if layer.kind == "scale" else vector[..., : layer.inputs]
        parts = {site.weight: matrix.mT if site.transposed else matrix} | ({site.bias: vector[..., -1]} if site.bias else {})
        leading = vector.shape[:-2]
        for name, part in parts.items():
            shape = shapes[name]
            whole = found.setdefault(name, part.new_zeros((*leading, *shape)))
            _step_of(whole, len(leading), site.index).copy_(part.reshape(*leading, *shape[len(site.index) :]))
    return found


def as_vectors(sites: Iterable[Site], parameters: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """As `ekfac.as_vectors`."""
    found = {}
    for site in sites:
        layer = site.layer
        matrix, leading = _part(site, site.weight, parameters, shapes)
        if layer.kind == "scale":
            matrix = matrix[..., None]
        elif site.transposed:
            matrix = matrix.reshape(*leading, layer.inputs, layer.outputs).mT
        if site.bias is not None:
            bias, leading = _part(site, site.bias, parameters, shapes)
            matrix = torch.cat([matrix, bias.reshape(*leading, layer.outputs, 1)], -1)
        found[layer.name] = matrix
    return found


def _part(site: Site, name: str, parameters: Mapping[str, Tensor], shapes: Shapes) -> tuple[Tensor, tuple[int, ...]]:
    """The layer's own part of a parameter with further leading dimensions, and the sizes of these."""
    whole = parameters[name]
    num_leading = whole.ndim - len(shapes[name])
    return _step_of(whole, num_leading, site.index), tuple(whole.shape[:num_leading])


def _step_of(values: Tensor, dimension: int, index: Sequence[int]) -> Tensor:
    """A view of these steps of scans, whose dimensions begin at the given one."""
    for step in index:
        values = values.select(dimension, step)
    return values
