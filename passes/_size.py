"""What models and layers store, counted honestly: every byte that is needed to compute a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir

from mc_opt import ir
from mc_opt.passes._factored import factored_layer, is_chain
from mc_opt.passes._report import LayerReport, Size


def size_of(model: onnx_ir.Model) -> Size:
    """Parameters, bytes of all stored constants, and nodes of a model."""
    total = ir.storage_of(model).total
    return Size(total.parameters, total.bytes, sum(1 for graph in model.graphs() for _ in graph))


def run_bytes(model: onnx_ir.Model) -> int:
    """Bytes of the values of one run: the inputs and outputs, and the largest value between them; open axes count 1."""
    ends = (*model.graph.inputs, *model.graph.outputs)
    between = max((_value_bytes(value) for node in model.graph for value in node.outputs), default=0)
    return sum(_value_bytes(value) for value in ends) + between


def _value_bytes(value: onnx_ir.Value) -> int:
    if value.shape is None or value.dtype is None:
        return 0
    return math.prod(d if isinstance(d, int) else 1 for d in value.shape) * value.dtype.bitwidth // 8


def weights(model: onnx_ir.Model) -> Iterator[tuple[onnx_ir.Value, list[onnx_ir.Value]]]:
    """Every floating-point weight, with the constants that hold it: itself, or the parts that our ops decode."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and not _is_part(value):
                yield value, [value]
        for node in graph:
            if _decodes(node) and not _is_part(node.outputs[0]) and (parts := stored(node.outputs[0])):
                yield node.outputs[0], parts


def _is_part(value: onnx_ir.Value) -> bool:
    """Whether nothing but the decoding of a weight uses the value: a codebook, a scale, a term of a sum."""
    return bool(value.uses()) and all(_decodes(node) for node in value.consumers())


def _decodes(node: onnx_ir.Node) -> bool:
    """Whether a node makes a weight of its parts: an op of ours, or the sum of what such ops make."""
    if node.op_type != "Add" or node.domain != "":
        return node.domain == "mc_opt" and not is_chain(node)
    makers = [value.producer() for value in node.inputs if value is not None]
    return all(maker is not None and maker.domain == "mc_opt" and not is_chain(maker) for maker in makers)


def elements_of(value: onnx_ir.Value) -> int:
    """Elements of a value of static shape, as every weight has one."""
    assert value.shape is not None
    count = 1
    for dim in value.shape:
        count *= int(dim) if isinstance(dim, int) else 0
    return count


def values_by_name(model: onnx_ir.Model) -> dict[str, onnx_ir.Value]:
    """Every value of all graphs of a model; names are unique throughout a verified model."""
    found: dict[str, onnx_ir.Value] = {}
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            found[str(value.name)] = value
        for node in graph:
            found.update((str(value.name), value) for value in node.outputs if value.name)
    return found


def sites(model: onnx_ir.Model) -> Iterator[ir.WeightSite]:
    """The weights of a model that are stored as they are, without the places that are declined."""
    for site in ir.weight_sites(model):
        if isinstance(site, ir.WeightSite):
            yield site


def stored(value: onnx_ir.Value) -> list[onnx_ir.Value] | None:
    """The constants that a value is computed from, each once; None if it depends on an input of the model."""
    found: dict[onnx_ir.Value, None] = {}
    seen: set[onnx_ir.Value] = set()
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is not None:
            open_values += [v for v in reversed(node.inputs) if v is not None]
        elif current.const_value is not None:
            found[current] = None
        else:
            return None
    return list(found)


def changed_layers(
    names: dict[str, str], old: onnx_ir.Model, new: onnx_ir.Model, *, rewritten_by: str, position: int
) -> tuple[LayerReport, ...]:
    """The rows of the layer table that a pass adds: one for each layer whose stored weight it changed.

    Args:
        names: layer to the name of its weight; a rewritten weight keeps its name.
        old: the model before the pass.
        new: the model after it.
        rewritten_by: the pass.
        position: its place in the pipeline.
    """
    before, after = values_by_name(old), values_by_name(new)
    factors: dict[str, list[onnx_ir.Value]] = {}
    for value in after.values():
        if (layer := factored_layer(value)) is not None:
            factors.setdefault(layer, []).append(value)
    counted: set[onnx_ir.Value] = set()
    rows = []
    for layer, name in names.items():
        held = [after[name]] if name in after else factors.get(layer, [])
        if name not in before or not held:
            continue
        was, now = stored(before[name]), _stored_by(held)
        if was is None or now is None or [id(v.const_value) for v in was] == [id(v.const_value) for v in now]:
            continue
        own = [v for v in now if v not in counted]
        counted.update(own)
        elements = elements_of(before[name])
        bytes_after = _nbytes(own)
        rows.append(
            LayerReport(
                layer=layer,
                rewritten_by=rewritten_by,
                rule=_rule(held[0]),
                elements=elements,
                bytes_before=_nbytes(was),
                bytes_after=bytes_after,
                bits=8 * bytes_after / elements if elements else 0.0,
                position=position,
            )
        )
    return tuple(rows)


def _stored_by(values: list[onnx_ir.Value]) -> list[onnx_ir.Value] | None:
    """The constants that values are computed from; None if one depends on an input of the model."""
    parts = [stored(value) for value in values]
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else list(dict.fromkeys(v for part in known for v in part))


def _nbytes(values: list[onnx_ir.Value]) -> int:
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _rule(value: onnx_ir.Value) -> str:
    """The rule that made the value, or that made its consumer when the value is stored as it is."""
    producer = value.producer()
    nodes = [producer] if producer is not None else list(value.consumers())
    return next((n.metadata_props["mc_opt.rule"] for n in nodes if n and "mc_opt.rule" in n.metadata_props), "")
