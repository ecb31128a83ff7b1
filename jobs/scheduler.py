"""What to do next: which units wait, which run where and since when, and what to make of those that are done, fail or take too long.

Knows neither Ray nor what a unit does; places, where units are done one at a time, are numbers, and the clock is read by the caller. Every
call is one thing that happened.

* A unit that fails is tried again, at another place where there is one; after a few tries the step stops: nothing is begun any more, and what
  runs may finish.
* A unit that takes far longer than the others is begun once more at a place that would be idle, and whichever copy is done first counts.
* A place where nothing can be started, a few times in a row, is given up.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

REMEMBERED = 1000
"""How many of the latest units tell how long one takes."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When a unit has failed for good, and when it takes too long: more than `slow_factor` times as long as the median for its size, and
    more than `slow_seconds`."""

    tries: int = 3
    slow_factor: float = 3.0
    slow_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A try of a unit, counted from 1, that came to nothing."""

    unit: str
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A unit at work somewhere."""

    unit: str
    since: float


class Schedule:
    """One step's units, largest first, over places that come and go."""

    def __init__(self, sizes: Mapping[str, float], num_places: int, rules: Rules) -> None:
        """`sizes`: how much work each unit is, in any measure that is the same for all."""
        assert all(size > 0 for size in sizes.values())
        self.rules = rules
        self.failure: Failure | None = None
        """The last try of the unit for which the step stops."""
        self.unstarted: str | None = None
        """Why the step stops when work can be started nowhere."""
        self._sizes = sizes
        self._num_left = len(sizes)
        self._waiting = deque(sorted(sizes, key=lambda unit: -sizes[unit]))  # sorting is stable: equal sizes keep their order
        self._idle: dict[int, None] = {}  # in the order in which they became so
        self._running: dict[int, Copy] = {}
        self._places_of: dict[str, list[int]] = {}  # of units at work
        self._failed_at: dict[str, list[int]] = {}  # of units not yet done
        self._starts_left = dict.fromkeys(range(num_places), rules.tries)
        self._seconds_per_size: deque[float] = deque(maxlen=REMEMBERED)

    # what happened

    def joined(self, place: int) -> None:
        """Work can be done at this place from now on."""
        self._starts_left[place] = self.rules.tries
        self._idle[place] = None

    def not_started(self, place: int, reason: str) -> bool:
        """Whether to try again to start this place."""
        self._starts_left[place] -= 1
        if self._starts_left[place] == 0:
            del self._starts_left[place]
        if not self._starts_left:
            self.unstarted = reason
        return place in self._starts_left

    def finished(self, place: int, now: float) -> tuple[str, list[int]]:
        """The unit that this place has done, and the places that are still at it, in vain: they leave."""
        copy = self._running.pop(place)
        self._idle[place] = None
        self._seconds_per_size.append((now - copy.since) / self._sizes[copy.unit])
        others = [other for other in self._places_of.pop(copy.unit) if other != place]
        for other in others:
            del self._running[other]
        self._failed_at.pop(copy.unit, None)
        self._num_left -= 1
        return copy.unit, others

    def failed(self, place: int, reason: str) -> Failure:
        """The failure of what this place was at. The place leaves."""
        unit = self._running.pop(place).unit
        self._places_of[unit].remove(place)
        tried = self._failed_at.setdefault(unit, [])
        tried.append(place)
        failure = Failure(unit=unit, attempt=len(tried), reason=reason)
        if not self._places_of[unit]:  # else a copy may still succeed
            del self._places_of[unit]
            if failure.attempt >= self.rules.tries:
                self.failure = self.failure or failure
            else:
                self._waiting.appendleft(unit)
        return failure

    # what to do

    @property
    def num_places(self) -> int:
        """How many places there are now."""
        return len(self._idle) + len(self._running)

    @property
    def stopped(self) -> bool:
        """Whether no unit is begun any more, because one failed for good or work can be started nowhere."""
        return self.failure is not None or self.unstarted is not None

    def ended(self, now: float) -> bool:
        """Whether there is nothing to wait for: all is done; or the step stopped, and what still runs takes too long."""
        return self._num_left == 0 or (self.stopped and len(self._slow(now)) == len(self._running))

    def begin(self, now: float) -> list[tuple[int, str]]:
        """(place, unit) of the work to begin now."""
        if self.stopped:
            return []
        begun = [(place, unit) for place in self._idle if (unit := self._take(place)) is not None]
        if len(begun) < len(self._idle):
            busy = dict(begun)
            alone = [copy.unit for copy in self._slow(now) if self._may_be_copied(copy.unit)]
            begun += zip([place for place in self._idle if place not in busy], alone, strict=False)
        for place, unit in begun:
            del self._idle[place]
            self._running[place] = Copy(unit=unit, since=now)
            self._places_of.setdefault(unit, []).append(place)
        return begun

    def _take(self, place: int) -> str | None:
        """The next unit for this place, out of those that wait: none that failed here, unless it failed at every place there is."""
        for number, unit in enumerate(self._waiting):
            tried = self._failed_at.get(unit, ())
            if place not in tried or {*self._idle, *self._running} <= set(tried):
                del self._waiting[number]
                return unit
        return None

    def _may_be_copied(self, unit: str) -> bool:
        """Whether it is at work at one place only, and was not begun as often already as it may fail."""
        return len(self._places_of[unit]) == 1 and len(self._failed_at.get(unit, ())) + 1 < self.rules.tries

    def _slow(self, now: float) -> list[Copy]:
        """What has taken too long, the longest first."""
        over = [copy for copy in self._running.values() if now - copy.since > self.rules.slow_seconds]
        if not over or not self._seconds_per_size:
            return []
        limit = self.rules.slow_factor * median(self._seconds_per_size)
        return sorted((copy for copy in over if now - copy.since > limit * self._sizes[copy.unit]), key=lambda copy: copy.since)
