"""What the verbs print: options every verb has, tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

if TYPE_CHECKING:
    from rich.progress import TaskID

Command = TypeVar("Command", bound=Callable[..., Any])

_SILENCE = 1.0
_PAUSE = 5.0


def common_options(command: Command) -> Command:
    """Add the options that every verb has: --json and --traceback."""
    command = click.option(
        "--traceback", is_flag=True, expose_value=False, help="Show Python's traceback of an error."
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def print_json(value: Any) -> None:
    """JSON on stdout, indented; what JSON does not know prints as text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """A plain table on stdout: aligned columns, numbers to the right, no colour, no frame; nothing without rows."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        return
    if title:
        click.echo(f"\n{title}")
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    widths = [max(len(line[i]) for line in (list(columns), *cells)) for i in range(len(columns))]
    for line in (list(columns), *cells):
        parts = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(line, widths, numeric, strict=True)]
        click.echo("  ".join(parts).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit() or (text[:1] in "+-." and text[1:2].isdigit())


def size_text(count: float) -> str:
    """Bytes for people: `152.1 kB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class Progress:
    """Progress on stderr: a bar with the time left on a terminal, otherwise now and then a plain line.

    An instance is called as `progress(done, total, what)`, where `what` is a step, or `step: a part of it`. Plain
    lines start after a second, so that a run that fails at once prints its error alone; every step that begins has
    one, a step that goes on another every five seconds. A part without a total is a remark, and always printed.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._terminal = sys.stderr.isatty()
        self._step = ""
        self._started = self._told = clock()
        self._pace = (self._started, 0, 0)  # since when, and what was done then of what total
        self._bar: Any = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        step, colon, _ = what.partition(": ")
        begins, self._step = step != self._step, step
        if colon and not total:
            self._remark(what)
            return
        if self._bar is not None:
            if begins or self._task is None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task("", total=total or None)
            # Names of layers may hold brackets, which rich would take for markup.
            self._bar.update(self._task, completed=done, total=total or None, description=what.replace("[", "\\["))
            return
        now = self._clock()
        if begins or total != self._pace[2] or done < self._pace[1]:
            self._pace = (now, done, total)
        if now - self._started < _SILENCE or (not begins and now - self._told < _PAUSE):
            return
        self._told = now
        click.echo(f"[{now - self._started:6.1f} s] {what if begins else self._line(done, total, what, now)}", err=True)

    def _line(self, done: int, total: int, what: str, now: float) -> str:
        """A step that goes on: how far it is, and the time left at its pace so far."""
        since, before, _ = self._pace
        if not before < done < total:
            return what
        left = (now - since) * (total - done) / (done - before)
        return f"{what} ({done} of {total}, about {_time_text(left)} left)"

    def _remark(self, what: str) -> None:
        if self._bar is not None:
            self._bar.console.print(what, markup=False, highlight=False)
        else:
            click.echo(f"[{self._clock() - self._started:6.1f} s] {what}", err=True)


def _time_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
