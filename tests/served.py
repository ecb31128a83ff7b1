"""Real servers over real runs: `influence serve` in a process of its own, or the application in a thread of this one where limits are to be set."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from small_run import forked

from influence.service import ServiceSettings, create_app
from influence.service.server import configuration
from jobs import cli

WAIT_SECONDS = 300
"""Longer than anything takes on a machine ten times slower: only what never comes is waited for as long."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that listens, and its log."""

    url: str
    log: Path
    process: BaseProcess

    def stop(self) -> int | None:
        """Asks it to stop; its exit status."""
        self.process.terminate()
        self.process.join(WAIT_SECONDS)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(WAIT_SECONDS)


@contextmanager
def serving(log: Path, *arguments: object, environment: Mapping[str, str] | None = None, ready: bool = True) -> Iterator[Served]:
    """`influence serve` with these arguments on a free port, until the context ends."""
    log.write_bytes(b"")  # what an earlier server said is not of this one
    process = forked(_serve, ["serve", *map(str, arguments), "--port", "0"], dict(environment or {}), log)
    try:
        address = until(lambda: _address(log, process))
        if ready:
            until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        yield Served(url=address, log=log, process=process)
    finally:
        process.kill()
        process.join()


def _serve(words: list[str], environment: Mapping[str, str], log: Path) -> None:
    """`influence WORDS` in a process of its own: what it says goes to the log, nothing to standard output."""
    with log.open("wb") as stream, Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    sys.argv[:] = ["influence", *words]
    cli.main()


def _address(log: Path, process: BaseProcess) -> str | None:
    text = log.read_text()
    assert process.exitcode is None, text
    lines = [line for line in text.splitlines() if line.startswith("serving ")]
    return lines[0].rpartition(" at ")[2].rstrip("/") if lines else None


def until(condition: Any) -> Any:
    """What the condition gives, as soon as it gives something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


@contextmanager
def application(settings: ServiceSettings) -> Iterator[str]:
    """The address of the application with these settings, in a thread; its runs are loaded."""
    with running(create_app(settings)) as url:
        yield url


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of this application, in a thread; its runs are loaded."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(configuration(app))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started and app.state.service.engine.ready)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        app.state.service.engine.drain()
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def without_times(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result object without what differs between two who ask: id, name of the run, seconds."""
    provenance = {key: value for key, value in result["provenance"].items() if key not in ("run", "seconds", "stages")}
    return {**{key: value for key, value in result.items() if key != "id"}, "provenance": provenance}
