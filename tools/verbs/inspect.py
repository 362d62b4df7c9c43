"""`mc-opt inspect`: what a model is made of: inputs, outputs, ops, parameters, the largest layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_opt.tools import _console

if TYPE_CHECKING:
    import onnx_ir


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--layers", "count", type=click.IntRange(min=0), default=10, show_default=True, help="Largest layers to show."
)
@_console.common_options
def command(model: Path, count: int, as_json: bool) -> None:
    """Show what MODEL is made of: inputs, outputs, ops, parameters, largest layers."""
    from mc_opt import ir

    facts = describe(model, ir.load_model(model, check="structure"), count)
    if as_json:
        _console.print_json(facts)
    else:
        _print(facts)


def describe(path: Path, model: onnx_ir.Model, count: int) -> dict[str, Any]:
    """The facts of a loaded model; `count` of its largest layers."""
    source = model.meta["mc_opt.source"]
    nodes = [node for graph in model.graphs() for node in graph]
    layers = _layers(model)
    return {
        "file": str(path),
        "bytes": source.bytes + sum(size for _, size, _ in source.external),
        "sha256": source.sha256,
        "ir_version": source.ir_version,
        "opset": source.opset,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "inputs": [_value(v) for v in model.graph.inputs],
        "outputs": [_value(v) for v in model.graph.outputs],
        "nodes": len(nodes),
        "ops": dict(Counter(_op_name(node) for node in nodes).most_common()),
        "ours": dict(Counter(node.op_type for node in nodes if node.domain == "mc_opt").most_common()),
        "parameters": sum(row["elements"] for row in layers),
        "weight_bytes": sum(
            v.const_value.nbytes for g in model.graphs() for v in g.initializers.values() if v.const_value is not None
        ),
        "largest": sorted(layers, key=lambda row: -row["elements"])[:count],
    }


def _op_name(node: onnx_ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _value(value: onnx_ir.Value) -> dict[str, Any]:
    from mc_opt import ir

    shape = None if value.shape is None else [d if isinstance(d, int) else str(d.value or "?") for d in value.shape]
    return {
        "name": value.name,
        "type": str(value.dtype.name if value.dtype else "?"),
        "shape": shape,
        "text": ir.type_text(value),
    }


def _layers(model: onnx_ir.Model) -> list[dict[str, Any]]:
    """Every floating-point weight, stored as it is or decoded by one of our ops from smaller parts."""
    rows = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and not _is_part(value):
                rows.append(_row(value, "", int(tensor.size), int(tensor.nbytes)))
        for node in graph:
            if node.domain != "mc_opt":
                continue
            parts = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
            if any(v is not None and v.is_initializer() for v in node.inputs) and node.outputs[0].shape is not None:
                elements = 1
                for dim in node.outputs[0].shape:
                    elements *= int(dim) if isinstance(dim, int) else 0
                stored = sum(int(t.nbytes) for t in parts)
                rows.append(_row(node.outputs[0], node.op_type, elements, stored))
    return rows


def _is_part(value: onnx_ir.Value) -> bool:
    """Whether a constant is a part (codebook, scale) of a weight that one of our ops decodes."""
    return bool(value.uses()) and all(node.domain == "mc_opt" for node, _ in value.uses())


def _row(value: onnx_ir.Value, decoded_by: str, elements: int, stored: int) -> dict[str, Any]:
    from mc_opt import ir

    layer = value.metadata_props.get("mc_opt.layer", value.name)
    bits = round(8 * stored / elements, 2) if elements else None
    kind = ir.type_text(value)
    return {"layer": layer, "type": kind, "decoded_by": decoded_by, "elements": elements, "bytes": stored, "bits": bits}


def _print(facts: dict[str, Any]) -> None:
    click.echo(
        f"{facts['file']}: {_console.size_text(facts['bytes'])}, opset {facts['opset']}, IR {facts['ir_version']}"
    )
    if facts["producer"]:
        click.echo(f"made by {facts['producer']}")
    for kind in ("inputs", "outputs"):
        _console.print_table(
            (kind[:-1], "type"), [(v["name"], v["text"]) for v in facts[kind]], title=kind.capitalize()
        )
    _console.print_table(("op", "count"), facts["ops"].items(), title=f"{facts['nodes']} nodes")
    rows = [
        (r["layer"], r["type"], r["decoded_by"] or None, r["elements"], _console.size_text(r["bytes"]), r["bits"])
        for r in facts["largest"]
    ]
    title = f"{facts['parameters']} parameters in {_console.size_text(facts['weight_bytes'])} of constants; the largest"
    _console.print_table(("layer", "type", "decoded by", "elements", "stored", "bits each"), rows, title=title)
