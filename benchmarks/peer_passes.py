"""What `kronfluence_passes.py` and `bergson_passes.py` share: the folder they read, F, the choice of settings, medians, peaks and the report.

It knows neither library and imports nothing of this repository, because it runs in the environments of those libraries.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

Setting = Mapping[str, int | str | bool]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of the work. `run` takes a setting for each part and how many training sequences to pass over, and returns each part's seconds."""

    parts: tuple[str, ...]
    settings: Sequence[Setting]
    run: Callable[[Mapping[str, Setting], int], dict[str, float]]


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="holds `model/`, a GPT-2 in Hugging Face format, and `tokens.npy` [N, T]")
    parser.add_argument("--json", type=Path, required=True, help="the file to write the report to")
    parser.add_argument("--scores", type=Path, help="a .npy file to write the scores [Q, N] to")
    parser.add_argument("--queries", type=int, default=16, help="the first rows of `tokens.npy`, over again when it has fewer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="tried for each stage")
    parser.add_argument("--repeats", type=int, default=3, help="of all stages in turn, whose medians are reported")
    return parser.parse_args()


def read_tokens(folder: Path, num_queries: int) -> tuple[Tensor, Tensor]:
    """The training sequences [N, T] and the queries [Q, T], int64."""
    train = np.load(folder / "tokens.npy").astype(np.int64)
    return torch.from_numpy(train), torch.from_numpy(np.resize(train, (num_queries, train.shape[1])))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_stage(folder: Path, train: Tensor) -> Stage:
    """F: forward and backward with all weight gradients."""
    device = default_device()
    model = GPT2LMHeadModel.from_pretrained(folder / "model", dtype=torch.float32).to(device).eval()

    def plain(setting: Setting, count: int) -> None:
        model.set_attn_implementation(setting["attention"])
        for batch in train[:count].split(int(setting["batch_size"])):
            tokens = batch.to(device)
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)

    settings = [{"batch_size": size, "attention": attention} for attention in ("sdpa", "eager") for size in (8, 16, 32)]
    return one_part("F", settings, plain)


def one_part(name: str, settings: Sequence[Setting], work: Callable[[Setting, int], object]) -> Stage:
    return Stage(parts=(name,), settings=settings, run=lambda chosen, count: {name: timed(lambda: work(chosen[name], count))})


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return clock() - start


def clock() -> float:
    """Now, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(stage: Stage, passes: int = 1) -> dict[str, Setting]:
    """For each part the setting that took least, in the best of a few passes over as many sequences as the largest batch has."""
    if len(stage.settings) == 1:
        return dict.fromkeys(stage.parts, stage.settings[0])
    count = max(int(setting["batch_size"]) for setting in stage.settings)
    stage.run(dict.fromkeys(stage.parts, stage.settings[0]), 8)  # the first pass of a kind is slower
    tried = [(setting, stage.run(dict.fromkeys(stage.parts, setting), count)) for _ in range(passes) for setting in stage.settings]
    for setting, seconds in tried:
        print(f"tried {setting} on {count} sequences: {seconds}", file=sys.stderr, flush=True)
    return {part: min(tried, key=lambda one: one[1][part])[0] for part in stage.parts}


def report(library: str, stages: Sequence[Stage], chosen: dict[str, Setting], opts: argparse.Namespace, count: int) -> None:
    """Runs the stages in turn, `--repeats` times over `count` sequences, chooses the settings that are not chosen yet, and writes and prints
    medians, their multiples of F and the peaks of memory: those of the stages at their settings, not those of the choosing.
    """
    reset_peak()
    baseline = memory("VmRSS")
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for _ in range(opts.repeats):
        for stage in stages:
            if not set(stage.parts) <= chosen.keys():
                chosen |= fastest(stage)
            reset_peak()
            for part, value in stage.run(chosen, count).items():
                seconds.setdefault(part, []).append(value)
                peaks.setdefault(part, memory("VmHWM"))  # later ones would include what the round before has left
                print(f"{part}: {value:.2f} s", file=sys.stderr, flush=True)
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    result = {
        "library": library,
        "device": default_device().type,
        "threads": torch.get_num_threads(),
        "sequences": count,
        "queries": opts.queries,
        "seconds": medians,
        "multiples_of_F": {part: value / medians["F"] for part, value in medians.items()},
        "all_seconds": seconds,
        "settings": chosen,
        "loaded_bytes": baseline,
        "peak_bytes": peaks,
    }
    opts.json.parent.mkdir(parents=True, exist_ok=True)
    opts.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{library}, {result['device']}, {result['threads']} threads: {count} sequences, {opts.queries} queries\n")
    print("| stage | seconds | F | peak GB | setting |\n|---|---|---|---|---|")
    for part, value in medians.items():
        setting = ", ".join(f"{name} {choice}" for name, choice in chosen[part].items())
        print(f"| {part} | {value:.2f} | {value / medians['F']:.2f} | {peaks[part] / 1e9:.2f} | {setting} |")
    print(f"\nwith the models loaded, before any pass: {baseline / 1e9:.2f} GB")


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what larger batches left with the allocator is not this pass's
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which is also what getrusage calls ru_maxrss


def memory(field: str) -> int:
    """Bytes that are resident now ("VmRSS") or were at most since `reset_peak` ("VmHWM"), on a GPU those that torch allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
