"""The folder of a training's checkpoints: its place, who may use it, and when it goes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mc_opt import ir
from mc_opt.passes import Training

_LOCK = "lock"
_HALF_WRITTEN = ".mc-opt-*"
"""What a killed process leaves beside the file that it wrote (ir/io/atomic.py)."""


@contextlib.contextmanager
def checkpoints(training: Training, out: Path | None, *, fresh: bool, writes: bool) -> Iterator[Training]:
    """The training with a folder for its checkpoints: the one it names, or `<out>.training` beside the output.

    A folder that was not named goes when the block ends well; after a failure it stays as long as there is a
    checkpoint in it, and an interruption says so.

    Args:
        training: what it may name.
        out: the output folder; without one and without a name there are no checkpoints.
        fresh: remove what an earlier run left there.
        writes: whether this process is the one that writes.

    Raises:
        OptionError: another run uses the folder, or it is none.
    """
    named = training.checkpoint is not None
    if not named and out is None:
        yield training
        return
    folder = Path(training.checkpoint) if training.checkpoint is not None else _beside(out)
    training = dataclasses.replace(training, checkpoint=folder)
    if not writes:
        yield training
        return
    with _locked(folder, keep=named):
        if not named:
            _remove(folder.glob(_HALF_WRITTEN))
        if fresh:
            _remove(_saved(folder))
        try:
            yield training
        except KeyboardInterrupt as error:
            if not _saved(folder):
                raise
            again = "the same command without --fresh" if fresh else "the same command"
            told = f"the training goes on from {folder} when {again} is run again"
            raise KeyboardInterrupt(told) from error
        if not named:
            _remove(_saved(folder))


def _beside(out: Path | None) -> Path:
    assert out is not None
    whole = Path(os.path.abspath(out))
    place = whole.with_name(f"{whole.name}.training")
    return out.with_name(place.name) if out.name == whole.name else place  # as it was written, unless that is `.`


@contextlib.contextmanager
def _locked(folder: Path, *, keep: bool) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go of it however this process ends.

    Args:
        folder: it is made when missing, and goes when it is empty at the end.
        keep: whether it stays then, if it was there.
    """
    made = [p for p in (folder, *folder.absolute().parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        problem = f"{folder}: cannot hold checkpoints ({error.strerror}); name another --checkpoint"
        raise ir.OptionError(problem) from error
    try:
        _take(lock, folder)
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of the first that is not empty: there are checkpoints, or an output
                for place in made or ([] if keep else [folder]):
                    place.rmdir()
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    """Lock the file and write this process's number into it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = os.read(lock, 20).decode(errors="replace").strip() or "of another run"
        raise ir.OptionError(
            f"{folder}: process {other} trains there now; wait for it, or name another --checkpoint"
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())


def _saved(folder: Path) -> list[Path]:
    """The checkpoints of a folder."""
    return sorted(folder.glob("training-*.safetensors"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
