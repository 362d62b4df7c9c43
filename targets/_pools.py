"""Which thread calls a function whose loops run on several: TVM makes a pool for each caller, and never ends one.

A program that answers each request in a thread of its own would gain a pool with each of them, a megabyte and its
threads; and a forked process has its parent's pools without their threads, and would wait for them for ever. So some
threads that call first have pools of their own; for others, and where a pool is the parent's, threads that stay call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeAlias

# How many threads, on which cores.
_Wanted: TypeAlias = tuple[int, set[int]]

# Threads that get pools of their own, beside the main thread: handing a call over takes about 10 microseconds, which
# the workers of a server should not pay. A pool of 2 takes 1.1 MB (what /proc/self/statm gained with each new caller).
_MOST = 8
# A pool of as many threads as are asked for, which may run on all of the cores given. TVM's other ways to ask give at
# most half of the cores.
_SHARE_ALL_CORES = -3
# What a pool of this thread was told whose threads stayed behind, in the parent of a forked process.
_LOST = object()


class Pools:
    """The pools of a process."""

    def __init__(self) -> None:
        """Begin without any."""
        # `told`: what this thread's pool was told last, or `_LOST`.
        self._mine = threading.local()
        self._forget()
        os.register_at_fork(after_in_child=self._after_fork)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._left = _MOST
        self._executor: futures.Executor | None = None

    def _after_fork(self) -> None:
        self._forget()
        if hasattr(self._mine, "told"):
            self._mine.told = _LOST

    def bound(self, ffi: Any, threads: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its loops on so many threads on the cores that its caller may use."""
        mine, cores = self._mine, os.sched_getaffinity

        def told(wanted: _Wanted, *arguments: Any) -> Any:
            self._tell(ffi, wanted)
            return function(*arguments)

        def call(*arguments: Any) -> Any:
            wanted = threads, cores(0)
            if getattr(mine, "told", None) == wanted:  # small models run for some microseconds
                return function(*arguments)
            if self._has_own():
                return told(wanted, *arguments)
            future = self._callers().submit(told, wanted, *arguments)
            try:
                return future.result()
            finally:
                # Who interrupts this thread shall not get at memory that is still written.
                futures.wait([future])

        return call

    def set(self, ffi: Any, threads: int) -> None:
        """Let this thread's pool have so many threads, for functions that are not bound."""
        self._tell(ffi, (threads, os.sched_getaffinity(0)))

    def _has_own(self) -> bool:
        """Whether this thread has a pool of its own, or may make one."""
        if hasattr(self._mine, "told"):
            return self._mine.told is not _LOST
        if threading.current_thread() is threading.main_thread():
            return True
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _tell(self, ffi: Any, wanted: _Wanted) -> None:
        """Tell this thread's pool its size where the last artefact wanted another: telling takes long."""
        if getattr(self._mine, "told", None) != wanted:
            cores = ffi.convert([str(core) for core in sorted(wanted[1])])
            ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, wanted[0], cores)
            self._mine.told = wanted

    def _callers(self) -> futures.Executor:
        """The threads that stay: as many as could run at once."""
        with self._lock:
            if self._executor is None:
                self._executor = futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mc-opt")
            return self._executor


POOLS = Pools()
