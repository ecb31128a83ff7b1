"""A whole run: every stage that is not yet done, in order, on an executor, with progress for people and for `influence status`."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from influence.config import Config
from influence.errors import RequestError
from influence.run import Run
from influence.stored_run import run_directory
from jobs.executors import Executor, InThisProcess, OnRay, ray_cluster
from jobs.progress import bar, say
from jobs.stages import STAGES, Stage, create_run


def run_all(config: Config, until: str | None = None) -> Run:
    """Brings the configured run to its end, or to that of the stage `until`, and returns it.

    Called again after any interruption, it goes on with the units that are missing.

    Raises RequestError when the run directory was made from something else, or another process works on it.
    """
    names = [stage.name for stage in STAGES]
    if until is not None and until not in names:
        raise RequestError(f"--until: there is no stage {until!r}; there are: {', '.join(names)}")
    create_run(config)
    with run_directory(config.run.dir).exclusive(), ExitStack() as stack:
        run = Run(config.run.dir, memory_budget=config.resources.memory_budget)
        executor: Executor | None = None
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
        left_out = run.training.summary["num_left_out"]
        if left_out:
            some = ", ".join(run.training.summary["left_out"][:3]) + (", …" if left_out > 3 else "")
            noun = "sequence" if left_out == 1 else "sequences"
            say(f"left out {left_out} {noun} without a counted token (nothing in them is predicted): {some}")
    return run


def _executor(config: Config, run: Run, stack: ExitStack) -> Executor:
    if config.resources.workers == 0 and config.resources.address is None:
        return InThisProcess(run, config)
    on_ray = OnRay(config, stack.enter_context(ray_cluster(config)))
    stack.callback(on_ray.close)
    return on_ray


def _do_stage(stage: Stage, units: Sequence[str], missing: Sequence[str], run: Run, executor: Executor) -> None:
    start, before = time.time(), len(units) - len(missing)
    finished = before

    def done(_: str) -> None:
        nonlocal finished
        finished += 1
        per_second = (finished - before) / max(time.time() - start, 1e-9)
        run.directory.write_progress(
            {
                "stage": stage.name,
                "done": finished,
                "total": len(units),
                "units_per_second": per_second,
                "seconds_left": (len(units) - finished) / per_second,
                "updated": time.time(),
            }
        )
        progress.advance(finished, len(units))

    with bar(stage.title) as progress:
        progress.advance(before, len(units))
        executor.do(stage, missing, done)


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
