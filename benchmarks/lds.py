"""The linear datamodelling score of exact EK-FAC scores, from a bank of retrained models.

    python benchmarks/lds.py FOLDER --out runs/lds

FOLDER holds `final/` (the model), `train.jsonl` and `query.jsonl` (both with `input_ids`) and `bank.npz`: `masks` [S, N], which sequences each
retrained model saw, and `query_losses` [seed, S, Q], each query's summed loss under it. The score is the mean over queries of the Spearman
correlation, over the S subsets, of minus the summed influence of a subset with the measured loss; the interval is a bootstrap over subsets. Also: how
often the index finds the exact top 10.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from indexing import recall, spread_gradients
from influence import measure_tokens
from influence.attribution import precondition, query_gradients
from influence.config import load_config
from jobs.driver import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--bytes-per-sequence", type=int, default=8192)
    options = parser.parse_args()
    run = run_all(
        load_config(
            None,
            {
                "model.name": str(options.folder / "final"),
                "data.files": str(options.folder / "train.jsonl"),
                "data.input_ids": "input_ids",
                "data.sequence_length": 64,
                "index.bytes_per_sequence": options.bytes_per_sequence,
                "run.dir": str(options.out),
            },
        )
    )
    bank = np.load(options.folder / "bank.npz", allow_pickle=False)
    losses = bank["query_losses"].mean(0)  # [S, Q]
    lines = (options.folder / "query.jsonl").read_text(encoding="utf-8").splitlines()[: losses.shape[1]]
    found = query_gradients(run.attributed, [measure_tokens(run.tokenizer, json.loads(line)["input_ids"]) for line in lines])
    start = time.perf_counter()
    scores = run.exact_scores(precondition(found.gradients, run.factors))
    seconds = time.perf_counter() - start
    predicted = -(scores @ bank["masks"].T)  # [Q, S]
    rng = np.random.default_rng(0)
    resampled = [linear_datamodelling_score(predicted, losses, rng.integers(0, len(losses), len(losses))) for _ in range(500)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    score = linear_datamodelling_score(predicted, losses, np.arange(len(losses)))
    print(f"LDS {score:.3f} (95% {low:.3f} to {high:.3f}), {len(lines)} queries, {len(losses)} subsets; exact scan {seconds:.1f} s")
    rows = spread_gradients(found.gradients, run.factors, run.features, run.signs)
    truth = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    for candidates in (100, 200):
        share = recall(run.index.search(rows, candidates).numbers, truth)
        print(f"{options.bytes_per_sequence} bytes a sequence: {share:.3f} of the exact top 10 among {candidates} candidates")


def linear_datamodelling_score(predicted: np.ndarray, losses: np.ndarray, subsets: np.ndarray) -> float:
    """Mean over queries of the Spearman correlation over these subsets."""
    return float(np.mean([spearmanr(row[subsets], losses[subsets, query]).statistic for query, row in enumerate(predicted)]))


if __name__ == "__main__":
    main()
