"""Layers whose weight is a sum of Kronecker products: the chain of their factors, channels last.

Between stages the channel axis is a list of dimensions, slowest first: the input channels c_1 .. c_k that are still to
be summed, the live rank indices, the output channels f_(k+1) .. f_S made so far. A stage of factor k sums over c_k and
the ranks that end with it. What stands before these is only more positions of a product or convolution; what stands
behind them goes into vectors (`kron_left`), a few at a time beside others (`kron_spread`). Only where neither fits are
dimensions moved.

Each stage is a kernel here; products, pointwise and channelwise convolutions in a row are joined afterwards where that
saves time (`_join`): canonical polyadic factors of large images, and products of many rows whose ranks are many beside
their inputs and outputs. Others stay apart. Both stages of a product of 64 to 256 rows, and of pointwise factors, run
near the processor's multiply-adds as they are, the tensor between them in the second-level cache. One row reads
weights, and every column of the second stage needs all of the first. Stages with taps over many channels make few
numbers in between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir
from tvm import relax, te

from mc_opt import ir
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _decode, _weights, conv, gemm, kron_left, kron_spread
from mc_opt.targets.kernels._kron_chain import Order, Place, Running, order_of
from mc_opt.targets.kernels.kron_left import Block

# A number that is read, moved and written in a transposition takes as long as so many of a vector's multiply-adds.
_MOVE = 16
# Rows that are worth a tile.
_FEW = 4
_POINT = conv.Window((1,), (1,), (1,), ((0, 0),))

Bias: TypeAlias = np.ndarray | relax.Expr | None


@dataclass(frozen=True)
class Step:
    """A stage: where it stands, its factor in a convolution's order, its window."""

    place: Place
    factor: onnx_ir.Value
    order: Order
    window: conv.Window

    @property
    def moved(self) -> tuple[str, ...]:
        """The dimensions in the order that a convolution or product takes."""
        return (*self.place.before, *self.place.behind, *self.place.groups, *self.place.summed)

    @property
    def kept(self) -> tuple[str, ...]:
        """What it does not sum over."""
        return (*self.place.before, *self.place.behind)


def sekron_conv(e: Emitter, node: onnx_ir.Node) -> None:
    """SeKronConv as one convolution or product a factor."""
    x, bias, *factors = node.inputs
    assert x is not None
    chain = _chain(e, factors, len(e.shape(x)) - 2)
    lists = {name: tuple(e.attribute(node, name, ())) for name in ("strides", "dilations", "pads")}
    given = ir.stage_windows(chain, lists["strides"], lists["dilations"], lists["pads"])
    windows = [_window(chain, lists if own is None else own, k + 1) for k, own in enumerate(given)]
    group = int(e.attribute(node, "group", 1))
    windows = _padded_early(chain, windows, e.shape(x)[2:], group)
    running = Running(e, e.nhwc(x), chain, group=group)
    e.set(node.outputs[0], _run(running, factors, windows, bias), "nhwc")


def kron_linear(e: Emitter, node: onnx_ir.Node) -> None:
    """KronLinear as one matrix product a factor."""
    x, bias, *factors = node.inputs
    assert x is not None
    chain = _chain(e, factors, 0)
    *lead, inputs = e.shape(x)
    rows = e.plain(x) if lead else e.reshape(e.plain(x), [1, inputs])
    running = Running(e, rows, chain, reverse=chain.runs_reversed())
    y = _run(running, factors, [conv.Window((), (), (), ())] * len(factors), bias)
    e.set(node.outputs[0], e.reshape(y, [*lead, running.size(running.order)]))


def _chain(e: Emitter, factors: Sequence[onnx_ir.Value | None], spatial: int) -> ir.Chain:
    shapes = tuple(tuple(int(d) for d in e.shape(v)) for v in factors if v is not None)
    return ir.Chain(shapes, len(shapes[0]) - 2 - spatial)


def _window(chain: ir.Chain, given: dict[str, tuple[int, ...]], factor: int) -> conv.Window:
    n = chain.spatial
    pads = given.get("pads", (0,) * (2 * n))
    return conv.Window(
        chain.kernel(factor),
        given.get("strides", (1,) * n),
        given.get("dilations", (1,) * n),
        tuple((pads[i], pads[n + i]) for i in range(n)),
    )


