"""Which kernels in a row run as one: what follows from their sizes."""

from __future__ import annotations

import dataclasses

import pytest

from mc_opt.targets._row_blocks import Part, held, joined

CACHE = 1 << 20


def part(channels, depth, *, size=56, span=1, stride=1):
    taps, is_depthwise = span**2, depth == 0
    steps = size * size * channels * taps * max(depth, 1)
    weights = 4 * channels * taps * max(depth, 1)
    return Part(size, size, channels, span, stride, span // 2, weights, steps, is_depthwise, 4)


BLOCK = [part(134, 64), part(134, 0, span=3), part(64, 134)]


def cuts(parts, **more):
    return [(cut.first, cut.last) for cut in joined(parts, **{"cache": CACHE, "lanes": 16} | more)]


def test_a_block_whose_tensors_leave_the_cache_is_joined():
    assert cuts(BLOCK) == [(0, 3)]


@pytest.mark.parametrize(
    "parts",
    [
        [part(134, 64, size=7), part(134, 0, size=7, span=3), part(64, 134, size=7)],  # the cache holds all
        [part(2048, 2048), part(2048, 0, span=3), part(2048, 2048)],  # weights do not fit beside rows
        BLOCK[:1],
    ],
)
def test_others_stay_apart(parts):
    assert cuts(parts) == []


def test_no_cache_is_known():
    assert cuts(BLOCK, cache=0) == []


def test_rows_are_not_computed_twice():
    # Two windows in one kernel: the rows of the first would be made anew for each block of the second.
    two = [*BLOCK, part(134, 64), part(134, 0, span=3), part(64, 134)]
    assert cuts(two) == [(0, 3), (3, 6)]


def test_a_block_divides_the_rows_and_fits():
    for lanes in (4, 8, 16):
        (cut,) = joined(BLOCK, cache=CACHE, lanes=lanes)
        assert 56 % cut.high == 0 and cut.high < 56
        assert held(BLOCK, cut.high, lanes) + sum(p.weights for p in BLOCK) <= CACHE


def test_threads_get_blocks_of_equal_number():
    (cut,) = joined(BLOCK, cache=CACHE, lanes=16, threads=2)
    assert 56 // cut.high % 2 == 0
    odd = [dataclasses.replace(p, rows=55) for p in BLOCK]
    assert all(cut.nanoseconds > 0 for cut in joined(odd, cache=CACHE, lanes=16, threads=2))


def test_what_is_joined_for_one_image_is_for_more():
    for count in (2, 16):
        more = [dataclasses.replace(p, images=count, steps=count * p.steps) for p in BLOCK]
        assert cuts(more) == cuts(BLOCK)
    # Whose images are shared out have all of their blocks.
    (cut,) = joined(more, cache=CACHE, lanes=16, threads=2)
    assert cut.high == joined(more, cache=CACHE, lanes=16)[0].high
