"""What `influence plan` says of a run beside what the run then takes: bytes on disk, memory and seconds of each stage.

    python benchmarks/plan.py FOLDER [--size small] [--size large] [--sequences 1500]

For each size a model of GPT-2's architecture with random weights, a tokenizer and a file of random text are written to FOLDER, `influence plan` is
asked, and `influence run` does it in a process of its own, watched from outside: a stage lasts from the last file of the stage before to its own
last one, and its memory is the largest that was resident meanwhile.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from influence.run_directory import STAGES

SIZES = {"small": (4, 128, 4), "large": (6, 384, 6)}
"""Layers, width and heads."""

POSITIONS, VOCABULARY = 128, 4096
POLL_SECONDS = 0.02
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--sequences", type=int, default=600)
    opts = parser.parse_args()
    for size in opts.size or list(SIZES):
        folder = opts.folder / size
        if not (folder / "train.jsonl").exists():
            make_folder(folder, size, opts.sequences)
        settings = ["--model", folder / "model", "--data", folder / "train.jsonl", "--out", folder / "run", "--sequence-length", POSITIONS]
        planned = json.loads(influence("plan", *settings, "--json"))
        report(size, planned["data"]["sequences"], planned, watch(settings, folder / "run"))


def make_folder(folder: Path, size: str, count: int) -> None:
    """A model, its tokenizer, and documents of random words of a made-up language, of 60 to 120 tokens."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in zip(random.choice(list("bdfgklmnprstvz"), 60), random.choice(list("aeiou"), 60), strict=True)]
    words = ["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(6000)]
    weights = 1 / np.arange(1, len(words) + 1)
    documents = [" ".join(random.choice(words, random.integers(40, 70), p=weights / weights.sum())) for _ in range(count)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder / "model")
    layers, width, heads = SIZES[size]
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": f"doc-{n}", "text": text}) + "\n" for n, text in enumerate(documents))


def influence(*arguments: object) -> str:
    words = [sys.executable, "-c", "from jobs.cli import main; main()", *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}).stdout


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What was seen of the process at a time."""

    time: float
    resident_bytes: int
    cpu_seconds: float


def watch(settings: Sequence[object], run: Path) -> dict[str, dict[str, float]]:
    """For each stage of a real run: seconds, seconds of the CPU, bytes on disk, and the most memory that was resident while it went on."""
    words = [sys.executable, "-c", "from jobs.cli import main; main()", "run", *map(str, settings)]
    shutil.rmtree(run, ignore_errors=True)
    start = time.time()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: list[Moment] = []
    while process.poll() is None:
        seen += _moment(process.pid)
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"influence run {' '.join(map(str, settings))} ended with status {process.returncode}")
    ends = {stage: max((path.stat().st_mtime for path in (run / stage).rglob("*")), default=0) for stage in STAGES}
    measured: dict[str, dict[str, float]] = {}
    for stage, end in [("start", (run / "run.json").stat().st_mtime), *sorted(ends.items(), key=lambda item: item[1])]:
        during = [moment for moment in seen if start <= moment.time <= end]
        measured[stage] = {
            "seconds": end - start,
            "cpu_seconds": during[-1].cpu_seconds - during[0].cpu_seconds if during else 0,
            "disk_bytes": sum(path.stat().st_size for path in (run / stage).rglob("*") if path.is_file()),
            "memory_bytes": max((moment.resident_bytes for moment in during), default=0),
        }
        start = end
    return measured


def _moment(process: int) -> Iterator[Moment]:
    """Nothing when the process has just ended."""
    try:
        resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (OSError, IndexError):
        return
    yield Moment(time=time.time(), resident_bytes=resident, cpu_seconds=sum(map(int, times)) / os.sysconf("SC_CLK_TCK"))


def report(size: str, count: int, planned: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]]) -> None:
    """A table of planned / measured; what is less than a second or a tenth of a MiB is not divided."""
    print(f"\n{size}: {planned['parameters']['total']:,} parameters, {count} sequences of {planned['data']['tokens']:.0f} tokens\n")
    print("| stage | disk, MiB | planned | memory, MiB | planned | CPU, s | (elapsed) | planned | planned / CPU |")
    print("|---" * 9 + "|")
    stages = {**planned["stages"], "all": planned}
    for stage, facts in [*measured.items(), ("all", _together(measured))]:
        plan = stages[stage]
        cells = [
            f"{facts['disk_bytes'] / 2**20:.2f}",
            f"{plan['disk_bytes'] / 2**20:.2f}",
            f"{facts['memory_bytes'] / 2**20:.0f}",
            f"{plan['memory_bytes'] / 2**20:.0f}",
            f"{facts['cpu_seconds']:.1f}",
            f"{facts['seconds']:.1f}",
            f"{plan['seconds']:.1f}",
            f"{plan['seconds'] / facts['cpu_seconds']:.2f}" if facts["cpu_seconds"] >= 1 else "",
        ]
        print(f"| {stage} | {' | '.join(cells)} |", flush=True)


def _together(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    every = list(measured.values())
    sums = {name: sum(facts[name] for facts in every) for name in ("seconds", "cpu_seconds", "disk_bytes")}
    return {**sums, "memory_bytes": max(facts["memory_bytes"] for facts in every)}


if __name__ == "__main__":
    main()
