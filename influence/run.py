"""A run, opened: its sequences, model, factors and index, each loaded when first needed, and the queries it answers."""

import fnmatch
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import Coverage, LayerFactors, input_name, output_name
from indexing import FeatureSpec, FlatIndex, RowShards, Spreader, all_scores, best, feature_spec, open_rows, spread_gradients, spreaders
from influence import artifacts
from influence.attribution import AttributedModel, SequenceScores, precondition, query_gradients, scan, score_sequences
from influence.batches import batch_budget
from influence.config import FactorsConfig, IndexConfig, ModelConfig
from influence.errors import RequestError
from influence.lexical import LexicalSearch, ranks
from influence.measurement import Measurement, measure_completion
from influence.model import LanguageModel, load_model, load_tokenizer, longest_sequence, model_fingerprint, tokenizer_fingerprint
from influence.result import InfluenceResult, RankedSequence
from influence.run_directory import RunDirectory, digest
from influence.sequences import SequenceStore

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


def _ignore(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """How a query is answered."""

    k: int = 10
    opponents: bool = False  # the most negative scores instead of the most positive
    exact: bool = False  # scan every sequence instead of the index's candidates
    layers: tuple[str, ...] = ()  # globs of layers to sum over; all when empty
    candidates: int = 200  # how many of the index's best are reranked exactly
    normalize: bool = False  # divide each score by √self-influence of its sequence (RelatIF, Barshan et al. 2020)
    bm25: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RequestError(f"k must be at least 1, not {self.k}")
        if self.candidates < 1:
            raise RequestError(f"candidates must be at least 1, not {self.candidates}")


class Run:
    """What one run directory holds. Loaded lazily and kept; nothing is changed but kept answers."""

    def __init__(self, path: Path | str, *, model: str | None = None, memory_budget: int = 16 * 2**30) -> None:
        self.directory = RunDirectory(Path(path))
        self.description = self.directory.describe()
        self.fingerprints = artifacts.stage_fingerprints(self.description)
        self.memory_budget = memory_budget
        settings, sources = self.description["settings"], self.description["sources"]
        self.model_config = ModelConfig(name=model or sources["model"], revision=sources["revision"], **settings["model"])
        self.factors_config = FactorsConfig(**settings["factors"])
        self.index_config = IndexConfig(**settings["index"])

    def path_of(self, stage: str, unit: str = "all") -> Path:
        """Where a finished unit's files are. Raises RequestError when it is not done, stale or damaged."""
        if not self.directory.is_done(stage, unit, self.fingerprints[stage]):
            raise RequestError(f"{self.directory} is not finished: {stage}/{unit} is missing; `influence run` goes on where it stopped")
        return self.directory.unit_path(stage, unit)

    @property
    def shards(self) -> list[str]:
        """The names of the units that stand for the store's shards."""
        return [f"part-{shard:05d}" for shard in range(self.store.num_shards)]

    # what is loaded

    @cached_property
    def store(self) -> SequenceStore:
        return SequenceStore(self.path_of("sequences"))

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model_config)
        self._check_same("tokenizer", tokenizer_fingerprint(tokenizer))
        return tokenizer

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model. Raises RequestError when its weights are not those that the run was made with."""
        loaded = load_model(self.model_config)
        self._check_same("model", model_fingerprint(loaded.model))
        self._check_same("tokenizer", tokenizer_fingerprint(loaded.tokenizer))
        return loaded

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
    def attributed(self) -> AttributedModel:
        """The model with its layers and what a batch may hold."""
        loaded, layers = self.language_model, self.coverage.layers
        factor_bytes = sum(8 * (layer.shape[0] ** 2 + layer.shape[1] ** 2) + 12 * layer.shape[0] * layer.shape[1] for layer in layers)
        length = self.description["settings"]["data"]["sequence_length"]
        budget = batch_budget(loaded.model, layers, self.memory_budget, factor_bytes, length)
        return AttributedModel(model=loaded.model, layers=layers, budget=budget, device=loaded.device)

    @cached_property
    def eigenvectors(self) -> dict[str, torch.Tensor]:
        """Eigenvectors by `input_name` and `output_name`, on the model's device."""
        names = {name for layer in self.coverage.layers for name in (input_name(layer), output_name(layer))}
        device = self.language_model.device
        return {name: artifacts.read_eigenvectors(self.path_of("eigenbases", name)).to(device) for name in sorted(names)}

    @cached_property
    def factors(self) -> dict[str, LayerFactors]:
        return artifacts.read_factors(self.path_of("factors"), self.eigenvectors, self.coverage.layers, self.language_model.device)

    @cached_property
    def features(self) -> FeatureSpec:
        """How this run's rows are made."""
        summary = artifacts.read_factor_summary(self.path_of("factors"))
        dimensions = {name: facts["effective_dimension"] for name, facts in summary.items()}
        return feature_spec(self.coverage.layers, dimensions, self.index_config.row_length, self.index_config.seed)

    @cached_property
    def signs(self) -> dict[str, Spreader]:
        return spreaders(self.features, self.language_model.device)

    @cached_property
    def rows(self) -> RowShards:
        return open_rows([self.path_of("rows", shard) / "rows.npy" for shard in self.shards], self.features.row_length)

    @cached_property
    def index(self) -> FlatIndex:
        return FlatIndex(self.rows)

    @cached_property
    def self_influence(self) -> NDArray[np.float64]:
        """(1/N) ∇Lᵀ (G + λI)⁻¹ ∇L of every training sequence, [N], in nats."""
        return np.concatenate([np.load(self.path_of("rows", shard) / "self_influence.npy", allow_pickle=False) for shard in self.shards])

    @cached_property
    def normalizing_weights(self) -> NDArray[np.float64]:
        """1 / √self-influence, [N]; zero for a sequence without a gradient."""
        own = self.self_influence
        return np.where(own > 0, 1 / np.sqrt(np.where(own > 0, own, 1)), 0)

    @cached_property
    def normalized_index(self) -> FlatIndex:
        return FlatIndex(self.rows, self.normalizing_weights)

    @cached_property
    def lexical(self) -> LexicalSearch:
        return LexicalSearch(sequence.text for sequence in self.store)

    @cached_property
    def measures_recall(self) -> bool:
        """Whether training sequences serve as queries: some are wanted, and some can be, having a counted token to predict from another."""
        can_be = self.store.summary["counted_tokens"] > len(self.store) > 1  # every sequence has one; whoever has two makes them more
        return self.index_config.recall_queries > 0 and can_be

    @cached_property
    def measured_recall(self) -> dict[str, Any]:
        """What the recall stage measured: {"recall_at_10", "candidates", "queries"}, or {} when there was nothing to measure it with."""
        if not self.measures_recall:
            return {}
        found: dict[str, Any] = json.loads((self.path_of("recall") / "recall.json").read_text(encoding="utf-8"))
        return found

    # queries

    def measure(self, prompt: str, completion: str, *, contrast: str | None = None, span: tuple[int, int] | None = None) -> Measurement:
        """The log-probability of `completion` after `prompt`, as a measurement of this run's model."""
        longest = longest_sequence(self.language_model.model)
        return measure_completion(self.tokenizer, prompt, completion, contrast=contrast, span=span, longest=longest)

    def query(
        self, prompt: str, completion: str, *, contrast: str | None = None, span: tuple[int, int] | None = None, **options: Any
    ) -> InfluenceResult:
        """The training sequences that most helped the model to say `completion` after `prompt`; `options` are those of `QueryOptions`."""
        return self.answer([self.measure(prompt, completion, contrast=contrast, span=span)], QueryOptions(**options))[0]

    def answer(self, measurements: Sequence[Measurement], options: QueryOptions, progress: Progress = _ignore) -> list[InfluenceResult]:
        """One result for each measurement: candidates from the index, reranked exactly, or an exact scan of everything.

        Works through as many at a time as have gradients that fit into a quarter of the memory budget.
        """
        attributed_parameters = sum(layer.shape[0] * layer.shape[1] for layer in self.coverage.layers)
        at_once = max(1, self.memory_budget // 4 // (8 * attributed_parameters))
        groups = [measurements[first : first + at_once] for first in range(0, len(measurements), at_once)]
        return [result for group in groups for result in self._answer_together(group, options, progress)]

    def _answer_together(self, measurements: Sequence[Measurement], options: QueryOptions, progress: Progress) -> list[InfluenceResult]:
        start = time.perf_counter()
        attributed = self._selected(options.layers)
        found = query_gradients(attributed, measurements)
        preconditioned = precondition(found.gradients, self.factors)
        sign = -1.0 if options.opponents else 1.0
        weights = self.normalizing_weights if options.normalize else np.ones(len(self.store))
        if options.exact:
            estimates = self.exact_scores(preconditioned, attributed, progress) * weights
            numbers = best(sign * estimates, options.k).numbers
        else:
            rows = spread_gradients(found.gradients, self.factors, self.features, self.signs)
            estimates = all_scores(rows, self.rows) * weights
            index = self.normalized_index if options.normalize else self.index
            numbers = index.search(np.float32(sign) * rows, max(options.candidates, options.k)).numbers
        results = []
        shared = (time.perf_counter() - start) / len(measurements)
        for place, measurement in enumerate(measurements):
            began = time.perf_counter()
            chosen = [int(number) for number in numbers[place]]
            one = {name: vector[place] for name, vector in preconditioned.items()}
            scores = score_sequences(attributed, one, [self.store[number] for number in chosen]).times(weights[chosen])
            ranking = _Ranking(chosen, scores, np.argsort(-sign * scores.totals, kind="stable")[: options.k])
            seconds = shared + time.perf_counter() - began
            results.append(
                self._result(measurement, options, attributed, found.log_probabilities[place], ranking, estimates[place], seconds)
            )
        return results

    def exact_scores(
        self, vectors: dict[str, torch.Tensor], attributed: AttributedModel | None = None, progress: Progress = _ignore
    ) -> NDArray[np.float64]:
        """⟨vector q, gradient of sequence n⟩ for every training sequence, [Q, N], by a pass over all of them."""
        parts = []
        for shard in range(self.store.num_shards):
            progress(int(self.store.starts[shard]), len(self.store))
            parts.append(scan(attributed or self.attributed, vectors, self.store.shard(shard)))
        progress(len(self.store), len(self.store))
        return np.concatenate(parts, axis=1)

    def _selected(self, patterns: Sequence[str]) -> AttributedModel:
        everything = self.attributed
        if not patterns:
            return everything
        chosen = tuple(layer for layer in everything.layers if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns))
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in everything.layers):
                raise RequestError(
                    f"no attributed layer matches {pattern!r}; there are {len(everything.layers)}, such as {everything.layers[0].name}"
                )
        return AttributedModel(model=everything.model, layers=chosen, budget=everything.budget, device=everything.device)

    def _result(
        self,
        measurement: Measurement,
        options: QueryOptions,
        attributed: AttributedModel,
        log_probabilities: list[NDArray[np.float64]],
        ranking: "_Ranking",
        estimates: NDArray[np.float64],
        seconds: float,
    ) -> InfluenceResult:
        total = len(self.store)
        lexical = self.lexical.scores(f"{measurement.prompt}{measurement.completion}", total) if options.bm25 else None
        places = ranks(lexical, ranking.numbers) if lexical is not None else [None] * len(ranking.numbers)
        sequences = []
        for rank, place in enumerate(ranking.order, 1):
            sequence = self.store[ranking.numbers[place]]
            by_layer, by_token = ranking.scores.layers[place] / total, ranking.scores.tokens[place] / total
            sequences.append(
                RankedSequence(
                    rank=rank,
                    id=sequence.id,
                    score=float(by_layer.sum()),
                    text=sequence.text,
                    metadata=sequence.metadata,
                    layers={layer.name: float(share) for layer, share in zip(attributed.layers, by_layer, strict=True)},
                    tokens=[(token, float(share)) for token, share in zip(self.token_texts(sequence.tokens), by_token, strict=True)],
                    bm25_rank=places[place],
                )
            )
        coverage = {
            "parameters_attributed": sum(layer.shape[0] * layer.shape[1] for layer in attributed.layers) / self.coverage.total,
            "excluded": self.coverage.excluded
            | {layer.name: "not selected by the query" for layer in self.coverage.layers if layer not in attributed.layers},
        }
        provenance = self._provenance(options, seconds, len(ranking.numbers), measurement.contrast is None and measurement.span is None)
        query = self._query_facts(measurement, log_probabilities)
        identifier = digest(
            [{**query, "token_log_probabilities": None, "log_probability": None}, vars(options), self.fingerprints["rows"]]
        )[7:23]
        distribution = _distribution(estimates / total) | {"estimated_from": "exact scan" if options.exact else "index rows"}
        return InfluenceResult(
            id=identifier,
            unit="√nats" if options.normalize else "nats",
            query=query,
            sequences=tuple(sequences),
            coverage=coverage,
            provenance=provenance,
            distribution=distribution,
        )

    def _query_facts(self, measurement: Measurement, log_probabilities: list[NDArray[np.float64]]) -> dict[str, Any]:
        _, shown = measurement.parts[0]
        weights = [weight for weight, _ in measurement.parts]
        facts: dict[str, Any] = {"prompt": measurement.prompt, "completion": measurement.completion}
        for name in ("contrast", "span", "input_ids"):
            if getattr(measurement, name) is not None:
                facts[name] = getattr(measurement, name)
        return facts | {
            "log_probability": float(sum(weight * part.sum() for weight, part in zip(weights, log_probabilities, strict=True))),
            "tokens": self.token_texts(shown.tokens),
            "token_log_probabilities": [
                float(value) if counted else None for value, counted in zip(log_probabilities[0], shown.counted, strict=True)
            ],
        }

    def _provenance(self, options: QueryOptions, seconds: float, num_reranked: int, ordinary: bool) -> dict[str, Any]:
        """`ordinary`: the query is of the kind that recall was measured with, the log-probability of all of a completion."""
        made_from = self.description["fingerprints"]
        damping = self.description["settings"]["factors"]["damping"]
        recall = None
        if options.exact:
            recall = 1.0
        elif ordinary and not options.layers and not options.opponents and self.measured_recall.get("candidates") == options.candidates:
            recall = self.measured_recall["recall_at_10_normalized" if options.normalize else "recall_at_10"]
        return {
            "run": str(self.directory),
            "model": made_from["model"],
            "tokenizer": made_from["tokenizer"],
            "data": made_from["data"],
            "factors": self.fingerprints["factors"],
            "rows": self.fingerprints["rows"],
            "method": "ekfac",
            "damping": damping,
            "normalized": options.normalize,
            "searched": len(self.store),
            "candidates": len(self.store) if options.exact else num_reranked,
            "reranked": "exact",
            "recall_at_10": recall,
            "seconds": round(seconds, 4),
        }

    def token_texts(self, tokens: NDArray[np.int32]) -> list[str]:
        """Each token as text of its own; a character that several tokens spell stands at the last of them."""
        texts: list[str] = []
        pending: list[int] = []
        for token in tokens.tolist():
            pending.append(token)
            text = self.tokenizer.decode(pending)
            if "\ufffd" in text and len(pending) < 4:  # UTF-8 spells a character in at most four bytes
                texts.append("")
            else:
                texts.append(text)
                pending = []
        return texts


@dataclass(frozen=True)
class _Ranking:
    """Reranked candidates: their numbers and exact scores, and the order of the best."""

    numbers: list[int]
    scores: SequenceScores
    order: NDArray[np.int64]


def _distribution(scores: NDArray[np.float64]) -> dict[str, Any]:
    """How influence is spread over the training set: a histogram, and the share of positive influence that the top of the ranking holds."""
    counts, edges = np.histogram(scores, bins=50)
    positive = np.sort(np.maximum(scores, 0))[::-1].cumsum()
    tail = []
    if positive[-1] > 0:
        takes = np.unique(np.geomspace(1, len(scores), 60).astype(np.int64))
        tail = [[float(take / len(scores)), float(positive[take - 1] / positive[-1])] for take in takes]
    return {"num_sequences": len(scores), "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}, "tail": tail}


def open_run(path: Path | str, **options: Any) -> Run:
    """The run in the directory `path`. Raises RequestError when it is not a run directory of this version; nothing is loaded yet."""
    return Run(path, **options)
