"""Layers whose weight is a sum of Kronecker products: the chain of their factors, channels last.

Between stages the channel axis is a list of dimensions, slowest first: the input channels c_1 .. c_k that are still to
be summed, the live rank indices, the output channels f_(k+1) .. f_S made so far. A stage of factor k sums over c_k and
the ranks that end with it; what stands before them is only more positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from tvm import relax, te

from mc_opt import ir
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler, transposed
from mc_opt.targets.kernels import _weights, conv, gemm


@dataclass(frozen=True)
class Place:
    """Where a stage stands: dimensions before its own, its groups, what it sums over, behind, and what it makes."""

    before: tuple[str, ...]
    groups: tuple[str, ...]
    summed: tuple[str, ...]
    behind: tuple[str, ...]
    made: tuple[str, ...]


class Running:
    """The tensor between stages, [*positions, Π order], and the extents of the dimensions of its last axis."""

    def __init__(self, e: Emitter, x: relax.Expr, chain: ir.Chain, group: int) -> None:
        self.e, self.x, self.chain = e, x, chain
        numbers = range(1, len(chain.shapes) + 1)
        self.extents = {"g": group}
        self.extents |= {f"c{k}": chain.inputs(k) for k in numbers} | {f"f{k}": chain.outputs(k) for k in numbers}
        self.extents |= {f"r{r}": chain.rank(r) for r in range(chain.ranks)}
        self.extents["f1"] //= group
        self.order = self.real(["g", *(f"c{k}" for k in numbers)])

    def real(self, names: Sequence[str]) -> tuple[str, ...]:
        """The dimensions that are longer than 1."""
        return tuple(name for name in names if self.extents[name] > 1)

    def size(self, names: Sequence[str]) -> int:
        """The product of extents."""
        return math.prod(self.extents[name] for name in names)

    def place(self, stage: ir.Stage) -> Place:
        """Where a stage stands in the present order."""
        k = stage.factor
        groups = [*(["g"] if k == 1 else []), *(f"r{r}" for r in stage.grouped)]
        summed = [f"c{k}", *(f"r{r}" for r in stage.summed)]
        own = [d for d in self.order if d in groups or d in summed]
        # Without channels of its own a stage puts what it makes behind the inputs that are still to be summed.
        first = self.order.index(own[0]) if own else sum(d[0] in "gc" for d in self.order)
        return Place(
            before=tuple(d for d in self.order[:first] if d not in own),
            groups=tuple(d for d in own if d in groups),
            summed=tuple(d for d in own if d in summed),
            behind=tuple(d for d in self.order[first:] if d not in own),
            made=self.real([*(f"r{r}" for r in stage.made), f"f{k}"]),
        )

    def arrange(self, order: Sequence[str]) -> None:
        """Move the dimensions into another order."""
        if tuple(order) == self.order:
            return
        positions = dims.sizes(self.x)[:-1]
        view = self.e.reshape(self.x, [*positions, *(self.extents[d] for d in self.order)])
        perm = [*range(len(positions)), *(len(positions) + self.order.index(d) for d in order)]
        moved = self.e.te(functools.partial(transposed, perm=perm), view, name="transpose")
        self.x = self.e.reshape(moved, [*positions, self.size(order)])
        self.order = tuple(order)


@dataclass(frozen=True)
class Order:
    """A factor as a convolution's weight: its axes moved, then [groups · made, summed, *kernel]."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, factor: np.ndarray) -> np.ndarray:
        """The factor, or its codes, in this order."""
        return factor.transpose(self.axes).reshape(self.shape)

    def computed(self, e: Emitter, factor: relax.Expr) -> relax.Expr:
        """A factor that the model computes, in this order."""
        moved = e.te(functools.partial(transposed, perm=self.axes), factor, name="transpose")
        return e.reshape(moved, self.shape)


