"""Retraining a run's base model on parts of its training sequences, for a bank that scores can be compared with.

A unit is (set of sequences, seed): one model, trained and measured, of which the losses of the queries are kept. Units are independent: any number of
workers do them in any order, a second call goes on where the first was stopped, and of more sets or seeds only the new ones are work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.config import ModelConfig, ResourcesConfig
from influence.errors import RequestError
from influence.evaluation.bank import FEWEST_SUBSETS, Bank, query_digest, sequences_digest, write_bank
from influence.evaluation.recipe import FILE as RECIPE_FILE
from influence.evaluation.recipe import Recipe
from influence.evaluation.retraining import RetrainingSettings, fine_tuned, mask_name, query_losses
from influence.living import Living
from influence.measurement import Measurement
from influence.model import LanguageModel, embedded_tokens, load_model, longest_sequence, model_fingerprint
from influence.run import Run
from influence.run_directory import digest, write_json
from influence.sequences import TrainingSequence
from jobs.units import do_missing, do_unit, numbers_of

FORMAT = 2
"""Version of how a model is trained and measured. Another one starts anew."""


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What is retrained and measured; everything that the losses of a unit depend on besides its set of sequences and seed is in `fingerprint`.

    Paired models see the batches of a training on everything, with what is left out missing from them, and those of one seed differ by nothing else:
    for the effect of leaving out a few. Others see batches of their own, in an order of their own: for what models of such sets have in common.
    """

    run: str
    base: ModelConfig
    base_fingerprint: str
    sequences: str  # their digest
    measurements: tuple[Measurement, ...]
    settings: RetrainingSettings
    first_seed: int
    paired: bool
    fingerprint: str

    @property
    def place(self) -> str:
        """Where below the run directory its units are."""
        return f"evaluations/retrained-{self.fingerprint[7:23]}"

    def unit_fingerprint(self, unit: str) -> str:
        return digest([self.fingerprint, unit])


def check_whole(run: Run, metric: str) -> None:
    """Raises RequestError when the run's sequences are not those that the model was trained on, all and alone."""
    if run.directory.living != Living():
        raise RequestError(
            f"sequences were appended to {run.directory} or removed from it: {metric} needs the training sequences, all and alone"
        )


def retraining_of(run: Run, recipe: Recipe, measurements: Sequence[Measurement], *, paired: bool) -> Retraining:
    """The retraining of the recipe's base, a local directory or hub id, on the run's sequences. Loads it once.

    It is trained in float64 where the run computes in it, in float32 otherwise. Raises RequestError when it cannot have become the run's model.
    """
    if run.model_config.adapter is not None:
        raise RequestError(f"{run.directory} is of an adapter, and retraining trains whole models: give scores of a model without one")
    base = recipe.base
    if base is None:
        raise RequestError(
            f"retraining needs --base: the model before it was trained on the data, as a directory or hub id (or {RECIPE_FILE} beside the model)"
        )
    local = Path(base).expanduser()
    name = str(local.resolve()) if local.is_dir() or base.startswith((".", "~")) else base
    run.check_code()
    config = ModelConfig(name=name, flax=run.model_config.flax, dtype="float64" if run.model_config.dtype == "float64" else "float32")
    loaded = load_model(config)
    _check_base(loaded, run, base)
    weights, sequences = model_fingerprint(loaded.model), sequences_digest(run.store)
    queries = [query_digest(measurement) for measurement in measurements]
    how = [asdict(recipe.settings), recipe.seed, paired]
    return Retraining(
        run=str(run.directory.path.resolve()),
        base=config,
        base_fingerprint=weights,
        sequences=sequences,
        measurements=tuple(measurements),
        settings=recipe.settings,
        first_seed=recipe.seed,
        paired=paired,
        fingerprint=digest([FORMAT, weights, run.description["fingerprints"]["tokenizer"], sequences, run.store.ids, queries, how]),
    )


def _check_base(loaded: LanguageModel, run: Run, base: str) -> None:
    if model_fingerprint(loaded.model) == run.description["fingerprints"]["model"]:
        raise RequestError(f"--base: {base} is the run's own model, already trained on the data; give the model that it was trained from")
    if loaded.tokenizer.get_vocab() != run.tokenizer.get_vocab():
        raise RequestError(
            f"--base: the tokenizer of {base} has another vocabulary than the run's: it was not the beginning of the run's model"
        )
    known = embedded_tokens(loaded.model)
    if len(run.tokenizer) > known:
        raise RequestError(f"--base: {base} knows {known} tokens, but the run's tokenizer has {len(run.tokenizer)}")
    limit, needed = longest_sequence(loaded.model), max(len(sequence.tokens) for sequence in run.store)
    if limit is not None and needed > limit:
        raise RequestError(f"--base: {base} has {limit} positions, but a training sequence has {needed} tokens")


