"""Checkpoints of one training: their scores, averages of them, and SOURCE (Bae et al. 2024, arXiv 2405.12186), against retrained models.

    python benchmarks/checkpoints.py FOLDER --out runs/checkpoints

FOLDER holds `base/`, `train.jsonl` and `query.jsonl` (with `input_ids`) and `bank.npz`. The base is fine-tuned once, and a run is made of the model
after every half epoch. Prints the linear datamodelling score of each and its paired difference to that of the last. Done again, only what is missing
is made.

SOURCE with a checkpoint for each segment of the training: from the last segment back, the query's gradient q at the end adds the score
⟨(1 - exp(-τΛ)) / Λ · q, ∇L⟩ of the segment's model, and goes on as exp(-τΛ) q, in the segment's eigenbasis. τ is the segment's share of the sum of
learning rates, over a multiple of each layer's mean eigenvalue, which plays the part of the damping.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ensemble import configured
from numpy.typing import NDArray
from torch import Tensor, nn

from influence.attribution import query_gradients, scan
from influence.documents import read_documents
from influence.evaluation.bank import read_bank
from influence.evaluation.lds import difference, linear_datamodelling_score
from influence.evaluation.retraining import RetrainingSettings, fine_tuned, learning_rates
from influence.model import load_model
from influence.run import Run
from influence.sequences import TrainingSequence, tokenize
from jobs.driver import run_all

HALVES = 6
RELATIVE = (0.03, 0.1, 0.3, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequence-length", type=int, default=64)
    options = parser.parse_args()
    names = [f"{half / 2:g}" for half in range(1, HALVES + 1)]
    configs = {
        name: configured(options.folder, options.out / f"model-{name}", options.out / f"run-{name}", options.sequence_length)
        for name in names
    }
    loaded = load_model(configs[names[0]].model.model_copy(update={"name": str(options.folder / "base")}))
    sequences = list(tokenize(read_documents(configs[names[0]].data), loaded.tokenizer, configs[names[0]].data))
    settings = RetrainingSettings()
    if not all((options.out / f"model-{name}" / "config.json").exists() for name in names):
        train(loaded.model, loaded.tokenizer, sequences, settings, options.out)
    runs = {name: run_all(config) for name, config in configs.items()}
    last = runs[names[-1]]
    bank = read_bank(options.folder / "bank.npz")
    asked = [json.loads(line)["input_ids"] for line in (options.folder / "query.jsonl").read_text().splitlines()[: bank.num_queries]]
    measurements = [last.measure_tokens(ids) for ids in asked]
    gradients = {name: query_gradients(run.attributed, measurements).gradients for name, run in runs.items()}
    tables = {name: by_ekfac(run, gradients[name], sequences) for name, run in runs.items()}
    base = linear_datamodelling_score(tables[names[-1]], bank)

    def say(name: str, table: NDArray[np.float64]) -> None:
        score = linear_datamodelling_score(table, bank)
        against = difference(score, base)
        print(
            f"| {name} | {score.value:.3f} | {against.value:+.3f} ({against.interval[0]:+.3f} – {against.interval[1]:+.3f}) |", flush=True
        )

    print("| checkpoints, in epochs | LDS | less the last |\n|---|---|---|")
    for name, table in tables.items():
        say(name, table)
    rates = learning_rates(settings, len(sequences))
    for chosen in (names[::2], names[1::2]):
        say(f"mean of {', '.join(chosen)}", np.mean([tables[name] for name in chosen], axis=0))
        shares = [sum(third) / sum(rates) * len(chosen) for third in np.array_split(rates, len(chosen))]
        for relative in RELATIVE:
            segments = [(runs[name], share / relative) for name, share in zip(chosen, shares, strict=True)]
            say(f"SOURCE of {', '.join(chosen)}, {relative:g} × mean", by_source(segments, gradients[names[-1]], sequences))


def train(base: nn.Module, tokenizer: object, sequences: Sequence[TrainingSequence], settings: RetrainingSettings, out: Path) -> None:
    steps = len(learning_rates(settings, len(sequences)))
    places = {steps * half // HALVES: f"{half / 2:g}" for half in range(1, HALVES + 1)}

    def keep(step: int, model: nn.Module) -> None:
        if step in places:
            tokenizer.save_pretrained(out / f"model-{places[step]}")  # type: ignore[attr-defined]
            model.save_pretrained(out / f"model-{places[step]}")  # type: ignore[operator]

    fine_tuned(base, sequences, settings, 1, step_done=keep)


def by_ekfac(run: Run, gradients: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> NDArray[np.float64]:
    vectors = {name: run.factors[name].precondition(gradient) for name, gradient in gradients.items()}
    return scan(run.attributed, vectors, sequences)


def by_source(
    segments: Sequence[tuple[Run, float]], gradients: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
) -> NDArray[np.float64]:
    """The scores [Q, N] of segments, the first first, each with its share of the learning rates over the multiple of the mean eigenvalue."""
    carried, total = dict(gradients), np.zeros(())
    for run, strength in reversed(segments):
        vectors = {}
        for name, gradient in carried.items():
            factors = run.factors[name]
            rotated, eigenvalues = factors.rotate(gradient).double(), factors.eigenvalues.double()
            spent = strength / eigenvalues.mean() * eigenvalues
            moved = torch.where(spent > 1e-9, -torch.expm1(-spent) / eigenvalues.clamp_min(1e-300), strength / eigenvalues.mean())
            vectors[name] = factors.unrotate((rotated * moved).to(gradient))
            carried[name] = factors.unrotate((rotated * torch.exp(-spent)).to(gradient))
        total = total + scan(run.attributed, vectors, sequences)
    return np.asarray(total)


if __name__ == "__main__":
    main()