def order_of(chain: ir.Chain, stage: ir.Stage, place: Place) -> Order:
    """How the factor of a stage is to be read."""
    shape = chain.shapes[stage.factor - 1]
    names = [*(f"r{r}" for r in range(chain.ranks)), f"f{stage.factor}", f"c{stage.factor}"]
    outer = [d for d in (*place.groups, *place.made) if d in names]
    if "g" in place.groups and f"f{stage.factor}" not in outer:  # as many outputs as groups
        outer.append(f"f{stage.factor}")
    inner = [d for d in place.summed if d in names]
    rest = [d for d in names if d not in outer and d not in inner]  # of extent 1
    axes = (*(names.index(d) for d in (*outer, *rest, *inner)), *range(len(names), len(shape)))
    rows, columns = (math.prod(shape[names.index(d)] for d in part) for part in (outer, inner))
    return Order(axes, (rows, columns, *shape[len(names) :]))


def _stage_window(chain: ir.Chain, given: dict[str, tuple[int, ...]], factor: int) -> conv.Window:
    n = chain.spatial
    pads = given.get("pads", (0,) * (2 * n))
    return conv.Window(
        chain.kernel(factor),
        given.get("strides", (1,) * n),
        given.get("dilations", (1,) * n),
        tuple((pads[i], pads[n + i]) for i in range(n)),
    )


def _is_product(window: conv.Window) -> bool:
    """Whether every position is read once, where it stands."""
    return set(window.kernel) | set(window.strides) <= {1} and not any(map(any, window.pads))


def sekron_conv(e: Emitter, node: onnx_ir.Node) -> None:
    """SeKronConv as one convolution or product a factor."""
    x, bias, *factors = node.inputs
    assert x is not None
    chain = _chain(e, factors, len(e.shape(x)) - 2)
    n = chain.spatial
    lists = {name: tuple(e.attribute(node, name, ())) for name in ("strides", "dilations", "pads")}
    given = ir.stage_windows(chain, lists["strides"], lists["dilations"], lists["pads"])
    running = Running(e, e.nhwc(x), chain, int(e.attribute(node, "group", 1)))
    stages = chain.stages()
    for stage in stages:
        own = given[stage.factor - 1]
        window = _stage_window(chain, lists if own is None else own, stage.factor)
        value = factors[stage.factor - 1]
        assert value is not None
        place = running.place(stage)
        last = stage is stages[-1]
        added = _bias(e, bias) if last and not place.behind else None
        running.arrange([*place.before, *place.behind, *place.groups, *place.summed])
        if _is_product(window) and not place.groups and not last:
            _multiply(running, stage, place, value)
        else:
            _convolve(running, stage, place, value, window, added)
    running.arrange(running.real(["g", *(f"f{k + 1}" for k in range(len(factors)))]))
    y = running.x
    if bias is not None and added is None:
        y = e.te(_plus, y, e.plain(bias), name="bias")
    assert len(y.ty.shape) == n + 2
    e.set(node.outputs[0], y, "nhwc")


def kron_linear(e: Emitter, node: onnx_ir.Node) -> None:
    """KronLinear as one matrix product a factor."""
    x, bias, *factors = node.inputs
    assert x is not None
    chain = _chain(e, factors, 0)
    *lead, inputs = e.shape(x)
    a = e.plain(x)
    running = Running(e, a if lead else e.reshape(a, [1, inputs]), chain, 1)
    stages = chain.stages(reverse=chain.runs_reversed())
    for stage in stages:
        value = factors[stage.factor - 1]
        assert value is not None
        place = running.place(stage)
        added = _bias(e, bias) if stage is stages[-1] and not place.behind else None
        running.arrange([*place.before, *place.behind, *place.groups, *place.summed])
        if place.groups:
            _convolve(running, stage, place, value, conv.Window((), (), (), ()), added)
        else:
            _multiply(running, stage, place, value, added)
    running.arrange(running.real([f"f{k + 1}" for k in range(len(factors))]))
    y = running.x
    if bias is not None and added is None:
        y = e.te(_plus, y, e.plain(bias), name="bias")
    e.set(node.outputs[0], e.reshape(y, [*lead, running.size(running.order)]))


def _chain(e: Emitter, factors: Sequence[onnx_ir.Value | None], spatial: int) -> ir.Chain:
    shapes = tuple(tuple(int(d) for d in e.shape(v)) for v in factors if v is not None)
    return ir.Chain(shapes, len(shapes[0]) - 2 - spatial)


