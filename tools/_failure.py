"""Errors as people see them: one line that says where, what and what to do, and an exit code for scripts."""

from __future__ import annotations

import dataclasses
import errno
import sys
import tempfile
import traceback as tracebacks

import click

OK, INTERNAL, USAGE, RECIPE, INPUT, CHECK, LIMIT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

EXIT_CODES = """\
Exit codes: 0 ok, 1 internal error, 2 usage, 3 recipe file, 4 model or data unreadable, unfit or unsupported,
5 check or gate failed, 6 memory or disk full, 130 interrupted."""

# Class name -> code, the first along an error's bases wins. By name: a failed `--help` must not import a room.
CODES = {
    "UsageError": USAGE,
    "RecipeError": RECIPE,
    "OptionError": USAGE,
    "LimitError": LIMIT,
    "IRError": INPUT,
    "PassError": CHECK,
    "MemoryError": LIMIT,
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is printed and returned for an error."""

    code: int
    text: str


def describe(error: Exception, *, traceback: bool = False) -> Failure:
    """The exit code and the text of an error; with `traceback`, Python's own text comes first."""
    before = "".join(tracebacks.format_exception(error)) if traceback else ""
    code = code_of(error)
    if code == INTERNAL:
        return Failure(code, before + _internal(error, traceback=traceback))
    return Failure(code, f"{before}mc-opt: {_line(error)}")


def interruption(error: BaseException) -> str:
    """What is said of a run that was stopped: what the interruption says itself, if anything."""
    first = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
    return f"interrupted; {first}" if isinstance(first, KeyboardInterrupt) and str(first) else "interrupted"


def code_of(error: BaseException) -> int:
    """The exit code of an error: its own class decides, then what it was raised from."""
    names = [c.__name__ for c in type(error).__mro__]
    codes = [CODES[name] for name in names if name in CODES]
    if not codes:
        if not isinstance(error, OSError):
            return INTERNAL
        return LIMIT if error.errno in DISK_FULL else INPUT
    if "PassError" in names and error.__cause__ is not None:
        # A pass that ran out of memory or disk says so; one that met an error of Python has a mistake.
        inner = code_of(error.__cause__)
        unsupported = type(error.__cause__).__name__ == "UnsupportedError"
        return inner if inner in (LIMIT, INTERNAL) or unsupported else codes[0]
    return codes[0]


def _line(error: Exception) -> str:
    match error:
        case click.UsageError():
            return " ".join(error.format_message().split())
        case MemoryError():
            return f"out of memory{f' ({error})' if str(error) else ''}; use a machine with more, or --check structure"
        case OSError() if error.errno in DISK_FULL:
            return f"{error.filename or 'output folder'}: {error.strerror}; free some space or choose another -o"
        case OSError():
            return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return " ".join(str(error).split())


def _internal(error: Exception, *, traceback: bool) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    if traceback:
        return f"mc-opt: internal error: {what}"
    with tempfile.NamedTemporaryFile("w", prefix="mc-opt-", suffix=".txt", delete=False) as file:
        file.write(f"command: {sys.argv}\n")
        file.writelines(tracebacks.format_exception(error))
    return f"mc-opt: internal error: {what}; the traceback is in {file.name}, please send it with a report"
