"""Products of packed weights with activations of 8 bits."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt.targets import _machine
from tests import _seccomp
from tests.targets._kernels import compare, feeds, machine, model, normal, reference, running
from tests.targets.test_kernels_gemm import packed
from tests.targets.test_kernels_lookup import GROUPED, powers, steps

pytestmark = pytest.mark.tvm

ARCH_PRCTL = 158
# Where levels that are far apart have bytes too: AVX-512 has none for them without VNNI.
HERE = "x86-64-v3" if "avx512f" in machine().features and "avx512vnni" not in machine().features else "native"
# Each has other instructions: AVX-512 VNNI with VBMI and without, AVX2, AVX-VNNI; this one has AMX maybe.
PROCESSORS = [
    cpu
    for cpu in (HERE, "icelake-server", "cascadelake", "x86-64-v3", "alderlake")
    if not _machine.missing(machine(cpu).features)
]


def on(cpu):
    """A processor that rounds activations."""
    return dataclasses.replace(machine(cpu), activations="int8")


def rounded(x):
    """x in 8 bits a row, and back: what `activations=int8` multiplies."""
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return (np.floor(x / step + np.float32(0.5)) * step).astype(np.float32)


def int8(rows, depth, columns, bits, *, tolerance=1e-5, cpu=HERE, **form):
    """A product with weights of ±1, ±2, .. is that of the rounded inputs; other levels are rounded too."""
    node, weights = packed((depth, columns), (1,), bits, **form)
    if tolerance == 1e-5 and bits <= 3:
        weights["book"] = powers(bits)
    elif tolerance == 1e-5:
        weights["book"] = np.arange(1 << bits).astype(np.float32) - (1 << (bits - 1))
    proto = model(f"g (float[{rows},{depth}] x) => (float[{rows},{columns}] y) {{ {node} y = MatMul(x, w) }}", weights)
    inputs = feeds(proto)
    wanted = reference(proto, {"x": rounded(inputs["x"])})[0]
    with running(proto, on(cpu)) as (run, notes):
        got = run(list(inputs.values()))[0]
        again = run(list(inputs.values()))[0]
    assert notes == []
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()
    assert got.tobytes() == again.tobytes()


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 67, 50), (5, 64, 16), (16, 301, 150), (41, 33, 70)])
@pytest.mark.slow
@pytest.mark.ci
def test_int8_activations(rows, depth, columns, bits):
    int8(rows, depth, columns, bits)
    int8(rows, depth, columns, bits, group=32, scale="groups")


def on_each(rows, depth, columns, bits, group, book):
    """The outputs of a product with a bias on each processor."""
    node, weights = packed((depth, columns), (1,), bits, group=group, scale="groups" if group else "rows")
    weights |= {"b": normal(columns)} | ({"book": book} if book is not None else {})
    shape = f"float[{rows},{depth}] x, float[{columns}] b"
    proto = model(f"g ({shape}) => (float[{rows},{columns}] y) {{ {node} y = Gemm(x, w, b) }}", weights)
    outputs = []
    for cpu in PROCESSORS:
        with running(proto, on(cpu)) as (run, notes):
            assert notes == []
            outputs.append(run(list(feeds(proto).values()))[0])
    return outputs


# Levels from -128 to 127, of which sums of two just fit in 16 bits; such that 8 and 64 of these do; levels in bytes.
SUMS = {"wide": (4, powers), "narrow": (4, lambda _: np.arange(16) - 8), "few": (1, powers), "bytes": (8, steps)}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "rows", "depth", "columns", "group"),
    [("wide", 1, 301, 50, 0), ("narrow", 41, 128, 40, 64), ("few", 1, 160, 16, 32), ("bytes", 3, 70, 20, 0)],
)
def test_int8_sums_are_those_of_every_processor(name, rows, depth, columns, group):
    bits, book = SUMS[name]
    first, *others = on_each(rows, depth, columns, bits, group, np.float32(book(bits)))
    assert first.any() and all(other.tobytes() == first.tobytes() for other in others)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("book", [powers(4), np.float32([64] + [-64] * 15)])
def test_int8_sums_of_the_largest_numbers_fit(book):
    # 127 · 128 twice, with either sign, in every pair of every column.
    node, weights = packed((256, 8), (1,), 4)
    weights["codes"].reshape(8, -1)[:] = 17 * np.array([0, 7, 8, 15] * 2)[:, None]
    proto = model(f"g (float[2,256] x) => (float[2,8] y) {{ {node} y = MatMul(x, w) }}", weights | {"book": book})
    x = np.float32([[1], [-1]]) * np.ones(256, np.float32)
    with running(proto, on("x86-64-v3")) as (run, _):
        got = run([x])[0]
    wanted = reference(proto, {"x": x})[0]
    assert np.abs(got - wanted).max() <= 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("rows", [1, 16])
def test_int8_rounds_levels_that_do_not_fit(rows):
    # Half of 1/127 of the largest level each, and sums of many.
    int8(rows, 301, 50, 4, group=32, scale="groups", tolerance=0.01)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 100), depth=st.integers(2, 200), columns=st.integers(1, 130), bits=st.integers(1, 8),
    group=st.sampled_from([0, 32, 64]), cpu=st.sampled_from(PROCESSORS),
)  # fmt: skip
def test_int8_products_of_any_size(rows, depth, columns, bits, group, cpu):
    int8(rows, depth, columns, bits, group=group, scale="groups" if group else "rows", cpu=cpu)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 50), depth=st.integers(2, 200), columns=st.integers(1, 80), bits=st.integers(1, 8),
    group=st.sampled_from([0, 32, 64]), book=st.sampled_from([None, steps, powers]),
)  # fmt: skip
def test_int8_sums_of_any_size_are_those_of_every_processor(rows, depth, columns, bits, group, book):
    made = book(bits) if book is steps or (book and bits <= 4) else None
    first, *others = on_each(rows, depth, columns, bits, group, made)
    # Which widths have the step of even levels in their scales differs: one rounding.
    most = 1e-6 * np.abs(first).max() if book is steps else 0
    assert all(np.abs(other - first).max() <= most for other in others)


def test_int8_of_zeros_and_of_a_row_beside_a_large_one():
    node, weights = packed((64, 16), (1,), 2)
    weights["book"] = np.array([1, 2, -1, -2], np.float32)
    proto = model(f"g (float[2,64] x) => (float[2,16] y) {{ {node} y = MatMul(x, w) }}", weights)
    x = np.zeros((2, 64), np.float32)
    x[1] = 1e30 * rounded(normal(1, 64))[0]
    with running(proto, on(HERE)) as (run, _):
        y = run([x])[0]
    assert not y[0].any()
    wanted = reference(proto, {"x": x})[0]
    assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("rows", [2, pytest.param(16, marks=[pytest.mark.slow, pytest.mark.ci])])
def test_int8_of_what_is_no_number_is_none(rows):
    node, weights = packed((67, 16), (1,), 2)
    proto = model(f"g (float[{rows},67] x) => (float[{rows},16] y) {{ {node} y = MatMul(x, w) }}", weights)
    x = normal(rows, 67)
    with running(proto, on(HERE)) as (run, _):
        whole = run([x])[0]
        for place, value in ((0, np.nan), (66, -np.nan), (5, np.inf)):
            x[1] = normal(67)
            x[1, place] = value
            y = run([x])[0]
            assert not np.isfinite(y[1]).any()
            assert np.array_equal(np.delete(y, 1, 0), np.delete(whole, 1, 0))


@pytest.mark.parametrize(
    ("cpu", "form", "why"),
    [
        ("x86-64-v4", {"bits": 4}, "x86-64-v4 has no avx512vnni, and vectors of floats are as fast as levels from "),
        ("x86-64-v3", {"bits": 4, **GROUPED, "offset": True}, "no offsets become bytes"),
        (HERE, {"bits": 4, "group": 12, "scale": "groups"}, "no multiples of 8 rows"),
    ],
)
def test_int8_that_stays_in_float32_says_why(cpu, form, why):
    if absent := _machine.missing(machine(cpu).features):
        pytest.skip(f"this processor has not {', '.join(absent)}")
    node, weights = packed((67, 50), (1,), **form)
    proto = model(f"g (float[1,67] x) => (float[1,50] y) {{ {node} y = MatMul(x, w) }}", weights)
    with running(proto, on(cpu)) as (run, notes):
        compare(proto, run, feeds(proto))
    assert len(notes) == 1 and why in notes[0]


def test_int8_of_an_open_number_of_rows_stays_in_float32_and_says_so():
    node, weights = packed((16, 20), (1,), 2)
    proto = model(f"g (float[M,16] x) => (float[M,20] y) {{ {node} y = MatMul(x, w) }}", weights)
    with running(proto, on(HERE)) as (run, notes):
        x = normal(65, 16)
        wanted = reference(proto, {"x": x})[0]
        assert np.abs(run([x])[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert any("an open number of rows" in note for note in notes)


def test_int8_of_a_convolution_stays_in_float32_and_says_so():
    node, weights = packed((8, 4, 3, 3), (0,), 4)
    proto = model(f"g (float[1,4,8,8] x) => (float[1,8,6,6] y) {{ {node} y = Conv(x, w) }}", weights)
    with running(proto, on(HERE)) as (run, notes):
        compare(proto, run, feeds(proto))
    assert notes == ["activations=int8: weight 'w' is decoded and runs in float32: no matrix product"]


def in_tiles(proto):
    """The outputs for `feeds` as a Sapphire Rapids gives them in tiles, where it may not use any, and without tiles."""
    inputs = list(feeds(proto).values())
    with running(proto, dataclasses.replace(_machine.named("sapphirerapids"), activations="int8")) as (run, notes):
        assert notes == []
        tiled, lanewise = run(inputs)[0], _seccomp.refused(ARCH_PRCTL, lambda: run(inputs)[0])
    with running(proto, dataclasses.replace(_machine.named("icelake-server"), activations="int8")) as (run, notes):
        assert notes == []
        return tiled, lanewise, run(inputs)[0]


# Linux's words for asking whether this process may use AMX.
ASKED = (ARCH_PRCTL, 0x1023, 18)
needs_amx = pytest.mark.skipif(ctypes.CDLL(None).syscall(*ASKED) != 0, reason="no AMX is granted here")


@needs_amx
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "bits", "group"),
    [
        (6, 64, 70, 4, 0),
        (16, 64, 70, 8, 32),
        (16, 301, 150, 2, 0),
        (17, 96, 16, 3, 32),
        (41, 320, 33, 4, 64),
        (64, 70, 16, 1, 0),
    ],
)
def test_tiles_give_the_very_sums_of_vectors(rows, depth, columns, bits, group):
    node, weights = packed((depth, columns), (1,), bits, group=group, scale="groups" if group else "rows")
    shape = f"float[{rows},{depth}] x, float[{columns}] b"
    text = f"g ({shape}) => (float[{rows},{columns}] y) {{ {node} y = Gemm(x, w, b) }}"
    tiled, lanewise, other = in_tiles(model(text, weights))
    assert tiled.any() and tiled.tobytes() == lanewise.tobytes() == other.tobytes()


@needs_amx
@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(5, 140), depth=st.integers(2, 300), columns=st.integers(1, 130), bits=st.integers(1, 8),
    group=st.sampled_from([0, 32, 64, 96, 128]),
)  # fmt: skip
def test_tiles_of_any_size(rows, depth, columns, bits, group):
    node, weights = packed((depth, columns), (1,), bits, group=group, scale="groups" if group else "rows")
    text = f"g (float[{rows},{depth}] x) => (float[{rows},{columns}] y) {{ {node} y = MatMul(x, w) }}"
    tiled, lanewise, other = in_tiles(model(text, weights))
    assert tiled.tobytes() == lanewise.tobytes() == other.tobytes()
