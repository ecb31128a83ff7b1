"""Mixtures of experts whose weights are parameters of three dimensions, one matrix for each expert, as Hugging Face stores them.

No module stands for a single expert, so their forward pass is computed here, from the module's own parameters: tokens sorted by expert, one product
for each expert that is reached. An expert's record holds the tokens routed to it and nothing else.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekfac.record import LayerIO, Places

DOWN = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One of the parameters that hold a matrix for each expert."""

    name: str
    inputs: int
    outputs: int
    bias: str | None

    @staticmethod
    def of(module: Any, name: str) -> "Matrix":
        shape = getattr(module, name).shape[1:]
        outputs, inputs = reversed(shape) if module.is_transposed else shape
        return Matrix(name=name, inputs=int(inputs), outputs=int(outputs), bias=f"{name}_bias" if module.has_bias else None)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which tokens reach which expert, sorted by expert and then by token; S pairs of the two."""

    tokens: Tensor  # [S]
    counts: list[int]  # pairs of each expert


Taken = Callable[[str, Tensor, Tensor, Routing], Tensor]
"""(parameter, inputs [S, I], outputs [S, O], routing) → the outputs that the forward pass goes on with."""


def expert_matrices(module: nn.Module) -> tuple[Matrix, Matrix] | None:
    """The matrices of a module that is such a mixture: into the experts' inner width, and out of it; None for any other module."""
    own = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    known = ("is_transposed", "has_bias", "has_gate", "num_experts")
    if own != {first, DOWN} or not all(hasattr(module, name) for name in known):
        return None
    return Matrix.of(module, first), Matrix.of(module, DOWN)


def experts_forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, taken: Taken | None = None) -> Tensor:
    """What the module gives for hidden states [..., D], the numbers of the chosen experts [M, k] and their weights [M, k]."""
    matrices = expert_matrices(module)
    assert matrices is not None
    up, down = matrices
    flat = hidden.reshape(-1, hidden.shape[-1])
    routing, order = _route(index.reshape(len(flat), -1), module.num_experts)
    inner = flat[routing.tokens]
    for matrix in (up, down):
        outputs = _grouped(module, matrix, inner, routing.counts)
        outputs = outputs if taken is None else taken(matrix.name, inner, outputs, routing)
        if matrix is up:
            inner = module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)
    weighted = outputs * weights.reshape(-1)[order][:, None]
    summed = torch.zeros_like(flat, dtype=weighted.dtype).index_add(0, routing.tokens, weighted)
    return summed.to(hidden.dtype).reshape(hidden.shape)


def _route(index: Tensor, num_experts: int) -> tuple[Routing, Tensor]:
    """The routing, and the order that sorts the pairs (token, choice), counted row by row."""
    chosen = index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=num_experts)
    return Routing(tokens=order // index.shape[1], counts=counts.tolist()), order


def _grouped(module: Any, matrix: Matrix, inputs: Tensor, counts: Sequence[int]) -> Tensor:
    # unbind, because the backward pass of one index for each expert would make a gradient of all experts for each of them
    matrices = getattr(module, matrix.name).unbind(0)
    biases = [None] * len(matrices) if matrix.bias is None else getattr(module, matrix.bias).unbind(0)
    parts = [
        functional.linear(part, weight.T if module.is_transposed else weight, bias)
        for part, weight, bias in zip(torch.split(inputs, list(counts)), matrices, biases, strict=True)
        if len(part)
    ]
    return torch.cat(parts)


def given(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Hidden states, indices and weights of a call; None when it was called with something else."""
    values = list(inspect.signature(type(module).forward).bind(module, *arguments, **named).arguments.values())[1:]
    if len(values) != 3 or not all(isinstance(value, Tensor) for value in values) or values[1].is_floating_point():
        return None
    return values[0], values[1], values[2]


@contextmanager
def own_forward(model: nn.Module, names: Sequence[str], taken: Callable[[str], Taken] | None = None) -> Iterator[None]:
    """Within, these modules compute by `experts_forward`; `taken(name)` is what a module's products are handed to."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    before = [module.__dict__.get("forward") for module in modules]  # accelerate keeps one there
    try:
        for name, module in zip(names, modules, strict=True):
            # In the module's own dictionary, where it hides the method of its class until it is deleted again.
            module.__dict__["forward"] = _forward(module, taken and taken(name))
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _forward(module: nn.Module, taken: Taken | None) -> Callable[..., Tensor]:
    def forward(*arguments: Any, **named: Any) -> Tensor:
        call = given(module, arguments, named)
        assert call is not None
        return experts_forward(module, *call, taken)

    return forward


def expert_records(
    inputs: Tensor, gradients: Tensor, routing: Routing, mask: Tensor, chosen: Sequence[int], bias: bool
) -> Iterator[tuple[int, LayerIO]]:
    """(expert, record) for the chosen experts, in their order, of the positions in `mask` [N, T] that were routed to each.

    `inputs` [S, I] and `gradients` [S, O] are those of all pairs. Records have as many places as the sequence that sends an expert most tokens.
    """
    num_sequences, length = mask.shape
    reached = mask.reshape(-1)[routing.tokens]
    owners = torch.repeat_interleave(
        torch.arange(len(routing.counts), device=mask.device), torch.tensor(routing.counts, device=mask.device), output_size=len(reached)
    )
    cells = (owners * num_sequences + routing.tokens // length)[reached]  # ascending: of expert and sequence
    per_cell = torch.bincount(cells, minlength=len(routing.counts) * num_sequences)
    ranks = torch.arange(len(cells), device=mask.device) - (per_cell.cumsum(0) - per_cell)[cells]
    sequences, positions = cells % num_sequences, routing.tokens[reached] % length
    inputs, gradients = inputs[reached], gradients[reached]
    by_expert = per_cell.reshape(-1, num_sequences)
    sizes, longest = by_expert.sum(1).tolist(), by_expert.amax(1).tolist()
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    for expert in chosen:
        some = slice(starts[expert], starts[expert + 1])
        where = sequences[some], ranks[some]

        def laid_out(values: Tensor, shape: tuple[int, ...], where: tuple[Tensor, Tensor] = where) -> Tensor:
            return values.new_zeros(shape).index_put_(where, values)

        shape = (num_sequences, longest[expert])
        yield (
            expert,
            LayerIO(
                activations=laid_out(inputs[some], (*shape, inputs.shape[1])),
                output_gradients=laid_out(gradients[some], (*shape, gradients.shape[1])),
                mask=laid_out(reached[reached][some], shape),
                bias=bias,
                places=Places(indices=laid_out(positions[some], shape), count=length),
            ),
        )
