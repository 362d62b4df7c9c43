"""What people see while a run goes on: few lines, each with what it is about and the time left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

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


def test_a_training_tells_epoch_loss_and_time_left_at_its_own_pace(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    progress(0, 1, "denseshift")
    progress(0, 0, "denseshift: goes on at epoch 3, step 120")  # a remark: at once, though nothing else is printed yet
    for layer in range(2):
        clock.now += 10
        progress(layer, 2, f"denseshift: layer {layer}")
    for step in range(121, 1200):
        clock.now += 0.25
        progress(step, 1200, f"denseshift: epoch {step // 60 + 1} of 20, loss 0.12, accuracy 0.98")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[   0.0 s] denseshift: goes on at epoch 3, step 120"
    assert lines[1:3] == ["[  10.0 s] denseshift: layer 0", "[  20.0 s] denseshift: layer 1 (1 of 2, about 10 s left)"]
    told = "[  25.0 s] denseshift: epoch 3 of 20, loss 0.12, accuracy 0.98 (140 of 1200, about 4 min left)"
    assert lines[3] == told  # 1,060 steps of a quarter of a second, whatever was done before


def test_a_terminal_shows_epoch_loss_bar_and_time_left() -> None:
    script = """
import time
from mc_opt.tools._console import Progress
with Progress() as progress:
    progress(0, 1, "denseshift")
    progress(0, 0, "denseshift: goes on at epoch 1, step 2")
    for step in range(3, 40):
        time.sleep(0.02)
        progress(step, 40, "denseshift: epoch 2 of 5, loss 0.1234, accuracy 0.9876")
"""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", script], stderr=follower, env=environment)
    os.close(follower)
    shown = bytearray()
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(leader, 4096):
            shown += chunk
    os.close(leader)
    assert child.wait() == 0
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", shown.decode())]
    assert "denseshift: goes on at epoch 1, step 2" in lines
    assert any(
        re.fullmatch(r"denseshift: epoch 2 of 5, loss 0.1234, accuracy 0.9876 .*0:00:0\d 0:00:0\d", x) for x in lines
    )
