"""Which layers of a torch model can be attributed, and which parameters are left out and why.

A layer is an `nn.Linear` (or a subclass) or a Hugging Face `Conv1D`. Whether it really takes part, how often, and which layers share
an input is found by running the model once.
"""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MAX_FACTOR_SIZE = 20_480
"""Larger covariances (a vocabulary's) are refused: a float64 matrix of this size takes 3.4 GB, its eigenvectors as much again."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An attributed layer: its module's name and the shape [outputs, inputs (+ 1)] of its gradient."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    input_group: str
    """Name of the first layer fed the very same tensor: such layers share one input covariance and one eigenbasis."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, J): the shape of the layer's gradient, the bias as its last column."""
        return self.outputs, self.inputs + self.bias


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What share of a model's parameters its attributed layers hold, and why each other module is left out."""

    layers: tuple[Layer, ...]
    attributed: int
    total: int
    excluded: dict[str, str]  # module name → reason

    @property
    def share(self) -> float:
        return self.attributed / self.total


def attributable_layers(model: nn.Module, run: Callable[[nn.Module], Any], patterns: Sequence[str] = ("*",)) -> Coverage:
    """The layers of `model` that can be attributed and match one of the glob `patterns`, in the order of the model's modules.

    `run` must call the model once on a small input; it is called without gradients. Raises ValueError when a pattern matches no
    layer that can be attributed, or nothing is left.
    """
    candidates: dict[str, nn.Module] = {}
    excluded: dict[str, str] = {}
    for name, module, reason in _judged_modules(model):
        if reason is None:
            candidates[name] = module
        else:
            excluded[name] = reason
    calls = _calls(model, candidates, run)
    for name in [name for name in candidates if len(calls[name]) != 1]:
        del candidates[name]
        count = len(calls[name])
        excluded[name] = "not called in the forward pass" if count == 0 else f"called {count} times in one forward pass"
    for pattern in patterns:
        if not fnmatch.filter(candidates, pattern):
            known = ", ".join(list(candidates)[:3]) or "none"
            raise ValueError(f"no attributable layer matches {pattern!r}; there are {len(candidates)}, such as: {known}")
    chosen = [name for name in candidates if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError("the model has no layer that can be attributed (nn.Linear or Conv1D called once in a forward pass)")
    excluded |= {name: "not selected by the layer patterns" for name in candidates if name not in chosen}
    layers = _grouped({name: candidates[name] for name in chosen}, {name: calls[name][0] for name in chosen})
    attributed = sum(layer.outputs * (layer.inputs + layer.bias) for layer in layers)
    return Coverage(
        layers=layers, attributed=attributed, total=sum(p.numel() for p in model.parameters()), excluded=dict(sorted(excluded.items()))
    )


def _judged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, reason to leave it out or None) for every module that owns parameters."""
    owners: dict[int, str] = {}
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        tied = [key for key, p in own.items() if uses[id(p)] > 1]
        first = {owners.setdefault(id(own[key]), name) for key in tied} - {name}
        yield name, module, _reason(module, own, tied, first)


def _reason(module: nn.Module, own: dict[str, nn.Parameter], tied: list[str], first: set[str]) -> str | None:
    if first:
        return f"tied to {', '.join(sorted(first))}, which is not attributed"
    if isinstance(module, nn.Embedding):
        return "embedding: not attributed by this version"
    if not isinstance(module, nn.Linear | Conv1D):
        if any(p.ndim >= 3 for p in own.values()):
            return f"{type(module).__name__}: weights of three dimensions (experts), which no module hook sees"
        return f"{type(module).__name__}: not a linear layer"
    if tied:
        return "its weight is used by another module too"
    if not module.weight.is_floating_point() or module.weight.ndim != 2:
        return f"weight of type {module.weight.dtype} (quantized), which has no gradient"
    if max(module.weight.shape) > MAX_FACTOR_SIZE:
        return f"a covariance of {max(module.weight.shape):,} × {max(module.weight.shape):,} would be needed"
    return None


def _calls(model: nn.Module, modules: dict[str, nn.Module], run: Callable[[nn.Module], Any]) -> dict[str, list[Tensor]]:
    """The inputs each module was called with. The tensors are kept until all are known, so that their identities differ."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0])) for name, module in modules.items()]
    try:
        with evaluation_mode(model), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _grouped(modules: dict[str, nn.Module], inputs: dict[str, Tensor]) -> tuple[Layer, ...]:
    leaders: dict[tuple[int, bool], str] = {}
    layers = []
    for name, module in modules.items():
        weight: Any = module.weight
        rows, columns = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
        bias = module.bias is not None
        leader = leaders.setdefault((id(inputs[name]), bias), name)
        layers.append(Layer(name=name, inputs=int(columns), outputs=int(rows), bias=bias, input_group=leader))
    return tuple(layers)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no parameter requiring a gradient; both are restored, module by module, at the end."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
