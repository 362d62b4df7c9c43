"""What people see while a run goes on: few lines, each with what it is about and the time left."""

from __future__ import annotations

import pytest

from mc_opt.tools._console import Progress


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_is_a_line_a_step_and_one_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    progress(0, 0, "load")  # within the first second nothing is printed
    clock.now = 1.5
    progress(0, 2, "fold-batch-norm")
    for layer in range(1000):
        clock.now += 1 / 64
        progress(layer, 1000, f"denseshift: layer {layer}")
    progress(0, 0, "save")
    assert capsys.readouterr().err.splitlines() == [
        "[   1.5 s] fold-batch-norm",
        "[   1.5 s] denseshift: layer 0",
        "[   6.5 s] denseshift: layer 320 (320 of 1000, about 11 s left)",
        "[  11.5 s] denseshift: layer 640 (640 of 1000, about 6 s left)",
        "[  16.5 s] denseshift: layer 960 (960 of 1000, about 1 s left)",
        "[  17.1 s] save",
    ]


def test_a_run_that_is_over_at_once_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(clock=Clock())
    progress(0, 0, "load")
    progress(0, 3, "denseshift: w")
    assert capsys.readouterr().err == ""
