"""What people see while work goes on: bars with throughput and time left in a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PROGRESS_PREFIX = "influence-progress: "
"""Before a line of JSON in what a job on a cluster prints: the content of progress.json."""


class Bar(Protocol):
    def advance(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are done; `note` says more, such as the throughput."""


def error_console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A bar, or lines at most every five seconds, for one piece of work."""
    console = error_console()
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            yield _TerminalBar(progress, title)
    else:
        lines = _Lines(title)
        yield lines
        lines.finish()


class _TerminalBar:
    def __init__(self, progress: Progress, title: str) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=None, note="")

    def advance(self, done: int, total: int, note: str = "") -> None:
        self.progress.update(self.task, completed=done, total=total, note=note)


class _Lines:
    def __init__(self, title: str) -> None:
        self.title, self.start = title, time.monotonic()
        self.last_line = self.start
        self.state = ""

    def advance(self, done: int, total: int, note: str = "") -> None:
        self.state = f"{done}/{total}" + (f", {note}" if note else "")
        now = time.monotonic()
        if now - self.last_line >= 5 and done < total:
            self.last_line = now
            left = f", {(now - self.start) / done * (total - done):.0f} s left" if done else ""
            say(f"{self.title}: {self.state}{left}")

    def finish(self) -> None:
        say(f"{self.title}: {self.state or 'done'} ({time.monotonic() - self.start:.1f} s)")


def say(line: str) -> None:
    """One line for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


def progress_lines(progress: Mapping[str, Any]) -> Iterator[str]:
    """What progress.json tells of work under way, for people: how far it is, and then what went wrong. Whatever it lacks is left out."""
    done, total = progress.get("done"), progress.get("total")
    parts = [str(progress["stage"])] if "stage" in progress else []
    parts += [f"{done}/{total} units"] if done is not None and total is not None else []
    parts += [f"{progress['units_per_second']:.3g} units/s"] if progress.get("units_per_second") is not None else []
    parts += [f"{progress['tokens_per_second']:,.0f} tokens/s"] if progress.get("tokens_per_second") is not None else []
    parts += [f"{duration(progress['seconds_left'])} left"] if progress.get("seconds_left") is not None else []
    parts += [f"{progress['workers']} workers"] if progress.get("workers") is not None else []
    parts += [f"{progress['retries']} retries"] if progress.get("retries") else []
    parts += [f"{duration(time.time() - progress['updated'])} ago"] if progress.get("updated") is not None else []
    if parts:
        yield ", ".join(parts)
    for failure in (progress.get("failures") or [])[-SHOWN_FAILURES:]:
        attempt = f", attempt {failure['attempt']}" if "attempt" in failure else ""
        yield f"failed: {failure.get('unit', 'a unit')}{attempt}: {failure.get('reason', 'no reason')}"


SHOWN_FAILURES = 5


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
