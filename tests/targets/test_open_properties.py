"""Any size: what was built once gives ONNX Runtime's numbers for sizes that hypothesis picks."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets import _kernels
from tests.targets._kernels import normal

pytestmark = [pytest.mark.tvm, pytest.mark.zig, pytest.mark.slow]

TEXTS = {
    "matmul": "g (float[b,s,24] x, float[b,24,s] w) => (float[b,s,s] y) { y = MatMul(x, w) }",
    "gemm": "g (float[b,40] x) => (float[b,33] y) { h = Gemm(x, m, c) y = Tanh(h) }",
    "conv": """g (float[b,5,9,7] x) => (float[b,6,5,4] y) {
        h = Conv<strides=[2,2], pads=[1,1,1,1]>(x, k) y = Relu(h) }""",
    "attention": """g (float[b,s,32] q, float[b,s,32] k, float[b,s] m) => (float[b,s,32] y) {
        heads = Constant<value_ints=[0,0,2,16]>() q4 = Reshape(q, heads) k4 = Reshape(k, heads)
        a = Transpose<perm=[0,2,1,3]>(q4) t = Transpose<perm=[0,2,3,1]>(k4) v = Transpose<perm=[0,2,1,3]>(k4)
        axes = Constant<value_ints=[1,2]>() mask = Unsqueeze(m, axes) p = MatMul(a, t) masked = Add(p, mask)
        w = Softmax<axis=-1>(masked) o = MatMul(w, v) back = Transpose<perm=[0,2,1,3]>(o)
        flat = Constant<value_ints=[0,0,32]>() y = Reshape(back, flat) }""",
    "softmax": "g (float[b,s] x) => (float[b,s] y, float[b,s] z) { y = Softmax(x) z = LogSoftmax<axis=0>(x) }",
    "norm": "g (float[b,s,19] x) => (float[b,s,19] y) { y = LayerNormalization(x, n, n) }",
    "reduce": """g (float[b,s,19] x) => (float[b,19] y, float[b,s,1] z, float[1,19] w) {
        one = Constant<value_ints=[1]>() two = Constant<value_ints=[2]>() both = Constant<value_ints=[0,1]>()
        y = ReduceMean<keepdims=0>(x, one) z = ReduceMax(x, two) w0 = ReduceSum<keepdims=0>(x, both)
        zero = Constant<value_ints=[0]>() w = Unsqueeze(w0, zero) }""",
}
WEIGHTS = {"m": normal(40, 33), "c": normal(33), "k": normal(6, 5, 3, 3), "n": normal(19)}


@functools.cache
def _built(name: str, threads: int) -> tuple[onnx.ModelProto, Any]:
    text = TEXTS[name]
    used = {key: array for key, array in WEIGHTS.items() if f", {key}" in text.partition("{")[2]}
    proto = _kernels.model(text, used)
    machine = dataclasses.replace(_kernels.machine(), threads=threads)
    run, _ = ExitStack().enter_context(_kernels.running(proto, machine))
    return proto, run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_any_size(name: str, threads: int) -> None:
    proto, run = _built(name, threads)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.integers(1, 9), st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 257])))
    def holds(batch: int, length: int) -> None:
        inputs = _kernels.feeds(proto, {"b": batch, "s": length})
        _kernels.compare(proto, run, {k: np.ascontiguousarray(v) for k, v in inputs.items()})

    holds()
