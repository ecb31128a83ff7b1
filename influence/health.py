"""The health of a training set: what each sequence does to the model, which stand out, which repeat each other, and what a data set that is
weighted otherwise would look like.

Two passes over the sequences, whatever their number: one for the mean training gradient, which is the query unless queries are given, and one that
scores every sequence for it. Self-influence and near-duplicates come from the index. Knows runs; knows nothing of files, options or pages.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ekfac import (
    Layer,
    Record,
    as_one_sequence,
    capture,
    gradient_blocks,
    layer_device,
    true_label_loss,
)
from indexing import ALIKE, all_duplicates, best
from influence.attribution import AttributedModel, precondition, query_gradients, score_batch
from influence.batches import in_batches
from influence.concentration import concentration
from influence.errors import RequestError
from influence.measurement import Measurement, query_facts, question
from influence.report import Report, render_health
from influence.report.tables import health_tables
from influence.run_directory import digest
from influence.sequences import TrainingSequence
from influence.solving import Progress, ignore

if TYPE_CHECKING:
    from influence.run import Run

MOST_VALUES = 200
"""A metadata column of more values than that tells no groups apart."""

MOST_IDS = 100
"""Ids of a group of near-duplicates in the summary; the columns tell the group of every sequence."""

LENGTH_GROUPS = 10
FEW = 5
"""A source, or a tenth by length, of fewer sequences has no median of its own."""

OUTLYING = 3.5
"""From which distance, in robust standard deviations, a sequence is an outlier (Iglewicz and Hoaglin 1993)."""

GRADIENT_PARTS = 8

Arrays = dict[str, NDArray[Any]]

Keep = Callable[[str, Callable[[], Arrays]], Arrays]
"""(name, work) → what the work gives: done now, or kept from before under that name."""


def nothing_kept(_: str, work: Callable[[], Arrays]) -> Arrays:
    return work()


PLACE = ("evaluations", "health")
"""Where in a run directory `influence health` leaves what it found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Health:
    """What was found: a number of each kind for every sequence that is live, and a summary as JSON."""

    columns: Mapping[str, NDArray[Any]]
    """By name, [M] each: id; num_tokens, counted ones; loss, in nats a token; self_influence and influence, in nats; how far self-influence and loss
    lie from what length and source predict, in robust standard deviations; duplicates, the number of a group or -1; weight; metadata."""
    summary: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.summary)

    def to_pandas(self) -> Any:
        """One row a sequence."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def weights(self) -> Arrays:
        """`id` and `weight` of every sequence."""
        return {name: self.columns[name] for name in ("id", "weight")}

    def report(self) -> Report:
        """Its page, JSON and tables."""
        name = str(self.summary["provenance"]["run"]).rpartition("/")[2]
        content = {"run": name, "created": date.today().isoformat(), **self.summary}
        return Report(
            title=f"Health of the training set of {name}",
            content=content,
            page=lambda: render_health(content),
            table_rows=lambda: health_tables(self.summary, self.columns),
        )

    def _repr_html_(self) -> str:
        """A table for notebooks: the sequences of greatest influence."""
        import pandas as pd

        shown = [{key: value for key, value in one.items() if key != "metadata"} for one in self.summary["largest"]]
        return str(pd.DataFrame(shown).to_html(index=False, escape=True))


def measure_health(
    run: "Run",
    queries: Measurement | None = None,
    *,
    by: Sequence[str] | None = None,
    k: int = 10,
    keep: Keep = nothing_kept,
    progress: Progress = ignore,
) -> Health:
    """The health of the run's live sequences, and their influence over `queries`, or over the whole training set when there are none.

    `by` are metadata columns to sum by, the first of which is the source that outliers are judged within; left out, all with 2 to 200 values. `k`
    sequences of each kind are named. `keep` may keep the work of a part, `progress` counts sequences. Raises RequestError for an unknown column.
    """
    if k < 1:
        raise RequestError(f"k must be at least 1, not {k}")
    if queries is not None and queries.function is not None:
        raise RequestError("the health of a training set is measured with log-probabilities, not with a function")
    start = time.perf_counter()
    rows, live = run.rows, run.live  # an index that is not there is told before the passes
    numbers = np.flatnonzero(live)
    metadata = [found for found, kept in zip(run.store.metadata(), live, strict=True) if kept]
    sources = _grouped(metadata, by)
    passes = _Passes(run=run, live=live, queries=queries, keep=keep, progress=progress)
    scans = [passes.scan(shard) for shard in range(run.store.num_shards)]
    influence, losses, num_tokens = (np.concatenate([scan[name] for scan in scans]) for name in ("influence", "losses", "num_tokens"))
    passed = time.perf_counter()
    groups = all_duplicates(rows, live)
    found = time.perf_counter()
    own = run.self_influence[numbers]
    source = next(iter(sources.values()), np.zeros(len(numbers), dtype=object))
    columns: Arrays = {
        "id": np.array([run.store.ids[number] for number in numbers], dtype=object),
        "num_tokens": num_tokens,
        "loss": losses / num_tokens,
        "self_influence": own,
        "influence": influence,
        "self_influence_distance": distances(np.log(np.where(own > 0, own, np.nan)), num_tokens, source),
        "loss_distance": distances(losses / num_tokens, num_tokens, source),
        "duplicates": _group_of_each(groups, numbers),
        **{f"metadata.{column}": values for column, values in sources.items()},
    }
    columns["weight"] = weights(influence, columns["duplicates"])
    layers = {layer.name: np.sum([scan[f"layer:{layer.name}"] for scan in scans], axis=0) for layer in run.coverage.layers}
    asked = passes.asked
    named = _Named(run=run, numbers=numbers, columns=columns, metadata=metadata)
    summary = {
        "about": asked or {"training_set": True, "sequences": passes.num_trained},
        "sequences": len(numbers),
        "tokens": int(num_tokens.sum()),
        "loss": float(losses.sum() / num_tokens.sum()),
        "unit": "nats",
        "concentration": concentration(influence),
        "largest": named.all(best(influence[None], k).numbers[0]),
        "most_negative": named.all(best(-influence[None], k).numbers[0]),
        "self_influence": named.all(best(own[None], k).numbers[0]),
        "outliers": {kind: _outliers(columns[f"{kind}_distance"], named, k) for kind in ("self_influence", "loss")},
        "duplicates": _duplicates(groups, named, k),
        "by": {column: _shares(values, columns) for column, values in sources.items()},
        "source": next(iter(sources), None),
        "thresholds": {"outlying": OUTLYING, "alike": ALIKE},
        "layers": {name: {"positive": float(sums[0]), "negative": float(sums[1])} for name, sums in layers.items()},
        "coverage": {"parameters_attributed": run.coverage.share, "excluded": run.coverage.excluded},
        "provenance": {
            "run": str(run.directory),
            "model": run.description["fingerprints"]["model"],
            "data": run.description["fingerprints"]["data"],
            "method": "ekfac",
            "damping": run.description["settings"]["factors"]["damping"],
            **_state(run),
            "seconds": {
                "passes": round(passed - start, 3),
                "duplicates": round(found - passed, 3),
                "all": round(time.perf_counter() - start, 3),
            },
        },
    }
    return Health(columns=columns, summary=summary)


def health_file(run: "Run") -> Path:
    """Where the summary of the run's health is, once it was measured and not written elsewhere."""
    return run.directory.path.joinpath(*PLACE, "health.json")


