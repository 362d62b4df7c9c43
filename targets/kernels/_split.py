"""How work is split among threads: into shares of equal size, and not at all where starting threads costs more."""

from __future__ import annotations

from collections.abc import Sequence

from mc_opt.targets._machine import Machine

# Nanoseconds that one thread must take before a second one helps. TVM's pool starts and joins threads in 600 while they
# spin, which they do for some 50 ms, and in 5 to 10 thousand when they sleep. The rest is for what the other core has
# written: a core reads 16 KiB of that in 1700 (all measured on two cores of a Sapphire Rapids).
_WORTH = 8000
# Work of one kind in a nanosecond: multiply-adds of register tiles, of channelwise windows and of weights that are read
# for one product only; elements that are moved.
SUMS, TAPS, WEIGHTS, ELEMENTS = 80, 45, 30, 4
# So many times as long must a kernel be to be worth a second thread by itself: what it reads and writes then moves
# between cores, at 10 to 20 bytes in a nanosecond, unless the kernels around it are split as it is.
_ALONE = 4
# Bytes in a nanosecond that one core reads of what lies beyond its caches (measured of blocks of 256 MiB), and the
# multiply-adds that it does meanwhile with a float32.
_READ = 15
_USES = SUMS * 4 / _READ
# Multiply-adds for a packed weight that make it 5 % longer when two threads decode all of it, each 12 numbers in a
# nanosecond, instead of half.
_DECODED = SUMS / 12 / 2 / 0.05
# A share may be so much larger than the mean of all.
EVEN = 0.94


def threads(nanoseconds: float, machine: Machine) -> int:
    """The threads for work that one would do in so much time."""
    return machine.threads if nanoseconds >= _WORTH else 1


def pays(kernels: Sequence[float], machine: Machine) -> bool:
    """Whether to split kernels that take so many nanoseconds each: not where most of the time goes into short ones.

    Too many of their neighbours are too short for threads; what one core has made, the others would have to fetch.
    """
    long = sum(k for k in kernels if k >= _ALONE * _WORTH)
    return machine.threads > 1 and 2 * long >= sum(kernels)


def evenness(length: int, shares: int) -> float:
    """The mean share of `length` pieces to the largest one."""
    return length / (-(-length // shares) * shares) if length else 1.0


def by_positions(rows: int, width: int, others: int, shares: int, *, decoded: bool = False) -> bool:
    """Whether threads divide the positions of a product, all reading its large weight, and not the weight's columns.

    Columns would leave half of the input, and of what the next kernel reads, in the caches of the other cores, whence
    it comes at a tenth of the speed of a core's own. Weights are in none, and come while others are multiplied, as
    long as a thread has positions enough to use each of them for, and more where each thread decodes it first; `rows`
    or `width` are what is divided.
    """
    even = max(evenness(rows, shares), evenness(width, shares)) >= EVEN
    return even and rows * width * others >= max(_USES, _DECODED if decoded else 0) * shares


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
