"""Transposed convolution as an ordinary one: by sub-pixels, or over an input with zeros between its elements.

Output position p = m · stride + r - pad is made by the taps k = r + stride · j from inputs m - j. So all
residues r together are one convolution of stride 1 with ⌈kernel / stride⌉ taps and stride^rank times the
channels, followed by a move of channels to positions. With dilations, groups or a weight that the model
computes, zeros are put between the inputs instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels.conv import Weight, Window, computed_weight, constant_weight, convolution


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """The attributes of a ConvTranspose; `pads` stand before the output, whose size is `output`."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    output: tuple[int, ...]


def _geometry(e: Emitter, node: onnx_ir.Node, kernel: Sequence[int], size: Sequence[int]) -> _Geometry:
    rank = len(kernel)
    strides = e.attribute(node, "strides", (1,) * rank)
    dilations = e.attribute(node, "dilations", (1,) * rank)
    extra = e.attribute(node, "output_padding", (0,) * rank)
    flat = e.attribute(node, "pads", (0,) * (2 * rank))
    wanted = e.attribute(node, "output_shape", ())
    auto = str(e.attribute(node, "auto_pad", "NOTSET"))
    full = [
        s * (n - 1) + d * (k - 1) + 1 + x for n, k, s, d, x in zip(size, kernel, strides, dilations, extra, strict=True)
    ]
    if auto in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = tuple(n * s for n, s in zip(size, strides, strict=True))
    if wanted:
        output = tuple(wanted)[-rank:]
        total = [max(f - o, 0) for f, o in zip(full, output, strict=True)]
        # The larger half stands at the end for SAME_UPPER, else at the beginning.
        before = tuple(t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total)
    else:
        before = tuple(flat[:rank])
        output = tuple(f - flat[i] - flat[rank + i] for i, f in enumerate(full))
    return _Geometry(tuple(kernel), tuple(strides), tuple(dilations), before, output)


def conv_transpose(e: Emitter, node: onnx_ir.Node) -> None:
    """ConvTranspose of any rank."""
    value, weight, *rest = node.inputs
    assert value is not None and weight is not None
    shape = e.shape(value)
    groups = int(e.attribute(node, "group", 1))
    geometry = _geometry(e, node, e.shape(weight)[2:], shape[2:])
    bias = rest[0] if rest else None
    given = None if bias is None else e.plain(bias)
    x = e.nhwc(value)
    y = None
    if groups == 1 and all(d == 1 for d in geometry.dilations):
        y = _by_sub_pixels(e, x, weight, given, geometry)
    if y is None:
        y = _by_zeros(e, x, weight, given, geometry, groups)
    e.set(node.outputs[0], y, "nhwc")


