"""Timing beside each other, with a clock that is set by hand; and `mc-opt bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mc_opt.tools import _timing
from tests.tools.conftest import Ran


class Machine:
    """A clock, and things that take their time on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def thing(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.order.append(name)

        return run


def test_rounds_run_there_and_back() -> None:
    machine = Machine()
    runs = {"a": machine.thing("a", 0.03), "b": machine.thing("b", 0.06)}
    series = _timing.interleave(runs, rounds=2, clock=machine.clock)
    assert "".join(machine.order) == "aabb" + "abba" * 2  # each once to warm up and once to count its batch
    assert series["a"].milliseconds == pytest.approx((30, 30)) and series["b"].median == pytest.approx(60)


def test_what_comes_before_a_batch_is_not_timed() -> None:
    machine = Machine()
    warm = machine.thing("w", 9.0)
    series = _timing.interleave(
        {"a": machine.thing("a", 0.03)}, rounds=1, clock=machine.clock, before=lambda name: warm()
    )
    assert "".join(machine.order) == "wa" * 4 and series["a"].milliseconds == pytest.approx((30,))


def test_batches_take_at_least_so_long() -> None:
    machine = Machine()
    series = _timing.interleave({"a": machine.thing("a", 0.003)}, rounds=5, clock=machine.clock)
    assert series["a"].calls == 7 and len(machine.order) == (1 + 7) + 5 * 2 * 7


def test_the_first_calls_of_many_do_not_make_a_batch_short() -> None:
    machine = Machine()
    fast, slow = machine.thing("a", 0.003), machine.thing("s", 0.012)
    series = _timing.interleave(
        {"a": lambda: (fast if len(machine.order) > 1 else slow)()}, rounds=5, clock=machine.clock
    )
    assert series["a"].calls == 7


def test_a_budget_ends_it_but_not_too_soon() -> None:
    machine = Machine()
    series = _timing.interleave({"a": machine.thing("a", 1.0)}, rounds=100, seconds=3.0, clock=machine.clock)
    assert len(series["a"].milliseconds) == _timing.LEAST_ROUNDS


def test_a_drift_of_the_machine_leaves_the_ratio() -> None:
    slow = _timing.Series("slow", tuple(2.0 + i for i in range(0, 40, 2)), 1)
    fast = _timing.Series("fast", tuple(1.0 + i / 2 for i in range(0, 40, 2)), 1)
    ratio = _timing.ratio(slow, fast)
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2) and ratio.verdict == "2.00 times slower"
    assert _timing.ratio(fast, slow).verdict == "2.00 times faster"


def test_noise_is_not_called_a_difference() -> None:
    a = _timing.Series("a", (1.0, 1.3, 0.9, 1.1, 0.8, 1.0), 1)
    b = _timing.Series("b", (1.1, 1.0, 1.0, 0.9, 1.0, 1.1), 1)
    ratio = _timing.ratio(a, b)
    assert ratio.low < 1 < ratio.high and ratio.verdict == "no difference seen"
    assert ratio == _timing.ratio(a, b)  # the same resamples each time


def test_bench_times_models_beside_the_first(mc_opt: Callable[..., Ran], mlp: Path, out: Path) -> None:
    assert mc_opt(mlp, "--passes", "denseshift", "--check", "structure", "-o", out).code == 0
    ran = mc_opt("bench", mlp, out, "--runs", 5, "--json")
    assert ran.code == 0, ran.err
    first, second = json.loads(ran.out)["rows"]
    assert first["name"] == f"{mlp} in ONNX Runtime" and first["verdict"] == "the reference"
    assert first["ratio"] == 1 and first["difference"] == 0 and first["rounds"] == 5
    assert second["name"] == f"{out} in ONNX Runtime" and second["difference"] > 0
    assert second["interval"][0] <= second["ratio"] <= second["interval"][1]
    text = mc_opt("bench", mlp, "--runs", 5).out.splitlines()
    assert text[0].split() == ["what", "ms", "quartiles", "ratio", "95", "%", "max/range"]


def test_bench_says_which_artefact_it_cannot_run(mc_opt: Callable[..., Ran], mlp: Path, out: Path) -> None:
    assert mc_opt(mlp, "--passes", "denseshift", "--check", "structure", "-o", out).code == 0
    (out / "arm").mkdir()
    (out / "arm" / "manifest.json").write_text("{}")
    ran = mc_opt("bench", out, "--runs", 5)
    assert ran.code == 0 and "artefact arm is not run: " in ran.err
