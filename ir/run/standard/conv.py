"""Convolutions and pooling over the trailing axes of [n, c, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def paddings(
    sizes: list[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    *,
    pads: list[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis."""
    rank = len(sizes)
    if auto_pad == "VALID" or (auto_pad == "NOTSET" and pads is None):
        return [(0, 0)] * rank
    if auto_pad == "NOTSET":
        return [(pads[i], pads[i + rank]) for i in range(rank)] if pads else [(0, 0)] * rank
    result = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        result.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return result


def _pad(x: torch.Tensor, ends: list[tuple[int, int]], value: float) -> torch.Tensor:
    widths = [width for pair in reversed(ends) for width in pair]
    return F.pad(x, widths, value=value) if any(widths) else x


def conv(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: list[int] | None = None,
) -> torch.Tensor:
    """Convolve x: [n, c, ...] with w: [m, c/group, ...]."""
    rank = w.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    ends = paddings(list(x.shape[2:]), list(w.shape[2:]), strides, dilations, pads=pads, auto_pad=auto_pad)
    if all(before == after for before, after in ends):
        return _CONV[rank](x, w, b, strides, [before for before, _ in ends], dilations, group)
    return _CONV[rank](_pad(x, ends, 0.0), w, b, strides, 0, dilations, group)


def _conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
) -> torch.Tensor:
    rank = w.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    extra = output_padding or [0] * rank
    # The whole result first, then cropped by ONNX's pads, which may differ at the two ends.
    full = [(x.shape[2 + i] - 1) * strides[i] + (w.shape[2 + i] - 1) * dilations[i] + 1 for i in range(rank)]
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [x.shape[2 + i] * strides[i] for i in range(rank)]
    if output_shape is not None:
        totals = [full[i] + extra[i] - output_shape[i] for i in range(rank)]
        ends = [(t - t // 2, t // 2) if auto_pad != "SAME_UPPER" else (t // 2, t - t // 2) for t in totals]
    else:
        ends = paddings(full, full, strides, dilations, pads=pads, auto_pad=auto_pad)
    y = _CONV_TRANSPOSE[rank](x, w, None, strides, 0, 0, group, dilations)
    # Negative amounts crop, positive ones (from output padding) add zeros before the bias.
    y = _pad(y, [(-before, extra[i] - after) for i, (before, after) in enumerate(ends)], 0.0)
    return y if b is None else y + b.reshape(1, -1, *[1] * rank)


def _windows(
    sizes: list[int],
    ends: list[tuple[int, int]],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    *,
    ceil: bool,
) -> list[tuple[int, int]]:
    """The padding that makes floor division give the number of windows that ONNX asks for."""
    result = []
    for size, (before, after), k, s, d in zip(sizes, ends, kernel, strides, dilations, strict=True):
        reach = d * (k - 1) + 1
        span = size + before + after - reach
        count = (math.ceil(span / s) if ceil else span // s) + 1
        # A window that would start in the padding behind the end is dropped.
        if ceil and (count - 1) * s >= size + before:
            count -= 1
        # Negative when the last elements belong to no window; _pad then crops them.
        result.append((before, (count - 1) * s + reach - size - before))
    return result


def _max_pool(
    x: torch.Tensor,
    *,
    kernel_shape: list[int],
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
) -> torch.Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    sizes = list(x.shape[2:])
    ends = paddings(sizes, kernel_shape, strides, dilations, pads=pads, auto_pad=auto_pad)
    ends = _windows(sizes, ends, kernel_shape, strides, dilations, ceil=bool(ceil_mode))
    return _MAX_POOL[rank](_pad(x, ends, -math.inf), kernel_shape, strides, 0, dilations)


def _average_pool(
    x: torch.Tensor,
    *,
    kernel_shape: list[int],
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> torch.Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    sizes = list(x.shape[2:])
    ends = paddings(sizes, kernel_shape, strides, dilations, pads=pads, auto_pad=auto_pad)
    whole = _windows(sizes, ends, kernel_shape, strides, dilations, ceil=bool(ceil_mode))
    ones = torch.ones(1, 1, *kernel_shape, dtype=x.dtype, device=x.device)
    # What a window counts: elements, and the model's own padding if asked, never the tail that ceil_mode adds.
    counted = torch.ones(1, 1, *sizes, dtype=x.dtype, device=x.device)
    if count_include_pad:
        counted = _pad(counted, [(before, min(after, whole[i][1])) for i, (before, after) in enumerate(ends)], 1.0)
        tail = [(0, whole[i][1] - min(after, whole[i][1])) for i, (_, after) in enumerate(ends)]
        counted = _pad(counted, tail, 0.0)
    else:
        counted = _pad(counted, whole, 0.0)
    planes = _pad(x.reshape(-1, 1, *sizes), whole, 0.0)
    sums = _CONV[rank](planes, ones, None, strides, 0, dilations)
    counts = _CONV[rank](counted, ones, None, strides, 0, dilations)
    return (sums / counts).reshape(*x.shape[:2], *sums.shape[2:])


def _global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _global_max_pool(x: torch.Tensor) -> torch.Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "AveragePool": _average_pool,
    "Conv": conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "MaxPool": _max_pool,
}
