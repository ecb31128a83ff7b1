"""Answers to queries: from measurements to ranked training sequences, by one run or by several whose scores are averaged.

The way is the same for all: the queries' gradients, (G + λI)⁻¹ of them (refined if asked), candidates from the index or an exact scan, exact
scores of the candidates with their split by layer and by token, and what the reader needs to know to trust them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ekfac import Solution, matches
from indexing import best, group_duplicates, row_scores
from influence.attribution import (
    AttributedModel,
    Parts,
    SequenceScores,
    by_output_token,
    function_values,
    joined,
    mean_scores,
    score_sequences,
)
from influence.concentration import concentration, longest_run
from influence.errors import RequestError
from influence.lexical import ranks
from influence.living import Living
from influence.measurement import Measurement, query_facts, question
from influence.refinement import RefineOptions, summary
from influence.result import InfluenceResult, RankedSequence
from influence.run_directory import digest
from influence.solving import Progress, check_differentiable, check_refinable, ignore, in_groups, solved, within_memory

if TYPE_CHECKING:
    from influence.run import Run

UNMEASURED_CANDIDATES = 200
"""Reranked where the index's recall was not measured."""

MORE_THAN_SHOWN = 20
"""Sequences beyond the k-th that an exact scan gives, lest duplicates leave less than k results."""


class OptionsRefused(RequestError):
    """The options cannot be met by these runs, whatever is asked with them."""


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """How a query is answered."""

    k: int = 10
    opponents: bool = False  # the most negative scores instead of the most positive
    exact: bool = False  # scan every sequence instead of the index's candidates
    layers: tuple[str, ...] = ()  # globs of layers to sum over; all when empty
    candidates: int | None = None  # how many of the index's best are reranked exactly; None: as many as the measured recall asks for
    where: str | None = None  # only sequences whose metadata fulfil this condition
    normalize: bool = False  # divide each score by √self-influence of its sequence (RelatIF, Barshan et al. 2020)
    refine: RefineOptions | None = None  # solve with the exact Gauss-Newton Hessian instead of EK-FAC alone
    bm25: bool = False
    by_output_token: bool = False  # a token's share is that of predicting it, instead of that of the position where it is the input

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RequestError(f"k must be at least 1, not {self.k}")
        if self.candidates is not None and self.candidates < 1:
            raise RequestError(f"candidates must be at least 1, not {self.candidates}")


def answer(
    runs: Sequence["Run"], measurements: Sequence[Measurement], options: QueryOptions, progress: Progress = ignore
) -> list[InfluenceResult]:
    """One result for each measurement: proponents, or opponents when the options say so.

    Several runs are checkpoints of one training, or trainings of their own on the same sequences; their scores are averaged. Raises RequestError when
    their sequences or their layers differ.
    """
    sign = -1.0 if options.opponents else 1.0
    return [results[0] for results in _answers(runs, measurements, options, [sign], progress)]


def answer_both_ends(
    runs: Sequence["Run"], measurements: Sequence[Measurement], options: QueryOptions, progress: Progress = ignore
) -> list[tuple[InfluenceResult, InfluenceResult]]:
    """(proponents, opponents) for each measurement, at the price of one answer but for the rerank."""
    return [(results[0], results[1]) for results in _answers(runs, measurements, options, [1.0, -1.0], progress)]


def _answers(
    runs: Sequence["Run"], measurements: Sequence[Measurement], options: QueryOptions, signs: Sequence[float], progress: Progress
) -> list[list[InfluenceResult]]:
    allowed = _checked(runs, options)

    def work() -> list[list[InfluenceResult]]:
        groups = in_groups(measurements, runs[0], options.refine)
        return [results for group in groups for results in _answers_of_group(runs, group, options, signs, allowed, progress)]

    return within_memory(runs, work)


