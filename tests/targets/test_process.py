"""A build's child process that fails: whose fault it is decides the error, and nothing that it started outlives it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mc_opt import ir, targets
from mc_opt.targets import _machine, _process, _zig
from tests._harness import model

RELU = '<ir_version: 10, opset_import: ["": 21]> g (float[3] x) => (float[3] y) { y = Relu(x) }'
MACHINE = _machine.named("x86-64-v3", threads=1)

SEND = """
import json, os, sys
def send(**message):
    os.write(int(sys.argv[1]), (json.dumps(message) + "\\n").encode())
"""


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, child: str, progress: Callable[[int, int, str], None]) -> None:
    """Run a build whose child is the code `child`; `send` in it answers the parent."""
    monkeypatch.setattr(_process, "_CHILD", SEND + child)
    _process.build(model(RELU), folder, MACHINE, form="vm", prefix="model", progress=progress)


@pytest.mark.parametrize(
    ("child", "kind", "says"),
    [
        ("send(kind='', error='KeyError: 3', traceback='Traceback of the child')", _process.BuildError, "KeyError: 3"),
        ("send(kind='', error='RuntimeError: std::bad_alloc', traceback='')", ir.LimitError, "out of memory"),
        ("send(kind='LimitError', error='no space', traceback='')", ir.LimitError, "no space"),
        ("send(kind='TargetError', error='no kernel', traceback='')", targets.TargetError, "no kernel"),
        ("raise ImportError('planted')", _process.BuildError, "code 1: ImportError: planted"),
        ("os.abort()", _process.BuildError, "code -6: it said nothing"),
        ("print('LLVM ERROR: out of memory', flush=True); os.abort()", ir.LimitError, "out of memory"),
        ("os.kill(os.getpid(), 9)", ir.LimitError, "out of memory"),
    ],
)
def test_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        build(tmp_path, monkeypatch, child, lambda *_: None)
    if "Traceback" in child:
        assert caught.value.__notes__ == ["Traceback of the child"]


def test_an_interrupt_ends_the_child_and_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = (
        "import subprocess, time\nother = subprocess.Popen(['sleep', '60'])\n"
        "send(progress=[0, 1, str(other.pid)])\ntime.sleep(60)"
    )
    started: list[int] = []

    def interrupt(_done: int, _total: int, what: str) -> None:
        started.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, monkeypatch, child, interrupt)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(started[0]):
        time.sleep(0.01)
    assert not _is_running(started[0])


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.ci
def test_a_mistake_in_the_build_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (
        "from mc_opt.targets import _build\ndef broken(*_, **__): raise KeyError('planted')\n"
        "_build.fuse = broken\n_build.serve()"
    )
    monkeypatch.setattr(_process, "_CHILD", broken)
    with pytest.raises(_process.BuildError, match="KeyError: 'planted'") as caught:
        _process.build(model(RELU), tmp_path, MACHINE, form="vm", prefix="model", progress=lambda *_: None)
    assert "in broken" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("script", "kind", "says"),
    [
        ("echo 'error: no such symbol' >&2; exit 1", RuntimeError, "zig cc failed: error: no such symbol"),
        ("echo 'ld: No space left on device' >&2; exit 1", ir.LimitError, "No space left"),
        ("kill -9 $$", ir.LimitError, "memory"),
    ],
)
def test_a_tool_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[Exception], says: str
) -> None:
    def tool(_command: object, **options: object) -> subprocess.CompletedProcess[str]:
        return real(["sh", "-c", script], **options)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", tool)
    with pytest.raises(kind, match=says):
        _zig.run("cc", cache=tmp_path)


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(targets.TargetError, match=r"pip install 'mc-opt\[tvm\]'"):
        targets.parse_target("x86{cpu=x86-64-v3}").check(model(RELU))
