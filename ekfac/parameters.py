"""Between the normal form of a layer's gradient, [..., O, J], and the model's own parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac.backend import Backend
from ekfac.layers import Layer


def as_parameters(model: nn.Module, layers: Sequence[Layer], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors [..., O, J] by layer name as tensors of the parameters' shapes (after the same leading dimensions), by parameter name."""
    if isinstance(model, Backend):
        return model.as_parameters(layers, vectors)
    found = {}
    for layer in layers:
        vector, (weight, bias) = vectors[layer.name], parameter_names(model, layer)
        if layer.kind == "scale":
            found[weight] = vector[..., 0]
        else:
            matrix = vector[..., : layer.inputs]
            found[weight] = matrix.mT if _is_transposed(model, layer) else matrix
        if bias is not None:
            found[bias] = vector[..., -1]
    return found


def as_vectors(model: nn.Module, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_parameters`."""
    if isinstance(model, Backend):
        return model.as_vectors(layers, parameters)
    found = {}
    for layer in layers:
        weight, bias = parameter_names(model, layer)
        matrix = parameters[weight]
        if layer.kind == "scale":
            matrix = matrix[..., None]
        elif _is_transposed(model, layer):
            matrix = matrix.mT
        found[layer.name] = matrix if bias is None else torch.cat([matrix, parameters[bias][..., None]], -1)
    return found


def parameter_names(model: nn.Module, layer: Layer) -> tuple[str, str | None]:
    """The names of the layer's weight and bias among the model's parameters."""
    if isinstance(model, Backend):
        return model.parameter_names(layer)
    owner = next((name for name in layer.modules if getattr(model.get_submodule(name), "bias", None) is not None), None)
    return f"{layer.modules[0]}.weight", f"{owner}.bias" if layer.bias else None


def _is_transposed(model: nn.Module, layer: Layer) -> bool:
    return isinstance(model.get_submodule(layer.modules[0]), Conv1D)
