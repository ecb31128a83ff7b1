"""What rows of so many bytes can be worth for a run's queries: a calculation, beside what was measured.

    python benchmarks/row_bound.py RUN

RUN is a finished run with bit rows. A bit row of m numbers estimates a score with an error of standard deviation √(π / 2m) |q| |x|, of the
shrunk gradients q and x in the eigenbasis: 1 / m from spreading, (π/2 - 1) / m from rounding to signs. The table adds errors of that size to the
exact scores of the run's sample queries. "Any rows": what the best conceivable code of so many bytes could do, if the coordinates of gradients are
independent and Gaussian with the variances Λ / (Λ + λ): the mean squared error of scores is then at least that of rate and distortion (reverse
water-filling; Cover and Thomas, theorem 10.3.3), and bit rows with that error, shrunk in the best way, are longer by the factor shown.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexing import row_scores
from influence import open_run
from influence.evaluation.fidelity import rows_of_queries
from influence.fidelity import end_fidelity, ranked_by
from influence.run import Run
from jobs.stages import sample_queries

BYTES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DRAWS = 8
ROUNDED = np.pi / 2


def scores_of(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Exact scores [Q, N] of the sample queries, -inf for their own sequences; the share of them in estimates, [Q, 1]; and |q| |x|, [Q, N]."""
    queries = sample_queries(run)
    scans = [run.path_of("scans", f"part-{place:05d}") for place in range(len(list((run.directory.path / "scans").iterdir())))]
    exact = np.concatenate([np.load(path / "scores.npy", allow_pickle=False) for path in scans], axis=1)
    own = (np.arange(len(queries)), [number for number, _ in queries])
    rows = rows_of_queries(run, [measurement for _, measurement in queries], run.features)
    estimates = row_scores(rows, run.rows, np.arange(exact.shape[1])).astype(np.float64)
    estimates[own] = exact[own] = 0
    share = (exact * estimates).sum(1, keepdims=True) / (exact**2).sum(1, keepdims=True)
    scales = np.concatenate([run.row_format.scales(block) for _, block in run.rows.blocks()])
    norms = scales * np.sqrt(2 * run.row_format.length / np.pi)  # of mixed rows, which are as good as Gaussian
    exact[own] = -np.inf
    return exact, share, np.linalg.norm(rows, axis=1)[:, None] * norms


def worth(exact: NDArray[np.float64], share: NDArray[np.float64], sizes: NDArray[np.float64], numbers: float) -> str:
    """NDCG@20 and recall of the top 10 among 50 and 200, of estimates by so many bits."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        estimates = share * exact + np.sqrt(ROUNDED / numbers) * sizes * rng.standard_normal(exact.shape)
        found.append(end_fidelity(exact, ranked_by(estimates, 200)))
    return " | ".join(
        f"{np.mean(shares):.3f}" for shares in zip(*((f.ndcg_at_20, f.recall[10][50], f.recall[10][200]) for f in found), strict=True)
    )


def least_error(retained: NDArray[np.float64], bits: float) -> float:
    """The least mean squared error of Σ q x over axes whose q and x have variances c: Σ min(θ, c²), with Σ max(0, log₂(c² / θ)) / 2 = bits."""
    variances = np.square(retained)
    low, high = -80.0, 0.0  # log₂ θ
    for _ in range(60):
        level = (low + high) / 2
        spent = np.maximum(0, np.log2(variances) - level).sum() / 2
        low, high = (level, high) if spent > bits else (low, level)
    return float(np.minimum(variances, 2.0**low).sum())


def row_error(retained: NDArray[np.float64], numbers: float) -> float:
    """The mean squared error of the same by bit rows, Σ (w - 1)² c² + (π / 2m) (Σ w c)², with the weights w = max(0, 1 - τ / c) that minimise it."""
    low, high = 0.0, 1.0
    for _ in range(60):
        level = (low + high) / 2
        wanted = ROUNDED / numbers * np.maximum(retained - level, 0).sum()
        low, high = (level, high) if wanted > level else (low, level)
    kept = np.maximum(retained - low, 0)
    return float(np.square(retained - kept).sum() + ROUNDED / numbers * kept.sum() ** 2)


def as_long_as(retained: NDArray[np.float64], bits: float) -> float:
    """How many numbers a bit row has whose error is the least possible one of so many bits."""
    target, low, high = least_error(retained, bits), np.log(bits), np.log(bits) + 10
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if row_error(retained, np.exp(middle)) > target else (low, middle)
    return float(np.exp(low))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = open_run(parser.parse_args().run)
    assert run.row_format.encoding == "bit", "a run with bit rows is needed"
    assert run.fidelity is not None, "a run with sample queries is needed"
    retained = np.concatenate([factor.retained().double().cpu().numpy().ravel() for factor in run.factors.values()])
    retained = retained[retained > 1e-6]
    exact, share, sizes = scores_of(run)
    noise = np.sqrt(ROUNDED / run.row_format.length) * np.median(sizes, axis=1)
    top = -np.sort(-exact, axis=1)[:, [0, 9, 19]] * share / noise[:, None]
    end = run.fidelity.end(normalized=False, opponents=False)
    print(f"{len(retained):,} coordinates, of an effective dimension of {retained.sum():,.0f}; {len(exact)} queries")
    print(f"rows of {run.row_format.bytes_per_row:,} bytes, measured: NDCG@20 {end.ndcg_at_20:.3f}, top 10 in 200 {end.recall_at(10, 200)}")
    print(
        "exact scores of the 1st, 10th and 20th, in standard deviations of their error there: " + ", ".join(f"{x:.1f}" for x in top.mean(0))
    )
    print("| bytes | NDCG@20 | of the top 10 in 50 | 200 | any rows: as bit rows of | NDCG@20 | of the top 10 in 50 | 200 |")
    print("|---|---|---|---|---|---|---|---|")
    for size in BYTES:
        longer = as_long_as(retained, 8 * size)
        print(
            f"| {size:,} | {worth(exact, share, sizes, 8 * size)} | {longer / 8:,.0f} | {worth(exact, share, sizes, longer)} |", flush=True
        )


if __name__ == "__main__":
    main()