class RetrainingWork:
    """One worker's side: base model and sequences are loaded with the first unit, and kept."""

    def __init__(self, retraining: Retraining, masks: Mapping[str, NDArray[np.bool_]]) -> None:
        self.retraining, self.masks = retraining, masks

    @cached_property
    def run(self) -> Run:
        return Run(self.retraining.run, flax=self.retraining.base.flax)

    @cached_property
    def sequences(self) -> tuple[TrainingSequence, ...]:
        return tuple(self.run.store)

    @cached_property
    def base(self) -> LanguageModel:
        loaded = load_model(self.retraining.base)
        found = model_fingerprint(loaded.model)
        if found != self.retraining.base_fingerprint:
            raise RequestError(
                f"--base: the weights at {self.retraining.base.name} changed, or are others on this machine (fingerprint {found})"
            )
        return loaded

    def do(self, _: str, unit: str) -> None:
        """Trains and measures one model, and leaves its losses in the run directory, unless they are there already."""
        do_unit(self.run, self.retraining, unit, "losses", lambda: self._losses(*mask_and_seed(unit)))

    def _losses(self, name: str, number: int) -> NDArray[np.float64]:
        mask, plan = self.masks[name], self.retraining
        if plan.paired:
            left_out = np.flatnonzero(~mask).tolist()
            model = fine_tuned(self.base.model, self.sequences, plan.settings, plan.first_seed + number, left_out=left_out)
        else:
            kept = [sequence for sequence, chosen in zip(self.sequences, mask, strict=True) if chosen]
            model = fine_tuned(self.base.model, kept, plan.settings, int(digest([name, plan.first_seed + number])[7:22], 16))
        return query_losses(model, plan.measurements, plan.settings.batch_size)


def unit_of(name: str, seed: int) -> str:
    return f"{name}-seed-{seed}"


def mask_and_seed(unit: str) -> tuple[str, int]:
    name, _, seed = unit.split("-")
    return name, int(seed)


def retrain(run: Run, retraining: Retraining, masks: NDArray[np.bool_], num_seeds: int, resources: ResourcesConfig) -> tuple[Path, Bank]:
    """Does what is missing of the units, and writes the bank of them all below the run's `evaluations/`. Gives its path, and the bank.

    `masks` [S, N] say which sequences each model is trained on.
    """
    names = [mask_name(mask) for mask in masks]
    units = list(dict.fromkeys(unit_of(name, seed) for name in names for seed in range(num_seeds)))
    with run.directory.exclusive():
        do_missing(run, retraining, units, RetrainingWork(retraining, dict(zip(names, masks, strict=True))), resources, "retraining")
        directory = run.directory.path / retraining.place
        write_json(directory / "retraining.json", _record(retraining))
        bank = _bank(run, retraining, masks, num_seeds)
        path = directory / f"bank-{len(masks)}-subsets-{num_seeds}-seeds.npz"
        write_bank(path, bank)
    return path, bank


def _record(retraining: Retraining) -> dict[str, Any]:
    """What people may want to know of a bank later."""
    return {
        "base": retraining.base.name,
        "base_fingerprint": retraining.base_fingerprint,
        "sequences": retraining.sequences,
        "queries": [measurement.prompt + measurement.completion for measurement in retraining.measurements],
        "settings": asdict(retraining.settings),
        "first_seed": retraining.first_seed,
        "paired": retraining.paired,
        "fingerprint": retraining.fingerprint,
    }


def _bank(run: Run, retraining: Retraining, masks: NDArray[np.bool_], num_seeds: int) -> Bank:
    units = [[unit_of(mask_name(mask), seed) for mask in masks] for seed in range(num_seeds)]
    return Bank(
        masks=masks,
        losses=np.stack([[numbers_of(run, retraining, unit, "losses") for unit in row] for row in units]),
        sequences=retraining.sequences,
        queries=tuple(query_digest(measurement) for measurement in retraining.measurements),
    )


def check_bank_size(num_subsets: int, num_seeds: int, num_sequences: int) -> None:
    """Raises RequestError for a bank that nothing could be measured with."""
    if num_subsets < FEWEST_SUBSETS:
        raise RequestError(f"--subsets: a rank correlation needs at least {FEWEST_SUBSETS} subsets, not {num_subsets}")
    if num_seeds < 1:
        raise RequestError(f"--seeds must be at least 1, not {num_seeds}")
    if num_sequences < 2:
        raise RequestError("a run of one training sequence has no halves to train on")
