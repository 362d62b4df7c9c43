"""Which weights of a model may be factorised, how each is read as [F, C, K_1, ..], and why the others stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir

from mc_opt import ir, targets
from mc_opt.passes._base import Context
from mc_opt.passes._factored import FACTOR_OF, is_chain
from mc_opt.passes._plan import Layer
from mc_opt.passes._plan_time import Place

_RECURRENT = ("LSTM", "GRU", "RNN")
_OPEN = 64  # what an open size counts as, but for the batch, which counts as 1
_SAME = ("SAME_UPPER", "SAME_LOWER")

Kind = Literal["conv", "linear", "table"]


@dataclass(frozen=True)
class Window:
    """Strides, dilations, explicit pads and groups of a convolution."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    group: int


@dataclass(frozen=True)
class Use:
    """One node that uses a weight, and what its replacement must keep; `window` of a Conv alone."""

    node: onnx_ir.Node
    index: int
    window: Window | None = None


@dataclass(frozen=True)
class FactorSite:
    """A weight that may be factorised.

    Attributes:
        site: the weight.
        kind: what its uses are, all alike.
        uses: its uses.
        transposed: a matrix that is stored as [n, m].
        scale: alpha of a Gemm, a part of the weight from here on.
        group: groups of a convolution.
    """

    site: ir.WeightSite
    kind: Kind
    uses: tuple[Use, ...]
    transposed: bool = False
    scale: float = 1.0
    group: int = 1

    def layer(self, ctx: Context) -> Layer:
        """The weight as [F, C / group, K_1, ..] and where it stands."""
        weight = ctx.weight(self.site.value)
        if self.transposed:
            weight = weight.T
        if self.scale != 1.0:
            weight = (weight.astype(np.float64) * self.scale).astype(weight.dtype)
        outputs = sum(_positions(use.node.outputs[0], self.kind) for use in self.uses)
        inputs = sum(_positions(use.node.inputs[0], self.kind) for use in self.uses) if self.kind == "conv" else outputs
        place = Place(outputs, inputs, self.group, int(self.site.tensor.dtype.itemsize), price_of(ctx))
        return Layer(weight, place, table=self.kind == "table")


def price_of(ctx: Context) -> targets.Price:
    """The target's price; without a target of its own kernels that of x86, for all."""
    if ctx.target is not None and ctx.target.makes_artefact:
        return ctx.target.price
    return targets.find_target("x86").price


def _positions(value: onnx_ir.Value | None, kind: Kind) -> int:
    """Batch x pixels of a convolution's value, rows of a matrix product's."""
    if value is None or value.shape is None:
        return _OPEN
    dims = list(value.shape)
    axes = [0, *range(2, len(dims))] if kind == "conv" else range(len(dims) - 1)
    return math.prod(d if isinstance(d := dims[a], int) else 1 if a == 0 else _OPEN for a in axes)


def factor_site(site: ir.WeightSite) -> FactorSite | ir.Skip:
    """How a weight may be factorised, or why it may not."""
    if FACTOR_OF in site.value.metadata_props or any(is_chain(node) for node, _ in site.consumers):
        return ir.Skip("factored already")
    kinds = sorted({node.op_type for node, _ in site.consumers})
    if any(kind in _RECURRENT for kind in kinds):
        return ir.Skip(f"{'/'.join(kinds)}: recurrent weights are not factored yet")
    if min(site.shape) == 0:
        return ir.Skip("it is empty")
    match kinds:
        case ["Conv"]:
            return _conv(site)
        case ["Gather"]:
            return _table(site)
        case ["Gemm"] | ["MatMul"] | ["Gemm", "MatMul"]:
            return _linear(site)
    return ir.Skip(f"{', '.join(kinds)}: no factored form serves {'these uses together' if len(kinds) > 1 else 'it'}")


