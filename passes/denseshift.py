"""Store weights as signed powers of two without a zero.

    ŵ = s · (−1)^sign · 2^k,   k ∈ {0, …, 2^(bits−1) − 1}

A code is [sign | k]; spending no code on 0 leaves 2^bits levels. s is one scale a row or group. With
terms=2 a weight is the sum of two such numbers.

Without a 0 all weights far below s become ±s. Where a row has many of one sign, their errors add up for what the
inputs have in common. A layer passes that on; a cell also feeds it back and may amplify rounding by it. So LSTM, GRU
and RNN weights (terms=1, rounding=nearest) get codes and scales of low ‖w−ŵ‖² + λ·(Σ(w−ŵ))², Σ over a row or group.

Paper: Li et al., "DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization",
arXiv 2208.09708, ICCV 2023. The codebook is the paper's, which trains it; the scales, the search for them
from trained float weights, the second term, and the sums that recurrent weights keep are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _ends, _shift
from mc_opt.passes._base import Context, Pass

_BLOCK = 1 << 22  # weights read at a time
_RECURRENT = ("LSTM", "GRU", "RNN")
# λ: small, for the signs of weights near 0, which cost next to nothing, do most of it (benchmarks/rounding.py).
_BALANCE = 0.1


@dataclass(frozen=True)
class DenseShift(Pass):
    """Store weights as sign and exponent, w ≈ s·(±2^k), in 2 to 4 bits.

    bits: width of a code, 2 to 4. group_size: weights that share a scale; 0 makes it one a row. terms: 1, or
    2 for a sum of two codes. rounding: nearest value, or nearest exponent (log2). skip: layer globs; `first`
    and `last` stand for the first and last Conv, MatMul or Gemm with a constant weight.
    """

    family: ClassVar[str] = "quantise"

    bits: int = 4
    group_size: int = 0
    terms: int = 1
    rounding: Literal["nearest", "log2"] = "nearest"
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def __post_init__(self) -> None:
        for name, known in (("bits", (2, 3, 4)), ("terms", (1, 2))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: choose one of {', '.join(map(str, known))}")
        if self.group_size < 0:
            raise ValueError(f"group_size={self.group_size}: a group has 1 weight or more; 0 makes a row one group")

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that is taken by a Lookup, or by the sum of two."""
        sites = self._taken(model, ctx)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            chosen = self.at(site.layer)
            chosen._rewrite(site, _codebook(model, chosen.bits, site.tensor.dtype), ctx)
        if sites:
            ir.add_functions(model)
        return len(sites)

    def _taken(self, model: onnx_ir.Model, ctx: Context) -> list[ir.WeightSite]:
        ends = _ends.ends(model)
        taken: list[ir.WeightSite] = []
        for found in ir.weight_sites(model):
            layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
            reason = self._reason(layer, site, ends, ctx)
            if isinstance(reason, ir.Skip):
                ctx.skip(layer, reason)
            elif isinstance(site, ir.WeightSite):
                taken.append(site)
        books = {(site.tensor.dtype, self.at(site.layer).bits) for site in taken}
        book_bytes = sum(int(dtype.itemsize) << bits for dtype, bits in books)
        saved = sum(_bytes(site) - self.at(site.layer)._stored_bytes(site) for site in taken)
        if saved > book_bytes:
            return taken
        for site in taken:
            ctx.skip(site.layer, ir.Skip(f"the codes would save {saved} bytes, their codebook takes {book_bytes}"))
        return []

    def _reason(self, layer: str, site: ir.WeightSite | ir.Skip, ends: dict[str, str], ctx: Context) -> ir.Skip | None:
        if isinstance(declined := self.declines(layer), ir.Skip):
            return declined
        if (end := _ends.skipped_end(self.skip, layer, site, ends)) is not None:
            return end
        if isinstance(site, ir.Skip):
            return site
        chosen = self.at(layer)
        stored = chosen._stored_bytes(site)
        if stored >= _bytes(site):
            rows, cols = _matrix_shape(site)
            return ir.Skip(
                f"bits={chosen.bits}: {rows} x {cols} weights would take {stored} bytes with their scales, "
                f"they take {_bytes(site)}"
            )
        if not _is_finite(ir.canonical(ctx.weight(site.value), site.axes)):
            return ir.Skip("it holds NaN or infinite values; repair the weight")
        return None

    def _stored_bytes(self, site: ir.WeightSite) -> int:
        rows, cols = _matrix_shape(site)
        groups = -(-cols // self.group_size) if self.group_size else 1
        codes = -(-rows * cols // 8) * self.bits
        return self.terms * (codes + rows * groups * int(site.tensor.dtype.itemsize))

    def _rewrite(self, site: ir.WeightSite, book: onnx_ir.Value, ctx: Context) -> None:
        rows, cols = _matrix_shape(site)
        matrix = ir.canonical(ctx.weight(site.value), site.axes)
        packed: list[list[np.ndarray]] = [[] for _ in range(self.terms)]
        scales: list[list[np.ndarray]] = [[] for _ in range(self.terms)]
        error = power = 0.0
        balance = _BALANCE if site.kind in _RECURRENT and self.terms == 1 and self.rounding == "nearest" else 0.0
        for block in _blocks(rows, cols):
            w = np.ascontiguousarray(matrix[block])
            fitted = _shift.fit(
                w,
                self.bits,
                group_size=self.group_size,
                terms=self.terms,
                rounding=self.rounding,
                balance=balance,
            )
            for term, part in enumerate(fitted):
                packed[term].append(ir.pack_codes(part.codes, self.bits))
                scales[term].append(part.scales)
            w32 = w.astype(np.float32)
            rest = w32 - _shift.decode(fitted, self.bits, group_size=self.group_size)
            error += float(np.vdot(rest, rest))
            power += float(np.vdot(w32, w32))
        attributes = {"bits": self.bits, "shape": site.shape, "axes": site.axes, "group_size": self.group_size}
        nodes = []
        for codes, scale in zip(packed, scales, strict=True):
            inputs: list[onnx_ir.Value | onnx_ir.TensorProtocol] = [
                ctx.keep(np.concatenate(codes), f"{site.name}.codes"),
                book,
                ctx.keep(np.concatenate(scale), f"{site.name}.scale"),
            ]
            nodes.append(ir.node("Lookup", inputs, attributes))
        if self.terms == 2:
            nodes.append(_sum(nodes[0].outputs[0], nodes[1].outputs[0]))
        ir.replace_weight(site, nodes, by=(self.name, f"{self.bits}-bit shift"))
        if error > 0:
            ctx.note(site.layer, f"{self.bits} bits, weight SQNR {10 * math.log10(power / error):.1f} dB")


def _codebook(model: onnx_ir.Model, bits: int, dtype: onnx_ir.DataType) -> onnx_ir.Value:
    """The model's codebook of this width and type: one for all layers, found again by a later run."""
    name = f"denseshift.{bits}bit" + ("" if dtype == onnx_ir.DataType.FLOAT else f".{dtype.name.lower()}")
    levels = _shift.shift_codebook(bits).astype(dtype.numpy())
    known = model.graph.initializers.get(name)
    if known is not None and known.const_value is not None and np.array_equal(known.const_value.numpy(), levels):
        return known
    return ir.initializer(model.graph, name, levels)


def _sum(a: onnx_ir.Value, b: onnx_ir.Value) -> onnx_ir.Node:
    node = onnx_ir.Node("", "Add", [a, b], num_outputs=1)
    node.outputs[0].type, node.outputs[0].shape = a.type, a.shape
    return node


def _is_finite(matrix: np.ndarray) -> bool:
    return all(bool(np.isfinite(matrix[block]).all()) for block in _blocks(*matrix.shape))


def _blocks(rows: int, cols: int) -> Iterator[slice]:
    """Blocks of rows; each but the last holds whole units of 8 codes, so that packed blocks may be joined."""
    step = max(8, _BLOCK // max(cols, 1) // 8 * 8)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _matrix_shape(site: ir.WeightSite) -> tuple[int, int]:
    rows = math.prod(site.shape[a] for a in site.axes)
    return rows, math.prod(site.shape) // max(rows, 1)


def _bytes(site: ir.WeightSite) -> int:
    return site.tensor.nbytes
