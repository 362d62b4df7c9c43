"""The edits of folding: new numbers in weights and biases, constants beside them, nodes taken out or put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _affine
from mc_opt.passes._affine import Affine
from mc_opt.passes._base import Context


@dataclass(frozen=True)
class Editor:
    """Writes new weights; `by` (pass, rule) is their provenance.

    A weight keeps its name. One with other uses stays as it is, and the layer gets a copy under a derived name.
    """

    ctx: Context
    by: tuple[str, str]

    def scale_outputs(self, node: onnx_ir.Node, affine: Affine) -> None:
        """Conv, ConvTranspose, Gemm: the layer computes s·y + t."""
        beta = self._beta(node)
        bias = self._bias(node)
        if bias is not None or affine.shifts:
            old = np.float64(0) if bias is None else bias.astype(np.float64)
            self._write_bias(node, affine.s * old + affine.t / beta)
        w = self._data(value_at(node, 1))
        match node.op_type:
            case "Conv":
                self._write(node, 1, _affine.scale_axis(w, affine.s, 0))
            case "ConvTranspose":
                self._write(node, 1, _affine.scale_grouped(w, affine.s, int_attribute(node, "group", 1)))
            case _:
                self._write(node, 1, _affine.scale_axis(w, affine.s, 0 if int_attribute(node, "transB", 0) else 1))

    def scale_inputs(self, node: onnx_ir.Node, s: np.ndarray) -> None:
        """Conv, ConvTranspose: the layer takes x where it took s·x."""
        w = self._data(value_at(node, 1))
        if node.op_type == "ConvTranspose":
            self._write(node, 1, _affine.scale_axis(w, s, 0))
        else:
            self._write(node, 1, _affine.scale_grouped(w, s, int_attribute(node, "group", 1)))

    def scale(self, node: onnx_ir.Node, index: int, s: np.ndarray, axis: int) -> None:
        """The weight at an input of a MatMul or Gemm, times s along `axis`."""
        self._write(node, index, _affine.scale_axis(self._data(value_at(node, index)), s, axis))

    def shift_conv(self, node: onnx_ir.Node, t: np.ndarray) -> None:
        """Conv without padding: its bias takes what a shift t of its input adds."""
        taps = _affine.shift_of_taps(self._data(value_at(node, 1)), t, int_attribute(node, "group", 1))
        self._add_to_bias(node, taps.reshape(taps.shape[0], -1).sum(axis=1))

    def shift_border(
        self, node: onnx_ir.Node, t: np.ndarray, size: Sequence[int], pads: Sequence[tuple[int, int]]
    ) -> None:
        """Padded Conv: a constant map after it adds what a shift t inside the image adds."""
        w = self._data(value_at(node, 1))
        ones = [1] * (w.ndim - 2)
        shift = _affine.border_map(
            _affine.shift_of_taps(w, t, int_attribute(node, "group", 1)),
            size,
            pads=pads,
            strides=ints_attribute(node, "strides", ones),
            dilations=ints_attribute(node, "dilations", ones),
        )
        self.add_after(node, shift, keep_name=True)

    def shift_gemm(self, node: onnx_ir.Node, t: np.ndarray, axis: int) -> None:
        """Gemm: its bias takes what a shift t of its input adds; `axis` of the weight is summed over."""
        w = self._data(value_at(node, 1)).astype(np.float64)
        alpha = float_attribute(node, "alpha", 1.0)
        self._add_to_bias(node, alpha / self._beta(node) * np.tensordot(t, w, axes=(0, axis)))

    def shift_matmul(self, node: onnx_ir.Node, index: int, t: np.ndarray, axis: int) -> None:
        """MatMul with the weight at `index`: the constant that follows it, or a new one, takes the shift."""
        w = self._data(value_at(node, index)).astype(np.float64)
        total = np.tensordot(t, w, axes=(0, axis))  # the weight's other axes
        shift = total[:, None] if index == 0 else total[..., None, :] if w.ndim > 2 else total
        output = node.outputs[0]
        uses = tuple(output.uses())
        follower = uses[0].node if len(uses) == 1 and not output.is_graph_output() else None
        side = constant_side(follower) if follower is not None and follower.op_type == "Add" else None
        if follower is None or side is None:
            self.add_after(node, shift, keep_name=True)
            return
        constant = self._data(value_at(follower, side)).astype(np.float64)
        if np.broadcast_shapes(constant.shape, shift.shape) in (constant.shape, shift.shape):
            self._write(follower, side, constant + shift)
        else:
            self.add_after(node, shift, keep_name=True)

    def shift_constant(self, node: onnx_ir.Node, side: int, affine: Affine, rank: int, sign: float) -> None:
        """Add, Sub: the constant c, which counts as sign·c, becomes s·c + sign·t."""
        constant = self._data(value_at(node, side)).astype(np.float64)
        shape = [-1 if axis == affine.axis else 1 for axis in range(rank)][min(affine.axis, rank - constant.ndim) :]
        self._write(node, side, affine.s.reshape(shape) * constant + sign * affine.t.reshape(shape))

    def add_channels_after(self, node: onnx_ir.Node, affine: Affine, rank: int) -> None:
        """Add t along the channels after a node; the sum gets a name of its own."""
        shape = [-1, *(1,) * (rank - 1 - affine.axis)]
        self.add_after(node, affine.t.reshape(shape), keep_name=False)

    def add_after(self, node: onnx_ir.Node, shift: np.ndarray, *, keep_name: bool) -> None:
        """Put `Add(·, shift)` after a node; the sum, or else the node's own result, keeps the name."""
        output, graph = node.outputs[0], node.graph
        assert isinstance(graph, onnx_ir.Graph) and output.name is not None and output.dtype is not None
        constant = self._constant(graph, f"{output.name}.shift", shift.astype(output.dtype.numpy()))
        made = onnx_ir.Node("", "Add", [output, constant], num_outputs=1)
        total = made.outputs[0]
        total.type, total.shape = output.type, output.shape
        free = ir.free_name(graph, f"{output.name}.{'unshifted' if keep_name else 'shifted'}")
        onnx_ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
        made.replace_input_with(0, output)
        if keep_name:
            output.name, total.name = free, output.name
            total.metadata_props.update(output.metadata_props)
        else:
            total.name = free
        ir.provenance(made, self.by)
        graph.insert_after(node, made)

    # ---- weights

    def _data(self, value: onnx_ir.Value) -> np.ndarray:
        return constant_data(value, self.ctx)

    def _bias(self, node: onnx_ir.Node) -> np.ndarray | None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return None if bias is None else self._data(bias)

    def _beta(self, node: onnx_ir.Node) -> float:
        beta = float_attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
        if beta == 0:  # the bias does not count; drop it and its factor
            node.attributes.pop("beta")
            if len(node.inputs) > 2:
                node.replace_input_with(2, None)
            return 1.0
        return beta

    def _add_to_bias(self, node: onnx_ir.Node, shift: np.ndarray) -> None:
        bias = self._bias(node)
        self._write_bias(node, shift if bias is None else bias.astype(np.float64) + shift)

    def _write_bias(self, node: onnx_ir.Node, array: np.ndarray) -> None:
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._write(node, 2, array)
            return
        w = value_at(node, 1)
        assert w.name is not None and w.dtype is not None
        stem = w.name.removesuffix(".weight")
        graph = owner(w)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, self._constant(graph, f"{stem}.bias", array.astype(w.dtype.numpy())))

    def _write(self, node: onnx_ir.Node, index: int, array: np.ndarray) -> None:
        value = value_at(node, index)
        assert value.dtype is not None and value.name is not None
        # The node is not ours: it keeps its name, and says who gave it new numbers.
        node.metadata_props["mc_opt.pass"], node.metadata_props["mc_opt.rule"] = self.by
        array = array.astype(value.dtype.numpy(), copy=False)
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if alone and value.is_initializer():
            value.const_value = self.ctx.keep(array, value.name)
            value.shape = onnx_ir.Shape(array.shape)
            return
        graph, name = owner(value), value.name
        if alone:  # made by a Constant node: its name goes to the new weight
            node.replace_input_with(index, None)
            discard(value)
            value.name = None
        node.replace_input_with(index, self._constant(graph, name if alone else f"{name}.folded", array))

    def _constant(self, graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
        name = ir.free_name(graph, name)
        return ir.initializer(graph, name, self.ctx.keep(array, name))


def bypass(node: onnx_ir.Node, index: int) -> None:
    """Take out a node: who read its result reads what the node reads at `index` by now."""
    output, value, graph = node.outputs[0], value_at(node, index), node.graph
    assert graph is not None
    onnx_ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


# ---- questions about nodes


def value_at(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """An input that the op requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def is_constant(value: onnx_ir.Value | None) -> bool:
    """Whether a value is a weight that nobody can set from outside, or made by a Constant node."""
    if value is None:
        return False
    if value.producer() is not None:
        return _constant_node(value) is not None
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def constant_data(value: onnx_ir.Value, ctx: Context) -> np.ndarray:
    """The numbers of a value that is constant."""
    node = _constant_node(value)
    if node is None:
        return ctx.weight(value)
    array: np.ndarray = node.attributes["value"].as_tensor().numpy()
    return array


def discard(value: onnx_ir.Value) -> None:
    """Remove a constant that nothing uses any more."""
    if value.uses() or value.is_graph_output():
        return
    if (node := _constant_node(value)) is not None and node.graph is not None:
        node.graph.remove(node, safe=True)
    elif value.is_initializer() and value.graph is not None and value.name is not None:
        value.graph.initializers.pop(value.name)


def _constant_node(value: onnx_ir.Value) -> onnx_ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == "Constant" and "value" in node.attributes else None


def owner(value: onnx_ir.Value) -> onnx_ir.Graph:
    """The graph that a constant stands in."""
    node = value.producer()
    graph = value.graph if node is None else node.graph
    assert isinstance(graph, onnx_ir.Graph)
    return graph


def constant_side(node: onnx_ir.Node) -> int | None:
    """Which of the two inputs is constant; None if neither or both are."""
    if len(node.inputs) != 2:
        return None
    first, second = (is_constant(v) for v in node.inputs)
    return None if first == second else 0 if first else 1


def int_attribute(node: onnx_ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def float_attribute(node: onnx_ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def ints_attribute(node: onnx_ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def string_attribute(node: onnx_ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default
