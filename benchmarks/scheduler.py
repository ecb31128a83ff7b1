"""What the scheduling of units costs, and how work speeds up with workers.

    python benchmarks/scheduler.py simulate [--units 10000] [--workers 100]
    python benchmarks/scheduler.py empty [--units 2000] [--workers 2] [--seconds 0]
    python benchmarks/scheduler.py workers [--sequences 256]

`simulate`: the scheduler's own code (`jobs.scheduler`) on a simulated cluster whose workers die, whose units fail and sometimes take a hundred times
as long; the seconds it takes for each unit, and its memory at several numbers of units. `empty`: units without work through real workers on a
local Ray, some of which fail: all that a unit costs besides its work; with `--seconds`, each waits so long, which shows how many workers can be kept
busy where cores are not what is short. `workers`: the passes of a run of GPT-2's architecture (4 layers of width 256, random weights and tokens), by
one worker and by two, of one CPU each.
"""

import argparse
import heapq
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from influence.config import Config, ResourcesConfig, load_config
from jobs.driver import run_all
from jobs.executors import OnRay, RayWorkers, ray_connection
from jobs.scheduler import Rules, Schedule
from jobs.stages import STAGES

DEATH, ERROR, SLOW = 0.02, 0.02, 0.01
"""Shares of the units begun whose worker dies, which raise, and which take a hundred times as long."""


def simulate(num_units: int, num_workers: int, seed: int = 0) -> dict[str, float]:
    """Plays a step on a simulated cluster, on whose clock a unit takes about ten seconds and a start a minute."""
    draw, now, seconds, made = random.Random(seed), 0.0, 0.0, 0
    schedule = Schedule({f"part-{n:05d}": 1.0 for n in range(num_units)}, num_workers, Rules(tries=10))
    events: list[tuple[float, int, str, int, int]] = []
    life, counts = dict.fromkeys(range(num_workers), 0), Counter[str]()

    def timed(call: Callable[..., Any], *arguments: object) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        found = call(*arguments)
        seconds += time.perf_counter() - start
        return found

    def later(after: float, what: str, worker: int) -> None:
        nonlocal made
        made += 1
        heapq.heappush(events, (now + after, made, what, worker, life[worker]))

    def start(worker: int) -> None:
        life[worker] += 1  # whatever an ended worker was at is never heard of again
        later(draw.uniform(30, 90), "join", worker)

    for worker in range(num_workers):
        start(worker)
    while not timed(schedule.ended, now):
        for worker, _ in timed(schedule.begin, now):
            counts["begun"] += 1
            fails = draw.random() < DEATH + ERROR
            later(draw.lognormvariate(2.3, 0.3) * (100 if draw.random() < SLOW else 1), "fail" if fails else "finish", worker)
        if not events or events[0][0] > now + 1:
            now += 1
            continue
        now, _, what, worker, of = heapq.heappop(events)
        if of != life[worker]:
            continue
        if what == "join":
            timed(schedule.joined, worker)
        elif what == "finish":
            _, in_vain = timed(schedule.finished, worker, now)
            counts["done"] += 1
            counts["in vain"] += len(in_vain)
            for other in in_vain:
                start(other)
        else:
            timed(schedule.failed, worker, "by lot")
            counts["failed"] += 1
            start(worker)
    assert counts["done"] == num_units
    return {"milliseconds a unit": 1000 * seconds / num_units, "simulated hours": now / 3600, **counts}


