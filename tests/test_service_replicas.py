"""The same application in replicas on Ray Serve."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from forked_workers import USE_FORKS
from served import until
from small_run import Influence
from test_service import QUESTION, ask, assert_same, finished_query

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.run import open_run
from influence.service import ServiceSettings
from jobs.executors import ray_connection


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve gives a proxy seconds to start before it takes another instead, and again: never, where the machine has no time for it."""
    for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, "300")


@pytest.mark.slow
def test_replicas_answer_as_one_and_share_the_queue(forks: Path, patient: None, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "runs" / "small")
    port = free_port()
    words = ["serve", str(run), "--replicas", "2", "--port", str(port), "--state-dir", str(tmp_path / "state")]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{USE_FORKS}; from jobs.cli import main; main()", *words],
            stdout=stream,
            stderr=stream,
            env=dict(os.environ),
        )
    try:
        until(lambda: process.poll() is not None or "serving small at" in log.read_text())
        assert process.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
            until(lambda: all(http.get("/readyz").status_code == 200 for _ in range(10)))
            with ThreadPoolExecutor(6) as threads:
                answers = list(threads.map(lambda k: ask(http, k=k).json(), range(1, 7)))
            for k, answer in enumerate(answers, 1):
                assert_same(answer, open_run(run).query(*QUESTION.values(), k=k).to_json())
            names = [ask(http, exact=True, k=k).json()["id"] for k in range(1, 5)]
            assert {finished_query(http, name)["state"] for name in names} == {"done"}
            assert ask(http, "other").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_what_replicas_cannot_do_is_refused(tmp_path: Path, influence: Influence) -> None:
    influence("serve", "--runs-dir", tmp_path, "--replicas", 1, "--port", 0).says("name the port")
    influence("serve", "--runs-dir", tmp_path, "--replicas", 1, "--address", "auto").says("--address needs --tokens-file")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray Serve itself
def test_where_serve_runs_already_other_applications_stay(forks: Path, patient: None, tmp_path: Path) -> None:
    from ray import serve

    from jobs.replicas import deployed

    class Other:  # here, so that it is sent by value
        """Somebody else's application."""

        def __call__(self) -> str:
            return "still here"

    (tmp_path / "runs").mkdir()
    settings = ServiceSettings(runs_dir=tmp_path / "runs", state_dir=tmp_path / "state")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with ray_connection(ResourcesConfig(workers=1)):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(serve.deployment(Other).bind(), name="other", route_prefix="/other")
        with pytest.raises(RequestError, match="listens on"), deployed(settings, "127.0.0.1", port + 1, 1):
            pass
        with deployed(settings, "127.0.0.1", port, 1):
            until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            with pytest.raises(RequestError, match="an application called influence"), deployed(settings, "127.0.0.1", port, 1):
                pass
            assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        until(lambda: httpx.get(f"{url}/healthz").status_code == 404)
        assert httpx.get(f"{url}/other").text == "still here"
        serve.shutdown()
        with deployed(settings, "127.0.0.1", port, 1):
            assert serve.status().applications.keys() == {"influence"}
        assert not serve.status().applications, "what was started is shut down"
