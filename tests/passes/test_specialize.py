"""specialize: an input becomes a constant, and what follows from it is folded."""

from __future__ import annotations

import numpy as np
import pytest

from mc_opt import ir, passes
from tests._harness import apply, check, lines, model

RATES = """g (float[1,4] x, int64 sr) => (float[1,4] y) <int64 rate = {16000}> {
    fast = Equal (sr, rate)
    y = If (fast) <
        then_branch = wide () => (float[1,4] a) { t = Neg (x)  a = Abs (t) },
        else_branch = narrow () => (float[1,4] b) { b = Exp (x) }
    >
}"""


def test_the_branch_that_is_taken_stays() -> None:
    result = check("specialize{sr=16000}", RATES, "t = Neg(x)\ny = Abs(t)")
    assert [v.name for v in result.graph.inputs] == ["x"]
    check("specialize{sr=8000}", RATES, "y = Exp(x)")


def test_a_value_that_is_still_used_keeps_its_name() -> None:
    result = check(
        "specialize{p=2,0.5}", "g (float[3,2] x, float[2] p) => (float[3,2] y) { y = Mul (x, p) }", "y = Mul(x, p)"
    )
    np.testing.assert_array_equal(result.graph.initializers["p"].const_value.numpy(), [2, 0.5])


def test_symbolic_length_takes_the_number_of_values() -> None:
    result = check("specialize{p=1,2,3}", "g (float[N] p, float[3] x) => (float[3] y) { y = Add (x, p) }")
    assert [v.name for v in result.graph.inputs] == ["x"]


def test_types_are_those_of_the_input() -> None:
    for kind, text, value in (("bool", "true", True), ("int32", "-7", -7), ("float16", "0.5", 0.5)):
        source = model(f"g ({kind} p, {kind}[2] x) => ({kind}[2] y) {{ y = Expand (p, n) }}".replace(
            "=> ", "=> ").replace("{ y", "<int64[1] n = {2}> { y"))  # fmt: skip
        changed, _ = apply(f"specialize{{p={text}}}", source)
        tensor = next(iter(changed.graph.initializers.values())).const_value
        assert tensor is not None and tensor.numpy().reshape(-1)[0] == value


def test_says_what_does_not_fit() -> None:
    source = model(RATES)
    for text, word in (
        ("sr=fast", "does not fit its type INT64"),
        ("sr=1.5", "does not fit its type INT64"),
        ("sr=1,2", "2 numbers were given"),
        ("rate=1", "unknown input 'rate'"),
        ("sr=99999999999999999999", "does not fit"),
    ):
        with pytest.raises(ir.OptionError, match=word):
            apply(f"specialize{{{text}}}", source)
    with pytest.raises(ir.OptionError, match="name an input"):
        passes.Pipeline.parse("specialize")


def test_both_forms_of_the_pipeline_hold_it() -> None:
    pipeline = passes.Pipeline.parse("specialize{sr=16000 p=1,2}")
    assert str(pipeline) == "specialize{sr=16000 p=1,2}"
    assert lines(str(pipeline)) == ["specialize{sr=16000 p=1,2}"]
