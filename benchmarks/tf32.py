"""What products of matrices with rounded operands do to EK-FAC scores: TF32, as GPUs multiply when they may, and bfloat16, on any machine.

    python benchmarks/tf32.py FOLDER [--blocks]

FOLDER is as for `fit_quality.py`. The whole way from fit to scores is gone in float32, and again with the operands of every product of matrices cut
to as many bits as these formats have, sums staying in float32 as on tensor cores: 390 sequences for covariances, 1,000 for eigenvalues. Printed are
the correlations of a query's scores with those of float32, mean and least over the queries. It says what accuracy is lost, not what time is gained.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fit_quality import read_sequences, scores
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default}
LOST_BITS = {"TF32": 13, "bfloat16": 16}
"""Of the 23 of float32's fraction."""


class Rounded(TorchDispatchMode):
    """Within it, operands of products lose so many of their last bits."""

    def __init__(self, lost_bits: int) -> None:
        super().__init__()
        self._kept = -(1 << lost_bits)
        self.num_products = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in PRODUCTS:
            self.num_products += 1
            args = [*args[:-2], *(self._cut(operand) for operand in args[-2:])]
        return function(*args, **(kwargs or {}))

    def _cut(self, operand: Tensor) -> Tensor:
        return (operand.contiguous().view(torch.int32) & self._kept).view(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", action="store_true", help="attribute the linear layers of the blocks, not every parameter")
    options = parser.parse_args()
    train, queries = (read_sequences(options.folder / name) for name in ("train.jsonl", "query.jsonl"))
    order = np.random.default_rng(0).permutation(len(train))
    parts = [[train[place] for place in order[:count]] for count in (390, 1000)]
    patterns = ["*.attn.*", "*.mlp.*"] if options.blocks else ["*"]

    def found(mode: Rounded | None) -> np.ndarray:
        with sdpa_kernel(SDPBackend.MATH), mode or nullcontext():
            return scores(options.folder / "final", "float32", patterns, *parts, train, queries)

    exact = found(None)
    print("| operands | products | correlation: mean, least | rank correlation: mean, least |\n|---|---|---|---|")
    for name, lost_bits in LOST_BITS.items():
        mode = Rounded(lost_bits)
        rounded = found(mode)
        figures = [np.array([one(a, b).statistic for a, b in zip(rounded, exact, strict=True)]) for one in (pearsonr, spearmanr)]
        told = " | ".join(f"{values.mean():.5f}, {values.min():.5f}" for values in figures)
        print(f"| {name} | {mode.num_products:,} | {told} |", flush=True)


if __name__ == "__main__":
    main()