def _checked(runs: Sequence["Run"], options: QueryOptions) -> NDArray[np.bool_] | None:
    """[N]: which sequences may be found. Raises OptionsRefused for what no query can be answered with, before any of them costs anything."""
    try:
        check_alike(runs)
        for run in runs:
            selected(run.attributed, options.layers)
            if options.refine:
                check_refinable(run)
            if options.by_output_token:
                check_differentiable(run)
        return _allowed(runs, options.where)
    except RequestError as error:
        raise OptionsRefused(str(error)) from None


def _allowed(runs: Sequence["Run"], where: str | None) -> NDArray[np.bool_] | None:
    """[N]: which sequences may be found, having been removed from none of the runs; None when all may. Raises RequestError when none may.

    The condition is on the first run's metadata.
    """
    masks = [mask for run in runs if (mask := run.allowed(where if run is runs[0] else None)) is not None]
    if not masks:
        return None
    allowed: NDArray[np.bool_] = np.logical_and.reduce(masks)
    if not allowed.any():
        raise RequestError(f"no sequence fulfils the condition {where}" if where else "every sequence was removed from one of the runs")
    return allowed


def check_alike(runs: Sequence["Run"]) -> None:
    """Raises RequestError when the runs' scores cannot be averaged."""
    first, *others = runs
    for place, other in enumerate(others):
        if any(other.directory.path.resolve() == before.directory.path.resolve() for before in runs[: place + 1]):
            raise RequestError(f"{other.directory} is given twice: each run counts once in an average")
        for what, differs in (
            ("were made from other training sequences", _sequences(first) != _sequences(other)),
            ("attribute other layers", _shapes(first) != _shapes(other)),
        ):
            if differs:
                raise RequestError(f"{other.directory} and {first.directory} {what}: their scores cannot be averaged")


def _shapes(run: "Run") -> list[Any]:
    return [(layer.name, layer.kind, layer.shape) for layer in run.coverage.layers]


def _sequences(run: "Run") -> list[Any]:
    """What tells a run's training sequences from others; metadata and shards make no difference."""
    made_from, settings, summary = run.description["fingerprints"], run.description["settings"]["data"], run.store.summary
    return [
        settings["weight"],
        settings["attention"],
        made_from["data"],
        made_from["tokenizer"],
        summary["tokens"],
        summary["counted_tokens"],
        run.store.ids,
    ]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What one run makes of a group of queries."""

    run: "Run"
    attributed: AttributedModel
    vectors: Parts  # (G + λI)⁻¹∇f, [Q, O, J] by layer
    log_probabilities: list[list[NDArray[np.float64]]]
    solution: Solution | None  # of the refinement
    weights: NDArray[np.float64]  # [N]: what each sequence's score is multiplied by
    rows: NDArray[np.float32] | None  # [Q, D]; none where everything is scanned
    known: NDArray[np.int64]  # [M]: the sequences whose scores are known before the rerank: all that may be found, or a sample of them
    estimates: NDArray[np.float64]  # [Q, M]: those scores: exact ones, or the index's
    allowed: NDArray[np.bool_] | None  # [N]: which sequences may be found; None when all

    @property
    def searched(self) -> int:
        """How many sequences may be found."""
        return len(self.run.store) if self.allowed is None else int(self.allowed.sum())

    def candidates(self, opponents: bool, options: QueryOptions) -> list[NDArray[np.int64]]:
        """For each query, the numbers of the sequences that the index finds for the rerank, best first."""
        assert self.rows is not None
        if len(self.known) == self.searched:  # the estimates, of whole rows, are what the index would find again
            found = best(-self.estimates if opponents else self.estimates, num_candidates(self.run, options, opponents)).numbers
            return list(self.known[found])
        index = self.run.normalized_index if options.normalize else self.run.index
        rows = -self.rows if opponents else self.rows
        return [row[row >= 0] for row in index.search(rows, num_candidates(self.run, options, opponents), self.allowed).numbers]

    def totals(self, numbers: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Exact scores of these sequences, [Q, len(numbers)], in one pass over them: for each query those that are wanted."""
        return self.run.kept_gradients.scores(self.vectors, self.run.store, numbers, wanted) * self.weights[list(numbers)]

    def splits(self, wanted: Sequence[tuple[int, Sequence[int]]], options: QueryOptions) -> list[SequenceScores]:
        """For each (query, numbers): exact scores of these sequences for that query, by layer and by token."""
        split = by_output_token if options.by_output_token else score_sequences
        found: list[list[SequenceScores]] = [[] for _ in wanted]
        for part, vectors in self.vectors:
            for place, (query, numbers) in enumerate(wanted):
                one = {name: vector[query] for name, vector in vectors.items()}
                found[place].append(split(part, one, self.run.store.select(numbers)))
        return [joined(parts).times(self.weights[list(numbers)]) for parts, (_, numbers) in zip(found, wanted, strict=True)]


