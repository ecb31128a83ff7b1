"""Who does the units of a stage: this process, or workers on Ray. Both give the same results to rounding.

What passes between the process that directs the work and its workers is the work itself, once, and names of units: data, tokens, sums and rows go
through the run directory.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import ceil
from typing import Any, Protocol

from influence.config import Config, ResourcesConfig
from influence.errors import RequestError
from influence.run import Run
from jobs.progress import say
from jobs.scheduler import Failure, Rules, Schedule
from jobs.stages import STAGES, Stage, do_unit

Done = Callable[[str], None]
"""Called with the name of each unit that is finished."""

Failed = Callable[[Failure], None]
"""Called with each try of a unit that came to nothing, whether there will be another or not."""

LOOK_SECONDS = 1.0
"""How often units that take too long are looked for."""

START_SECONDS = 60.0
"""After this long without any worker, people are told what is waited for."""


class Executor(Protocol):
    @property
    def num_workers(self) -> int:
        """How many there are now."""

    def do(self, stage: Stage, sizes: Mapping[str, float], done: Done, failed: Failed) -> None:
        """Does all the units, whose sizes are as `Stage.size` has them, in any order. Raises the failure that another try does not mend."""


class InThisProcess:
    """One unit after the other, on one loaded model. The first failure is the last."""

    num_workers = 1

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config

    def do(self, stage: Stage, sizes: Mapping[str, float], done: Done, failed: Failed) -> None:
        for unit in sizes:
            do_unit(stage, self.run, self.config, unit)
            done(unit)


class Work(Protocol):
    """What workers can do: a value that is sent to each of them once, and loads what it needs when it is first used."""

    def do(self, step: str, unit: str, /) -> None:
        """Does one unit of a step and leaves its output in the run directory."""


class StageWork:
    """The stages of a run, on a run that is opened once; where no model is needed, with none in memory."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run: Run | None = None

    def do(self, step: str, unit: str) -> None:
        stage = next(stage for stage in STAGES if stage.name == step)
        if self.run is not None and not stage.needs_model and "language_model" in vars(self.run):
            self._forget()
        if self.run is None:
            self.run = Run(self.config.run.dir, flax=self.config.model.flax, memory_budget=self.config.resources.memory_budget)
        do_unit(stage, self.run, self.config, unit)

    def _forget(self) -> None:
        """Gives back the memory of what was loaded, which a process of its own would do too, and take seconds to start."""
        import torch

        self.run = None
        gc.collect()
        torch.cuda.empty_cache()


