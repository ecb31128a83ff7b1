"""A run, opened: its sequences, model, factors and index, each loaded when first needed, and the queries it answers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ekfac import Coverage, Layer, LayerFactors, SequenceBatch, key_of, keyed_bits, layer_device
from indexing import FeatureSpec, RowFormat, RowIndex, RowShards, Spreader, feature_spec, open_rows, spreaders
from influence import artifacts, optimizer_state
from influence.answering import QueryOptions, answer, answer_both_ends
from influence.artifacts import appended_fingerprint
from influence.attribution import AttributedModel, Parts, scan
from influence.batches import batch_budget, covariance_sizes, layer_groups, model_memory
from influence.config import DataConfig, FactorsConfig, IndexConfig, ModelConfig, absolute
from influence.directions import Reduction, direction, read_direction
from influence.documents import read_documents
from influence.errors import RequestError
from influence.fidelity import Fidelity
from influence.filters import matching
from influence.health import Health, measure_health
from influence.jax_model import check_trusted
from influence.kept_gradients import KeptGradients
from influence.lexical import LexicalSearch, read_lexical
from influence.measurement import (
    MeasuredFunction,
    Measurement,
    Member,
    Messages,
    SomeSpans,
    combine,
    measure_completion,
    measure_messages,
    measure_sequences,
    measure_tokens,
    with_function,
)
from influence.model import LanguageModel, load_model, load_tokenizer, longest_sequence, model_fingerprint, tokenizer_fingerprint
from influence.optimizer_state import OptimizerState, read_optimizer_state
from influence.report import Report
from influence.result import InfluenceResult, query_report
from influence.run_directory import file_digest
from influence.run_facts import run_report
from influence.sequences import SequenceStore, tokenize
from influence.solving import Progress, ignore
from influence.stored_run import run_directory

TOKENS_PER_DIMENSION = 64
"""Counted tokens for each dimension of the widest covariance: scores then keep a rank correlation of .997 with those of a fit on 6 times as many."""

MIN_FITTED = 1000
"""Sequences for corrected eigenvalues, when the settings do not say how many: as above, .999 with half of the sequences, .9996 without embeddings."""

MOST_FIT_UNITS = 8
MOST_SCAN_UNITS = 64
"""Of a pass that fits factors, whose units each leave sums as large as the factors, and of the scan, whose units each solve for the queries."""

SAMPLE_SIZE = 10_000
DECODED_TOKENS = 50_000


@dataclass(frozen=True, kw_only=True)
class PartFactors:
    """The factors of a group of layers, and what makes rows of their gradients."""

    layers: tuple[Layer, ...]
    factors: dict[str, LayerFactors]
    spreaders: dict[str, Spreader]


Function = Callable[[nn.Module, SequenceBatch], torch.Tensor]
"""(model, batch) → [N]: one differentiable number for each sequence."""


class Run:
    """What one run directory holds. Loaded lazily and kept; nothing is changed but kept answers."""

    def __init__(self, path: Path | str, *, model: str | None = None, flax: str | None = None, memory_budget: int = 16 * 2**30) -> None:
        self.directory = run_directory(path)
        self.description = self.directory.describe()
        self.fingerprints = artifacts.stage_fingerprints(self.description)
        self.memory_budget = memory_budget
        settings, sources = self.description["settings"], self.description["sources"]
        places = {
            "name": model or sources["model"],
            "revision": sources["revision"],
            "adapter": sources.get("adapter"),
            "flax": sources.get("flax"),
        }
        self.model_config = ModelConfig(**places, **settings["model"])
        self._named_code = flax
        self.factors_config = FactorsConfig(**settings["factors"])
        self.index_config = IndexConfig(**settings["index"])
        self._opened_with = self.directory.living  # what is appended later is seen when the run is opened again
        self.appended = self._opened_with.appended
        self._loaded: PartFactors | None = None
        self._checked: dict[str, dict[str, Path]] = {}
        self._hash_orders: dict[int, NDArray[np.int64]] = {}

    def path_of(self, stage: str, unit: str = "all", fingerprint: str | None = None) -> Path:
        """Where a finished unit's files are. Raises RequestError when it is not done, stale or damaged."""
        if not self.directory.is_done(stage, unit, fingerprint or self.fingerprints[stage]):
            if self.directory.living != self._opened_with:
                raise self._changed()
            if unit.startswith("append-"):
                raise RequestError(f"{self.directory} is damaged: {stage}/{unit}, which was appended, is missing; restore it from a copy")
            raise RequestError(f"{self.directory} is not finished: {stage}/{unit} is missing; `influence run` goes on where it stopped")
        return self.directory.unit_path(stage, unit)

    def checked_paths(self, stage: str, units: Sequence[str]) -> list[Path]:
        """Where the units' files are. That they are whole is checked once: a check looks at every file, and every layer has one."""
        known = self._checked.get(stage)
        if known is None or known.keys() != set(units):
            self.directory.bring(stage, units)
            known = self._checked[stage] = {unit: self.path_of(stage, unit) for unit in units}
        return list(known.values())

    def _changed(self) -> RequestError:
        return RequestError(f"{self.directory} was changed since it was opened: open it again")

    @property
    def is_current(self) -> bool:
        """Whether nothing was appended or erased since the run was opened; what was removed is always seen."""
        living = self.directory.living
        return (living.appended, living.replaced) == (self._opened_with.appended, self._opened_with.replaced)

    def opened_again(self) -> "Run":
        """The run as it is now on disk; the model and the factors, which no append and no removal changes, are taken over."""
        fresh = Run(str(self.directory), model=self.model_config.name, flax=self._named_code, memory_budget=self.memory_budget)
        kept = ("tokenizer", "language_model", "coverage", "layer_groups", "attributed", "features", "_loaded")
        fresh.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return fresh

    @property
    def shards(self) -> list[str]:
        """The names of the units that stand for the shards of the training sequences."""
        return row_units("part", self.training)

    # what is loaded

    @cached_property
    def training(self) -> SequenceStore:
        """The sequences that the model was trained on: N and everything that is fitted or sampled is of them."""
        return self.store_of(self.path_of("sequences"))

    def store_of(self, *directories: Path) -> SequenceStore:
        """The sequences of these directories; their text is decoded from tokens where it was not kept."""
        return SequenceStore(*directories, decode=lambda tokens: str(self.tokenizer.decode(tokens)))

    @cached_property
    def store(self) -> SequenceStore:
        """The sequences that are searched: the training sequences, then those that were appended."""
        if not self.appended:
            return self.training
        prints = self.fingerprints
        parts = [self.path_of("sequences", part.name, appended_fingerprint(prints, part.data)) for part in self.appended]
        return self.store_of(self.path_of("sequences"), *parts)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model_config)
        self._check_same("tokenizer", self._tokenizer_fingerprint(tokenizer))
        return tokenizer

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model. Raises RequestError when its weights are not those that the run was made with."""
        self.check_code()
        loaded = load_model(self.model_config, self.memory_budget)
        self._check_same("model", model_fingerprint(loaded.model))
        self._check_same("tokenizer", self._tokenizer_fingerprint(loaded.tokenizer))
        return loaded

    def check_code(self) -> None:
        """Raises RequestError when the model is made by code that nobody but the run's directory names."""
        if self.model_config.flax is not None:
            check_trusted(self.model_config.flax, self._named_code, str(self.directory))

    def _tokenizer_fingerprint(self, tokenizer: Any) -> str:
        with_template = self.description["settings"]["data"]["messages"] is not None
        return tokenizer_fingerprint(tokenizer, with_template=with_template)

    def _check_same(self, what: str, found: str) -> None:
        expected = self.description["fingerprints"][what]
        if found != expected:
            raise RequestError(
                f"the {what} at {self.model_config.name} is not the one that {self.directory} was made with (fingerprint {found[:19]}…, "
                f"expected {expected[:19]}…): restore it, or make a new run"
            )

    @cached_property
    def coverage(self) -> Coverage:
        return artifacts.read_layers(self.path_of("layers"))

    @cached_property
    def covariance_sizes(self) -> dict[str, int]:
        """The dimension of every covariance, by name."""
        return covariance_sizes(self.coverage.layers)

    @cached_property
    def layer_groups(self) -> list[tuple[Layer, ...]]:
        """The layers, as many at a time as have factors that fit into the memory budget together."""
        loaded = self.language_model
        use = model_memory(loaded.model, self.coverage.layers)
        return layer_groups(use, self.memory_budget, self._sequence_length, loaded.device.type)

    @property
    def _sequence_length(self) -> int:
        return int(self.description["settings"]["data"]["sequence_length"])

    @cached_property
    def attributed(self) -> AttributedModel:
        """The model with its layers and what a batch may hold."""
        loaded, layers = self.language_model, self.coverage.layers
        use = model_memory(loaded.model, layers)
        budget = batch_budget(use, self.memory_budget, self._sequence_length, loaded.device.type)
        return AttributedModel(model=loaded.model, layers=layers, budget=budget, device=loaded.device)

    def halve_batches(self) -> bool:
        """Makes batches half as large from now on; False when they hold a single sequence already."""
        budget = self.attributed.budget
        if not budget.fits(2, self._sequence_length):
            return False
        smaller = replace(budget, max_tokens=budget.max_tokens // 2, memory_bytes=budget.memory_bytes // 2)
        self.attributed = replace(self.attributed, budget=smaller)
        return True

    def parts(self, attributed: AttributedModel | None = None) -> list[AttributedModel]:
        """The model with the layers of each group, of those in `attributed` (all when left out). Their factors are loaded by `factors_of`."""
        everything = attributed or self.attributed
        wanted = {layer.name for layer in everything.layers}  # there may be thousands, of experts
        groups = [tuple(layer for layer in group if layer.name in wanted) for group in self.layer_groups]
        return [replace(everything, layers=group) for group in groups if group]

    def eigenvectors_of(self, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        """Eigenvectors by `input_name` and `output_name`, on their layers' devices; layers that share an input are on one."""
        model = self.language_model.model
        devices = {name: layer_device(model, layer) for layer in layers for name in (layer.input_name, layer.output_name) if name}
        self.directory.bring("eigenbases", sorted(devices))
        return {name: artifacts.read_eigenvectors(self.path_of("eigenbases", name)).to(devices[name]) for name in sorted(devices)}

    def factors_of(self, part: AttributedModel) -> "PartFactors":
        """The factors of a part's group of layers, kept until those of another group are wanted."""
        group = next(group for group in self.layer_groups if part.layers[0] in group)
        if self._loaded is None or self._loaded.layers != group:
            self._loaded = None  # lest two groups are in memory at once
            devices = {layer: layer_device(self.language_model.model, layer) for layer in group}
            factors = artifacts.read_factors(self.path_of("factors"), self.eigenvectors_of(group), devices)
            self._loaded = PartFactors(layers=group, factors=factors, spreaders=spreaders(self.features, factors))
        return self._loaded

    def spreaders_of(self, part: AttributedModel, spec: FeatureSpec) -> dict[str, Spreader]:
        """What makes rows of a part's gradients: for the run's own rows those that are kept with its factors, for others new ones."""
        held = self.factors_of(part)
        return held.spreaders if spec == self.features else spreaders(spec, held.factors)

    @property
    def factors(self) -> dict[str, LayerFactors]:
        """The factors of all layers together. Raises RequestError when they do not fit into the memory budget."""
        if len(self.layer_groups) > 1:
            raise RequestError(
                f"this needs the factors of all layers at once, which do not fit into the memory budget of {self.memory_budget:,} bytes: raise it"
            )
        return self.factors_of(self.attributed).factors

    @cached_property
    def features(self) -> FeatureSpec:
        """How this run's rows are made."""
        summary = artifacts.read_factor_summary(self.path_of("factors"))
        weights = {name: facts["row_weight"] for name, facts in summary.items()}
        try:
            return feature_spec(
                self.coverage.layers, weights, self.index_config.row_length, self.index_config.seed, self.index_config.mixed
            )
        except ValueError as error:
            raise RequestError(str(error)) from None

    @cached_property
    def kept_gradients(self) -> KeptGradients:
        """What scores candidates; keeps no gradient until it is given memory for it."""
        return KeptGradients(self.coverage.layers)

    @cached_property
    def row_format(self) -> RowFormat:
        config = self.index_config
        return RowFormat(encoding=config.encoding, length=self.features.row_length, most_bytes=config.bytes_per_sequence)

    @cached_property
    def rows(self) -> RowShards:
        return open_rows([path / "rows.npy" for path in self._row_paths()], self.row_format)

    @cached_property
    def row_units(self) -> dict[str, str]:
        """The units of rows in the order of the sequences, and the fingerprint of each."""
        units = dict.fromkeys(self.shards, self.fingerprints["rows"])
        for part in self.appended:
            fingerprint = appended_fingerprint(self.fingerprints, part.data)
            units |= dict.fromkeys(row_units(part.name, SequenceStore(self.path_of("sequences", part.name, fingerprint))), fingerprint)
        return units

    def _row_paths(self) -> list[Path]:
        self.directory.bring("rows", list(self.row_units))
        return [self.path_of("rows", unit, fingerprint) for unit, fingerprint in self.row_units.items()]

    @cached_property
    def index(self) -> RowIndex:
        return RowIndex(self.rows)

    @cached_property
    def self_influence(self) -> NDArray[np.float64]:
        """(1/N) ∇Lᵀ (G + λI)⁻¹ ∇L of every sequence, in nats."""
        return np.concatenate([np.load(path / "self_influence.npy", allow_pickle=False) for path in self._row_paths()])

    @cached_property
    def normalizing_weights(self) -> NDArray[np.float64]:
        """1 / √self-influence of every sequence; zero for a sequence without a gradient."""
        own = self.self_influence
        return np.where(own > 0, 1 / np.sqrt(np.where(own > 0, own, 1)), 0)

    @cached_property
    def normalized_index(self) -> RowIndex:
        return RowIndex(self.rows, self.normalizing_weights)

    @cached_property
    def lexical(self) -> LexicalSearch:
        if self.directory.living.appended != self.appended:  # there is one lexical index, and it has more texts now
            raise self._changed()
        return read_lexical(self.path_of("lexical"))

    @cached_property
    def measures_fidelity(self) -> bool:
        """Whether training sequences serve as queries: some are wanted, and some can be, having a counted token to predict from another."""
        can_be = self.training.summary["counted_tokens"] > len(self.training) > 1  # every sequence has one; whoever has two makes them more
        return self.index_config.recall_queries > 0 and can_be

    @cached_property
    def fidelity(self) -> Fidelity | None:
        """How close the index was measured to come to exact EK-FAC; None when there was nothing to measure it with."""
        if not self.measures_fidelity:
            return None
        return Fidelity.from_json(json.loads((self.path_of("fidelity") / "fidelity.json").read_text(encoding="utf-8")))

    def sample(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """The numbers, ascending, of up to 10,000 of the allowed sequences, by hash of their ids: what distributions are estimated from."""
        order = self._order_of_all
        return np.sort((order if allowed is None else order[allowed[order]])[:SAMPLE_SIZE])

    @cached_property
    def _order_of_all(self) -> NDArray[np.int64]:
        seed = self.index_config.seed
        return _hash_order(self.store.ids, seed) if self.appended else self.hash_order(seed)

    @property
    def live(self) -> NDArray[np.bool_]:
        """Of every sequence: whether it was not removed, as of now."""
        live = np.ones(len(self.store), dtype=np.bool_)
        live[[number for number in self.directory.living.removed if number < len(live)]] = False
        return live

    def allowed(self, where: str | None) -> NDArray[np.bool_] | None:
        """Of every sequence: whether a query may find it; None when all. Raises RequestError for a condition that cannot be read."""
        if where is not None:
            return self.live & matching(self.store.metadata(), where)
        return self.live if self.directory.living.removed else None

    def hash_order(self, seed: int) -> NDArray[np.int64]:
        """The numbers of the training sequences in the order of the hashes of their ids: the first are a sample that depends on nothing else."""
        if seed not in self._hash_orders:
            self._hash_orders[seed] = _hash_order(self.training.ids, seed)
        return self._hash_orders[seed]

    @cached_property
    def fitted_on(self) -> dict[str, int]:
        """How many sequences each pass of the fit takes, by its stage's name."""
        tokens_per_sequence = self.training.summary["counted_tokens"] / len(self.training)
        return fit_sizes(self.coverage.layers, tokens_per_sequence, self.factors_config.sequences)

    @cached_property
    def fitted(self) -> dict[str, NDArray[np.bool_]]:
        """[N] for each pass of the fit, by its stage's name: whether it takes the sequence."""
        chosen = {stage: np.zeros(len(self.training), dtype=np.bool_) for stage in self.fitted_on}
        for stage, count in self.fitted_on.items():
            chosen[stage][self.hash_order(self.factors_config.seed)[:count]] = True
        return chosen

    @cached_property
    def optimizer_state(self) -> OptimizerState | None:
        """The state of the optimizer that trained the model, where it lies in the model's directory."""
        path = Path(self.model_config.name) / optimizer_state.FILE
        if not path.is_file() and self.factors_config.damping == "optimizer":
            raise RequestError(
                f"{self.directory} is damped by its optimizer, but there is no {optimizer_state.FILE} in {self.model_config.name}"
            )
        return read_optimizer_state(path) if path.is_file() else None

    @cached_property
    def optimizer_digest(self) -> str | None:
        """sha256 of the optimizer's state, which refined answers depend on."""
        return file_digest(Path(self.model_config.name) / optimizer_state.FILE) if self.optimizer_state else None

    @property
    def refining_damping_name(self) -> Any:
        """What D is in refined answers: the optimizer's metric where its state is known, else the factors' own damping."""
        return "optimizer" if self.optimizer_state else self.description["settings"]["factors"]["damping"]

    @cached_property
    def refining_damping(self) -> dict[str, torch.Tensor | float]:
        """D by layer name, in the unit of G: a number, or [O, J]."""
        if self.optimizer_state is None:
            return {name: facts["damping"] for name, facts in artifacts.read_factor_summary(self.path_of("factors")).items()}
        tokens_per_sequence = self.training.summary["counted_tokens"] / len(self.training)
        return {**self.optimizer_state.damping(self.language_model.model, self.coverage.layers, tokens_per_sequence)}

    # queries

    def measure(
        self,
        prompt: str,
        completion: str,
        *,
        contrast: str | None = None,
        span: SomeSpans | None = None,
    ) -> Measurement:
        """The log-probability of `completion` after `prompt`, as a measurement of this run's model."""
        longest = self._longest  # a model that is gone is told before its tokenizer
        return measure_completion(self.tokenizer, prompt, completion, contrast=contrast, span=span, longest=longest)

    def measure_tokens(self, ids: list[int]) -> Measurement:
        """The log-probability of all tokens after the first."""
        longest = self._longest
        return measure_tokens(self.tokenizer, ids, longest=longest)

    def measure_messages(self, messages: Messages, *, span: SomeSpans | None = None) -> Measurement:
        """The log-probability of a conversation's last turn, which must be the assistant's, by the tokenizer's chat template."""
        longest = self._longest
        return measure_messages(self.tokenizer, messages, span=span, longest=longest)

    def measure_data(self, files: Sequence[str]) -> Measurement:
        """The mean log-probability of a counted token of a data set: minus its loss. The files are of the same form as the run's own, but for
        metadata and weights, and are cut into sequences as these are."""
        settings = {**self.description["settings"]["data"], "metadata": [], "weight": None, "files": [absolute(name) for name in files]}
        config = DataConfig(**settings)
        return measure_sequences(list(tokenize(read_documents(config), self.tokenizer, config)), config.files)

    def direction(self, path: Path | str, reduce: Reduction = "mean") -> MeasuredFunction:
        """The activation of the direction in the safetensors file `path`, where counted tokens are read; for `with_function`."""
        layer, vector = read_direction(Path(path), self.language_model.model)
        return direction(layer, vector, reduce, {"file": str(Path(path).resolve())})

    def measure_function(self, function: Function, prompt: str, completion: str) -> Measurement:
        """What `function(model, batch)` gives for `completion` after `prompt`: any differentiable number, one for each sequence of the batch.

        `batch` is an `ekfac.SequenceBatch`, whose `counted` [N, T] marks the completion's tokens; the function must call
        `model(input_ids=batch.tokens)` once, and a sequence's number may depend on that sequence alone.
        """
        name = getattr(function, "__qualname__", type(function).__qualname__)
        measured = MeasuredFunction(values=function, unit="f", facts={"function": name})
        return with_function(self.measure(prompt, completion), measured)

    @cached_property
    def _longest(self) -> int | None:
        return longest_sequence(self.language_model.model)

    def query(
        self,
        prompt: str,
        completion: str,
        *,
        contrast: str | None = None,
        span: SomeSpans | None = None,
        **options: Any,
    ) -> InfluenceResult:
        """The training sequences that most helped the model to say `completion` after `prompt`; `options` are those of `QueryOptions`."""
        return self.answer([self.measure(prompt, completion, contrast=contrast, span=span)], QueryOptions(**options))[0]

    def query_direction(
        self, path: Path | str, prompt: str, completion: str, reduce: Reduction = "mean", **options: Any
    ) -> InfluenceResult:
        """The training sequences that most raised the activation of a direction (see `direction`) where `completion` is read."""
        return self.answer([with_function(self.measure(prompt, completion), self.direction(path, reduce))], QueryOptions(**options))[0]

    def query_function(self, function: Function, prompt: str, completion: str, **options: Any) -> InfluenceResult:
        """The training sequences that most raised what `function` measures (see `measure_function`)."""
        return self.answer([self.measure_function(function, prompt, completion)], QueryOptions(**options))[0]

    def answer(self, measurements: Sequence[Measurement], options: QueryOptions, progress: Progress = ignore) -> list[InfluenceResult]:
        """One result for each measurement: candidates from the index, reranked exactly, or an exact scan of everything."""
        return answer([self], measurements, options, progress)

    def health(self, queries: Sequence[Measurement] = (), *, by: Sequence[str] | None = None, k: int = 10) -> Health:
        """The health of the training set: influence over the mean of `queries`, or over the training set itself when there are none,
        self-influence, outliers, near-duplicates, shares by metadata column and by layer (see `measure_health`). Two passes over all sequences."""
        members = [Member(name=str(place), weight=1.0, measurement=one) for place, one in enumerate(queries, 1)]
        return measure_health(self, combine(members, "mean") if members else None, by=by, k=k)

    def report(self) -> Report:
        """What the run is made of and how good it is: data, coverage, spectra and damping, fidelity of the index, self-influence. Needs no model."""
        return run_report(self)

    def report_queries(self, measurements: Sequence[Measurement], options: QueryOptions | None = None) -> Report:
        """Both ends of the ranking for each of the queries; of several, also what their answers have in common."""
        both = answer_both_ends([self], measurements, options or QueryOptions(bm25=True))
        answers = [
            for_.to_json() | {"id": str(place), "opponents": against.to_json()["results"]} for place, (for_, against) in enumerate(both, 1)
        ]
        return query_report(answers, run=self.directory.name)

    def exact_scores(
        self,
        parts: Parts,
        num_queries: int,
        progress: Progress = ignore,
        allowed: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """⟨vector q, gradient of sequence n⟩ for every sequence, [Q, number of them]; zero for those that are not allowed (removed ones).

        Takes a pass over the sequences for each part. `progress` is called after each batch, while the model is free for other work.
        """
        scores = np.zeros((num_queries, len(self.store)))
        live = self.live if allowed is None else allowed
        passes, count = len(parts), len(self.store)
        for place, (attributed, vectors) in enumerate(parts):
            for shard, start in enumerate(self.store.starts[:-1]):

                def after(done: int, before: int = place * count + int(start)) -> None:
                    progress(before + done, passes * count)

                after(0)
                sequences = self.store.shard(shard)
                chosen = np.flatnonzero(live[start : start + len(sequences)])
                if len(chosen):
                    scores[:, start + chosen] += scan(attributed, vectors, [sequences[one] for one in chosen], after)
        progress(passes * count, passes * count)
        return scores

    @cached_property
    def _decoded(self) -> Callable[[tuple[int, ...]], str]:
        """The text of some tokens; that of those seen last is kept, since decoding costs more than all else that is done to show a token."""
        return lru_cache(DECODED_TOKENS)(lambda tokens: str(self.tokenizer.decode(list(tokens))))

    def token_texts(self, tokens: NDArray[np.int32]) -> list[str]:
        """Each token as text of its own; a character that several tokens spell stands at the last of them."""
        texts: list[str] = []
        pending: list[int] = []
        for token in tokens.tolist():
            pending.append(token)
            text = self._decoded(tuple(pending))
            if "\ufffd" in text and len(pending) < 4:  # UTF-8 spells a character in at most four bytes
                texts.append("")
            else:
                texts.append(text)
                pending = []
        return texts


def fit_sizes(layers: Sequence[Layer], tokens_per_sequence: float, wanted: int | None) -> dict[str, int]:
    """How many sequences of so many counted tokens each pass of the fit takes, by its stage's name: as many as are wanted, or else as are enough.

    An eigenbasis needs tokens in proportion to the widest covariance, of which an expert gets its share, corrected eigenvalues need MIN_FITTED
    sequences at least.
    """
    if wanted is not None:
        return dict.fromkeys(("covariances", "eigenvalues"), wanted)
    widths = [(max(layer.shape) if layer.kind == "linear" else layer.shape[1]) / layer.routed for layer in layers]
    enough = math.ceil(TOKENS_PER_DIMENSION * max(widths) / tokens_per_sequence)
    return {"covariances": enough, "eigenvalues": max(enough, MIN_FITTED)}


def num_fit_units(fitted_on: Mapping[str, int], num_shards: int, sequences_per_shard: int) -> int:
    """How many units the passes that fit factors have: one for as many fitted sequences as a shard has, up to MOST_FIT_UNITS."""
    return min(MOST_FIT_UNITS, num_shards, math.ceil(max(fitted_on.values()) / sequences_per_shard))


def row_units(name: str, store: SequenceStore) -> list[str]:
    """What the units of the rows of these sequences are called, one for each shard."""
    return [f"{name}-{shard:05d}" for shard in range(store.num_shards)]


def _hash_order(ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    bits = keyed_bits(seed, np.array([key_of(name) for name in ids], dtype=np.uint64), 1)[:, 0]
    return np.argsort(bits, kind="stable")


def open_run(path: Path | str, **options: Any) -> Run:
    """The run in the directory `path`, or at a URL such as s3://bucket/run; nothing is loaded yet.

    Raises RequestError when there is no run directory of this version.
    """
    return Run(path, **options)
