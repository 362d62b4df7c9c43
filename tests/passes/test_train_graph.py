"""What training losses decide from a graph: which outputs are scores, which inner values tell most."""

from __future__ import annotations

import pytest

from mc_opt.passes._train_graph import reading, telling_values
from tests import _harness
from tests.passes.train_models import ATTENTION, CONVS, FRAMES, LOG_SOFTMAX, LOGITS, SOFTMAX, TANH


@pytest.mark.parametrize(
    ("source", "meaning", "axis"),
    [
        (LOGITS, "logits", 1),
        (TANH, "values", -1),
        (SOFTMAX, "probabilities", 1),
        (LOG_SOFTMAX, "log-probabilities", 1),
        (FRAMES, "logits", 2),
        (CONVS, "logits", 1),
        ("m (float[N,4] x) => (float[N,1] y) <float[4,1] w> { y = MatMul (x, w) }", "values", -1),
        ("m (float[N,4] x) => (float[N,4] y) { y = Sigmoid (x) }", "values", -1),
        ("m (float[N,3] x) => (float[N,3] y) <float[3,3] w> { h = Gemm (x, w)  y = Relu (h) }", "values", -1),
        (
            "m (float[2,3,4,4] x) => (float[2,4,4,5] y) <float[5,3,1,1] w>"
            " { c = Conv (x, w)  y = Transpose <perm: ints = [0,2,3,1]> (c) }",
            "logits",
            3,
        ),
        (
            "m (float[2,3,4,4] x) => (float[2,3,4,4] y) <float[3,3,1,1] w>"
            " { c = Conv (x, w)  y = Softmax <axis: int = 1> (c) }",
            "probabilities",
            1,
        ),
        (
            "m (float[2,3,4,4] x) => (float[2,5] y) <float[5,3,1,1] w, int64[2] axes = {2, 3}>"
            " { c = Conv (x, w)  y = ReduceMean <keepdims: int = 0> (c, axes) }",
            "logits",
            1,
        ),
        (
            "m (float[N,4] x) => (float[N,3] y) <float[4,3] w, int64[1] axes = {1}>"
            " { h = MatMul (x, w)  l = ReduceL2 (h, axes)  y = Div (h, l) }",
            "values",
            -1,
        ),
        (
            "m (float[N,4] x) => (float[N,3] y) <float[4,3] w, int64[1] axes = {1}>"
            " { h = MatMul (x, w)  e = Exp (h)  t = ReduceSum (e, axes)  y = Div (e, t) }",
            "probabilities",
            1,
        ),
    ],
)
def test_what_an_output_holds(source: str, meaning: str, axis: int) -> None:
    found = reading(_harness.model(source).graph.outputs[0])
    assert (found.meaning, found.axis) == (meaning, axis)


def test_values_that_layers_compares() -> None:
    assert telling_values(_harness.model(ATTENTION)) == ("e", "scores", "n", "h")
    assert telling_values(_harness.model(CONVS)) == ("n2", "n3")
    mlp = """
    m (float[2,4] x) => (float[2,3] y) <float[4,4] a, float[4,3] b>
    { h = MatMul (x, a)  r = Relu (h)  y = MatMul (r, b) }
    """
    assert telling_values(_harness.model(mlp)) == ("h",)


def test_a_normalisation_written_out_is_one() -> None:
    source = """
    m (float[2,4] x) => (float[2,4] y) <float[4] g, float[4] b, float[4,4] w, float e = {0.1}, int64[1] axes = {1}>
    { c = ReduceMean (x, axes)  d = Sub (x, c)  q = Mul (d, d)  v = ReduceMean (q, axes)  ve = Add (v, e)  r = Sqrt (ve)
      o = Div (d, r)  og = Mul (o, g)  n = Add (og, b)  y = MatMul (n, w) }
    """
    assert telling_values(_harness.model(source)) == ("n",)


def test_the_end_of_a_residual_block_is_told_by_its_missing_activation() -> None:
    source = """
    m (float[2,4,8,8] x) => (float[2,4,8,8] y)
    <float[8,4,1,1] wide, float[4,8,1,1] narrow, float[4] s, float[4] b, float[4] mean, float[4] var_a,
     float[8] s8, float[8] b8, float[8] mean8, float[8] var_8>
    {
      c1 = Conv (x, wide)
      n1 = BatchNormalization (c1, s8, b8, mean8, var_8)
      r1 = Relu (n1)
      c2 = Conv (r1, narrow)
      n2 = BatchNormalization (c2, s, b, mean, var_a)
      y = Add (n2, x)
    }
    """
    assert telling_values(_harness.model(source)) == ("n2",)
