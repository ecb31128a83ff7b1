"""Convolutions as linear maps of patches: what lies under the kernel at each place of the output is one input.

Grosse and Martens 2016 (arXiv 1602.01407, section 3.1): the weight's gradient is the sum over places of output gradient ⊗ patch.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def unfolded_size(module: Any) -> int:
    """How many numbers a patch has."""
    return int(module.in_channels * math.prod(module.kernel_size))


def patches(module: Any, inputs: Tensor) -> Tensor:
    """[N, T, I]: what lies under the kernel at each of the T places of the output of `inputs` [N, C, …], in the order of the weight's numbers."""
    padding = module._reversed_padding_repeated_twice  # (before, after) for each dimension, the last one first; "same" is worked out there
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, padding, mode=mode)
    if isinstance(module, nn.Conv1d):
        return _unfold(inputs[:, :, None], (1, *module.kernel_size), (1, *module.stride), (1, *module.dilation))
    return _unfold(inputs, module.kernel_size, module.stride, module.dilation)


def _unfold(inputs: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    return functional.unfold(inputs, kernel, dilation=dilation, stride=stride).mT


def places_first(values: Tensor) -> Tensor:
    """[N, T, O] from the output of a convolution, or its gradient, [N, O, …]."""
    return values.flatten(2).mT
