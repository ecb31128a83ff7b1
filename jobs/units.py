"""Units of an evaluation's own: what is missing of them is done in this process or on Ray, with a progress bar."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from influence.config import ResourcesConfig
from influence.run import Run
from jobs.executors import Done, RayWorkers, Work, ray_connection
from jobs.progress import bar, say
from jobs.scheduler import Failure


class Units(Protocol):
    """Where units lie, and what each is made from."""

    @property
    def place(self) -> str:
        """Below the run directory."""

    def unit_fingerprint(self, unit: str) -> str: ...


def do_unit(run: Run, units: Units, unit: str, name: str, numbers: Callable[[], NDArray[np.float64]]) -> None:
    """Leaves the unit's numbers in the run directory as NAME.npy, unless they are there already."""
    made_from = units.unit_fingerprint(unit)
    if not run.directory.is_done(units.place, unit, made_from):
        found = numbers()
        run.directory.write_unit(units.place, unit, made_from, lambda place: np.save(place / f"{name}.npy", found, allow_pickle=False))


def numbers_of(run: Run, units: Units, unit: str, name: str) -> NDArray[np.float64]:
    """What `do_unit` left."""
    return np.asarray(np.load(run.directory.unit_path(units.place, unit) / f"{name}.npy", allow_pickle=False))


def do_missing(run: Run, units: Units, names: Sequence[str], work: Work, resources: ResourcesConfig, title: str) -> None:
    """Does those of the units that are not done, in any order. The right to work on the run must be held."""
    missing = [name for name in names if not run.directory.is_done(units.place, name, units.unit_fingerprint(name))]
    if not missing:
        return
    with ExitStack() as stack:
        do_all = _executor(work, title, resources, stack)
        progress = stack.enter_context(bar(title))
        finished = len(names) - len(missing)
        progress.advance(finished, len(names))

        def done(_: str) -> None:
            nonlocal finished
            finished += 1
            progress.advance(finished, len(names))

        do_all(dict.fromkeys(missing, 1.0), done)


def _executor(work: Work, step: str, resources: ResourcesConfig, stack: ExitStack) -> Callable[[Mapping[str, float], Done], None]:
    if resources.workers == 0 and resources.address is None:

        def in_this_process(units: Mapping[str, float], done: Done) -> None:
            for unit in units:
                work.do(step, unit)
                done(unit)

        return in_this_process
    workers = RayWorkers(resources, stack.enter_context(ray_connection(resources)), work)
    stack.callback(workers.close)

    def failed(failure: Failure) -> None:
        say(f"{failure.unit} failed (try {failure.attempt}): {failure.reason}")

    return lambda units, done: workers.do_all(step, units, done, failed)
