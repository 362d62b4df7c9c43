"""ONNX's own quantisation: affine codes q = round(x / s) + z, and integer products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mc_opt.ir.run.standard.conv import conv
from mc_opt.ir.run.standard.dtypes import torch_type


def _spread(parameter: torch.Tensor, x: torch.Tensor, *, axis: int, block_size: int) -> torch.Tensor:
    """A scale or zero point in a shape that broadcasts over x: one a tensor, one an index of `axis`, or one a block."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
) -> torch.Tensor:
    kind = torch.uint8 if zero_point is None else zero_point.dtype
    kind = torch_type(output_dtype) if output_dtype else kind
    scale = _spread(scale, x, axis=axis, block_size=block_size)
    if kind.is_floating_point:
        return (x / scale).to(kind)
    rounded = torch.round(x / scale)
    if zero_point is not None:
        rounded = rounded + _spread(zero_point, x, axis=axis, block_size=block_size).to(rounded.dtype)
    limits = torch.iinfo(kind)
    return rounded.clamp(limits.min, limits.max).to(kind)


def _dequantize_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> torch.Tensor:
    kind = torch_type(output_dtype) if output_dtype else scale.dtype
    value = x.to(scale.dtype)
    if zero_point is not None:
        value = value - _spread(zero_point, x, axis=axis, block_size=block_size).to(scale.dtype)
    return (value * _spread(scale, x, axis=axis, block_size=block_size)).to(kind)


def _dynamic_quantize_linear(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return _quantize_linear(x, scale, zero), scale, zero


def _shifted(x: torch.Tensor, zero: torch.Tensor | None, axis: int) -> torch.Tensor:
    """X minus its zero point as float64, in which products of 8 bit codes are exact."""
    value = x.double()
    if zero is None:
        return value
    shape = [1] * x.dim()
    if zero.numel() > 1:
        shape[axis] = -1
    return value - zero.double().reshape(shape if zero.dim() <= 1 else zero.shape)


def _mat_mul_integer(
    a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    product = _shifted(a, a_zero, max(a.dim() - 2, 0)) @ _shifted(b, b_zero, b.dim() - 1)
    return product.to(torch.int32)


def _conv_integer(
    x: torch.Tensor,
    w: torch.Tensor,
    x_zero: torch.Tensor | None = None,
    w_zero: torch.Tensor | None = None,
    *,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: list[int] | None = None,
) -> torch.Tensor:
    inputs, weight = _shifted(x, x_zero, 1), _shifted(w, w_zero, 0)
    y = conv(inputs, weight, strides=strides, pads=pads, dilations=dilations, group=group, auto_pad=auto_pad)
    return torch.round(y).to(torch.int32)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "MatMulInteger": _mat_mul_integer,
    "QuantizeLinear": _quantize_linear,
}

MULTIPLE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
}
