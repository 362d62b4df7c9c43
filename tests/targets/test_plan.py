from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt.targets import _plan
from mc_opt.targets._plan import Lifetime


def lifetimes() -> st.SearchStrategy[list[Lifetime]]:
    one = st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(0, 5000),
        st.integers(0, 30),
        st.integers(0, 10),
    )
    return st.lists(one, max_size=40)


def rounded(size: int) -> int:
    return -(-size // 64) * 64


def alive(lives: list[Lifetime]) -> int:
    """The definition, step by step."""
    steps = range(max((x.last for x in lives), default=0) + 1)
    return max(sum(rounded(x.size) for x in lives if x.first <= step <= x.last) for step in steps)


@settings(deadline=None)  # the machine may be busy
@given(lifetimes())
def test_what_lives_together_never_overlaps(lives: list[Lifetime]) -> None:
    plan = _plan.plan(lives)
    assert len(plan.offsets) == len(lives)
    for k, (a, at) in enumerate(zip(lives, plan.offsets, strict=True)):
        assert at >= 0 and at % 64 == 0 and at + a.size <= plan.size
        for b, there in zip(lives[:k], plan.offsets, strict=False):
            if a.first <= b.last and b.first <= a.last:
                assert at + a.size <= there or there + b.size <= at, (a, at, b, there)


@settings(deadline=None)  # the machine may be busy
@given(lifetimes())
def test_the_bound_is_the_busiest_step(lives: list[Lifetime]) -> None:
    plan = _plan.plan(lives)
    assert plan.bound == alive(lives) <= plan.size <= sum(rounded(x.size) for x in lives)


@settings(deadline=None)  # the machine may be busy
@given(lifetimes())
def test_the_same_lifetimes_give_the_same_plan(lives: list[Lifetime]) -> None:
    assert _plan.plan(lives) == _plan.plan(list(lives))


def test_a_chain_needs_two_buffers() -> None:
    """Each tensor dies where the next one is done: even and odd ones share a place."""
    plan = _plan.plan([Lifetime(1000, k, k + 1) for k in range(20)])
    assert plan.size == plan.bound == 2 * 1024
    assert plan.offsets == (0, 1024) * 10


def test_a_residual_keeps_its_place() -> None:
    plan = _plan.plan([Lifetime(640, 0, 3), Lifetime(640, 1, 2), Lifetime(640, 2, 3), Lifetime(640, 3, 4)])
    assert plan.size == plan.bound == 3 * 640


def test_nothing_needs_nothing() -> None:
    assert _plan.plan([]) == _plan.Plan((), 0, 0)
