"""Which weights binary and ternary passes take, and for all others: why not."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _ends
from mc_opt.passes._base import Context, Pass


def taken(step: Pass, model: onnx_ir.Model, ctx: Context, *, bits: int) -> list[ir.WeightSite]:
    """The weights that codes of `bits` and a scale a row make smaller, in graph order; the others get their reason."""
    ends = _ends.ends(model)
    found: list[ir.WeightSite] = []
    for item in ir.weight_sites(model):
        layer, site = (item.layer, item) if isinstance(item, ir.WeightSite) else item
        reason = step.declines(layer) or _ends.skipped_end(step.skip, layer, site, ends)
        if reason is None:
            reason = site if isinstance(site, ir.Skip) else _unfit(site, bits, ctx)
        if reason is not None:
            ctx.skip(layer, reason)
        elif isinstance(site, ir.WeightSite):
            found.append(site)
    books = sum(int(dtype.itemsize) << bits for dtype in {site.tensor.dtype for site in found})
    saved = sum(site.tensor.nbytes - _stored_bytes(site, bits) for site in found)
    if saved > books:
        return found
    for site in found:
        ctx.skip(site.layer, ir.Skip(f"the codes would save {saved} bytes, their codebook takes {books}"))
    return []


def _unfit(site: ir.WeightSite, bits: int, ctx: Context) -> ir.Skip | None:
    stored = _stored_bytes(site, bits)
    if stored >= site.tensor.nbytes:
        rows = math.prod(site.shape[a] for a in site.axes)
        return ir.Skip(
            f"{rows} x {math.prod(site.shape) // max(rows, 1)} weights would take {stored} bytes with their scales, "
            f"they take {site.tensor.nbytes}"
        )
    if not np.isfinite(ctx.weight(site.value)).all():
        return ir.Skip("it holds NaN or infinite values; repair the weight")
    return None


def _stored_bytes(site: ir.WeightSite, bits: int) -> int:
    rows = math.prod(site.shape[a] for a in site.axes)
    return -(-math.prod(site.shape) // 8) * bits + rows * int(site.tensor.dtype.itemsize)
