"""Convolution, channels last: weights packed into tiles of output channels, a register tile of positions.

    y[n, p, o] = b[o] + Σ_k,i  x[n, p · stride + k · dilation, i] · w[o / c, k, i, o mod c]

A depthwise kernel steps over its padding. Where each input channel meets many outputs, padding is a kernel of its
own, so that the planner owns its buffer; so are the repeated channels of a depthwise kernel with several outputs each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _choice, _tile, _window
from mc_opt.targets.kernels._conv_weight import Weight as Weight  # parts of what a convolution is asked for
from mc_opt.targets.kernels._conv_weight import computed_weight as computed_weight
from mc_opt.targets.kernels._conv_weight import constant_weight as constant_weight
from mc_opt.targets.kernels._window import Sliding, axes_of, shape_of, tap
from mc_opt.targets.kernels._window import Window as Window  # part of what a convolution is asked for

# FuseOps takes element-wise consumers into a kernel of this pattern (relax.OpPatternKind: out-elementwise-fusable).
FUSABLE = {"op_pattern": 4}
# Output channels of a group that are worth a tile of a block of threads.
_MANY_COLUMNS = 16


def window(e: Emitter, node: onnx_ir.Node, kernel: Sequence[int], size: Sequence[int]) -> Window:
    """Read the window's attributes of a node over an input of spatial `size`, auto_pad resolved."""
    rank = len(kernel)
    strides = e.attribute(node, "strides", (1,) * rank)
    dilations = e.attribute(node, "dilations", (1,) * rank)
    flat = e.attribute(node, "pads", (0,) * (2 * rank))
    pads = tuple((flat[i], flat[rank + i]) for i in range(rank))
    auto = e.attribute(node, "auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto == "VALID":
        pads = ((0, 0),) * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = tuple(
            _same(n, k, s, d, upper=auto == "SAME_UPPER")
            for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        )
    return Window(tuple(kernel), tuple(strides), tuple(dilations), pads)


def _same(n: int, k: int, s: int, d: int, *, upper: bool) -> tuple[int, int]:
    total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


def padded(
    e: Emitter, x: relax.Expr, before: Sequence[int], size: Sequence[int], *, channels: int, repeat: int = 1
) -> relax.Expr:
    """Puts x [n, *spatial, c] inside zeros: [n, *size, channels], its origin at `before`, each channel `repeat` times.

    Returns x itself when nothing changes; positions of x beyond `size` are left out.
    """
    shape = dims.sizes(x)
    if not any(before) and list(size) == shape[1:-1] and channels == shape[-1] and repeat == 1:
        return x
    inside, available = shape[1:-1], shape[-1]

    def pad(a: te.Tensor) -> te.Tensor:
        def element(n: Any, *i: Any) -> Any:
            *position, c = i
            limits = []
            for p, b, held, extent in zip(position, before, inside, size, strict=True):
                if b:
                    limits.append(p >= b)
                if b + held < extent:
                    limits.append(p < b + held)
            if available * repeat < channels:
                limits.append(c < available * repeat)
            value = a(n, *[p - b for p, b in zip(position, before, strict=True)], c // repeat if repeat > 1 else c)
            if not limits:
                return value
            return tirx.if_then_else(tirx.all(*limits), value, tirx.const(0, a.dtype))

        return te.compute((shape[0], *size, channels), element, name="pad")

    return e.moved(pad, x, name="pad")


def extended(w: Window, positions: Sequence[int]) -> list[int]:
    """The input size that output positions read."""
    return [
        (p - 1) * s + d * (k - 1) + 1 for p, s, d, k in zip(positions, w.strides, w.dilations, w.kernel, strict=True)
    ]


def convolution(
    e: Emitter,
    x: relax.Expr,
    weight: Weight,
    bias: np.ndarray | relax.Expr | None,
    *,
    window: Window,
    groups: int,
    name: str,
    shift: relax.Expr | None = None,
) -> relax.Expr:
    """x: [n, *spatial, c], weight [o, c / groups, *kernel] -> [n, *positions, o].

    To what it sums up it adds a bias of the outputs [o] and a shift of each position [n, *positions, groups].
    """
    shape = dims.sizes(x)
    o, per_group = weight.shape[:2]
    positions = window.output(shape[1:-1])
    if groups > 1 and per_group == 1:
        return _depthwise(e, x, weight, _added(e, bias, shift), window=window, positions=positions, name=name)
    group_columns = o // groups
    is_flat = not any(
        k > 1 or s > 1 or any(p) for k, s, p in zip(window.kernel, window.strides, window.pads, strict=True)
    )
    before = [p[0] for p in window.pads]
    source = padded(e, x, before, _reach(shape, window, positions), channels=shape[-1])
    axes = axes_of(window, dims.sizes(source))
    rows, width = positions[-2] if len(positions) > 1 else 1, positions[-1]
    tiles = _tile.exact_candidates(*(1, rows * width) if is_flat else (rows, width), group_columns, e.machine)
    if groups > 1:
        tiles = {name: _tile.dividing(group_columns, tile, e.machine) for name, tile in tiles.items()}
    called = ""
    if weight.is_constant:
        family = name if groups == 1 else f"{name} of {groups} groups"
        family = f"lookup {family}" if weight.codes else family
        called = shape_of(family, dims.sizes(source), (shape[0], *positions, o), axes, str(x.ty.dtype))
        called = f"{called}, {weight.stored}" if called and weight.codes else called
    tile = e.choices.pick(called, tiles)
    sliding = Sliding(tile.columns, tile.vector, False, axes, tile.high, tile.wide, called)
    if e.machine.kind == "cuda" and groups > 1 and group_columns >= _MANY_COLUMNS:
        packed = weight.packed(tile.columns)
        return _batched(e, source, packed, _added(e, bias, shift), window=window, groups=groups, name=name)
    places = dims.product([shape[0], *positions])
    codes = None if weight.codes is None else weight.codes(tile.columns, dims.nominal(places))

    def compute(a: te.Tensor, *given: te.Tensor) -> te.Tensor:
        b, factor, rest = (given[0], None, given[1:]) if codes is None else codes.stage(given)
        tiles = int(b.shape[0])
        taps = window.kernel[: len(b.shape) - 3]
        reduce = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(taps)]
        is_row = len(taps) < len(window.kernel)  # of one channel the last taps stand where channels do
        channel = te.reduce_axis((0, window.kernel[-1] if is_row else per_group), name="c")

        def element(n: Any, *i: Any) -> Any:
            *p, column = i
            steps = [*reduce, channel] if is_row else reduce
            where = [q * s + k * d for q, s, k, d in zip(p, window.strides, steps, window.dilations, strict=True)]
            first = (column // group_columns) * per_group if groups > 1 else 0
            w = b(column // tile.columns, *reduce, channel, column % tile.columns)
            return te.sum(a(n, *where, 0 if is_row else first + channel) * w, axis=[*reduce, channel])

        domain = (shape[0], *positions, tiles * tile.columns)
        total = te.compute(domain, element, name="mc_conv", attrs=sliding.annotation(e.machine))
        return cut(total, (shape[0], *positions, o), *rest, factor=factor)

    operands = [weight.packed(tile.columns)] if codes is None else codes.arguments(e)
    if codes is not None:
        name = f"lookup_{name}"
        e.note_kernel(f"{name}: {weight.stored}, {_choice.by(*weight.shape)}, {tile.columns} decoded at a time")
    return fusable(e, compute, source, *operands, *_added(e, bias, shift), name=name)


def _batched(
    e: Emitter,
    source: relax.Expr,
    packed: relax.Expr,
    added: Sequence[relax.Expr],
    *,
    window: Window,
    groups: int,
    name: str,
) -> relax.Expr:
    """Groups as the batch of a matrix product, which a GPU tiles; source padded, packed [o, *kernel, c / groups, 1]."""
    n, *size, channels = dims.sizes(source)
    o, *kernel, per_group, _ = dims.sizes(packed)
    positions = dataclasses.replace(window, pads=((0, 0),) * len(size)).output(size)
    columns = o // groups

    def compute(a: te.Tensor, b: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        reduce = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(kernel)]
        channel = te.reduce_axis((0, channels // groups), name="c")

        def element(batch: Any, *i: Any) -> Any:
            *p, group, column = i
            where = [q * s + k * d for q, s, k, d in zip(p, window.strides, reduce, window.dilations, strict=True)]
            w = b(group * columns + column, *reduce, channel, 0)
            return te.sum(a(batch, *where, group * per_group + channel) * w, axis=[*reduce, channel])

        total = te.compute((n, *positions, groups, columns), element, name="mc_conv")
        if not rest:
            return total

        def shifted(*i: Any) -> Any:
            value = total(*i)
            for x in rest:
                value = value + (x(i[-2] * columns + i[-1]) if len(x.shape) == 1 else x(*i[:-1]))
            return value

        return te.compute(total.shape, shifted, name="mc_bias")

    y = fusable(e, compute, source, packed, *added, name=name)
    return e.reshape(y, (n, *positions, o))


def cut(total: te.Tensor, shape: Sequence[int], *added: te.Tensor, factor: te.Tensor | None = None) -> te.Tensor:
    """The wanted part of whole tiles, times a factor of the last axis, plus a bias of it, plus a shift of each position
    and group.
    """
    if not added and factor is None:
        return te.compute(tuple(shape), lambda *i: total(*i), name="mc_cut")

    def element(*i: Any) -> Any:
        value = total(*i) if factor is None else total(*i) * factor(i[-1])
        for x in added:
            extents = dims.sizes(x)
            group = 0 if extents[-1] == 1 else i[-1] // (shape[-1] // extents[-1])
            value = value + (x(i[-1]) if len(extents) == 1 else x(*i[:-1], group))
        return value

    return te.compute(tuple(shape), element, name="mc_bias")


def fusable(e: Emitter, fn: Any, *sources: relax.Expr, name: str) -> relax.Var:
    """Emit a kernel whose element-wise consumers run on its register tile.

    A GPU's threads hide the latency of odd addresses: its kernel moves what it reads itself, for example into padding.
    """
    args = list(sources)
    if e.machine.kind == "cuda":
        fn, args = e.moves.joined(fn, args)
    return e.kernel(fn, *args, name=name, attributes=FUSABLE)


def _depthwise(
    e: Emitter,
    x: relax.Expr,
    weight: Weight,
    added: Sequence[relax.Expr],
    *,
    window: Window,
    positions: Sequence[int],
    name: str,
) -> relax.Expr:
    shape = dims.sizes(x)
    o = weight.shape[0]
    vector = _tile.vector_width(o, e.machine)
    repeat = o // shape[-1]
    axes = axes_of(window, shape, before=[p[0] for p in window.pads])
    source = x
    # A processor's loops step over the padding; a GPU's kernel takes in the kernel that pads.
    if e.machine.kind == "cuda" or not _window.steps_over(axes[-1], positions[-1], e.machine):
        before = [p[0] for p in window.pads]
        source = padded(e, x, before, _reach(shape, window, positions), channels=o, repeat=repeat)
        axes = axes_of(window, dims.sizes(source))
    elif repeat > 1:
        source = padded(e, x, [0] * len(axes), shape[1:-1], channels=o, repeat=repeat)
    called = ""
    if weight.is_constant:
        called = shape_of("depthwise", dims.sizes(source), (shape[0], *positions, o), axes, str(x.ty.dtype))
    wide = e.choices.pick(called, _window.channelwise_widths(axes[-1], positions[-1], e.machine))
    sliding = Sliding(vector, vector, channelwise=True, axes=axes, wide=wide, shape=called)
    packed = weight.packed(vector)

    def compute(a: te.Tensor, b: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        reduce = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]

        def element(*i: Any) -> Any:
            value = tap(a, i, reduce, axes=axes, positions=positions, fill=0)
            return te.sum(value * b(i[-1] // vector, *reduce, 0, i[-1] % vector), axis=reduce)

        domain = (shape[0], *positions, o)
        total = te.compute(domain, element, name="mc_depthwise", attrs=sliding.annotation(e.machine))
        return cut(total, (shape[0], *positions, o), *rest)

    return fusable(e, compute, source, packed, *added, name=name)


def _reach(shape: Sequence[int], w: Window, positions: Sequence[int]) -> list[int]:
    """The spatial size to give the input: what the positions read, or x as it is when it is enough."""
    needed = extended(w, positions)
    if any(p[0] for p in w.pads):
        return needed
    held = list(shape[1:-1])
    return held if all(n <= h for n, h in zip(needed, held, strict=True)) else needed


def _added(e: Emitter, bias: np.ndarray | relax.Expr | None, shift: relax.Expr | None) -> list[relax.Expr]:
    given = e.weight(bias) if isinstance(bias, np.ndarray) else bias
    return [x for x in (given, shift) if x is not None]


def conv(e: Emitter, node: onnx_ir.Node) -> None:
    """Conv of any rank, with groups, strides, dilations and paddings."""
    x, weight, *rest = node.inputs
    assert x is not None and weight is not None
    shape = e.shape(x)
    x, geometry = _with_pad(e, x, window(e, node, e.shape(weight)[2:], shape[2:]))
    bias = rest[0] if rest else None
    given = None if bias is None else e.constant(bias)
    if bias is not None and given is None:
        given = e.plain(bias)
    y = convolution(
        e,
        e.nhwc(x),
        constant_weight(e, weight, e.shape(weight), lambda array: array) or computed_weight(e, e.plain(weight)),
        given,
        window=geometry,
        groups=int(e.attribute(node, "group", 1)),
        name="conv",
    )
    e.set(node.outputs[0], y, "nhwc")


def _with_pad(e: Emitter, x: onnx_ir.Value, w: Window) -> tuple[onnx_ir.Value, Window]:
    """The input and window of a convolution, a Pad of zeros that only it reads taken into the window."""
    node = x.producer()
    if node is None or node.op_type != "Pad" or len(x.uses()) != 1 or x.is_graph_output() or e.constant(x) is not None:
        return x, w
    source, *rest = node.inputs
    amounts, fill, axes = ([*rest, None, None, None])[:3]
    pads, value, chosen = e.constant(amounts), e.constant(fill), e.constant(axes)
    if source is None or pads is None or (fill is not None and value is None) or (axes is not None and chosen is None):
        return x, w
    if e.attribute(node, "mode", "constant") not in ("constant", b"constant") or (value is not None and np.any(value)):
        return x, w
    rank = len(w.kernel) + 2
    low, high = np.zeros((2, rank), np.int64)
    at = np.arange(rank) if chosen is None else chosen.reshape(-1) % rank
    low[at], high[at] = pads.reshape(2, -1)
    if pads.min() < 0 or any(low[:2]) or any(high[:2]):
        return x, w
    both = zip(w.pads, low[2:].tolist(), high[2:].tolist(), strict=True)
    return source, dataclasses.replace(w, pads=tuple((a + before, b + after) for (a, b), before, after in both))


HANDLERS: dict[str, Handler] = {"Conv": conv}
