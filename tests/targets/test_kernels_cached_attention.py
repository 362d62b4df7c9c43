"""Attention over a cache, and states that kernels write in place."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
import tvm
from tvm import relax

from mc_opt.targets._build import _pipeline, fuse, llvm_target
from mc_opt.targets._relax import intrinsics, lower
from mc_opt.targets.kernels import _schedule
from tests._harness import sampled
from tests.targets._kernels import _register, check, compare, feeds, machine, model, running

pytestmark = pytest.mark.tvm

# (batch, heads, length, size, heads of the cache, positions of the cache)
SHAPES = {"step": (1, 6, 1, 8, 2, 9), "prompt": (1, 4, 5, 8, 2, 9), "wide": (2, 6, 3, 80, 3, 70)}
MORE = {"five share": (1, 5, 3, 64, 1, 40), "seven lanes": (1, 6, 2, 7, 2, 9), "alone": (1, 6, 1, 64, 6, 33)}


def _text(b, h, t, s, g, m):
    cache = f"float[{b},{g},{m},{s}]"
    return f"""g (float[{b},{h},{t},{s}] q, {cache} k, {cache} v, int64[{t}] p) => (float[d0,d1,d2,d3] y)
        {{ y = mc_opt.CachedAttention(q, k, v, p) }}"""


def _check(shape, cpu):
    """Near the beginning of the cache, and up to its end."""
    proto = model(_text(*shape))
    inputs = feeds(proto)
    length, room = shape[2], shape[5]
    with running(proto, machine(cpu)) as (run, notes):
        compare(proto, run, inputs)
        compare(proto, run, inputs | {"p": np.arange(room - length, room)})
    assert notes == []


@pytest.mark.parametrize("cpu", ["native", "x86-64-v3", "cuda"])
@pytest.mark.parametrize("name", sampled(SHAPES, ["step"]))
def test_attention(name, cpu):
    _check(SHAPES[name], cpu)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("cpu", ["native", "x86-64-v3"])
@pytest.mark.parametrize("name", MORE)
def test_attention_of_other_heads(name, cpu):
    _check(MORE[name], cpu)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_any_length(threads):
    check(_text(1, 6, "t", 24, 2, 40), sizes=[{"t": t} for t in (1, 3, 7)], threads=threads)


def test_scatter_nd_of_any_length():
    text = """g (float[3,9,5] x, int64[t,2] at, float[t,5] u) => (float[3,9,5] y) { y = ScatterND(x, at, u) }"""
    check(text, sizes=[{"t": t} for t in (1, 3)])


def test_a_state_is_written_in_place():
    """Of two states the one that something else reads is copied."""
    proto = model("""g (float[1,6,3] old, float[1,6,3] read, int64[1,2,2] at, float[1,2,3] u)
        => (float[1,6,3] new, float[1,6,3] other, float[1,6,3] y)
        { new = ScatterND(old, at, u) other = ScatterND(read, at, u) y = Neg(read) }""")
    held = onnx_ir.from_proto(proto)
    _register()
    lowered = lower.lower(held, machine(), lambda *_: None, states={"new": "old", "other": "read"})
    with llvm_target(machine()) as llvm:
        module, _ = _schedule.schedule(fuse(lowered.module), machine())
        made = tvm.compile(module, target=llvm, relax_pipeline=_pipeline(), tir_pipeline=intrinsics.PIPELINE)
    rng = np.random.default_rng(0)
    x, u = rng.standard_normal((1, 6, 3)).astype(np.float32), rng.standard_normal((1, 2, 3)).astype(np.float32)
    at = np.array([[[0, 4], [0, -5]]])
    old, read = (tvm.runtime.tensor(x) for _ in range(2))
    new, other, y = relax.VirtualMachine(made, tvm.cpu())["main"](old, read, *map(tvm.runtime.tensor, (at, u)))
    wanted = x.copy()
    wanted[0, 4], wanted[0, 1] = u[0]
    for array in (new, old, other):
        np.testing.assert_array_equal(array.numpy(), wanted)
    np.testing.assert_array_equal(read.numpy(), x)
    np.testing.assert_array_equal(y.numpy(), -x)