def _padded_early(
    chain: ir.Chain, windows: Sequence[conv.Window], area: Sequence[Dim], group: int
) -> list[conv.Window]:
    """Pads moved to the stage where they cost least: until the first taps, what is zero stays zero.

    Stages from there to the first taps run at the padded positions too; a depthwise one steps over its own padding.
    """
    stages = chain.stages()
    positions = [dims.nominal(d) for d in area]
    products = chain.multiplications()
    result = list(windows)
    for axis in range(chain.spatial):
        now = next((n for n, stage in enumerate(stages) if any(windows[stage.factor - 1].pads[axis])), 0)
        owner = stages[now].factor - 1
        pads = windows[owner].pads[axis]
        beside = math.prod(positions) // positions[axis]
        cost = {}
        for first in range(now + 1):
            numbers = 0 if _is_depthwise(chain, stages[first], group) else _channels(chain, stages[first])
            copied = numbers * beside * (positions[axis] + sum(pads)) * _MOVE
            cost[first] = copied + sum(products[first:now]) * beside * sum(pads)
        home = stages[min(cost, key=lambda n: (cost[n], -n))].factor - 1
        result[owner] = _with_pads(result[owner], axis, (0, 0))
        result[home] = _with_pads(result[home], axis, pads)
    return result


def _is_depthwise(chain: ir.Chain, stage: ir.Stage, group: int) -> bool:
    """Whether each output channel of a stage reads one input channel."""
    groups = math.prod(chain.rank(r) for r in stage.grouped) * (group if stage.factor == 1 else 1)
    return groups > 1 and chain.inputs(stage.factor) * math.prod(chain.rank(r) for r in stage.summed) == 1


def _channels(chain: ir.Chain, stage: ir.Stage) -> int:
    """Channels that a stage reads."""
    k, count = stage.factor, len(chain.shapes)
    kept = math.prod(chain.inputs(j) for j in range(1, k + 1)) * math.prod(
        chain.outputs(j) for j in range(k + 1, count + 1)
    )
    return kept * math.prod(chain.rank(r) for r in (*stage.grouped, *stage.summed, *stage.passed))


def _with_pads(window: conv.Window, axis: int, pads: tuple[int, int]) -> conv.Window:
    return dataclasses.replace(window, pads=(*window.pads[:axis], pads, *window.pads[axis + 1 :]))


def _run(
    running: Running,
    factors: Sequence[onnx_ir.Value | None],
    windows: Sequence[conv.Window],
    bias: onnx_ir.Value | None,
) -> relax.Expr:
    """All stages: the result, [*positions, Π F_k]."""
    e, chain = running.e, running.chain
    final = running.real(["g", *(f"f{k + 1}" for k in range(len(factors)))])
    pending = bias
    stages = chain.stages(reverse=running.reverse)
    for stage in stages:
        factor, place, last = factors[stage.factor - 1], running.place(stage), stage is stages[-1]
        assert factor is not None
        step = Step(place, factor, order_of(chain, stage, place), windows[stage.factor - 1])
        behind = _spread(running, step)
        block = None if behind else _left(running, step)
        if behind:
            after = (*place.before, *place.made, *place.behind)
        elif block is None:
            running.arrange(step.moved)
            after = (*step.kept, *place.groups, *place.made)
        else:
            after = (*block.kept, *place.groups, *place.made, *block.lanes)
        added: Bias = None
        # Only a product from the left writes all channels of a position at once where some are kept.
        apart = () if block else place.before if behind else step.kept
        if pending is not None and last and after == final and not apart:
            array = e.constant(pending)
            added, pending = (e.plain(pending) if array is None else array), None
        positions = running.positions
        if behind:
            y, positions = _multiply_spread(running, step, behind, added)
        elif block is not None:
            y, positions = _multiply_left(running, step, block, added)
        elif chain.spatial:
            y, positions = _convolve(running, step, added)
        elif place.groups or _takes_rows(running, last=last):
            y = _multiply_rows(running, step, added)
        else:
            y = _multiply(running, step, added)
        running.set(y, positions, after)
    running.arrange(final)
    y = running.result()
    return y if pending is None else e.te(_plus, y, e.plain(pending), name="bias")


def _plus(y: te.Tensor, bias: te.Tensor) -> te.Tensor:
    return te.compute(y.shape, lambda *i: y(*i) + bias(i[-1]), name="bias")


