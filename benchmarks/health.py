"""What `influence health` costs, in multiples of F: a plain forward and backward pass with all weight gradients over the same sequences.

    python benchmarks/health.py runs/demo

Knows finished runs. Prints one line; F is measured before and after, because other work on a machine moves both.
"""

import argparse
import time

import torch

from ekfac import token_losses
from influence.batches import in_batches
from influence.health import measure_health
from influence.run import open_run


def plain_pass(run) -> float:
    """Seconds of one forward and backward pass over all sequences, by autograd alone."""
    model = run.language_model.model
    start = time.perf_counter()
    for shard in range(run.store.num_shards):
        for _, batch in in_batches(run.store.shard(shard), run.attributed.budget, run.attributed.device):
            torch.autograd.grad(token_losses(model, batch).sum(), list(model.parameters()))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory, finished")
    run = open_run(parser.parse_args().run)
    plain_pass(run)  # what is loaded is loaded
    _ = run.factors, run.rows
    before = plain_pass(run)
    seconds = measure_health(run).summary["provenance"]["seconds"]
    plain = (before + plain_pass(run)) / 2
    parts = ", ".join(f"{name} {value / plain:.2f} F" for name, value in seconds.items())
    print(f"{len(run.store):,} sequences, F {plain:.1f} s: {parts}")


if __name__ == "__main__":
    main()
