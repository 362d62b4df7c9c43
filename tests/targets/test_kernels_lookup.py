from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt import targets
from mc_opt.targets._relax import lower
from mc_opt.targets.kernels import _pshufb
from tests.targets._kernels import build, check, compare, feeds, machine, model, normal, running
from tests.targets.test_kernels_gemm import packed

pytestmark = pytest.mark.tvm

PROCESSORS = ["native", "x86-64-v3"]
GROUPED = {"group": 16, "scale": "groups"}


def text(rows, depth, columns, node):
    shape = f"float[{rows},{depth}] x, float[{columns}] b"
    return f"g ({shape}) => (float[{rows},{columns}] y) {{ {node} c = MatMul(x, w) y = Add(c, b) }}"


def steps(bits):
    """A codebook in even steps."""
    return (np.arange(1 << bits) - 3 * (1 << bits) // 5).astype(np.float32) * np.float32(0.3 / (1 << bits))


@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.parametrize("form", [{"bits": 4}, {"bits": 2, **GROUPED}, {"bits": 3, **GROUPED, "offset": True}], ids=str)
@pytest.mark.parametrize("rows", [2, 8, 16, 17, 41])
@pytest.mark.slow
@pytest.mark.ci
def test_rows_in_registers_and_in_blocks(rows, form, cpu):
    node, weights = packed((301, 70), (1,), **form)
    check(text(rows, 301, 70, node), weights, cpu=cpu)


@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize("form", [{"bits": 8}, {"bits": 6}, {"bits": 8, **GROUPED}], ids=str)
@pytest.mark.slow
@pytest.mark.ci
def test_codes_of_many_bits_are_decoded_in_registers(form, is_even, cpu):
    node, weights = packed((67, 70), (1,), **form)
    if is_even:
        weights["book"] = steps(form["bits"])
    if form["bits"] == 6:
        node = node.replace(", scale", "")
        del weights["scale"]
    proto = model(text(1, 67, 70, node), weights | {"b": normal(70)})
    lowered = lower.lower(onnx_ir.from_proto(proto), machine(cpu), lambda *_: None)
    assert not any(kernel.startswith("decode: ") for kernel in lowered.kernels)
    check(text(1, 67, 70, node), weights, cpu=cpu)
    check(text(16, 67, 70, node), weights, cpu=cpu)


def powers(bits):
    """Signed powers of two."""
    levels = 2.0 ** np.arange(1 << (bits - 1))
    return np.concatenate([levels, -levels]).astype(np.float32)


@pytest.mark.parametrize(
    ("book", "step"),
    [
        (powers(4), None),
        (np.arange(-8, 8), None),
        (np.arange(-8, 8) - 0.5, None),
        (0.3 * powers(4), 0.3 * 128),
        (steps(4), 0.3 / 16),
        ([0.7, -0.7, 0], 0.7),
        (np.zeros(16), None),
    ],
)
def test_short_entries_have_tables_of_bytes(book, step):
    book = np.float32(book)
    made, factor = _pshufb.tables(book)
    assert factor == (None if step is None else pytest.approx(step))
    low, high = (made[part : part + 16].view(np.uint8).astype(np.uint32) for part in (0, 32))
    found = (high << 24 | low << 16).view(np.float32)[: len(book)] * (factor or np.float32(1))
    assert np.abs(found - book).max() <= np.finfo(np.float32).eps * np.abs(book).max()


@pytest.mark.parametrize("book", [normal(16), [1.0, np.inf], [np.nan, 2], [3e38, -3e38, 1.1e38]])
def test_other_entries_have_none(book):
    assert _pshufb.tables(np.float32(book)) is None


@pytest.mark.parametrize(("book", "rows"), [(powers(4), 5), (steps(4), 1)])
@pytest.mark.slow
@pytest.mark.ci
def test_short_entries_are_found_by_their_bytes_on_avx2(book, rows):
    node, weights = packed((67, 70), (1,), 4, **GROUPED)
    proto = model(text(rows, 67, 70, node), weights | {"book": book, "b": normal(70)})
    _, module, _ = build(proto, machine("x86-64-v3"))
    assert "llvm.x86.avx2.pshuf.b" in module.script() and "llvm.x86.avx2.permps" not in module.script()
    check(text(rows, 67, 70, node), weights | {"book": book}, cpu="x86-64-v3")


def two_terms(shape, axes, bits, **form):
    """Nodes that make w the sum of two packed weights, and what they hold."""
    node, weights = packed(shape, axes, bits, **form)
    first, second = node.replace("w =", "u ="), node.replace("w =", "v =").replace("(codes", "(others")
    return f"{first} {second} w = Add(u, v)", weights | {"others": weights["codes"][::-1].copy()}


@pytest.mark.parametrize("rows", [1, 20])
def test_a_weight_of_two_terms_is_never_dense(rows):
    node, weights = two_terms((96, 40), (1,), 3, group=32, scale="groups")
    proto = model(text(rows, 96, 40, node), weights | {"b": normal(40)})
    with running(proto, machine()) as (run, notes):
        compare(proto, run, feeds(proto))
    lowered = lower.lower(onnx_ir.from_proto(proto), machine(), lambda *_: None)
    assert notes == [] and sum(kernel.startswith("lookup product: ") for kernel in lowered.kernels) == 2
    assert not any(kernel.startswith("decode: ") for kernel in lowered.kernels)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("rows", [70, "M"])
def test_a_weight_of_two_terms_is_decoded_for_many_rows(rows):
    node, weights = two_terms((96, 40), (1,), 3, group=32, scale="groups")
    check(f"g (float[{rows},96] x) => (float[{rows},40] y) {{ {node} y = MatMul(x, w) }}", weights, sizes=[{"M": 5}])


@pytest.mark.slow
@pytest.mark.ci
def test_a_convolution_with_two_terms_and_a_sum_that_is_an_output():
    node, weights = two_terms((8, 4, 3, 3), (0,), 3)
    outputs = "float[1,8,6,6] y, float[8,4,3,3] w"
    check(f"g (float[1,4,8,8] x) => ({outputs}) {{ {node} y = Conv(x, w) }}", weights)


def several(*parts, lead="2,"):
    """Products of x [*lead, 64] with packed weights of so many columns each, and what they hold."""
    lines, weights = [], {}
    for k, (columns, form) in enumerate(parts):
        node, held = packed((64, columns), (1,), 4, **form)
        for name, array in held.items():
            node = node.replace(name, f"{name}{k}", 1)
            weights[f"{name}{k}"] = steps(4) if name == "book" else array
        lines.append(f"{node.replace('w =', f'w{k} =')} y{k} = MatMul(x, w{k})")
    outputs = ", ".join(f"float[{lead}{columns}] y{k}" for k, (columns, _) in enumerate(parts))
    return f"g (float[{lead}64] x) => ({outputs}) {{ {' '.join(lines)} }}", weights


@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.slow
@pytest.mark.ci
def test_products_of_one_input_are_one_where_their_weights_are_alike(cpu):
    grouped, whole = {"group": 32, "scale": "groups"}, {"scale": "rows"}
    text, weights = several((24, grouped), (50, whole), (7, grouped), (90, whole), (33, grouped), (9, whole))
    weights["book5"] = -steps(4)
    check(text, weights, cpu=cpu)
    lowered = lower.lower(onnx_ir.from_proto(model(text, weights)), machine(cpu), lambda *_: None)
    assert sorted(k for k in lowered.kernels if k.startswith("one product")) == [
        "one product: y0, y2, y4",
        "one product: y1, y3",
    ]
    assert sum(kernel.startswith("lookup product: ") for kernel in lowered.kernels) == 3
    assert "MatMul by lookup_gemv, columns: y0, y1, y2, y3, y4" in lowered.kernels


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("lead", ["", "3,1,"], ids=["one row", "a batch of one row each"])
def test_products_that_are_one_have_the_shapes_of_each(lead):
    check(*several((24, {}), (50, {}), lead=lead))


def test_products_whose_groups_have_other_scales_are_two():
    check(*several((24, {"group": 32, "scale": "groups"}), (50, {"group": 32, "scale": "rows"})))


def test_a_gemm_of_some_rows_adds_its_bias():
    node, weights = packed((50, 67), (0,), 4)
    check(
        f"g (float[20,67] x) => (float[20,50] y) {{ {node} y = Gemm<transB=1>(x, w, b) }}", weights | {"b": normal(50)}
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 100),
    depth=st.integers(1, 200),
    columns=st.integers(1, 130),
    bits=st.integers(1, 8),
    group=st.sampled_from([0, 8, 32, 33, 64]),
    offset=st.booleans(),
    book=st.sampled_from([None, steps, powers]),
    cpu=st.sampled_from(PROCESSORS),
)
def test_products_of_any_size(rows, depth, columns, bits, group, offset, book, cpu):
    scale = "groups" if group else "rows"
    node, weights = packed((depth, columns), (1,), bits, group=group, scale=scale, offset=offset)
    if book is steps or (book and bits <= 4):  # powers of two of more bits are no floats
        weights["book"] = book(bits)
    check(text(rows, depth, columns, node), weights, cpu=cpu)


def test_the_option_is_part_of_the_target():
    target = targets.parse_target("x86{cpu=x86-64-v3 activations=int8}")
    assert str(target) == "x86{cpu=x86-64-v3 activations=int8}"
    assert target.machine().activations == "int8"
    assert " activations=int8}" in target.resolved()
    assert "activations" not in targets.parse_target("x86{cpu=x86-64-v3}").resolved()
