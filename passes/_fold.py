"""Constant folding: what follows from constants and static shapes becomes a constant, until nothing changes any more.

Our own and not onnxscript's, which takes dimensions of one symbolic name for equal (files call every unknown
one "?") and gives folded weights new names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import onnx_ir.passes.common

from mc_opt import ir
from mc_opt.passes import _branch
from mc_opt.passes._base import Context
from mc_opt.passes._region import Region, constant, inputs_read, regions, result_bytes


@dataclass
class Folding:
    """One folding of a model.

    Attributes:
        model: edited in place.
        ctx: of the pass.
        limit: bytes; a fold that reads and makes more is left alone, with the reason.
        declines: of the pass, by the name of the value.
        left: what the last sweep left alone, and why.
    """

    model: onnx_ir.Model
    ctx: Context
    limit: int
    declines: Callable[[str], ir.Skip | None]
    left: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Fold until nothing changes; the number of nodes, constants and functions that changed or went."""
        total = remove_unused(self.model, self.ctx)
        while changed := self._sweep(self.model.graph):
            total += changed + remove_unused(
                self.model, self.ctx
            )  # what is unused must not look as if it needed a weight
            ir.infer_shapes(self.model)
            self.left.clear()
        for name, reason in self.left.items():
            self.ctx.skip(name, ir.Skip(reason))
        return total

    def _sweep(self, graph: onnx_ir.Graph) -> int:
        changed = sum(self._simplify(node) for node in list(graph))  # a snapshot: rules edit the graph
        for region in list(regions(graph)):
            changed += self._fold(region)
        for node in list(graph):
            changed += sum(self._sweep(inner) for inner in _branch.bodies(node))
        return changed

    def _simplify(self, node: onnx_ir.Node) -> int:
        """What needs no constants: a known If, a node that changes nothing, a static shape."""
        if node.domain != "" or not node.outputs:
            return 0
        if node.op_type == "If":
            if done := _branch.inline(node, self.model, constant(node.inputs[0])):
                self.ctx.did("If of a known condition", node)
            return done
        same = _unchanged(node)
        if same is not None and _forward(node, same):
            self.ctx.did("hands on its input", node)
            return 1
        dims = _known_dims(node)
        if dims is None or self._is_declined(node):
            return 0
        return self._store(node, [dims], {}, rule="static shape")

    def _fold(self, region: Region) -> int:
        if region.reason is not None:
            return self._leave(region.nodes[-1], region.reason)
        folded = 0
        for node in region.nodes:
            if any(constant(v) is None for v in inputs_read(node)) or self._is_declined(node):
                continue  # what it reads was left alone
            read = sum(t.nbytes for v in inputs_read(node) if (t := constant(v)) is not None)
            made = result_bytes(node)
            if read + (made or 0) > (self.limit if made is not None else ir.GROWTH):
                size = "of unknown size" if made is None else f"of {(read + made) >> 20} MiB"
                self._leave(node, f"folding it takes memory {size}, the limit is {self.limit >> 20} MiB")
                continue
            results = _compute(node, self.model.opset_imports[""])
            if results is not None and _fits(node, results):
                folded += self._store(node, results, region.weights, rule="computed from constants")
        return folded

    def _is_declined(self, node: onnx_ir.Node) -> bool:
        return isinstance(self.declines(node.outputs[0].name or ""), ir.Skip)

    def _leave(self, node: onnx_ir.Node, reason: str) -> int:
        self.left[node.outputs[0].name or ""] = f"{node.op_type} of constants stays: {reason}"
        return 0

    def _store(
        self,
        node: onnx_ir.Node,
        results: Sequence[np.ndarray],
        weights: Mapping[onnx_ir.Value, onnx_ir.Value],
        *,
        rule: str,
    ) -> int:
        """Put constants in the place of a node; a result that is a known weight in another order keeps its name."""
        graph = node.graph
        assert isinstance(graph, onnx_ir.Graph)
        self.ctx.did(rule, node)
        made: dict[onnx_ir.Value, onnx_ir.Value] = {}
        for value, array in zip(node.outputs, results, strict=False):
            if value.is_graph_output():
                _branch.copy_to(
                    value, ir.initializer(graph, f"{value.name}.value", self.ctx.keep(array, str(value.name)))
                )
            elif value.name:
                name, value.name = value.name, None
                made[value] = ir.initializer(graph, name, self.ctx.keep(array, name))
                made[value].metadata_props.update(value.metadata_props)
                onnx_ir.convenience.replace_all_uses_with(value, made[value])
        graph.remove(node, safe=True)
        for value, new in made.items():
            old = weights.get(value)
            if old is not None and not old.uses():
                _take_over(old, new, graph)
            self.ctx.did(rule, new)
        return 1


def _take_over(old: onnx_ir.Value, new: onnx_ir.Value, graph: onnx_ir.Graph) -> None:
    """Give a new constant the name and the metadata of the weight that it replaces."""
    graph.initializers.pop(str(old.name))
    graph.initializers.pop(str(new.name))
    new.name, old.name = old.name, None
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    graph.register_initializer(new)


_UNUSED = "unused"


def remove_unused(model: onnx_ir.Model, ctx: Context) -> int:
    """Remove nodes, constants and functions that nothing uses; how many."""
    removed = _remove_unused_nodes(model.graph, ctx)
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                ctx.did(_UNUSED, value)
                graph.initializers.pop(value.name or "")
                removed += 1
    functions = len(model.functions)
    onnx_ir.passes.common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx_ir leaves it bare
    ir.add_functions(model)
    return removed + functions - len(model.functions)


