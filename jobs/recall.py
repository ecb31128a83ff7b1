"""Recall: where the sequences that are known to state a query's answer rank, by each method. As JSON, table and plot.

Knows runs and rankings; knows nothing of options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from influence.evaluation.intervals import Estimate
from influence.evaluation.plot import score_plot
from influence.evaluation.recall import Planted, Recall, numbers_by_id, planted_in, recall
from influence.run import Run
from jobs.answers import read_queries
from jobs.outcomes import plotted, where, write_plotted

Recalls = dict[str, dict[str, Recall]]
"""Kind of query → method → figures."""


@dataclass(frozen=True, kw_only=True)
class RecallOutcome:
    """What `influence evaluate RUN recall` measured, and the files of it."""

    run: Run
    kinds: Mapping[str, int]  # how many queries there are of each
    recalls: Recalls
    out: Path

    def to_json(self) -> dict[str, Any]:
        kinds = {
            kind: {"num_queries": count, "methods": {name: found.to_json() for name, found in self.recalls[kind].items()}}
            for kind, count in self.kinds.items()
        }
        return plotted("recall", self.run, self.out, {"kinds": kinds, "num_sequences": len(self.run.store)})

    def print(self, console: Console) -> None:
        for kind, methods in self.recalls.items():
            console.print(recall_table(f"{kind}: {self.kinds[kind]} queries", methods))
        console.print(EXPLAINED)
        console.print(where(self.out, "recall"))

    def write(self) -> None:
        scores = {f"{kind}: {name}": one.reciprocal_rank for kind, methods in self.recalls.items() for name, one in methods.items()}
        title, axis = "Where the sequences rank that state the answer", "mean reciprocal rank of the first that does, and 95% interval"
        write_plotted(self.out, "recall", self.to_json(), score_plot(scores, None, title=title, axis=axis))


EXPLAINED = (
    "first: the share of queries whose first result states the answer; of the top n: the share of the first n results that do, n being how "
    "many there are; opposed: the share of the last n that state another one; 95% intervals over queries."
)


def recall_table(title: str, methods: Mapping[str, Recall]) -> Table:
    table = Table("ranking by", "first", "MRR", "top n", "rank", "opposed", title=title, title_justify="left")
    for name, found in methods.items():
        cells = [
            f"{found.first.value:.0%}{_interval(found.first, 100, 0)}",
            f"{found.reciprocal_rank.value:.3f}{_interval(found.reciprocal_rank, 1, 2)}",
        ]
        cells += [f"{found.top_n.value:.0%}", f"{found.median_rank:.0f}"]
        table.add_row(name, *cells, "" if found.opposed is None else f"{found.opposed.value:.0%}")
    return table


def _interval(estimate: Estimate, unit: float, digits: int) -> str:
    """Short, so that a table of these fits 80 columns."""
    return (
        ""
        if estimate.interval is None
        else " ({}–{})".format(*(f"{unit * end:.{digits}f}".removeprefix("0") or "0" for end in estimate.interval))
    )


def read_planted(run: Run, path: Path) -> list[Planted]:
    """What each line of the queries' file says is planted. Raises RequestError for a line that says nothing, or names what is not there."""
    numbers = numbers_by_id(run.store.ids, run.store.documents)
    return [planted_in(item, place, numbers) for _, item, place in read_queries(path)]


def recalls_of(tables: Mapping[str, NDArray[np.float64]], planted: Sequence[Planted]) -> Recalls:
    """The figures of each method's scores [Q, N], by kind of query in the order in which kinds come."""
    found: Recalls = {}
    for kind in dict.fromkeys(one.kind for one in planted):
        places = [place for place, one in enumerate(planted) if one.kind == kind]
        own = [planted[place] for place in places]
        found[kind] = {name: recall(table[places], own) for name, table in tables.items()}
    return found


def measure_recall(run: Run, planted: Sequence[Planted], tables: Mapping[str, NDArray[np.float64]], out: Path) -> RecallOutcome:
    recalls = recalls_of(tables, planted)
    kinds = {kind: sum(one.kind == kind for one in planted) for kind in recalls}
    return RecallOutcome(run=run, kinds=kinds, recalls=recalls, out=out)
