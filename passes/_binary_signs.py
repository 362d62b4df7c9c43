"""Where activations are binarised: before the rectifier, or else every sign would be +1.

XNOR-Net's order (Rastegari et al., ECCV 2016) is BatchNormalization -> sign -> Conv. Models come as BatchNormalization
-> Relu -> Conv, so a layer that is binarised sees the value before the Relu, and pooling and reshaping on the way are
done to that value. Whatever else uses the rectified value keeps it. That a rectifier is passed by is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _binary_forms
from mc_opt.passes._base import Context

_LAYERS = ("Conv", "MatMul", "Gemm")
_RECTIFIERS = ("Relu", "HardSwish", "HardSigmoid", "Sigmoid", "Softplus")
# Done to the value before a rectifier instead; a largest value is rectified as well before it is found as after.
_CARRIED = (
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Identity", "Dropout"),
)
_LINEAR = ("Add", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def binarise(
    model: onnx_ir.Model, layers: Sequence[tuple[ir.WeightSite, str]], ctx: Context, *, pass_name: str, levels: int
) -> None:
    """Put training forms before the layers of weights, each with its method."""

    def form(x: onnx_ir.Value, name: str, method: str) -> onnx_ir.Node:
        by = (pass_name, f"{levels} levels of activations, {method}")
        return _binary_forms.activation_form(model, x, name, method=method, levels=levels, by=by)

    signs = _Signs(model, form)
    taken = {node for node, index, method in _in_graph_order(model, layers) if signs.put(node, index, method)}
    for site, _ in layers:
        done = any(node in taken for node, _ in site.consumers)
        ctx.note(site.layer, "weights and inputs" if done else "weights only: nothing that it multiplies is computed")


def warn_without_batch_norm(sites: Sequence[ir.WeightSite], ctx: Context) -> None:
    """Say which layers are trained without what makes up for the size of their sums.

    A sum of K signs has the variance K: without BatchNormalization its gradients grow by √K a layer (Sari et al., "How
    Does Batch Normalization Help Binary Training?", 2019).
    """
    bare = _without_batch_norm(sites)
    if bare:
        some = ", ".join(bare[:3]) + (", .." if len(bare) > 3 else "")
        ctx.warn(
            f"no BatchNormalization follows {len(bare)} of {len(sites)} layers ({some}): their training may not "
            "settle; run fold-batch-norm after this pass, not before, or leave them out with skip="
        )


class _Signs:
    """Binarised inputs of layers, one form for each value that several of them share."""

    def __init__(self, model: onnx_ir.Model, form: Callable[[onnx_ir.Value, str, str], onnx_ir.Node]) -> None:
        """Form: what makes the training form of a value, given its name and the method."""
        self._form = form
        self._names = {str(value.name) for graph in model.graphs() for value in _values(graph)}
        self._made: dict[tuple[onnx_ir.Value, onnx_ir.Graph, str], onnx_ir.Value] = {}
        self._raw: dict[tuple[onnx_ir.Value, onnx_ir.Graph], onnx_ir.Value] = {}

    def put(self, node: onnx_ir.Node, weight: int, method: str) -> bool:
        """Binarise what a layer multiplies with the weight at input `weight`; whether there is such a thing."""
        if node.op_type not in _LAYERS or node.domain != "" or not isinstance(node.graph, onnx_ir.Graph):
            return False
        index = 1 - weight
        x = node.inputs[index]
        if x is None or x.is_initializer() or x.shape is None:
            return False
        raw = self._unrectified(x, node, node.graph)
        key = (raw, node.graph, method)
        if key not in self._made:
            made = self._form(raw, self._free(f"{raw.name}.signs"), method)
            node.graph.insert_before(node, made)
            self._made[key] = made.outputs[0]
        node.replace_input_with(index, self._made[key])
        _remove_unused(x)
        return True

    def _unrectified(self, value: onnx_ir.Value, before: onnx_ir.Node, graph: onnx_ir.Graph) -> onnx_ir.Value:
        """The value without the rectifiers on its way; what they were followed by stands before `before`, again."""
        made = value.producer()
        if made is None or made.domain != "":
            return value
        if (value, graph) in self._raw:
            return self._raw[value, graph]
        found = value
        if _is_rectifier(made):
            assert made.inputs[0] is not None
            found = self._unrectified(made.inputs[0], before, graph)
        elif made.op_type in _CARRIED and made.inputs[0] is not None and value is made.outputs[0]:
            source = self._unrectified(made.inputs[0], before, graph)
            if source is not made.inputs[0]:
                found = self._again(made, source, before)
        self._raw[value, graph] = found
        return found

    def _again(self, node: onnx_ir.Node, source: onnx_ir.Value, before: onnx_ir.Node) -> onnx_ir.Value:
        old = node.outputs[0]
        clone = onnx_ir.Node("", node.op_type, [source, *node.inputs[1:]], node.attributes.values(), num_outputs=1)
        output = clone.outputs[0]
        output.name, output.type, output.shape = self._free(f"{old.name}.unrectified"), old.type, old.shape
        clone.name = output.name
        assert before.graph is not None
        before.graph.insert_before(before, clone)
        return output

    def _free(self, base: str) -> str:
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}.{number}"
        self._names.add(name)
        return name


def _in_graph_order(
    model: onnx_ir.Model, layers: Sequence[tuple[ir.WeightSite, str]]
) -> list[tuple[onnx_ir.Node, int, str]]:
    """Every use of the weights: the node, the input where the weight stands, and the method."""
    place = {node: k for k, node in enumerate(model.graph.all_nodes())}
    uses = [(node, index, method) for site, method in layers for node, index in site.consumers]
    return sorted(uses, key=lambda use: place[use[0]])


def _is_rectifier(node: onnx_ir.Node) -> bool:
    """Whether nothing that a node gives is below 0, or (HardSwish) much below."""
    if node.op_type != "Clip":
        return node.op_type in _RECTIFIERS
    bound = node.inputs[1] if len(node.inputs) > 1 else None
    lowest = onnx_ir.convenience.get_const_tensor(bound) if bound is not None else None
    return lowest is not None and bool(np.all(lowest.numpy() >= 0))


def _without_batch_norm(sites: Sequence[ir.WeightSite]) -> list[str]:
    """The layers among Conv, MatMul and Gemm that are not followed, but for a bias, by a BatchNormalization."""
    return [
        site.layer
        for site in sites
        if any(node.op_type in _LAYERS and not _is_normalised(node.outputs[0]) for node, _ in site.consumers)
    ]


def _is_normalised(value: onnx_ir.Value) -> bool:
    users = list(value.consumers())
    if value.is_graph_output() or not users:
        return False
    return all(
        user.op_type == "BatchNormalization"
        or (user.op_type in _LINEAR and _adds_constants(user, value) and _is_normalised(user.outputs[0]))
        for user in users
    )


def _adds_constants(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    others = [other for other in node.inputs if other is not None and other is not value]
    return node.op_type != "Add" or all(onnx_ir.convenience.get_const_tensor(other) is not None for other in others)


def _remove_unused(value: onnx_ir.Value) -> None:
    """Remove the nodes that nothing uses any more, from the one that makes `value` upwards."""
    open_values = [value]
    while open_values:
        node = open_values.pop().producer()
        if node is None or node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        open_values += [item for item in node.inputs if item is not None]
        node.graph.remove(node, safe=True)


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    made = [output for node in graph for output in node.outputs if output.name]
    return [*graph.inputs, *graph.initializers.values(), *made]