def _by_sub_pixels(
    e: Emitter, x: relax.Expr, weight: onnx_ir.Value, bias: relax.Expr | None, g: _Geometry
) -> relax.Expr | None:
    inputs, outputs = e.shape(weight)[:2]
    taps = [-(-k // s) for k, s in zip(g.kernel, g.strides, strict=True)]
    phases = math.prod(g.strides)
    if e.constant(weight) is None and any(k % s for k, s in zip(g.kernel, g.strides, strict=True)):
        return None  # the taps filled up would be code 0, which is not the weight 0
    made = constant_weight(
        e, weight, (phases * outputs, inputs, *taps), functools.partial(_phases, strides=g.strides, taps=taps)
    )
    if made is None:
        return None
    n, *spatial, _ = (int(s) for s in x.ty.shape)
    # Steps m of the small convolution that reach all output positions.
    steps = [(o - 1 + p) // s + 1 for o, p, s in zip(g.output, g.pads, g.strides, strict=True)]
    pads = tuple((t - 1, m - held) for t, m, held in zip(taps, steps, spatial, strict=True))
    ones = (1,) * len(taps)
    y = convolution(e, x, made, None, window=Window(tuple(taps), ones, ones, pads), groups=1, name="conv_transpose")

    def spread(a: te.Tensor, *b: te.Tensor) -> te.Tensor:
        def element(batch: Any, *i: Any) -> Any:
            *position, o = i
            phase: Any = 0
            where = []
            for p, pad, s in zip(position, g.pads, g.strides, strict=True):
                phase = phase * s + (p + pad) % s
                where.append((p + pad) // s)
            value = a(batch, *where, phase * outputs + o)
            return value + b[0](o) if b else value

        return te.compute((n, *g.output, outputs), element, name="spread")

    return e.te(spread, y, *([] if bias is None else [bias]), name="sub_pixel")


def _phases(weight: np.ndarray, *, strides: Sequence[int], taps: Sequence[int]) -> np.ndarray:
    """weight: [i, o, *kernel] -> [phases · o, i, *taps], taps in the order of an ordinary convolution."""
    i, o, *kernel = weight.shape
    full = np.zeros((i, o, *[t * s for t, s in zip(taps, strides, strict=True)]), weight.dtype)
    full[(slice(None), slice(None), *[slice(k) for k in kernel])] = weight
    parts = full.reshape(i, o, *[v for pair in zip(taps, strides, strict=True) for v in pair])
    rank = len(taps)
    parts = parts.transpose(*[3 + 2 * r for r in range(rank)], 1, 0, *[2 + 2 * r for r in range(rank)])
    flipped = np.flip(parts, axis=tuple(range(parts.ndim - rank, parts.ndim)))
    return flipped.reshape(-1, i, *taps)


def _by_zeros(
    e: Emitter, x: relax.Expr, weight: onnx_ir.Value, bias: relax.Expr | None, g: _Geometry, groups: int
) -> relax.Expr:
    inputs, per_group = e.shape(weight)[:2]
    shape = (per_group * groups, inputs // groups, *g.kernel)
    made = constant_weight(e, weight, shape, functools.partial(_flipped, groups=groups))
    if made is None:
        made = _computed(e, weight, shape, per_group)
    n, *spatial, c = (int(s) for s in x.ty.shape)
    before = [d * (k - 1) - p for d, k, p in zip(g.dilations, g.kernel, g.pads, strict=True)]
    size = [o + d * (k - 1) for o, d, k in zip(g.output, g.dilations, g.kernel, strict=True)]

    def separated(a: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            limits, where = [], []
            for q, b, s, held in zip(i[1:-1], before, g.strides, spatial, strict=True):
                at = q - b
                limits += [at >= 0, at <= (held - 1) * s]
                limits += [tirx.floormod(at, s) == 0] if s > 1 else []
                where.append(tirx.floordiv(at, s))
            return tirx.if_then_else(tirx.all(*limits), a(i[0], *where, i[-1]), tirx.const(0, a.dtype))

        return te.compute((n, *size, c), element, name="pad")

    ones = (1,) * len(g.kernel)
    geometry = Window(g.kernel, ones, g.dilations, ((0, 0),) * len(g.kernel))
    source = e.moved(separated, x, name="pad")
    return convolution(e, source, made, bias, window=geometry, groups=groups, name="conv_transpose")


def _flipped(weight: np.ndarray, *, groups: int) -> np.ndarray:
    """weight: [i, o / groups, *kernel] -> [o, i / groups, *kernel], taps reversed."""
    i, o, *kernel = weight.shape
    split = weight.reshape(groups, i // groups, o, *kernel).swapaxes(1, 2)
    return np.flip(split, axis=tuple(range(3, split.ndim))).reshape(groups * o, i // groups, *kernel)


def _computed(e: Emitter, weight: onnx_ir.Value, shape: Sequence[int], per_group: int) -> Weight:
    """`_flipped` for a weight that the model computes."""
    _, inner, *kernel = shape

    def flip(a: te.Tensor) -> te.Tensor:
        def element(o: Any, i: Any, *k: Any) -> Any:
            taps = [extent - 1 - q for extent, q in zip(kernel, k, strict=True)]
            return a((o // per_group) * inner + i, o % per_group, *taps)

        return te.compute(tuple(shape), element, name="flip")

    return computed_weight(e, e.moved(flip, e.plain(weight), name="flip"))


HANDLERS: dict[str, Handler] = {"ConvTranspose": conv_transpose}
