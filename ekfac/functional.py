"""Linear maps that a module's own code computes from its own weight, as the routers of mixtures of experts do: no module stands for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Used = Callable[[str, Tensor, Tensor], Tensor]
"""(name, inputs, output) → the output that the forward pass goes on with."""


class LinearUses(TorchFunctionMode):
    """Within, every `torch.nn.functional.linear` with one of these weights is handed to `used`."""

    def __init__(self, weights: Mapping[str, Tensor], used: Used) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.used = used

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            inputs, weight = (*args, *(kwargs or {}).values())[:2]
            if id(weight) in self.names:
                return self.used(self.names[id(weight)], inputs, output)
        return output


def own_weight(module: torch.nn.Module) -> Tensor | None:
    """The weight that a module may multiply by in code of its own: a parameter of this name and of two dimensions."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim == 2 else None
