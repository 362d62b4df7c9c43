"""A weight with zeros, stored in whichever form is smaller: as Sparse, a bitmap and the values, or as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context


def store_site(site: ir.WeightSite, w: np.ndarray, ctx: Context, *, by: str) -> None:
    """Put `w`, which has zeros, in the place of a weight."""
    parts = _parts(w, site.layer, ctx)
    if parts is None:
        ctx.did("single weights", site.value)
        site.value.const_value = ctx.keep(w, site.name)
        return
    bitmap, values = (ctx.keep(part, f"{site.name}.{what}") for part, what in zip(parts, _PARTS, strict=True))
    ir.replace_weight(site, ir.node("Sparse", [bitmap, values], {"shape": site.shape}), by=(by, "single weights"))


_PARTS = ("bitmap", "values")


def store_form(model: onnx_ir.Model, form: onnx_ir.Node, kept: np.ndarray, ctx: Context, *, by: str) -> None:
    """Put the stored form of a masked weight in the place of its FakeMask.

    Args:
        model: the model.
        form: the FakeMask of a weight.
        kept: bool, by element in C order.
        ctx: reads and keeps the constants.
        by: the pass.
    """
    latent, theta, result = form.inputs[0], form.inputs[1], form.outputs[0]
    assert latent is not None and theta is not None
    w = ctx.weight(latent)
    w = np.where(kept.reshape(w.shape), w, w.dtype.type(0))
    name, layer = str(result.name), ir.layer_of(result)
    parts = _parts(w, layer, ctx)
    if parts is not None:
        held = [
            ir.initializer(model.graph, f"{name}.{what}", ctx.keep(part, name))
            for part, what in zip(parts, _PARTS, strict=True)
        ]
        node = ir.node("Sparse", held, {"shape": w.shape})
        ir.replace_node(form, [node], by=(by, "single weights"), names=ir.names_of(model.graph))
    else:
        _put_back(model, form, ctx.keep(w, name), name)
    for value in (latent, theta):
        if not value.uses():
            model.graph.initializers.pop(str(value.name), None)


def _put_back(model: onnx_ir.Model, form: onnx_ir.Node, w: onnx_ir.TensorProtocol, name: str) -> None:
    result = form.outputs[0]
    result.name = None
    value = ir.initializer(model.graph, name, w)
    value.metadata_props.update(result.metadata_props)
    result.replace_all_uses_with(value)
    model.graph.remove(form, safe=True)


def _parts(w: np.ndarray, layer: str, ctx: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """The bitmap and the values; None where the weight is as small as it is."""
    bitmap, values = ir.pack_sparse(w)
    stored = bitmap.nbytes + values.nbytes
    zeros = 1 - np.count_nonzero(w) / max(w.size, 1)
    chosen = "kept as they are" if stored >= w.nbytes else "stored so"
    ctx.note(layer, f"{zeros:.1%} zeros: {w.nbytes} bytes, {stored} as bitmap and values, {chosen}")
    return None if stored >= w.nbytes else (bitmap, values)
