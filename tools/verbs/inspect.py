"""`mc-opt inspect`: what a model is made of: inputs, outputs, ops, parameters, the largest layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_opt.tools import _command, _console

if TYPE_CHECKING:
    import onnx_ir


@click.command(cls=_command.Command)
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
    from mc_opt import passes

    source = model.meta["mc_opt.source"]
    size = passes.size_of(model)
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
        "parameters": size.parameters,
        "weight_bytes": size.weight_bytes,
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
    """Every floating-point weight, stored as it is or decoded by our ops from smaller parts."""
    from mc_opt import ir, passes

    rows = []
    for value, parts in passes.weights(model):
        elements, maker = passes.elements_of(value), value.producer()
        stored = sum(int(part.const_value.nbytes) for part in parts if part.const_value is not None)
        rows.append(
            {
                "layer": ir.layer_of(value),
                "type": ir.type_text(value),
                "decoded_by": maker.op_type if maker is not None else "",
                "elements": elements,
                "bytes": stored,
                "bits": round(8 * stored / elements, 2) if elements else None,
            }
        )
    return rows


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