def last_health(run: "Run") -> dict[str, Any] | None:
    """The summary that `influence health` left in the run directory, with `run` and `created` as a page has them; None when there is none.

    Raises RequestError when sequences were appended or removed since.
    """
    path = health_file(run)
    try:
        summary = json.loads(path.read_bytes())
        created = date.fromtimestamp(path.stat().st_mtime).isoformat()
    except FileNotFoundError:
        return None
    told = summary["provenance"]
    if [told[name] for name in ("rows", "appended", "removed")] != list(_state(run).values()):
        raise RequestError(f"{run.directory} has changed since its health was measured: `influence health` measures it again")
    return {"run": run.directory.name, "created": created, **summary}


def _state(run: "Run") -> dict[str, Any]:
    """What tells the sequences that health was measured of from those of another time: nothing that was appended or removed comes back."""
    return {"rows": run.fingerprints["rows"], "appended": len(run.store) - len(run.training), "removed": int((~run.live).sum())}


def health_fingerprint(run: "Run", queries: Measurement | None) -> str:
    """What the numbers of the passes depend on: the index, what was removed since, and what is asked."""
    living = run.directory.living
    asked = None if queries is None else [[weight, s.tokens.tolist(), s.counted.tolist()] for weight, s in queries.parts]
    return digest(["health", run.fingerprints["rows"], list(run.row_units.values()), sorted(living.removed), asked])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Passes:
    """The work on the model: the query's gradient, and a scan of each shard."""

    run: "Run"
    live: NDArray[np.bool_]  # [N]
    queries: Measurement | None
    keep: Keep
    progress: Progress

    @property
    def num_trained(self) -> int:
        """Of how many live sequences the mean training gradient is."""
        return int(self.live[: len(self.run.training)].sum())

    def sequences(self, shard: int) -> list[TrainingSequence]:
        """The live ones of a shard."""
        live = self.live[int(self.run.store.starts[shard]) :]
        return [sequence for place, sequence in enumerate(self.run.store.shard(shard)) if live[place]]

    @property
    def asked(self) -> dict[str, Any] | None:
        """What the queries are, as JSON; None where the training set itself is the query."""
        if self.queries is None:
            return None
        nothing = [np.zeros(len(sequence.tokens)) for _, sequence in self.queries.parts]
        return question(query_facts(self.queries, nothing, None, lambda _: []))

    def scan(self, shard: int) -> Arrays:
        """Influence and summed loss of each live sequence of the shard, and by layer the sums of positive and of negative influence."""
        sequences = self.sequences(shard)
        done = int(self.run.store.starts[shard]) + (0 if self.queries is not None else len(self.run.training))
        found = self.keep(f"scan-{shard:05d}", lambda: self._scan(sequences, lambda count: self._advance(done + count)))
        self._advance(done + len(sequences))
        return found

    def _advance(self, done: int) -> None:
        self.progress(done, len(self.run.store) + (0 if self.queries is not None else len(self.run.training)))

    def _scan(self, sequences: Sequence[TrainingSequence], advance: Callable[[int], None]) -> Arrays:
        attributed, vector = self.run.attributed, self._vector
        names = [layer.name for layer in attributed.layers]
        influence, losses = np.zeros((len(sequences), len(names))), np.zeros(len(sequences))
        done = 0
        for members, batch in in_batches(sequences, attributed.budget, attributed.device):
            influence[members], _, token_losses = score_batch(attributed, vector, batch)
            losses[members] = token_losses.sum(1)
            done += len(members)
            advance(done)
        influence /= len(self.run.training)
        by_layer = {
            f"layer:{name}": np.array([np.maximum(column, 0).sum(), np.minimum(column, 0).sum()])
            for name, column in zip(names, influence.T, strict=True)
        }
        counted = np.array([sequence.counted.sum() for sequence in sequences], dtype=np.int64)
        return {"influence": influence.sum(1), "losses": losses, "num_tokens": counted, **by_layer}

    @cached_property
    def _vector(self) -> dict[str, torch.Tensor]:
        """(G + λI)⁻¹∇(-f), [O, J] by layer; f is the queries', or the mean log-probability of a live training sequence."""
        run = self.run
        if self.queries is not None:
            return self._preconditioned({name: one[0] for name, one in query_gradients(run.attributed, [self.queries]).gradients.items()})
        parts = np.array_split(np.arange(run.training.num_shards), min(GRADIENT_PARTS, run.training.num_shards))
        totals: dict[str, torch.Tensor] = {}
        for place, shards in enumerate(parts):
            kept = self.keep(f"gradient-{place:05d}", lambda shards=shards: self._summed(shards))  # type: ignore[misc]
            for layer in run.attributed.layers:
                found = torch.from_numpy(kept[layer.name]).to(layer_device(run.attributed.model, layer))
                totals[layer.name] = totals[layer.name] + found if layer.name in totals else found
        if self.num_trained == 0:
            raise RequestError(f"every training sequence was removed from {run.directory}: give --queries, or ask about another run")
        return self._preconditioned({name: total / self.num_trained for name, total in totals.items()})

    def _preconditioned(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(G + λI)⁻¹ of one gradient over all layers."""
        found: dict[str, torch.Tensor] = {}
        for part in self.run.parts():
            own = {layer.name: gradients[layer.name] for layer in part.layers}
            found |= precondition(own, self.run.factors_of(part).factors)
        return found

    def _summed(self, shards: NDArray[np.int64]) -> Arrays:
        """Σ ∇L over the live sequences of these shards."""
        totals: dict[str, torch.Tensor] = {}
        for shard in shards:
            done = int(self.run.store.starts[shard])
            found = gradient_sum(self.run.attributed, self.sequences(int(shard)), lambda count, done=done: self._advance(done + count))  # type: ignore[misc]
            totals = {name: totals[name] + part if totals else part for name, part in found.items()}
        return {name: total.cpu().numpy() for name, total in totals.items()}


def gradient_sum(
    attributed: AttributedModel, sequences: Sequence[TrainingSequence], advance: Callable[[int], None] = lambda done: None
) -> dict[str, torch.Tensor]:
    """Σ ∇L over the sequences, [O, J] by layer: no more than a plain forward and backward pass, because no sequence's own gradient is formed."""
    dtype = torch.promote_types(next(attributed.model.parameters()).dtype, torch.float32)
    totals = {
        layer.name: torch.zeros(layer.shape, device=layer_device(attributed.model, layer), dtype=dtype) for layer in attributed.layers
    }
    done = 0

    def consume(layer: Layer, record: Record) -> None:
        for rows, block in gradient_blocks(as_one_sequence(record)):
            totals[layer.name][rows] += block[0].to(totals[layer.name].dtype)

    for members, batch in in_batches(sequences, attributed.budget, attributed.device):
        capture(attributed.model, attributed.layers, lambda batch=batch: true_label_loss(attributed.model, batch), batch.reached, consume)  # type: ignore[misc]
        done += len(members)
        advance(done)
    return totals


def distances(values: NDArray[np.float64], num_tokens: NDArray[np.int64], source: NDArray[Any]) -> NDArray[np.float64]:
    """[N]: how far each value lies from what length and source predict, in robust standard deviations; NaN where the value is.

    The prediction is a median by source plus one by length, a tenth of the sequences being of similar length, each of what the other leaves
    (Tukey's median polish, two sweeps); the unit is 1.4826 times the median of the absolute rest, the standard deviation of a normal distribution.
    """
    rest = np.where(np.isfinite(values), values, np.nan)
    edges = np.unique(np.quantile(num_tokens, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:-1]))
    by_length = _members(np.searchsorted(edges, num_tokens, side="left"))
    by_source = _members(_labels(source))
    for members in 2 * [*by_source, *by_length]:
        if np.isfinite(rest[members]).sum() >= FEW:
            rest[members] -= np.nanmedian(rest[members])
    absolute = np.abs(rest[np.isfinite(rest)])
    scale = 1.4826 * float(np.median(absolute)) if len(absolute) else 0.0
    return np.asarray(rest / scale if scale > 0 else np.where(np.isfinite(rest), 0.0, np.nan))


