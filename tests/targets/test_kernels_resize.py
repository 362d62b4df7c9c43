from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mc_opt.targets.kernels import _loops
from tests.targets._kernels import check, lowered_model, machine, model, normal

pytestmark = pytest.mark.tvm

WHOLE = 'coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def _dims(shape):
    return ",".join(map(str, shape))


def _resized(shape, cases):
    """One model that resizes x to several sizes: (size, mode, coordinates, rounding)."""
    sizes = [f"int64[{len(size)}] s{k} = {{{_dims(size)}}}" for k, (size, *_) in enumerate(cases)]
    outputs = [f"float[{_dims(size)}] y{k}" for k, (size, *_) in enumerate(cases)]
    lines = [
        f'y{k} = Resize<mode="{mode}", coordinate_transformation_mode="{at}", nearest_mode="{rounding}">(x, , , s{k})'
        for k, (_, mode, at, rounding) in enumerate(cases)
    ]
    return f"g (float[{_dims(shape)}] x) => ({', '.join(outputs)}) <{', '.join(sizes)}> {{ {' '.join(lines)} }}"


# Repeated whole; repeated along rows alone; permuted out of one, of two vectors, and gathered; rows kept, rows summed
# first; columns alone, rows alone; rows shorter than a vector.
SIZES = [(2, 3, 40, 82), (2, 3, 20, 123), (2, 3, 27, 60), (2, 3, 11, 23), (2, 3, 33, 9), (2, 3, 20, 70), (2, 3, 31, 41)]
MODES = [("nearest", "asymmetric"), ("nearest", "half_pixel"), ("linear", "align_corners"), ("cubic", "half_pixel")]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("shape", "cpu"), [((2, 3, 20, 41), "native"), ((2, 3, 5, 9), "x86-64-v3")])
def test_resize(shape, cpu):
    check(_resized(shape, [(size, *mode, "floor") for size in SIZES for mode in MODES]), cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
def test_threads_share_rows(monkeypatch):
    monkeypatch.setattr(_loops, "_WORTH", 0)
    sizes = [(1, 3, 40, 82), (1, 3, 31, 90), (1, 3, 9, 8)]
    cases = [(size, mode, "half_pixel", "floor") for size in sizes for mode in ("nearest", "linear")]
    check(_resized((1, 3, 20, 41), cases), threads=2)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("mode", "end"), [("linear", 1.2), ("nearest", 0.05)])
def test_regions_that_reach_outside_or_back(mode, end):
    text = f"""g (float[1,2,9,20] x) => (float[1,2,12,15] y)
        <float[8] r = {{0.0, 0.0, 0.1, -0.2, 1.0, 1.0, 0.9, {end}}}, int64[4] s = {{1,2,12,15}}>
        {{ y = Resize<mode="{mode}", coordinate_transformation_mode="tf_crop_and_resize",
            extrapolation_value=3.0>(x, r, , s) }}"""
    check(text)


BETWEEN = """g (float[1,3,{h},{w}] x) => (float[1,8,{nh},{nw}] y) <int64[4] s = {{1,{c},{nh},{nw}}}>
{{ a = Conv(x, v) b = Resize<mode="{mode}", coordinate_transformation_mode="{at}">(a, , , s) y = Conv(b, w) }}"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("mode", "channels"), [("linear", 21), ("cubic", 4), ("nearest", 20), ("repeated", 24)])
def test_resize_between_convolutions(mode, channels):
    kind, width = ("nearest", 14) if mode == "repeated" else (mode, 20)
    text = BETWEEN.format(h=6, w=7, nh=12, nw=width, c=channels, mode=kind, at="half_pixel")
    weights = {"v": normal(channels, 3, 1, 1), "w": normal(8, channels, 1, 1, seed=1)}
    check(text, weights)
    (line,) = [line for line in lowered_model(model(text, weights), machine()).kernels if line.startswith("Resize by")]
    assert line.split(":")[0].endswith("resize" if mode == "repeated" else f"resize_{mode}")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 100)), min_size=1, max_size=3),
    outer=st.tuples(st.integers(1, 2), st.integers(1, 5)),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    at=st.sampled_from(COORDINATES),
    rounding=st.sampled_from(ROUNDINGS),
    cpu=st.sampled_from(["native", "x86-64-v3"]),
    threads=st.integers(1, 2),
)
def test_resize_of_any_shape(sizes, outer, mode, at, rounding, cpu, threads):
    # ONNX Runtime takes cubic interpolation of pictures alone.
    sizes = (sizes * 2)[:2] if mode == "cubic" else sizes
    shape, new = (*outer, *(a for a, _ in sizes)), (*outer, *(b for _, b in sizes))
    assume(shape != new)
    work, _loops._WORTH = _loops._WORTH, 0
    try:
        check(_resized(shape, [(new, mode, at, rounding)]), cpu=cpu, threads=threads)
    finally:
        _loops._WORTH = work


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 20)] * 2),
    new=st.tuples(*[st.integers(1, 40)] * 2),
    channels=st.integers(1, 40),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    at=st.sampled_from(COORDINATES),
    cpu=st.sampled_from(["native", "x86-64-v3"]),
)
def test_resize_of_any_shape_between_convolutions(size, new, channels, mode, at, cpu):
    text = BETWEEN.format(h=size[0], w=size[1], nh=new[0], nw=new[1], c=channels, mode=mode, at=at)
    check(text, {"v": normal(channels, 3, 1, 1), "w": normal(8, channels, 1, 1, seed=1)}, cpu=cpu)
