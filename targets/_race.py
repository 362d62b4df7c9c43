"""Which of several kernels is clearly the fastest: interleaved rounds, medians of ratios, a margin above the noise."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

# Seconds of a call so many times; returns what they took.
Runner = Callable[[int], float]

# What a challenger must save of the first's time, by the median of its ratios; and in three rounds of five, anything.
MARGIN = 0.03
# Seconds that a sample takes at least: calls of short kernels are timed together.
_SAMPLE = 0.5e-3
# A challenger that takes so many times as long at the start is not worth a round.
_HOPELESS = 3.0
_FIRST_CALLS = 3
# Rounds of all, and of the first with its best challengers; and how many are run however long they take.
_HEATS, _FINALS = (7, 1), (25, 3)
_FINALISTS = 3
# Seconds for one race; a slow kernel has fewer rounds.
_BUDGET = 2.0


@dataclasses.dataclass(frozen=True)
class Time:
    """The median of a kernel's seconds, and of its ratios to the first in the same round."""

    seconds: float
    ratio: float


def race(runners: Sequence[Runner], clock: Callable[[], float] = time.perf_counter) -> tuple[int, list[Time]]:
    """The place of the runner that wins, and what each took; the first wins unless another is clearly faster.

    Noise that lasts longer than a round hits all runners alike, and a shorter one few of the rounds: that is why ratios
    within a round are compared, by their median. The decision rests on rounds that had no part in who is in them.
    """
    deadline = clock() + _BUDGET
    first = [run(1) for run in runners]
    for _ in range(1, _FIRST_CALLS):
        if clock() < deadline:
            first = [min(seconds, run(1)) for seconds, run in zip(first, runners, strict=True)]
    times = [Time(seconds, seconds / first[0]) for seconds in first]
    calls = max(1, round(_SAMPLE / first[0]))
    field = [k for k in range(len(runners)) if k == 0 or times[k].ratio < _HOPELESS]
    heats = _rounds(runners, field, calls, _HEATS, clock, deadline)
    for k in field:
        times[k] = _time(heats, k)
    challengers = sorted((k for k in field[1:] if times[k].ratio < 1), key=lambda k: times[k].ratio)[:_FINALISTS]
    if not challengers:
        return 0, times
    finals = _rounds(runners, [0, *challengers], calls, _FINALS, clock, deadline)
    for k in (0, *challengers):
        times[k] = _time(finals, k)
    clear = [k for k in challengers if times[k].ratio <= 1 - MARGIN and _is_steady(finals, k)]
    return min(clear, key=lambda k: times[k].ratio, default=0), times


def _rounds(
    runners: Sequence[Runner],
    field: Sequence[int],
    calls: int,
    limits: tuple[int, int],
    clock: Callable[[], float],
    deadline: float,
) -> list[dict[int, float]]:
    """Seconds of a call of each runner of the field, a dict a round; every round begins with another one."""
    found = []
    most, fewest = limits
    for n in range(most):
        if n >= fewest and clock() > deadline:
            break
        turn = n % len(field)
        order = [*field[turn:], *field[:turn]]
        found.append({k: runners[k](calls) / calls for k in order})
    return found


def _ratios(rounds: Sequence[dict[int, float]], k: int) -> list[float]:
    return [times[k] / times[0] for times in rounds]


def _time(rounds: Sequence[dict[int, float]], k: int) -> Time:
    return Time(statistics.median(times[k] for times in rounds), statistics.median(_ratios(rounds, k)))


def _is_steady(rounds: Sequence[dict[int, float]], k: int) -> bool:
    """Whether a runner beat the first in three rounds of five."""
    return 5 * sum(ratio < 1 for ratio in _ratios(rounds, k)) >= 3 * len(rounds)
