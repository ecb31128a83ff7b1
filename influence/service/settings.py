"""What a service serves, where it keeps its state, and what it allows."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from influence.config import is_url
from influence.errors import RequestError
from influence.stored_run import run_directory

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a run may be called in an address. No such name leaves a directory."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, one user and all of them together may ask for."""

    body_bytes: int = 2**20
    head_seconds: float = 10.0  # for the head of a request to arrive; otherwise the connection is closed
    body_seconds: float = 30.0  # for a body to arrive
    unread_seconds: float = 60.0  # for an answer to be taken by its client; otherwise the connection is closed
    k: int = 100
    candidates: int = 2_000
    query_tokens: int = 4_096  # of prompt and completion together, and of the contrast
    refine_steps: int = 100
    refine_sequences: int = 100_000
    request_seconds: float = 60.0  # after which a request that waits for its answer gives up, and its work stops
    job_seconds: float = 3_600.0  # after which an accepted query is stopped
    requests: int = 256  # under way at once, event streams aside
    streams: int = 16  # event streams of one user at once
    stream_seconds: float = 600.0  # after which an event stream ends; whoever listens asks again
    waiting: int = 64  # quick queries that wait for their answers
    queued: int = 200  # accepted queries that are not finished
    queued_per_user: int = 50
    kept: int = 10_000  # finished queries of one user whose results are kept; the oldest are forgotten
    batch: int = 8  # quick queries answered together: more share little, and each waits for all
    job_batch: int = 32  # accepted queries answered together: one scan is for all of them
    batch_seconds: float = 0.01  # how long a batch waits for one more of those under way before, and 2% of what it took, up to 0.1


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Everything that a service is made from; plain values, so that replicas can be sent it."""

    runs: dict[str, str] = field(default_factory=dict)  # by name; loaded at start, in this order, as far as memory allows
    runs_dir: Path | None = None  # every run directory in it is served too
    state_dir: Path
    tokens_file: Path | None = None
    loopback: bool = True  # it listens to this machine only
    log_queries: bool = False  # whether the audit log holds what was asked
    memory_budget: int = 16 * 2**30  # for models, factors and sketches of loaded runs
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def named_runs(paths: Sequence[Path | str]) -> dict[str, str]:
    """Runs by the names of their directories. Raises RequestError for one that is no run, cannot be named in an address, or comes twice."""
    named: dict[str, str] = {}
    for path in paths:
        place = str(path) if is_url(str(path)) else str(Path(path).resolve())
        name = run_directory(place).name
        if not RUN_NAME.fullmatch(name):
            raise RequestError(f"{path} cannot be served: a run's directory is its name, of letters, digits and ._-, not {name!r}")
        if name in named:
            raise RequestError(f"{path} and {named[name]} are both called {name}: rename one")
        run_directory(path).describe()
        named[name] = place
    return named


def state_directory(runs: Sequence[Path | str], runs_dir: Path | None) -> Path:
    """Where a service of these runs keeps its queries when nothing else is said: beside the runs."""
    if runs_dir is None and is_url(str(runs[0])):
        raise RequestError(f"{runs[0]} is in an object store: say with --state-dir where this service keeps its queries")
    return (runs_dir if runs_dir is not None else Path(runs[0]).resolve().parent) / ".service"
