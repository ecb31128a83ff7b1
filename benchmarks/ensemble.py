"""Runs over independently trained models, whose scores `influence evaluate RUN lds --also RUN` averages.

    python benchmarks/ensemble.py FOLDER --out runs/ensemble --models 4

FOLDER holds `base/` (the model before it was fine-tuned) and `train.jsonl` (with `input_ids`). Each model is fine-tuned from the base on all the
sequences with a seed of its own, then a run is made with it. Done again, only what is missing is made. Prints the paths of the runs and the
seconds that each took.
"""

import argparse
import time
from pathlib import Path

from influence.config import Config, load_config
from influence.documents import read_documents
from influence.evaluation.retraining import RetrainingSettings, fine_tuned
from influence.model import load_model
from influence.sequences import tokenize
from jobs.driver import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    options = parser.parse_args()
    for seed in range(1, options.models + 1):
        start = time.perf_counter()
        trained = options.out / f"model-{seed}"
        config = configured(options.folder, trained, options.out / f"run-{seed}", options.sequence_length)
        if not (trained / "config.json").exists():
            train(options.folder / "base", config, seed, trained)
        run_all(config)
        print(f"{options.out / f'run-{seed}'}: {time.perf_counter() - start:.0f} s")


def configured(folder: Path, model: Path, run: Path, sequence_length: int) -> Config:
    return load_config(
        None,
        {
            "model.name": str(model),
            "data.files": str(folder / "train.jsonl"),
            "data.input_ids": "input_ids",
            "data.sequence_length": sequence_length,
            "index.recall_queries": 0,
            "run.dir": str(run),
        },
    )


def train(base: Path, config: Config, seed: int, out: Path) -> None:
    loaded = load_model(config.model.model_copy(update={"name": str(base)}))
    sequences = list(tokenize(read_documents(config.data), loaded.tokenizer, config.data))
    model = fine_tuned(loaded.model, sequences, RetrainingSettings(), seed)
    loaded.tokenizer.save_pretrained(out)
    model.save_pretrained(out)  # type: ignore[operator]


if __name__ == "__main__":
    main()