def _asked(
    run: "Run",
    measurements: Sequence[Measurement],
    options: QueryOptions,
    allowed: NDArray[np.bool_] | None,
    known: NDArray[np.int64],
    progress: Progress,
    watch: "_Stopwatch",
) -> _Asked:
    attributed = selected(run.attributed, options.layers)
    found = solved(run, attributed, measurements, options.refine, progress, rows=not options.exact)
    weights = run.normalizing_weights if options.normalize else np.ones(len(run.store))
    watch.lap("gradients")
    if found.rows is None:
        estimates = run.exact_scores(found.vectors, len(measurements), progress, allowed)[:, known]
    else:
        estimates = row_scores(found.rows, run.rows, known).astype(np.float64)
    watch.lap("search")
    return _Asked(
        run=run,
        attributed=attributed,
        vectors=found.vectors,
        log_probabilities=found.log_probabilities,
        solution=found.refinement,
        weights=weights,
        rows=found.rows,
        known=known,
        allowed=allowed,
        estimates=estimates * weights[known],
    )


def selected(everything: AttributedModel, patterns: Sequence[str]) -> AttributedModel:
    """The model with only those layers that match one of the globs; all when there are none. Raises RequestError for one that matches nothing."""
    for pattern in patterns:
        if not any(matches(layer, [pattern]) for layer in everything.layers):
            raise RequestError(
                f"no attributed layer matches {pattern!r}; there are {len(everything.layers)}, such as {everything.layers[0].name}"
            )
    chosen = tuple(layer for layer in everything.layers if not patterns or matches(layer, patterns))
    return AttributedModel(model=everything.model, layers=chosen, budget=everything.budget, device=everything.device)


def _answers_of_group(
    runs: Sequence["Run"],
    measurements: Sequence[Measurement],
    options: QueryOptions,
    signs: Sequence[float],
    allowed: NDArray[np.bool_] | None,
    progress: Progress,
) -> list[list[InfluenceResult]]:
    watch = _Stopwatch()
    everything = np.arange(len(runs[0].store)) if allowed is None else np.flatnonzero(allowed)
    known = everything if options.exact else runs[0].sample(allowed)
    asked = [_asked(run, measurements, options, allowed, known, progress, watch) for run in runs]
    estimates = np.mean([one.estimates for one in asked], axis=0)
    chosen = [_chosen(asked, estimates, options, sign < 0) for sign in signs]
    watch.lap("search")
    # Queries have candidates in common, so one pass over those of all of them costs less than a pass for each.
    union = sorted({number for table in chosen for numbers in table for number in numbers})
    columns = {number: column for column, number in enumerate(union)}
    wanted = np.zeros((len(measurements), len(union)), dtype=np.bool_)
    for table in chosen:
        for place, numbers in enumerate(table):
            wanted[place, [columns[number] for number in numbers]] = True
    by_run = [one.totals(union, wanted) for one in asked]
    orders = [
        [
            _ordered(asked, table[place], [t[place, [columns[n] for n in table[place]]] for t in by_run], options, sign)
            for sign, table in zip(signs, chosen, strict=True)
        ]
        for place in range(len(measurements))
    ]
    shown = [(place, order.shown) for place, own in enumerate(orders) for order in own]
    splits = zip(*(one.splits(shown, options) for one in asked), strict=True)
    rankings = [[_ranking(order, next(splits)) for order in own] for own in orders]
    watch.lap("rerank")
    stages = {stage: seconds / len(measurements) / len(signs) for stage, seconds in watch.laps.items()}
    return [
        [_result(asked, place, measurement, options, ranking, estimates[place], stages) for ranking in rankings[place]]
        for place, measurement in enumerate(measurements)
    ]


