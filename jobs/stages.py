"""The stages of a run as plain functions over units of work.

A unit is (stage, name): a shard of sequences, a covariance, or everything. Its function reads what earlier stages left in the run
directory and returns how to write its own output; who calls it, in which process and in which order within a stage makes no difference.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import (
    Covariance,
    EigenvalueSum,
    SequenceBatch,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    layer_factors,
    merge,
    reached_positions,
    true_label_loss,
)
from indexing import feature_rows, query_rows, row_scores
from influence import optimizer_state
from influence.answering import in_groups
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
from influence.attribution import query_gradients, scan, solve
from influence.batches import in_batches
from influence.config import Config
from influence.documents import data_fingerprint, read_documents
from influence.errors import RequestError
from influence.fidelity import DEPTHS, Fidelity, end_fidelity, end_name, rank_correlation
from influence.lexical import write_lexical
from influence.measurement import Measurement
from influence.model import (
    LanguageModel,
    embedded_tokens,
    find_layers,
    load_model,
    longest_sequence,
    model_fingerprint,
    tokenizer_fingerprint,
)
from influence.run import MOST_FIT_GROUPS, Run
from influence.run_directory import RunDirectory
from influence.sequences import TrainingSequence, tokenize, write_sequences

Write = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run: what its units are called, and the work of one of them."""

    name: str
    title: str
    units: Callable[[Run], Sequence[str]]
    work: Callable[[Run, Config, str], Write]


def create_run(config: Config) -> None:
    """Writes what the run is made of into its directory, or checks that the directory was made from the same.

    Loads the model once for its fingerprint. Raises RequestError when anything differs, or the sequences are longer than the model allows.
    """
    data = data_fingerprint(config.data)
    loaded: LanguageModel = load_model(config.model)
    limit = longest_sequence(loaded.model)
    if limit is not None and config.data.sequence_length > limit:
        raise RequestError(f"data.sequence_length is {config.data.sequence_length}, but the model has {limit} positions: lower it")
    known = embedded_tokens(loaded.model)
    if len(loaded.tokenizer) > known:
        raise RequestError(
            f"the tokenizer at {config.model.name} has {len(loaded.tokenizer)} tokens, but the model knows {known}: they do not belong together"
        )
    if config.factors.damping == "optimizer" and not (Path(config.model.name) / optimizer_state.FILE).is_file():
        raise RequestError(
            f"factors.damping is optimizer, but there is no {optimizer_state.FILE} in {config.model.name}: "
            "write it with influence.save_optimizer_state after training"
        )
    RunDirectory(Path(config.run.dir)).create(
        {
            "settings": config.identity(),
            "fingerprints": {
                "model": model_fingerprint(loaded.model),
                "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
                "data": data,
            },
            "sources": {"model": config.model.name, "revision": config.model.revision, "files": config.data.files},
        },
        stage_fingerprints,
    )


def do_unit(stage: Stage, run: Run, config: Config, unit: str) -> None:
    """Does one unit's work and leaves its output in the run directory, unless it is there already."""
    fingerprint = run.fingerprints[stage.name]
    if not run.directory.is_done(stage.name, unit, fingerprint):
        run.directory.write_unit(stage.name, unit, fingerprint, stage.work(run, config, unit))


def _everything(_: Run) -> Sequence[str]:
    return ["all"]


def _shards(run: Run) -> Sequence[str]:
    return run.shards


def _covariance_names(run: Run) -> Sequence[str]:
    return sorted({name for layer in run.coverage.layers for name in (layer.input_name, layer.output_name) if name})


def _shard_number(unit: str) -> int:
    return int(unit.removeprefix("part-"))


def _sequences(run: Run, config: Config, _: str) -> Write:
    def write(directory: Path) -> None:
        sequences = tokenize(read_documents(config.data), run.tokenizer, config.data)
        write_sequences(directory, sequences, config.data.sequences_per_shard)

    return write


def _layers(run: Run, config: Config, _: str) -> Write:
    coverage = find_layers(run.language_model.model, config.factors.patterns)
    if config.index.row_length < len(coverage.layers):
        raise RequestError(
            f"index.bytes_per_sequence is {config.index.bytes_per_sequence}, which in {config.index.encoding} is {config.index.row_length} numbers, "
            f"fewer than the {len(coverage.layers)} layers: raise it"
        )
    return lambda directory: write_layers(directory, coverage)


def _fit_groups(run: Run) -> Sequence[str]:
    """The units of the two passes that fit factors: a few groups of shards, because each leaves sums as large as the factors on disk."""
    return [f"part-{group:05d}" for group in range(min(MOST_FIT_GROUPS, run.training.num_shards))]


def _fit_batches(run: Run, stage: str, unit: str) -> Iterator[SequenceBatch]:
    groups = np.array_split(np.arange(run.training.num_shards), len(_fit_groups(run)))
    for shard in groups[_shard_number(unit)]:
        for _, batch in in_batches(fitted_sequences(run, stage, int(shard)), run.attributed.budget, run.attributed.device):
            yield batch


def fitted_sequences(run: Run, stage: str, shard: int) -> list[TrainingSequence]:
    """The sequences of a shard that this pass of the fit takes."""
    chosen = run.fitted[stage][run.training.starts[shard] :]
    return [sequence for place, sequence in enumerate(run.training.shard(shard)) if chosen[place]]


def _covariances(run: Run, _: Config, unit: str) -> Write:
    attributed, loss = run.attributed, drawn_label_loss(run.factors_config.seed)
    batches = _fit_batches(run, "covariances", unit)
    parts = covariance_pass(attributed.model, attributed.layers, batches, loss, reached_positions)
    return lambda directory: write_covariances(directory, parts)


