"""The schedule of a step: every unit is done once whatever happens to places, tries are bounded, and slow units are taken over. No Ray, no clock.

What the schedule is told of a run's units, and how it comes along, is here too.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from influence.run import Run
from influence.run_directory import RunDirectory
from jobs.executors import cpus_per_worker
from jobs.scheduler import Failure, Rules, Schedule
from jobs.stages import STAGES

RULES = Rules(tries=3, slow_factor=3, slow_seconds=10)


def started(sizes: dict[str, float] | list[str], num_places: int, rules: Rules = RULES) -> Schedule:
    schedule = Schedule(sizes if isinstance(sizes, dict) else dict.fromkeys(sizes, 1.0), num_places, rules)
    for place in range(num_places):
        schedule.joined(place)
    return schedule


def failed_and_back(schedule: Schedule, place: int, reason: str = "broken") -> Failure:
    failure = schedule.failed(place, reason)
    schedule.joined(place)
    return failure


# the order


def test_largest_units_are_begun_first_and_equal_ones_in_their_order() -> None:
    schedule, order, now = started({"a": 1, "b": 8, "c": 1, "d": 27}, 1), [], 0.0
    while not schedule.ended(now):
        [(place, unit)] = schedule.begin(now)
        now += 1
        assert schedule.finished(place, now) == (unit, [])
        order.append(unit)
    assert order == ["d", "b", "a", "c"]


def test_places_that_never_join_keep_nothing_waiting() -> None:
    schedule = Schedule(dict.fromkeys("abc", 1.0), 5, RULES)
    assert schedule.begin(0) == []
    schedule.joined(3)
    for now, unit in enumerate("abc"):
        assert schedule.begin(now) == [(3, unit)]
        assert schedule.num_places == 1
        schedule.finished(3, now + 1)
    assert schedule.ended(3)


def test_place_that_joins_late_gets_work() -> None:
    schedule = Schedule(dict.fromkeys("abc", 1.0), 2, RULES)
    schedule.joined(0)
    assert schedule.begin(0) == [(0, "a")]
    schedule.joined(1)
    assert schedule.begin(1) == [(1, "b")]


def test_step_without_units_is_over_at_once() -> None:
    assert started([], 2).ended(0)


# failures


def test_failed_unit_is_tried_again_elsewhere_before_others() -> None:
    schedule = started(["a", "b", "c"], 2)
    assert schedule.begin(0) == [(0, "a"), (1, "b")]
    assert failed_and_back(schedule, 0) == Failure(unit="a", attempt=1, reason="broken")
    assert schedule.begin(1) == [(0, "c")]  # not a: place 1 has not tried it
    schedule.finished(1, 2)
    assert schedule.begin(2) == [(1, "a")]


def test_only_place_tries_again_what_failed_there() -> None:
    schedule = started(["a"], 1)
    for attempt in (1, 2):
        assert schedule.begin(attempt) == [(0, "a")]
        assert failed_and_back(schedule, 0).attempt == attempt
    assert schedule.begin(3) == [(0, "a")]
    schedule.finished(0, 4)
    assert schedule.ended(4)
    assert not schedule.stopped


def test_unit_that_always_fails_stops_the_step_with_its_last_reason_and_lets_the_others_finish() -> None:
    schedule = started(["bad", "good", "later"], 2)
    assert schedule.begin(0) == [(0, "bad"), (1, "good")]
    schedule.failed(0, "first")  # the place is never there again
    schedule.joined(2)
    assert schedule.begin(1) == [(2, "bad")]
    failed_and_back(schedule, 2, "second")
    assert schedule.begin(2) == [(2, "later")]
    schedule.finished(2, 3)
    assert schedule.begin(3) == []  # place 1 could try it, and is busy
    schedule.failed(1, "of the other")
    assert schedule.begin(4) == [(2, "good")]
    schedule.joined(1)
    assert schedule.begin(5) == [(1, "bad")]
    schedule.failed(1, "third")
    assert schedule.failure == Failure(unit="bad", attempt=3, reason="third")
    assert schedule.stopped
    assert not schedule.ended(6)
    schedule.joined(1)
    assert schedule.begin(6) == []
    schedule.finished(2, 7)
    assert schedule.ended(7)


def test_step_that_stopped_does_not_wait_for_what_takes_too_long() -> None:
    schedule = started(["bad", "hangs", "good"], 3, Rules(tries=2, slow_factor=3, slow_seconds=10))
    schedule.begin(0)
    schedule.finished(2, 1)
    schedule.failed(0, "broken")
    assert schedule.begin(1) == [(2, "bad")]
    schedule.failed(2, "broken")
    assert schedule.failure is not None
    assert not schedule.ended(10)
    assert schedule.ended(10.1)


@pytest.mark.parametrize("num_places", [1, 3])
def test_places_that_cannot_be_started_are_given_up_and_the_last_one_stops_the_step(num_places: int) -> None:
    schedule = Schedule({"a": 1.0}, num_places, RULES)
    for place in range(num_places):
        assert not schedule.stopped
        assert [schedule.not_started(place, f"no module at {place}") for _ in range(3)] == [True, True, False]
    assert schedule.unstarted == f"no module at {num_places - 1}"
    assert schedule.ended(0)


def test_place_that_started_may_fail_to_start_as_often_again() -> None:
    schedule = Schedule({"a": 1.0}, 1, RULES)
    for _ in range(5):
        assert [schedule.not_started(0, "no room") for _ in range(2)] == [True, True]
        schedule.joined(0)
        schedule.begin(0)
        if schedule.failed(0, "lost").attempt == 3:
            break
    assert schedule.unstarted is None


# slow units


def test_slow_unit_is_taken_over_by_an_idle_place_and_the_first_to_be_done_counts() -> None:
    for winner, loser in ((0, 1), (1, 0)):
        schedule = started(["a", "b"], 2)
        schedule.begin(0)
        schedule.finished(1, 5)
        assert schedule.begin(15) == []  # three times the median, and not more
        assert schedule.begin(15.1) == [(1, "a")]
        assert schedule.finished(winner, 16) == ("a", [loser])
        assert schedule.ended(16)
        assert schedule.num_places == 1  # the other left


def test_slow_unit_is_not_taken_over_while_others_wait_nor_a_third_time() -> None:
    schedule = started(["slow", "a", "b"], 4, RULES)
    assert len(schedule.begin(0)) == 3
    schedule.finished(1, 1)
    assert schedule.begin(100) == [(3, "slow"), (1, "b")]
    assert schedule.begin(1000) == []


def test_nothing_is_slow_before_another_unit_was_done() -> None:
    schedule = started(["a"], 2)
    schedule.begin(0)
    assert schedule.begin(1e6) == []


def test_large_unit_is_not_slow_for_its_size() -> None:
    schedule = started({"large": 100, "small": 1}, 2)
    schedule.begin(0)
    schedule.finished(1, 2)
    assert schedule.begin(600) == []
    assert schedule.begin(600.1) == [(1, "large")]


def test_failure_of_one_copy_leaves_the_other_at_work() -> None:
    schedule = started(["slow", "a"], 2, Rules(tries=2, slow_seconds=10))
    schedule.begin(0)
    schedule.finished(1, 1)
    assert schedule.begin(20) == [(1, "slow")]
    assert schedule.failed(0, "lost").attempt == 1
    assert not schedule.stopped
    assert schedule.finished(1, 21) == ("slow", [])
    assert schedule.ended(21)


# whatever happens


@dataclass
class World:
    """A cluster in a few lines: what happens to places is drawn at random."""

    schedule: Schedule
    seed: int
    seconds: Callable[[random.Random], float]
    bad: frozenset[str] = frozenset()
    death: float = 0.0
    error: float = 0.0
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    most_copies: int = 0

    def run(self, num_places: int) -> float:
        """Plays the step to its end, and returns when that was."""
        draw, now, number = random.Random(self.seed), 0.0, 0
        life = dict.fromkeys(range(num_places), 0)  # how often a place was started: what an ended one does counts for nothing
        at: dict[int, str] = {}

        def later(seconds: float, what: str, place: int) -> None:
            nonlocal number
            number += 1
            heapq.heappush(self.events, (now + seconds, number, what, place, life[place]))

        def start(place: int) -> None:
            at.pop(place, None)
            life[place] += 1
            later(draw.uniform(0, 2), "join", place)

        for place in range(num_places):
            start(place)
        while not self.schedule.ended(now):
            for place, unit in self.schedule.begin(now):
                assert place not in at, "a place has one unit at a time"
                at[place] = unit
                fails = unit in self.bad or draw.random() < self.death + self.error
                later(self.seconds(draw), "fail" if fails else "finish", place)
            self.most_copies = max(self.most_copies, *Counter(at.values()).values(), 0)
            if not self.events or self.events[0][0] > now + 1:
                now += 1  # as an executor, which looks for slow units every second
                continue
            now, _, what, place, of = heapq.heappop(self.events)
            if of != life[place]:
                continue
            if what == "join":
                if draw.random() < self.death:
                    if self.schedule.not_started(place, "no room"):
                        start(place)
                    continue
                self.schedule.joined(place)
            elif what == "finish":
                unit, in_vain = self.schedule.finished(place, now)
                assert unit == at.pop(place)
                self.done[unit] += 1
                for other in in_vain:
                    start(other)
            else:
                self.failures.append(self.schedule.failed(place, "by lot"))
                start(place)
        return now


def heavy_tailed(draw: random.Random) -> float:
    return draw.lognormvariate(2, 0.3) * (100 if draw.random() < 0.05 else 1)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("num_places", [1, 2, 7])
def test_every_unit_is_done_once_whatever_happens_to_places(seed: int, num_places: int) -> None:
    units = [f"part-{number:05d}" for number in range(60)]
    rules = Rules(tries=20, slow_factor=3, slow_seconds=10)
    world = World(Schedule(dict.fromkeys(units, 1.0), num_places, rules), seed, heavy_tailed, death=0.1, error=0.1)
    world.run(num_places)
    assert world.schedule.failure is None
    assert world.done == Counter(units)
    assert world.most_copies <= 2
    assert world.failures, "the case has failures"


@pytest.mark.parametrize("seed", range(10))
def test_unit_that_always_fails_has_its_tries_and_no_more(seed: int) -> None:
    units = [f"part-{number:05d}" for number in range(40)]
    world = World(Schedule(dict.fromkeys(units, 1.0), 4, RULES), seed, heavy_tailed, bad=frozenset({units[7]}), error=0.02)
    world.run(4)
    assert world.schedule.failure == Failure(unit=units[7], attempt=3, reason="by lot")
    assert Counter(failure.unit for failure in world.failures)[units[7]] == 3
    assert units[7] not in world.done
    assert max(world.done.values()) == 1


def test_slow_units_do_not_hold_up_the_step() -> None:
    """Of 100 units one hangs for ever: with the rule the step ends, and without it does not."""
    units = [f"part-{number:05d}" for number in range(100)]

    def hangs_once() -> Callable[[random.Random], float]:
        begun = iter(range(10**6))
        return lambda draw: 1e9 if next(begun) == 50 else 10.0

    taken_over = World(Schedule(dict.fromkeys(units, 1.0), 4, RULES), 0, hangs_once()).run(4)
    alone = World(Schedule(dict.fromkeys(units, 1.0), 4, Rules(slow_seconds=1e12)), 0, lambda draw: 10.0).run(4)
    assert taken_over <= alone + 3 * 10 + 10 + 10


# sizes


def test_sizes_of_units_are_their_sequences_or_the_cubes_of_their_dimensions(finished: Path) -> None:
    run = Run(finished)
    sizes = {stage.name: {unit: stage.size(run, unit) for unit in stage.units(run)} for stage in STAGES}
    assert {name for name, own in sizes.items() if min(own.values()) <= 0} == set()
    shards = [len(run.training.shard(shard)) for shard in range(run.training.num_shards)]
    assert list(sizes["rows"].values()) == list(sizes["scans"].values()) == shards
    for name in ("covariances", "eigenvalues"):
        assert sum(sizes[name].values()) == pytest.approx(run.fitted[name].sum())
    assert sizes["eigenbases"] == {name: len(vectors) ** 3 for name, vectors in run.eigenvectors_of(run.coverage.layers).items()}


def test_progress_says_what_came_of_the_last_stage(finished: Path) -> None:
    progress = RunDirectory(finished).read_progress()
    assert progress is not None
    assert progress.pop("units_per_second") > 0
    assert progress.pop("updated") > 0
    assert progress == {"stage": "fidelity", "done": 1, "total": 1, "seconds_left": 0, "workers": 1, "retries": 0, "failures": []}


# the share of a worker


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpus", "expected"),
    [
        ([(2, 0)], 2, 0, 1),
        ([(8, 0)], 3, 0, 2),
        ([(2, 0)], 4, 0, 0.5),
        ([(1, 0), (1, 0), (1, 0)], 4, 0, 0.5),  # three quarters each would leave one without a place
        ([(0, 0), (16, 0)], 2, 0, 8),  # a head without CPUs
        ([(16, 0), (8, 1), (8, 1)], 2, 1, 8),  # the head has no GPU: nobody works there
        ([(32, 8)], 8, 1, 4),
        ([(4, 8)], 8, 1, 0.5),
        ([(8, 1), (8, 1)], 4, 1, 8),  # two of the four find no GPU yet
        ([(8, 1)], 2, 0.5, 4),
        ([], 4, 1, 1),  # nodes are yet to come
        ([(0, 0)], 4, 0, 1),
    ],
)
def test_workers_get_as_many_cpus_as_leave_room_for_all(
    nodes: list[tuple[float, float]], num_workers: int, gpus: float, expected: float
) -> None:
    assert cpus_per_worker(nodes, num_workers, gpus) == expected
