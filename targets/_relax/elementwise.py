"""Ops that act on each element alone: arithmetic, comparisons, logic, activations, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
from tvm import tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import constant, elementwise
from mc_opt.targets.kernels._math import type_of

Expr = Any
# From a node to the function of its operands' expressions.
Maker = Callable[[Emitter, onnx_ir.Node], Callable[..., Expr]]


def _const(value: float, like: Expr) -> Expr:
    return constant(value, type_of(like))


def _is_float(x: Expr) -> bool:
    return "float" in type_of(x)


def _operands(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    return [v for v in node.inputs if v is not None]


def _op(maker: Maker) -> Handler:
    def handler(e: Emitter, node: onnx_ir.Node) -> None:
        fn = maker(e, node)
        elementwise(e, node.outputs[0], _operands(node), fn, name=node.op_type.lower())

    return handler


def _fixed(fn: Callable[..., Expr]) -> Handler:
    return _op(lambda _e, _node: fn)


def _divide(a: Expr, b: Expr) -> Expr:
    return a / b if _is_float(a) else tirx.truncdiv(a, b)


def _modulo(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    is_c = e.attribute(node, "fmod", 0)

    def fn(a: Expr, b: Expr) -> Expr:
        if not _is_float(a):
            return tirx.truncmod(a, b) if is_c else tirx.floormod(a, b)
        if is_c:
            return a - b * tirx.trunc(a / b)
        return a - b * tirx.floor(a / b)

    return fn


def _power(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    exponent = e.constant(node.inputs[1])
    if exponent is None or exponent.size != 1:
        return _general_power
    match float(exponent.reshape(-1)[0]):
        case 0.5:
            return lambda a, b: tirx.sqrt(a) if _is_float(a) else _general_power(a, b)
        case 1.0:
            return lambda a, _b: a
        case 2.0:
            return lambda a, _b: a * a
        case 3.0:
            return lambda a, _b: a * a * a
        case -1.0:
            return lambda a, b: _const(1.0, a) / a if _is_float(a) else _general_power(a, b)
        case _:
            return _general_power


def _general_power(a: Expr, b: Expr) -> Expr:
    if _is_float(a):
        return tirx.pow(a, b.astype(type_of(a)))
    # Integers go through float64, as ONNX Runtime does; exact below 2^53.
    power = tirx.pow(a.astype("float64"), b.astype("float64"))
    return power.astype(type_of(a))


def _shift(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    if e.attribute(node, "direction", "LEFT") == "LEFT":
        return lambda a, b: a << b
    return lambda a, b: a >> b


def _sum(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    def fn(*x: Expr) -> Expr:
        total = x[0]
        for item in x[1:]:
            total = total + item
        return total

    return fn


def _mean(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    total = _sum(e, node)
    return lambda *x: total(*x) * _const(1.0 / len(x), x[0])


def _extreme(pick: Callable[[Expr, Expr], Expr]) -> Handler:
    def fn(*x: Expr) -> Expr:
        result = x[0]
        for item in x[1:]:
            result = pick(result, item)
        return result

    return _fixed(fn)


def _maximum(a: Expr, b: Expr) -> Expr:
    if not _is_float(a):
        return tirx.max(a, b)
    # A NaN in either operand is the result, which the machine's maximum does not promise.
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def _minimum(a: Expr, b: Expr) -> Expr:
    if not _is_float(a):
        return tirx.min(a, b)
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


def _relu(x: Expr) -> Expr:
    # One instruction, and a NaN stays one.
    return tirx.Select(x < _const(0, x), _const(0, x), x)


def _leaky_relu(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    slope = e.attribute(node, "alpha", 0.01)
    return lambda x: tirx.Select(x < _const(0, x), x * _const(slope, x), x)


def _elu(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    alpha = e.attribute(node, "alpha", 1.0)
    # min(x, 0) in the exponent: the branch that is not taken must not overflow.
    return lambda x: tirx.Select(
        x < _const(0, x), _const(alpha, x) * (tirx.exp(tirx.min(x, _const(0, x))) - _const(1, x)), x
    )


def _selu(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    alpha = e.attribute(node, "alpha", 1.67326319217681884765625)
    gamma = e.attribute(node, "gamma", 1.05070102214813232421875)

    def fn(x: Expr) -> Expr:
        low = _const(alpha, x) * (tirx.exp(tirx.min(x, _const(0, x))) - _const(1, x))
        return _const(gamma, x) * tirx.Select(x < _const(0, x), low, x)

    return fn


def _hard_sigmoid(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    alpha, beta = e.attribute(node, "alpha", 0.2), e.attribute(node, "beta", 0.5)
    return lambda x: _hard(x, alpha, beta)


def _hard(x: Expr, alpha: float, beta: float) -> Expr:
    return tirx.max(_const(0, x), tirx.min(_const(1, x), x * _const(alpha, x) + _const(beta, x)))


def _softplus(x: Expr) -> Expr:
    rest = tirx.log(_const(1, x) + tirx.exp(_const(0, x) - tirx.abs(x)))
    return tirx.max(x, _const(0, x)) + rest


def _gelu(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    if e.attribute(node, "approximate", "none") == "tanh":
        return lambda x: (
            _const(0.5, x)
            * x
            * (_const(1, x) + tirx.tanh(_const(0.7978845608028654, x) * (x + _const(0.044715, x) * x * x * x)))
        )
    return lambda x: _const(0.5, x) * x * (_const(1, x) + tirx.erf(x * _const(0.7071067811865476, x)))


def _differ(a: Expr, b: Expr) -> Expr:
    return tirx.any(tirx.all(a, tirx.Not(b)), tirx.all(tirx.Not(a), b))


def _equal(a: Expr, b: Expr) -> Expr:
    # LLVM's comparison of floats is what TVM writes for bool, and LLVM refuses it.
    return tirx.Not(_differ(a, b)) if type_of(a) == "bool" else tirx.EQ(a, b)


def _sign(x: Expr) -> Expr:
    zero, one = _const(0, x), _const(1, x)
    return tirx.Select(x > zero, one, tirx.Select(x < zero, _const(-1, x), x))


def _round(x: Expr) -> Expr:
    return tirx.nearbyint(x)  # halves to even


def _clip(e: Emitter, node: onnx_ir.Node) -> None:
    x, *bounds = node.inputs
    low, high = (*bounds, None, None)[:2]

    def fn(a: Expr, *limits: Expr) -> Expr:
        rest = list(limits)
        # Of a pair with NaN both give the second, so that NaN stays.
        if low is not None:
            a = tirx.max(rest.pop(0), a)
        return tirx.min(rest.pop(0), a) if high is not None else a

    assert x is not None
    elementwise(e, node.outputs[0], [v for v in (x, low, high) if v is not None], fn, name="clip")


def _identity(e: Emitter, node: onnx_ir.Node) -> None:
    e.alias(node.outputs[0], _first(node))
    for mask in node.outputs[1:]:  # Dropout's mask: nothing is dropped at inference
        if mask.uses() or mask.is_graph_output():
            e.set_constant(mask, np.ones(e.shape(_first(node)), bool))


def _first(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _cast(e: Emitter, node: onnx_ir.Node) -> None:
    if node.op_type == "CastLike":
        like = node.inputs[1]
        assert like is not None
        dtype = e.dtype(like)
    else:
        dtype = _name(onnx_ir.DataType(e.attribute(node, "to", 1)), node)
    x = _first(node)
    if e.dtype(x) == dtype:
        e.alias(node.outputs[0], x)
        return
    elementwise(e, node.outputs[0], [x], lambda a: cast(a, dtype), name="cast")


def cast(x: Expr, dtype: str) -> Expr:
    """Returns x in another type, as ONNX casts: to bool by comparison with 0, to integers towards zero."""
    if dtype == "bool":
        return tirx.NE(x, _const(0, x)) if type_of(x) != "bool" else x
    if type_of(x) == "bool":
        return tirx.Select(x, constant(1, dtype), constant(0, dtype))
    return x.astype(dtype)


def _name(kind: onnx_ir.DataType, node: onnx_ir.Node) -> str:
    if kind in (onnx_ir.DataType.STRING, onnx_ir.DataType.UNDEFINED) or kind.bitwidth < 8:
        raise TargetError(
            f"{node.op_type} {node.name!r}: casts to {kind.name}, which no kernel takes; use --target onnx"
        )
    return str(np.dtype(kind.numpy()))


def _where(condition: Expr, a: Expr, b: Expr) -> Expr:
    return tirx.Select(condition, a, b)


def _prelu(x: Expr, slope: Expr) -> Expr:
    return tirx.Select(x < _const(0, x), x * slope, x)


def _reciprocal(x: Expr) -> Expr:
    return _const(1, x) / x


def _swish(e: Emitter, node: onnx_ir.Node) -> Callable[..., Expr]:
    alpha = e.attribute(node, "alpha", 1.0)
    return lambda x: x * tirx.sigmoid(x * _const(alpha, x))


HANDLERS: dict[str, Handler] = {
    "Abs": _fixed(lambda x: tirx.abs(x)),
    "And": _fixed(lambda a, b: tirx.all(a, b)),
    "BitShift": _op(_shift),
    "BitwiseAnd": _fixed(lambda a, b: a & b),
    "BitwiseNot": _fixed(lambda a: ~a),
    "BitwiseOr": _fixed(lambda a, b: a | b),
    "BitwiseXor": _fixed(lambda a, b: a ^ b),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _fixed(lambda x: tirx.ceil(x)),
    "Clip": _clip,
    "Cos": _fixed(lambda x: tirx.cos(x)),
    "Div": _fixed(_divide),
    "Dropout": _identity,
    "Elu": _op(_elu),
    "Equal": _fixed(_equal),
    "Erf": _fixed(lambda x: tirx.erf(x)),
    "Exp": _fixed(lambda x: tirx.exp(x)),
    "Floor": _fixed(lambda x: tirx.floor(x)),
    "Gelu": _op(_gelu),
    "Greater": _fixed(lambda a, b: a > b),
    "GreaterOrEqual": _fixed(lambda a, b: a >= b),
    "HardSigmoid": _op(_hard_sigmoid),
    "HardSwish": _fixed(lambda x: x * _hard(x, 1 / 6, 0.5)),
    "Identity": _identity,
    "IsInf": _fixed(lambda x: tirx.isinf(x)),
    "IsNaN": _fixed(lambda x: tirx.isnan(x)),
    "LeakyRelu": _op(_leaky_relu),
    "Less": _fixed(lambda a, b: a < b),
    "LessOrEqual": _fixed(lambda a, b: a <= b),
    "Log": _fixed(lambda x: tirx.log(x)),
    "Max": _extreme(_maximum),
    "Mean": _op(_mean),
    "Min": _extreme(_minimum),
    "Mod": _op(_modulo),
    "Mul": _fixed(lambda a, b: a * b),
    "Neg": _fixed(lambda x: _const(0, x) - x if not _is_float(x) else -x),
    "Not": _fixed(lambda x: tirx.Not(x)),
    "Or": _fixed(lambda a, b: tirx.any(a, b)),
    "PRelu": _fixed(_prelu),
    "Pow": _op(_power),
    "Reciprocal": _fixed(_reciprocal),
    "Relu": _fixed(_relu),
    "Round": _fixed(_round),
    "Selu": _op(_selu),
    "Sigmoid": _fixed(lambda x: tirx.sigmoid(x)),
    "Sign": _fixed(_sign),
    "Sin": _fixed(lambda x: tirx.sin(x)),
    "Softplus": _fixed(_softplus),
    "Sqrt": _fixed(lambda x: tirx.sqrt(x)),
    "Sub": _fixed(lambda a, b: a - b),
    "Sum": _op(_sum),
    "Swish": _op(_swish),
    "Tanh": _fixed(lambda x: tirx.tanh(x)),
    "Where": _fixed(_where),
    "Xor": _fixed(_differ),
}
