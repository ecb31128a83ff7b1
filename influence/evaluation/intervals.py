"""Means and ratios over queries with their bootstrap intervals. Knows arrays only. Legend: Q queries, B resamples."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval, whose end is infinity where nothing bounds it; None where one query alone was asked."""

    value: float
    interval: Interval | None

    @property
    def ends(self) -> Interval:
        """The interval's; the number itself where there is none."""
        return self.interval or (self.value, self.value)

    def to_json(self) -> dict[str, Any]:
        """An end that is not there is null: JSON has no infinity."""
        ends = None if self.interval is None else [end if math.isfinite(end) else None for end in self.interval]
        return {"value": self.value, "interval": ends}


def resamples(num: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """[B, num]: numbers below `num`, drawn with replacement, depending on the arguments alone, so that those of two methods are paired."""
    return np.random.default_rng(seed).integers(0, num, (num_resamples, num))


def central(values: NDArray[np.float64]) -> Interval:
    """The middle 95% of the resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean(values: NDArray[np.float64]) -> Estimate:
    """The mean of [Q] with its percentile bootstrap interval; one value has none."""
    if len(values) < 2:
        return Estimate(value=float(values.mean()), interval=None)
    return Estimate(value=float(values.mean()), interval=central(values[resamples(len(values))].mean(1)))


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Estimate | None:
    """|mean(above)| / |mean(below)|, both [Q] of the same queries, resampled together; None where the mean below is zero.

    Without an upper bound where more than 2.5% of the resampled means below have another sign than the mean itself: it may be zero.
    """
    value = float(below.mean())
    if value == 0:
        return None
    found = abs(float(above.mean()) / value)
    if len(below) < 2:
        return Estimate(value=found, interval=None)
    drawn = resamples(len(below))
    tops, bottoms = above[drawn].mean(1), below[drawn].mean(1)
    low, high = central(np.abs(tops) / np.maximum(np.abs(bottoms), np.finfo(float).tiny))
    bounded = float((bottoms * np.sign(value) > 0).mean()) >= (1 + CONFIDENCE) / 2
    return Estimate(value=found, interval=(low, high if bounded else math.inf))
