"""The parent's side of a build: the model goes to a child process through a file, progress comes back on a pipe."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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


@dataclasses.dataclass(frozen=True)
class Request:
    """What the child is asked: which model, for which machine, printed in which form, with which names, where to."""

    model: str
    folder: str
    machine: Machine
    form: str
    prefix: str


def build(
    model: onnx_ir.Model, folder: Path, machine: Machine, *, form: str, prefix: str, progress: Progress
) -> dict[str, Any]:
    """Build the artefact's code in a child process; returns what the child says about it.

    TVM takes seconds to import, gigabytes to compile and, when it fails, the process with it: none of
    that belongs into the caller's process. The child ends with the caller.

    Raises:
        TargetError: the model cannot be built; the text is the child's.
        LimitError: the child was killed, which is what the system does when memory is out.
    """
    with tempfile.TemporaryDirectory(prefix="mc-opt-build-") as place:
        path = Path(place) / "model.onnx"
        ir.save_model(model, path, reload="structure")
        request = Request(str(path), str(folder), machine, form, prefix)
        return _run(request, progress)


def _run(request: Request, progress: Progress) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as words, os.fdopen(read_end) as lines:
        # -P: a folder named `ir` where the caller happens to stand must not be imported.
        command = [sys.executable, "-P", "-c", _CHILD, str(write_end), json.dumps(dataclasses.asdict(request))]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, pass_fds=[write_end]
        ) as child:
            os.close(write_end)
            try:
                answer = _listen(lines, progress)
                code = child.wait()
            finally:
                child.kill()
        if answer is None:
            raise _crash(code, words)
    if "error" in answer:
        raise _ERRORS.get(answer["kind"], TargetError)(answer["error"])
    return answer


def _listen(lines: Iterator[str], progress: Progress) -> dict[str, Any] | None:
    answer = None
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "progress" in message:
            done, total, what = message["progress"]
            progress(done, total, what)
        else:
            answer = message
    return answer


def _crash(code: int, words: IO[bytes]) -> Exception:
    words.seek(0)
    said = [line for line in words.read().decode(errors="replace").splitlines() if line.strip()]
    if code == _KILLED:
        return LimitError("the build's process was killed: memory ran out; build on a machine with more")
    last = said[-1].strip() if said else "it said nothing"
    return TargetError(f"the build's process ended with code {code}: {last}; build --target onnx, and report this")
