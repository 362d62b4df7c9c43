"""Store weights as 0 or signed powers of two, decided in training by a sign, a sparsity and shifts.

    ŵ = s·Sgn(sign)·H(value)·2^S,   S ← (S + 1)·H(step), step by step,   H(x) = 1 where x > 0, else 0

The codebook is {0, ±1, ±2, .., ±2^(2^(bits−1)−2)}, with 2 bits ternary; s is one scale a row or group. H and Sgn pass
gradients straight through (`FakeSparseShift`), so that a weight changes its sign without passing through 0, and the
loss gets α·Σ max(−value, 0), which keeps weights from 0.

Paper: Li et al., "S3: Sign-Sparse-Shift Reparametrization for Effective Training of Low-bit Shift Networks",
arXiv 2107.03453, NeurIPS 2021, and its released code. The paper trains from scratch; scales, latents that start from
float weights, and codes found without a training are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _shift_forms, _shift_sites, _sparse_shift
from mc_opt.passes._base import Context
from mc_opt.passes._shift_sites import Cost, matrix_shape
from mc_opt.passes._trainable import TrainablePass, forms

if TYPE_CHECKING:
    from mc_opt.passes._trainable import Penalty


@dataclass(frozen=True)
class S3(TrainablePass):
    """Store weights as 0 or sign and exponent, w ≈ s·{0, ±2^k}, in 2 to 4 bits.

    bits: width of a code, 2 to 4; 2 is ternary. group_size: weights that share a scale; 0 makes it one a row. skip:
    layer globs; `first` and `last` stand for the first and last Conv, MatMul or Gemm with a constant weight.

    For a training, alpha: weight of the loss that keeps weights from 0. init: what the latents start from: the float
    weights; or as the paper, which trains from scratch: dense, random with every weight at ±s, or normal, random.
    spread: from float weights, what a latent is at the distance of one level.
    """

    family: ClassVar[str] = "quantise"

    bits: int = 3
    group_size: int = 0
    alpha: float = 1e-5
    init: Literal["float", "dense", "normal"] = "float"
    spread: float = 0.1
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits={self.bits}: choose one of 2, 3, 4")
        if self.group_size < 0:
            raise ValueError(f"group_size={self.group_size}: a group has 1 weight or more; 0 makes a row one group")
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: it would drive weights to 0; choose 0 or more")
        if not self.spread > 0:
            raise ValueError(f"spread={self.spread}: latents of 0 have no sign; choose a number above 0")

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that is taken by a FakeSparseShift."""
        sites = _shift_sites.taken(self, model, ctx, lambda site: self.at(site.layer)._cost(site))
        rng = np.random.default_rng(ctx.seed)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            chosen = self.at(site.layer)
            # Without a training, the codes of the float weights are all there is.
            at_random = chosen.init != "float" and ctx.training is not None
            latents = chosen._random(site, rng, ctx) if at_random else chosen._from_float(site, ctx)
            node = _shift_forms.form("FakeSparseShift", site, latents, ctx, group_size=chosen.group_size)
            ir.replace_weight(site, node, by=(self.name, f"{chosen.bits}-bit S3"))
        return len(sites)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store the code and the scale that each FakeSparseShift has come to."""
        return _shift_forms.convert(model, self.name, _encode, _codebook, ctx)

    def penalty(self, model: onnx_ir.Model) -> Penalty | None:
        """α·Σ max(−value, 0) over all weights, the paper's prior of dense weights."""
        values = [node.inputs[1].name for node in forms(model, self.name) if node.inputs[1] is not None]
        if self.alpha == 0 or not values:
            return None
        alpha = self.alpha
        return lambda parameters, _: sum(alpha * (-parameters[str(name)]).clamp(min=0).sum() for name in values)

    def _cost(self, site: ir.WeightSite) -> Cost:
        return _shift_sites.cost(site, self.bits, entries=(1 << self.bits) - 1, group_size=self.group_size)

    def _from_float(self, site: ir.WeightSite, ctx: Context) -> _shift_forms.Latents:
        rows, cols = matrix_shape(site)
        matrix = ir.canonical(ctx.weight(site.value), site.axes)
        latents = np.empty((1 << (self.bits - 1), rows, cols), matrix.dtype)
        scales = []
        noise = _shift_forms.Noise()
        for block in _shift_sites.blocks(rows, cols):
            w = np.ascontiguousarray(matrix[block])
            fitted = _sparse_shift.fit(w, self.bits, group_size=self.group_size)
            scales.append(fitted.scales)
            w = w.astype(np.float32)
            noise.add(w, w - _sparse_shift.decode(fitted, self.bits, group_size=self.group_size))
            scale = _shift_forms.spread(fitted.scales.astype(np.float32), cols, self.group_size)
            latents[:, block] = self._latents(w / np.where(scale > 0, scale, np.inf), fitted.codes)
        noise.note(self.bits, site, ctx)
        return _shift_forms.Latents(tuple(latents), np.concatenate(scales))

    def _latents(self, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The latents of weights in units of their scale: [2 + steps, rows, cols]. x, codes: [rows, cols]."""
        top = 1 << (self.bits - 1)
        position = np.interp(np.abs(x), _sparse_shift.magnitudes(self.bits), np.arange(top)).astype(np.float32)
        level = np.where(codes < top, codes, codes - np.uint8(top - 1))
        sign = _shift_forms.held(np.copysign(position, x), ~np.signbit(x))
        value = _shift_forms.held(position - np.float32(0.5), level > 0)
        # S of a 0 is 0, as of the lowest level.
        steps = _shift_forms.steps_from(position - np.float32(1), np.maximum(level, 1) - 1, top - 2)
        return np.stack([sign, value, *steps]) * np.float32(self.spread)

    def _random(self, site: ir.WeightSite, rng: np.random.Generator, ctx: Context) -> _shift_forms.Latents:
        """N(0, 2/(taps·rows)), the paper's; for `dense` all weights are not 0 and all exponents are 0."""
        w = ir.canonical(ctx.weight(site.value), site.axes)
        taps = math.prod(site.shape[2:]) if site.kind == "Conv" else 1
        deviation = math.sqrt(2 / (taps * w.shape[0]))
        arrays = rng.normal(0, deviation, (1 << (self.bits - 1), *w.shape)).astype(w.dtype)
        if self.init == "dense":
            arrays[1:] = np.abs(arrays[1:])
            arrays[2:] *= -1
        levels = np.exp2(_shift_forms.exponents_of(list(arrays[2:]), w.shape).astype(np.float32)) * (arrays[1] > 0)
        return _shift_forms.Latents(tuple(arrays), _shift_forms.scale_of(w, levels, self.group_size))


def _encode(negative: np.ndarray, latents: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    """The width, and the code of each weight."""
    value, *steps = latents
    bits = (len(steps) + 2).bit_length()
    magnitude = (_shift_forms.exponents_of(steps, value.shape) + 1) * (value > 0)
    return bits, _sparse_shift.codes_of(magnitude, negative, bits)


def _codebook(model: onnx_ir.Model, bits: int, dtype: onnx_ir.DataType) -> onnx_ir.Value:
    return _shift_sites.codebook(model, f"s3.{bits}bit", _sparse_shift.codebook(bits).astype(dtype.numpy()))
