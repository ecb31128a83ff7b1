"""What acting on the sequences that come first changed, by retraining without them or by a step on them: as JSON, table and plot."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from influence.evaluation.changes import Change
from influence.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES, Estimate
from influence.evaluation.plot import PlottedLine, line_plot
from influence.run import Run
from influence.run_directory import write_file, write_json


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
        made_from = self.run.description["fingerprints"]
        return {
            "metric": self.metric,
            "run": str(self.run.directory),
            "changes": [change.to_json() for change in self.changes],
            "queries": list(self.queries),
            **self.facts,
            "num_sequences": len(self.run.store),
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "plot": str(self.out / f"{self.metric}.png"),
            "provenance": {
                **{name: made_from[name] for name in ("model", "tokenizer", "data")},
                "factors": self.run.fingerprints["factors"],
                "damping": self.run.description["settings"]["factors"]["damping"],
            },
        }

    def print(self, console: Console) -> None:
        first = self.changes[0].method
        far = {change.k: change.as_far_as for change in self.changes if change.method == first}
        table = Table("sequences", "chosen by", "change, nats", "95%", f"{first}, times as far", "95%")
        for change in self.changes:
            size = f"{change.k} ({change.k / len(self.run.store):.1%})" if change.method == first else ""
            times = far[change.k].get(change.method)
            row = ["", ""] if times is None else [f"{times.value:.1f}", _interval(times, ".1f")]
            table.add_row(size, change.method, f"{change.mean.value:+.3f}", _interval(change.mean, "+.3f"), *row)
        console.print(table)
        for line in self.notes:
            console.print(line)
        console.print(f"written: {self.out / f'{self.metric}.json'}, {self.out / f'{self.metric}.png'}")

    def write(self) -> None:
        """The JSON and the PNG in the directory `out`, each appearing whole or not at all."""
        self.out.mkdir(parents=True, exist_ok=True)
        by_method = {name: [c for c in self.changes if c.method == name] for name in dict.fromkeys(c.method for c in self.changes)}
        lines = [
            PlottedLine(
                name=name,
                places=tuple(float(change.k) for change in own),
                values=tuple(change.mean.value for change in own),
                intervals=tuple(change.mean.interval or (change.mean.value, change.mean.value) for change in own),
            )
            for name, own in by_method.items()
        ]
        up = f"change of log-probability, nats\n{len(self.queries)} queries, 95% intervals"
        image = line_plot(lines, title=self.title, across=f"sequences of {len(self.run.store):,}", up=up)
        write_file(self.out / f"{self.metric}.png", image)
        write_json(self.out / f"{self.metric}.json", self.to_json())


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f"{low:{form}} … {high:{form}}" if math.isfinite(high) else f"at least {low:{form}}"
