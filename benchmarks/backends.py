"""What the passes cost on a Flax model, against the torch model of the same weights: one process, one thread, CPU seconds, the best of several.

    python benchmarks/backends.py [--layers 4 --width 256 --length 128 --sequences 8]

The model is GPT-2's architecture (tests/flax_twins.py); each pass is over one batch. Compilation, of the first batch of a shape, is shown by itself.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from flax_twins import Sizes, Twin, flax_parameters, stacked, torch_twin

import ekfac
from ekfac.flax_linen import linen_model


def best(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(seconds of the first call, CPU seconds of the best of the others)."""
    start = time.perf_counter()
    work()
    first, found = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return first, min(found)


def passes(model: torch.nn.Module, batch: ekfac.SequenceBatch) -> dict[str, Callable[[], object]]:
    layers = ekfac.attributable_layers(model, lambda model: model(input_ids=batch.tokens[:1])).layers
    drawn, reached = ekfac.drawn_label_loss(0), ekfac.reached_positions
    vectors = {
        name: ekfac.eigenbasis(one, "float32").vectors
        for name, one in ekfac.covariance_pass(model, layers, [batch], drawn, reached).items()
    }
    queries = {layer.name: torch.ones(4, *layer.shape) for layer in layers}
    return {
        "capture": lambda: ekfac.capture(model, layers, lambda: ekfac.true_label_loss(model, batch), batch.reached, lambda *_: None),
        "covariances": lambda: ekfac.covariance_pass(model, layers, [batch], drawn, reached),
        "eigenvalues": lambda: ekfac.eigenvalue_pass(model, layers, vectors, [batch], drawn, reached),
        "Gauss-Newton, 4 vectors": lambda: ekfac.gauss_newton_product(model, layers, batch, queries),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name, value in (("layers", 4), ("width", 256), ("length", 128), ("sequences", 8), ("vocabulary", 4096), ("repeats", 5)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(given.width, 4, given.length, given.vocabulary, given.layers)
    other = torch_twin(torch.float32, sizes)
    values = flax_parameters(other)
    tokens = torch.randint(given.vocabulary, (given.sequences, given.length), generator=torch.Generator().manual_seed(0))
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    batch = ekfac.SequenceBatch(tokens=tokens, counted=counted, keys=np.arange(given.sequences, dtype=np.uint64))
    models = {
        "torch": other,
        "Flax": linen_model(Twin(sizes), {"params": unflatten_dict(values, sep=".")}, longest=given.length),
        "Flax, scanned and rematerialised": linen_model(
            Twin(sizes, "scanned"), {"params": unflatten_dict(stacked(values, given.layers), sep=".")}, longest=given.length
        ),
    }
    seconds: dict[str, float] = {}
    print(f"{'pass':26}{'model':36}{'first, s':>10}{'then, CPU s':>13}{'of torch':>10}")
    for name, model in models.items():
        for title, work in passes(model, batch).items():
            first, found = best(work, given.repeats)
            seconds.setdefault(title, found)
            print(f"{title:26}{name:36}{first:10.2f}{found:13.3f}{found / seconds[title]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
