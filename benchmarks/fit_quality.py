"""How close the scores of a fit on some of the sequences come to those of a fit in float64 on all of them.

    python benchmarks/fit_quality.py FOLDER [--blocks] [--fits 390:1000 500:500 …]

FOLDER holds `final/`, a GPT-2 model, and `train.jsonl` and `query.jsonl` with `input_ids`. A fit COVARIANCES:EIGENVALUES is in float32 and takes so
many of the training sequences, drawn at random, for each of its passes. For each fit: the rank correlation of a query's EK-FAC scores with those of
the reference, mean over the queries. Every parameter is attributed, or with `--blocks` the linear layers of the blocks.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from transformers import GPT2LMHeadModel

from ekfac import Damping, SequenceBatch, assemble, attributable_layers, covariance_pass, drawn_label_loss, eigenbasis, eigenvalue_pass
from ekfac import reached_positions as mask
from influence.attribution import AttributedModel, query_gradients, scan, solve
from influence.batches import batch_budget, in_batches, model_memory
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--fits", nargs="+", default=["390:1000"], help="COVARIANCES:EIGENVALUES, numbers of sequences")
    options = parser.parse_args()
    train, queries = (read_sequences(options.folder / name) for name in ("train.jsonl", "query.jsonl"))
    order = np.random.default_rng(0).permutation(len(train))
    patterns = ["*.attn.*", "*.mlp.*"] if options.blocks else ["*"]
    reference = scores(options.folder / "final", "float64", patterns, train, train, train, queries)
    print("| covariances | eigenvalues | rank correlation |\n|---|---|---|")
    for covariances, eigenvalues in (map(int, fit.split(":")) for fit in options.fits):
        parts = [[train[place] for place in order[:count]] for count in (covariances, eigenvalues)]
        found = scores(options.folder / "final", "float32", patterns, *parts, train, queries)
        correlations = [spearmanr(one, other).statistic for one, other in zip(found, reference, strict=True)]
        print(f"| {covariances} | {eigenvalues} | {np.mean(correlations):.4f} |", flush=True)


def read_sequences(path: Path) -> list[TrainingSequence]:
    rows = [np.array(json.loads(line)["input_ids"], dtype=np.int32) for line in path.read_text().splitlines()]
    return [
        TrainingSequence(id=f"{path.stem}-{n}", document="", tokens=row, counted=np.arange(len(row)) > 0, text="", metadata={})
        for n, row in enumerate(rows)
    ]


def scores(
    folder: Path,
    dtype: str,
    patterns: list[str],
    for_covariances: list[TrainingSequence],
    for_eigenvalues: list[TrainingSequence],
    train: list[TrainingSequence],
    queries: list[TrainingSequence],
) -> NDArray[np.float64]:
    """EK-FAC scores [Q, N] with factors fitted on these sequences."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    layers = attributable_layers(model, lambda m: m(input_ids=torch.zeros((1, 2), dtype=torch.int64)), patterns).layers
    budget = batch_budget(model_memory(model, layers), 8 * 2**30, max(len(sequence.tokens) for sequence in train), "cpu")
    attributed, loss = AttributedModel(model=model, layers=layers, budget=budget, device=CPU), drawn_label_loss(0)

    def batches(sequences: list[TrainingSequence]) -> list[SequenceBatch]:
        return [batch for _, batch in in_batches(sequences, budget, CPU)]

    covariances = covariance_pass(model, layers, batches(for_covariances), loss, mask)
    bases = {name: eigenbasis(covariance, dtype) for name, covariance in covariances.items()}
    vectors = {name: basis.vectors for name, basis in bases.items()}
    sums = eigenvalue_pass(model, layers, vectors, batches(for_eigenvalues), loss, mask)
    factors = assemble(layers, bases, sums, Damping(value=0.1), dtype)
    asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, query),)) for query in queries]
    return scan(attributed, solve(query_gradients(attributed, asked, factors).gradients, factors), train)


if __name__ == "__main__":
    main()
