"""Shift weights in training: latents that give the codes of a float weight, and the codes of trained latents.

All latents are in units of a level: the position u of |w|/s among the levels is 0 at the lowest, 1 at the next one,
and changes linearly between (with log2 rounding: logarithmically). A latent of u minus a threshold is then the
distance that the weight has to go until its code changes, whatever the weight's range, and one learning rate serves
all layers. This scale is ours; so is the initialisation from float weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._trainable import forms

# Where a code is not the nearest one (balanced sums) its latents stand so far on the code's side of the threshold.
_MARGIN = 1 / 64


@dataclass(frozen=True)
class Latents:
    """What decides the codes of a weight as a matrix.

    Attributes:
        arrays: [rows, cols] each, in the order of the form's inputs without the scale and the gain.
        scale: [rows, groups].
    """

    arrays: tuple[np.ndarray, ...]
    scale: np.ndarray


class Noise:
    """The error of a weight's codes, taken block by block."""

    def __init__(self) -> None:
        self._error = self._power = 0.0

    def add(self, w: np.ndarray, rest: np.ndarray) -> None:
        """w: a block of the weight, rest: what its codes leave of it."""
        w32 = w.astype(np.float32)
        self._error += float(np.vdot(rest, rest))
        self._power += float(np.vdot(w32, w32))

    def note(self, bits: int, site: ir.WeightSite, ctx: Context) -> None:
        """Tell the SQNR, unless the codes are exact."""
        if self._error > 0:
            sqnr = f"weight SQNR {10 * math.log10(self._power / self._error):.1f} dB"
            ctx.note(site.layer, f"{bits} bits, {sqnr}" + (" before its training" if ctx.training else ""))


def steps_from(position: np.ndarray, exponents: np.ndarray, count: int) -> list[np.ndarray]:
    """The latents of `count` steps whose recursion gives the exponents, the last step deciding about the first level.

    position: u of each weight, exponents: S of each weight, both of any shape.
    """
    thresholds = [np.float32(level - 0.5) for level in range(1, count + 1)]
    return [held(position - t, exponents > t) for t in reversed(thresholds)]


def held(latent: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The latent, moved to the side of 0 that its bit says."""
    moved: np.ndarray = np.where(above, np.maximum(latent, _MARGIN), np.minimum(latent, -_MARGIN))
    return moved


def exponents_of(steps: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """S of each weight, uint8: S₀ = 0, Sⱼ = (Sⱼ₋₁ + 1)·H(stepⱼ)."""
    total = np.zeros(shape, np.uint8)
    for step in steps:
        total += np.uint8(1)
        total *= step > 0
    return total


def spread(factor: np.ndarray, cols: int, group_size: int) -> np.ndarray:
    """factor: [rows, groups] -> [rows, cols]."""
    return np.repeat(factor, group_size or max(cols, 1), axis=1)[:, :cols]


def scale_of(w: np.ndarray, levels: np.ndarray, group_size: int) -> np.ndarray:
    """The scales with which random levels have the power of the weight, group by group: [rows, groups].

    w and levels: [rows, cols].
    """
    starts = np.arange(0, w.shape[1], group_size or max(w.shape[1], 1))
    power, own = (np.add.reduceat(np.square(x, dtype=np.float64), starts, axis=1) for x in (w, levels))
    scales: np.ndarray = np.sqrt(power / np.where(own > 0, own, 1)).astype(w.dtype)
    return scales


def form(op_type: str, site: ir.WeightSite, latents: Latents, ctx: Context, *, group_size: int) -> onnx_ir.Node:
    """The training form of a weight, or of one term of it."""
    arrays = [ir.restore(array, site.shape, site.axes) for array in latents.arrays]
    constants = [ctx.keep(np.ascontiguousarray(array), f"{site.name}.latent") for array in arrays]
    is_wide = op_type == "FakeSparseShift"
    lead, steps = constants[: 1 + is_wide], constants[1 + is_wide :]
    inputs: list[onnx_ir.TensorProtocol | np.ndarray] = [*lead, latents.scale, np.ones_like(latents.scale), *steps]
    return ir.node(op_type, inputs, {"axes": site.axes, "group_size": group_size})


Encode = Callable[[np.ndarray, Sequence[np.ndarray]], tuple[int, np.ndarray]]
"""(whether each weight is negative, its other latents in order) -> width and codes; all [rows, cols]."""
Book = Callable[[onnx_ir.Model, int, onnx_ir.DataType], onnx_ir.Value]


def convert(model: onnx_ir.Model, name: str, encode: Encode, book: Book, ctx: Context) -> int:
    """Replace the training forms of the pass `name` by Lookups of the same numbers; how many there were."""
    found = list(forms(model, name))
    for done, node in enumerate(found):
        ctx.progress(done, len(found), node.outputs[0].name or "")
        _store(model, node, name, encode, book, ctx)
    return len(found)


def _store(model: onnx_ir.Model, node: onnx_ir.Node, name: str, encode: Encode, book: Book, ctx: Context) -> None:
    attributes = {key: node.attributes[key].value for key in ("axes", "group_size")}
    formal = ir.find_op(node.op_type).formal(len(node.inputs))
    given = {key: ctx.weight(value) for key, value in zip(formal, node.inputs, strict=True) if value is not None}
    factor = given.pop("scale") * given.pop("gain")
    shape = given["sign"].shape
    latents = [ir.canonical(array, attributes["axes"]) for array in given.values()]
    cols = latents[0].shape[1]
    below = spread(factor, cols, attributes["group_size"]) < 0
    bits, codes = encode((latents[0] < 0) != below, latents[1:])

    output, graph = node.outputs[0], node.graph
    assert isinstance(graph, onnx_ir.Graph) and output.name is not None and output.dtype is not None
    levels = book(model, bits, output.dtype)
    for value in node.inputs:
        assert value is not None and value.name is not None
        graph.initializers.pop(value.name)  # first, so that their names are free
    arrays = {"codes": ir.pack_codes(codes, bits), "scale": np.abs(factor)}
    packed, scale = (
        ir.initializer(graph, f"{output.name}.{part}", ctx.keep(array, f"{output.name}.{part}"))
        for part, array in arrays.items()
    )
    lookup = ir.node("Lookup", [packed, levels, scale], {"bits": bits, "shape": shape, **attributes})
    ir.replace_node(node, [lookup], by=(name, node.metadata_props["mc_opt.rule"]), names=set())