def report_simulations(num_units: int, num_workers: int) -> None:
    print(
        f"simulated, {num_workers} workers; of the units begun {DEATH:.0%} lose their worker, {ERROR:.0%} raise, {SLOW:.0%} take 100 times as long\n"
    )
    print("| units | begun | failed | in vain | simulated hours | ms a unit | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for count in (num_units // 10, num_units, 10 * num_units):
        found = simulate(count, num_workers)
        tracemalloc.start()
        simulate(count, num_workers)
        memory = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        counts = " | ".join(f"{found[name]:,}" for name in ("begun", "failed", "in vain"))
        print(f"| {count:,} | {counts} | {found['simulated hours']:.1f} | {found['milliseconds a unit']:.3f} | {memory:.1f} |")


def report_empty_units(num_units: int, num_workers: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)

        class FailsAtFirst:  # here, so that it is sent by value
            """Nothing to do; every unit of which the number ends in 777 fails at its first try."""

            def do(self, step: str, unit: str) -> None:
                time.sleep(seconds)
                if unit.endswith("777") and not (marks / unit).exists():
                    (marks / unit).touch()
                    raise OSError("by design")

        resources = ResourcesConfig(workers=num_workers)
        with ray_connection(resources):
            workers = RayWorkers(resources, num_workers, FailsAtFirst())
            times: list[float] = []
            failures: list[object] = []
            sizes = {f"part-{n:05d}": 1.0 for n in range(num_units)}
            ray.get([workers._start(place) for place in range(num_workers)])  # all of them run before the clock does
            start = time.perf_counter()
            workers.do_all("empty", sizes, lambda unit: times.append(time.perf_counter()), failures.append)
            workers.close()
    between = np.diff([start, *times])
    print(
        f"empty units on Ray, {num_workers} workers: {num_units:,} units, {len(failures)} of them tried twice, {times[-1] - start:.1f} s; "
        f"{1000 * np.median(between):.2f} ms a unit (median), {1000 * np.mean(between):.2f} (mean)"
    )
    if seconds:
        print(f"efficiency, of units of {seconds} s: {num_units * seconds / num_workers / (times[-1] - start):.3f}")


def make_world(folder: Path, num_sequences: int) -> Config:
    """A model, its tokenizer and data, all random; 128 tokens a sequence, 16 sequences a shard."""
    words = [f"w{n}" for n in range(4096)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", unk_token="w0").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lines = (" ".join(f"w{n}" for n in rng.integers(1, 4096, 128)) for _ in range(num_sequences))
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return load_config(
        None,
        {
            "model.name": str(folder / "model"),
            "data.files": str(folder / "train.txt"),
            "data.sequence_length": 128,
            "data.sequences_per_shard": 16,
            "factors.sequences": num_sequences,
            "factors.layers": ["*.h.*"],
            "index.recall_queries": 0,
            "run.dir": str(folder / "run"),
        },
    )


def seconds_by_stage(num_sequences: int, num_workers: int) -> dict[str, float]:
    """Of every stage after the first three, by so many workers of one CPU; all have the model before the clock starts."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_world(Path(folder), num_sequences)
        run = run_all(config, until="layers")
        ray.init(address="local", num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level="error")
        executor, seconds = OnRay(config, num_workers), {}
        try:
            for stage in STAGES[3:8]:
                sizes = {unit: stage.size(run, unit) for unit in stage.units(run)}
                if stage.name == "covariances":
                    warm_up(executor, num_workers)
                start = time.perf_counter()
                executor.do(stage, sizes, lambda unit: None, print)
                seconds[stage.name] = time.perf_counter() - start
        finally:
            executor.close()
            ray.shutdown()
    return seconds


def warm_up(executor: OnRay, num_workers: int) -> None:
    """Waits until all the workers run and have loaded the model."""
    references = [executor._start(place) for place in range(num_workers)]
    ray.get(references)

    def load(worker: object) -> int:
        from influence.run import Run

        work = worker.work  # type: ignore[attr-defined]
        work.run = Run(work.config.run.dir, memory_budget=work.config.resources.memory_budget)
        return len(work.run.attributed.layers)

    ray.get([worker.__ray_call__.remote(load) for worker in executor.workers.values()])


def report_workers(num_sequences: int) -> None:
    one, two = (seconds_by_stage(num_sequences, count) for count in (1, 2))
    print(f"{num_sequences} sequences of 128 tokens, one CPU and one thread a worker\n")
    print("| stage | 1 worker, s | 2 workers, s | efficiency |\n|---|---|---|---|")
    for name in one:
        print(f"| {name} | {one[name]:.1f} | {two[name]:.1f} | {one[name] / two[name] / 2:.2f} |")
    print(f"| together | {sum(one.values()):.1f} | {sum(two.values()):.1f} | {sum(one.values()) / sum(two.values()) / 2:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["simulate", "empty", "workers"])
    parser.add_argument("--units", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--sequences", type=int, default=256)
    opts = parser.parse_args()
    if opts.what == "simulate":
        report_simulations(opts.units or 10_000, opts.workers or 100)
    elif opts.what == "empty":
        report_empty_units(opts.units or 2000, opts.workers or 2, opts.seconds)
    else:
        report_workers(opts.sequences)


if __name__ == "__main__":
    main()
