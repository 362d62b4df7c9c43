from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mc_opt.targets.kernels import _split
from tests._harness import sampled
from tests.targets import _kernels
from tests.targets._kernels import check, feeds, machine, model, normal, running

pytestmark = pytest.mark.tvm

# n, input channels, size, output channels, kernel, attributes, groups
CASES = {
    "same": (1, 16, (14, 14), 32, (3, 3), "pads=[1,1,1,1]", 1),
    "stem": (1, 3, (31, 33), 24, (7, 7), "pads=[3,3,3,3], strides=[2,2]", 1),
    "odd": (1, 3, (9, 11), 10, (3, 2), "pads=[1,0,2,1], strides=[2,1]", 1),
    "dilated": (2, 16, (13, 7), 24, (3, 3), "pads=[2,2,2,2], dilations=[2,2]", 1),
    "grouped": (1, 8, (13, 7), 12, (3, 3), 'auto_pad="SAME_UPPER", strides=[2,2]', 4),
    "grouped wide": (1, 64, (5, 5), 64, (1, 1), "strides=[1,1]", 2),
    "depthwise": (1, 24, (14, 15), 24, (3, 3), "pads=[1,1,1,1]", 24),
    "depthwise multiplier": (1, 6, (14, 15), 12, (3, 3), "pads=[1,1,1,1], strides=[2,2]", 6),
    "depthwise cut": (1, 16, (12, 12), 16, (3, 3), "pads=[0,0,1,1], strides=[2,2]", 16),
    "one dimension": (1, 5, (33,), 7, (4,), "pads=[1,2], strides=[3]", 1),
    "one channel": (1, 5, (9,), 1, (1,), "strides=[1]", 1),
    "three dimensions": (1, 4, (5, 6, 7), 6, (2, 3, 2), "pads=[1,0,1,0,1,1]", 1),
    "strided point": (1, 16, (15, 15), 40, (1, 1), "strides=[2,2]", 1),
    "point, blocks of the weight": (2, 192, (5, 7), 72, (1, 1), "strides=[1,1]", 1),
    "blocks of the weight": (1, 64, (7, 7), 112, (3, 3), "pads=[1,1,1,1]", 1),
    "blocks of the weight, groups": (1, 128, (7, 9), 128, (3, 3), "pads=[1,1,1,1]", 2),
    "blocks, one dimension": (1, 96, (29,), 80, (5,), "pads=[2,2]", 1),
    "small weight": (2, 16, (11, 13), 88, (1, 1), "strides=[1,1]", 1),
    "depthwise wide": (2, 40, (19, 37), 40, (5, 5), "pads=[2,2,2,2]", 40),
    "depthwise strided": (1, 88, (17, 33), 88, (5, 3), "pads=[2,1,2,1], strides=[2,2]", 88),
    "depthwise dilated": (1, 16, (15, 40), 16, (3, 3), "pads=[3,3,3,3], dilations=[3,3]", 16),
    "depthwise, mostly padding": (1, 16, (3, 30), 16, (3, 3), "pads=[9,9,9,9], dilations=[9,9]", 16),
    "depthwise, one dimension": (1, 12, (50,), 12, (4,), "pads=[3,1]", 12),
    "depthwise, three dimensions": (1, 4, (5, 6, 9), 4, (3, 3, 3), "pads=[1,1,1,1,2,0]", 4),
}


