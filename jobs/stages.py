"""The stages of a run as plain functions over units of work.

A unit is (stage, name): a shard of sequences, a covariance, or everything. Its function reads what earlier stages left in the run
directory and returns how to write its own output; who calls it, in which process and in which order within a stage makes no difference.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import (
    Covariance,
    EigenvalueSum,
    LayerFactors,
    SequenceBatch,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    layer_factors,
    reached_positions,
    sequence_weights,
)
from indexing import row_scores
from influence import optimizer_state
from influence.artifacts import (
    read_covariance,
    read_eigenvalues,
    stage_fingerprints,
    write_covariances,
    write_eigenbasis,
    write_eigenvalues,
    write_factors,
    write_layers,
)
from influence.attribution import scan
from influence.batches import in_batches
from influence.chat import check_template
from influence.config import Config
from influence.documents import data_fingerprint, read_documents
from influence.errors import RequestError
from influence.evaluation.fidelity import rows_of_queries
from influence.fidelity import DEPTHS, WIDER, Fidelity, end_fidelity, end_name, ndcg_of_wider, rank_correlation
from influence.lexical import write_lexical
from influence.measurement import Measurement
from influence.model import (
    LanguageModel,
    check_takes_documents_apart,
    embedded_tokens,
    find_layers,
    load_model,
    longest_sequence,
    model_fingerprint,
    tokenizer_fingerprint,
)
from influence.rows import encoded_rows
from influence.run import MOST_SCAN_UNITS, Run, num_fit_units
from influence.sequences import TrainingSequence, tokenize, write_sequences
from influence.solving import Solved, in_groups, solved, within_memory
from influence.stored_run import run_directory

Write = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run: what its units are called, and the work of one of them."""

    name: str
    title: str
    units: Callable[[Run], Sequence[str]]
    work: Callable[[Run, Config, str], Write]
    size: Callable[[Run, str], float] = lambda *_: 1.0
    """How much work a unit is, more than 0, in a measure that is the same for all units of the stage: its sequences, in passes over these."""
    over_sequences: bool = False
    needs_model: bool = True
    """Whether its units use the model, which is worth keeping in memory for the next one. Where they do not, the memory is theirs."""


def create_run(config: Config) -> None:
    """Writes what the run is made of into its directory, or checks that the directory was made from the same.

    Loads the model once for its fingerprint. Raises RequestError when anything differs, or the sequences are longer than the model allows.
    """
    data = data_fingerprint(config.data)
    loaded: LanguageModel = load_model(config.model, config.resources.memory_budget)
    limit = longest_sequence(loaded.model)
    if limit is not None and config.data.sequence_length > limit:
        raise RequestError(f"data.sequence_length is {config.data.sequence_length}, but the model has {limit} positions: lower it")
    known = embedded_tokens(loaded.model)
    if len(loaded.tokenizer) > known:
        raise RequestError(
            f"the tokenizer at {config.model.name} has {len(loaded.tokenizer)} tokens, but the model knows {known}: they do not belong together"
        )
    if config.data.messages is not None:
        check_template(loaded.tokenizer)
    if config.data.attention == "document":
        check_takes_documents_apart(loaded)
    if config.factors.damping == "optimizer" and not (Path(config.model.name) / optimizer_state.FILE).is_file():
        raise RequestError(
            f"factors.damping is optimizer, but there is no {optimizer_state.FILE} in {config.model.name}: "
            "write it with influence.save_optimizer_state after training"
        )
    run_directory(config.run.dir).create(
        {
            "settings": config.identity(),
            "fingerprints": {
                "model": model_fingerprint(loaded.model),
                "tokenizer": tokenizer_fingerprint(loaded.tokenizer, with_template=config.data.messages is not None),
                "data": data,
            },
            "sources": {
                "model": config.model.name,
                "revision": config.model.revision,
                **({} if config.model.adapter is None else {"adapter": config.model.adapter}),
                **({} if config.model.flax is None else {"flax": config.model.flax}),
                "files": config.data.files,
            },
        },
        stage_fingerprints,
    )