class _Stopwatch:
    """Seconds by the names of what was done in them."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _chosen(asked: list[_Asked], estimates: NDArray[np.float64], options: QueryOptions, opponents: bool) -> list[list[int]]:
    """For each query, the numbers of the sequences that are to be scored exactly: the index's candidates, or the best of an exact scan."""
    if options.exact:
        order = best(-estimates if opponents else estimates, options.k + MORE_THAN_SHOWN).numbers
        return [asked[0].known[row].tolist() for row in order]
    tables = [one.candidates(opponents, options) for one in asked]
    return [list(dict.fromkeys(int(number) for table in tables for number in table[place])) for place in range(len(estimates))]


@dataclass(frozen=True, kw_only=True)
class _Order:
    """One query's candidates in the order of their exact scores, duplicates together."""

    numbers: list[int]
    totals: NDArray[np.float64]  # [len(numbers)]
    groups: list[list[int]]  # places in `numbers`: what is shown as one result, the one of greatest score first
    sign: float

    @property
    def shown(self) -> list[int]:
        """The number of the first of each group."""
        return [self.numbers[group[0]] for group in self.groups]


def _ordered(asked: list[_Asked], numbers: list[int], by_run: list[NDArray[np.float64]], options: QueryOptions, sign: float) -> _Order:
    """The candidates of one query, in order of the mean of their scores by each run."""
    totals = np.mean(by_run, axis=0)
    order = np.argsort(-sign * totals, kind="stable")
    groups = group_duplicates(asked[0].run.rows, [numbers[candidate] for candidate in order], options.k)
    members = [[int(order[candidate]) for candidate in group] for group in groups]
    return _Order(numbers=numbers, totals=totals, groups=members, sign=sign)


def _ranking(order: _Order, by_run: Sequence[SequenceScores]) -> "_Ranking":
    """The ranking, from the scores by layer and by token of what is shown: by these, which differ from the totals in the last digits."""
    split = mean_scores(by_run)
    again = np.argsort(-order.sign * split.totals, kind="stable")
    return _Ranking(
        numbers=order.numbers,
        totals=order.totals,
        groups=[order.groups[group] for group in again],
        split=_in_order(split, again),
        by_run=[_in_order(one, again) for one in by_run],
        opponents=order.sign < 0,
    )


def _in_order(scores: SequenceScores, order: NDArray[np.int64]) -> SequenceScores:
    return SequenceScores(layers=scores.layers[order], tokens=[scores.tokens[place] for place in order])


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """Reranked candidates: their numbers and exact scores, and the best of them in order, split by layer and by token."""

    numbers: list[int]
    totals: NDArray[np.float64]  # [len(numbers)]
    groups: list[list[int]]  # places in `numbers`: what is shown as one result, the one of greatest score first
    split: SequenceScores  # of the first of each group
    by_run: list[SequenceScores]  # the same for each run
    opponents: bool


def _result(
    asked: list[_Asked],
    place: int,
    measurement: Measurement,
    options: QueryOptions,
    ranking: _Ranking,
    estimates: NDArray[np.float64],
    stages: dict[str, float],
) -> InfluenceResult:
    first = asked[0].run
    query = _query_facts(asked, place, measurement)
    identity: list[Any] = [question(query), _plain(options)]
    identity += [one.run.optimizer_digest for one in asked if options.refine]
    identity += [one.run.directory.living.to_json() for one in asked if one.run.directory.living != Living()]
    lexical = _lexical_scores(asked[0], measurement) if options.bm25 else None
    sequences = tuple(_ranked(asked, measurement, lexical, ranking))
    distribution = concentration(estimates / len(first.training)) | {
        "estimated_from": "exact scan"
        if options.exact
        else "index rows"
        if len(estimates) == asked[0].searched
        else "index rows of a sample"
    }
    return InfluenceResult(
        id=digest([*identity, *(one.run.fingerprints["rows"] for one in asked)])[7:23],
        unit=_unit(measurement, options),
        query=query,
        sequences=sequences,
        coverage=_coverage(asked[0]),
        provenance=_provenance(asked, place, measurement, options, ranking, stages),
        distribution=distribution,
        lexical=None if lexical is None else _lexical_facts(asked[0], lexical, sequences, options.k),
    )


