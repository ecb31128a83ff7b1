"""How long a search takes, and what it needs, for indexes of ten thousand to ten million rows of sparse rows, or of random bits.

    python benchmarks/search.py [--encoding sparse] [--bytes 1024] [--most 1000000] [--queries 20]

Prints a table. Larger sizes than `--most` are computed on the line through the last two that were run, and marked as computed. Rows are
written to a temporary directory and read back as an index reads them: memory-mapped, a sketch of each in memory. Synthetic rows say how fast a
search is, not how good (`influence evaluate RUN fidelity` does); a few rows point along the queries, which checks that they are found.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from indexing import RowFormat, RowIndex, open_rows, row_length_within

SIZES = (10**4, 10**5, 10**6, 10**7)
SHARD = 512  # as data.sequences_per_shard has it


def write_rows(directory: Path, row_format: RowFormat, count: int, planted: NDArray[np.float32]) -> list[Path]:
    """Random signs with scales that vary as those of gradients do, with what 64 heavy-tailed rows keep; row 100·q is along query q."""
    rng, paths = np.random.default_rng(0), []
    kept = row_format.encode(torch.from_numpy(rng.standard_t(3, size=(64, row_format.length)).astype(np.float32)))[
        :, row_format.sign_bytes :
    ]
    along = row_format.encode(torch.from_numpy(planted))
    for first in range(0, count, SHARD):
        size = min(SHARD, count - first)
        signs = rng.integers(0, 256, (size, row_format.sign_bytes), dtype=np.uint8)
        codes = np.concatenate([signs, kept[rng.integers(0, len(kept), size)]], axis=1)
        codes[:, -4:] = np.exp(rng.normal(size=(size, 1)) * 0.5).astype(np.float32).view(np.uint8)
        for query, row in enumerate(along):
            place = 100 * query - first
            if 0 <= place < size:
                codes[place] = np.concatenate([row[:-4], np.ones(1, dtype=np.float32).view(np.uint8)])  # of middling size
        paths.append(directory / f"{first}.npy")
        np.save(paths[-1], codes)
    return paths


def median_seconds(call: Callable[[int], object], times: int) -> float:
    taken = []
    for number in range(times):
        start = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def measure(row_format: RowFormat, count: int, queries: NDArray[np.float32]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        rows = open_rows(write_rows(Path(folder), row_format, count, queries), row_format)
        before, start = resident_bytes(), time.perf_counter()
        index = RowIndex(rows)
        build, memory = time.perf_counter() - start, resident_bytes() - before
        found = index.search(queries, 200).numbers[:, 0]
        assert (found == 100 * np.arange(len(queries))).all(), "a row that points along its query was not found first"
        one = median_seconds(lambda number: index.search(queries[number : number + 1], 200), len(queries))
        many = median_seconds(lambda _: index.search(queries[:16], 200), 3) / 16
        half = np.arange(count) % 2 == 0
        filtered = median_seconds(lambda number: index.search(queries[number : number + 1], 200, half), len(queries))
    return {"build": build, "memory": memory, "one": one, "many": many, "filtered": filtered}


def on_line(before: tuple[int, dict[str, float]], last: tuple[int, dict[str, float]], count: int) -> dict[str, float]:
    """What was measured for two numbers of rows, continued to `count`."""
    share = (count - last[0]) / (last[0] - before[0])
    return {name: value + share * (value - before[1][name]) for name, value in last[1].items()}


def resident_bytes() -> int:
    """Anonymous memory of this process: what is not a mapped file."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoding", choices=("bit", "sparse"), default="sparse")
    parser.add_argument("--bytes", type=int, default=1024, help="bytes a row (1024)")
    parser.add_argument("--most", type=int, default=10**6, help="largest number of rows that is run (1000000)")
    parser.add_argument("--queries", type=int, default=20, help="queries the median is over (20)")
    given = parser.parse_args()
    assert given.most >= SIZES[1], "--most: two sizes are needed for the line"
    assert 16 <= given.queries <= 100, "--queries: between 16 and 100"
    row_format = RowFormat(encoding=given.encoding, length=row_length_within(given.encoding, given.bytes), most_bytes=given.bytes)
    queries = np.random.default_rng(1).normal(size=(given.queries, row_format.length)).astype(np.float32)
    print(
        f"{given.encoding}, {given.bytes} bytes a row, {row_format.num_kept:,} numbers; 200 candidates; medians of {given.queries} queries"
    )
    print("| rows | | one query, ms | of 16, each, ms | half of the rows allowed, ms | opening, s | memory, MiB | rows on disk, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    runs: list[tuple[int, dict[str, float]]] = []
    for count in SIZES:
        computed = count > given.most
        if not computed:
            runs.append((count, measure(row_format, count, queries)))
        shown = on_line(runs[-2], runs[-1], count) if computed else runs[-1][1]
        times = " | ".join(f"{1e3 * shown[name]:.0f}" for name in ("one", "many", "filtered"))
        sizes = f"{shown['build']:.1f} | {shown['memory'] / 2**20:,.0f} | {count * row_format.bytes_per_row / 2**30:.2f}"
        print(f"| {count:,} | {'computed' if computed else 'run'} | {times} | {sizes} |", flush=True)
    print(f"peak memory of this process, mapped files included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
