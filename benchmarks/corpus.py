"""Exact scans of many sequences for few and for many queries, vectors of the queries included, as multiples of F over the same sequences.

    python benchmarks/corpus.py FOLDER [--sequences 1024] [--fit 128] [--queries 16 256]

FOLDER holds `model/`, as `passes.py --make` writes it; sequences are of 128 random tokens. Factors are of the linear layers of the blocks and of the
first sequences alone, as what a scan takes does not depend on them. Each stage runs once, F before and after all others.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from passes import Passes
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from influence.attribution import query_gradients, scan, solve
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

LENGTH, SEQUENCES_AT_ONCE = 128, 8

Made = TypeVar("Made")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--fit", type=int, default=128, help="how many of them the factors are of")
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 256])
    opts = parser.parse_args()
    plain, model = (GPT2LMHeadModel.from_pretrained(opts.folder / "model", dtype=torch.float32).eval() for _ in range(2))
    rows = np.random.default_rng(1).integers(0, model.config.vocab_size, (opts.sequences, LENGTH)).astype(np.int32)
    counted = np.arange(LENGTH) > 0
    sequences = [TrainingSequence(id=str(n), document="", tokens=row, counted=counted, text="", metadata={}) for n, row in enumerate(rows)]
    passes = Passes(model, sequences[: opts.fit], 1, ["*.attn.*", "*.mlp.*"])
    passes.make_covariances()
    passes.make_bases()
    passes.make_factors()
    timed("F", lambda: forward_and_backward(plain, rows))
    for count in opts.queries:
        asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequence),)) for sequence in sequences[:count]]
        found = timed(f"gradients of {len(asked)} queries", lambda asked=asked: query_gradients(passes.attributed, asked, passes.factors))  # type: ignore[misc]
        vectors = timed(f"(G + λI)⁻¹ of {len(asked)}", lambda found=found: solve(found.gradients, passes.factors))  # type: ignore[misc]
        timed(f"scan for {len(asked)}", lambda vectors=vectors: scan(passes.attributed, vectors, sequences))  # type: ignore[misc]
        del found, vectors
    timed("F", lambda: forward_and_backward(plain, rows))


def forward_and_backward(model: GPT2LMHeadModel, rows: np.ndarray) -> None:
    for batch in torch.from_numpy(rows.astype(np.int64)).split(SEQUENCES_AT_ONCE):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").backward()
    model.zero_grad(set_to_none=True)


def timed(name: str, work: Callable[[], Made]) -> Made:
    began = time.perf_counter()
    made = work()
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return made


if __name__ == "__main__":
    main()