def _unit(measurement: Measurement, options: QueryOptions) -> str:
    """Of f; √ self-influence is in √nats."""
    if not options.normalize:
        return measurement.unit
    return "√nats" if measurement.function is None else f"{measurement.unit}/√nats"


def _lexical_scores(asked: _Asked, measurement: Measurement) -> NDArray[np.float64]:
    """[N]: BM25 of every sequence that may be found, zero for the others."""
    scores = asked.run.lexical.scores(measurement.text, len(asked.run.store))
    return scores if asked.allowed is None else np.where(asked.allowed, scores, 0)


def _lexical_facts(asked: _Asked, scores: NDArray[np.float64], shown: Sequence[RankedSequence], k: int) -> dict[str, Any]:
    """What lexical search would have answered, and how many of its results are among those of influence."""
    run = asked.run
    order = best(scores[None], k).numbers[0]
    found = [(run.store[int(number)], float(scores[number])) for number in order if scores[number] > 0]
    ids = {name for sequence in shown for name in (sequence.id, *(other for other, _ in sequence.duplicates))}
    return {
        "overlap": sum(sequence.id in ids for sequence, _ in found),
        "results": [{"id": sequence.id, "score": score, "text": sequence.text} for sequence, score in found],
    }


def _ranked(asked: list[_Asked], measurement: Measurement, lexical: NDArray[np.float64] | None, ranking: _Ranking) -> list[RankedSequence]:
    run, layers = asked[0].run, asked[0].attributed.layers
    total = len(run.training)
    shown = [ranking.numbers[group[0]] for group in ranking.groups]
    places = ranks(lexical, shown) if lexical is not None else [None] * len(shown)
    ranked = []
    for rank, (number, (_, *others)) in enumerate(zip(shown, ranking.groups, strict=True), 1):
        sequence = run.store[number]
        by_layer, by_token = ranking.split.layers[rank - 1] / total, ranking.split.tokens[rank - 1] / total
        runs = {name: float(split.totals[rank - 1]) / total for name, split in zip(_names(asked), ranking.by_run, strict=True)}
        ranked.append(
            RankedSequence(
                rank=rank,
                id=sequence.id,
                score=float(by_layer.sum()),
                text=sequence.text,
                documents=tuple({**part.to_json(), "score": float(by_token[part.first : part.end].sum())} for part in sequence.parts),
                metadata=sequence.metadata,
                layers={layer.name: float(share) for layer, share in zip(layers, by_layer, strict=True)},
                tokens=[(token, float(share)) for token, share in zip(run.token_texts(sequence.tokens), by_token, strict=True)],
                bm25_rank=places[rank - 1],
                duplicates=tuple((run.store.ids[ranking.numbers[other]], float(ranking.totals[other]) / total) for other in others),
                runs=runs if len(asked) > 1 else {},
                verbatim=longest_run(measurement.counted_tokens, sequence.tokens) if measurement.counted_tokens is not None else None,
            )
        )
    return ranked


def _names(asked: list[_Asked]) -> list[str]:
    """Of the runs: their directories' own names, or whole paths where two have the same name."""
    names = [one.run.directory.name for one in asked]
    return names if len(set(names)) == len(names) else [str(one.run.directory) for one in asked]


