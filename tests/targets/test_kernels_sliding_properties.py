"""Convolutions, poolings and products of any shape, by any number of threads, with both instruction sets."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mc_opt.targets.kernels import _split
from tests.targets._kernels import check, normal

pytestmark = [pytest.mark.tvm, pytest.mark.slow]

CPUS = ["native", "x86-64-v3"]
SETTINGS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], str]:
    """The size of an image, a kernel that fits into it with its padding, and the attributes of the window."""
    size = (draw(st.integers(1, 23)), draw(st.integers(1, 37)))
    kernel, strides, dilations = ((draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (5, 3, 2))
    before, after = ([draw(st.integers(0, k - 1)) for k in kernel] for _ in range(2))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    assume(all(n + b + a >= r for n, b, a, r in zip(size, before, after, reach, strict=True)))
    attributes = f"strides={list(strides)}, dilations={list(dilations)}, pads={[*before, *after]}"
    return size, kernel, attributes


@given(
    window=windows(),
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 1, 2, 4]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 70),
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("cpu", CPUS)
@SETTINGS
def test_convolutions(cpu, window, images, groups, inputs, outputs, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    (height, width), kernel, attributes = window
    c, o = inputs * groups, outputs * groups
    text = f"""g (float[{images},{c},{height},{width}] x) => (float[a,b,c,d] y)
        {{ s = Conv<group={groups}, {attributes}>(x, w, b)  y = Relu(s) }}"""
    check(text, {"w": normal(o, inputs, *kernel), "b": normal(o, seed=1)}, threads=threads, cpu=cpu)


@given(window=windows(), images=st.integers(1, 2), channels=st.integers(1, 70), threads=st.integers(1, 3))
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kind", ["depthwise", "MaxPool", "AveragePool"])
@SETTINGS
def test_channelwise_windows(kind, cpu, window, images, channels, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    (height, width), kernel, attributes = window
    weights = {"w": normal(channels, 1, *kernel)} if kind == "depthwise" else {}
    node = f"Conv<group={channels}, {attributes}>(x, w)"
    if kind != "depthwise":
        node = f"{kind}<kernel_shape={list(kernel)}, {attributes}>(x)"
    text = f"g (float[{images},{channels},{height},{width}] x) => (float[a,b,c,d] y) {{ s = {node}  y = Relu(s) }}"
    check(text, weights, threads=threads, cpu=cpu)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 70),
    depth=st.integers(1, 300),
    columns=st.integers(1, 200),
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("cpu", CPUS)
@SETTINGS
def test_products(cpu, lead, rows, depth, columns, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    shape = ",".join(map(str, [*lead, rows, depth]))
    out = ",".join("abcd"[: len(lead) + 2])
    text = f"g (float[{shape}] x) => (float[{out}] y) {{ p = MatMul(x, w)  s = Add(p, b)  y = Relu(s) }}"
    check(text, {"w": normal(depth, columns), "b": normal(columns, seed=1)}, threads=threads, cpu=cpu)
