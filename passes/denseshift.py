"""Store weights as signed powers of two without a zero, trained or found at once.

    ŵ = s · (−1)^sign · 2^k,   k ∈ {0, …, 2^(bits−1) − 1}

A code is [sign | k]; spending no code on 0 leaves 2^bits levels. s is one scale a row or group. With
terms=2 a weight is the sum of two such numbers.

Without a 0 all weights far below s become ±s. Where a row has many of one sign, their errors add up for what the
inputs have in common. A layer passes that on; a cell also feeds it back and may amplify rounding by it. So LSTM, GRU
and RNN weights (terms=1, rounding=nearest) get codes and scales of low ‖w−ŵ‖² + λ·(Σ(w−ŵ))², Σ over a row or group.

Trained (paper, and its released code), sign and k are decided by latents, one for the sign and 2^(bits−1) − 1 steps:

    ŵ = s·Sgn(sign)·2^S,   S ← (S + 1)·H(step), step by step,   H(x) = 1 where x > 0, Sgn(x) = 1 where x ≥ 0, else −1

with the gradients of Sgn(sign)·√(S + 1) in place of 2^S, H and Sgn passing them straight through (`FakeShift`).

Paper: Li et al., "DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization",
arXiv 2208.09708, ICCV 2023. The codebook, the latents and their gradients are the paper's; the scales, the search for
them from trained float weights, latents that start from these, the second term, and the sums that recurrent weights
keep are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _shift, _shift_forms, _shift_sites
from mc_opt.passes._base import Context
from mc_opt.passes._shift_sites import Cost, matrix_shape
from mc_opt.passes._trainable import TrainablePass

_RECURRENT = ("LSTM", "GRU", "RNN")
# λ: small, for the signs of weights near 0, which cost next to nothing, do most of it (benchmarks/rounding.py).
_BALANCE = 0.1
_LOW_VARIANCE = 1e-3  # the paper's: every latent starts so near its threshold that a small gradient flips it


@dataclass(frozen=True)
class DenseShift(TrainablePass):
    """Store weights as sign and exponent, w ≈ s·(±2^k), in 2 to 4 bits.

    bits: width of a code, 2 to 4. group_size: weights that share a scale; 0 makes it one a row. terms: 1, or
    2 for a sum of two codes. rounding: nearest value, or nearest exponent (log2). skip: layer globs; `first`
    and `last` stand for the first and last Conv, MatMul or Gemm with a constant weight.

    For a training, init: what the latents start from: the float weights, or random N(0, 0.001²), the paper's
    low-variance initialisation. spread: from float weights, what a latent is at the distance of one level.
    """

    family: ClassVar[str] = "quantise"

    bits: int = 4
    group_size: int = 0
    terms: int = 1
    rounding: _shift.Rounding = "nearest"
    init: Literal["float", "random"] = "float"
    spread: float = 0.1
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def __post_init__(self) -> None:
        for name, known in (("bits", (2, 3, 4)), ("terms", (1, 2))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: choose one of {', '.join(map(str, known))}")
        if self.group_size < 0:
            raise ValueError(f"group_size={self.group_size}: a group has 1 weight or more; 0 makes a row one group")
        if not self.spread > 0:
            raise ValueError(f"spread={self.spread}: latents of 0 have no sign; choose a number above 0")

    def without_training(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that is taken by a Lookup, or by the sum of two."""
        sites = self._taken(model, ctx)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            chosen = self.at(site.layer)
            chosen._rewrite(site, _codebook(model, chosen.bits, site.tensor.dtype), ctx)
        if sites:
            ir.add_functions(model)
        return len(sites)

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that is taken by a FakeShift, or by the sum of two."""
        sites = self._taken(model, ctx)
        rng = np.random.default_rng(ctx.seed)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            chosen = self.at(site.layer)
            # Without a training, the codes of the float weights are all there is.
            at_random = chosen.init == "random" and ctx.training is not None
            terms = chosen._random(site, rng, ctx) if at_random else chosen._from_float(site, ctx)
            nodes = [_shift_forms.form("FakeShift", site, t, ctx, group_size=chosen.group_size) for t in terms]
            chosen._replace(site, nodes)
        return len(sites)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store the code and the scale that each FakeShift has come to."""
        return _shift_forms.convert(model, self.name, _encode, _codebook, ctx)

    def _taken(self, model: onnx_ir.Model, ctx: Context) -> list[ir.WeightSite]:
        return _shift_sites.taken(self, model, ctx, lambda site: self.at(site.layer)._cost(site))

    def _cost(self, site: ir.WeightSite) -> Cost:
        return _shift_sites.cost(site, self.bits, entries=1 << self.bits, group_size=self.group_size, terms=self.terms)

    def _rewrite(self, site: ir.WeightSite, book: onnx_ir.Value, ctx: Context) -> None:
        rows, cols = matrix_shape(site)
        matrix = ir.canonical(ctx.weight(site.value), site.axes)
        packed: list[list[np.ndarray]] = [[] for _ in range(self.terms)]
        scales: list[list[np.ndarray]] = [[] for _ in range(self.terms)]
        noise = _shift_forms.Noise()
        for block in _shift_sites.blocks(rows, cols):
            w = np.ascontiguousarray(matrix[block])
            fitted = self._fit(w, site.kind)
            for term, part in enumerate(fitted):
                packed[term].append(ir.pack_codes(part.codes, self.bits))
                scales[term].append(part.scales)
            noise.add(w, w.astype(np.float32) - _shift.decode(fitted, self.bits, group_size=self.group_size))
        attributes = {"bits": self.bits, "shape": site.shape, "axes": site.axes, "group_size": self.group_size}
        nodes = []
        for codes, scale in zip(packed, scales, strict=True):
            inputs: list[onnx_ir.Value | onnx_ir.TensorProtocol] = [
                ctx.keep(np.concatenate(codes), f"{site.name}.codes"),
                book,
                ctx.keep(np.concatenate(scale), f"{site.name}.scale"),
            ]
            nodes.append(ir.node("Lookup", inputs, attributes))
        self._replace(site, nodes)
        noise.note(self.bits, site, ctx)

    def _fit(self, w: np.ndarray, kind: str) -> tuple[_shift.ShiftCodes, ...]:
        balance = _BALANCE if kind in _RECURRENT and self.terms == 1 and self.rounding == "nearest" else 0.0
        return _shift.fit(
            w, self.bits, group_size=self.group_size, terms=self.terms, rounding=self.rounding, balance=balance
        )

    def _from_float(self, site: ir.WeightSite, ctx: Context) -> list[_shift_forms.Latents]:
        """The latents of the codes and scales that the weight is stored as without a training, one a term."""
        rows, cols = matrix_shape(site)
        matrix = ir.canonical(ctx.weight(site.value), site.axes)
        steps = (1 << (self.bits - 1)) - 1
        latents = np.empty((self.terms, 1 + steps, rows, cols), matrix.dtype)
        scales: list[tuple[np.ndarray, ...]] = []
        noise = _shift_forms.Noise()
        for block in _shift_sites.blocks(rows, cols):
            w = np.ascontiguousarray(matrix[block])
            fitted = self._fit(w, site.kind)
            scales.append(tuple(part.scales for part in fitted))
            rest = w.astype(np.float32) - _shift.decode(fitted, self.bits, group_size=self.group_size)
            noise.add(w, rest)
            for term, part in enumerate(fitted):
                own = _shift.decode((part,), self.bits, group_size=self.group_size)
                latents[term, :, block] = self._latents(rest + own, part)
        noise.note(self.bits, site, ctx)
        return [
            _shift_forms.Latents(tuple(latents[t]), np.concatenate([part[t] for part in scales]))
            for t in range(self.terms)
        ]

    def _latents(self, w: np.ndarray, fitted: _shift.ShiftCodes) -> np.ndarray:
        """The latents of one term: [1 + steps, rows, cols]. w: [rows, cols] float32, what it stands for."""
        scale = _shift_forms.spread(fitted.scales.astype(np.float32), w.shape[1], self.group_size)
        size = np.abs(w) / np.where(scale > 0, scale, np.inf)
        top = 1 << (self.bits - 1)
        position = np.interp(size, [0, *np.exp2(np.arange(top))], np.arange(-1, top)).astype(np.float32)
        signs = _shift_forms.held(np.copysign(position + 1, w), fitted.codes < top)
        if self.rounding == "log2":
            position = np.log2(np.clip(size, 0.5, 2.0 ** (top - 1))).astype(np.float32)
        steps = _shift_forms.steps_from(position, fitted.codes % top, top - 1)
        return np.stack([signs, *steps]) * np.float32(self.spread)

    def _random(self, site: ir.WeightSite, rng: np.random.Generator, ctx: Context) -> list[_shift_forms.Latents]:
        """Latents of low variance, and scales that give the levels the power of the weight."""
        w = ir.canonical(ctx.weight(site.value), site.axes)
        found = []
        for _ in range(self.terms):
            arrays = rng.normal(0, _LOW_VARIANCE, (1 << (self.bits - 1), *w.shape)).astype(w.dtype)
            levels = np.exp2(_shift_forms.exponents_of(list(arrays[1:]), w.shape).astype(np.float32))
            scale = _shift_forms.scale_of(w, levels * self.terms**0.5, self.group_size)
            found.append(_shift_forms.Latents(tuple(arrays), scale))
        return found

    def _replace(self, site: ir.WeightSite, nodes: list[onnx_ir.Node]) -> None:
        if self.terms == 2:
            nodes = [*nodes, _sum(nodes[0].outputs[0], nodes[1].outputs[0])]
        ir.replace_weight(site, nodes, by=(self.name, f"{self.bits}-bit shift"))


def _encode(negative: np.ndarray, steps: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    """[sign | exponent] of each weight, and the width."""
    bits = (len(steps) + 1).bit_length()
    return bits, _shift_forms.exponents_of(steps, negative.shape) | negative.astype(np.uint8) << np.uint8(bits - 1)


def _codebook(model: onnx_ir.Model, bits: int, dtype: onnx_ir.DataType) -> onnx_ir.Value:
    return _shift_sites.codebook(model, f"denseshift.{bits}bit", _shift.shift_codebook(bits).astype(dtype.numpy()))


def _sum(a: onnx_ir.Value, b: onnx_ir.Value) -> onnx_ir.Node:
    node = onnx_ir.Node("", "Add", [a, b], num_outputs=1)
    node.outputs[0].type, node.outputs[0].shape = a.type, a.shape
    return node
