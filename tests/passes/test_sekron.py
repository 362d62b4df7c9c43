"""sekron: what becomes of each kind of layer, what is left alone and why, and the sizes that may be asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.passes import _factorise, _plan
from tests._harness import apply, check, largest_difference, model, sampled, skipped, to_bytes

CONV = """g (float[1,32,20,20] x) => (float[1,48,20,20] y) <float[48,32,3,3] w, float[48] b> {
    y = Conv <pads: ints = [1,1,1,1]> (x, w, b)
}"""
LINEAR = "g (float[N,64] x) => (float[N,96] y) <float[64,96] w> { y = MatMul (x, w) }"


def low_rank(shape: tuple[int, ...], rank: int) -> np.ndarray:
    """A weight that a few terms hold exactly, its first axis against the others."""
    rng = np.random.default_rng(0)
    rest = int(np.prod(shape[1:]))
    return (rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, rest))).reshape(shape)


def dense_again(result: onnx_ir.Model, name: str) -> np.ndarray:
    """The weight that the factors of `name` make."""
    values = result.graph.initializers
    arrays = []
    while f"{name}.factor{len(arrays) + 1}" in values:
        tensor = values[f"{name}.factor{len(arrays) + 1}"].const_value
        assert tensor is not None
        arrays.append(tensor.numpy())
    node = next(n for n in result.graph if n.domain == "mc_opt")
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    axes = len(x.shape) if node.op_type == "SeKronConv" else 2
    return ir.kron_weight(arrays, arrays[0].ndim - axes)


def test_a_conv_becomes_a_chain() -> None:
    check(
        "sekron{structure=tucker}",
        CONV,
        "y = mc_opt.SeKronConv(x, b, w.factor1, w.factor2, w.factor3) {dilations=[1, 1], pads=[1, 1, 1, 1], "
        "strides=[1, 1]}",
        weights={"w": low_rank((48, 32, 3, 3), 6)},
    )


def test_a_matrix_product_becomes_two_and_keeps_its_rows_open() -> None:
    result = check(
        "sekron{structure=gkpd}",
        LINEAR,
        "y = mc_opt.KronLinear(x, _, w.factor1, w.factor2)",
        weights={"w": low_rank((64, 96), 9)},
    )
    assert largest_difference(model(LINEAR, {"w": low_rank((64, 96), 9)}), result, {"x": np.ones((3, 64), "f4")}) < 1e-2


@pytest.mark.parametrize(
    ("attributes", "a", "w", "y"),
    [
        ("", "5,64", "64,96", "5,96"),
        ("transB: int = 1", "5,64", "96,64", "5,96"),
        ("transA: int = 1", "64,5", "64,96", "5,96"),
        ("transA: int = 1, transB: int = 1, alpha: float = 0.5, beta: float = 2.0", "64,5", "96,64", "5,96"),
    ],
)
@pytest.mark.parametrize("c", ["96", "1,96", "5,1"])
def test_every_gemm(attributes: str, a: str, w: str, y: str, c: str) -> None:
    text = f"""g (float[{a}] x) => (float[{y}] y) <float[{w}] w, float[{c}] c> {{
        y = Gemm <{attributes}> (x, w, c)
    }}""".replace("<>", "")
    rows, columns = (int(d) for d in w.split(","))
    weights = {"w": low_rank((rows, columns), 3)}
    result = check("sekron{structure=gkpd}", text, weights=weights)
    x = np.random.default_rng(0).standard_normal([int(d) for d in a.split(",")]).astype(np.float32)
    assert largest_difference(model(text, weights), result, {"x": x}) < 1e-3


def test_a_constant_on_the_left_stands_between_transposes() -> None:
    text = "g (float[2,64,5] x) => (float[2,96,5] y) <float[96,64] w> { y = MatMul (w, x) }"
    weights = {"w": low_rank((96, 64), 3)}
    result = check("sekron{structure=gkpd}", text, weights=weights)
    assert [n.op_type for n in result.graph] == ["Transpose", "KronLinear", "Transpose"]
    x = np.random.default_rng(0).standard_normal((2, 64, 5)).astype(np.float32)
    assert largest_difference(model(text, weights), result, {"x": x}) < 1e-3


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ids", ["", "3", "2,3"])
def test_a_table_is_read_in_factors(ids: str, *, split: bool) -> None:
    rng = np.random.default_rng(0)
    table = np.kron(rng.standard_normal((300, 4)), rng.standard_normal((1, 6))) if split else low_rank((300, 24), 2)
    dims = f"{ids},24" if ids else "24"
    text = f"g (int64[{ids}] i) => (float[{dims}] y) <float[300,24] t> {{ y = Gather (t, i) }}".replace("[]", "")
    result = check("sekron{ratio=0.17}", text, weights={"t": table})
    kinds = [n.op_type for n in result.graph]
    assert kinds == (["Gather", "Reshape", "MatMul", "Reshape"] if split else ["Gather", "MatMul"])
    indices = np.random.default_rng(0).integers(0, 300, [int(d) for d in ids.split(",") if d])
    assert largest_difference(model(text, {"t": table}), result, {"i": indices}) < 1e-3
    assert apply("sekron", result)[1] == 0, "the MatMul and the smaller table are factors already"


def test_a_factored_table_is_no_first_layer() -> None:
    """`skip=first` means a layer; the product of a table's factors is still an embedding, which is taken."""
    text = """g (int64[8] i) => (float[8,24] y) <float[300,24] t, float[24,24] a, float[24,24] z> {
        x = Gather (t, i)
        h = MatMul (x, a)
        y = MatMul (h, z)
    }"""
    result = check("sekron{layers=t},denseshift", text, weights={"t": low_rank((300, 24), 2)})
    decoded = sorted(n.outputs[0].name for n in result.graph if n.op_type == "Lookup")
    assert decoded == ["t.factor1", "t.factor2"], "a is first and z is last"


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((8, 4, 5), "pads: ints = [2,2]"),
        ((8, 4, 5), "strides: ints = [3], dilations: ints = [2]"),
        ((8, 4, 3, 3), "strides: ints = [2,1], pads: ints = [1,0,2,1]"),
        ((8, 4, 3, 3), 'auto_pad: string = "SAME_UPPER", strides: ints = [2,2]'),
        ((8, 4, 3, 2), 'auto_pad: string = "SAME_LOWER"'),
        ((8, 4, 3, 3), 'auto_pad: string = "VALID", dilations: ints = [2,2]'),
        ((8, 2, 3, 3), "group: int = 2, pads: ints = [1,1,1,1]"),
        ((8, 4, 1, 1), "strides: ints = [2,2]"),
        ((4, 2, 3, 3, 3), "pads: ints = [1,1,1,1,1,1]"),
    ],
)
@pytest.mark.parametrize("structure", sampled(["gkpd", "tucker", "tt", "cp", "sekron"], ["gkpd", "sekron"]))
def test_every_window_of_every_structure(
    shape: tuple[int, ...], attributes: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = 2 if "group" in attributes else 1
    sizes = ",".join(str(9 + axis) for axis in range(len(shape) - 2))
    text = f"""g (float[2,{shape[1] * group},{sizes}] x) => (float[N,{shape[0]},{"A,B,C"[: 2 * len(shape) - 5]}] y)
    <float[{",".join(map(str, shape))}] w, float[{shape[0]}] b> {{ y = Conv <{attributes}> (x, w, b) }}"""
    source = model(text, {"w": low_rank(shape, 2)})
    step = passes.Pipeline.parse(f"sekron{{structure={structure} ratio=0.7}}")
    # Small layers are slower in factors; what is held here is that they compute the same.
    monkeypatch.setattr(
        _factorise,
        "choose",
        lambda layer, asked, seed: _plan.choose(layer, replace(asked, limit_time=False), seed=seed),
    )
    result = passes.run(source, step, passes.Context()).model
    dense = dense_again(result, "w").astype(np.float32)
    expected = model(text, {"w": dense})
    x = np.random.default_rng(0).standard_normal((2, shape[1] * group, *range(9, 7 + len(shape)))).astype(np.float32)
    ours, theirs = ir.Session(result).run({"x": x})["y"], ir.Session(expected).run({"x": x})["y"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(np.abs(theirs).max()))


def test_a_tied_weight_is_factorised_once() -> None:
    text = """g (float[5,64] x) => (float[5,64] y) <float[64,64] w> {
        h = MatMul (x, w)
        y = MatMul (h, w)
    }"""
    result = check("sekron{structure=gkpd}", text, weights={"w": low_rank((64, 64), 4)})
    assert [n.op_type for n in result.graph] == ["KronLinear", "KronLinear"]
    assert result.graph[0].inputs[2:] == result.graph[1].inputs[2:]


def test_half_weights_stay_half() -> None:
    text = "g (float16[8,64] x) => (float16[8,96] y) <float16[64,96] w> { y = MatMul (x, w) }"
    source = model(text, {"w": low_rank((64, 96), 4) / 8})
    result = passes.run(source, passes.Pipeline.parse("sekron"), passes.Context()).model
    factor = result.graph.initializers["w.factor1"]
    assert factor.dtype == onnx_ir.DataType.FLOAT16


def test_factors_are_quantised_like_weights() -> None:
    text = """g (float[8,64] x) => (float[8,64] y) <float[64,64] a, float[64,64] w, float[64,64] z> {
        h = MatMul (x, a)
        i = MatMul (h, w)
        y = MatMul (i, z)
    }"""
    result = check("sekron{structure=gkpd},denseshift", text)
    decoded = sorted(n.outputs[0].name for n in result.graph if n.op_type == "Lookup")
    assert decoded == ["w.factor1", "w.factor2"], "first and last are known by the layers that they are factors of"
    ran = passes.run(model(text), passes.Pipeline.parse("sekron,denseshift"), passes.Context())
    rows = {(row.layer, row.rewritten_by): row for row in ran.report.layers}
    assert rows["w", "sekron"].elements == 64 * 64
    assert rows["w", "sekron"].bytes_after <= rows["w", "sekron"].bytes_before / 2
    assert ("w.factor1", "denseshift") in rows
    assert ran.report.after.parameters < ran.report.before.parameters


def test_an_error_is_kept_at_the_least_size() -> None:
    w = low_rank((48, 32, 3, 3), 6) + 0.01 * np.random.default_rng(1).standard_normal((48, 32, 3, 3))
    sizes = []
    for error in (0.6, 0.1, 0.01):
        result = passes.run(
            model(CONV, {"w": w}), passes.Pipeline.parse(f"sekron{{error={error}}}"), passes.Context()
        ).model
        dense = dense_again(result, "w")
        assert np.linalg.norm(w - dense) <= error * np.linalg.norm(w)
        sizes.append(sum(v.const_value.size for k, v in result.graph.initializers.items() if "factor" in k))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_share_of_the_multiplications_is_kept() -> None:
    result = passes.run(model(CONV), passes.Pipeline.parse("sekron{flops=0.3}"), passes.Context()).model
    node = next(n for n in result.graph if n.op_type == "SeKronConv")
    assert ir.find_op("SeKronConv").work(node).mul <= 0.3 * 48 * 32 * 9 * 400


def test_ranks_are_taken_as_given() -> None:
    result = check("sekron{structure=tucker ranks=5,7}", CONV)
    shapes = [tuple(result.graph.initializers[f"w.factor{k}"].shape.numpy()) for k in (1, 2, 3)]
    assert shapes == [(5, 1, 48, 1, 1, 1), (5, 7, 1, 1, 3, 3), (1, 7, 1, 32, 1, 1)]


def test_says_what_it_leaves_and_why() -> None:
    text = """g (float[1,4,9,9] x, float[2,8] v, float[3,1,8] s) => (float[1,4,7,7] y, float[2,8] z, float[3,1,1,8] h)
    <float[4,1,3,3] deep, float[8,8] tiny, float[2,8,8] batch, float[1,32,8] wi, float[1,32,8] wr> {
        y = Conv <group: int = 4> (x, deep)
        z = MatMul (v, tiny)
        b = MatMul (v, batch)
        h = LSTM <hidden_size: int = 8> (s, wi, wr)
    }"""
    reasons = skipped("sekron{layers=deep,batch,wi,wr,tiny}", text)
    assert "C/group = 1" in reasons["deep"]
    assert "batch of matrices" in reasons["batch"]
    assert "not factored yet" in reasons["wi"] and "not factored yet" in reasons["wr"]
    assert "would be slower" in reasons["tiny"] and "us" in reasons["tiny"]


def test_declines_what_cannot_gain() -> None:
    prime = "g (float[2,2] x) => (float[2,3] y) <float[2,3] w> { y = MatMul (x, w) }"
    assert skipped("sekron{ratio=0.1}", prime) == {"w": "no factors of 3 x 2 fit in 0 numbers, 0.1 of its 6"}
    noise = {"w": np.random.default_rng(0).standard_normal((64, 96))}
    assert "within it" in skipped("sekron{error=0.001}", LINEAR, noise)["w"]
    assert "ranks=1,2,3" in skipped("sekron{structure=gkpd ranks=1,2,3}", LINEAR, noise)["w"]
    assert skipped("sekron", LINEAR, {"w": np.zeros((64, 96))})["w"].startswith("all its weights are 0")


def test_declines_weights_that_are_not_finite() -> None:
    w = np.ones((64, 96))
    w[3, 4] = np.inf
    assert "NaN" in skipped("sekron", LINEAR, {"w": w})["w"]


def test_packed_weights_stay_packed() -> None:
    once, _ = apply("denseshift{skip=}", model(LINEAR))
    twice, rewrites = apply("sekron", once)
    assert rewrites == 0 and to_bytes(twice) == to_bytes(once)


def test_the_number_of_workers_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[8,64] x) => (float[8,64] y) <float[64,64] a, float[64,48] w, float[48,64] z> {
        h = MatMul (x, a)
        i = MatMul (h, w)
        y = MatMul (i, z)
    }"""
    many = to_bytes(apply("sekron", model(text))[0])
    monkeypatch.setattr("mc_opt.passes._factorise._LARGE", 1)
    assert to_bytes(apply("sekron", model(text))[0]) == many


def test_says_which_option_is_wrong() -> None:
    for text, word in (
        ("ratio=1.5", "between 0 and 1"),
        ("ratio=0", "between 0 and 1"),
        ("error=0.1 flops=0.5", "choose one"),
        ("ranks=0", "1 or more"),
        ("structure=svd", "gkpd"),
    ):
        with pytest.raises(ir.OptionError, match=word):
            passes.Pipeline.parse(f"sekron{{{text}}}")
