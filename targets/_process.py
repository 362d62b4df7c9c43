"""The parent's side of a build: the model goes to a child process through a file, progress comes back on a pipe."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import onnx_ir

from mc_opt import ir
from mc_opt.ir import LimitError
from mc_opt.targets._base import Progress, TargetError
from mc_opt.targets._machine import Machine

_CHILD = "from mc_opt.targets import _build; _build.serve()"
_ERRORS = {"TargetError": TargetError, "IRError": ir.IRError, "DataError": ir.DataError, "LimitError": LimitError}
_KILLED = -9
_OUT_OF_MEMORY = "the build ran out of memory; build on a machine with more, or for --target onnx alone"
_NO_MEMORY = re.compile(r"out of memory|bad_alloc|cannot allocate memory", re.IGNORECASE)


class BuildError(RuntimeError):
    """The build met a mistake of ours or of TVM's: nothing that the caller could mend."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the child is asked.

    Attributes:
        model: the file.
        folder: where to.
        machine: what it is built for.
        form: how it is printed.
        prefix: of the names of a static library.
        tiles: a file with the tile that each shape takes, as JSON.
        prompt: tokens that a language model takes at once, beside one by one; 0 for one function.
    """

    model: str
    folder: str
    machine: Machine
    form: str
    prefix: str
    tiles: str
    prompt: int


def build(
    model: onnx_ir.Model,
    folder: Path,
    machine: Machine,
    *,
    form: str,
    prefix: str,
    progress: Progress,
    tiles: Mapping[str, str] | None = None,
    prompt: int = 0,
) -> dict[str, Any]:
    """Build the artefact's code in a child process; returns what the child says about it.

    TVM takes seconds to import, gigabytes to compile and, when it fails, the process with it: none of
    that belongs into the caller's process. The child ends with the caller.

    Raises:
        TargetError: the model cannot be built; the text is the child's.
        LimitError: memory or disk is full; the system kills a process when memory is out.
        BuildError: the build itself failed; its note is the child's traceback.
    """
    with tempfile.TemporaryDirectory(prefix="mc-opt-build-") as place:
        path = Path(place) / "model.onnx"
        ir.save_model(model, path, reload="structure")
        chosen = Path(place) / "tiles.json"  # in a file: the words of a command are limited
        ir.write_text(chosen, json.dumps(dict(tiles or {})))
        request = Request(str(path), str(folder), machine, form, prefix, str(chosen), prompt)

        def hear(message: dict[str, Any]) -> bool:
            if "progress" in message:
                done, total, what = message["progress"]
                progress(done, total, what)
            return "progress" in message

        return converse(_CHILD, json.dumps(dataclasses.asdict(request)), hear)


def converse(
    program: str, request: str, hear: Callable[[dict[str, Any]], bool], *, patience: float | None = None
) -> dict[str, Any]:
    """Run code in a child process and return its answer.

    Args:
        program: Python code; its arguments are the descriptor to write messages to and the request.
        request: what it is asked.
        hear: told of every message; returns False for the one that is the answer.
        patience: seconds of silence after which the child is ended.

    Raises:
        TimeoutError: the child was silent for too long.
        Exception: as `build` does.
    """
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as words, os.fdopen(read_end, "rb", buffering=0) as pipe:
        # -P: a folder named `ir` where the caller happens to stand must not be imported.
        command = [sys.executable, "-P", "-c", program, str(write_end), request]
        # A session of its own: what the child starts (the linker, the C compiler) ends with it.
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            pass_fds=[write_end],
            start_new_session=True,
        ) as child:
            os.close(write_end)
            try:
                answer = _listen(_lines(pipe, patience), hear)
                code = child.wait()
            except BaseException:  # Ctrl-C, no patience any more, or whatever watches the progress failed
                os.killpg(child.pid, signal.SIGKILL)
                raise
        if answer is None:
            raise _crash(code, words)
    if "error" in answer:
        raise _failure(answer)
    return answer


def _failure(answer: dict[str, Any]) -> Exception:
    """The child's error as one of ours: its own kind, or a BuildError that keeps the child's traceback."""
    if answer["kind"] in _ERRORS:
        return _ERRORS[answer["kind"]](answer["error"])
    if _NO_MEMORY.search(answer["error"]):
        return LimitError(_OUT_OF_MEMORY)
    error = BuildError(f"the build failed: {answer['error']}")
    error.add_note(answer["traceback"])
    return error


def _listen(lines: Iterator[bytes], hear: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    answer = None
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if not hear(message):
            answer = message
    return answer


def _lines(pipe: IO[bytes], patience: float | None) -> Iterator[bytes]:
    """What comes out of a pipe, line by line."""
    held = b""
    while True:
        if not select.select([pipe], [], [], patience)[0]:
            raise TimeoutError(f"silent for {patience:g} seconds")
        data = pipe.read(1 << 16)
        if not data:
            return
        *whole, held = (held + data).split(b"\n")
        yield from whole


def _crash(code: int, words: IO[bytes]) -> Exception:
    """A child that ended without an answer."""
    words.seek(0)
    text = words.read().decode(errors="replace")
    said = [line for line in text.splitlines() if line.strip()]
    last = said[-1].strip() if said else "it said nothing"
    if code == _KILLED or _NO_MEMORY.search(last):
        return LimitError(_OUT_OF_MEMORY)
    error = BuildError(f"the build's process ended with code {code}: {last}")
    error.add_note(text)
    return error
