"""FakeLookup in torch: forward by midpoints, backward by the formulas of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mc_opt.ir.ops._packing import Geometry


def fake_lookup(w: Tensor, codebook: Tensor, scale: Tensor | None, geometry: Geometry) -> Tensor:
    """w: `geometry.shape`, codebook: [n] or [R|1, G|1, n], scale: [R|1, G|1] -> w's shape."""
    cells = _to_cells(w, geometry)
    if scale is None:
        scale = torch.ones((1, 1), dtype=w.dtype, device=w.device)
    y: Tensor = _Nearest.apply(cells, codebook, scale)
    return _from_cells(y, geometry)


def _to_cells(w: Tensor, geometry: Geometry) -> Tensor:
    """Cut w into [R, G, g]; a short last group is filled with zeros, which get no gradient."""
    matrix = w.permute(geometry.perm).reshape(geometry.rows, geometry.columns)
    missing = geometry.groups * geometry.size - geometry.columns
    if missing:
        matrix = functional.pad(matrix, (0, missing))
    return matrix.reshape(geometry.rows, geometry.groups, geometry.size)


def _from_cells(cells: Tensor, geometry: Geometry) -> Tensor:
    matrix = cells.reshape(geometry.rows, -1)[:, : geometry.columns]
    return matrix.reshape([geometry.shape[a] for a in geometry.perm]).permute(geometry.inverse)


class _Nearest(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed, so its classes are Any
    """cells: [R, G, g], codebook: [n] or [R|1, G|1, n], scale: [R|1, G|1] -> codebook[k]·scale: [R, G, g]."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, codebook: Tensor, scale: Tensor) -> Tensor:
        ascending, order = codebook.detach().sort(dim=-1, stable=True)
        middle = (ascending[..., :-1] + ascending[..., 1:]) * 0.5
        x = (cells / scale[..., None]).contiguous()  # searchsorted copies, and warns, otherwise
        if codebook.ndim == 1:
            codes = order[torch.searchsorted(middle, x, out_int32=True)].to(torch.uint8)
        else:
            middle = middle.expand(*cells.shape[:2], -1).contiguous()
            place = torch.searchsorted(middle, x).clamp_(max=order.shape[-1] - 1)
            codes = order.expand(*cells.shape[:2], -1).gather(-1, place).to(torch.uint8)
        ctx.save_for_backward(codes, codebook, scale)
        return _entries(codebook, codes) * scale[..., None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        codes, codebook, scale = ctx.saved_tensors
        _, needs_codebook, needs_scale = ctx.needs_input_grad
        d_scale = d_codebook = None
        if needs_scale:
            d_scale = (g * _entries(codebook, codes)).sum(-1).sum_to_size(scale.shape)
        if needs_codebook:
            scaled, index = g * scale[..., None], codes.to(torch.int64)
            if codebook.ndim == 1:
                d_codebook = torch.zeros_like(codebook).index_add_(0, index.reshape(-1), scaled.reshape(-1))
            else:
                each = scaled.new_zeros((*codes.shape[:2], codebook.shape[-1])).scatter_add_(-1, index, scaled)
                d_codebook = each.sum_to_size(codebook.shape)
        return g, d_codebook, d_scale


def _entries(codebook: Tensor, codes: Tensor) -> Tensor:
    """codes: uint8 [R, G, g] -> the entries of their codebooks: [R, G, g]."""
    index = codes.to(torch.int32)
    if codebook.ndim == 1:
        return codebook.detach()[index]
    return codebook.detach().expand(*codes.shape[:2], -1).gather(-1, index.to(torch.int64))
