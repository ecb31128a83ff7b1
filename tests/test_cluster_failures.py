"""Runs on a Ray cluster of several nodes whose workers, nodes, disk and driver fail: they come to the same bytes as an undisturbed run.

The nodes are real, on this machine, with one CPU each, so that every worker computes on one thread, as the undisturbed run does. Disturbances
wait for work to be under way, and nothing depends on how long anything takes. What was disturbed is finished in this process where a second set
of workers, each of which takes seconds to start, would show nothing that the first does not.
"""

import _thread
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import ray
from ray.cluster_utils import Cluster
from small_run import World, artifacts, forked, run_pipeline

from influence import artifacts as artifact_files
from influence import sequences
from influence.config import Config, ResourcesConfig, load_config
from influence.run import Run
from jobs.driver import run_all
from jobs.executors import OnRay, RayWorkers, StageWork
from jobs.scheduler import Failure, Rules
from jobs.stages import STAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Ray's notice of what a later version will do with accelerators
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves the log files of its processes open
]

SHARDS = {"sequences_per_shard": 3}
"""Some twenty units of rows, and as many groups as there can be in a fit."""

PATIENCE = 300


@pytest.fixture(scope="module")
def cluster(forks: Path) -> Iterator[Cluster]:
    """A head without CPUs, two nodes with one each, and a connection to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process. Never to be changed."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run_pipeline(world.settings(directory, data=SHARDS))
    return directory


def settings(world: World, directory: Path, cluster: Cluster) -> dict[str, Any]:
    return world.settings(directory, data=SHARDS, resources={"workers": 2, "address": cluster.address})


def configured(values: dict[str, Any]) -> Config:
    return load_config(None, {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()})


def workers_at_work(forks: Path, *nodes: Any) -> list[int]:
    """The processes of workers on these nodes that do a unit just now."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    workers = [int(path.name.partition("-")[2]) for raylet in raylets for path in forks.glob(f"{raylet}-*")]
    return [worker for worker in workers if title(worker).startswith("ray::Worker.do")]


