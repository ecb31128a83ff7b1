"""How a service holds up: throughput and latency at 1, 8 and 32 clients, by stage, every answer compared with the command line's.

    influence demo --out runs/demo && python benchmarks/serving.py runs/demo

Starts `influence serve` on the run in a process of its own. Every query differs from every other, so no answer comes from the store; a client asks
the next one when it has the answer to the last. Expected answers are made first, one query at a time, by the code of `influence query`.

The service keeps gradients of candidates: `--warm 100` asks so many other questions first, as a service that runs for a while was asked. With
`--memory-budget` hardly above what the run takes, nothing is kept. With `--replicas 2` the service runs on Ray Serve, each replica having one core;
what its stages take is not told then, since each replica counts its own.

On a machine that others use too, what a query costs the service's process in CPU seconds says more than the clock does.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from influence.answering import QueryOptions
from influence.run import Run, open_run

TOLERANCE = 1e-3
"""Of the greatest score: sums in float32 over batches of other sizes."""


def questions(run: Run, count: int) -> list[dict[str, str]]:
    """Halves of training sequences: the second half is asked after the first."""
    asked = []
    for number in run.hash_order(1):
        text = run.training[int(number)].text
        cut = text.find(" ", len(text) // 2)
        if text[:cut].strip() and 0 < cut < len(text) - 1:
            asked.append({"prompt": text[:cut], "completion": text[cut : cut + 40]})
        if len(asked) == count:
            return asked
    raise SystemExit(f"the run has too few sequences for {count} queries")


def differs(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What is wrong with an answer, if anything. Two results whose scores are equal within the tolerance may change places, and so may duplicates
    of each other, of which the first stands for all."""
    scores, others = ([one["score"] for one in answer["results"]] for answer in (found, expected))
    tolerance = TOLERANCE * max(map(abs, others))
    if len(scores) != len(others) or not np.allclose(scores, others, rtol=0, atol=tolerance):
        return f"scores {scores} instead of {others}"
    known = {
        one["id"]
        for result in expected["results"]
        for one in (result, *result["duplicates"])
        if abs(one["score"] - result["score"]) < tolerance
    }
    unknown = [one["id"] for one in found["results"] if one["id"] not in known and abs(one["score"] - others[-1]) >= tolerance]
    return f"results {unknown} that do not belong" if unknown else None


def load(url: str, run: str, bodies: list[dict[str, Any]], clients: int) -> tuple[list[float], list[dict[str, Any]], float]:
    """(seconds of each query, answers, seconds in all) with so many clients at once."""
    with httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)) as http:

        def ask(body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
            start = time.perf_counter()
            response = http.post(f"/v1/runs/{run}/queries", json=body)
            response.raise_for_status()
            return time.perf_counter() - start, response.json()

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as threads:
            done = list(threads.map(ask, bodies))
        return [seconds for seconds, _ in done], [answer for _, answer in done], time.perf_counter() - start


def stages(url: str) -> dict[str, tuple[float, float]]:
    """(seconds, number) of each stage of batches so far, and of the batches' sizes."""
    text = httpx.get(f"{url}/metrics").text
    found = {}
    for name in re.findall(r'^influence_query_stage_seconds_count\{stage="(\w+)"\}', text, re.M):
        total, count = (
            float(re.search(rf'^influence_query_stage_seconds_{what}{{stage="{name}"}} (\S+)', text, re.M)[1]) for what in ("sum", "count")
        )
        found[name] = (total, count)
    total, count = (float(re.search(rf"^influence_batch_size_{what} (\S+)", text, re.M)[1]) for what in ("sum", "count"))
    return found | {"batch": (total, count)}


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """Of all threads so far, in the program and in the kernel; Linux only."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(path: Path, state: str, memory_budget: str, replicas: int | None) -> tuple[subprocess.Popen[str], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "serve",
        str(path),
        "--port",
        str(port),
        "--state-dir",
        state,
        "--memory-budget",
        memory_budget,
    ]
    command += [] if replicas is None else ["--replicas", str(replicas)]
    log = Path(state) / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, text=True)
    while not (found := re.search(r"^serving .* at (\S+)/$", log.read_text(), re.M)):
        time.sleep(0.1)
    url = found[1]
    while httpx.get(f"{url}/readyz").status_code != 200:
        time.sleep(0.1)
    return process, url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--queries", type=int, default=48, help="for each number of clients")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--warm", type=int, default=4, help="other questions that are asked before any is timed")
    parser.add_argument("--memory-budget", default="16GiB")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = open_run(options.run)
    asked = questions(run, options.queries * len(options.clients) + options.warm)
    warm, asked = asked[: options.warm], asked[options.warm :]
    settings = QueryOptions(k=10, candidates=options.candidates)
    expected = [run.answer([run.measure(**one)], settings)[0].to_json() for one in asked]
    bodies = [{**one, "k": 10, "candidates": options.candidates} for one in asked]
    rows = []
    with tempfile.TemporaryDirectory() as state:
        process, url = start(options.run, state, options.memory_budget, options.replicas)
        name = options.run.resolve().name
        try:
            load(url, name, [{**one, "candidates": options.candidates} for one in warm], min(8, len(warm)))
            for place, clients in enumerate(options.clients):
                chosen = slice(place * options.queries, (place + 1) * options.queries)
                before, cpu = {} if options.replicas else stages(url), cpu_seconds(process)
                seconds, answers, whole = load(url, name, bodies[chosen], clients)
                after = {} if options.replicas else stages(url)
                wrong = [wrong for one, other in zip(answers, expected[chosen], strict=True) if (wrong := differs(one, other))]
                delta = {key: (after[key][0] - before.get(key, (0, 0))[0], after[key][1] - before.get(key, (0, 0))[1]) for key in after}
                rows.append(
                    {
                        "clients": clients,
                        "queries_per_second": len(answers) / whole,
                        "median": float(np.percentile(seconds, 50)),
                        "p95": float(np.percentile(seconds, 95)),
                        "p99": float(np.percentile(seconds, 99)),
                        "cpu": float("nan") if options.replicas else (cpu_seconds(process) - cpu) / len(answers),
                        "batch": delta["batch"][0] / delta["batch"][1] if delta else float("nan"),
                        "stages": {key: total / count for key, (total, count) in delta.items() if count and key != "batch"},
                        "wrong": wrong,
                    }
                )
        finally:
            process.terminate()
            process.wait()
    _print(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if any(row["wrong"] for row in rows):
        sys.exit(1)


def _print(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["stages"])
    print(
        "| clients | queries/s | times one client | median, s | 95%, s | 99%, s | CPU, s a query | batch | "
        + " | ".join(f"{n}, ms" for n in names)
        + " | wrong |"
    )
    print("|" + "---|" * (9 + len(names)))
    for row in rows:
        stage = " | ".join(f"{1000 * row['stages'].get(name, 0):.0f}" for name in names)
        ratio = row["queries_per_second"] / rows[0]["queries_per_second"]
        print(
            f"| {row['clients']} | {row['queries_per_second']:.2f} | {ratio:.1f} | {row['median']:.3f} | {row['p95']:.3f} | {row['p99']:.3f} | "
            f"{row['cpu']:.3f} | {row['batch']:.1f} | {stage} | {len(row['wrong'])} |"
        )
    for row in rows:
        for wrong in row["wrong"][:3]:
            print(f"wrong with {row['clients']} clients: {wrong}")


if __name__ == "__main__":
    main()
