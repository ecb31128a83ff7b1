"""What acting on the sequences that come first changed, by retraining without them or by a step on them: as JSON, table and plot."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from influence.evaluation.changes import Change
from influence.evaluation.intervals import Estimate
from influence.evaluation.plot import line_plot
from influence.run import Run
from jobs.outcomes import plotted, where, write_plotted


@dataclass(frozen=True, kw_only=True)
class ChangesOutcome:
    """What `influence evaluate RUN removal` or `tailpatch` measured, and the files of it."""

    metric: str
    title: str
    run: Run
    queries: tuple[str, ...]  # ids
    changes: tuple[Change, ...]
    facts: dict[str, Any]  # more of the JSON
    notes: tuple[str, ...]  # more lines below the table
    out: Path

    def to_json(self) -> dict[str, Any]:
        changes = {"changes": [change.to_json() for change in self.changes], "queries": list(self.queries)}
        return plotted(self.metric, self.run, self.out, {**changes, **self.facts, "num_sequences": len(self.run.store)})

    def print(self, console: Console) -> None:
        first = self.changes[0].method
        far = {change.k: change.as_far_as for change in self.changes if change.method == first}
        table = Table("sequences", "chosen by", "change, nats", "95%", "beyond random", "95%", f"{first}, times as far", "95%")
        for change in self.changes:
            size = f"{change.k} ({change.k / len(self.run.store):.1%})" if change.method == first else ""
            times = far[change.k].get(change.method)
            cells = [(change.mean, "+.3f"), (change.beyond_random, "+.3f"), (times, ".1f")]
            row = [text for one, form in cells for text in (("", "") if one is None else (f"{one.value:{form}}", _interval(one, form)))]
            table.add_row(size, change.method, *row)
        console.print(table)
        for line in self.notes:
            console.print(line)
        console.print(where(self.out, self.metric))

    def write(self) -> None:
        methods = dict.fromkeys(change.method for change in self.changes)
        lines = {name: {change.k: change.mean for change in self.changes if change.method == name} for name in methods}
        up = f"change of log-probability, nats\n{len(self.queries)} queries, 95% intervals"
        image = line_plot(lines, title=self.title, across=f"sequences of {len(self.run.store):,}", up=up)
        write_plotted(self.out, self.metric, self.to_json(), image)


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f"{low:{form}} … {high:{form}}" if math.isfinite(high) else f"at least {low:{form}}"
