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
from served import until
from test_service import QUESTION, ask, assert_same, finished_query

from influence.run import open_run


@pytest.mark.slow
def test_replicas_answer_as_one_and_share_the_queue(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "runs" / "small")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = ["serve", str(run), "--replicas", "2", "--port", str(port), "--state-dir", str(tmp_path / "state")]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *words], stdout=stream, stderr=stream, env=dict(os.environ))
    try:
        until(lambda: process.poll() is not None or "serving small at" in log.read_text())
        assert process.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http:
            until(lambda: all(http.get("/readyz").status_code == 200 for _ in range(10)))
            with ThreadPoolExecutor(6) as threads:
                answers = list(threads.map(lambda k: ask(http, k=k).json(), range(1, 7)))
            for k, answer in enumerate(answers, 1):
                assert_same(answer, open_run(run).query(*QUESTION.values(), k=k).to_json())
            names = [ask(http, exact=True, k=k).json()["id"] for k in range(1, 5)]
            assert {finished_query(http, name)["state"] for name in names} == {"done"}
            assert ask(http, "other").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