def _coverage(asked: _Asked) -> dict[str, Any]:
    covered, chosen = asked.run.coverage, asked.attributed.layers
    asked_for = {layer.name for layer in chosen}
    left_out = {name: "not selected by the query" for layer in covered.layers if layer.name not in asked_for for name in layer.known_as}
    return {
        "parameters_attributed": sum(layer.shape[0] * layer.shape[1] for layer in chosen) / covered.total,
        "excluded": covered.excluded | left_out,
    }


def _query_facts(asked: list[_Asked], place: int, measurement: Measurement) -> dict[str, Any]:
    """What was asked, and what the model (the models, on average) made of it."""
    parts = range(len(measurement.parts))
    log_probabilities = [np.mean([one.log_probabilities[place][part] for one in asked], axis=0) for part in parts]
    found = [values for one in asked if (values := function_values(one.attributed, measurement)) is not None]
    values = np.mean(found, axis=0).tolist() if found else None
    return query_facts(measurement, log_probabilities, values, asked[0].run.token_texts)


def _provenance(
    asked: list[_Asked],
    place: int,
    measurement: Measurement,
    options: QueryOptions,
    ranking: _Ranking,
    stages: dict[str, float],
) -> dict[str, Any]:
    run, solution = asked[0].run, asked[0].solution
    made_from, damping = run.description["fingerprints"], run.description["settings"]["factors"]["damping"]
    facts = {
        "run": str(run.directory),
        "model": made_from["model"],
        "tokenizer": made_from["tokenizer"],
        "data": made_from["data"],
        "factors": run.fingerprints["factors"],
        "rows": run.fingerprints["rows"],
        "method": "ekfac",
        "damping": 0.1 if damping == "optimizer" else damping,
        "normalized": options.normalize,
        "tokens_by": "output" if options.by_output_token else "input",
        "searched": asked[0].searched,
        "candidates": asked[0].searched if options.exact else len(ranking.numbers),
        "reranked": "exact",
        **_quality(asked, measurement, options, ranking.opponents),
        "seconds": round(sum(stages.values()), 4),
        "stages": {stage: round(seconds, 4) for stage, seconds in stages.items()},
    }
    if len(asked) > 1:
        facts["averaged_over"] = [
            {"run": str(one.run.directory), "model": one.run.description["fingerprints"]["model"], "rows": one.run.fingerprints["rows"]}
            for one in asked
        ]
    if options.refine and solution:
        used = min(options.refine.sequences, int(run.live[: len(run.training)].sum()))
        facts["method"] = "refined"
        facts["refinement"] = summary(solution, place) | {
            "sequences": used,
            "damping": run.refining_damping_name,
            "optimizer": run.optimizer_digest,
        }
    return facts


def num_candidates(run: "Run", options: QueryOptions, opponents: bool) -> int:
    """How many candidates are reranked: as many as are asked for, or as hold 99% of the exact top k by what was measured."""
    if options.candidates is not None:
        return max(options.candidates, options.k)
    return (
        run.fidelity.end(options.normalize, opponents).candidates_for(options.k) if run.fidelity else max(UNMEASURED_CANDIDATES, options.k)
    )


def _quality(asked: list[_Asked], measurement: Measurement, options: QueryOptions, opponents: bool) -> dict[str, float | None]:
    """What was measured of the index, if it was for such queries: log-probabilities of whole completions, EK-FAC over all layers of one run."""
    if options.exact:
        return {"recall_at_10": 1.0, "ndcg_at_20": 1.0}
    run, fidelity = asked[0].run, asked[0].run.fidelity
    special = options.layers or options.refine or options.where or run.appended or not measurement.is_one_completion
    if special or len(asked) > 1 or fidelity is None:
        return {"recall_at_10": None, "ndcg_at_20": None}
    end = fidelity.end(options.normalize, opponents)
    return {"recall_at_10": end.recall_at(10, num_candidates(run, options, opponents)), "ndcg_at_20": end.ndcg_at_20}


def _plain(options: QueryOptions) -> dict[str, Any]:
    """The options as JSON."""
    return {**vars(options), "layers": list(options.layers), "refine": vars(options.refine) if options.refine else None}