def do_unit(stage: Stage, run: Run, config: Config, unit: str) -> None:
    """Does one unit's work and leaves its output in the run directory, unless it is there already."""
    fingerprint = run.fingerprints[stage.name]
    if not run.directory.is_done(stage.name, unit, fingerprint):
        within_memory([run], lambda: run.directory.write_unit(stage.name, unit, fingerprint, stage.work(run, config, unit)))


def _everything(_: Run) -> Sequence[str]:
    return ["all"]


def _shards(run: Run) -> Sequence[str]:
    return run.shards


def _covariance_names(run: Run) -> Sequence[str]:
    return sorted(run.covariance_sizes)


def _shard_number(unit: str) -> int:
    return int(unit.removeprefix("part-"))


def _shard_size(run: Run, unit: str) -> float:
    return float(run.training.summary["shards"][_shard_number(unit)])


def _sequences(run: Run, config: Config, _: str) -> Write:
    def write(directory: Path) -> None:
        sequences = tokenize(read_documents(config.data), run.tokenizer, config.data)
        write_sequences(directory, sequences, config.data.sequences_per_shard, keep_text=config.data.keep_text)

    return write


def _layers(run: Run, config: Config, _: str) -> Write:
    coverage = find_layers(run.language_model.model, config.factors.patterns, config.factors.split_layers)
    if config.index.row_length < len(coverage.layers):
        raise RequestError(
            f"index.bytes_per_sequence is {config.index.bytes_per_sequence}, which in {config.index.encoding} is {config.index.row_length} numbers, "
            f"fewer than the {len(coverage.layers)} layers: raise it"
        )
    return lambda directory: write_layers(directory, coverage)


def _shards_of(run: Run, units: Sequence[str], unit: str) -> list[int]:
    """The shards of one of so many units: some that follow each other."""
    return list(np.array_split(np.arange(run.training.num_shards), len(units))[units.index(unit)].tolist())


def _fit_units(run: Run) -> Sequence[str]:
    """Of the two passes that fit factors: few, because each leaves sums as large as the factors on disk."""
    per_shard = int(run.description["settings"]["data"]["sequences_per_shard"])
    return [f"part-{number:05d}" for number in range(num_fit_units(run.fitted_on, run.training.num_shards, per_shard))]


def _fit_shards(run: Run, unit: str) -> list[int]:
    return _shards_of(run, _fit_units(run), unit)


def _fit_size(stage: str, run: Run, unit: str) -> float:
    """About how many sequences of these shards are chosen: whoever directs the work does not read the ids that would tell."""
    share = min(1.0, run.fitted_on[stage] / len(run.training))
    return share * sum(int(run.training.summary["shards"][shard]) for shard in _fit_shards(run, unit))


def _fit_batches(run: Run, stage: str, unit: str) -> Iterator[SequenceBatch]:
    for shard in _fit_shards(run, unit):
        for _, batch in in_batches(fitted_sequences(run, stage, shard), run.attributed.budget, run.attributed.device):
            yield batch


def fitted_sequences(run: Run, stage: str, shard: int) -> list[TrainingSequence]:
    """The sequences of a shard that this pass of the fit takes."""
    chosen = run.fitted[stage][run.training.starts[shard] :]
    return [sequence for place, sequence in enumerate(run.training.shard(shard)) if chosen[place]]


def _covariances(run: Run, _: Config, unit: str) -> Write:
    loss = drawn_label_loss(run.factors_config.seed)

    def write(directory: Path) -> None:
        for part in run.parts():
            batches = _fit_batches(run, "covariances", unit)
            write_covariances(directory, covariance_pass(part.model, part.layers, batches, loss, reached_positions, sequence_weights))

    return write


def _eigenbasis_size(run: Run, unit: str) -> float:
    """The cube of its dimension."""
    return float(run.covariance_sizes[unit]) ** 3


