"""Which weights passes that store shift codes take, in what blocks of rows, and what they then cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _ends
from mc_opt.passes._base import Context, Pass

_BLOCK = 1 << 22  # weights read at a time


@dataclass(frozen=True)
class Cost:
    """What a weight would be stored in.

    Attributes:
        bits: of a code.
        weight: bytes of its codes and scales.
        codebook: bytes of the codebook, which all weights of this type and width share.
    """

    bits: int
    weight: int
    codebook: int


def cost(site: ir.WeightSite, bits: int, *, entries: int, group_size: int, terms: int = 1) -> Cost:
    """What `terms` Lookups of this width, with a codebook of so many entries, store."""
    rows, cols = matrix_shape(site)
    groups = -(-cols // group_size) if group_size else 1
    codes = -(-rows * cols // 8) * bits
    itemsize = int(site.tensor.dtype.itemsize)
    return Cost(bits, terms * (codes + rows * groups * itemsize), entries * itemsize)


def taken(
    step: Pass, model: onnx_ir.Model, ctx: Context, cost_of: Callable[[ir.WeightSite], Cost]
) -> list[ir.WeightSite]:
    """The weights that get smaller; the context is told why each other one is left alone."""
    ends = _ends.ends(model)
    sites: list[ir.WeightSite] = []
    for found in ir.weight_sites(model):
        layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
        reason = _reason(step, layer, site, ends, ctx, cost_of)
        if isinstance(reason, ir.Skip):
            ctx.skip(layer, reason)
        elif isinstance(site, ir.WeightSite):
            sites.append(site)
    costs = {site: cost_of(site) for site in sites}
    book_bytes = sum({(site.tensor.dtype, c.bits): c.codebook for site, c in costs.items()}.values())
    saved = sum(site.tensor.nbytes - c.weight for site, c in costs.items())
    if saved > book_bytes:
        return sites
    for site in sites:
        ctx.skip(site.layer, ir.Skip(f"the codes would save {saved} bytes, their codebook takes {book_bytes}"))
    return []


def _reason(
    step: Pass,
    layer: str,
    site: ir.WeightSite | ir.Skip,
    ends: Mapping[str, str],
    ctx: Context,
    cost_of: Callable[[ir.WeightSite], Cost],
) -> ir.Skip | None:
    if isinstance(declined := step.declines(layer), ir.Skip):
        return declined
    if (end := _ends.skipped_end(step.skip, layer, site, ends)) is not None:
        return end
    if isinstance(site, ir.Skip):
        return site
    cost = cost_of(site)
    if cost.weight >= site.tensor.nbytes:
        rows, cols = matrix_shape(site)
        return ir.Skip(
            f"bits={cost.bits}: {rows} x {cols} weights would take {cost.weight} bytes with their scales, "
            f"they take {site.tensor.nbytes}"
        )
    if not _is_finite(ir.canonical(ctx.weight(site.value), site.axes)):
        return ir.Skip("it holds NaN or infinite values; repair the weight")
    return None


def codebook(model: onnx_ir.Model, name: str, levels: np.ndarray) -> onnx_ir.Value:
    """The model's codebook of these levels: one for all layers of a type and width, found again by a later run."""
    dtype = onnx_ir.DataType.from_numpy(levels.dtype)
    name += "" if dtype == onnx_ir.DataType.FLOAT else f".{dtype.name.lower()}"
    known = model.graph.initializers.get(name)
    if known is not None and known.const_value is not None and np.array_equal(known.const_value.numpy(), levels):
        return known
    return ir.initializer(model.graph, name, levels)


def blocks(rows: int, cols: int) -> Iterator[slice]:
    """Blocks of rows; each but the last holds whole units of 8 codes, so that packed blocks may be joined."""
    step = max(8, _BLOCK // max(cols, 1) // 8 * 8)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def matrix_shape(site: ir.WeightSite) -> tuple[int, int]:
    """Rows and columns of a weight."""
    rows = math.prod(site.shape[a] for a in site.axes)
    return rows, math.prod(site.shape) // max(rows, 1)


def _is_finite(matrix: np.ndarray) -> bool:
    return all(bool(np.isfinite(matrix[block]).all()) for block in blocks(*matrix.shape))
