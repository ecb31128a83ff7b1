"""Runs as jobs on a real Ray head with its jobs API and token authentication: submitted, followed, stopped, gone on with, and asked."""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest
from object_server import BUCKET, object_server
from ray_head import Head, ray_head
from small_run import Influence, Outcome, World, artifacts, command, finish, run_pipeline, write_yaml

from influence import lease
from influence.object_store import ObjectStore
from influence.run import Run
from influence.run_directory import STAGES
from influence.stored_run import StoredRunDirectory
from jobs import cli
from jobs.progress import progress_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def head(forks: Path) -> Iterator[Head]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def somebody() -> Iterator[ProcessPoolExecutor]:
    """A process that types commands. Not this one: Ray reads once in a process who may use a cluster."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process


@pytest.fixture
def cluster(head: Head, somebody: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> Influence:
    """The command line, by somebody who may use the cluster."""
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)

    def call(*words: object) -> Outcome:
        return somebody.submit(typed, [str(word) for word in words], dict(os.environ), Path.cwd()).result(timeout=900)

    return call


def typed(words: list[str], environment: dict[str, str], directory: Path) -> Outcome:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = ["influence", *words]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main()
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def one_thread_each(**resources: object) -> dict[str, object]:
    """Two workers on two CPUs: a model on one thread gives the bytes of a run on one thread."""
    return {"workers": 2, "gpus_per_worker": 0, "memory_budget": "1GiB", **resources}


def test_submitted_run_is_the_one_of_this_machine_and_answers(
    cluster: Influence, world: World, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and data travel; the run directory is a place that the cluster sees."""
    moved, run = world.copy(tmp_path / "here"), tmp_path / "shared" / "run"
    monkeypatch.chdir(tmp_path / "here")
    settings = world.settings(run, model={"name": "./model"}, data={"files": "train.jsonl"}, resources=one_thread_each())
    done = cluster("submit", write_yaml(tmp_path / "config.yaml", settings), "--name", "whole", "--wait", "--json").json
    assert (done["job"], done["state"], done["run"]) == ("whole", "succeeded", str(run))
    assert artifacts(run) == artifacts(finished)
    assert "whole" in [job["job"] for job in cluster("jobs", "list", "--json").json["jobs"]]
    told = cluster("jobs", "status", "whole", "--json").json
    assert (told["state"], told["progress"]["stage"], told["message"]) == ("succeeded", STAGES[-1], None)
    logs = cluster("jobs", "logs", "whole", "--json").json["logs"]
    assert f"{run}: finished" in logs
    assert not [line for line in logs if line.startswith("influence-progress")]
    found = Run(run, model=str(moved.model)).query("Lisbon lies on", " the Tagus.", k=3)
    expected = Run(finished).query("Lisbon lies on", " the Tagus.", k=3)
    assert [(one.id, one.score) for one in found.sequences] == [(one.id, one.score) for one in expected.sequences]


