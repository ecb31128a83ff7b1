"""The activation of a direction inside the model: a feature of a sparse autoencoder, a probe, a steering vector.

A safetensors file holds one tensor: the vector, under the name of the module whose output it is a direction of.
"""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ekfac import Backend, SequenceBatch, evaluation_mode
from influence.errors import RequestError
from influence.measurement import MeasuredFunction

Reduction = Literal["mean", "last", "max"]
"""Over the positions at which the counted tokens are read."""


def direction(layer: str, vector: Tensor, reduce: Reduction, facts: Mapping[str, Any]) -> MeasuredFunction:
    """⟨output of the module `layer`, vector⟩ where the counted tokens are the input: its mean over them, at the last, or the largest."""
    if reduce not in get_args(Reduction):
        raise RequestError(f"the activation is reduced by one of {', '.join(get_args(Reduction))}, not by {reduce!r}")

    def values(model: nn.Module, batch: SequenceBatch) -> Tensor:
        output = _output(model, layer, batch.tokens)
        products = output @ vector.to(output)
        if reduce == "max":
            return products.masked_fill(~batch.counted, -torch.inf).amax(1)
        if reduce == "last":
            positions = torch.arange(batch.counted.shape[1], device=batch.tokens.device)
            last = (positions * batch.counted).argmax(1)
            return products.gather(1, last[:, None])[:, 0]
        return (products * batch.counted).sum(1) / batch.counted.sum(1)

    print_of = hashlib.sha256(vector.double().cpu().numpy().tobytes()).hexdigest()
    return MeasuredFunction(
        values=values, unit="activation", facts={"layer": layer, "reduce": reduce, "vector": f"sha256:{print_of}", **facts}
    )


def _output(model: nn.Module, layer: str, tokens: Tensor) -> Tensor:
    """What the module gives, [N, T, D], in float32 at least, in one forward pass of the whole model."""
    outputs: list[Any] = []
    if isinstance(model, Backend):
        handle = model.on_output(layer, outputs.append)
    else:
        handle = model.get_submodule(layer).register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    found = [output[0] if isinstance(output, tuple) else output for output in outputs]
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim != 3 or found[0].shape[:2] != tokens.shape:
        raise RequestError(f"the layer {layer!r} does not give one vector for each position: take another, such as a block or its MLP")
    return found[0].to(tokens.device, torch.promote_types(found[0].dtype, torch.float32))


def read_direction(path: Path, model: nn.Module) -> tuple[str, Tensor]:
    """The module's name and the vector [D]. Raises RequestError for a file of another form, an unknown module and a vector of another width."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"--direction: {path} cannot be read as safetensors: {error}") from None
    if len(tensors) != 1:
        raise RequestError(f"--direction: {path} holds {len(tensors)} tensors; expected one, the vector, under the name of a module")
    ((layer, vector),) = tensors.items()
    known = model.output_names() if isinstance(model, Backend) else [name for name, _ in model.named_modules() if name]
    if layer not in known:
        nearest = difflib.get_close_matches(layer, known, n=3, cutoff=0.3) or known[:3]
        raise RequestError(f"--direction: {path}: the model has no module {layer!r}; the nearest are {', '.join(nearest)}")
    parameter = next(model.parameters())
    with evaluation_mode(model), torch.no_grad():
        width = _output(model, layer, torch.zeros((1, 2), dtype=torch.int64, device=parameter.device)).shape[-1]
    if vector.shape != (width,):
        raise RequestError(f"--direction: {path}: the vector has shape {tuple(vector.shape)}, but {layer} gives {width} numbers a position")
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise RequestError(f"--direction: {path}: the vector holds NaN or infinity, or is all zero")
    return layer, vector.to(torch.promote_types(parameter.dtype, torch.float32))
