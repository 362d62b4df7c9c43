"""Elementwise arithmetic, activations, comparisons, logic, bits and casts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mc_opt.ir.run.standard.dtypes import torch_type, wide, widened


def _div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(a: torch.Tensor, b: torch.Tensor, *, fmod: int = 0) -> torch.Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """√x, whose gradient at 0 is 0: the infinite one makes NaN of √(a² + b²), the magnitude of a silent spectrum."""
    root = torch.sqrt(torch.where(x == 0, 1, x)) if x.requires_grad else torch.sqrt(x)
    return torch.where(x == 0, x.detach(), root) if x.requires_grad else root


def _power(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.pow(x, y).to(x.dtype)


def _sum(*inputs: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.add, inputs)


def _mean(*inputs: torch.Tensor) -> torch.Tensor:
    return _sum(*inputs) / len(inputs)


def _largest(*inputs: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.maximum, inputs)


def _smallest(*inputs: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.minimum, inputs)


def _clip(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    if low is None and high is None:
        return x
    if low is None or high is None or not (_is_plain(low) and _is_plain(high)) or torch.compiler.is_compiling():
        return torch.clamp(x, low, high)
    # The gradient of hardtanh is one kernel, that of clamp four, and several times slower.
    least, most = low.item(), high.item()
    return F.hardtanh(x, least, most) if x.is_floating_point() and least < most else torch.clamp(x, least, most)


def _is_plain(bound: torch.Tensor) -> bool:
    """Whether a bound can be read without waiting for a device and is not learned."""
    return bound.numel() == 1 and bound.device.type == "cpu" and not bound.requires_grad


def leaky_relu(x: torch.Tensor, *, alpha: float = 0.01) -> torch.Tensor:
    """Y = x for x ≥ 0, otherwise α·x."""
    return F.leaky_relu(x, alpha)


def _prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, x * slope, x)


def elu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Y = x for x ≥ 0, otherwise α·(eˣ − 1)."""
    return F.elu(x, alpha)


def _celu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return F.celu(x, alpha)


def _selu(
    x: torch.Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> torch.Tensor:
    return gamma * F.elu(x, alpha)


def thresholded_relu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Y = x for x > α, otherwise 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def hard_sigmoid(x: torch.Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    """Y = max(0, min(1, α·x + β))."""
    return torch.clamp(alpha * x + beta, 0, 1)


def _hard_swish(x: torch.Tensor) -> torch.Tensor:
    return x * hard_sigmoid(x, alpha=1 / 6)


def _swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(alpha * x)


def _mish(x: torch.Tensor) -> torch.Tensor:
    return F.mish(x)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Y = ln(1 + eˣ)."""
    return F.softplus(x)


def softsign(x: torch.Tensor) -> torch.Tensor:
    """Y = x / (1 + |x|)."""
    return x / (1 + x.abs())


def _shrink(x: torch.Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> torch.Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def _is_inf(x: torch.Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> torch.Tensor:
    found = torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)
    return found | torch.isneginf(x) if detect_negative else found


def _greater_or_equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a >= b


def _less_or_equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a <= b


def _bit_shift(x: torch.Tensor, count: torch.Tensor, *, direction: str) -> torch.Tensor:
    value, places = wide(x), wide(count)
    if direction == "LEFT":
        return torch.bitwise_left_shift(value, places).to(x.dtype)
    shifted = torch.bitwise_right_shift(value, places)
    if x.dtype is torch.uint64:  # int64 drags its sign bit along
        shifted = torch.where(places > 0, shifted & ((1 << (64 - places)) - 1), shifted)
    return shifted.to(x.dtype)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


def _cast(x: torch.Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> torch.Tensor:
    return x.to(torch_type(to))


def _cast_like(x: torch.Tensor, like: torch.Tensor, *, saturate: int = 1, round_mode: str = "up") -> torch.Tensor:
    return x.to(like.dtype)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _erf(x: torch.Tensor) -> torch.Tensor:
    # torch has no erf of half precision on every device.
    return torch.erf(x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else torch.erf(x)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": widened(torch.add),
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitShift": _bit_shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": torch.ceil,
    "Celu": _celu,
    "Clip": widened(_clip),
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": widened(_div),
    "Elu": elu,
    "Equal": torch.eq,
    "Erf": _erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": _gelu,
    "Greater": widened(torch.gt),
    "GreaterOrEqual": widened(_greater_or_equal),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "IsInf": _is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": leaky_relu,
    "Less": widened(torch.lt),
    "LessOrEqual": widened(_less_or_equal),
    "Log": torch.log,
    "Max": widened(_largest),
    "Mean": _mean,
    "Min": widened(_smallest),
    "Mish": _mish,
    "Mod": widened(_mod),
    "Mul": widened(torch.mul),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": _prelu,
    "Pow": widened(_power),
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": softplus,
    "Softsign": softsign,
    "Sqrt": _sqrt,
    "Sub": widened(torch.sub),
    "Sum": _sum,
    "Swish": _swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": thresholded_relu,
    "Where": _where,
    "Xor": torch.logical_xor,
}