def _eigenbasis(run: Run, _: Config, unit: str) -> Write:
    parts = (read_covariance(path, unit) for path in run.checked_paths("covariances", _fit_units(run)))
    total: Covariance = reduce(add, (part for part in parts if part is not None))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float64" if run.model_config.dtype == "float64" else "float32"
    basis = eigenbasis(Covariance(total=total.total.to(device), num_positions=total.num_positions), dtype)
    return lambda directory: write_eigenbasis(directory, basis)


def _eigenvalues(run: Run, _: Config, unit: str) -> Write:
    loss = drawn_label_loss(run.factors_config.seed)

    def write(directory: Path) -> None:
        for part in run.parts():
            batches, bases = _fit_batches(run, "eigenvalues", unit), run.eigenvectors_of(part.layers)
            write_eigenvalues(directory, eigenvalue_pass(part.model, part.layers, bases, batches, loss, reached_positions))

    return write


def _factors(run: Run, config: Config, _: str) -> Write:
    damping = config.factors.as_damping()
    dtype = "float64" if run.model_config.dtype == "float64" else "float32"

    def factors() -> Iterator[tuple[str, LayerFactors]]:
        for layer in run.coverage.layers:
            sums = (read_eigenvalues(path, layer.name) for path in run.checked_paths("eigenvalues", _fit_units(run)))
            total: EigenvalueSum = reduce(add, (part for part in sums if part is not None))
            yield layer.name, layer_factors(None, None, total, damping, dtype)  # eigenvectors have files of their own

    return lambda directory: write_factors(directory, factors())


def _rows(run: Run, _: Config, unit: str) -> Write:
    return rows_of(run, run.training.shard(_shard_number(unit)))


def rows_of(run: Run, sequences: Sequence[TrainingSequence]) -> Write:
    """The rows of these sequences, and the self-influence of each."""
    rows, self_influence = encoded_rows(run, sequences, run.features, run.row_format)

    def write(directory: Path) -> None:
        np.save(directory / "rows.npy", rows, allow_pickle=False)
        np.save(directory / "self_influence.npy", self_influence / len(run.training), allow_pickle=False)

    return write


def _lexical(run: Run, _: Config, unit: str) -> Write:
    return lambda directory: write_lexical(directory, (sequence.text for sequence in run.training))