def _spread(running: Running, step: Step) -> int:
    """How many channels a product with blocks of a few keeps behind those that it multiplies; 0 for another kernel."""
    e, place = running.e, step.place
    behind = running.size(place.behind)
    if place.groups or running.order != (*place.before, *place.summed, *place.behind):
        return 0
    if not kron_spread.takes(behind, running.dtype, e.machine):
        return 0
    if not running.chain.spatial and not dims.is_static(running.positions) and running.size(place.before) < _FEW:
        return 0  # open rows do not make a tile
    return behind if _spread_weight(running, step, behind) is not None else 0


def _spread_weight(running: Running, step: Step, behind: int) -> conv.Weight | None:
    rows, *rest = step.order.shape
    deep = [1] if running.chain.spatial and running.size(step.place.before) > 1 else []
    shape = (rows * behind, *rest, *(deep if running.chain.spatial else [1]))
    return conv.constant_weight(
        running.e, step.factor, shape, lambda factor: kron_spread.repeated(step.order(factor), behind).reshape(shape)
    )


def _multiply_spread(running: Running, step: Step, behind: int, bias: Bias) -> tuple[relax.Expr, list[Dim]]:
    """What stands before the stage's channels is one more axis of positions."""
    e, place, window = running.e, step.place, step.window
    weight, kept = _spread_weight(running, step, behind), running.size(place.before)
    assert weight is not None  # `_spread` saw to it
    if not running.chain.spatial:
        view, window = _pictures(running, kept, (*place.summed, *place.behind), is_one=True), _POINT
    else:
        channels = running.size((*place.summed, *place.behind))
        view = running.view([*running.positions, *([kept] if kept > 1 else []), channels])
        if kept > 1:
            window = _deep(window)
    y = kron_spread.product(e, view, weight, behind, _expr(e, bias), window=window)
    return y, dims.sizes(y)[: len(running.positions)] if running.chain.spatial else running.positions


def _deep(w: conv.Window) -> conv.Window:
    """The window with one more axis, along which nothing slides."""
    return conv.Window((*w.kernel, 1), (*w.strides, 1), (*w.dilations, 1), (*w.pads, (0, 0)))


