"""Why a layer was left alone: what each pass says about it, and where it stands in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir

from mc_opt import ir, passes
from mc_opt.passes import Context, Pipeline, Report


@dataclass(frozen=True)
class Finding:
    """What one pass did with a layer: `rewritten`, `declined`, `no site` or `not run`; and why."""

    rewritten_by: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A layer and what the passes say about it.

    Attributes:
        layer: the layer's name.
        weight: the type of its weight, as `f32[64, 3, 7, 7]`.
        consumers: the nodes that use the weight: `op type node name`.
        feeds: nodes right before these.
        fed: nodes right after these.
        findings: one a pass.
    """

    layer: str
    weight: str
    consumers: tuple[str, ...]
    feeds: tuple[str, ...]
    fed: tuple[str, ...]
    findings: tuple[Finding, ...]


def explain(
    model: onnx_ir.Model,
    layer: str,
    *,
    pipeline: Pipeline | None = None,
    report: Report | None = None,
    ctx: Context | None = None,
) -> Explanation:
    """Why each pass took a layer or left it alone.

    Args:
        model: the model before the passes.
        layer: the name of a layer, of a weight, or of a node that uses one.
        pipeline: the passes, run one after the other; every pass on its own, with its defaults, if None.
        report: of a run of the pipeline; it is made by a dry run if None.
        ctx: for the dry run.

    Raises:
        OptionError: when the model has no such layer.
    """
    found = _layers(model)
    name = _resolve(model, layer, found)
    ctx = ctx or Context()
    if report is not None:
        findings = tuple(_finding(report, i, name) for i in range(len(report.passes)))
    elif pipeline is not None:
        made = passes.dry_run(model, pipeline, ctx)
        findings = tuple(_finding(made, i, name) for i in range(len(made.passes)))
    else:
        findings = tuple(_alone(model, p, name, ctx) for p in passes.pass_names())
    return _explanation(model, name, found[name], findings)


def _layers(model: onnx_ir.Model) -> dict[str, onnx_ir.Value]:
    """Layer to weight: the weights that can be rewritten, and those declined as such, by their own name."""
    initializers = {str(v.name): v for graph in model.graphs() for v in graph.initializers.values()}
    layers: dict[str, onnx_ir.Value] = {}
    for found in ir.weight_sites(model):
        if isinstance(found, ir.WeightSite):
            layers[found.layer] = found.value
        elif found[0] in initializers:
            layers[found[0]] = initializers[found[0]]
    for graph in model.graphs():
        for node in graph:
            if node.domain == "mc_opt":
                layers.update((str(v.name), v) for v in node.outputs)
    return layers


def _resolve(model: onnx_ir.Model, name: str, layers: Mapping[str, onnx_ir.Value]) -> str:
    if name in layers:
        return name
    for layer, value in layers.items():
        if value.name == name or any(node.name == name for node in value.consumers()):
            return layer
    raise ir.OptionError(ir.unknown("layer", name, layers))


def _alone(model: onnx_ir.Model, name: str, layer: str, ctx: Context) -> Finding:
    try:
        made = passes.dry_run(model, Pipeline.parse(name), ctx)
    except ir.OptionError as error:  # a pass that cannot run without options, as surgeon
        return Finding(name, "not run", str(error))
    except passes.PassError as error:
        return Finding(name, "not run", error.problem)
    return _finding(made, 0, layer)


def _finding(whole: Report, position: int, layer: str) -> Finding:
    report = whole.passes[position]
    for row in whole.layers:
        if row.layer == layer and row.position == position:
            size = f"{row.bytes_before} -> {row.bytes_after} bytes, {row.bits:.3g} bits a weight"
            return Finding(report.name, "rewritten", f"{row.rule or report.name}: {size}")
    if layer in report.skips:
        return Finding(report.name, "declined", report.skips[layer])
    notes = [text for about, text in report.notes if about == layer]
    return Finding(report.name, "no site", "; ".join(notes) or "the pass found nothing of its kind at this layer")


def _explanation(model: onnx_ir.Model, layer: str, value: onnx_ir.Value, findings: tuple[Finding, ...]) -> Explanation:
    nodes = list(dict.fromkeys(value.consumers()))
    before = [v.producer() for node in nodes for v in node.inputs if v is not None and v is not value]
    after = [n for node in nodes for v in node.outputs for n in v.consumers()]
    return Explanation(
        layer=layer,
        weight=ir.type_text(value),
        consumers=_titles(nodes),
        feeds=_titles([n for n in before if n is not None]),
        fed=_titles(after),
        findings=findings,
    )


def _titles(nodes: list[onnx_ir.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{node.op_type} {node.name}" for node in nodes))


def to_json(explanation: Explanation) -> dict[str, object]:
    """An explanation as plain data."""
    return dataclasses.asdict(explanation)
