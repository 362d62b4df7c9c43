"""A system call refused to one thread, as a sandbox does."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
# Linux's classic BPF: load the number of the call; if it is the one, answer EPERM, else go on.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_EPERM, _GO_ON = 0x00050001, 0x7FFF0000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def refused(number: int, call: Callable[[], Result]) -> Result:
    """What a call returns in a thread of its own, to which the system call of this number is refused."""
    results: list[Result | BaseException] = []

    def run() -> None:
        try:
            _refuse(number)
            results.append(call())
        except BaseException as error:  # told in the caller's thread
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _refuse(number: int) -> None:
    steps = [(_LOAD, 0, 0, 0), (_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _GO_ON)]
    held = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), ctypes.addressof(held))
    for option, *values in ((_SET_NO_NEW_PRIVILEGES, 1), (_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(option, *values, *[0] * (4 - len(values))):
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    assert libc.syscall(number, 0, 0, 0) == -1 and ctypes.get_errno() == 1
