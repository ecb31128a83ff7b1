"""The tail patch: what one step of training on the sequences that a method ranks first does to a query. Knows runs and scores; no options."""

from collections.abc import Sequence
from pathlib import Path

from influence.evaluation.tailpatch import tail_patches
from influence.run import Run
from influence.solving import check_movable
from jobs.answers import Asked
from jobs.changes import ChangesOutcome
from jobs.progress import bar
from jobs.scoring import Tables


def measure_tailpatch(
    run: Run, asked: Asked, tables: Tables, sizes: Sequence[int], step_size: float, num_random: int, out: Path
) -> ChangesOutcome:
    """A step of plain gradient descent on every set, each from the run's own model."""
    check_movable(run)
    measurements = [measurement for _, measurement in asked]
    with bar("steps of training") as progress:
        found = tail_patches(run.language_model.model, run.store, measurements, tables, sizes, step_size, num_random, progress.advance)
    return ChangesOutcome(
        metric="tailpatch",
        title="After one step of training on the sequences that come first",
        run=run,
        queries=tuple(name for name, _ in asked),
        changes=tuple(found),
        facts={"optimizer": "sgd", "step_size": step_size, "num_random": num_random},
        notes=(f"{len(asked)} queries; one step of gradient descent, {step_size:g} × the gradient of the mean loss of a token",),
        out=out,
    )