class Worker:
    """A Ray actor's side: work of its own, of which it does the units it is given."""

    def __init__(self, work: Work, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.work = work

    def ready(self) -> None:
        """Returns once the worker has a place to run."""

    def do(self, step: str, unit: str) -> str | None:
        """None when the unit is done; the message when the request was wrong, which no other worker would see differently."""
        try:
            self.work.do(step, unit)
        except RequestError as error:
            return str(error)
        return None


class RayWorkers:
    """Units flow to whichever worker is free, as `jobs.scheduler` says. One that dies, or whose unit fails, is replaced: what it holds may be broken.

    Workers for which the cluster has no room keep nothing waiting, and join when there is some.
    """

    def __init__(self, resources: ResourcesConfig, num_workers: int, work: Work, rules: Rules | None = None) -> None:
        import ray

        self._ray: Any = ray
        self._rules, self._num_places = rules or Rules(), num_workers
        capacity = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in ray.nodes() if node["Alive"]]
        gpus_here = sum(gpus for _, gpus in capacity)
        # A worker sees only the GPUs that it asks for, so one is asked for wherever there are enough.
        gpus = resources.gpus_per_worker if resources.gpus_per_worker is not None else float(gpus_here >= num_workers)
        if resources.address is None and gpus * num_workers > gpus_here:
            raise RequestError(
                f"{num_workers} workers with {gpus:g} GPUs each do not fit on this machine: lower resources.gpus_per_worker or workers"
            )
        cpus = cpus_per_worker(capacity, num_workers, gpus)
        self._room = f"{cpus:g} CPUs and {gpus:g} GPUs"
        self._new_worker: Any = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus)
        self._arguments = (work, max(1, int(cpus)))
        self.workers: dict[int, Any] = {}  # by place: whichever node has room for the worker of that number
        self.num_workers = 0

    def _start(self, place: int) -> Any:
        """A reference that is there once the worker has a place to run."""
        if place not in self.workers:
            self.workers[place] = self._new_worker.remote(*self._arguments)
        return self.workers[place].ready.remote()

    def _end(self, place: int) -> None:
        """Ends the worker whatever it does, and gives back what it held."""
        self._ray.kill(self.workers.pop(place))

    def close(self) -> None:
        """Ends the workers, and gives back what they held."""
        for place in list(self.workers):
            self._end(place)

    def do_all(self, step: str, sizes: Mapping[str, float], done: Done, failed: Failed) -> None:
        """Does all the units of a step, in any order.

        Raises RequestError at once when the request was wrong. Raises RuntimeError for a unit that failed at every try, when what is under
        way has come to its end, and when no worker can be started.
        """
        schedule = Schedule(sizes, self._num_places, self._rules)
        starting = {self._start(place): place for place in range(self._num_places)}
        running: dict[Any, int] = {}
        say_at: float | None = time.monotonic() + START_SECONDS

        def start_again(place: int) -> None:
            self._end(place)
            starting[self._start(place)] = place

        try:
            while not schedule.ended(time.monotonic()):
                running |= {self.workers[place].do.remote(step, unit): place for place, unit in schedule.begin(time.monotonic())}
                finished, _ = self._ray.wait([*running, *starting], num_returns=1, timeout=LOOK_SECONDS)
                if say_at is not None and time.monotonic() > say_at:
                    say(f"{step}: waiting for a worker to start; each needs a node with {self._room}")
                    say_at = None
                for reference in finished:
                    reason = self._reason(reference)
                    if reference in starting:
                        place = starting.pop(reference)
                        if reason is None:
                            schedule.joined(place)
                            say_at = None
                        elif schedule.not_started(place, reason):
                            start_again(place)
                        else:
                            self._end(place)
                        continue
                    place = running.pop(reference)
                    if reason is None:
                        unit, in_vain = schedule.finished(place, time.monotonic())
                        running = {other: at for other, at in running.items() if at not in in_vain}
                        for other in in_vain:
                            start_again(other)
                        done(unit)
                    else:
                        failure = schedule.failed(place, reason)
                        start_again(place)
                        failed(failure)
                        if failure is schedule.failure and running:
                            say(f"{step}: nothing more is begun; waiting for the {len(running)} units under way")
                self.num_workers = schedule.num_places
        finally:
            for place in running.values():
                self._end(place)
        if schedule.failure is not None:
            lost = schedule.failure
            raise RuntimeError(f"{step}/{lost.unit} failed {lost.attempt} times; last: {lost.reason}")
        if schedule.unstarted is not None:
            raise RuntimeError(f"{step}: no worker ({self._room}) can be started: {schedule.unstarted}")

    def _reason(self, reference: Any) -> str | None:
        """Why what was referred to failed; None when it did not. Raises RequestError when the request was wrong."""
        try:
            refusal = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return f"{type(error.cause).__name__}: {_first_line(error.cause)}"
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().split("\n")
            # Of an error at a worker's start Ray has the traceback alone, whose last line says what it is.
            return lines[-1] if "creation task" in lines[0] else f"the worker was lost: {lines[0]}"
        if refusal is not None:
            raise RequestError(refusal)
        return None


def cpus_per_worker(nodes: Sequence[tuple[float, float]], num_workers: int, gpus: float) -> float:
    """The most CPUs with which all the workers have room at once on nodes of (CPUs, GPUs), or as many of them as there are GPUs for.

    Whole ones; a fraction where workers are more than CPUs, for asking for one each would leave some waiting for ever. 1 where there is no node yet.
    """

    def room(cpus: float) -> int:
        return sum(int(min(own // cpus, own_gpus // gpus if gpus else own // cpus)) for own, own_gpus in nodes)

    nodes = [(own, own_gpus) for own, own_gpus in nodes if own >= 1 and own_gpus >= gpus]
    if not nodes:
        return 1.0
    wanted = min(num_workers, sum(int(own // gpus) for _, own in nodes)) if gpus else num_workers
    whole = next((cpus for cpus in range(int(max(nodes)[0]), 0, -1) if room(cpus) >= wanted), None)
    return float(whole) if whole is not None else 1 / ceil(wanted / sum(int(own) for own, _ in nodes))


class OnRay(RayWorkers):
    """The stages of a run, by workers that each open it."""

    def __init__(self, config: Config, num_workers: int, rules: Rules | None = None) -> None:
        super().__init__(config.resources, num_workers, StageWork(config), rules)

    def do(self, stage: Stage, sizes: Mapping[str, float], done: Done, failed: Failed) -> None:
        self.do_all(stage.name, sizes, done, failed)


def ray_cluster(config: Config) -> AbstractContextManager[int]:
    """`ray_connection` as configured."""
    return ray_connection(config.resources)


@contextmanager
def ray_connection(resources: ResourcesConfig) -> Iterator[int]:
    """A connection to the Ray cluster at its address, or a local one, for as long as the context lasts; gives the number of workers.

    A connection that exists already is used, and left as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    address, workers = resources.address, resources.workers
    if ray.is_initialized():
        yield workers or 1
        return
    if address is None:
        # A local cluster is nobody else's: without a mode of its own Ray would write a token into the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:  # "local" and not None, which would find other people's clusters: that of RAY_ADDRESS, or the latest that was started on this machine
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"no Ray cluster can be reached at {address!r}: {_first_line(error)}") from None
    try:
        yield workers or max(1, int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes()))
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
