"""A Ray head of its own, with its jobs API and token authentication, in a process group that a test ends."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from forked_workers import USE_FORKS


@dataclass(frozen=True, kw_only=True)
class Head:
    address: str  # of its jobs API
    token: str

    @property
    def environment(self) -> Mapping[str, str]:
        """What lets a client in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_API_SERVER_ADDRESS": self.address}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def ray_head(num_cpus: int = 2, environment: Mapping[str, str] | None = None) -> Iterator[Head]:
    """The head, for as long as the context lasts, within that of `forked_workers`.

    Nothing of it is left: `ray stop` would end every Ray of the machine, so its group is ended.
    """
    gcs, dashboard, client, agent, grpc = free_ports(5)
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the names of its sockets
    head = Head(address=f"http://127.0.0.1:{dashboard}", token=secrets.token_hex(32))
    words = [
        *(sys.executable, "-c", f"{USE_FORKS}; from ray.scripts.scripts import main; main()"),
        *("start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}", f"--temp-dir={directory}"),
        *(f"--num-cpus={num_cpus}", "--object-store-memory=100000000"),
    ]
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (directory / "out").open("w") as out:
        process = subprocess.Popen(
            words, env={**os.environ, **own, **(environment or {})}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_it_answers(head, process, directory / "out")
        yield head
    finally:
        _end_group(process)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_it_answers(head: Head, process: "subprocess.Popen[bytes]", out: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            urlopen(head.address + "/api/version", timeout=5)
        except HTTPError:  # it wants a token
            return
        except (URLError, OSError):
            pass
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.5)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):  # it does not end of itself in half a minute, when jobs ran
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.poll()
