"""Ops that look at a shape, change it, or make a tensor from one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mc_opt.ir.errors import IRError
from mc_opt.ir.run.standard.dtypes import ints


def _reshape(x: torch.Tensor, shape: torch.Tensor, *, allowzero: int = 0) -> torch.Tensor:
    sizes = ints(shape) or []
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(sizes)])


def _flatten(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, x.numel() // rows if rows else 0)


def _squeeze(x: torch.Tensor, axes: torch.Tensor | list[int] | None = None) -> torch.Tensor:
    chosen = ints(axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(x: torch.Tensor, axes: torch.Tensor | list[int]) -> torch.Tensor:
    chosen = ints(axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis + rank if axis < 0 else axis for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(x: torch.Tensor, *, perm: list[int] | None = None) -> torch.Tensor:
    return x.permute(perm if perm is not None else list(reversed(range(x.dim()))))


def _shape_of(x: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def _size(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def _expand(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape) or ())))


def _tile(x: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    return x.repeat(ints(repeats) or [])


def _concat(*inputs: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cat(inputs, axis)


def _split(
    x: torch.Tensor, sizes: torch.Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[torch.Tensor, ...]:
    if sizes is None and num_outputs is None:
        raise IRError("Split: neither split nor num_outputs is given, expected one of them")
    # Without sizes all parts but the last have ceil(n / num_outputs) elements.
    parts = _even(x.shape[axis], num_outputs or 1) if sizes is None else ints(sizes)
    return tuple(torch.split(x, parts, axis))


def _even(length: int, count: int) -> list[int]:
    part = -(-length // count)
    return [min(part, max(length - part * i, 0)) for i in range(count)]


def _slice(
    x: torch.Tensor,
    starts: torch.Tensor | list[int],
    ends: torch.Tensor | list[int],
    axes: torch.Tensor | list[int] | None = None,
    steps: torch.Tensor | list[int] | None = None,
) -> torch.Tensor:
    first, last = ints(starts) or [], ints(ends) or []
    chosen = ints(axes) if axes is not None else list(range(len(first)))
    strides = ints(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, chosen or [], strides or [], strict=True):
        # Python's rule for clamping is ONNX's, negative steps included.
        begin, stop, stride = slice(start, end, step).indices(x.shape[axis])
        if stride > 0:
            x = (
                x.narrow(axis, begin, max(stop - begin, 0))
                if stride == 1
                else _take(x, axis, range(begin, stop, stride))
            )
        else:
            x = _take(x, axis, range(begin, stop, stride))
    return x


def _take(x: torch.Tensor, axis: int, places: range | list[int]) -> torch.Tensor:
    return x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))


def _pad(
    x: torch.Tensor,
    pads: torch.Tensor | list[int],
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
    *,
    mode: str = "constant",
) -> torch.Tensor:
    amounts = ints(pads) or []
    chosen = ints(axes) if axes is not None else list(range(x.dim()))
    ends = {
        axis % x.dim(): (amounts[i], amounts[i + len(amounts) // 2]) for i, axis in enumerate(chosen or []) if x.dim()
    }
    if mode == "constant":
        widths = [amount for axis in reversed(range(x.dim())) for amount in ends.get(axis, (0, 0))]
        fill = 0 if value is None else value.item()
        return F.pad(x, widths, value=fill) if any(widths) else x
    for axis, (before, after) in ends.items():
        if before or after:
            x = _take(x, axis, _mirrored(x.shape[axis], before, after, mode=mode))
    return x


def _mirrored(length: int, before: int, after: int, *, mode: str) -> list[int]:
    """Which elements a padded axis shows."""
    places = range(-before, length + after)
    match mode:
        case "edge":
            return [min(max(i, 0), length - 1) for i in places]
        case "wrap":
            return [i % length for i in places]
        case "reflect":
            period = max(2 * (length - 1), 1)
            return [min(i % period, period - i % period) if length > 1 else 0 for i in places]
        case _:
            raise IRError(f"Pad: mode {mode!r}, expected constant, edge, reflect or wrap")


def _constant_of_shape(shape: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
    fill = torch.zeros(1, device=shape.device) if value is None else value
    return fill.reshape(()).expand(tuple(ints(shape) or ())).clone()


def _range(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    # ceil((limit - start) / delta) elements; arange itself rounds differently for floats.
    count = max(int(torch.ceil((limit - start).double() / delta.double()).item()), 0)
    return start + torch.arange(count, device=start.device).to(start.dtype) * delta


def _depth_to_space(x: torch.Tensor, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


def _space_to_depth(x: torch.Tensor, *, blocksize: int) -> torch.Tensor:
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape_of,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

MULTIPLE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "Split": _split,
}
