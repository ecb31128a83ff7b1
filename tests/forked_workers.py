"""Ray's workers forked from the process from which `small_run.forked` forks, which has imported what they need: some ten seconds of each.

Ray starts a worker by a script that gets the worker's command line as its arguments. This file is that script: it hands arguments and environment
to the process to fork from, and the fork goes on with Ray's own entry point.
"""

import json
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLACE = "FORKED_WORKERS"
"""The variable that names the directory of the socket and of a file `RAYLET-WORKER` for each fork, named for two processes."""

USE_FORKS = f"import ray._private.ray_constants as constants; constants.SETUP_WORKER_FILENAME = {__file__!r}"
"""What a process that starts nodes runs before, for their workers to be forks."""


@contextmanager
def forked_workers() -> Iterator[Path]:
    """The directory, for as long as the context lasts: workers of nodes that this process starts meanwhile are forks."""
    import pytest
    from ray._private import ray_constants
    from small_run import forked

    # a short name, for that of the socket; a worker that is just starting may still write there at the end
    with tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp", ignore_cleanup_errors=True) as name, pytest.MonkeyPatch.context() as patch:
        place = Path(name)
        process = forked(_fork_for_all, place)
        try:
            while not (place / "ready").exists():
                assert process.exitcode is None
                time.sleep(0.01)
            patch.setenv(PLACE, name)
            patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", __file__)
            yield place
        finally:
            process.kill()
            process.join()


def _fork_for_all(place: Path) -> None:
    """Forks for everyone who asks, and returns in a fork alone.

    A process of its own and no thread: the one that waits in Ray for its first workers lets no thread run.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        listener.listen(64)
        (place / "ready").touch()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as content:
                try:
                    asked = json.load(content)
                except ValueError:  # who asked was ended meanwhile, with its node
                    continue
            if os.fork() == 0:
                break
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _become(asked)


def _become(asked: Mapping[str, Any]) -> None:
    """Goes on as the process that was asked for."""
    os.setpgid(0, 0)  # a worker's processes are a group of their own, which Ray ends
    os.chdir(asked["directory"])
    if (own := asked["environment"].get("PYTHONPATH", "")) != os.environ.get("PYTHONPATH", ""):  # it brings modules of its own
        sys.path[:0] = [entry for entry in own.split(":") if entry]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("ekfac", "indexing", "influence", "jobs")]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(asked["environment"])
    Path(os.environ[PLACE], f"{os.environ['RAY_RAYLET_PID']}-{os.getpid()}").touch()
    sys.argv[:] = asked["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _ask(arguments: list[str]) -> None:
    """What Ray runs, as its setup_worker.py is: options for that, and the worker's command line."""
    options = dict(word.split("=", 1) for word in arguments if word.startswith(("--serialized-runtime-env-context=", "--language=")))
    context = json.loads(options.get("--serialized-runtime-env-context") or "{}")
    match context.get("command_prefix") or []:
        case []:
            pass
        case ["cd", directory, "&&"]:
            os.chdir(directory)
        case other:
            raise NotImplementedError(f"a fork is not started by {other}")
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))  # what is not set is nothing
    words = [word for word in arguments if word.partition("=")[0] not in options]
    asked = {"arguments": words, "environment": dict(os.environ), "directory": str(Path.cwd())}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[PLACE] + "/socket")
        server.sendall(json.dumps(asked).encode())


if __name__ == "__main__":
    _ask(sys.argv[1:])
