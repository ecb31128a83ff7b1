"""Who does the units of a stage: this process, or workers on Ray. Both give the same results to rounding."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from influence.config import Config, ResourcesConfig
from influence.errors import RequestError
from influence.run import Run
from jobs.stages import STAGES, Stage, do_unit

Done = Callable[[str], None]
"""Called with the name of each unit that is finished."""


class Executor(Protocol):
    def do(self, stage: Stage, units: Sequence[str], done: Done) -> None:
        """Does all the units, in any order. Raises the first failure."""


class InThisProcess:
    """One unit after the other, on one loaded model."""

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config

    def do(self, stage: Stage, units: Sequence[str], done: Done) -> None:
        for unit in units:
            do_unit(stage, self.run, self.config, unit)
            done(unit)


class Work(Protocol):
    """What workers can do: a value that is sent to each of them once, and loads what it needs when it is first used."""

    def do(self, step: str, unit: str, /) -> None:
        """Does one unit of a step and leaves its output in the run directory."""


class StageWork:
    """The stages of a run, on a run that is opened once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run: Run | None = None

    def do(self, step: str, unit: str) -> None:
        if self.run is None:
            self.run = Run(self.config.run.dir, memory_budget=self.config.resources.memory_budget)
        do_unit(next(stage for stage in STAGES if stage.name == step), self.run, self.config, unit)


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
    """Units flow to whichever worker is free. A worker that dies is replaced, and its unit done again, a few times."""

    TRIES = 3

    def __init__(self, resources: ResourcesConfig, num_workers: int, work: Work) -> None:
        import ray

        self._ray, self._work = ray, work
        share = ray.cluster_resources().get("CPU", 1) / num_workers
        threads = max(1, int(share))
        # More workers than CPUs share them: asking for a whole one each would leave some waiting for ever.
        gpus = self._gpus_per_worker(resources.gpus_per_worker, num_workers)
        if resources.address is None and gpus * num_workers > ray.cluster_resources().get("GPU", 0):
            raise RequestError(
                f"{num_workers} workers with {gpus:g} GPUs each do not fit on this machine: lower resources.gpus_per_worker or workers"
            )
        options = {"num_cpus": min(share, threads), "num_gpus": gpus}
        self._new_worker: Any = ray.remote(Worker).options(**options)
        self._threads = threads
        self.workers: list[Any] = [self._start() for _ in range(num_workers)]

    def _gpus_per_worker(self, wanted: float | None, num_workers: int) -> float:
        """A worker sees only the GPUs that it asks for, so one is asked for wherever there are enough."""
        return wanted if wanted is not None else float(self._ray.cluster_resources().get("GPU", 0) >= num_workers)

    def _start(self) -> Any:
        return self._new_worker.remote(self._work, self._threads)

    def close(self) -> None:
        """Ends the workers, and gives back what they held."""
        for worker in self.workers:
            self._ray.kill(worker)

    def do_all(self, step: str, units: Sequence[str], done: Done) -> None:
        """Does all the units of a step, in any order. Raises the first failure."""
        waiting = [(unit, 1) for unit in reversed(units)]
        # Units go to workers that run already: one that the cluster has no place for keeps nothing waiting.
        idle: list[Any] = []
        starting = {worker.ready.remote(): worker for worker in self.workers}
        running: dict[Any, tuple[Any, str, int]] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    worker, (unit, attempt) = idle.pop(), waiting.pop()
                    running[worker.do.remote(step, unit)] = (worker, unit, attempt)
                finished, _ = self._ray.wait([*running, *starting], num_returns=1)
                if finished[0] in starting:
                    idle.append(starting.pop(finished[0]))  # whether it did start shows with its first unit
                    continue
                worker, unit, attempt = running.pop(finished[0])
                try:
                    refusal = self._ray.get(finished[0])
                except self._ray.exceptions.RayActorError as error:
                    if attempt == self.TRIES:
                        raise RuntimeError(f"{step}/{unit} failed {attempt} times; last: {_first_line(error)}") from error
                    self._ray.kill(worker)  # it may still hold its place, if it was only unreachable
                    self.workers[self.workers.index(worker)] = fresh = self._start()
                    starting[fresh.ready.remote()] = fresh
                    waiting.append((unit, attempt + 1))
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    raise RuntimeError(f"{step}/{unit}: {_first_line(error.cause)}") from error
                if refusal is not None:
                    raise RequestError(refusal)
                idle.append(worker)
                done(unit)
        finally:
            for reference in running:
                self._ray.cancel(reference, force=False)


class OnRay(RayWorkers):
    """The stages of a run, by workers that each open it."""

    def __init__(self, config: Config, num_workers: int) -> None:
        super().__init__(config.resources, num_workers, StageWork(config))

    def do(self, stage: Stage, units: Sequence[str], done: Done) -> None:
        self.do_all(stage.name, units, done)


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
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"no Ray cluster can be reached at {address!r}: {_first_line(error)}") from None
    try:
        yield workers or max(1, int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes()))
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
