"""kron: two factors, whichever the layer."""

from __future__ import annotations

import numpy as np
import pytest

from mc_opt import ir, passes
from tests._harness import check, model

CONV = """g (float[1,32,20,20] x) => (float[1,48,18,18] y) <float[48,32,3,3] w> {
    y = Conv (x, w)
}"""


def test_a_conv_gets_two_factors() -> None:
    result = check(
        "kron",
        CONV,
        "y = mc_opt.SeKronConv(x, _, w.factor1, w.factor2) {dilations=[1, 1], pads=[0, 0, 0, 0], strides=[1, 1]}",
    )
    sizes = [v.const_value.size for v in result.graph.initializers.values() if v.const_value is not None]
    assert sum(sizes) <= 48 * 32 * 9 / 2


def test_a_planted_product_is_found() -> None:
    rng = np.random.default_rng(0)
    w = np.kron(rng.standard_normal((12, 8)), rng.standard_normal((16, 16)))
    text = "g (float[400,192] x) => (float[400,128] y) <float[192,128] w> { y = MatMul (x, w) }"
    ran = passes.run(model(text, {"w": w}), passes.Pipeline.parse("kron{error=0.001}"), passes.Context())
    (layer, note), *_ = ran.report.passes[0].notes
    assert layer == "w" and "relative error 0.0000" in note


def test_the_number_of_terms_may_be_given() -> None:
    result = check("kron{rank=3}", CONV)
    assert result.graph.initializers["w.factor1"].shape[0] == 3


def test_says_which_option_is_wrong() -> None:
    with pytest.raises(ir.OptionError, match="1 or more"):
        passes.Pipeline.parse("kron{rank=-1}")
