"""A second device where there is none: its tensors' values lie on the CPU, and an operation that mixes devices fails as on GPUs.

A backend of torch, registered once a process, whose operations run on the CPU. Work on it within `pretended()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
PRETENDED = torch.device("pretended:0")

MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor of the device that is pretended."""

    values: Tensor  # where they really are

    @staticmethod
    def __new__(cls, values: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype, device=PRETENDED
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees operations without a tensor too, which make tensors on a device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within it, PRETENDED is a device like others."""
    with _Mode():
        yield PRETENDED


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    # A single number of the CPU may go with tensors of a GPU, and indices of the CPU may index these.
    indices = pytree.tree_leaves(args[1]) if "index" in operation.name() and len(args) > 1 and isinstance(args[1], list | tuple) else []
    bound = [one for one in tensors if isinstance(one, Elsewhere) or not (one.ndim == 0 or any(one is index for index in indices))]
    devices = {one.device for one in bound}
    if len(devices) > 1 and operation not in MOVES:
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, but found {sorted(map(str, devices))}")
    asked = kwargs.get("device")
    device = asked if asked is not None else args[0].device if operation in MOVES else next(iter(devices), torch.device("cpu"))
    if device.type != PRETENDED.type:
        plain = pytree.tree_map_only(Elsewhere, lambda one: one.values, (args, kwargs))
        return operation(*plain[0], **plain[1])
    inner_args, inner_kwargs = pytree.tree_map_only(Elsewhere, lambda one: one.values, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    return return_and_correct_aliasing(
        operation, args, kwargs, pytree.tree_map_only(Tensor, Elsewhere, operation(*inner_args, **inner_kwargs))
    )
