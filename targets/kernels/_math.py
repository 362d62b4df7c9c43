"""Elementary functions as vectorisable expressions: polynomials and bit moves, no call into libm.

LLVM turns a vector call of `exp` or `erf` into one library call a lane; these expressions stay in
vector registers. A kernel uses `exp(x)`, one opaque node, to which the build gives `exp_definition`.
Every function takes a float32 expression, scalar or vector, and is within a few units in the last
place of the exact value; infinities and NaN behave as in the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.te import TensorSlice

# Values of an untyped package; the alias says what they are.
Expr = Any

_LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has trailing zero bits, so that n * _LN2_HIGH is exact for |n| < 2^15.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.428606765330187e-06
_EXP_HIGHEST = 89.0
_EXP_LOWEST = -104.0


def type_of(x: Expr) -> str:
    """Returns the type's name, `float32` or `float32x16`."""
    return str(x.dtype if isinstance(x, TensorSlice) else x.ty)


def constant(value: float, like: Expr) -> Expr:
    """Returns `value` in the type of `like`, broadcast when `like` is a vector."""
    return tirx.const(value, type_of(like))


def polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Returns Σ coefficients[i] · x^(n-1-i) by Horner's rule, the highest power first."""
    result = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        result = result * x + constant(coefficient, x)
    return result


def clamp(x: Expr, low: float, high: float) -> Expr:
    """Returns x limited to [low, high]; a NaN stays a NaN, which min and max would lose."""
    below = tirx.Select(x > constant(high, x), constant(high, x), x)
    return tirx.Select(below < constant(low, x), constant(low, x), below)


