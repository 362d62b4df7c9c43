"""How work is split among threads: into shares of equal size, and not at all where starting threads costs more."""

from __future__ import annotations

from collections.abc import Sequence

from mc_opt.targets._machine import Machine

# Nanoseconds that one thread must take before a second one helps: TVM's pool starts and joins threads in two
# microseconds (measured while it spins, two threads).
_WORTH = 8000
# Work of one kind in a nanosecond: multiply-adds of register tiles, of channelwise windows and of weights that are read
# for one product only; elements that are moved.
SUMS, TAPS, WEIGHTS, ELEMENTS = 80, 30, 30, 4
# A share may be so much larger than the mean of all.
EVEN = 0.94


def threads(nanoseconds: float, machine: Machine) -> int:
    """The threads for work that one would do in so much time."""
    return machine.threads if nanoseconds >= _WORTH else 1


def evenness(length: int, shares: int) -> float:
    """The mean share of `length` pieces to the largest one."""
    return length / (-(-length // shares) * shares) if length else 1.0


def depth(extents: Sequence[int], shares: int) -> int:
    """How many of the outermost loops to fuse so that shares come out even, or as even as they can be."""
    best, found, count = 0.0, 0, 1
    for k, extent in enumerate(extents):
        count *= extent
        even = evenness(count, shares) if count > 1 else 0.0
        if even > best:
            best, found = even, k + 1
        if best >= EVEN:
            break
    return found
