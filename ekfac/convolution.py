"""Convolutions as linear maps of patches: what lies under the kernel at each place of the output is one input, of each group of channels its own.

Grosse and Martens 2016 (arXiv 1602.01407, section 3.1): the weight's gradient is the sum over places of output gradient ⊗ patch.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unfolded_size(module: Any) -> int:
    """How many numbers a patch has, or one group's part of it."""
    return int(module.in_channels // module.groups * math.prod(module.kernel_size))


def patches(module: Any, inputs: Tensor) -> Tensor:
    """[N, T, I]: what lies under the kernel at each of the T places of the output of `inputs` [N, C, …], in the order of the weight's numbers."""
    padding = module._reversed_padding_repeated_twice  # (before, after) for each dimension, the last one first; "same" is worked out there
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, padding, mode=mode)
    dimensions = len(module.kernel_size)
    for place, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        inputs = inputs.unfold(2 + place, dilation * (size - 1) + 1, stride)[..., ::dilation]  # [N, C, …, kernel so far]
    patch = (1, *range(2 + dimensions, 2 + 2 * dimensions))
    ordered = inputs.permute(0, *range(2, 2 + dimensions), *patch)
    return ordered.reshape(len(inputs), math.prod(ordered.shape[1 : 1 + dimensions]), -1)


def by_group(module: Any, values: Tensor) -> Tensor:
    """[N, T, H, …] from patches or outputs [N, T, …]: what belongs to each of the H groups of channels."""
    return values.reshape(*values.shape[:2], int(module.groups), -1)


def places_first(values: Tensor) -> Tensor:
    """[N, T, O] from the output of a convolution, or its gradient, [N, O, …]."""
    return values.flatten(2).mT
