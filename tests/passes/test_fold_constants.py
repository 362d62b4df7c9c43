"""fold-constants: what is computed at once, what stays, and which names survive."""
# ruff: noqa: E501  (models in one line)

from __future__ import annotations

import numpy as np
import pytest

from mc_opt import ir, passes
from tests._harness import apply, check, lines, model, skipped, to_bytes


def left_alone(before: str, spec: str = "fold-constants") -> dict[str, str]:
    context = passes.Context()
    passes.Pipeline.parse(spec).passes[0].run(model(before), context)
    return context.log.skips


def test_folds_arithmetic_of_constants() -> None:
    result = check(
        "fold-constants",
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> { c = Mul (a, b) d = Neg (c) y = Add (x, d) }",
        "y = Add(x, d)",
    )
    np.testing.assert_array_equal(result.graph.initializers["d"].const_value.numpy(), [-3, -8])
    assert set(result.graph.initializers) == {"d"}


def test_folds_static_shapes_and_parts_of_symbolic_ones() -> None:
    check(
        "fold-constants",
        """g (float[N,4,3] x) => (float[A,B,C] y) <int64[1] one = {1}, int64 i = {1}, int64[2] rest = {-1, 1}> {
            s = Shape (x)
            c = Gather (s, one)
            d = Slice (s, one, three)
            n = Gather (s, zero)
            t = Concat <axis: int = 0> (n, c, last)
            y = Reshape (x, t)
        }""".replace(
            "int64[1] one = {1}", "int64[1] one = {1}, int64[1] zero = {0}, int64[1] three = {3}, int64[1] last = {3}"
        ),
        "s = Shape(x)\nn = Gather(s, zero)\nt = Concat(n, c, last) {axis=0}\ny = Reshape(x, t)",
    )


def test_equal_names_of_symbolic_dimensions_are_not_taken_for_equal() -> None:
    """Files call every unknown dimension "?"."""
    check(
        "fold-constants",
        """g (float[a,a] x, float[a,a] z) => (float[b,c] y) { s = Shape (z) y = Reshape (x, s) }""",
        "s = Shape(z)\ny = Reshape(x, s)",
    )


def test_takes_out_what_changes_nothing() -> None:
    check(
        "fold-constants",
        """g (float[2,3] x) => (float[2,3] y) <float ratio = {0.5}, int64[2] same = {2, 3}> {
            a = Identity (x)
            b = Dropout (a, ratio)
            c = Cast <to: int = 1> (b)
            d = Reshape (c, same)
            e = Transpose <perm: ints = [0,1]> (d)
            f = Expand (e, same)
            g1 = Concat <axis: int = 0> (f)
            h = CastLike (g1, x)
            y = Relu (h)
        }""",
        "y = Relu(x)",
    )


def test_an_output_keeps_its_name() -> None:
    check("fold-constants", "g (float[2] x) => (float[2] y) { h = Relu (x) y = Identity (h) }", "y = Relu(x)")
    check("fold-constants", "g (float[2] x) => (float[2] y) { y = Identity (x) }", "y = Identity(x)")
    check(
        "fold-constants",
        "g (float[2] x) => (float[2] y, float[2] k) <float[2] a = {1, 2}> { y = Relu (x) k = Neg (a) }",
        "y = Relu(x)\nk = Identity(k.value)",
    )


def test_inlines_an_if_and_renames_what_would_clash() -> None:
    check(
        "fold-constants",
        """g (float[2] x) => (float[2] y) <bool yes = {1}> {
            t = Abs (x)
            v = If (yes) <
                then_branch = a () => (float[2] r) { h = Neg (t) r = Exp (h) },
                else_branch = b () => (float[2] s) { s = Identity (x) }
            >
            w = If (yes) <
                then_branch = c () => (float[2] q) { h = Neg (v) q = Tanh (h) },
                else_branch = d () => (float[2] p) { p = Identity (v) }
            >
            y = Add (w, x)
        }""",
        "t = Abs(x)\nh.1 = Neg(t)\nv = Exp(h.1)\nh = Neg(v)\nw = Tanh(h)\ny = Add(w, x)",
    )