def test_job_stopped_in_the_middle_and_submitted_again_ends_with_the_same_bytes(
    cluster: Influence, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its run directory in an object store, which the job and this machine reach; and a second job on it is refused."""
    few_each = {"sequences_per_shard": 8}  # so many units that the job can be met in the middle
    undisturbed = run_pipeline(world.settings(tmp_path / "undisturbed", data=few_each)).directory.path
    monkeypatch.setattr(lease, "RENEWED_EVERY", 1000.0)
    with object_server(tmp_path / "log") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "here"))
        url = f"s3://{BUCKET}/run"
        config = write_yaml(tmp_path / "config.yaml", world.settings(url, data=few_each, resources=one_thread_each()))
        passed = [word for name, value in server.environment.items() for word in ("--env", f"{name}={value}")]
        with StoredRunDirectory(url).exclusive():  # the job waits for a sign of life, and meanwhile works on nothing
            first = cluster("submit", config, "--name", "first", "--json", *passed, "--env", f"INFLUENCE_CACHE={tmp_path / 'a'}").json
            assert first["state"] in ("pending", "running")
            cluster("submit", config, *passed).says(f"the job 'first' is working on {url} already")
        wait_until_stored(ObjectStore(url), "covariances")
        server.halt()  # and with it the job, in the middle
        assert cluster("jobs", "stop", "first", "--json").json["state"] == "stopped"
        server.go_on()
        assert not ObjectStore(url).names("fidelity")
        second = cluster("submit", config, "--json", "--wait", *passed, "--env", f"INFLUENCE_CACHE={tmp_path / 'b'}").json
        assert second["state"] == "succeeded"
        directory = StoredRunDirectory(url)
        for stage in STAGES:
            directory.bring(stage, directory.unit_names(stage))
        assert artifacts(directory.path) == artifacts(undisturbed)
        assert cluster("status", url, "--json").json["finished"]


def wait_until_stored(store: ObjectStore, stage: str) -> None:
    deadline = time.monotonic() + 600
    while not store.names(stage):
        assert time.monotonic() < deadline, f"no unit of {stage} appeared"
        time.sleep(0.1)


def test_job_that_fails_says_why_and_ends_with_status_one(cluster: Influence, world: World, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run", model={"name": "/nowhere/model"}))
    failed = cluster("submit", config, "--name", "wrong", "--follow")
    assert (failed.status, failed.out) == (1, "")
    reason = "there is no model directory at /nowhere/model"
    assert f"wrong: failed: {reason}" in failed.err.splitlines()[-1]
    assert "error: " + reason in failed.err
    assert reason in cluster("jobs", "status", "wrong", "--json").json["message"]
    again = cluster("submit", config, "--name", "wrong")
    assert again == Outcome(2, "", "error: the cluster had a job 'wrong' already (failed): take another --name, or none\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "CONFIG", "--name", "a/b"], "--name: expected letters, digits and ._-, at most 100 of them, got 'a/b'"),
        (["submit", "CONFIG", "--until", "nothing"], "--until: there is no stage 'nothing'"),
        (["submit", "CONFIG", "--out", "runs/mine"], "run.dir is runs/mine, a directory of this machine"),
        (["submit", "CONFIG", "--env", "NAME"], "--env: expected NAME=VALUE, got 'NAME'"),
        (["submit", "CONFIG", "--address", "http://127.0.0.1:1"], "no jobs API of Ray can be reached at http://127.0.0.1:1"),
        (["jobs", "status", "nobody"], "has no job 'nobody'"),
        (["jobs", "stop", "nobody"], "has no job 'nobody'"),
        (["jobs", "logs", "nobody", "--follow"], "has no job 'nobody'"),
        (["jobs", "status", "a/b"], "has no job 'a/b'"),
    ],
)
def test_wrong_request_is_one_line(words: list[str], message: str, cluster: Influence, world: World, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run"))
    outcome = cluster(*[config if word == "CONFIG" else word for word in words])
    outcome.says(message)
    assert outcome.err.count("\n") == 1


def test_cluster_with_tokens_refuses_who_has_none_or_another(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    status, out, err = finish(command("jobs", "list", "--address", head.address))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"the cluster at {head.address} wants a token: set RAY_AUTH_MODE=token" in err
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    status, out, err = finish(command("jobs", "list", "--address", head.address))
    assert (status, out, err) == (2, "", f"error: the cluster at {head.address} refuses this token: it has another one\n")


def test_progress_is_told_with_what_there_is_of_it() -> None:
    assert list(progress_lines({})) == []
    whole = {
        "stage": "rows",
        "done": 3,
        "total": 20,
        "units_per_second": 0.5,
        "tokens_per_second": 1234.5,
        "seconds_left": 7000,
        "retries": 2,
        "workers": 4,
        "failures": [{"unit": "rows/part-00001", "attempt": 1, "reason": "the node went away"}],
    }
    assert list(progress_lines(whole)) == [
        "rows, 3/20 units, 0.5 units/s, 1,234 tokens/s, 1 h 57 min left, 4 workers, 2 retries",
        "failed: rows/part-00001, attempt 1: the node went away",
    ]