def _remove_unused_nodes(graph: onnx_ir.Graph, ctx: Context) -> int:
    removed = 0
    for node in reversed(graph):
        if any(o.uses() or o.is_graph_output() for o in node.outputs):
            removed += sum(_remove_unused_nodes(inner, ctx) for inner in _branch.bodies(node))
            continue
        ctx.did(_UNUSED, node)
        _branch.remove(node)
        removed += 1
    return removed


# ---- nodes that change nothing


def _unchanged(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The input that the node hands on as it is."""
    value, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if value is None:
        return None
    match node.op_type:
        case "Identity":
            same = True
        case "Dropout":
            same = _is_off(node.inputs[2] if len(node.inputs) > 2 else None) and not any(
                o.uses() or o.is_graph_output() for o in node.outputs[1:]
            )
        case "Cast":
            same = value.dtype is not None and value.dtype == onnx_ir.DataType(node.attributes["to"].as_int())
        case "CastLike":
            like = node.inputs[1]
            same = like is not None and value.dtype is not None and value.dtype == like.dtype
        case "Reshape" | "Expand" | "Flatten":
            same = _static(value) is not None and _static(value) == _static(result)
        case "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            same = perm is not None and list(perm) == sorted(perm)
        case "Concat":
            same = len(node.inputs) == 1
        case _:
            same = False
    return value if same else None


def _is_off(training: onnx_ir.Value | None) -> bool:
    tensor = constant(training)
    return training is None or (tensor is not None and not tensor.numpy().any())


def _forward(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    """Let who reads the node's result read `value`; an output of a graph keeps its name. False if that cannot be."""
    result = node.outputs[0]
    if result.is_graph_output():
        producer = value.producer()
        if producer is None or producer.graph is not node.graph or value.is_graph_output():
            return False
        value.name, result.name = result.name, None
    if value.shape is None:
        value.shape = result.shape
    onnx_ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


# ---- shapes


def _known_dims(node: onnx_ir.Node) -> np.ndarray | None:
    """The result of a Shape, Size, or a Gather or Slice of a shape, when the dimensions that it takes are static."""
    if node.op_type in ("Shape", "Size"):
        dims = _dims_of(node)
        if dims is None or any(d is None for d in dims):
            return None
        known = [d for d in dims if d is not None]
        return np.array(math.prod(known) if node.op_type == "Size" else known, np.int64)
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node.op_type not in ("Gather", "Slice") or source is None or source.op_type != "Shape" or source.domain != "":
        return None
    dims, rest = _dims_of(source), [constant(v) for v in node.inputs[1:]]
    if dims is None or any(t is None for t in rest):
        return None
    numbers = [t.numpy() for t in rest if t is not None]
    if node.op_type == "Gather":
        taken = numbers[0].reshape(-1).tolist()
        shape = numbers[0].shape
    else:
        start, stop = int(numbers[0].item()), int(numbers[1].item())
        taken = list(range(len(dims)))[start : stop : int(numbers[3].item()) if len(numbers) > 3 else 1]
        shape = (len(taken),)
    picked = [dims[i] for i in taken]
    return None if any(d is None for d in picked) else np.array(picked, np.int64).reshape(shape)


def _dims_of(node: onnx_ir.Node) -> list[int | None] | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    dims = [d if isinstance(d, int) else None for d in value.shape]
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(dims)
    return dims[start:end]


def _static(value: onnx_ir.Value) -> tuple[int, ...] | None:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape if isinstance(d, int))


# ---- numbers


def _compute(node: onnx_ir.Node, opset: int) -> list[np.ndarray] | None:
    """The node's results by onnx's reference implementation; None if it has none or they are no arrays."""
    op_type, attributes = node.op_type, list(node.attributes.values())
    inputs = [v for v in node.inputs if v is not None]
    if op_type == "CastLike":
        like = node.inputs[1]
        if like is None or like.dtype is None:
            return None
        op_type, inputs = "Cast", inputs[:1]
        attributes = [onnx_ir.AttrInt64("to", int(like.dtype))]
    names = {id(v): f"i{index}" for index, v in enumerate(inputs)}
    proto = onnx.NodeProto(op_type=op_type, output=[f"o{index}" for index in range(len(node.outputs))])
    given = inputs if op_type != node.op_type else node.inputs
    proto.input.extend("" if v is None else names[id(v)] for v in given)
    proto.attribute.extend(onnx_ir.serde.serialize_attribute(a) for a in attributes)
    feeds = {names[id(v)]: _array(v) for v in inputs}
    try:
        with np.errstate(all="ignore"):
            results = onnx.reference.ReferenceEvaluator(proto, opsets={"": opset}).run(None, feeds)
    except Exception:  # an op without a reference implementation, or one that refuses these inputs: leave the node
        return None
    arrays = [np.asarray(r) for r in results]
    return None if any(a.dtype == object for a in arrays) else arrays


def _array(value: onnx_ir.Value) -> np.ndarray:
    tensor = constant(value)
    assert tensor is not None
    array: np.ndarray = tensor.numpy()
    return array


def _fits(node: onnx_ir.Node, results: Sequence[np.ndarray]) -> bool:
    """Whether the results have the types and shapes that the model states."""
    for value, array in zip(node.outputs, results, strict=False):
        if value.dtype is not None and onnx_ir.DataType.from_numpy(array.dtype) != value.dtype:
            return False
        if value.shape is None:
            continue
        if len(value.shape) != array.ndim:
            return False
        if any(isinstance(d, int) and d != n for d, n in zip(value.shape, array.shape, strict=True)):
            return False
    return True