def test_a_weight_in_another_order_keeps_its_name() -> None:
    result = check(
        "fold-constants",
        "g (float[2,8] x) => (float[2,6] y) <float[6,8] w> { t = Transpose <perm: ints = [1,0]> (w) y = MatMul (x, t) }",
        "y = MatMul(x, w)",
    )
    assert list(result.graph.initializers["w"].shape or ()) == [8, 6]


def test_gates_cut_and_joined_anew_fold_together() -> None:
    """Each slice of 128 KiB alone would store more than it frees."""
    result = check(
        "fold-constants",
        """g (float[2,128] x) => (float[2,512] y)
        <float[512,128] w, int64[1] zero = {0}, int64[1] a = {256}, int64[1] end = {512}> {
            front = Slice (w, zero, a, zero)
            back = Slice (w, a, end, zero)
            swapped = Concat <axis: int = 0> (back, front)
            t = Transpose <perm: ints = [1,0]> (swapped)
            y = MatMul (x, t)
        }""",
        "y = MatMul(x, w)",
    )
    assert set(result.graph.initializers) == {"w"}


def test_leaves_alone_what_would_grow_the_file() -> None:
    tied = """g (float[2,256] x, int64[2] i) => (float[2,256] y, float[2,256] e) <float[256,256] w> {
        t = Transpose <perm: ints = [1,0]> (w)
        y = MatMul (x, t)
        e = Gather (w, i)
    }"""
    assert left_alone(tied) == {"t": "Transpose of constants stays: folding it would store 262144 bytes and free 0"}
    half = """g (float[2,64] x) => (float[2,64] y) <float16[64,64] w> {
        t = Cast <to: int = 1> (w)
        y = MatMul (x, t)
    }"""
    assert "stores" in left_alone(half)["t"] or "store 16384" in left_alone(half)["t"]
    filled = (
        """g (float[65536] x) => (float[65536] y) <int64[1] n = {65536}> { c = ConstantOfShape (n) y = Add (x, c) }"""
    )
    assert "store 262144 bytes" in left_alone(filled)["c"]


def test_leaves_alone_what_takes_too_much_memory() -> None:
    big = """g (float[2,1024] x) => (float[2,512] y) <float[512,1024] w> {
        t = Transpose <perm: ints = [1,0]> (w)
        y = MatMul (x, t)
    }"""
    assert "4 MiB, the limit is 1 MiB" in left_alone(big, "fold-constants{limit=1}")["t"]
    assert left_alone(big) == {}


def test_keeps_decode_ops_batch_norm_and_quantisation() -> None:
    packed, _ = apply(
        "denseshift{skip=}", model("g (float[2,8] x) => (float[2,12] y) <float[8,12] w> { y = MatMul (x, w) }")
    )
    assert apply("fold-constants", packed)[1] == 0
    kept = """g (float[2,4] x) => (float[2,4] y)
    <int8[4,4] q, float s = {0.5}, float[4] a, float[4] b, float[4] m, float[4] var> {
        w = DequantizeLinear (q, s)
        h = MatMul (x, w)
        y = BatchNormalization (h, a, b, m, var)
    }"""
    assert lines(ir.nodes_text(apply("fold-constants", model(kept))[0].graph)) == lines(
        ir.nodes_text(model(kept).graph)
    )


def test_removes_what_nothing_uses() -> None:
    result = check(
        "fold-constants",
        """g (float[2] x) => (float[2] y) <float[2] left = {1, 2}> { dead = Neg (x) deader = Abs (dead) y = Relu (x) }""",
        "y = Relu(x)",
    )
    assert not result.graph.initializers


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_numbers_stay_random(op: str) -> None:
    before = f"g (float[2] x) => (float[2] y) <float[2] p = {{0.5, 0.5}}> {{ r = {op} (p) y = Add (x, r) }}"
    assert apply("fold-constants", model(before))[1] == 0


def test_nothing_to_do_changes_no_byte() -> None:
    source = model("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    changed, rewrites = apply("fold-constants", source)
    assert rewrites == 0 and to_bytes(changed) == to_bytes(source)
    assert skipped("fold-constants", "g (float[2] x) => (float[2] y) { y = Relu (x) }") == {}