def _members(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The places of each label."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _labels(values: NDArray[Any]) -> NDArray[np.int64]:
    """A number for each value, in the order in which the values first come."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.int64)


def weights(influence: NDArray[np.float64], duplicates: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N], 1 on average: in proportion to (rank - 1/2) / m, rank 1 being the lowest influence and m the size of the sequence's group of
    near-duplicates, so that a group weighs as much as one sequence."""
    from scipy.stats import rankdata  # here, since it takes seconds that every worker would wait for

    sizes = np.bincount(duplicates[duplicates >= 0], minlength=1)
    found = (rankdata(influence) - 0.5) / np.where(duplicates >= 0, sizes[duplicates], 1)
    return np.asarray(found / found.mean())


def _grouped(metadata: Sequence[Mapping[str, Any]], by: Sequence[str] | None) -> dict[str, NDArray[Any]]:
    """By column: each sequence's value as text."""
    known = dict.fromkeys(key for found in metadata for key in found)
    for column in by or ():
        if column not in known:
            raise RequestError(
                f"--by: there is no metadata column {column!r}; there are: {', '.join(known) or 'none (data.metadata names them)'}"
            )
    found = {column: np.array([_text(one.get(column)) for one in metadata], dtype=object) for column in (by or known)}
    return found if by else {column: values for column, values in found.items() if 2 <= len(set(values)) <= MOST_VALUES}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _group_of_each(groups: Sequence[NDArray[np.int64]], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    found = np.full(len(numbers), -1, dtype=np.int64)
    for number, group in enumerate(groups):
        found[np.searchsorted(numbers, group)] = number
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Named:
    """Sequences by their place among the live ones, as JSON."""

    run: "Run"
    numbers: NDArray[np.int64]
    columns: Arrays
    metadata: Sequence[Mapping[str, Any]]

    def one(self, place: int) -> dict[str, Any]:
        numbers = ("num_tokens", "loss", "self_influence", "influence", "self_influence_distance", "loss_distance", "weight")
        return {
            "id": self.columns["id"][place],
            "text": self.run.store[int(self.numbers[place])].text,
            "metadata": dict(self.metadata[place]),
            **{name: _plain(self.columns[name][place]) for name in numbers},
        }

    def all(self, places: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        return [self.one(int(place)) for place in places]


def _plain(value: Any) -> float | int | None:
    number: float | int = value.item()
    return number if np.isfinite(number) else None


def _outliers(distance: NDArray[np.float64], named: _Named, k: int) -> dict[str, Any]:
    """How many lie far above and below, and those that lie farthest."""
    known = np.nan_to_num(distance)
    far = best(np.abs(known)[None], k).numbers[0]
    return {
        "above": int((known >= OUTLYING).sum()),
        "below": int((known <= -OUTLYING).sum()),
        "farthest": named.all([place for place in far if abs(known[place]) >= OUTLYING]),
    }


def _duplicates(groups: Sequence[NDArray[np.int64]], named: _Named, k: int) -> dict[str, Any]:
    """How many there are, and the largest groups."""
    shown = sorted(groups, key=len, reverse=True)[:k]
    return {
        "groups": len(groups),
        "sequences": sum(len(group) for group in groups),
        "largest": [
            {
                "size": len(group),
                "ids": [named.run.store.ids[number] for number in group[:MOST_IDS]],
                "examples": named.all(np.searchsorted(named.numbers, group[:3])),
            }
            for group in shown
        ],
    }


def _shares(values: NDArray[Any], columns: Arrays) -> list[dict[str, Any]]:
    """What the sequences of each value are and do together, the value of most sequences first."""
    self_influence, absolute = float(columns["self_influence"].sum()), float(np.abs(columns["influence"]).sum())

    def row(value: str, members: NDArray[np.int64]) -> dict[str, Any]:
        influence, tokens = columns["influence"][members], int(columns["num_tokens"][members].sum())
        return {
            "value": value,
            "sequences": len(members),
            "tokens": tokens,
            "loss": float((columns["loss"] * columns["num_tokens"])[members].sum() / tokens),
            "self_influence": float(columns["self_influence"][members].sum()),
            "self_influence_share": _ratio(float(columns["self_influence"][members].sum()), self_influence),
            "positive": float(np.maximum(influence, 0).sum()),
            "negative": float(np.minimum(influence, 0).sum()),
            "influence_share": _ratio(float(np.abs(influence).sum()), absolute),
        }

    rows = (row(values[members[0]], members) for members in _members(_labels(values)))
    return sorted(rows, key=lambda one: -one["sequences"])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
