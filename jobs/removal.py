"""Removal: what a query's log-probability does when the model is trained again without the sequences that a method ranks first.

Knows runs, retraining and scores; knows nothing of options.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence.config import ResourcesConfig
from influence.evaluation.removal import random_deviation, removal_changes, removal_plan
from influence.evaluation.retraining import query_losses
from influence.run import Run
from jobs.answers import Asked
from jobs.changes import ChangesOutcome
from jobs.progress import say
from jobs.retraining import Retraining, retrain
from jobs.scoring import Tables


def measure_removal(
    run: Run,
    asked: Asked,
    tables: Tables,
    sizes: Sequence[int],
    retraining: Retraining,
    num_seeds: int,
    num_random: int,
    resources: ResourcesConfig,
    out: Path,
) -> ChangesOutcome:
    """Trains what is missing of the models: one on everything, and one without each set, for every seed."""
    plan = removal_plan(tables, run.store.ids, sizes, num_random)
    num_models = len(plan.masks) * num_seeds
    say(f"{num_models} models in all: {num_seeds} trained on everything, the others without what comes first")
    bank_path, bank = retrain(run, retraining, plan.masks, num_seeds, resources)
    own = query_losses(run.language_model.model, retraining.measurements, retraining.settings.batch_size)
    noise = random_deviation(plan, bank)
    before, off = -float(bank.losses[:, 0].mean()), float(np.abs(bank.losses[0, 0] - own).mean())
    return ChangesOutcome(
        metric="removal",
        title="Trained again without the sequences that come first",
        run=run,
        queries=tuple(name for name, _ in asked),
        changes=tuple(removal_changes(plan, bank)),
        facts={
            "log_probability": before,
            "reproduced_within": off,
            "random_deviation": noise,
            "num_models": num_models,
            "num_seeds": num_seeds,
            "num_random": num_random,
            "bank": str(bank_path),
        },
        notes=(
            f"{len(asked)} queries of mean log-probability {before:.2f}; {num_models} models trained",
            f"trained again on everything, queries differ from the run's own model by {off:.3f} nats on average: how true the recipe is",
            *(
                []
                if noise is None
                else [f"models without random sets differ by {noise:.2f} nats a query (standard deviation): the noise of one model"]
            ),
            f"bank: {bank_path}",
        ),
        out=out,
    )
