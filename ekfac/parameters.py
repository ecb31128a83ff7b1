"""Between the normal form of a layer's gradient, [..., O, J], and the model's own parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac.backend import Backend
from ekfac.layers import Layer
from ekfac.projections import numbers


def as_parameters(model: nn.Module, layers: Sequence[Layer], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors [..., O, J] by layer name as tensors of the parameters' shapes (after the same leading dimensions), by parameter name.

    Experts and blocks that are not among the layers have zeros.
    """
    if isinstance(model, Backend):
        return model.as_parameters(layers, vectors)
    found: dict[str, Tensor] = {}
    for layer in layers:
        vector, (weight, bias) = vectors[layer.name], parameter_names(model, layer)
        leading, own = vector.shape[:-2], model.get_parameter(weight)
        matrix = vector[..., 0] if layer.kind == "scale" else vector[..., : layer.inputs]
        if layer.is_block:
            _put_block(model, layer, weight, bias, vector, found)
            continue
        matrix = matrix.mT if _is_transposed(model, layer) else matrix
        if layer.expert is None:
            found[weight] = matrix.reshape(*leading, *own.shape)
            if bias is not None:
                found[bias] = vector[..., -1]
            continue
        for name, part in ((weight, matrix), (bias, vector[..., -1])):
            if name is not None:
                if name not in found:
                    found[name] = vector.new_zeros((*leading, *model.get_parameter(name).shape))
                found[name].select(len(leading), layer.expert).copy_(part)
    return found


def as_vectors(model: nn.Module, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_parameters`."""
    if isinstance(model, Backend):
        return model.as_vectors(layers, parameters)
    found = {}
    for layer in layers:
        weight, bias = parameter_names(model, layer)
        own = model.get_parameter(weight).ndim
        matrix, column = parameters[weight], None if bias is None else parameters[bias]
        if layer.expert is not None:
            matrix, column = matrix.select(-own, layer.expert), None if column is None else column.select(-2, layer.expert)
        elif own > 2:  # a convolution's kernel
            matrix = matrix.flatten(-(own - 1))
        if layer.kind == "scale":
            matrix = matrix[..., None]
        elif _is_transposed(model, layer):
            matrix = matrix.mT
        if layer.is_block:
            rows, columns = _places(layer, matrix)
            matrix, column = matrix[..., rows, :][..., columns], None if column is None else column[..., rows]
        found[layer.name] = matrix if column is None else torch.cat([matrix, column[..., None]], -1)
    return found


def _put_block(model: nn.Module, layer: Layer, weight: str, bias: str | None, vector: Tensor, found: dict[str, Tensor]) -> None:
    for name in (weight, bias):
        if name is not None and name not in found:
            found[name] = vector.new_zeros((*vector.shape[:-2], *model.get_parameter(name).shape))
    matrix = found[weight].mT if _is_transposed(model, layer) else found[weight]
    rows, columns = _places(layer, matrix)
    matrix[..., rows[:, None], columns] = vector[..., : layer.inputs]
    if bias is not None:
        found[bias][..., rows] = vector[..., -1]


def _places(layer: Layer, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and which columns of its module's matrix a block has."""
    outputs, inputs = matrix.shape[-2:]
    ranges = (layer.rows or ((0, outputs),), ((0, inputs),) if layer.columns is None else layer.columns)
    rows, columns = (torch.tensor(list(numbers(some)), dtype=torch.int64, device=matrix.device) for some in ranges)
    return rows, columns


def parameter_names(model: nn.Module, layer: Layer) -> tuple[str, str | None]:
    """The names of the parameters that hold the layer's weight and bias."""
    if isinstance(model, Backend):
        return model.parameter_names(layer)
    if layer.parameter is not None:
        weight = f"{layer.modules[0]}.{layer.parameter}"
        return weight, f"{weight}_bias" if layer.bias else None
    owner = next((name for name in layer.modules if getattr(model.get_submodule(name), "bias", None) is not None), None)
    return f"{layer.modules[0]}.weight", f"{owner}.bias" if layer.bias else None


def _is_transposed(model: nn.Module, layer: Layer) -> bool:
    module: Any = model.get_submodule(layer.modules[0])
    return isinstance(module, Conv1D) if layer.expert is None else bool(module.is_transposed)
