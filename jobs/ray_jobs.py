"""Runs as Ray jobs: their submission to a cluster, their state, what they print, and their end. Knows Ray's jobs API; knows nothing of terminals.

A job prints its progress as lines of JSON among its log (`jobs/entrypoint.py`): so it can be told by whoever reaches the jobs API, without the
run directory.
"""

import importlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence.config import Config
from influence.errors import RequestError
from jobs.packing import CONFIG_FILE, pack
from jobs.progress import PROGRESS_PREFIX

DEFAULT_ADDRESS = "http://localhost:8265"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PACKAGES = ("ekfac", "indexing", "influence", "jobs")
RUN_KEY = "influence_run"
ENDED = ("stopped", "succeeded", "failed")


class Unreachable(RequestError):
    """Nothing answers where the jobs API should be; perhaps for a moment only."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a job gets besides its configuration."""

    until: str | None = None
    pip: tuple[str, ...] = ()  # requirements that Ray installs for the job, on top of what the nodes have
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as of now."""

    id: str
    state: str  # pending, running, stopped, succeeded or failed
    run: str | None
    started: float | None  # seconds since 1970
    ended: float | None
    message: str | None = None
    progress: Mapping[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        return {"job": self.id, **{key: value for key, value in vars(self).items() if key != "id"}}


def jobs_address(given: str | None) -> str:
    """Where the jobs API is: as given, or as Ray's own commands find it."""
    return given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS


class RayJobs:
    """The jobs of the cluster at an address. Whatever it refuses, and whatever keeps it from answering, is a RequestError."""

    def __init__(self, address: str) -> None:
        self.address = address
        logging.getLogger("ray").setLevel(logging.ERROR)
        with self._asking(), _overruling(address):
            from ray.job_submission import JobSubmissionClient

            for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
                logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # each has a level of its own
            self._client = JobSubmissionClient(address)

    @contextmanager
    def _asking(self, job: str | None = None) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            if str(error).startswith("Authentication failed"):
                raise RequestError(f"the cluster at {self.address} refuses this token: it has another one") from None
            raise RequestError(
                f"the cluster at {self.address} wants a token: set RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN, in the file "
                "RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
            ) from None
        except (OSError, ValueError) as error:
            raise Unreachable(
                f"no jobs API of Ray can be reached at {self.address}: give --address http://HEAD:8265, or open the tunnel to it "
                f"(`ray dashboard cluster.yaml`) ({type(error).__name__})"
            ) from None
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if job is not None and "404" in text:
                raise RequestError(f"the cluster at {self.address} has no job {job!r}; `influence jobs list` names them") from None
            if "404" in text:
                raise RequestError(f"what answers at {self.address} is not Ray's jobs API") from None
            raise RequestError(f"the cluster at {self.address}: {text[:300]}") from None

    def submit(self, config: Config, name: str | None, extras: Extras) -> Job:
        """Submits the run. Raises RequestError for what cannot work on a cluster, a name that is taken, and a run that a job works on already."""
        if name is not None and not NAME.fullmatch(name):
            raise RequestError(f"--name: expected letters, digits and ._-, at most 100 of them, got {name!r}")
        with tempfile.TemporaryDirectory(prefix="influence-job-") as scratch:
            pack(config, Path(scratch))
            for job in self.jobs():
                if job.id == name:
                    raise RequestError(f"the cluster had a job {name!r} already ({job.state}): take another --name, or none")
                if job.run == config.run.dir and not job.is_over:
                    raise RequestError(f"the job {job.id!r} is working on {config.run.dir} already: follow it, or stop it first")
            environment = {
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
                "PYTHONUNBUFFERED": "1",
                **extras.environment,
            }
            runtime: dict[str, Any] = {"working_dir": scratch, "py_modules": _own_packages(), "env_vars": environment}
            if extras.pip:
                runtime["pip"] = list(extras.pip)
            until = f" --until {extras.until}" if extras.until else ""
            with self._asking():
                identifier = self._client.submit_job(
                    entrypoint=f"python -m jobs.entrypoint {CONFIG_FILE}{until}",
                    submission_id=name or f"{_file_name(config.run.dir)}-{secrets.token_hex(3)}",
                    runtime_env=runtime,
                    metadata={RUN_KEY: config.run.dir},
                )
        return self.job(identifier)

    def jobs(self) -> list[Job]:
        """The runs that were submitted as jobs, the latest first; without their progress."""
        with self._asking():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id and RUN_KEY in (details.metadata or {})]
        return sorted(jobs, key=lambda job: -(job.started or 0))

    def job(self, identifier: str) -> Job:
        """The job with its progress, and what went wrong where it failed."""
        self._check_name(identifier)
        with self._asking(identifier):
            details = self._client.get_job_info(identifier)
        return _job(details, self.logs(identifier) if details.start_time else "")

    def logs(self, identifier: str) -> str:
        """What the job printed so far, its progress for machines included."""
        self._check_name(identifier)
        with self._asking(identifier):
            return str(self._client.get_job_logs(identifier))

    async def follow(self, identifier: str) -> AsyncIterator[str]:
        """The lines that the job prints, from the first, until it is over."""
        self._check_name(identifier)
        rest = ""
        with self._asking(identifier):
            self._client.get_job_status(identifier)  # the socket says nothing of a job that is not there
            async for part in self._client.tail_job_logs(identifier):
                *lines, rest = (rest + part).split("\n")
                for line in lines:
                    yield line
        if rest:
            yield rest

    def stop(self, identifier: str, patience_seconds: float = 60) -> Job:
        """Stops the job, and returns it once it is over."""
        self._check_name(identifier)
        with self._asking(identifier):
            self._client.stop_job(identifier)
            deadline = time.monotonic() + patience_seconds
            while not (job := _job(self._client.get_job_info(identifier))).is_over and time.monotonic() < deadline:
                time.sleep(0.2)
        return job

    def _check_name(self, identifier: str) -> None:
        """A name with a slash would be another address."""
        if not NAME.fullmatch(identifier):
            raise RequestError(f"the cluster at {self.address} has no job {identifier!r}; `influence jobs list` names them")


def _job(details: Any, log: str = "") -> Job:
    state = str(getattr(details.status, "value", details.status)).lower()
    return Job(
        id=details.submission_id,
        state=state,
        run=(details.metadata or {}).get(RUN_KEY),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message=_reason(log) or _first_line(details.message) if state == "failed" else details.message if state == "pending" else None,
        progress=_last_progress(log),
    )


def _reason(log: str) -> str | None:
    """The run's own last error."""
    errors = [line for line in log.split("\n") if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else None


def _first_line(message: str | None) -> str | None:
    return message.strip().split("\n")[0] if message else None


def _last_progress(log: str) -> dict[str, Any] | None:
    for line in reversed(log.split("\n")):
        if line.startswith(PROGRESS_PREFIX):
            try:
                progress = json.loads(line.removeprefix(PROGRESS_PREFIX))
            except ValueError:  # a line that is being written
                continue
            return progress if isinstance(progress, dict) else None
    return None


def _own_packages() -> list[str]:
    """The directories of our packages: the cluster runs the version that submits."""
    return [str(Path(str(importlib.import_module(name).__file__)).parent) for name in PACKAGES]


def _file_name(place: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", place.rstrip("/").rpartition("/")[2]).lstrip("._-")[:60] or "run"


@contextmanager
def _overruling(address: str) -> Iterator[None]:
    """Within it, Ray takes this address: it would take that of the environment before one that it is given."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before
