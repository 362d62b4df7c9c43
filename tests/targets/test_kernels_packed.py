"""Convolutions and products that decode packed weights inside of their kernels."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt.targets._relax import lower
from mc_opt.targets.kernels import _sliding_streamed, _split
from tests._harness import sampled
from tests.targets import _kernels
from tests.targets._kernels import check, machine, model, normal
from tests.targets.test_kernels_gemm import FORMS, packed
from tests.targets.test_kernels_lookup import steps, two_terms
from tests.targets.test_kernels_sliding_properties import SETTINGS, windows

pytestmark = pytest.mark.tvm

PROCESSORS = ["native", "x86-64-v3"]
GROUPED = {"group": 16, "scale": "groups"}

# images, input channels, size, output channels, kernel, attributes, groups
CASES = {
    "same": (1, 16, (9, 13), 40, (3, 3), "pads=[1,1,1,1]", 1),
    "stem": (1, 3, (21, 23), 24, (7, 7), "pads=[3,3,3,3], strides=[2,2]", 1),
    "point": (2, 67, (5, 7), 200, (1, 1), "strides=[1,1]", 1),
    "strided point": (1, 48, (9, 9), 200, (1, 1), "strides=[2,2]", 1),
    "grouped": (1, 24, (7, 9), 72, (3, 3), "pads=[1,1,1,1]", 3),
    "narrow groups": (1, 32, (7, 9), 32, (3, 3), "dilations=[2,1]", 8),
    "groups of a prime number": (1, 6, (3, 5), 62, (1, 1), "strides=[1,1]", 2),
    "one dimension": (2, 40, (31,), 90, (5,), "pads=[2,1], strides=[2]", 1),
    "three dimensions": (1, 4, (5, 6, 7), 6, (2, 3, 2), "pads=[1,0,1,0,1,1]", 1),
}


def convolution(case, node):
    images, channels, size, _, _, attributes, groups = case
    shape = ",".join(map(str, (images, channels, *size)))
    out = ",".join(f"d{k}" for k in range(2 + len(size)))
    c = f"c = Conv<group={groups}, {attributes}>(x, w, b)"
    return f"g (float[{shape}] x) => (float[{out}] y) {{ {node} {c} y = Relu(c) }}"


def shape_of(case):
    _, channels, _, outputs, kernel, _, groups = case
    return (outputs, channels // groups, *kernel)


def check_convolution(case, form, *, is_even=False, **how):
    node, weights = packed(shape_of(case), (0,), **form)
    weights |= {"book": steps(form["bits"])} if is_even else {}
    check(convolution(case, node), weights | {"b": normal(case[3], seed=1)}, **how)


@pytest.mark.parametrize("name", ["same", pytest.param("point", marks=[pytest.mark.slow, pytest.mark.ci])])
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_a_convolution_decodes_in_its_kernel(name, cpu):
    case = CASES[name]
    node, weights = packed(shape_of(case), (0,), 4)
    weights |= {"b": normal(case[3], seed=1)}
    check(convolution(case, node), weights, cpu=cpu)
    proto = model(convolution(case, node), weights)
    kernels = lower.lower(onnx_ir.from_proto(proto), machine(cpu), lambda *_: None).kernels
    assert any(kernel.startswith("lookup_conv: 4 bits, ") for kernel in kernels)
    assert not any(kernel.startswith("decode: ") for kernel in kernels)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", [FORMS[k] for k in (0, 1, 2, 7, 8, 9, 10)], ids=str)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_every_form_of_codes(form, cpu):
    check_convolution(CASES["same"], form, cpu=cpu)
    if form["bits"] == 8:
        check_convolution(CASES["same"], form, is_even=True, cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_every_window(name, monkeypatch):
    check_convolution(CASES[name], {"bits": 4})
    monkeypatch.setattr(_split, "_WORTH", 0)
    check_convolution(CASES[name], {"bits": 3, **GROUPED}, threads=3, cpu="x86-64-v3")


# Few positions: weights that are decoded in registers, those of one channel and those whose taps begin words included.
FEW = {
    "a row of samples": (1, 1, (640,), 70, (256,), "strides=[128]", 1),
    "taps that are filled up": (1, 29, (4,), 50, (3,), "pads=[1,1]", 1),
    "taps that begin inside of words": (1, 13, (4,), 50, (3,), "pads=[1,1]", 1),
    "an image of one channel": (1, 1, (5, 9), 20, (3, 5), "pads=[1,0,1,0], dilations=[1,2]", 1),
    "groups of images": (2, 48, (3, 3), 64, (3, 3), "pads=[0,0,0,0]", 2),
    "three rows": (1, 40, (5, 5), 90, (3, 3), "strides=[1,2]", 1),
}


@pytest.mark.parametrize("name", sampled(FEW, ["taps that are filled up"]))
@pytest.mark.parametrize("cpu", sampled(PROCESSORS, ["native"]))
def test_few_positions_are_multiplied_as_codes_are_decoded(name, cpu, monkeypatch):
    check_convolution(FEW[name], {"bits": 4}, cpu=cpu)
    if name != "taps that are filled up":
        monkeypatch.setattr(_split, "_WORTH", 0)
        check_convolution(FEW[name], {"bits": 3, **GROUPED, "offset": True}, cpu=cpu, threads=2)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", FEW)
def test_few_positions_may_be_decoded_before_too(name, monkeypatch):
    monkeypatch.setattr(_sliding_streamed, "takes", lambda *_: False)
    check_convolution(FEW[name], {"bits": 4})


@pytest.mark.slow
@pytest.mark.ci
def test_a_weight_of_few_positions_is_not_written_to_memory(monkeypatch):
    case = (1, 40, (4,), 50, (3,), "pads=[1,1]", 1)
    node, weights = packed(shape_of(case), (0,), 4)
    proto = model(convolution(case, node), weights | {"b": normal(case[3], seed=1)})

    def largest():
        text = _kernels.compiled(proto, machine())[1].script()
        return max(int(size) for size in re.findall(r"alloc_buffer\(\((\d+),", text))

    registers = largest()
    monkeypatch.setattr(_sliding_streamed, "takes", lambda *_: False)
    assert registers < 3 * 40 * 16 <= largest()  # all steps of a panel, which has a vector at least


# Blocks of 32 and of 35 steps: these begin inside of words.
BLOCKS = [(1, 64, (7, 7), 112, (3, 3), "pads=[1,1,1,1]", 1), (2, 140, (5, 7), 72, (1, 1), "strides=[1,1]", 1)]


@pytest.mark.parametrize(("bits", "threads"), [(4, 1), pytest.param(3, 3, marks=[pytest.mark.slow, pytest.mark.ci])])
@pytest.mark.parametrize("case", BLOCKS)
def test_a_panel_that_the_cache_cannot_hold_is_decoded_in_blocks(case, bits, threads, monkeypatch):
    small = dataclasses.replace(machine(), l1=1 << 10, l2=1 << 15)
    monkeypatch.setattr(_kernels, "machine", lambda _: small)
    monkeypatch.setattr(_split, "_WORTH", 0)
    check_convolution(case, {"bits": bits}, threads=threads)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("threads", [1, 2])
def test_images_of_an_open_number(threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    node, weights = packed((40, 64, 3, 3), (0,), 4)
    text = f"g (float[N,64,7,9] x) => (float[N,40,5,7] y) {{ {node} c = Conv(x, w) y = Relu(c) }}"
    check(text, weights, sizes=[{"N": 1}, {"N": 3}], threads=threads)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_two_terms_are_decoded_together(cpu):
    case = CASES["same"]
    for form in ({}, GROUPED):
        node, weights = two_terms(shape_of(case), (0,), 3, **form)
        check(convolution(case, node), weights | {"b": normal(40)}, cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
def test_terms_of_different_widths_are_decoded_before_the_kernel():
    case = CASES["same"]
    first, weights = packed(shape_of(case), (0,), 3)
    second, others = packed(shape_of(case), (0,), 4)
    second = second.replace("(codes, book, scale)", "(codes4, book4, scale4)").replace("w =", "v =")
    node = f"{first.replace('w =', 'u =')} {second} w = Add(u, v)"
    check(convolution(case, node), weights | {f"{k}4": v for k, v in others.items()} | {"b": normal(40)})


def test_a_residual_is_added_on_the_tile_of_a_packed_weight():
    node, weights = packed((16, 16, 3, 3), (0,), 2)
    text = f"""g (float[1,16,9,9] x) => (float[1,16,9,9] y)
        {{ {node} a = Relu(x)  c = Conv<pads=[1,1,1,1]>(a, w)  s = Add(c, a)  y = HardSwish(s) }}"""
    check(text, weights)


# rows, transposed, form, threads
PRODUCTS = [
    ("70", 0, {"bits": 4}, 1),
    pytest.param("70", 1, {"bits": 3, **GROUPED}, 3, marks=[pytest.mark.slow, pytest.mark.ci]),
    pytest.param("129", 0, {"bits": 8}, 2, marks=[pytest.mark.slow, pytest.mark.ci]),
]


@pytest.mark.parametrize(("rows", "transposed", "form", "threads"), PRODUCTS)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_a_product_of_many_rows_decodes_in_its_kernel(rows, transposed, form, threads, cpu, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    node, weights = packed((100, 96) if transposed else (96, 100), (1 - transposed,), **form)
    gemm = f"p = Gemm<transB={transposed}, alpha=0.5, beta=2.0>(x, w, b)"
    text = f"g (float[{rows},96] x) => (float[{rows},100] y) {{ {node} {gemm} y = Relu(p) }}"
    weights |= {"b": normal(100)}
    check(text, weights, cpu=cpu, threads=threads)
    kernels = lower.lower(onnx_ir.from_proto(model(text, weights)), machine(cpu), lambda *_: None).kernels
    assert any(kernel.startswith("lookup product: ") and "decoded at a time" in kernel for kernel in kernels)
    assert not any(kernel.startswith("decode: ") for kernel in kernels)


@pytest.mark.slow
@given(
    window=windows(),
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 1, 2, 4]),
    inputs=st.integers(2, 40),
    outputs=st.integers(1, 70),
    bits=st.integers(1, 8),
    group=st.sampled_from([0, 0, 8, 33, 64]),
    offset=st.booleans(),
    is_even=st.booleans(),
    l2=st.sampled_from([1 << 12, 1 << 18]),
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("cpu", PROCESSORS)
@SETTINGS
def test_packed_convolutions_of_any_size(
    cpu, window, images, groups, inputs, outputs, bits, group, offset, is_even, l2, threads, monkeypatch
):
    size, kernel, attributes = window
    held = dataclasses.replace(machine(cpu), l1=min(l2, 1 << 15), l2=l2)
    with monkeypatch.context() as patch:
        patch.setattr(_kernels, "machine", lambda _: held)
        patch.setattr(_split, "_WORTH", 0)
        case = (images, inputs * groups, size, outputs * groups, kernel, attributes, groups)
        form = {"bits": bits, "group": group, "scale": "groups" if group else "rows", "offset": offset}
        check_convolution(case, form, is_even=is_even, threads=threads)
