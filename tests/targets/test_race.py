"""Races of kernels by their made-up times: the first wins unless another is clearly faster, whatever the noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mc_opt.targets._race import race


class Course:
    """Runners of given seconds a call on a clock of their own; `noise(clock)` multiplies what a call takes."""

    def __init__(self, seconds: list[float], noise: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now, self.calls = 0.0, [0] * len(seconds)
        self.seconds, self.noise = seconds, noise

    def run(self) -> tuple[int, list[float]]:
        place, times = race([self._runner(k) for k in range(len(self.seconds))], lambda: self.now)
        return place, [t.ratio for t in times]

    def _runner(self, k: int) -> Callable[[int], float]:
        def run(count: int) -> float:
            took = sum(self.seconds[k] * self.noise(self.now) for _ in range(count))
            self.now += took
            self.calls[k] += count
            return took

        return run


def test_the_fastest_wins_and_ratios_are_to_the_first():
    place, ratios = Course([1e-3, 1.1e-3, 0.8e-3, 0.9e-3]).run()
    assert place == 2
    assert ratios == pytest.approx([1, 1.1, 0.8, 0.9])


@pytest.mark.parametrize(("second", "place"), [(0.98e-3, 0), (0.975e-3, 0), (0.965e-3, 1), (1e-3, 0)])
def test_less_than_the_margin_is_not_worth_another_tile(second: float, place: int):
    assert Course([1e-3, second]).run()[0] == place


def test_one_alone_wins():
    assert Course([1e-3]).run() == (0, [1.0])


@pytest.mark.parametrize("seed", range(20))
def test_bursts_of_other_programs_do_not_decide(seed: int):
    rng = np.random.default_rng(seed)

    def noise(_now: float) -> float:
        return float(rng.uniform(0.98, 1.02) * (rng.uniform(2, 8) if rng.random() < 0.2 else 1))

    assert Course([1e-3, 1.0e-3, 1.01e-3, 0.99e-3], noise).run()[0] == 0
    assert Course([1e-3, 1.0e-3, 0.85e-3, 1.02e-3], noise).run()[0] == 2


def test_a_machine_that_slows_down_slows_all():
    assert Course([1e-3, 1e-3, 1e-3], lambda now: 1 + 30 * now).run()[0] == 0


def test_what_is_hopeless_has_no_rounds_and_short_calls_are_timed_together():
    course = Course([1e-5, 9e-6, 1e-4])
    assert course.run()[0] == 1
    assert course.calls[2] == 3
    assert course.calls[0] > 1000


def test_a_race_of_slow_kernels_ends():
    course = Course([1.0, 0.9, 0.95, 1.2])
    assert course.run()[0] == 1
    assert course.now < 30
