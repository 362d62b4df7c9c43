"""Whole output folders: new, swapped, or merged into a folder that holds other people's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mc_opt import ir
from mc_opt.ir.io import atomic

OURS = {
    "model.onnx": "m",
    "model.onnx.data": "d",
    "report.json": json.dumps({"schema_version": 1}),
    "timings.json": "t",
    "ir/0-load.txt": "i",
    "x86/model.so": "s",
    "x86/manifest.json": "{}",
}
NEW = {"model.onnx": "m2", "report.json": "r2", "arm/manifest.json": "{}", "arm/model.so": "s2"}


def put(folder: Path, content: Mapping[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def get(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def stage(out: Path, content: Mapping[str, str] = NEW) -> None:
    with ir.staged_folder(out) as folder:
        put(folder, content)


def test_a_new_folder_with_its_parents(tmp_path: Path) -> None:
    stage(tmp_path / "a/b/out")
    assert get(tmp_path) == {f"a/b/out/{name}": text for name, text in NEW.items()}
    assert (tmp_path / "a/b/out").stat().st_mode == (tmp_path / "a/b").stat().st_mode


def test_an_empty_folder_and_an_earlier_output_are_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stage(out, OURS)
    assert get(out) == OURS
    stage(out)
    assert get(out) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "x86/notes/mine.txt", "ir/load.py", "other/manifest.txt"])
def test_foreign_files_stay(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    put(out, OURS | {foreign: "mine"})
    stage(out)
    content = get(out)
    assert content[foreign] == "mine"
    assert NEW.items() <= content.items()
    assert "model.onnx.data" not in content  # ours, and stale
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_never_ours_loses_nothing(tmp_path: Path) -> None:
    mine = {"model.onnx.data": "mine", "x86/manifest.json": "mine", "ir/notes.txt": "mine"}
    put(tmp_path, mine)
    stage(tmp_path)
    assert get(tmp_path) == mine | NEW


def test_the_current_folder_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage(Path("."))
    stage(Path("."))
    assert get(tmp_path) == NEW


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, {}, OURS, OURS | {"notes.txt": "mine"}])
def test_a_failure_leaves_the_old_state(
    tmp_path: Path, error: type[BaseException], before: Mapping[str, str] | None
) -> None:
    out = tmp_path / "a/out"
    if before is not None:
        out.mkdir(parents=True)
        put(out, before)
    with pytest.raises(error), ir.staged_folder(out) as folder:
        put(folder, NEW)
        raise error
    assert out.exists() == (before is not None)
    assert (tmp_path / "a").exists() == (before is not None)
    assert get(tmp_path) == {f"a/out/{name}": text for name, text in (before or {}).items()}


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", os.rename
    put(out, OURS)

    def fail(source: Path, destination: Path) -> None:
        if destination == out and atomic.PREFIX in source.name:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        stage(out)
    assert get(out) == OURS
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_cleans_up(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from mc_opt import ir
        with ir.staged_folder({str(tmp_path / "a/out")!r}) as folder:
            (folder / "model.onnx").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) != 0
    assert not list(tmp_path.iterdir())


def test_signals_wait_for_the_swap() -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(time.monotonic()))
    try:
        with atomic._undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert not caught
        assert caught
    finally:
        signal.signal(signal.SIGINT, before)


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/out"):
        with pytest.raises(ir.FolderError, match="is a file, a folder was expected"):
            stage(out)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ir.FolderError, match="cannot be written"):
        stage(tmp_path)
    with pytest.raises(ir.FolderError, match=r"cannot be written|is a file"):
        ir.write_text("/proc/version/report.json", "x")
    with pytest.raises(ir.FolderError, match="cannot be made"):
        stage(tmp_path / ("n" * 300))


def test_single_files(tmp_path: Path) -> None:
    ir.write_text(tmp_path / "new/a.txt", "ä")
    ir.write_bytes(tmp_path / "new/a.txt", b"b")
    assert get(tmp_path) == {"new/a.txt": "b"}
    assert (tmp_path / "new/a.txt").stat().st_mode & 0o777 == 0o666 & ~atomic._umask()