def _conv(site: ir.WeightSite) -> FactorSite | ir.Skip:
    if not 3 <= len(site.shape) <= 5:
        return ir.Skip(f"its shape is {list(site.shape)}; a Conv of 1 to 3 spatial axes was expected")
    uses = []
    for node, index in site.consumers:
        window = conv_window(node, site.shape)
        if isinstance(window, ir.Skip):
            return window
        uses.append(Use(node, index, window))
    groups = sorted({use.window.group for use in uses if use.window})
    if len(groups) > 1:
        return ir.Skip(f"shared by convolutions of {' and '.join(map(str, groups))} groups")
    if site.shape[1] == 1:
        return ir.Skip("C/group = 1: a row sees one channel, there is nothing between channels to factor")
    return FactorSite(site, "conv", tuple(uses), group=groups[0])


def conv_window(node: onnx_ir.Node, shape: Sequence[int]) -> Window | ir.Skip:
    """The window of a Conv with explicit pads, or why it has none."""
    axes = len(shape) - 2
    strides = _ints(node, "strides") or (1,) * axes
    dilations = _ints(node, "dilations") or (1,) * axes
    pads = _ints(node, "pads") or (0,) * 2 * axes
    group = node.attributes.get("group")
    auto = node.attributes.get("auto_pad")
    mode = auto.as_string() if auto is not None else "NOTSET"
    if mode == "VALID":
        pads = (0,) * 2 * axes
    elif mode in _SAME:
        x = node.inputs[0]
        sizes = [d for d in x.shape[2:] if isinstance(d, int)] if x is not None and x.shape is not None else []
        if len(sizes) != axes:
            return ir.Skip(f"auto_pad={mode} depends on sizes that are open; fix them with --shape")
        pads = _same_pads(sizes, shape[2:], strides, dilations, upper=mode == "SAME_UPPER")
    if min(pads) < 0:
        return ir.Skip(f"its pads are {list(pads)}, and negative ones crop")
    return Window(strides, dilations, pads, group.as_int() if group is not None else 1)


def _same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], *, upper: bool
) -> tuple[int, ...]:
    """The zeros that auto_pad adds: all begins, then all ends."""
    total = [
        max(0, (-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size)
        for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (*small, *large) if upper else (*large, *small)


def _table(site: ir.WeightSite) -> FactorSite | ir.Skip:
    if len(site.shape) != 2:
        return ir.Skip(f"its shape is {list(site.shape)}; a table of rows was expected")
    for node, _ in site.consumers:
        if node.inputs[1] is None or node.inputs[1].shape is None:
            return ir.Skip(f"the rank of the indices {node.inputs[1].name if node.inputs[1] else '?'!r} is unknown")
    return FactorSite(site, "table", tuple(Use(node, index) for node, index in site.consumers))


def _linear(site: ir.WeightSite) -> FactorSite | ir.Skip:
    if len(site.shape) != 2:
        return ir.Skip(f"its shape is {list(site.shape)}: a batch of matrices has no common factors")
    scales, transposed = set(), set()
    for node, index in site.consumers:
        x = node.inputs[1 - index]
        if x is None or x.shape is None:
            return ir.Skip(f"the rank of {x.name if x else '?'!r} is unknown; infer or state it")
        if index == 0 and len(x.shape) < 2:
            return ir.Skip(f"it multiplies the vector {x.name!r} from the left")
        alpha = node.attributes.get("alpha")
        scales.add(alpha.as_float() if alpha is not None else 1.0)
        # y = x·Wᵀ: as a right operand a weight is stored [n, m], unless transB; as a left one [m, n], unless transA.
        flipped = _flag(node, "transB" if index else "transA")
        transposed.add(bool(index) != flipped)
    if len(scales) > 1 or len(transposed) > 1:
        return ir.Skip("shared by products that read it differently")
    uses = tuple(Use(node, index) for node, index in site.consumers)
    return FactorSite(site, "linear", uses, transposed=transposed.pop(), scale=scales.pop())


def _flag(node: onnx_ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _ints(node: onnx_ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else ()