def _conv_text(case: tuple, tail: str) -> tuple[str, dict[str, np.ndarray]]:
    n, c, size, o, kernel, attributes, groups = case
    dims = ",".join(map(str, (n, c, *size)))
    out = ",".join(f"d{i}" for i in range(2 + len(size)))
    text = f"g (float[{dims}] x) => (float[{out}] y) {{ c = Conv<group={groups}, {attributes}>(x, w, b) {tail} }}"
    return text, {"w": normal(o, c // groups, *kernel), "b": normal(o, seed=1)}


QUICK = ["same", "odd", "grouped", "depthwise", "one dimension", "blocks of the weight", "depthwise strided"]


@pytest.mark.parametrize("name", sampled(CASES, QUICK))
def test_convolution_with_fused_activation(name):
    check(*_conv_text(CASES[name], "y = Relu(c)"))


ON_AVX2 = ["odd", "grouped", "depthwise multiplier", "blocks of the weight", "small weight", "depthwise wide"]


@pytest.mark.parametrize("name", sampled(ON_AVX2, ["grouped", "depthwise multiplier"]))
def test_convolution_on_avx2(name):
    check(*_conv_text(CASES[name], "y = Relu(c)"), cpu="x86-64-v3")


def test_residual_is_added_on_the_tile():
    text = """g (float[1,16,9,9] x) => (float[1,16,9,9] y)
        { a = Relu(x)  c = Conv<pads=[1,1,1,1]>(a, w)  s = Add(c, a)  y = Relu(s) }"""
    check(text, {"w": normal(16, 16, 3, 3)})


BLOCKS = [
    "point, blocks of the weight",
    "blocks of the weight",
    "blocks of the weight, groups",
    "blocks, one dimension",
]


@pytest.mark.parametrize("threads", sampled([1, 3], [1]))
@pytest.mark.parametrize("name", sampled(BLOCKS, BLOCKS[2:]))
def test_a_panel_that_no_cache_holds_is_multiplied_in_blocks(name, threads, monkeypatch):
    small = dataclasses.replace(machine(), l2=1 << 14)
    monkeypatch.setattr(_kernels, "machine", lambda _: small)
    monkeypatch.setattr(_split, "_WORTH", 0)
    check(*_conv_text(CASES[name], "y = Relu(c)"), threads=threads)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_threads_share_every_convolution(name, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    check(*_conv_text(CASES[name], "y = Relu(c)"), threads=threads)


@pytest.mark.parametrize("uses", sampled([0, 1000], [1000]))
@pytest.mark.parametrize("name", sampled(["point, blocks of the weight", "depthwise"], ["depthwise"]))
def test_threads_share_a_small_convolution(name, uses, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    monkeypatch.setattr(_split, "_USES", uses)
    check(*_conv_text(CASES[name], "y = Relu(c)"), threads=2)


def test_threads_divide_positions_where_each_weight_serves_for_many():
    assert _split.by_positions(1, 64, 1, 2)
    assert not _split.by_positions(1, 32, 1, 2)  # 16 uses of a weight take less time than reading the next one
    assert _split.by_positions(1, 32, 4, 2)
    assert not _split.by_positions(1, 64, 1, 2, decoded=True)
    assert _split.by_positions(14, 14, 1, 2, decoded=True)
    assert not _split.by_positions(7, 7, 1, 2)  # one thread would have 4 rows, the other 3
    assert _split.by_positions(1, 49, 1, 2)
    assert not _split.by_positions(1, 1, 100, 2)


def test_shares_of_threads_are_even():
    assert _split.depth([1, 14, 5], 2) == 2
    assert _split.depth([1, 7, 60], 2) == 3  # 7 rows alone would give one thread 4 of them
    assert _split.depth([3, 1], 2) == 1  # nothing comes out even: 2 of 3
    assert _split.depth([1, 1], 2) == 0
    assert _split.evenness(49, 2) == 49 / 50


def test_a_padding_that_is_stepped_over_gives_the_same_bits_as_one_that_is_read():
    head = "g (float[1,24,13,21] x) => (float[1,24,a,b] y)"
    weights = {"w": normal(24, 1, 3, 3), "pads": np.array([0, 0, 1, 2, 0, 0, 1, 1])}
    over = model(f"{head} {{ y = Conv<group=24, strides=[2,1], pads=[1,2,1,1]>(x, w) }}", weights)
    read = model(f"{head} {{ p = Pad(x, pads)  y = Conv<group=24, strides=[2,1]>(p, w) }}", weights)
    results = []
    for proto in (over, read):
        with running(proto, machine()) as (run, notes):
            results += run(list(feeds(proto).values()))
        assert notes == []
    np.testing.assert_array_equal(*results)


# Pad's inputs beside x and its mode: what a convolution takes into its window, and what it does not.
PADS = {
    "zeros": ("pads", "constant", [0, 0, 1, 2, 0, 0, 0, 3], None),
    "axes": ("pads, , axes", "constant", [1, 2, 0, 3], [-2, 3]),
    "channels": ("pads", "constant", [0, 4, 1, 1, 0, 4, 1, 1], None),
    "cut": ("pads", "constant", [0, 0, -1, 2, 0, 0, 1, -3], None),
    "ones": ("pads, one", "constant", [0, 0, 1, 2, 0, 0, 0, 3], None),
    "edge": ("pads", "edge", [0, 0, 1, 2, 0, 0, 0, 3], None),
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize("group", sampled([1, 16], [16]))
def test_a_pad_before_a_convolution(name, group):
    inputs, mode, amounts, axes = PADS[name]
    channels = 8 if name == "channels" else 16
    text = f"""g (float[1,{channels},9,11] x) => (float[1,16,a,b] y)
        {{ p = Pad<mode="{mode}">(x, {inputs})  y = Conv<group={group}, pads=[1,0,1,1]>(p, w) }}"""
    weights = {"w": normal(16, 16 // group, 3, 3), "pads": np.array(amounts), "one": np.array(1, np.float32)}
    check(text, weights | ({} if axes is None else {"axes": np.array(axes)}))


@pytest.mark.parametrize("shape", sampled(["1,40,5,7", "1,40,1,1", "1,1,5,1", "1,1,1,7"], ["1,40,1,1", "1,1,5,1"]))
def test_what_is_added_to_a_point_convolution_may_lie_along_any_axis(shape):
    text = f"""g (float[1,24,5,7] x, float[{shape}] s) => (float[1,40,5,7] y)
        {{ c = Conv(x, w)  a = Add(c, s)  y = Relu(a) }}"""
    check(text, {"w": normal(40, 24, 1, 1)}, quiet=False)


def test_pad_after_a_convolution_is_not_taken_for_element_wise():
    text = """g (float[1,4,8,8] x) => (float[1,16,5,5] y)
        { c = Conv(x, w)  r = Relu(c)  p = Pad(r, pads)  y = Conv<group=16, strides=[2,2]>(p, v) }"""
    weights = {"w": normal(16, 4, 1, 1), "v": normal(16, 1, 1, 1), "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1])}
    check(text, weights)


def test_weight_that_the_model_computes():
    check("g (float[1,3,6,6] x, float[5,3,3,3] w) => (float[1,5,4,4] y) { y = Conv(x, w) }")


TRANSPOSED = {
    "sub-pixel": (3, (5, 7), 6, (2, 2), "strides=[2,2]", 1),
    "overlap": (3, (5, 7), 6, (3, 3), "strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]", 1),
    "asymmetric": (3, (5, 7), 6, (3, 3), "strides=[2,3], pads=[1,0,0,1]", 1),
    "dilated groups": (4, (5, 7), 6, (3, 3), "strides=[2,1], dilations=[2,1], pads=[1,0,1,1]", 2),
    "depthwise": (4, (5, 7), 4, (3, 3), "strides=[2,2]", 4),
    "same": (3, (5,), 6, (5,), 'strides=[2], auto_pad="SAME_LOWER"', 1),
    "shape given": (3, (5, 7), 6, (3, 3), "strides=[2,2], output_shape=[10,14]", 1),
}


@pytest.mark.parametrize("name", sampled(TRANSPOSED, ["overlap", "dilated groups"]))
def test_transposed_convolution(name):
    c, size, o, kernel, attributes, groups = TRANSPOSED[name]
    dims, out = ",".join(map(str, (1, c, *size))), ",".join(f"d{i}" for i in range(2 + len(size)))
    text = f"g (float[{dims}] x) => (float[{out}] y) {{ y = ConvTranspose<group={groups}, {attributes}>(x, w, b) }}"
    check(text, {"w": normal(c, o // groups, *kernel), "b": normal(o, seed=1)})


POOLS = [
    "MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>",
    "MaxPool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>",
    "MaxPool<kernel_shape=[3,2], strides=[2,3], dilations=[2,1], pads=[1,0,1,1]>",
    "AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,1,0,0]>",
    "AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,1,0,0], count_include_pad=1>",
    "AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1, pads=[1,1,1,1]>",
    "MaxPool<kernel_shape=[3,3], strides=[1,1], dilations=[4,4], pads=[2,2,2,2]>",
    "AveragePool<kernel_shape=[12,13], pads=[2,2,2,2]>",
    "LpPool<kernel_shape=[3,3], p=2>",
    "LpPool<kernel_shape=[3,3], p=3, pads=[1,1,1,1]>",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GlobalLpPool<p=1>",
]


@pytest.mark.parametrize("op", sampled(POOLS, POOLS[:4] + POOLS[-3:]))
def test_pooling(op):
    check(f"g (float[1,5,13,14] x) => (float[a,b,c,d] y) {{ y = {op}(x) }}")
