"""Ray's workers forked from one process that has imported what they need, which takes each of them some ten seconds, and does nothing else.

Ray starts a worker by a script that gets the worker's command line as its arguments. This file is that script: it hands arguments, environment
and output to the process to fork from, which is this file too, and the fork goes on with Ray's own entry point.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLACE = "FORKED_WORKERS"
"""The variable that names the directory of the socket and of a file `RAYLET-WORKER` for each fork, named for two processes."""

PRELOADED = ("jobs.driver", "influence.service", "transformers.models.gpt2.modeling_gpt2")
"""Not Ray itself, which reads the variables of a worker's environment when it is imported."""

USE_FORKS = f"import ray._private.ray_constants as constants; constants.SETUP_WORKER_FILENAME = {__file__!r}"
"""What a process that starts nodes runs before, for their workers to be forks."""


@contextmanager
def forked_workers() -> Iterator[Path]:
    """The directory, for as long as the context lasts: workers of nodes that this process starts meanwhile are forks."""
    import tempfile

    import pytest
    from ray._private import ray_constants

    with (
        tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp") as place,
        pytest.MonkeyPatch.context() as patch,
    ):  # short, for the socket's name
        patch.setenv(PLACE, place)
        patch.setenv("OMP_NUM_THREADS", "1")
        process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, start_new_session=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", __file__)
            yield Path(place)
        finally:
            process.kill()
            process.communicate()


def _serve() -> None:
    """Forks for everyone who asks, and returns in a fork alone."""
    for name in PRELOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[PLACE] + "/socket")
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
                asked = json.loads(connection.makefile("rb").read())
            if os.fork() == 0:
                break
            for one in descriptors:
                os.close(one)
    _become(asked, descriptors)


def _become(asked: Mapping[str, Any], descriptors: list[int]) -> None:
    """Goes on as the process that was asked for."""
    import runpy

    os.setpgid(0, 0)  # a worker's processes are a group of their own, which Ray ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, one in enumerate(descriptors):
        os.dup2(one, number)
        os.close(one)
    os.chdir(asked["directory"])
    if (own := asked["environment"].get("PYTHONPATH", "")) != os.environ.get("PYTHONPATH", ""):  # it brings modules of its own
        sys.path[1:1] = [entry for entry in own.split(":") if entry]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("ekfac", "indexing", "influence", "jobs")]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(asked["environment"])
    Path(os.environ[PLACE], f"{os.environ['RAY_RAYLET_PID']}-{os.getpid()}").touch()
    sys.argv[:] = asked["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _start(arguments: list[str]) -> None:
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
        socket.send_fds(server, [b"\0"], [0, 1, 2])
        server.sendall(json.dumps(asked).encode())


if __name__ == "__main__":
    _start(sys.argv[1:]) if len(sys.argv) > 1 else _serve()
