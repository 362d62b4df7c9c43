"""Writing one large file from blocks: past the page cache where the file system allows it, hashed on the way."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

_BUFFER = 8 << 20  # a multiple of every disk's block; two of them are the memory that a file of any size takes


def write_blocks(
    path: Path, blocks: Iterable[memoryview], *, progress: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Write `blocks` one after the other; the bytes written and their SHA-256.

    Direct writes (O_DIRECT) leave no dirty pages: the kernel neither slows the writer down once many are pending
    nor drops other files from memory, and nothing is left to wait for at the fsync.

    Args:
        path: the new file.
        blocks: bytes, of any lengths.
        progress: called with the bytes written so far.
    """
    digest, size = hashlib.sha256(), 0
    descriptor, direct = _open(path)
    try:
        with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
            pending: list[Future[None]] = []
            for buffer, used in _buffers(blocks):
                for job in pending:  # the buffer before this one is free again, and errors come up here
                    job.result()
                filled = memoryview(buffer)[:used]
                if direct and used % mmap.PAGESIZE:
                    _leave_direct(descriptor)
                pending = [hasher.submit(digest.update, filled), writer.submit(_write, descriptor, filled, size)]
                size += used
                if progress is not None:
                    progress(size)
            for job in pending:
                job.result()
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666), hasattr(os, "O_DIRECT")
    except OSError:  # some file systems refuse the flag; others fail for a reason that comes up again
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o666), False


def _leave_direct(descriptor: int) -> None:
    """Only whole pages can be written directly; the end of a file goes the ordinary way."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _buffers(blocks: Iterable[memoryview]) -> Iterator[tuple[mmap.mmap, int]]:
    """The blocks as a stream of full buffers, aligned to pages; two buffers take turns, the last may be part full."""
    turn, used = 0, 0
    buffers = (mmap.mmap(-1, _BUFFER), mmap.mmap(-1, _BUFFER))
    for block in blocks:
        source = np.frombuffer(block, np.uint8)
        while source.size:
            part = min(source.size, _BUFFER - used)
            np.frombuffer(buffers[turn], np.uint8)[used : used + part] = source[:part]
            source, used = source[part:], used + part
            if used == _BUFFER:
                yield buffers[turn], used
                turn, used = 1 - turn, 0
    if used:
        yield buffers[turn], used


def _write(descriptor: int, rest: memoryview, offset: int) -> None:
    while rest:  # a write may be short
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
