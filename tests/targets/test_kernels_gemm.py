from __future__ import annotations

import numpy as np
import pytest
import tvm

from mc_opt import ir
from mc_opt.targets.kernels import _split
from tests._harness import sampled
from tests.targets._kernels import build, check, feeds, lowered_model, machine, model, normal, reference

pytestmark = pytest.mark.tvm

PRODUCTS = [
    ((5, 7), (7, 9)),
    ((3, 1, 7), (7, 9)),
    ((1, 64, 33), (33, 50)),
    ((101, 33), (33, 17)),
    ((2, 1, 5, 7), (1, 3, 7, 4)),
    ((2, 3, 5, 7), (3, 7, 9)),
    ((7,), (7, 9)),
    ((5, 7), (7,)),
    ((7,), (7,)),
    ((3, 7), (2, 7, 5)),
]


def _dims(shape) -> str:
    return ",".join(map(str, shape))


@pytest.mark.parametrize("constant", sampled([True, False], [True]))
@pytest.mark.parametrize(("a", "b"), PRODUCTS)
def test_matmul(a, b, constant):
    out = np.matmul(np.zeros(a), np.zeros(b)).shape
    given = "" if constant else f", float[{_dims(b)}] w"
    text = f"g (float[{_dims(a)}] x{given}) => (float[{_dims(out)}] y) {{ c = MatMul(x, w) y = Relu(c) }}"
    check(text, {"w": normal(*b)} if constant else None)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("cpu", ["native", "x86-64-v3"])