def sample_queries(run: Run) -> list[tuple[int, Measurement]]:
    """Training sequences that serve as queries: (number, measurement of the log-probability of the second half given the first).

    Chosen by hash of their ids among those with two counted tokens.
    """
    wanted, live = run.index_config.recall_queries, run.live
    chosen: list[tuple[int, Measurement]] = []
    for number in run.hash_order(run.index_config.seed).tolist():
        sequence = run.training[number]
        if not live[number]:
            continue
        second_half = sequence.counted & (np.cumsum(sequence.counted) > sequence.counted.sum() // 2)
        if len(chosen) == wanted:
            break
        if sequence.counted.sum() >= 2:
            query = TrainingSequence(**{**vars(sequence), "counted": second_half})
            chosen.append((number, Measurement(prompt="", completion=sequence.text, contrast=None, parts=((1.0, query),))))
    return chosen


def _solved(run: Run) -> Iterator[Solved]:
    """The sample queries' vectors, as many at a time as fit into memory."""
    for group in in_groups([measurement for _, measurement in sample_queries(run)], run, None):
        yield solved(run, run.attributed, group, None)


def _scan_units(run: Run) -> Sequence[str]:
    """Of the scan of sample queries: not one for every shard where these are many, because each unit solves for the queries anew."""
    count = min(MOST_SCAN_UNITS, run.training.num_shards) if run.measures_fidelity else 0
    return [f"part-{number:05d}" for number in range(count)]


def _scan_size(run: Run, unit: str) -> float:
    return sum(float(run.training.summary["shards"][shard]) for shard in _shards_of(run, _scan_units(run), unit))


def _scan(run: Run, _: Config, unit: str) -> Write:
    shards = _shards_of(run, _scan_units(run), unit)
    starts = run.training.starts - run.training.starts[shards[0]]
    parts = []
    for found in _solved(run):
        scores = np.zeros((len(found.log_probabilities), int(starts[shards[-1] + 1])))
        for attributed, vectors in found.vectors:
            for shard in shards:
                scores[:, starts[shard] : starts[shard + 1]] += scan(attributed, vectors, run.training.shard(shard))
        parts.append(scores)
    return lambda directory: np.save(directory / "scores.npy", np.concatenate(parts), allow_pickle=False)


def _fidelity_units(run: Run) -> Sequence[str]:
    return ["all"] if run.measures_fidelity else []


def _fidelity(run: Run, _: Config, unit: str) -> Write:
    """How close the index comes to the exact scores of the sample queries; a query's own sequence does not count."""
    queries = sample_queries(run)
    if not queries:
        raise RequestError(f"no training sequence of {run.directory} can be asked as a query any more: set index.recall_queries to 0")
    scans = _scan_units(run)
    run.directory.bring("scans", scans)
    exact = np.concatenate([np.load(run.path_of("scans", unit) / "scores.npy", allow_pickle=False) for unit in scans], axis=1)
    exact[np.arange(len(queries)), [number for number, _ in queries]] = -np.inf
    rows = rows_of_queries(run, [measurement for _, measurement in queries], run.features)
    trained = np.arange(len(run.store)) < len(run.training) if run.appended else None
    ends = {}
    for normalized, index in ((False, run.index), (True, run.normalized_index)):
        scores = exact * run.normalizing_weights[: len(run.training)] if normalized else exact
        for opponents, sign in ((False, 1), (True, -1)):
            truth = np.where(np.isfinite(exact), sign * scores, -np.inf)
            found = index.search(np.float32(sign) * rows, min(max(DEPTHS) + 1, len(run.training)), trained).numbers
            others = np.stack([_without(row, number) for row, (number, _) in zip(found, queries, strict=True)])
            ends[end_name(normalized, opponents)] = end_fidelity(truth, others)
    sample = run.sample(trained)
    estimates = row_scores(rows, run.rows, sample)
    spearman = rank_correlation(exact[:, sample], estimates)
    wider = {times: ndcg_of_wider(exact[:, sample], estimates, times) for times in WIDER if run.features.mixed}
    measured = Fidelity(num_queries=len(queries), spearman=spearman, ends=ends, of_wider=wider)

    def write(directory: Path) -> None:
        (directory / "fidelity.json").write_text(json.dumps(measured.to_json()), encoding="utf-8")

    return write


def _without(numbers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """The ranking without that one, or without its last where it does not hold it."""
    return np.asarray(numbers[numbers != number][: len(numbers) - 1])


STAGES = (
    Stage(name="sequences", title="reading and tokenizing data", units=_everything, work=_sequences, needs_model=False),
    Stage(name="lexical", title="lexical index", units=_everything, work=_lexical, needs_model=False),
    Stage(name="layers", title="finding layers", units=_everything, work=_layers),
    Stage(
        name="covariances",
        title="covariances",
        units=_fit_units,
        work=_covariances,
        size=partial(_fit_size, "covariances"),
        over_sequences=True,
    ),
    Stage(name="eigenbases", title="eigenbases", units=_covariance_names, work=_eigenbasis, size=_eigenbasis_size, needs_model=False),
    Stage(
        name="eigenvalues",
        title="corrected eigenvalues",
        units=_fit_units,
        work=_eigenvalues,
        size=partial(_fit_size, "eigenvalues"),
        over_sequences=True,
    ),
    Stage(name="factors", title="factors", units=_everything, work=_factors, needs_model=False),
    Stage(name="rows", title="index rows", units=_shards, work=_rows, size=_shard_size, over_sequences=True),
    Stage(name="scans", title="exact scan of sample queries", units=_scan_units, work=_scan, size=_scan_size, over_sequences=True),
    Stage(name="fidelity", title="fidelity of the index", units=_fidelity_units, work=_fidelity),
)
