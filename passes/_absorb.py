"""Where a per-channel scale and shift may go: back into what produced a value, or on into what consumes it.

Both walks only plan: they answer a list of edits, or why there is none. No edit runs before all of a plan is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir

from mc_opt import ir
from mc_opt.passes import _affine
from mc_opt.passes._affine import Affine
from mc_opt.passes._refold import Editor, bypass, constant_data, constant_side, int_attribute, is_constant, value_at
from mc_opt.passes._through import dim_of, pads_of, rank_of, through, title_of

Plan = list[Callable[[], None]]

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
_OWNERS = ("Conv", "ConvTranspose", "Gemm")  # ops with a bias of their own


@dataclass(frozen=True)
class Folder:
    """Makes plans.

    Attributes:
        editor: runs the edits of the plans.
        border: before a zero-padded Conv, add the shift as a map.
    """

    editor: Editor
    border: bool

    # ---- backwards

    def back(self, value: onnx_ir.Value, affine: Affine) -> Plan | ir.Skip:
        """Make `value` itself s·value + t. It may have one use."""
        if value.is_graph_output():
            return ir.Skip(f"{value.name!r} before it is also an output")
        if len(value.uses()) > 1:
            others = ", ".join(sorted({title_of(u.node) for u in value.uses()}))
            return ir.Skip(f"{value.name!r} before it has {len(value.uses())} uses ({others})")
        node = value.producer()
        if node is None:
            return ir.Skip(f"its input {value.name!r} is no result of a layer")
        if node.domain != "":
            return ir.Skip(f"its input comes from {title_of(node)}, of domain {node.domain}")
        if any(use.node.graph is not node.graph for use in value.uses()):
            return ir.Skip(f"its input {value.name!r} comes from outside the body that it stands in")
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._back_into_layer(node, affine)
        if node.op_type in _ELEMENTWISE:
            return self._back_elementwise(node, affine)
        if node.op_type == "Concat":
            return self._back_concat(node, affine)
        passed = through(node, affine, backwards=True)
        return passed if isinstance(passed, ir.Skip) else self.back(value_at(node, 0), passed)

    def _back_into_layer(self, node: onnx_ir.Node, affine: Affine) -> Plan | ir.Skip:
        rank = rank_of(node.outputs[0])
        if node.op_type == "MatMul":
            side = constant_side(node)
            if rank is None or side is None:
                return ir.Skip(f"its input comes from {title_of(node)}, {_not_constant(node)}")
            w = value_at(node, side)
            weight_axis = rank_of(w) or 0
            wanted = rank - 1 if side == 1 else rank - 2
            if weight_axis < 2 or affine.axis != wanted or (side == 0 and weight_axis != 2):
                return ir.Skip(
                    f"its channels are axis {affine.axis} of {title_of(node)}, the weight's outputs another one"
                )
            scaled_axis = weight_axis - 1 if side == 1 else 0
            plan: Plan = [functools.partial(self.editor.scale, node, side, affine.s, scaled_axis)]
            return plan + (
                [functools.partial(self.editor.add_channels_after, node, affine, rank)] if affine.shifts else []
            )
        if affine.axis != 1:
            return ir.Skip(f"its channels are axis {affine.axis} of {title_of(node)}, the weight's outputs are axis 1")
        if not is_constant(value_at(node, 1)):
            return ir.Skip(f"its input comes from {title_of(node)}, {_not_constant(node)}")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not is_constant(bias):
            return ir.Skip(f"the bias of {title_of(node)} is computed")
        return [functools.partial(self.editor.scale_outputs, node, affine)]

    def _back_elementwise(self, node: onnx_ir.Node, affine: Affine) -> Plan | ir.Skip:
        side = constant_side(node)
        if side is None:
            return self._back_both(node, affine)
        other, rank = value_at(node, 1 - side), rank_of(node.outputs[0])
        if rank is None or rank_of(other) != rank:
            return ir.Skip(f"the constant of {title_of(node)} may widen its other input")
        constant = constant_data(value_at(node, side), self.editor.ctx)
        c = _affine.per_channel(constant, rank, affine)
        if node.op_type in ("Mul", "Div"):
            if c is None or (node.op_type == "Div" and (side == 0 or not c.all())):
                return ir.Skip(f"its input comes from {title_of(node)}, which is no scale of a channel")
            factor = c if node.op_type == "Mul" else 1 / c
            return _and(self.back(other, affine.after(factor, 0.0)), functools.partial(bypass, node, 1 - side))
        sign = -1.0 if node.op_type == "Sub" and side == 0 else 1.0
        if c is not None and _has_own_bias(other):
            shift = -c if node.op_type == "Sub" and side == 1 else c
            return _and(self.back(other, affine.after(sign, shift)), functools.partial(bypass, node, 1 - side))
        constant_sign = -1.0 if node.op_type == "Sub" and side == 1 else 1.0
        # s·(±x ± c) + t = ±s·x + (±s·c + t): the constant stays where it is and takes the shift.
        edit = functools.partial(self.editor.shift_constant, node, side, affine, rank, constant_sign)
        return _and(self.back(other, affine.unshifted()), edit)

    def _back_both(self, node: onnx_ir.Node, affine: Affine) -> Plan | ir.Skip:
        if node.op_type not in ("Add", "Sub"):
            return ir.Skip(f"its input comes from {title_of(node)}, a product of two results")
        a, b = value_at(node, 0), value_at(node, 1)
        if a is b or rank_of(a) != rank_of(b) or rank_of(a) is None:
            return ir.Skip(f"its input comes from {title_of(node)} of two values of unequal rank")
        if any(dim_of(v, affine.axis) != affine.s.size for v in (a, b)):
            return ir.Skip(f"its input comes from {title_of(node)}, which broadcasts channels")
        first = self.back(a, affine)
        return first if isinstance(first, ir.Skip) else _join(first, self.back(b, affine.unshifted()))

    def _back_concat(self, node: onnx_ir.Node, affine: Affine) -> Plan | ir.Skip:
        rank = rank_of(node.outputs[0])
        along = int_attribute(node, "axis", 0)
        if rank is None or len({id(v) for v in node.inputs}) != len(node.inputs):
            return ir.Skip(f"its input comes from {title_of(node)} of unknown rank or of one value twice")
        plan: Plan = []
        start = 0
        for value in node.inputs:
            assert value is not None
            part = affine
            if along % rank == affine.axis:
                width = dim_of(value, affine.axis)
                if width is None:
                    return ir.Skip(f"the channels of {value.name!r} in {title_of(node)} are not known")
                part = replace(affine, s=affine.s[start : start + width], t=affine.t[start : start + width])
                start += width
            branch = self.back(value, part)
            if isinstance(branch, ir.Skip):
                return ir.Skip(f"{title_of(node)} before it takes the scale only with all its inputs: {branch.reason}")
            plan += branch
        return plan

    # ---- forwards

    def on(self, value: onnx_ir.Value, affine: Affine) -> Plan | ir.Skip:
        """Make every consumer of `value` see s·value + t."""
        if value.is_graph_output():
            return ir.Skip("its result is an output of the model")
        plan: Plan = []
        for use in value.uses():
            step = self._on_use(use.node, use.idx, affine)
            if isinstance(step, ir.Skip):
                return step
            plan += step
        return plan

    def _on_use(self, node: onnx_ir.Node, index: int, affine: Affine) -> Plan | ir.Skip:
        if node.domain != "":
            return ir.Skip(f"its result goes to {title_of(node)}, of domain {node.domain}")
        if node.op_type in ("Conv", "ConvTranspose") and index == 0:
            return self._on_conv(node, affine)
        if node.op_type in ("Gemm", "MatMul"):
            return self._on_matmul(node, index, affine)
        if node.op_type in _ELEMENTWISE:
            return self._on_elementwise(node, index, affine)
        if index != 0:
            return ir.Skip(f"its result goes to {title_of(node)}")
        passed = through(node, affine, backwards=False)
        return passed if isinstance(passed, ir.Skip) else self.on(node.outputs[0], passed)

    def _on_conv(self, node: onnx_ir.Node, affine: Affine) -> Plan | ir.Skip:
        if affine.axis != 1 or not is_constant(value_at(node, 1)):
            return ir.Skip(f"its result goes to {title_of(node)}, {_not_constant(node)}")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not is_constant(bias):
            return ir.Skip(f"the bias of {title_of(node)} is computed")
        scale = functools.partial(self.editor.scale_inputs, node, affine.s)
        if not affine.shifts:
            return [scale]
        if node.op_type == "ConvTranspose":
            return ir.Skip(
                f"its result goes to {title_of(node)}, where fewer taps meet at the border: a shift is no bias"
            )
        size = [dim_of(value_at(node, 0), axis) for axis in range(2, rank_of(value_at(node, 1)) or 2)]
        pads = pads_of(node, size)
        if pads is not None and not any(sum(pads, ())):
            return [functools.partial(self.editor.shift_conv, node, affine.t), scale]
        known = [d for d in size if d is not None]
        if not self.border:
            return ir.Skip(
                f"its result goes to {title_of(node)}, which pads with zeros: there the shift is missing; "
                "border=true adds it as a map of the output's size"
            )
        if pads is None or len(known) != len(size):
            return ir.Skip(
                f"its result goes to {title_of(node)}, which pads an image of unknown size; fix it by --shape"
            )
        return [functools.partial(self.editor.shift_border, node, affine.t, known, pads), scale]

    def _on_matmul(self, node: onnx_ir.Node, index: int, affine: Affine) -> Plan | ir.Skip:
        x, w = value_at(node, index), node.inputs[1 - index] if index < 2 else None
        rank = rank_of(x)
        if w is None or rank is None or not is_constant(w):
            return ir.Skip(f"its result goes to {title_of(node)}, {_not_constant(node)}")
        gemm = node.op_type == "Gemm"
        transposed = bool(int_attribute(node, "transB" if index == 0 else "transA", 0)) if gemm else False
        x_transposed = bool(int_attribute(node, "transA" if index == 0 else "transB", 0)) if gemm else False
        summed = rank - 1 if index == 0 else rank - 2
        if (gemm and index == 1) or x_transposed or affine.axis != summed or (rank_of(w) or 0) < 2:
            return ir.Skip(f"its result goes to {title_of(node)}, which does not sum over its channels")
        if index == 1 and rank_of(w) != 2:
            return ir.Skip(f"its result goes to {title_of(node)}, whose weight has {rank_of(w)} axes")
        axis = (rank_of(w) or 0) - 2 if (index == 0) != transposed else (rank_of(w) or 0) - 1
        scale = functools.partial(self.editor.scale, node, 1 - index, affine.s, axis)
        if not affine.shifts:
            return [scale]
        if gemm:
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None and not is_constant(bias):
                return ir.Skip(f"the bias of {title_of(node)} is computed")
            return [functools.partial(self.editor.shift_gemm, node, affine.t, axis), scale]
        if rank_of(node.outputs[0]) is None:
            return ir.Skip(f"its result goes to {title_of(node)}, whose rank is not known")
        return [functools.partial(self.editor.shift_matmul, node, 1 - index, affine.t, axis), scale]

    def _on_elementwise(self, node: onnx_ir.Node, index: int, affine: Affine) -> Plan | ir.Skip:
        x, constant = value_at(node, index), value_at(node, 1 - index)
        rank = rank_of(x)
        if not is_constant(constant) or rank is None or rank_of(node.outputs[0]) != rank:
            return ir.Skip(f"its result goes to {title_of(node)}, which has another input")
        c = _affine.per_channel(constant_data(constant, self.editor.ctx), rank, affine)
        if c is None or (node.op_type == "Div" and (index == 1 or not c.all())):
            return ir.Skip(f"its result goes to {title_of(node)}, which is no scale or shift of a channel")
        match node.op_type:
            case "Mul":
                moved = affine.then(c, 0.0)
            case "Div":
                moved = affine.then(1 / c, 0.0)
            case "Add":
                moved = affine.then(1.0, c)
            case _:
                moved = affine.then(1.0, -c) if index == 0 else affine.then(-1.0, c)
        return _and(self.on(node.outputs[0], moved), functools.partial(bypass, node, index))


def _has_own_bias(value: onnx_ir.Value) -> bool:
    """Whether the layer behind a value, and behind constant scales and shifts, has a bias to take a shift."""
    node = value.producer()
    while node is not None and node.op_type in _ELEMENTWISE and (side := constant_side(node)) is not None:
        node = value_at(node, 1 - side).producer()
    return node is not None and node.op_type in _OWNERS


def _and(plan: Plan | ir.Skip, edit: Callable[[], None]) -> Plan | ir.Skip:
    return plan if isinstance(plan, ir.Skip) else [*plan, edit]


def _join(first: Plan, second: Plan | ir.Skip) -> Plan | ir.Skip:
    return second if isinstance(second, ir.Skip) else [*first, *second]


def _not_constant(node: onnx_ir.Node) -> str:
    weights = [v for v in node.inputs[:2] if v is not None]
    made = [p for v in weights if (p := v.producer()) is not None and p.domain == "mc_opt"]
    if made:
        return f"whose weight {made[0].outputs[0].name!r} is decoded by {made[0].op_type}; fold before that pass"
    return "which has no constant weight on that side"