def _left(running: Running, step: Step) -> Block | None:
    """The channels for a product from the left; None where another kernel is better."""
    e, place, order = running.e, step.place, running.order
    if e.machine.kind == "cuda":  # has no vectors, and its products move channels while they read
        return None
    own = {*place.groups, *place.summed}
    count = next((k for k, d in enumerate(reversed(order)) if d in own), len(order))
    lanes = order[len(order) - count :]
    if not lanes or not (place.behind or _may_stand_behind(running, step)):
        return None
    if e.constant(step.factor) is None:
        lookup = e.lookup(step.factor)
        if lookup is None or not _decode.fits(lookup, lambda factor: kron_left.pack(step.order(factor), 1, 1)):
            return None
    vectors, made, depth = (running.size(names) for names in (lanes, place.made, place.summed))
    taps = math.prod(step.window.kernel)
    wide = e.machine.lanes
    left = made * vectors * depth * taps * wide // math.gcd(vectors, wide)
    right = -(-made // wide) * wide * vectors * depth * taps
    if place.behind:
        right += _MOVE * vectors * (depth + made)
    if left > right:
        return None
    kept = tuple(d for d in order if d not in own and d not in lanes)
    return Block(running.extents, order, place.groups, place.summed, kept, lanes)


def _may_stand_behind(running: Running, step: Step) -> bool:
    """Whether a stage that sums over no channels may put what it makes in front of them: it makes ranks only."""
    place = step.place
    return not place.groups and not place.summed and all(d[0] == "r" for d in place.made)


def _multiply_left(running: Running, step: Step, block: Block, bias: Bias) -> tuple[relax.Expr, list[Dim]]:
    """What stands behind the stage's channels in vectors."""
    e, place = running.e, step.place
    groups = running.size(place.groups)

    def weight(columns: int) -> relax.Expr:
        expr = _weights.packed(e, step.factor, lambda factor: kron_left.pack(step.order(factor), groups, columns))
        assert expr is not None  # `_left` saw to it
        return expr

    made = step.order.shape[0] // groups
    x = running.view([*running.positions, *(running.extents[d] for d in running.order)])
    return kron_left.product(e, x, block, weight, outputs=made, window=step.window, bias=_expr(e, bias))


def _multiply(running: Running, step: Step, bias: Bias) -> relax.Expr:
    """Rows are positions, open ones or a GPU's, and all dimensions that the stage does not sum over."""
    e, order = running.e, step.order
    columns, depth = order.shape[:2]
    lead, rows = _rows(running.positions, running.size(step.kept))
    a = running.view([*lead, rows, depth])
    tile = gemm.tile_for(rows, columns, e)

    def pack(factor: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(order(factor).reshape(columns, depth).T, tile.columns)

    b = _weights.packed(e, step.factor, pack)
    if b is None:
        matrix = e.reshape(order.computed(e, e.plain(step.factor)), (columns, depth))
        b = gemm.pack_dynamic(e, matrix, tile.columns, transposed=True)
    return gemm.product(e, a, b, _expr(e, bias), tile=tile, columns=columns)


def _rows(positions: Sequence[Dim], kept: int) -> tuple[list[Dim], Dim]:
    """Positions, `kept` times each, as rows of a product, and what leads them.

    Open positions and others are not multiplied: that tiles cover a multiple of an open number cannot be proven.
    """
    *lead, last = positions
    if not isinstance(last, int):
        return (lead, last) if kept == 1 else ([*positions], kept)
    first = max((k + 1 for k, p in enumerate(lead) if not isinstance(p, int)), default=0)
    if last * kept < _FEW:
        return lead[:first], math.prod(lead[first:]) * last * kept
    return lead, last * kept


def _convolve(running: Running, step: Step, bias: Bias) -> tuple[relax.Expr, list[Dim]]:
    """Dimensions that the stage does not sum over are one more axis of positions."""
    e, place, window, shape = running.e, step.place, step.window, step.order.shape
    kept, channels = running.size(step.kept), running.size((*place.groups, *place.summed))
    deep = kept > 1
    if deep:
        window, shape = _deep(window), (*shape, 1)
    view = running.view([*running.positions, *([kept] if deep else []), channels])
    y = conv.convolution(
        e, view, _weight(e, step, shape), bias, window=window, groups=running.size(place.groups), name="kron"
    )
    return y, dims.sizes(y)[: len(running.positions)]


def _takes_rows(running: Running, *, last: bool) -> bool:
    """Whether the loops of a convolution take all rows; what follows the last stage runs in them if no view does.

    The rows of a matrix are those of products in every stage, so that no view stands between two that may be joined.
    """
    positions = running.positions
    if running.e.machine.kind == "cuda" or not dims.is_static(positions):
        return False
    if len(positions) == 1 and positions[0] >= _FEW:
        return False
    return not last or _are_pictures(positions)


def _are_pictures(positions: Sequence[Dim]) -> bool:
    """Whether rows stand as pictures of one axis with enough positions for tiles: a batch of sequences."""
    return dims.is_static(positions) and len(positions) == 2 and (positions[1] >= _FEW or positions[0] == 1)


def _multiply_rows(running: Running, step: Step, bias: Bias) -> relax.Expr:
    """A product as a convolution without taps: of all rows, or, with a matrix a group, of every row as a picture."""
    e, place = running.e, step.place
    view = _pictures(running, running.size(step.kept), (*place.groups, *place.summed), is_one=not place.groups)
    weight = _weight(e, step, (*step.order.shape, 1))
    return conv.convolution(e, view, weight, bias, window=_POINT, groups=running.size(place.groups), name="kron")


def _pictures(running: Running, kept: int, channels: Sequence[str], *, is_one: bool) -> relax.Expr:
    """Rows of `kept` positions as pictures of one axis; all in one if it is wanted and their number is known."""
    count, depth = dims.product(running.positions), running.size(channels)
    if kept == 1 and _are_pictures(running.positions):
        return running.view([*running.positions, depth])
    is_one = is_one and isinstance(count, int)
    return running.view([1, count * kept, depth] if is_one else [count, kept, depth])


def _weight(e: Emitter, step: Step, shape: Sequence[int]) -> conv.Weight:
    held = conv.constant_weight(e, step.factor, shape, lambda factor: step.order(factor).reshape(shape))
    if held is not None:
        return held
    return conv.computed_weight(e, e.reshape(step.order.computed(e, e.plain(step.factor)), shape))


def _expr(e: Emitter, bias: Bias) -> relax.Expr | None:
    return e.weight(bias) if isinstance(bias, np.ndarray) else bias


HANDLERS: dict[str, Handler] = {"mc_opt.SeKronConv": sekron_conv, "mc_opt.KronLinear": kron_linear}
