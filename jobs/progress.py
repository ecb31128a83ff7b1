"""What people see while work goes on: bars with throughput and time left in a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