def title(process: int) -> str:
    """What the process says it is; nothing when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.002)
    return found


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Acts in another thread, and holds that it came to act before the end. A failure to act ends what is under way."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
            _thread.interrupt_main()

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not failures:
            raise
    thread.join(timeout=10)
    assert not thread.is_alive(), "the run ended before it was disturbed"
    assert not failures, failures


def assert_undisturbed(directory: Path, undisturbed: Path) -> None:
    assert artifacts(directory) == artifacts(undisturbed)


def begun(undisturbed: Path, directory: Path) -> Run:
    """A run whose next stage is the covariances."""
    shutil.copytree(undisturbed, directory)
    for stage in STAGES[3:]:
        shutil.rmtree(directory / stage.name)
    return Run(directory)


def end_here(world: World, directory: Path) -> None:
    run_pipeline(world.settings(directory, data=SHARDS))


def test_cluster_does_the_work_and_the_driver_reads_neither_tokens_nor_sums_nor_rows(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("read by the driver")

    monkeypatch.setattr(sequences, "_read_table", refused)
    monkeypatch.setattr(artifact_files, "safe_open", refused)
    monkeypatch.setattr("numpy.load", refused)
    run = run_all(configured(settings(world, tmp_path / "run", cluster)))
    monkeypatch.undo()
    assert not vars(run).keys() & {"language_model", "store", "eigenvectors", "factors", "rows", "fitted"}
    assert_undisturbed(tmp_path / "run", undisturbed)
    progress = run.directory.read_progress()
    assert progress is not None
    last = {"stage": "fidelity", "done": 1, "total": 1, "retries": 0, "failures": []}
    assert {key: progress[key] for key in last} == last
    assert progress["workers"] in (1, 2)
    assert {"units_per_second", "seconds_left", "updated"} <= progress.keys()


def test_killed_workers_are_replaced(world: World, forks: Path, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """All of them, at their first units of a pass, which take long enough: the model is loaded."""

    def kill_all() -> None:
        until(lambda: (tmp_path / "run/layers/all").exists())
        for process in until(lambda: workers_at_work(forks, *cluster.worker_nodes)):
            os.kill(process, signal.SIGKILL)

    with meanwhile(kill_all):
        run_all(configured(settings(world, tmp_path / "run", cluster)))
    assert_undisturbed(tmp_path / "run", undisturbed)


def test_run_goes_on_without_a_removed_node(world: World, forks: Path, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """Whichever of the two is seen at work first."""

    def remove() -> None:
        until(lambda: (tmp_path / "run/layers/all").exists())
        leaving = until(lambda: next((node for node in cluster.worker_nodes if workers_at_work(forks, node)), None))
        cluster.remove_node(leaving, allow_graceful=False)

    with meanwhile(remove):
        run_all(configured(settings(world, tmp_path / "run", cluster)))
    cluster.add_node(num_cpus=1)
    assert_undisturbed(tmp_path / "run", undisturbed)


def test_workers_that_no_node_has_room_for_begin_when_one_joins(cluster: Cluster, tmp_path: Path) -> None:
    class Touch:  # here, so that it is sent by value
        def do(self, step: str, unit: str) -> None:
            (tmp_path / f"{step}-{unit}").touch()

    resources = ResourcesConfig(workers=2, address=cluster.address, gpus_per_worker=1)
    finished: list[str] = []
    failures: list[Failure] = []
    with closing(RayWorkers(resources, 2, Touch())) as workers, ThreadPoolExecutor(1) as pool:
        step = pool.submit(workers.do_all, "touch", {"a": 1.0, "b": 1.0, "c": 1.0}, finished.append, failures.append)
        until(lambda: len(workers.workers) == 2)  # they were asked for
        assert finished == []
        node = cluster.add_node(num_cpus=1, num_gpus=1)
        try:
            step.result(timeout=PATIENCE)
        finally:
            cluster.remove_node(node)
        assert workers.num_workers == 1  # there is room for one of the two
    assert sorted(finished) == ["a", "b", "c"]
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["touch-a", "touch-b", "touch-c"]


def test_workers_that_cannot_be_started_end_the_step_with_the_reason(cluster: Cluster) -> None:
    def unpickled() -> None:
        raise ModuleNotFoundError("No module named 'jobs'")

    class Missing:
        def __reduce__(self) -> Any:
            return unpickled, ()

        def do(self, step: str, unit: str) -> None:
            """Never called."""

    with (
        closing(RayWorkers(ResourcesConfig(workers=1, address=cluster.address), 1, Missing())) as workers,
        pytest.raises(
            RuntimeError, match=r"^step: no worker \(1 CPUs and 0 GPUs\) can be started: ModuleNotFoundError: No module named 'jobs'"
        ),
    ):
        workers.do_all("step", {"a": 1.0}, lambda unit: None, lambda failure: None)
    assert workers.workers == {}


def test_run_whose_driver_was_killed_goes_on(world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    process = forked(run_pipeline, settings(world, tmp_path / "run", cluster))
    try:
        until(lambda: process.exitcode is not None or any((tmp_path / "run").glob("eigenvalues/part-*")))
        assert process.exitcode is None
    finally:
        process.kill()
        process.join()
    assert not (tmp_path / "run" / "fidelity").exists()
    end_here(world, tmp_path / "run")
    assert_undisturbed(tmp_path / "run", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs the right to mount a file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*"))


def test_run_without_room_stops_with_the_reason_and_goes_on_once_there_is_room(
    world: World, cluster: Cluster, undisturbed: Path, small_disk: Path
) -> None:
    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)

    resize(size_on_disk(undisturbed) // 2)
    with pytest.raises((RuntimeError, OSError), match="No space left on device"):
        run_all(configured(settings(world, small_disk / "run", cluster)))
    done = artifacts(small_disk / "run")
    assert {name: content for name, content in done.items() if ".partial-" not in name}.items() < artifacts(undisturbed).items()
    resize(4 * size_on_disk(undisturbed))
    end_here(world, small_disk / "run")
    assert_undisturbed(small_disk / "run", undisturbed)


def test_unit_of_a_worker_that_hangs_is_taken_over(world: World, forks: Path, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    config = configured(settings(world, tmp_path / "run", cluster))
    run, stage = begun(undisturbed, tmp_path / "run"), STAGES[3]
    sizes = {unit: stage.size(run, unit) for unit in stage.units(run)}
    finished: list[str] = []
    failures: list[Failure] = []
    stopped: list[int] = []

    with closing(OnRay(config, 2, Rules(slow_factor=3, slow_seconds=2))) as executor:

        def stop_one() -> None:
            stopped.append(until(lambda: workers_at_work(forks, *cluster.worker_nodes))[0])
            os.kill(stopped[0], signal.SIGSTOP)

        try:
            with meanwhile(stop_one):
                executor.do(stage, sizes, finished.append, failures.append)
            until(lambda: title(stopped[0]) == "")  # whoever hung was ended
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    assert sorted(finished) == sorted(sizes)
    assert failures == []
    made = artifacts(tmp_path / "run")
    assert made == {
        name: content for name, content in artifacts(undisturbed).items() if Path(name).parts[0] in {s.name for s in STAGES[:4]}
    }


def damage_tokens(shard: Path) -> None:
    """Other bytes where the tokens are: whoever reads the ids alone sees no difference."""
    group = pyarrow.parquet.ParquetFile(shard).metadata.row_group(0)
    chunk = next(column for n in range(group.num_columns) if (column := group.column(n)).path_in_schema.startswith("tokens"))
    content = bytearray(shard.read_bytes())
    start = chunk.data_page_offset
    content[start : start + 16] = bytes(255 - byte for byte in content[start : start + 16])
    shard.write_bytes(content)


def test_unit_that_always_fails_stops_the_run_with_its_reason_and_the_rest_is_kept(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    config = configured(settings(world, tmp_path / "run", cluster))
    run = begun(undisturbed, tmp_path / "run")
    shard = sorted((tmp_path / "run/sequences/all").glob("part-*.parquet"))[-1]
    shutil.copy(shard, tmp_path / "whole")
    damage_tokens(shard)
    unit = sorted(STAGES[3].units(run))[-1]
    with pytest.raises(RuntimeError, match=rf"^covariances/{unit} failed 3 times; last: \w+: .+"):
        run_all(config)
    progress = json.loads((tmp_path / "run/progress.json").read_text())
    assert [failure["attempt"] for failure in progress["failures"] if failure["unit"] == unit] == [1, 2, 3]
    assert progress["retries"] == len(progress["failures"])
    assert progress["tokens_per_second"] > 0
    kept = sorted((tmp_path / "run/covariances").glob("part-*"))
    assert kept
    times = [path.stat().st_mtime_ns for path in kept]
    shutil.copy(tmp_path / "whole", shard)
    end_here(world, tmp_path / "run")
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert_undisturbed(tmp_path / "run", undisturbed)


def test_worker_holds_no_model_where_none_is_needed(world: World, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    work = StageWork(configured(world.settings(tmp_path / "run", data=SHARDS)))
    for step, unit, holds in (("rows", "part-00000", True), ("eigenbases", "output:transformer.h.0.mlp.c_fc", False)):
        shutil.rmtree(Run(tmp_path / "run").directory.unit_path(step, unit))
        work.do(step, unit)
        assert ("language_model" in vars(work.run)) == holds
    assert_undisturbed(tmp_path / "run", undisturbed)
