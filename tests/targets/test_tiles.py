"""Tiles that a table chooses: they change the kernels and not the numbers; the rule's are the first candidates."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir
import pytest
import tvm
import tvm_ffi
from onnx import shape_inference
from tvm import relax

from mc_opt import targets
from mc_opt.targets.kernels import _choice
from tests.targets._kernels import compare, compiled, feeds, lowered_model, machine, model, normal
from tests.targets.test_kernels_gemm import packed

pytestmark = pytest.mark.tvm

CONV = "g (float[1,16,14,14] x) => (float[1,96,14,14] y) { c = Conv<pads=[1,1,1,1]>(x, w)  y = Relu(c) }"
CASES = {
    "conv": (CONV, {"w": normal(96, 16, 3, 3)}),
    "point": ("g (float[2,32,9,7] x) => (float[2,80,9,7] y) { y = Conv(x, w) }", {"w": normal(80, 32, 1, 1)}),
    "grouped": (
        "g (float[1,8,13,7] x) => (float[1,36,6,3] y) { y = Conv<group=2, strides=[2,2]>(x, w) }",
        {"w": normal(36, 4, 3, 3)},
    ),
    "blocks": (
        "g (float[1,64,7,7] x) => (float[1,112,7,7] y) { c = Conv<pads=[1,1,1,1]>(x, w)  y = Relu(c) }",
        {"w": normal(112, 64, 3, 3)},
    ),
    "depthwise": (
        "g (float[1,40,19,37] x) => (float[1,40,19,37] y) { y = Conv<group=40, pads=[2,2,2,2]>(x, w) }",
        {"w": normal(40, 1, 5, 5)},
    ),
    "pool": (
        "g (float[1,20,19,37] x) => (float[1,20,10,19] y)"
        " { y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x) }",
        {},
    ),
    "product": ("g (float[21,48] x) => (float[21,100] y) { h = MatMul(x, w)  y = Relu(h) }", {"w": normal(48, 100)}),
    "Gemm": (
        "g (float[33,48] x) => (float[33,100] y) { y = Gemm<transB=1>(x, w, b) }",
        {"w": normal(100, 48), "b": normal(100)},
    ),
}
LOOKUP = packed((100, 16, 3, 3), (0,), 4, group=16, scale="groups")
TEXT = f"g (float[1,16,9,13] x) => (float[1,100,7,11] y) {{ {LOOKUP[0]} c = Conv(x, w)  y = Relu(c) }}"
CASES["lookup conv"] = (TEXT, LOOKUP[1])
LOOKUP = packed((70, 100), (1,), 4, group=16, scale="groups")
for ROWS in (3, 20):
    PRODUCT = f"g (float[{ROWS},70] x) => (float[{ROWS},100] y) {{ {LOOKUP[0]} y = MatMul(x, w) }}"
    CASES[f"lookup, {ROWS} rows"] = (PRODUCT, LOOKUP[1])


def shapes(proto, target=None) -> dict[str, tuple[str, ...]]:
    return lowered_model(proto, target or machine()).choices.offered


@pytest.mark.parametrize("name", CASES)
def test_each_family_offers_at_most_eight_and_names_its_shape(name):
    proto = model(*CASES[name])
    ((shape, offered),) = shapes(proto).items()
    assert 1 < len(offered) <= _choice.MOST
    ((other, on_avx2),) = shapes(proto, machine("x86-64-v3")).items()
    assert other == shape  # the machine is not part of the name
    assert 1 < len(on_avx2) <= _choice.MOST


def test_what_a_shape_is_called():
    assert list(shapes(model(*CASES["conv"]))) == ["conv 1x16x16x16 -> 1x14x14x96, kernel 3x3, float32"]
    assert list(shapes(model(*CASES["depthwise"]))) == [
        "depthwise 1x19x37x40 -> 1x19x37x40, kernel 5x5, before 2x2, float32"
    ]
    assert list(shapes(model(*CASES["product"]))) == ["product 21x48 -> 100, float32"]
    assert list(shapes(model(*CASES["lookup conv"]))) == [
        "lookup conv 1x9x13x16 -> 1x7x11x100, kernel 3x3, float32, 4 bits, groups of 16"
    ]
    assert list(shapes(model(*CASES["lookup, 3 rows"]))) == ["lookup product 3x70 -> 100, 4 bits, groups of 16, scale"]


@pytest.mark.parametrize("name", CASES)
def test_the_table_changes_the_kernel_and_what_it_does_not_know_does_not(name):
    proto = model(*CASES[name])
    by_rule = lowered_model(proto, machine())
    ((shape, (rule, other, *_)),) = by_rule.choices.offered.items()
    assert by_rule.choices.tiles == {shape: rule}
    chosen = lowered_model(proto, machine(), {shape: other, "conv of another model": "1x1x16"})
    assert chosen.choices.tiles == {shape: other}
    assert not tvm_ffi.structural_equal(by_rule.module, chosen.module)
    for table in ({shape: rule}, {shape: "99x99x99"}, {shape + " ": other}):
        assert tvm_ffi.structural_equal(by_rule.module, lowered_model(proto, machine(), table).module)


def test_open_sizes_and_computed_weights_have_no_candidates():
    text = "g (float[N,8,9,9] x) => (float[N,8,9,9] y) { y = Conv(x, w) }"
    assert shapes(model(text, {"w": normal(8, 8, 1, 1)})) == {}
    text = "g (float[1,8,9,9] x, float[8,8,1,1] w) => (float[1,8,9,9] y) { y = Conv(x, w) }"
    assert shapes(model(text)) == {}
    text = "g (float[6,8] x, float[8,9] w) => (float[6,9] y) { y = MatMul(x, w) }"
    assert shapes(model(text)) == {}


IN_CI = ("conv", "depthwise", "product", "lookup, 3 rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cpu"),
    [pytest.param(name, "native", marks=[pytest.mark.ci] if name in IN_CI else []) for name in CASES]
    + [(name, "x86-64-v3") for name in CASES],
)
def test_every_candidate_gives_the_same_numbers(name, cpu):
    proto = model(*CASES[name])
    ((shape, offered),) = shapes(proto, machine(cpu)).items()
    for tile in offered:
        executable, _, notes = compiled(proto, machine(cpu), {shape: tile})
        main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        compare(proto, functools.partial(run, main), feeds(proto))
        assert notes == []


def run(main, arrays):
    return [t.numpy() for t in main(*map(tvm.runtime.tensor, arrays))]


@pytest.mark.slow
@pytest.mark.zig
def test_the_same_table_gives_the_same_bytes(tmp_path: Path):
    proto = model(*CASES["conv"])
    ((shape, (rule, other, *_)),) = shapes(proto).items()
    built = []
    for name, tiles in (("rule", None), ("a", {shape: other}), ("b", {shape: other})):
        (tmp_path / name).mkdir()
        whole = onnx_ir.from_proto(shape_inference.infer_shapes(proto))
        made = targets.parse_target("x86").compile(whole, tmp_path / name, lambda *_: None, tiles=tiles)
        built.append((made.files["model.so"], dict(made.tiles)))
    assert built[1] == built[2] == (built[1][0], {shape: other})
    assert built[0] == (built[0][0], {shape: rule})
    assert built[0][0] != built[1][0]
