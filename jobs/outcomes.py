"""What the outcomes of all metrics have in common: what their JSON says of the run, and the files they become."""

from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from influence.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES
from influence.run import Run
from influence.run_directory import write_file, write_json


class Outcome(Protocol):
    """What a metric measured."""

    def to_json(self) -> dict[str, Any]: ...

    def print(self, console: Console) -> None: ...

    def write(self) -> None: ...


def provenance(run: Run, damping: Any = None) -> dict[str, Any]:
    """What a figure was measured of, with the run's own damping unless another one is told."""
    made_from = run.description["fingerprints"]
    return {
        **{name: made_from[name] for name in ("model", "tokenizer", "data")},
        "factors": run.fingerprints["factors"],
        "damping": run.description["settings"]["factors"]["damping"] if damping is None else damping,
    }


def plotted(metric: str, run: Run, out: Path, found: dict[str, Any], damping: Any = None) -> dict[str, Any]:
    """The JSON of a metric that comes with intervals and a plot."""
    return {
        "metric": metric,
        "run": str(run.directory),
        **found,
        "confidence": CONFIDENCE,
        "num_resamples": NUM_RESAMPLES,
        "plot": str(out / f"{metric}.png"),
        "provenance": provenance(run, damping),
    }


def write_plotted(out: Path, metric: str, told: dict[str, Any], image: bytes) -> None:
    """METRIC.png and METRIC.json in the directory `out`, which is made; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / f"{metric}.png", image)
    write_json(out / f"{metric}.json", told)


def where(out: Path, metric: str) -> str:
    """The line that tells people of the files."""
    return f"written: {out / f'{metric}.json'}, {out / f'{metric}.png'}"
