"""Open sizes: one build of a model, right for every batch and every length of a sequence."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir, targets
from mc_opt.targets._manifest import Port
from mc_opt.targets._relax import lower
from mc_opt.targets._vm import check_inputs
from tests._harness import model, sampled
from tests.targets._kernels import check, machine, normal

pytestmark = [pytest.mark.tvm, pytest.mark.zig]

HEADER = '<ir_version: 10, opset_import: ["": 21]>'
# One, below and above a tile and a vector, and primes.
SIZES = [{"b": b, "s": s} for b, s in itertools.product((1, 3), (1, 7, 16, 37))]
BATCHES = [{"b": b} for b in (1, 2, 7, 8, 13)]


@pytest.mark.parametrize("cpu", sampled(["native", "x86-64-v3"], ["native"]))
@pytest.mark.parametrize("threads", sampled([1, 2], [2]))
def test_products(cpu: str, threads: int) -> None:
    text = """g (float[b,s,48] x) => (float[b,s,40] y, float[b,7] z, float[7,b] t) {
        h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)
        last = Constant<value_ints=[-1]>() end = Constant<value_ints=[9223372036854775807]>()
        one = Constant<value_ints=[1]>() end_row = Slice(x, last, end, one) row = Squeeze(end_row, one)
        z = Gemm<transB=1, alpha=0.5, beta=2.0>(row, u, c) t0 = Gemm<transB=1>(u, row) t = Abs(t0) }"""
    weights = {"w": normal(48, 96), "v": normal(96, 40, seed=1), "u": normal(7, 48, seed=2), "c": normal(7)}
    check(text, weights, cpu=cpu, threads=threads, sizes=SIZES)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("threads", [1, 2])
def test_a_block_of_a_transformer(threads: int) -> None:
    text = """g (int64[b,s] ids, int64[b,s] mask) => (float[b,32] y) {
        e = Gather(table, ids) shape = Shape(ids)
        one = Constant<value_ints=[1]>() two = Constant<value_ints=[2]>()
        length = Slice(shape, one, two) zero = Constant<value_ints=[0]>()
        p = Slice(positions, zero, length) x0 = Add(e, p)
        x = LayerNormalization(x0, g0, b0)
        heads = Constant<value_ints=[0,-1,2,16]>()
        q0 = MatMul(x, wq) q1 = Add(q0, b1) q2 = Reshape(q1, heads) q = Transpose<perm=[0,2,1,3]>(q2)
        k0 = MatMul(x, wk) k2 = Reshape(k0, heads) k = Transpose<perm=[0,2,3,1]>(k2)
        v0 = MatMul(x, wv) v2 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v2)
        scores = MatMul(q, k) c = Constant<value_float=0.25>() scaled = Mul(scores, c)
        on = Cast<to=9>(mask) axes = Constant<value_ints=[1,2]>() spread = Unsqueeze(on, axes)
        nothing = Constant<value_float=0.0>() low = Constant<value_float=-1e30>()
        added = Where(spread, nothing, low) masked = Add(scaled, added)
        weights = Softmax<axis=-1>(masked) o = MatMul(weights, v) o1 = Transpose<perm=[0,2,1,3]>(o)
        flat = Constant<value_ints=[0,0,32]>() o2 = Reshape(o1, flat) x1 = Add(x, o2)
        h = MatMul(x1, wf) h1 = Gelu(h) f = MatMul(h1, wg) x2 = Add(x1, f)
        m = Cast<to=1>(mask) m2 = Unsqueeze(m, two) kept = Mul(x2, m2)
        total = ReduceSum<keepdims=0>(kept, one) count = ReduceSum<keepdims=0>(m2, one)
        safe = Constant<value_float=1.0>() count1 = Max(count, safe) y = Div(total, count1) }"""
    names = ("wq", "wk", "wv")
    weights = {name: normal(32, 32, seed=k) for k, name in enumerate(names)}
    weights |= {"table": normal(11, 32), "positions": normal(40, 32), "g0": normal(32), "b0": normal(32)}
    weights |= {"b1": normal(32), "wf": normal(32, 64), "wg": normal(64, 32)}
    check(text, weights, threads=threads, sizes=SIZES)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("threads", [1, 2])
def test_a_small_network_for_pictures(threads: int) -> None:
    text = """g (float[b,3,12,10] x) => (float[b,5] y) {
        c = Conv<pads=[1,1,1,1]>(x, w, c0) r = Relu(c) d = Conv<group=8, kernel_shape=[3,3]>(r, dw)
        m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d) a = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(m)
        p = Conv(a, pw) gate0 = GlobalAveragePool(p) gate = HardSigmoid(gate0) s = Mul(p, gate)
        last = GlobalMaxPool(s) f = Flatten(last) y0 = Gemm<transB=1>(f, fw, fb) y = Softmax<axis=1>(y0) }"""
    weights = {"w": normal(8, 3, 3, 3), "c0": normal(8), "dw": normal(8, 1, 3, 3), "pw": normal(16, 8, 1, 1)}
    check(text, weights | {"fw": normal(5, 16), "fb": normal(5)}, threads=threads, sizes=BATCHES)


@pytest.mark.slow
def test_reductions_and_softmax_along_open_axes() -> None:
    text = """g (float[b,s,5] x) => (float[b,5] m, float[b,1,5] t, float[b,s] u, float all, int64[b,5] i,
                                   float[b,s,5] y, float[b,s,5] z, float[b,5] l) {
        one = Constant<value_ints=[1]>() two = Constant<value_ints=[2]>()
        m = ReduceMean<keepdims=0>(x, one) t = ReduceMax(x, one) u = ReduceSum<keepdims=0>(x, two)
        all = ReduceMean<keepdims=0>(x) i = ArgMax<axis=1, keepdims=0>(x)
        y = Softmax<axis=1>(x) z = LogSoftmax<axis=0>(x) l = ReduceLogSumExp<keepdims=0>(x, one) }"""
    check(text, sizes=SIZES, quiet=False)


@pytest.mark.slow
def test_shapes_are_computed_while_building() -> None:
    text = """g (float[b,s,6] x, float[b,s,6] w) => (float[b,t] y, float[b,u,6] cut, float[b,v,6] joined, int64[s] r,
                                                   float[b,t] filled, float[b,s,s] low, int64[3] shape,
                                                   float[p,6] rows) {
        shape = Shape(x) zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()
        two = Constant<value_ints=[2]>() minus = Constant<value_ints=[-1]>()
        batch = Gather(shape, zero) length = Gather(shape, one) width = Gather(shape, two)
        area = Mul(length, width) target = Concat<axis=0>(batch, area) y = Reshape(x, target)
        cut = Slice(x, zero, minus, one) joined = Concat<axis=1>(x, w)
        z = Constant<value_int=0>() step = Constant<value_int=1>() n = Squeeze(length) r = Range(z, n, step)
        zeros = ConstantOfShape(target) filled = Add(zeros, y)
        turned = Transpose<perm=[0,2,1]>(x) square = MatMul(x, turned) low = Trilu<upper=0>(square)
        flat = Constant<value_ints=[-1,6]>() rows = Reshape(x, flat) }"""
    check(text, sizes=SIZES)


def test_sizes_of_two_names_may_not_meet() -> None:
    text = f"{HEADER} g (float[n,3] x, float[m,3] w) => (float[k,3] y) {{ y = Add(x, w) }}"
    with pytest.raises(targets.TargetError, match=r"Add .*extents n and m meet, and are not known to be equal; give"):
        lower.lower(model(text), machine(), lambda *_: None)


def test_an_op_of_one_shape_is_named() -> None:
    text = f"{HEADER} g (float[n,3] x) => (float[k,3] y) {{ i = Constant<value_int=2>() y, j = TopK<axis=0>(x, i) }}"
    with pytest.raises(targets.TargetError, match=r"TopK .*: its inputs are nx3, .*built for one shape; fix n with"):
        lower.lower(model(text), machine(), lambda *_: None)


def test_the_static_form_has_one_shape() -> None:
    text = f"{HEADER} g (float[n,3] x) => (float[n,3] y) {{ y = Relu(x) }}"
    with pytest.raises(targets.TargetError, match=r"x86: input 'x' .* form=static plans .*build form=vm, or .*x=1x3$"):
        targets.parse_target("x86{form=static}").check(model(text))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"ids": (2, 3), "mask": (2, 4)}, "'s' is 4, but 3 in input 'ids'; a dimension has one size"),
        ({"ids": (0, 3), "mask": (0, 3)}, "'b' is 0; expected 1 or more"),
        ({"ids": (2, 9), "mask": (2, 9)}, "'s' is 9, and the model takes at most 8; cut it"),
        (
            {"ids": (2, 3, 1), "mask": (2, 3)},
            r"has shape \[2, 3, 1\], expected \[b, s\]; .* a name stands for any size",
        ),
    ],
)
def test_inputs_are_held_to_one_size_a_name(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    ports = (Port("ids", ("b", "s"), "int64"), Port("mask", ("b", "s"), "int64"))
    with pytest.raises(ir.DataError, match=message):
        check_inputs(ports, {k: np.zeros(v, np.int64) for k, v in shapes.items()}, {"s": 8})


@pytest.mark.slow
@pytest.mark.ci
def test_an_artefact_runs_every_size_and_says_what_is_open(tmp_path: Path) -> None:
    source = onnx.parser.parse_model(
        f"{HEADER} g (float[n,8] x, float[k,8] w) => (float[n,16] y, float[k,8] v) {{ h = MatMul(x, m) y = Relu(h)"
        " v = Neg(w) }"
    )
    source.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, 16), "m"))
    targets.parse_target("x86").compile(onnx_ir.from_proto(source), tmp_path, lambda *_: None)
    artefact = targets.load_artefact(tmp_path)
    assert [p.shape for p in (*artefact.inputs, *artefact.outputs)] == [("n", 8), ("k", 8), ("n", 16), ("k", 8)]
    for n, k in ((1, 5), (17, 1), (4, 4), (64, 2)):
        x, w = normal(n, 8, seed=n), normal(k, 8, seed=k)
        y = artefact.run({"x": x, "w": w})
        np.testing.assert_allclose(y["y"], np.maximum(x @ normal(8, 16), 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y["v"], -w)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("shape", ["s,b", "s,2", "5,b"])
def test_recurrent_ops(op: str, gates: int, shape: str) -> None:
    batch = shape.rpartition(",")[2]
    text = f"""g (float[{shape},12] x, float[2,{batch},20] h) => (float[d,2,{batch},20] y, float[2,{batch},20] last) {{
        y, last = {op}<hidden_size=20, direction="bidirectional">(x, w, r, c, , h) }}"""
    weights = {"w": normal(2, gates * 20, 12), "r": normal(2, gates * 20, 20, seed=1), "c": normal(2, gates * 40)}
    check(text, weights, sizes=SIZES)


@pytest.mark.slow
def test_rows_that_are_a_multiple() -> None:
    text = """g (float[s,2,48] x, float[b,s,64] z) => (float[s,2,96] y, float[m,s,s] q) {
        flat = Constant<value_ints=[-1,48]>() f = Reshape(x, flat) h = MatMul(f, w) r = Relu(h)
        pairs = Constant<value_ints=[-1,2,96]>() y = Reshape(r, pairs)
        heads = Constant<value_ints=[0,0,4,16]>() z4 = Reshape(z, heads) z5 = Transpose<perm=[0,2,1,3]>(z4)
        shape = Shape(z) zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()
        batch = Gather(shape, zero) length = Gather(shape, one) four = Constant<value_ints=[4]>()
        width = Constant<value_ints=[16]>() all = Mul(batch, four) matrices = Concat<axis=0>(all, length, width)
        a = Reshape(z5, matrices) t = Transpose<perm=[0,2,1]>(a) q = MatMul(a, t) }"""
    check(text, {"w": normal(48, 96)}, sizes=SIZES)


@pytest.mark.slow
def test_norms_and_rearrangements() -> None:
    text = """g (float[b,8,4,4] x, float[b,s,6] z) => (float[b,8,4,4] y, float[b,8,4,4] v, float[b,8,4,4] n,
                                                      float[b,s,6] c, float[b,2,8,8] d, float[b,t,6] p) {
        y = InstanceNormalization(x, w, u) v = GroupNormalization<num_groups=2>(x, w, u)
        n = BatchNormalization(x, w, u, u, one) a = Constant<value_int=1>() c = CumSum(z, a)
        d = DepthToSpace<blocksize=2>(x) pads = Constant<value_ints=[0,2,0,0,1,0]>() p = Pad(z, pads) }"""
    weights = {"w": normal(8), "u": normal(8, seed=1), "one": np.ones(8, np.float32)}
    check(text, weights, sizes=SIZES)
