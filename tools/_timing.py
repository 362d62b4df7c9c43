"""Times of several things beside each other on a machine that does other work too: interleaved, with spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BATCH = 0.02
"""Seconds that a batch of calls takes at least: what a clock and a scheduler add is small beside it."""
LEAST_ROUNDS = 5
_RESAMPLES = 2000
_LEVEL = 95.0


@dataclass(frozen=True)
class Series:
    """Milliseconds a call of one thing, a round each, in order; `calls` were made in each of a round's two batches."""

    name: str
    milliseconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.milliseconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """What the middle half lies between."""
        low, high = np.percentile(self.milliseconds, (25, 75))
        return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """Time over the reference's: the median over the rounds, and the interval that holds it in 95 % of resamples."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What may be said: `slower` or `faster` when the whole interval is on one side of 1."""
        if self.low > 1:
            return f"{self.value:.2f} times slower"
        if self.high < 1:
            return f"{1 / self.value:.2f} times faster"
        return "no difference seen"


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = math.inf,
    batch: float = BATCH,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], object] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Series]:
    """Time everything in rounds of A B C C B A, so that a drift of the machine hits all alike.

    Args:
        runs: what to call, by name.
        rounds: how many.
        seconds: begin no round after so long, but make `LEAST_ROUNDS`.
        batch: seconds that a batch of calls of one thing takes at least.
        clock: seconds.
        before: called with a name ahead of each batch of it, untimed: to warm caches, or to let threads go to sleep.
        progress: told (done, total, what).
    """

    def timed(name: str, calls: int) -> float:
        run = runs[name]
        if before is not None:
            before(name)
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls * 1e3

    def needed(name: str) -> int:
        """Calls of a batch, by the fastest: after others' the first ones find their memory far away."""
        fastest, start = math.inf, clock()
        while clock() - start < batch:
            fastest = min(fastest, timed(name, 1))
        return max(1, math.ceil(batch * 1e3 / max(fastest, 1e-6)))

    begun = clock()
    calls: dict[str, int] = {}
    for name in runs:
        timed(name, 1)  # loads, packs, allocates
        calls[name] = needed(name)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock() - begun > seconds:
            break
        if progress is not None:
            progress(done, rounds, "measure")
        there = {name: timed(name, calls[name]) for name in runs}
        back = {name: timed(name, calls[name]) for name in reversed(list(runs))}
        for name, times in found.items():
            times.append((there[name] + back[name]) / 2)
    return {name: Series(name, tuple(times), calls[name]) for name, times in found.items()}


def ratio(series: Series, reference: Series, *, seed: int = 0) -> Ratio:
    """How many times as long one took as the other, round by round, with a bootstrap interval."""
    return _median(np.asarray(series.milliseconds) / np.asarray(reference.milliseconds), seed)


def _median(ratios: np.ndarray, seed: int) -> Ratio:
    """The median of `ratios`: [rounds], and its interval."""
    drawn = np.random.default_rng(seed).choice(ratios, (_RESAMPLES, ratios.size))
    edge = (100 - _LEVEL) / 2
    low, high = np.percentile(np.median(drawn, axis=1), (edge, 100 - edge))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def spread_text(values: Sequence[float] | Series) -> str:
    """`12.3 ms [11.9, 12.8]`: the median and the quartiles around it."""
    series = values if isinstance(values, Series) else Series("", tuple(values), 1)
    low, high = series.quartiles
    return f"{series.median:.3g} ms [{low:.3g}, {high:.3g}]"