def _eigenbasis(run: Run, _: Config, unit: str) -> Write:
    parts = (read_covariance(run.path_of("covariances", group), unit) for group in _fit_groups(run))
    total: Covariance = reduce(add, (part for part in parts if part is not None))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float64" if run.model_config.dtype == "float64" else "float32"
    basis = eigenbasis(Covariance(total=total.total.to(device), num_positions=total.num_positions), dtype)
    return lambda directory: write_eigenbasis(directory, basis)


def _eigenvalues(run: Run, _: Config, unit: str) -> Write:
    attributed, loss = run.attributed, drawn_label_loss(run.factors_config.seed)
    batches = _fit_batches(run, "eigenvalues", unit)
    sums = eigenvalue_pass(attributed.model, attributed.layers, run.eigenvectors, batches, loss, reached_positions)
    return lambda directory: write_eigenvalues(directory, sums)


def _factors(run: Run, config: Config, _: str) -> Write:
    sums: Mapping[str, EigenvalueSum] = reduce(merge, (read_eigenvalues(run.path_of("eigenvalues", group)) for group in _fit_groups(run)))
    damping = config.factors.as_damping()
    dtype = "float64" if run.model_config.dtype == "float64" else "float32"
    factors = {name: layer_factors(None, None, part, damping, dtype) for name, part in sums.items()}  # eigenvectors have files of their own
    return lambda directory: write_factors(directory, factors)


def _rows(run: Run, _: Config, unit: str) -> Write:
    return rows_of(run, run.training.shard(_shard_number(unit)))


def rows_of(run: Run, sequences: Sequence[TrainingSequence]) -> Write:
    """The rows of these sequences, and the self-influence of each."""
    attributed = run.attributed
    rows = np.empty((len(sequences), run.row_format.bytes_per_row), dtype=np.uint8)
    self_influence = np.empty(len(sequences), dtype=np.float64)
    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        found, own = feature_rows(attributed.model, attributed.layers, run.factors, run.features, run.signs, true_label_loss, batch)
        try:
            rows[members], self_influence[members] = run.row_format.encode(found), own.cpu().numpy()
        except ValueError as error:
            names = ", ".join(sequences[member].id for member in members[:3])
            raise RequestError(f"{error}, in the batch of {names}, …: raise factors.damping") from None

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


def _rotated_gradients(run: Run, measurements: Sequence[Measurement]) -> Iterator[dict[str, torch.Tensor]]:
    """The measurements' gradients in the eigenbasis, as many at a time as fit into memory."""
    for group in in_groups(measurements, run, None):
        yield query_gradients(run.attributed, group, run.factors).gradients


def _scan_units(run: Run) -> Sequence[str]:
    return run.shards if run.measures_fidelity else []


def _scan(run: Run, _: Config, unit: str) -> Write:
    attributed = run.attributed
    rotated = _rotated_gradients(run, [measurement for _, measurement in sample_queries(run)])
    scores = np.concatenate([scan(attributed, solve(some, run.factors), run.training.shard(_shard_number(unit))) for some in rotated])
    return lambda directory: np.save(directory / "scores.npy", scores, allow_pickle=False)


def _fidelity_units(run: Run) -> Sequence[str]:
    return ["all"] if run.measures_fidelity else []


def _fidelity(run: Run, _: Config, unit: str) -> Write:
    """How close the index comes to the exact scores of the sample queries; a query's own sequence does not count."""
    queries = sample_queries(run)
    if not queries:
        raise RequestError(f"no training sequence of {run.directory} can be asked as a query any more: set index.recall_queries to 0")
    exact = np.concatenate([np.load(run.path_of("scans", shard) / "scores.npy", allow_pickle=False) for shard in run.shards], axis=1)
    exact[np.arange(len(queries)), [number for number, _ in queries]] = -np.inf
    rotated = _rotated_gradients(run, [measurement for _, measurement in queries])
    rows = np.concatenate([query_rows(some, run.features, run.signs) for some in rotated])
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
    spearman = rank_correlation(exact[:, sample], row_scores(rows, run.rows, sample))
    measured = Fidelity(num_queries=len(queries), spearman=spearman, ends=ends)

    def write(directory: Path) -> None:
        (directory / "fidelity.json").write_text(json.dumps(measured.to_json()), encoding="utf-8")

    return write


def _without(numbers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """The ranking without that one, or without its last where it does not hold it."""
    return np.asarray(numbers[numbers != number][: len(numbers) - 1])


STAGES = (
    Stage(name="sequences", title="reading and tokenizing data", units=_everything, work=_sequences),
    Stage(name="lexical", title="lexical index", units=_everything, work=_lexical),
    Stage(name="layers", title="finding layers", units=_everything, work=_layers),
    Stage(name="covariances", title="covariances", units=_fit_groups, work=_covariances),
    Stage(name="eigenbases", title="eigenbases", units=_covariance_names, work=_eigenbasis),
    Stage(name="eigenvalues", title="corrected eigenvalues", units=_fit_groups, work=_eigenvalues),
    Stage(name="factors", title="factors", units=_everything, work=_factors),
    Stage(name="rows", title="index rows", units=_shards, work=_rows),
    Stage(name="scans", title="exact scan of sample queries", units=_scan_units, work=_scan),
    Stage(name="fidelity", title="fidelity of the index", units=_fidelity_units, work=_fidelity),
)
