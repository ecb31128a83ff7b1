"""The answer to a query: ranked training sequences with their scores by layer and token, what was covered, and where it all comes from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from influence.report import Report, render_report
from influence.report.overview import set_facts
from influence.report.render import named
from influence.report.tables import query_tables


@dataclass(frozen=True, kw_only=True)
class RankedSequence:
    """A training sequence and its influence on the measurement, in the result's unit; the sums over `layers` and over `tokens` equal `score`."""

    rank: int
    id: str
    score: float
    text: str
    metadata: dict[str, Any]
    layers: dict[str, float]
    tokens: list[tuple[str, float]]
    bm25_rank: int | None
    duplicates: tuple[tuple[str, float], ...] = ()  # (id, score) of near-duplicates, which rank with it and are not shown
    runs: dict[str, float] = field(default_factory=dict)  # the score by each run, in their order, when several were averaged
    documents: tuple[dict[str, Any], ...] = ()  # what stands in it, in order: id, tokens, span, window, windows, score
    verbatim: int | None = None  # how many of the completion's counted tokens, in a row, it holds; None where there is no one completion

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "text": self.text,
            "documents": list(self.documents),
            "metadata": self.metadata,
            "layers": self.layers,
            "tokens": [list(token) for token in self.tokens],
            "bm25_rank": self.bm25_rank,
            "duplicates": [{"id": name, "score": score} for name, score in self.duplicates],
            "verbatim": self.verbatim,
        } | ({"runs": self.runs} if self.runs else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RankedSequence":
        """What `to_json` was made from."""
        return cls(
            **{
                **value,
                "tokens": [(token, share) for token, share in value["tokens"]],
                "documents": tuple(value.get("documents", ())),
                "duplicates": tuple((one["id"], one["score"]) for one in value["duplicates"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class InfluenceResult:
    """Never a bare number: the query, the ranking, its coverage and its provenance.

    `sequences` are the most helpful training sequences, best first, or the most harmful ones when the query asked for opponents.
    """

    id: str
    unit: str  # nats; √nats when scores are divided by √self-influence
    query: dict[str, Any]  # prompt, completion, log_probability, tokens, token_log_probabilities
    sequences: tuple[RankedSequence, ...]
    coverage: dict[str, Any]  # parameters_attributed, excluded
    provenance: dict[str, Any]
    distribution: dict[str, Any]  # of the index's estimates over the whole training set: histogram, tail
    lexical: dict[str, Any] | None = None  # what BM25 finds, where that was asked for: overlap, results

    def layers(self) -> dict[str, float]:
        """Influence by layer, summed over the ranked sequences."""
        names = self.sequences[0].layers if self.sequences else {}
        return {name: sum(sequence.layers[name] for sequence in self.sequences) for name in names}

    def scores(self) -> dict[str, float]:
        """The score of every sequence of the answer by its id, near-duplicates included."""
        return {name: score for sequence in self.sequences for name, score in ((sequence.id, sequence.score), *sequence.duplicates)}

    def to_json(self) -> dict[str, Any]:
        """The object that `influence query --json` prints and HTTP returns."""
        return {
            "id": self.id,
            "unit": self.unit,
            "query": self.query,
            "results": [sequence.to_json() for sequence in self.sequences],
            "coverage": self.coverage,
            "provenance": self.provenance,
            "distribution": self.distribution,
        } | ({} if self.lexical is None else {"bm25": self.lexical})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "InfluenceResult":
        """What `to_json` was made from."""
        same = ("id", "unit", "query", "coverage", "provenance", "distribution")
        sequences = tuple(RankedSequence.from_json(one) for one in value["results"])
        return cls(**{name: value[name] for name in same}, sequences=sequences, lexical=value.get("bm25"))

    def to_pandas(self) -> Any:
        """One row a ranked sequence: rank, id, score, text and metadata."""
        import pandas as pd

        columns = ["rank", "id", "score", "text"]
        rows = [{**s.metadata, "rank": s.rank, "id": s.id, "score": s.score, "text": s.text} for s in self.sequences]
        frame = pd.DataFrame(rows)
        return frame[columns + [name for name in frame.columns if name not in columns]]

    def report(self) -> Report:
        """Its page, JSON and tables. `Run.report_queries` shows both ends of the ranking, and several queries."""
        answer, asked = self.to_json(), self.query.get("completion") or "query"
        if self.sequences and self.sequences[0].score < 0:  # the first of proponents is negative only where every sequence hurt
            answer |= {"results": [], "opponents": answer["results"]}
        return query_report([answer], run=str(self.provenance.get("run", "")).rpartition("/")[2], title=f"Influence on “{asked.strip()}”")

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return str(self.to_pandas().to_html(index=False, escape=True))


def query_report(answers: Sequence[Mapping[str, Any]], *, run: str, created: str | None = None, title: str = "Influence report") -> Report:
    """The report of answers in the form of `InfluenceResult.to_json`, each with `opponents` beside its `results` if it has any. Of two or more, `set`
    says what they have in common: layers by family of queries, sequences that several share, overlap, concentration."""
    queries = named(json.loads(json.dumps(list(answers))))
    content = {"title": title, "run": run, "created": created or date.today().isoformat(), "queries": queries}
    return Report(
        title=title,
        content=content | ({"set": set_facts(queries)} if len(queries) > 1 else {}),
        page=lambda: render_report(content),
        table_rows=lambda: query_tables(queries),
    )


def report_page(answers: Sequence[Mapping[str, Any]], *, run: str, created: str, title: str = "Influence report") -> str:
    """The page of `query_report`."""
    return query_report(answers, run=run, created=created, title=title).to_html()
