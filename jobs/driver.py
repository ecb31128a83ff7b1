"""A whole run: every stage that is not yet done, in order, on an executor, with progress for people and for `influence status`.

Knows of a run what its records say: how many sequences and tokens there are, which layers, which units are done. Sequences, sums and rows it
never reads.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from influence.config import Config
from influence.errors import RequestError
from influence.run import Run
from influence.stored_run import run_directory
from jobs.executors import Executor, InThisProcess, OnRay, ray_cluster
from jobs.progress import Bar, bar, say
from jobs.scheduler import Failure
from jobs.stages import STAGES, Stage, create_run

MOST_FAILURES = 20
"""How many of the latest failures progress.json has."""


def run_all(config: Config, until: str | None = None) -> Run:
    """Brings the configured run to its end, or to that of the stage `until`, and returns it.

    Called again after any interruption, it goes on with the units that are missing.

    Raises RequestError when the run directory was made from something else, or another process works on it.
    """
    names = [stage.name for stage in STAGES]
    if until is not None and until not in names:
        raise RequestError(f"--until: there is no stage {until!r}; there are: {', '.join(names)}")
    create_run(config)
    executor: Executor | None = None
    with run_directory(config.run.dir).exclusive(), ExitStack() as stack:
        run = Run(config.run.dir, flax=config.model.flax, memory_budget=config.resources.memory_budget)
        for stage in STAGES[: 1 + names.index(until)] if until else STAGES:
            units = stage.units(run)
            missing = run.directory.missing(stage.name, units, run.fingerprints[stage.name])
            if not missing:
                continue
            if run.directory.living.erased:
                raise RequestError(
                    f"{run.directory} lacks {stage.name}/{missing[0]}, which cannot be made again, for sequences were erased: restore it from a copy"
                )
            if executor is None:
                executor = _executor(config, run, stack)
            _do_stage(stage, units, missing, run, executor)
        if left_out := told_left_out(run.training.summary):
            say(left_out)
    if isinstance(executor, OnRay):
        with run.directory.exclusive():  # which clears what workers that were ended left half-written
            pass
    return run


def told_left_out(summary: Mapping[str, Any]) -> str | None:
    """What is not in the run of the data, and why, in one line; None where everything is."""
    count, weightless = summary["num_left_out"], summary["num_weightless"]
    if not count:
        return None
    reasons = ["without a counted token (nothing in them is predicted)"] if weightless < count else []
    reasons += [f"{'' if weightless == count else f'{weightless} '}of weight 0"] if weightless else []
    some = ", ".join(summary["left_out"][:3]) + (", …" if count > 3 else "")
    return f"left out {count} sequence{'s' if count > 1 else ''} {' or '.join(reasons)}: {some}"


def _executor(config: Config, run: Run, stack: ExitStack) -> Executor:
    if config.resources.workers == 0 and config.resources.address is None:
        return InThisProcess(run, config)
    on_ray = OnRay(config, stack.enter_context(ray_cluster(config)))
    stack.callback(on_ray.close)
    return on_ray


def _do_stage(stage: Stage, units: Sequence[str], missing: Sequence[str], run: Run, executor: Executor) -> None:
    with bar(stage.title) as shown:
        progress = Progress(stage, run, len(units), {unit: stage.size(run, unit) for unit in missing}, executor, shown)
        executor.do(stage, progress.sizes, progress.done, progress.failed)


class Progress:
    """How a stage comes along, for people and for progress.json."""

    def __init__(self, stage: Stage, run: Run, num_units: int, sizes: Mapping[str, float], executor: Executor, shown: Bar) -> None:
        """`sizes`: of the units that are not done yet."""
        self.stage, self.run, self.num_units, self.sizes, self.executor, self.shown = stage, run, num_units, sizes, executor, shown
        self.start, self.whole_size = time.time(), sum(sizes.values())
        self.num_done, self.size_done = 0, 0.0
        self.num_failed = 0
        self.failures: deque[Failure] = deque(maxlen=MOST_FAILURES)
        self.shown.advance(num_units - len(sizes), num_units)

    def done(self, unit: str) -> None:
        self.num_done += 1
        self.size_done += self.sizes[unit]
        self._tell()

    def failed(self, failure: Failure) -> None:
        self.num_failed += 1
        self.failures.append(failure)
        say(f"{self.stage.name}/{failure.unit} failed (try {failure.attempt}): {failure.reason}")
        self._tell()

    def _tell(self) -> None:
        now = time.time()
        seconds, finished = max(now - self.start, 1e-9), self.num_units - len(self.sizes) + self.num_done
        facts: dict[str, Any] = {
            "stage": self.stage.name,
            "done": finished,
            "total": self.num_units,
            "units_per_second": self.num_done / seconds,
        }
        if self.stage.over_sequences:
            tokens_per_sequence = self.run.training.summary["tokens"] / len(self.run.training)
            facts["tokens_per_second"] = self.size_done * tokens_per_sequence / seconds
        if self.size_done:
            facts["seconds_left"] = (self.whole_size - self.size_done) / self.size_done * seconds
        facts |= {"updated": now, "workers": self.executor.num_workers, "retries": self.num_failed}
        self.run.directory.write_progress(facts | {"failures": [asdict(failure) for failure in self.failures]})
        note = f"{facts['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in facts else ""
        self.shown.advance(finished, self.num_units, note)


def stage_states(run: Run) -> dict[str, dict[str, object]]:
    """For each stage: how many of its units are done and how many there are (None while an earlier stage must tell)."""
    states: dict[str, dict[str, object]] = {}
    for stage in STAGES:
        try:
            units = stage.units(run)
        except RequestError:
            states[stage.name] = {"done": 0, "total": None}
            continue
        missing = run.directory.missing(stage.name, units, run.fingerprints[stage.name])
        states[stage.name] = {"done": len(units) - len(missing), "total": len(units)}
    return states
