"""The cost of each pass as a multiple of F: a plain forward and backward pass with all weight gradients, over the same tokens.

    python benchmarks/passes.py [--layers 6 --width 384 --length 128 --sequences 128 --vocabulary 4096 --repeats 3] [--blocks]

Passes and F take turns on one GPT-2-architecture model with random weights and random tokens, on the GPU when there is one; the table shows
medians. All parameters are attributed, or with --blocks those of the linear layers of the blocks. F is given its best batch size of those tried.
Nothing is written to disk but the table, on standard output.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac import (
    Damping,
    assemble,
    attributable_layers,
    capture,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    reached_positions,
    true_label_loss,
)
from indexing import RowFormat, feature_rows, feature_spec, row_length_within, spreaders
from influence.attribution import AttributedModel, precondition, query_gradients, scan, score_sequences
from influence.batches import batch_budget, collate, in_batches
from influence.measurement import Measurement
from influence.refinement import RefineOptions, refine
from influence.sequences import TrainingSequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"layers": 6, "width": 384, "length": 128, "sequences": 128, "vocabulary": 4096, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(device).eval()
    sequences = random_sequences(options.sequences, options.length, options.vocabulary)
    passes = Passes(model, sequences, device, ["*.attn.*", "*.mlp.*"] if options.blocks else ["*"])
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, work in passes.all().items():
            seconds.setdefault(name, []).append(timed(work, device))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    print(
        f"{device.type}, {torch.get_num_threads()} threads; {options.layers} layers, width {options.width}, {options.sequences} × {options.length}"
    )
    print(table({name: statistics.median(values) for name, values in seconds.items()}))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\npeak memory of the process: {peak / 2**30:.2f} GiB")


def random_sequences(count: int, length: int, vocabulary: int) -> list[TrainingSequence]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length)).astype(np.int32)
    counted = np.arange(length) > 0
    return [TrainingSequence(id=str(n), document="", tokens=row, counted=counted, text="", metadata={}) for n, row in enumerate(tokens)]


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(seconds: dict[str, float]) -> str:
    plain = min(value for name, value in seconds.items() if name.startswith("F "))
    lines = ["", "| pass | seconds | F |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {value / plain:.2f} |" for name, value in seconds.items()]
    return "\n".join(lines)


class Passes:
    """Every pass of the main job as a function without arguments, the factors made once beforehand."""

    def __init__(self, model: GPT2LMHeadModel, sequences: list[TrainingSequence], device: torch.device, patterns: list[str]) -> None:
        self.model, self.sequences, self.device = model, sequences, device
        example = torch.zeros((1, 2), dtype=torch.int64, device=device)
        self.layers = attributable_layers(model, lambda m: m(input_ids=example), patterns).layers
        budget = batch_budget(model, self.layers, 8 * 2**30, len(sequences[0].tokens))
        self.attributed = AttributedModel(model=model, layers=self.layers, budget=budget, device=device)
        self.batches = [batch for _, batch in in_batches(sequences, budget, device)]
        self.loss = drawn_label_loss(0)
        self.covariances = covariance_pass(model, self.layers, self.batches, self.loss, reached_positions)
        self.bases = {name: eigenbasis(covariance) for name, covariance in self.covariances.items()}
        self.vectors = {name: basis.vectors.float() for name, basis in self.bases.items()}
        sums = eigenvalue_pass(model, self.layers, self.vectors, self.batches, self.loss, reached_positions)
        self.factors = assemble(self.layers, self.bases, sums, Damping(value=0.1))
        weights = {name: factor.row_weight() for name, factor in self.factors.items()}
        self.spec = feature_spec(self.layers, weights, row_length_within("bit", 8192), seed=0)
        self.format = RowFormat(encoding="bit", length=self.spec.row_length)
        self.signs = spreaders(self.spec, self.factors)
        self.damping = {name: factor.damping for name, factor in self.factors.items()}
        self.queries = self.preconditioned(16)

    def all(self) -> dict[str, Callable[[], object]]:
        size = len(self.batches[0].tokens)
        return {
            **{f"F in batches of {n}": lambda n=n: self.plain(n) for n in sorted({8, size})},  # type: ignore[misc]
            "capture, drawn labels": lambda: self.captured(self.loss),
            "capture, true labels": lambda: self.captured(true_label_loss),
            "covariances": lambda: covariance_pass(self.model, self.layers, self.batches, self.loss, reached_positions),
            "eigenbases": lambda: [eigenbasis(covariance) for covariance in self.covariances.values()],
            "corrected eigenvalues": lambda: eigenvalue_pass(
                self.model, self.layers, self.vectors, self.batches, self.loss, reached_positions
            ),
            "index rows of 8 KiB": self.rows,
            "exact scan, 1 query": lambda: scan(
                self.attributed, {name: vector[:1] for name, vector in self.queries.items()}, self.sequences
            ),
            "exact scan, 16 queries, their gradients included": lambda: scan(self.attributed, self.preconditioned(16), self.sequences),
            "Gauss-Newton product with 16 vectors": lambda: refine(
                self.attributed, self.queries, self.factors, self.damping, self.sequences, RefineOptions(steps=1), lambda *_: None
            ),
            "rerank of all sequences, with layers and tokens": lambda: score_sequences(
                self.attributed, {name: vector[0] for name, vector in self.queries.items()}, self.sequences
            ),
        }

    def plain(self, size: int) -> None:
        self.model.requires_grad_(True)
        for start in range(0, len(self.sequences), size):
            batch = collate(self.sequences[start : start + size], self.device)
            self.model.zero_grad(set_to_none=True)
            true_label_loss(self.model, batch).backward()
        self.model.zero_grad(set_to_none=True)

    def captured(self, loss: Callable[..., torch.Tensor]) -> None:
        for batch in self.batches:
            capture(self.model, self.layers, lambda batch=batch: loss(self.model, batch), batch.reached, lambda *_: None)  # type: ignore[misc]

    def rows(self) -> None:
        for batch in self.batches:
            rows, _ = feature_rows(self.model, self.layers, self.factors, self.spec, self.signs, true_label_loss, batch)
            self.format.encode(rows)

    def preconditioned(self, count: int) -> dict[str, torch.Tensor]:
        asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, s),)) for s in self.sequences[:count]]
        return precondition(query_gradients(self.attributed, asked).gradients, self.factors)


if __name__ == "__main__":
    main()
