"""Mislabelled sequences: how well self-influence and loss tell wrong labels from right ones. As JSON, table and plot.

Knows runs and labels; knows nothing of options.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from influence.evaluation.intervals import Estimate
from influence.evaluation.mislabel import Labels, auc, label_scores, labels_of
from influence.evaluation.plot import score_plot
from influence.run import Run
from jobs.answers import read_queries
from jobs.outcomes import plotted, where, write_plotted
from jobs.progress import bar


@dataclass(frozen=True, kw_only=True)
class MislabelOutcome:
    """What `influence evaluate RUN mislabel` measured, and the files of it."""

    run: Run
    labels: Labels
    scores: dict[str, NDArray[np.float64]]  # name → [M]
    areas: dict[str, Estimate]
    out: Path

    def to_json(self) -> dict[str, Any]:
        scores = [
            {"name": name, "auc": area.value, "interval": area.interval, "found_in_first": self.found_in_first(name)}
            for name, area in self.areas.items()
        ]
        counts = {"num_labels": len(self.labels.wrong), "num_wrong": int(self.labels.wrong.sum())}
        return plotted("mislabel", self.run, self.out, {"scores": scores, **counts})

    def found_in_first(self, name: str) -> float:
        """The share of the first n labels by this score that are wrong, n being how many are."""
        first = np.argsort(-self.scores[name], kind="stable")[: int(self.labels.wrong.sum())]
        return float(self.labels.wrong[first].mean())

    def print(self, console: Console) -> None:
        table = Table("ranking by", "AUC", "95%", "wrong among the first n")
        for name, area in self.areas.items():
            low, high = area.ends
            table.add_row(name, f"{area.value:.3f}", f"{low:.3f} – {high:.3f}", f"{self.found_in_first(name):.0%}")
        console.print(table)
        console.print(f"{len(self.labels.wrong)} labels, n = {int(self.labels.wrong.sum())} of them wrong")
        console.print(where(self.out, "mislabel"))

    def write(self) -> None:
        axis = f"area under the ROC curve and 95% interval\n{int(self.labels.wrong.sum())} of {len(self.labels.wrong)} labels are wrong"
        image = score_plot(self.areas, None, title="How well wrong labels are told from right ones", axis=axis)
        write_plotted(self.out, "mislabel", self.to_json(), image)


def read_labels(run: Run, path: Path) -> Labels:
    """Raises RequestError for a file that does not say of training sequences which are wrong."""
    return labels_of(run, read_queries(path))


def measure_mislabel(run: Run, labels: Labels, out: Path) -> MislabelOutcome:
    with bar("self-influence of labels") as progress:
        scores = label_scores(run, labels, progress.advance)
    areas = {name: auc(values, labels.wrong) for name, values in scores.items()}
    return MislabelOutcome(run=run, labels=labels, scores=scores, areas=areas, out=out)
