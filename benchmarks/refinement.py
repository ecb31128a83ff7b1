"""Seconds a query, and the relative residual after each step, of refined inverse-Hessian-vector products.

    python benchmarks/refinement.py RUN QUERIES.jsonl [--queries 16] [--sequences 128] [--steps 10] [--layers GLOB …] [--factors-damping]

RUN is a run directory, QUERIES.jsonl has `input_ids`. With --factors-damping D is the factors' λ even where the model's directory holds a state of
its optimizer. F is a plain forward and backward pass over all training sequences, measured in the same run at its best batch size of those tried.
Residuals are relative to the gradient, in the norm of the preconditioner; means over the queries.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from ekfac import true_label_loss
from influence import RefineOptions, open_run
from influence.answering import selected
from influence.batches import collate
from influence.run import Run
from influence.solving import solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("queries_file", type=Path)
    for name, default in {"queries": 16, "sequences": 128, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", nargs="*", default=[])
    parser.add_argument("--factors-damping", action="store_true")
    options = parser.parse_args()
    run = open_run(options.run)
    if options.factors_damping:
        run.optimizer_state = None  # the cached property, as if there were none
    attributed = selected(run.attributed, options.layers)
    lines = options.queries_file.read_text(encoding="utf-8").splitlines()[: options.queries]
    measurements = [run.measure_tokens(json.loads(line)["input_ids"]) for line in lines]
    _ = run.factors, run.refining_damping
    plain = plain_seconds(run)
    start = time.perf_counter()
    settings = RefineOptions(sequences=options.sequences, steps=options.steps, tolerance=0.0)
    solution = solved(run, attributed, measurements, settings).refinement
    seconds = time.perf_counter() - start
    assert solution is not None
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in attributed.layers)
    print(
        f"{torch.get_num_threads()} threads; {parameters:,} parameters, G of {options.sequences} sequences, D: {run.refining_damping_name}"
    )
    print(f"F: {plain:.2f} s; {len(lines)} queries, {options.steps} steps: {seconds:.1f} s, {seconds / plain:.1f} F", end="")
    print(f", {seconds / len(lines):.2f} s a query")
    print(
        "mean relative residuals:",
        " ".join(f"{value:.3f}" for value in solution.residuals.mean(1).tolist()),
    )


def plain_seconds(run: Run) -> float:
    """A forward and backward pass with all weight gradients over the training sequences, the best of two batch sizes, from 256 of them."""
    model, sequences = run.language_model.model, [run.store[number] for number in range(min(256, len(run.store)))]
    found = []
    model.requires_grad_(True)
    for size in (8, 16, 8, 16):
        start = time.perf_counter()
        for first in range(0, len(sequences), size):
            model.zero_grad(set_to_none=True)
            true_label_loss(model, collate(sequences[first : first + size], run.attributed.device)).backward()  # type: ignore[no-untyped-call]
        found.append((time.perf_counter() - start) * len(run.store) / len(sequences))
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return min(found)


if __name__ == "__main__":
    main()
