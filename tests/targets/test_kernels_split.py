"""What threads share: long kernels, and shorter ones beside them, but no model that consists of short ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mc_opt.targets._build import fuse, llvm_target
from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _schedule, _split
from tests.targets._kernels import feeds, lowered_model, machine, model, normal, running


def _threads(count: int) -> Machine:
    return dataclasses.replace(machine(), threads=count)


def _chain(*kinds: str) -> tuple[str, dict[str, np.ndarray]]:
    """Convolutions with windows of 3 by 3 in a row, each of a kind."""
    channels = {"short": 16, "middle": 32, "long": 96}
    before, lines, weights = 16, [], {}
    for k, kind in enumerate(kinds):
        after = channels[kind]
        weights[f"w{k}"] = normal(after, before, 3, 3)
        result = "y" if k + 1 == len(kinds) else f"x{k + 1}"
        lines.append(f"c{k} = Conv<pads=[1,1,1,1]>(x{k}, w{k})  {result} = Relu(c{k})")
        before = after
    head = f"g (float[1,16,14,14] x0) => (float[1,{before},14,14] y)"
    return f"{head} {{ {'  '.join(lines)} }}", weights


def _split_kernels(*kinds: str) -> int:
    """How many kernels start threads."""
    text, weights = _chain(*kinds)
    lowered = lowered_model(model(text, weights), _threads(2))
    with llvm_target(_threads(2)):
        module, notes = _schedule.schedule(fuse(lowered.module), _threads(2))
    assert notes == []
    return sum("T.parallel" in f.script() for v, f in module.functions.items() if v.name_hint != "main")


def test_a_model_of_short_kernels_is_not_split_and_a_short_kernel_beside_long_ones_is():
    # About 6, 11 and 34 or 68 microseconds: 8 are long enough beside 32.
    assert _split_kernels("middle", "middle") == 0
    assert _split_kernels("short", "middle", "long") == 2


def test_threads_pay_where_most_of_the_time_is_in_kernels_that_are_long_enough():
    short, long = _split._WORTH, _split._ALONE * _split._WORTH
    assert not _split.pays([long], _threads(1))
    assert _split.pays([long], _threads(2))
    assert not _split.pays([long - 1], _threads(2))
    assert _split.pays([long, *[short] * 4], _threads(2))
    assert not _split.pays([long, *[short] * 5], _threads(2))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kinds", [("middle",), ("middle", "long")])
def test_bits_are_those_of_one_thread_on_both_sides_of_the_threshold(kinds):
    proto = model(*_chain(*kinds))
    results = []
    for count in (1, 2):
        with running(proto, _threads(count)) as (run, _):
            results.append(run(list(feeds(proto).values())))
    np.testing.assert_array_equal(*results)