def _bias(e: Emitter, bias: onnx_ir.Value | None) -> np.ndarray | relax.Expr | None:
    if bias is None:
        return None
    array = e.constant(bias)
    return e.plain(bias) if array is None else array


def _multiply(
    running: Running,
    stage: ir.Stage,
    place: Place,
    value: onnx_ir.Value,
    bias: np.ndarray | relax.Expr | None = None,
) -> None:
    """A stage without taps and groups: rows are positions and all dimensions that it does not sum over."""
    e, chain = running.e, running.chain
    positions = dims.sizes(running.x)[:-1]
    kept = (*place.before, *place.behind)
    columns, depth = running.size(place.made), running.size(place.summed)
    lead, rows = _rows(positions, running.size(kept))
    a = e.reshape(running.x, [*lead, rows, depth])
    tile = gemm.tile_for(dims.sizes(a)[-2], columns, e)

    order = order_of(chain, stage, place)

    def pack(factor: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(order(factor).reshape(columns, depth).T, tile.columns)

    b = _weights.packed(e, value, pack)
    if b is None:
        matrix = e.reshape(order.computed(e, e.plain(value)), (columns, depth))
        b = gemm.pack_dynamic(e, matrix, tile.columns, transposed=True)
    added = e.weight(bias) if isinstance(bias, np.ndarray) else bias
    y = gemm.product(e, a, b, added, tile=tile, columns=columns)
    running.order = (*kept, *place.made)
    running.x = e.reshape(y, [*positions, running.size(running.order)])


def _rows(positions: Sequence[Dim], kept: int) -> tuple[list[Dim], Dim]:
    """Positions, `kept` times each, as rows of a product, and what leads them.

    Open positions and others are not multiplied: that tiles cover a multiple of an open number cannot be proven.
    """
    first = max((k + 1 for k, p in enumerate(positions) if not isinstance(p, int)), default=0)
    rows = math.prod(positions[first:]) * kept
    if rows == 1 and first:
        return list(positions[: first - 1]), positions[first - 1]
    return list(positions[:first]), rows


def _convolve(
    running: Running,
    stage: ir.Stage,
    place: Place,
    value: onnx_ir.Value,
    window: conv.Window,
    bias: np.ndarray | relax.Expr | None,
) -> None:
    """A stage as a convolution; dimensions that it does not sum over are one more axis of positions."""
    e, chain = running.e, running.chain
    positions = dims.sizes(running.x)[:-1]
    kept, channels = (*place.before, *place.behind), (*place.groups, *place.summed)
    view = running.x
    deep = bool(kept) or not chain.spatial
    if deep:
        view = e.reshape(view, [*_batch(positions, chain), running.size(kept), running.size(channels)])
        window = conv.Window((*window.kernel, 1), (*window.strides, 1), (*window.dilations, 1), (*window.pads, (0, 0)))

    order = order_of(chain, stage, place)
    shape = (*order.shape, 1) if deep else order.shape
    held = conv.constant_weight(e, value, shape, lambda factor: order(factor).reshape(shape))
    if held is None:
        held = conv.computed_weight(e, e.reshape(order.computed(e, e.plain(value)), shape))
    y = conv.convolution(e, view, held, bias, window=window, groups=running.size(place.groups), name="kron")
    running.order = (*kept, *place.groups, *place.made)
    outer = dims.sizes(y)[:-2] if deep else dims.sizes(y)[:-1]
    running.x = e.reshape(y, [*(outer if chain.spatial else positions), running.size(running.order)])


def _plus(y: te.Tensor, bias: te.Tensor) -> te.Tensor:
    return te.compute(y.shape, lambda *i: y(*i) + bias(i[-1]), name="bias")


def _batch(positions: Sequence[Dim], chain: ir.Chain) -> list[Dim]:
    return list(positions) if chain.spatial else [dims.product(positions)]


HANDLERS: dict[str, Handler] = {"mc_opt.SeKronConv": sekron_conv, "mc_opt.KronLinear": kron_linear}
