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
        weight: the type of its weight, as `f32[64,3,7,7]`.
        consumers: the nodes that use the weight: `op type node name`.
        feeds: nodes right before these.
        fed: nodes right after these.
        upstream: how many nodes these depend on.
        downstream: how many nodes depend on these.
        findings: one a pass.
    """

    layer: str
    weight: str
    consumers: tuple[str, ...]
    feeds: tuple[str, ...]
    fed: tuple[str, ...]
    upstream: int
    downstream: int
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
    name, value = _resolve(model, layer, _layers(model))
    ctx = ctx or Context()
    if report is not None:
        findings = tuple(_finding(report, i, name) for i in range(len(report.passes)))
    elif pipeline is not None:
        made = passes.dry_run(model, pipeline, ctx)
        findings = tuple(_finding(made, i, name) for i in range(len(made.passes)))
    else:
        findings = tuple(_alone(model, p, name, ctx) for p in passes.pass_names())
    return _explanation(model, name, value, findings)


def _layers(model: onnx_ir.Model) -> dict[str, onnx_ir.Value]:
    """Layer to weight: those that can be rewritten first, then every constant by its own name, BatchNorm's too."""
    layers = {found.layer: found.value for found in ir.weight_sites(model) if isinstance(found, ir.WeightSite)}
    layers |= {ir.layer_of(value): value for value, _ in passes.weights(model) if ir.layer_of(value) not in layers}
    for graph in model.graphs():
        for value in graph.initializers.values():
            layers.setdefault(ir.layer_of(value), value)
    return layers


def _resolve(model: onnx_ir.Model, name: str, layers: Mapping[str, onnx_ir.Value]) -> tuple[str, onnx_ir.Value]:
    """The layer of a name: of a layer, a weight, a node that uses one, or any other value a pass may speak of."""
    if name in layers:
        return name, layers[name]
    names = {str(value.name): layer for layer, value in layers.items()}
    if name in names:
        return names[name], layers[names[name]]
    for node in model.graph.all_nodes():
        if node.name == name:
            layer = next((names[v.name] for v in node.inputs if v is not None and v.name in names), None)
            if layer is not None:
                return layer, layers[layer]
            return str(node.outputs[0].name), node.outputs[0]
        if (value := next((v for v in node.outputs if v.name and v.name == name), None)) is not None:
            return name, value
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
    if notes:
        return Finding(report.name, "rewritten", "; ".join(notes))
    return Finding(report.name, "no site", "the pass found nothing of its kind at this layer")


def _explanation(model: onnx_ir.Model, layer: str, value: onnx_ir.Value, findings: tuple[Finding, ...]) -> Explanation:
    view = ir.graph_of(model)
    nodes = ir.users(view).get(str(value.name), ())
    own = frozenset(nodes)
    return Explanation(
        layer=layer,
        weight=ir.type_text(value),
        consumers=tuple(ir.label(view, name) for name in nodes),
        feeds=tuple(ir.label(view, name) for name in ir.before(view, nodes)),
        fed=tuple(ir.label(view, name) for name in ir.after(view, nodes)),
        upstream=len(own.union(*(ir.upstream(view, name) for name in nodes)) - own),
        downstream=len(own.union(*(ir.downstream(view, name) for name in nodes)) - own),
        findings=findings,
    )


def to_json(explanation: Explanation) -> dict[str, object]:
    """An explanation as plain data."""
    return dataclasses.asdict(explanation)
