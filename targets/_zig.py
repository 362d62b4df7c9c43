"""The C compiler and linker of the `ziglang` package: no compiler on the system is needed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

from mc_opt.ir import LimitError


def run(*words: str, cache: Path, folder: Path | None = None) -> None:
    """Run `zig WORDS` in `folder`.

    Its caches go into `cache`: the home folder may be read-only, and nothing is left behind.

    Raises:
        LimitError: the disk is full, or the system ended the tool, which it does when memory is out.
        RuntimeError: the tool refuses its input, which is a mistake of ours.
    """
    places = {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    command = ["env", *(f"{name}={place}" for name, place in places.items()), sys.executable, "-P", "-m", "ziglang"]
    done = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, errors="replace")
    if not done.returncode:
        return
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    full = next((line for line in said if os.strerror(errno.ENOSPC) in line), None)
    if full is not None:
        raise LimitError(f"{full}; free some space, or write to another disk")
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise LimitError(f"zig {words[0]} was killed: memory ran out; build on a machine with more")
    named = [line for line in said if "error" in line] or said or ["it said nothing"]
    raise RuntimeError(f"zig {words[0]} failed: {named[0]}")