@pytest.mark.parametrize(("a", "b"), [*PRODUCTS, ((4, 37, 300), (300, 200)), ((1, 600), (600, 333))])
def test_threads_share_every_product(a, b, cpu, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    out = np.matmul(np.zeros(a), np.zeros(b)).shape
    text = f"g (float[{_dims(a)}] x) => (float[{_dims(out)}] y) {{ c = MatMul(x, w) y = Relu(c) }}"
    check(text, {"w": normal(*b)}, threads=2, cpu=cpu)


@pytest.mark.parametrize(
    ("attributes", "a", "b", "bias"),
    [
        ("transB=1", (5, 13), (9, 13), (9,)),
        ("transA=1, alpha=0.5, beta=2.0", (13, 5), (13, 9), (5, 1)),
        ("transB=1", (17, 7), (33, 7), (17, 33)),
        ("alpha=2.0", (1, 64), (64, 10), (1,)),
    ],
)
def test_gemm(attributes, a, b, bias):
    text = f"g (float[{_dims(a)}] x) => (float[m,n] y) {{ y = Gemm<{attributes}>(x, w, b) }}"
    check(text, {"w": normal(*b), "b": normal(*bias, seed=1)})


def packed(shape, axes, bits, *, group=0, scale="rows", offset=False, book="shared", entries=0):
    """Weights of a Lookup named w, and the text of its node."""
    rng = np.random.default_rng(bits)
    rows = int(np.prod([shape[a] for a in axes]))
    columns = int(np.prod(shape)) // rows
    groups = -(-columns // group) if group else 1
    n = entries or 2**bits
    sizes = {"shared": (n,), "rows": (rows, 1, n), "groups": (rows, groups, n)}
    scales = {"one": (1, 1), "rows": (rows, 1), "groups": (rows, groups)}[scale]
    weights = {
        "codes": ir.pack_codes(rng.integers(0, n, (rows, columns)).astype(np.uint8), bits),
        "book": rng.standard_normal(sizes[book]).astype(np.float32),
        "scale": (rng.random(scales) + 0.5).astype(np.float32),
    }
    if offset:
        weights["offset"] = rng.standard_normal(scales).astype(np.float32)
    attributes = f"bits={bits}, shape={list(shape)}, axes={list(axes)}, group_size={group}"
    return f"w = mc_opt.Lookup<{attributes}>(codes, book, scale{', offset' if offset else ''})", weights


FORMS = [{"bits": b} for b in range(1, 9)] + [
    {"bits": 3, "group": 16, "scale": "groups", "offset": True},
    {"bits": 3, "group": 16, "scale": "groups", "book": "groups", "entries": 7},
    {"bits": 2, "scale": "one", "book": "rows"},
    *[{"bits": b, "group": 32, "scale": "groups"} for b in (1, 2, 4)],
]


@pytest.mark.parametrize("rows", sampled([1, 6], [1]))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_product_with_packed_weight(rows, form):
    node, weights = packed((67, 50), (1,), **form)
    check(f"g (float[{rows},67] x) => (float[{rows},50] y) {{ {node} y = MatMul(x, w) }}", weights)


@pytest.mark.parametrize("rows", sampled([1, 9], [9]))
@pytest.mark.parametrize("form", [{"bits": b} for b in (3, 4, 5)] + [{"bits": 4, "group": 16, "scale": "groups"}])
def test_product_with_packed_weight_on_avx2(rows, form):
    node, weights = packed((67, 50), (1,), **form)
    check(f"g (float[{rows},67] x) => (float[{rows},50] y) {{ {node} y = MatMul(x, w) }}", weights, cpu="x86-64-v3")


CONSUMERS = {
    "conv": ((24, 16, 3, 3), (0,), "float[1,16,9,9] x", "y = Conv<pads=[1,1,1,1]>(x, w)", {}),
    "depthwise": ((24, 1, 3, 3), (0,), "float[1,24,9,9] x", "y = Conv<group=24>(x, w)", {}),
    "transposed": ((4, 9, 3, 3), (1,), "float[1,4,5,6] x", "y = ConvTranspose<strides=[2,2]>(x, w)", {}),
    "gemm": ((50, 67), (0,), "float[1,67] x", "y = Gemm<transB=1>(x, w, b)", {"b": normal(50)}),
    "rows across": ((67, 50), (0,), "float[3,67] x", "y = MatMul(x, w)", {}),
    "left": ((8, 9), (0,), "float[9,20] x", "y = MatMul(w, x)", {}),
    "table": ((30, 12), (0,), "int64[2,3] x", "y = Gather(w, x)", {}),
    "lstm": ((1, 96, 16), (0, 1), "float[5,2,16] x", "y = LSTM<hidden_size=24>(x, w, r)", {"r": normal(1, 96, 24)}),
    "gru": ((1, 72, 24), (0, 1), "float[5,2,16] x", "y = GRU<hidden_size=24>(x, u, w)", {"u": normal(1, 72, 16)}),
}


@pytest.mark.parametrize("group", sampled([0, 8], [0]))
@pytest.mark.parametrize("name", CONSUMERS)
def test_every_consumer_takes_a_packed_weight(name, group):
    shape, axes, given, node, others = CONSUMERS[name]
    lookup, weights = packed(shape, axes, 4, group=group, scale="groups" if group else "rows")
    rank = {"conv": 4, "depthwise": 4, "transposed": 4, "lstm": 4, "gru": 4, "table": 3}.get(name, 2)
    out = ",".join(f"d{i}" for i in range(rank))
    check(f"g ({given}) => (float[{out}] y) {{ {lookup} {node} }}", {**weights, **others})


def test_the_artefact_holds_codes():
    node, weights = packed((256, 256), (1,), 4)
    proto = model(f"g (float[8,256] x) => (float[8,256] y) {{ {node} y = MatMul(x, w) }}", weights)
    _, module, _ = build(proto, machine())
    inputs = feeds(proto)
    assert reference(proto, inputs)[0].shape == (8, 256)
    constants: list[int] = []

    def visit(expr):
        if isinstance(expr, tvm.ir.GenericConst):
            constants.append(expr.value.numpy().nbytes)

    tvm.relax.analysis.post_order_visit(module["main"], visit)
    assert sum(constants) < 256 * 256 * 4 / 6


@pytest.mark.parametrize("cpu", sampled(["native", "x86-64-v3"], ["native"]))
@pytest.mark.parametrize(("rows", "places"), [(1, [3, 77, 119]), (3, [0, 0, 9, 119]), (6, [])])
def test_outliers_are_added_to_a_packed_product(rows, places, cpu):
    node, weights = packed((12, 10), (1,), 4)
    text = f"""g (float[{rows},12] x) => (float[{rows},10] y) <float[12,10] w, float[12,10] v>
        {{ {node} v = mc_opt.AddSparse(w, at, values) y = MatMul(x, v) }}"""
    weights |= {"at": np.array(places, np.int64), "values": normal(len(places), seed=5)}
    assert any("add_outliers" in line for line in lowered_model(model(text, weights), machine()).kernels)
    check(text, weights, cpu=cpu)


def test_outliers_beside_many_rows_make_the_weight_dense_and_masks_are_applied():
    node, weights = packed((12, 10), (1,), 4)
    text = f"""g (float[200,12] x) => (float[200,10] y) <float[12,10] w, float[12,10] v>
        {{ {node} v = mc_opt.AddSparse(w, at, values) y = MatMul(x, v) }}"""
    weights |= {"at": np.array([3, 77, 119]), "values": normal(3, seed=5)}
    held = lowered_model(model(text, weights), machine())
    assert [line for line in held.fallbacks if "made dense at every run, to add 3 outliers" in line]
    check(text, weights, quiet=False)
    mask = np.random.default_rng(0).random(120) < 0.3
    text = """g (float[3,12] x) => (float[3,10] y)
        { w = mc_opt.Sparse<shape=[12,10]>(bitmap, values) y = MatMul(x, w) }"""
    check(text, {"bitmap": np.packbits(mask, bitorder="little"), "values": normal(int(mask.sum()))})
