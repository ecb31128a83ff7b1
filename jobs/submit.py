"""`influence submit` and `influence jobs`: runs as Ray jobs on a cluster, and what became of them."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from influence.config import read_config
from influence.errors import RequestError
from jobs.options import Debug, Json
from jobs.progress import PROGRESS_PREFIX, duration, progress_lines, say
from jobs.stages import STAGES

if TYPE_CHECKING:
    from jobs.ray_jobs import Job, RayJobs

POLL_SECONDS = 5.0
UNREACHABLE_POLLS = 20

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="the cluster's jobs API, such as http://head:8265; left out, RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or port 8265 of this machine",
    ),
]
Identifier = Annotated[str, typer.Argument(metavar="JOB", help="the job's name, as `jobs list` shows it")]

jobs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Runs that were submitted to a cluster: list, status, logs, stop.")


def submit(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration; options given beside it win", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", help="what the job is called; made from the run directory when left out")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="stop after this stage, such as factors")] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option("--pip", metavar="REQUIREMENT", help="what Ray installs for this job, on top of what the nodes have; may be repeated"),
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="environment variable of the job; may be repeated. Whoever sees the job sees it"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="show the progress until the job is over; exit status 0 if it succeeded")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="show what the job prints until it is over; exit status as with --wait")] = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """The same as `run`, as a Ray job on a cluster: this version of the code, the configuration and small local files travel with it.

    --address is the cluster's jobs API. A run that a job left unfinished is gone on with by submitting it again.
    """
    from jobs.ray_jobs import Extras, RayJobs, jobs_address

    settings = read_config(config, overrides)
    if until is not None and until not in (stages := [stage.name for stage in STAGES]):
        raise RequestError(f"--until: there is no stage {until!r}; there are: {', '.join(stages)}")
    extras = Extras(until=until, pip=tuple(pip or ()), environment=dict(_variable(text) for text in environment or ()))
    cluster = RayJobs(jobs_address(settings.resources.address))
    job = cluster.submit(settings, name, extras)
    say(f"submitted {job.id} to {cluster.address}; the run is {job.run}")
    say(f"`influence jobs status {job.id}` tells how far it is, `influence jobs stop {job.id}` ends it")
    if wait or follow:
        job = _to_the_end(cluster, job, follow)
    if as_json:
        print(json.dumps({"address": cluster.address, **job.to_json()}, ensure_ascii=False))
    elif not job.is_over:
        print(job.id)
    if wait or follow:
        _leave_with(job)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.replace("_", "a").isalnum():
        raise RequestError(f"--env: expected NAME=VALUE, got {text!r}")
    return name, value


@jobs.command("list")
def list_jobs(address: Address = None, as_json: Json = False, debug: Debug = False) -> None:
    """Runs that were submitted to the cluster, the latest first."""
    found = _cluster(address).jobs()
    if as_json:
        print(json.dumps({"jobs": [job.to_json() for job in found]}, ensure_ascii=False))
        return
    table = Table("job", "state", "started", "took", "run")
    for job in found:
        table.add_row(job.id, job.state, *_times(job), job.run or "")
    Console(markup=False, highlight=False, soft_wrap=True).print(table)


@jobs.command()
def status(job: Identifier, address: Address = None, as_json: Json = False, debug: Debug = False) -> None:
    """How far a job is: stage, units, throughput, time left, failures; and why it failed."""
    found = _cluster(address).job(job)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        print("\n".join(_lines_about(found)))


@jobs.command()
def logs(
    job: Identifier,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job is over")] = False,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a job printed."""
    cluster = _cluster(address)
    if follow:
        if as_json:
            raise RequestError("--json prints one object, --follow goes on: take one of them")
        asyncio.run(_print_lines(cluster, job))
        return
    lines = [line for line in cluster.logs(job).splitlines() if not line.startswith(PROGRESS_PREFIX)]
    print(json.dumps({"job": job, "logs": lines}, ensure_ascii=False) if as_json else "\n".join(lines))


@jobs.command()
def stop(job: Identifier, address: Address = None, as_json: Json = False, debug: Debug = False) -> None:
    """End a job. What it has done is kept: the run goes on from there when it is submitted again."""
    found = _cluster(address).stop(job)
    print(json.dumps(found.to_json(), ensure_ascii=False) if as_json else f"{found.id}: {found.state}")


def _cluster(address: str | None) -> "RayJobs":
    from jobs.ray_jobs import RayJobs, jobs_address

    return RayJobs(jobs_address(address))


async def _print_lines(cluster: "RayJobs", job: str) -> None:
    async for line in cluster.follow(job):
        if not line.startswith(PROGRESS_PREFIX):
            print(line, flush=True)


def _to_the_end(cluster: "RayJobs", job: "Job", follow: bool) -> "Job":
    """The job once it is over; until then its progress, or what it prints, on standard error."""
    try:
        if follow:
            asyncio.run(_say_lines(cluster, job.id))
        last: list[str] = []
        while not (job := _patiently(cluster, job)).is_over:
            lines = list(_progress_of(job))
            for line in lines if lines != last else ():
                say(line)
            last = lines
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        say(f"the job goes on; `influence jobs stop {job.id}` ends it")
        raise
    say(f"{job.id}: {job.state}" + (f": {job.message}" if job.message else ""))
    return job


def _patiently(cluster: "RayJobs", job: "Job") -> "Job":
    """The job as of now. A tunnel that is closed for a while ends no waiting."""
    from jobs.ray_jobs import Unreachable

    for _ in range(UNREACHABLE_POLLS):
        try:
            return cluster.job(job.id)
        except Unreachable as error:
            say(f"{error}; the job goes on, and is asked for again")
            time.sleep(10 * POLL_SECONDS)
    return cluster.job(job.id)


async def _say_lines(cluster: "RayJobs", job: str) -> None:
    async for line in cluster.follow(job):
        if not line.startswith(PROGRESS_PREFIX):
            say(line)


def _progress_of(job: "Job") -> Iterator[str]:
    """The job's progress as of when it was told, so that the same one is said once."""
    if job.progress is not None:
        yield from progress_lines(_without(job.progress, "updated"))
    elif job.message:
        yield job.message


def _leave_with(job: "Job") -> None:
    if job.state != "succeeded":
        sys.exit(1)


def _lines_about(job: "Job") -> Iterator[str]:
    started, took = _times(job)
    yield f"{job.id}: {job.state}" + (f", since {started}, {took}" if started else "")
    yield f"run: {job.run}"
    if job.progress:
        yield from progress_lines(job.progress if not job.is_over else _without(job.progress, "seconds_left", "updated"))
    if job.message:
        yield job.message


def _without(progress: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in progress.items() if key not in keys}


def _times(job: "Job") -> tuple[str, str]:
    if job.started is None:
        return "", ""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
    return started, duration((job.ended or time.time()) - job.started)