def bind(x: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Returns body(x) with x computed once.

    Expressions are trees to every later pass: without a name, an argument that is used five times in
    each of three nested functions would be compiled 125 times.
    """
    name = tirx.Var("x", type_of(x))
    return tirx.Let(name, x, body(name))


def _integer_type(dtype: str) -> str:
    return dtype.replace("float", "int")


def _power_of_two(n: Expr, like: Expr) -> Expr:
    """Returns 2^n for an integer expression with -127 < n < 128."""
    biased = n + tirx.const(127, type_of(n))
    return tirx.reinterpret(type_of(like), biased << tirx.const(23, type_of(n)))


def exp(x: Expr) -> Expr:
    """Returns e^x: 2^n · e^r with |r| ≤ ln 2 / 2; denormal results and overflow to infinity included."""
    return tirx.exp(x)


def exp_definition(x: Expr) -> Expr:
    """Returns what `exp` computes, as an expression of one named argument."""
    return bind(x, _exp)


def _exp(x: Expr) -> Expr:
    return bind(clamp(x, _EXP_LOWEST, _EXP_HIGHEST), lambda x: _exp_scaled(x, _times_power_in_two_steps))


def _exp_scaled(x: Expr, times_power: Callable[[Expr, Expr], Expr]) -> Expr:
    whole = tirx.floor(x * constant(_LOG2_E, x) + constant(0.5, x))
    return bind(whole, lambda n: times_power(_exp_rest(x, n), n.astype(_integer_type(type_of(x)))))


def _exp_rest(x: Expr, whole: Expr) -> Expr:
    return bind(x - whole * constant(_LN2_HIGH, x) - whole * constant(_LN2_LOW, x), _exp_polynomial)


def _exp_polynomial(r: Expr) -> Expr:
    p = polynomial(r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
    return p * r * r + r + constant(1.0, r)


def _added_to_exponent(value: Expr, n: Expr) -> Expr:
    # value · 2^n, as long as neither is denormal.
    bits = tirx.reinterpret(type_of(n), value) + (n << tirx.const(23, type_of(n)))
    return tirx.reinterpret(type_of(value), bits)


def _times_power_in_two_steps(value: Expr, n: Expr) -> Expr:
    # Two factors, one after the other: n reaches from -150 to 128, and neither one exponent field nor the product
    # of the factors alone does.
    half = n >> tirx.const(1, type_of(n))
    return value * _power_of_two(half, value) * _power_of_two(n - half, value)


def exp_not_positive(x: Expr) -> Expr:
    """Returns e^x for x ≤ 0 (softmax after its maximum): results below e^-87 become 0, which no sum would notice.

    It takes two thirds of the instructions of `exp`, and denormal numbers would stop the products that follow.
    """
    return tirx.call_pure_extern(type_of(x), symbol("exp_not_positive", x), x)


def exp_not_positive_definition(x: Expr) -> Expr:
    """Returns what `exp_not_positive` computes, as an expression of one named argument."""
    return bind(x, _exp_not_positive)


def _exp_not_positive(x: Expr) -> Expr:
    lowest = constant(-87.0, x)
    value = bind(tirx.Select(x < lowest, lowest, x), lambda x: _exp_scaled(x, _added_to_exponent))
    return tirx.Select(x < lowest, constant(0.0, x), value)


def symbol(name: str, x: Expr) -> str:
    """The name of the LLVM function that a build gives for `name` of an argument as wide as x."""
    return f"mc_{name}_f32x{type_of(x).partition('x')[2] or 1}"


def sigmoid(x: Expr) -> Expr:
    """Returns 1 / (1 + e^-x)."""
    return tirx.sigmoid(x)


def sigmoid_definition(x: Expr) -> Expr:
    """Returns what `sigmoid` computes, as an expression of one named argument."""
    return bind(x, _sigmoid)


def _sigmoid(x: Expr) -> Expr:
    one = constant(1.0, x)
    return one / (one + exp_definition(constant(0.0, x) - x))


def tanh(x: Expr) -> Expr:
    """Returns tanh x: an odd polynomial below 0.625, (1 - e^-2|x|) / (1 + e^-2|x|) above."""
    return tirx.tanh(x)


def tanh_definition(x: Expr) -> Expr:
    """Returns what `tanh` computes, as an expression of one named argument."""
    return bind(x, _tanh)


def _tanh(x: Expr) -> Expr:
    square = x * x
    p = polynomial(
        square,
        (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1),
    )
    small = x + x * square * p
    size = tirx.abs(x)
    one = constant(1.0, x)
    # Beyond 10 the result is 1 in float32; the clamp keeps a NaN.
    e = bind(constant(-2.0, x) * clamp(size, 0.0, 10.0), lambda x: _exp_scaled(x, _added_to_exponent))
    large = bind(e, lambda e: (one - e) / (one + e))
    large = bind(large, lambda large: tirx.Select(x < constant(0.0, x), constant(0.0, x) - large, large))
    return tirx.Select(size < constant(0.625, x), small, large)


def erf(x: Expr) -> Expr:
    """Returns erf x as x · P(x²) / Q(x²) on |x| ≤ 4, beyond which float32 holds ±1."""
    return tirx.erf(x)


def erf_definition(x: Expr) -> Expr:
    """Returns what `erf` computes, as an expression of one named argument."""
    return bind(x, _erf)


def _erf(x: Expr) -> Expr:
    x = clamp(x, -4.0, 4.0)
    square = x * x
    p = polynomial(
        square,
        (
            -2.72614225801306e-10,
            2.77068142495902e-08,
            -2.10102402082508e-06,
            -5.69250639462346e-05,
            -7.34990630326855e-04,
            -2.95459980854025e-03,
            -1.60960333262415e-02,
        ),
    )
    q = polynomial(
        square,
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
    )
    return x * p / q


def log(x: Expr) -> Expr:
    """Returns ln x for float32: exponent and mantissa apart, a polynomial for the mantissa in [√½, √2).

    0 gives -inf, a negative number NaN; denormal arguments are treated as the least normal number.
    """
    return tirx.log(x)


def log_definition(x: Expr) -> Expr:
    """Returns what `log` computes, as an expression of one named argument."""
    return bind(x, _log)


def _log(x: Expr) -> Expr:
    least = constant(1.1754943508222875e-38, x)
    bits = tirx.reinterpret(_integer_type(type_of(x)), tirx.Select(x < least, least, x))
    value = bind(bits, lambda bits: _log_of_bits(bits, x))
    infinity = constant(float("inf"), x)
    value = tirx.Select(x >= infinity, infinity, value)
    value = tirx.Select(x <= constant(0.0, x), constant(float("-inf"), x), value)
    value = tirx.Select(x < constant(0.0, x), constant(float("nan"), x), value)
    return tirx.Select(tirx.isnan(x), x, value)


def _log_of_bits(bits: Expr, x: Expr) -> Expr:
    shift = tirx.const(23, type_of(bits))
    exponent = (bits - tirx.const(0x3F3504F3, type_of(bits))) >> shift

    def value(exponent: Expr) -> Expr:
        mantissa = tirx.reinterpret(type_of(x), bits - (exponent << shift))
        return bind(mantissa - constant(1.0, x), lambda f: _log_polynomial(f, exponent.astype(type_of(x))))

    return bind(exponent, value)


def _log_polynomial(f: Expr, e: Expr) -> Expr:
    p = polynomial(
        f,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
    tail = f * f * f * p + e * constant(-2.12194440e-4, f) - constant(0.5, f) * f * f
    return f + tail + e * constant(0.693359375, f)
