"""Writing files so that a reader sees the whole old state or the whole new one, never half of it.

What is promised, on a local file system:

- `write_bytes` and `write_text` write beside the destination, fsync, and rename. A crash, an exception or
  Ctrl-C leaves the old file (or none); the temporary one is removed, by us or, after a kill that nobody can
  catch, by hand: its name starts with `.mc-opt-`.
- `staged_files` does the same for files that belong together; each is replaced atomically, one after the other.
- `staged_folder` builds a whole output folder out of sight. When the destination is new, empty or holds
  nothing but an earlier output of ours, the swap is one rename (two, when there was an earlier output:
  between them the name is missing for a moment, and a failure puts the old folder back).
- When the destination holds anything foreign, or cannot be renamed (a mount point, `.`), our entries are
  replaced one at a time, each atomically, and what is not ours stays untouched.
- Ctrl-C and SIGTERM wait while a swap is under way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from mc_opt.ir.errors import LimitError, OptionError

PREFIX = ".mc-opt-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FolderError(OptionError, PermissionError):
    """The place to write to cannot be written: read-only, a file where a folder should be, or another's."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    path = Path(path)
    with staged_files(path.parent) as stage:
        (stage / path.name).write_bytes(data)


@contextlib.contextmanager
def staged_files(folder: str | os.PathLike[str], *, last: str | None = None) -> Iterator[Path]:
    """A place out of sight whose files take their names in `folder` when the block ends well.

    Args:
        folder: where the files go; it is made when missing.
        last: the file to put in place last, the one that refers to the others.

    Raises:
        FolderError: the folder cannot be written.
        LimitError: the disk is full.
    """
    folder = Path(os.path.abspath(folder))
    with _explained(folder):
        made = _make_parents(folder)
        stage = None
        try:
            stage = _make_place(folder)
            yield stage
            _sync_tree(stage)
            with _undisturbed():
                for file in sorted(stage.iterdir(), key=lambda f: (f.name == last, f.name)):
                    os.replace(file, folder / file.name)
                made = []
                _sync_folder(folder)
        finally:
            _clear(stage, made)


@contextlib.contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder out of sight whose content becomes the folder `out` when the block ends well.

    Raises:
        FolderError: `out` is a file, or it or its parent cannot be written.
        LimitError: the disk is full.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        made = _make_parents(out.parent)
        stage = None
        try:
            stage = _make_stage(out)
            yield stage
            _sync_tree(stage)
            with _undisturbed():
                _swap(stage, out)
                made = []
        finally:
            _clear(stage, made)


def ours(folder: Path) -> bool:
    """Whether `folder` holds nothing but what an earlier run wrote, so that it can be replaced whole.

    An output folder is known by its `report.json`, a target's folder in it by its `manifest.json`, and the
    dumped texts by the folder `ir` with nothing but `.txt` files.
    """
    entries = list(folder.iterdir())
    if not entries:
        return True
    files = {"model.onnx", "model.onnx.data", "report.json", "timings.json", "tune-table.json"}
    return (folder / "report.json").is_file() and all(
        _is_product_folder(e) if e.is_dir() and not e.is_symlink() else e.name in files for e in entries
    )


def _is_product_folder(folder: Path) -> bool:
    entries = list(folder.iterdir())
    if any(e.is_dir() for e in entries):
        return False
    if folder.name == "ir":
        return all(e.suffix == ".txt" for e in entries)
    return any(e.name == "manifest.json" for e in entries)


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder`; what had to be made, innermost first."""
    missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _make_stage(out: Path) -> Path:
    """The stage of a folder, on its file system."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file", str(out))
    if out.is_dir() and not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))
    inside = out.is_dir() and (os.path.ismount(out) or out.is_symlink() or not os.access(out.parent, os.W_OK))
    stage = _make_place(out if inside else out.parent)
    stage.chmod(0o777 & ~_umask())
    return stage


def _make_place(folder: Path) -> Path:
    """A new folder out of sight in `folder`."""
    try:
        return Path(tempfile.mkdtemp(dir=folder, prefix=PREFIX))
    except OSError as error:  # told of the folder that was asked for; /proc says of any new name that it is not there
        code = errno.EACCES if error.errno in (None, errno.ENOENT) else error.errno
        raise OSError(code, os.strerror(code), str(folder)) from error


def _clear(stage: Path | None, made: list[Path]) -> None:
    if stage is not None:
        shutil.rmtree(stage, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):  # somebody else put something there meanwhile
            folder.rmdir()


def _swap(stage: Path, out: Path) -> None:
    if not out.exists():
        os.rename(stage, out)
        _sync_folder(out.parent)
        return
    if stage.parent == out or out == Path.cwd() or not ours(out):
        _merge(stage, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=PREFIX))
    os.rename(out, old / out.name)
    try:
        os.rename(stage, out)
    except BaseException:
        os.rename(old / out.name, out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(out.parent)


def _merge(stage: Path, out: Path) -> None:
    """Move every entry of `stage` into `out`, over the entry of that name; foreign entries stay."""
    earlier = (out / "report.json").is_file()  # only then is anything in `out` an output of ours
    produced = {e.name for e in stage.iterdir()}
    stale = [e for e in out.iterdir() if earlier and e.name not in produced and e != stage and _is_stale(e)]
    for entry in sorted(stage.iterdir(), key=lambda e: (e.name == "model.onnx", e.name)):  # after its data
        destination = out / entry.name
        if not entry.is_dir() or not destination.is_dir():
            os.replace(entry, destination)
        elif _is_product_folder(destination):
            _replace_folder(entry, destination)
        else:
            _merge(entry, destination)
    for entry in stale:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    _sync_folder(out)


def _is_stale(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return (entry / "manifest.json").is_file() and _is_product_folder(entry)
    return entry.name in ("model.onnx.data", "tune-table.json")


def _replace_folder(new: Path, old: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=PREFIX))
    try:
        os.rename(old, aside / old.name)
        os.rename(new, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one line that says what to do."""
    try:
        yield
    except (FolderError, LimitError):
        raise
    except OSError as error:
        where = error.filename or path
        if error.errno in _FULL:
            raise LimitError(
                f"{path}: cannot be written ({error.strerror}); nothing was left behind; free some space, or "
                "write to another disk"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST) or isinstance(error, NotADirectoryError):
            raise FolderError(f"{where}: is a file, a folder was expected; name another folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise FolderError(
                f"{where}: cannot be written ({error.strerror}); name a folder you may write to"
            ) from error
        if Path(where) == path or Path(where) in path.parents:
            raise FolderError(f"{where}: cannot be made ({error.strerror}); name another folder") from error
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for the moment that a swap takes."""
    if threading.current_thread() is not threading.main_thread():  # only there do Python's handlers run
        yield
        return
    held: list[int] = []
    # Blocking the signals would not do: the system gives them to any thread, numpy's included.
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    ours = {s: handler for s, handler in before.items() if handler is not None}
    for waiting in ours:
        signal.signal(waiting, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for waiting, handler in ours.items():
            signal.signal(waiting, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _umask() -> int:
    """The process's file mask; Linux tells it without changing it."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(stage: Path) -> None:
    for folder, _, files in os.walk(stage):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(folder))
