"""The kernel tests once more, for ARM under qemu: the same cases for another machine's tiles and vectors."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.targets import (
    _kernels,
    test_kernels_conv,
    test_kernels_gemm,
    test_kernels_kron,
    test_kernels_resize,
    test_kernels_rows,
    test_open,
)

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.tvm, pytest.mark.zig]

# What `make test` runs of them; that a test is part of it on x86 says nothing here.
IN_CI = {
    "test_gemm",
    "test_transposed_convolution",
    "test_residual_is_added_on_the_tile",
    "test_threads_share_a_small_convolution",
    "test_every_consumer_takes_a_packed_weight",
    "test_recurrent_initial_state_and_clip",
    "test_softmax",
}


def _on_arm(test: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a test without the cases of another processor, and with its own place in `make test`."""
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    marks = [_cases(mark) if mark.name == "parametrize" else mark for mark in getattr(test, "pytestmark", [])]
    kept = [mark for mark in marks if mark.name != "ci"]
    own = [pytest.mark.ci.mark] if test.__name__ in IN_CI else []
    copy.__dict__.update(test.__dict__, pytestmark=[*kept, *own])
    return copy


def _cases(mark: pytest.Mark) -> pytest.Mark:
    names, values = mark.args
    cases = [value.values[0] if hasattr(value, "marks") else value for value in values]  # `sampled` marks single ones
    if names == "cpu":
        cases = [cpu for cpu in cases if cpu == "native"]
    return pytest.mark.parametrize(names, cases, **mark.kwargs).mark


def _tests() -> Iterator[Callable[..., Any]]:
    for module in (test_kernels_conv, test_kernels_gemm, test_kernels_kron, test_kernels_resize, test_kernels_rows):
        yield from (t for n, t in vars(module).items() if n.startswith("test_") and not n.endswith("_on_avx2"))
    yield test_open.test_a_block_of_a_transformer
    yield test_open.test_a_small_network_for_pictures
    yield test_open.test_reductions_and_softmax_along_open_axes


globals().update({test.__name__: _on_arm(test) for test in _tests()})


@pytest.fixture(autouse=True)
def _arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU", "cortex-a72")
