"""The geometry of sliding windows: of a node, and as a block annotation carries it to the loops that are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _choice

# The name of the block annotation.
_ANNOTATION = "mc_sliding"
# Tiles at the border that are worth code of their own.
_MOST_BORDERS = 4
# Taps along a row that are written out.
MOST_TAPS = 11


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of a sliding window over `rank` spatial axes; pads are (before, after) pairs."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    def output(self, size: Sequence[int], *, ceil: bool = False) -> tuple[int, ...]:
        """Output positions an axis for an input of `size`."""
        result = []
        for n, k, s, d, (before, after) in zip(size, self.kernel, self.strides, self.dilations, self.pads, strict=True):
            free = n + before + after - d * (k - 1) - 1
            count = (-(-free // s) if ceil else free // s) + 1
            # ONNX drops a ceil_mode window that would start in the padding after the input.
            if ceil and (count - 1) * s >= n + before:
                count -= 1
            result.append(count)
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis: `held` is what the source has, `before` how far the first window begins outside it."""

    kernel: int
    stride: int
    dilation: int
    before: int
    held: int

    def is_inside(self, position: int, tap: int) -> bool:
        """Whether a tap of the window at a position lies inside the source."""
        return 0 <= position * self.stride - self.before + tap * self.dilation < self.held

    def is_whole(self, position: int) -> bool:
        """Whether all of the window at a position lies inside the source."""
        return self.is_inside(position, 0) and self.is_inside(position, self.kernel - 1)


@dataclasses.dataclass(frozen=True)
class Sliding:
    """A convolution or pooling, channels last.

    Attributes:
        columns: channels of a tile of the packed weight; a multiple of `vector`.
        vector: lanes of one register.
        channelwise: each output channel reads its own input channel only (depthwise convolution, pooling).
        axes: the spatial axes; only those of a channelwise window may reach outside the source.
        high: rows of positions of a tile; 0 leaves it to the rule.
        wide: positions of a row of a tile; 0 leaves it to the rule.
        shape: what a table of measured tiles calls it; empty where there is nothing to choose.
        behind: neighbouring channels that are multiplied alike, v of A ⊗ I_v; 1 for a weight that is dense.
    """

    columns: int
    vector: int
    channelwise: bool
    axes: tuple[Axis, ...]
    high: int = 0
    wide: int = 0
    shape: str = ""
    behind: int = 1

    def annotation(self, machine: Machine) -> dict[str, Any]:
        """The block annotations, which survives fusion; none for a GPU, whose kernels take in what pads and moves."""
        if machine.kind == "cuda":
            return {}
        numbers = [self.columns, self.vector, int(self.channelwise), self.high, self.wide, self.behind]
        for axis in self.axes:
            numbers += dataclasses.astuple(axis)
        return {_ANNOTATION: numbers, **_choice.annotation(self.shape)}


def read(annotations: Any) -> Sliding | None:
    """The window of a block's annotations; None where there is none."""
    if _ANNOTATION not in annotations:
        return None
    columns, vector, channelwise, high, wide, behind, *rest = (int(v) for v in annotations[_ANNOTATION])
    axes = tuple(Axis(*rest[k : k + 5]) for k in range(0, len(rest), 5))
    return Sliding(columns, vector, bool(channelwise), axes, high, wide, behind=behind)


def channelwise_width(positions: int, machine: Machine) -> int:
    """Positions of a channelwise tile: its taps stay in registers beside the sums."""
    most = min(positions, 8 if machine.registers > 16 else 4)
    return min(range(1, most + 1), key=lambda v: (_channelwise_steps(positions, v), v))


def channelwise_widths(axis: Axis, positions: int, machine: Machine) -> dict[str, int]:
    """Widths of a channelwise tile worth measuring, by name; the rule's is first, and stands as 0."""
    rule = channelwise_width(positions, machine)
    fits = steps_over(axis, positions, machine)
    widths = [
        v
        for v in range(1, min(positions, machine.registers // 2 - 2) + 1)
        if v != rule and (not fits or len(border_tiles(axis, positions, v)) <= _MOST_BORDERS)
    ]
    widths.sort(key=lambda v: (_channelwise_steps(positions, v), v))
    return {str(rule): 0, **{str(v): v for v in widths[: _choice.MOST - 1]}}


def _channelwise_steps(positions: int, wide: int) -> int:
    """The estimated time of a row in tiles so wide: a position is a step, loading the taps two."""
    return -(-positions // wide) * (wide + 2)


def shape_of(family: str, source: Sequence[Any], result: Sequence[Any], axes: Sequence[Axis], dtype: str) -> str:
    """What a table of measured tiles calls a window: two of one name are the same work; empty with open extents."""
    if not all(isinstance(n, int) for n in (*source, *result)):
        return ""
    parts = [
        f"{family} {_choice.by(*source)} -> {_choice.by(*result)}",
        f"kernel {_choice.by(*(a.kernel for a in axes))}",
    ]
    for word, numbers, usual in (
        ("stride", [a.stride for a in axes], 1),
        ("dilation", [a.dilation for a in axes], 1),
        ("before", [a.before for a in axes], 0),
    ):
        if any(n != usual for n in numbers):
            parts.append(f"{word} {_choice.by(*numbers)}")
    return ", ".join((*parts, dtype))


def border_tiles(axis: Axis, positions: int, wide: int) -> list[int]:
    """The tiles of `wide` positions of which a window reaches outside the source, or that are cut short."""
    return [
        q
        for q in range(-(-positions // wide))
        if (q + 1) * wide > positions or not all(axis.is_whole(p) for p in range(q * wide, (q + 1) * wide))
    ]


def steps_over(axis: Axis, positions: int, machine: Machine) -> bool:
    """Whether a channelwise kernel can step over the padding along the last axis: few tiles touch it."""
    borders = border_tiles(axis, positions, channelwise_width(positions, machine))
    return len(borders) <= _MOST_BORDERS and axis.kernel <= MOST_TAPS


def axes_of(w: Window, source: Sequence[int], before: Sequence[int] | None = None) -> tuple[Axis, ...]:
    """The axes of a window over a source [n, *spatial, c] that is padded already, or begins `before` it."""
    starts = before or (0,) * len(w.kernel)
    return tuple(Axis(*axis) for axis in zip(w.kernel, w.strides, w.dilations, starts, source[1:-1], strict=True))


def tap(
    a: te.Tensor,
    at: Sequence[Any],
    steps: Sequence[Any],
    *,
    axes: Sequence[Axis],
    positions: Sequence[int],
    fill: float,
) -> Any:
    """What a step of a channelwise window sees of a [n, *spatial, c] at [n, *position, c]; `fill` outside."""
    n, *position, channel = at
    where, limits = [], []
    for p, k, axis, count in zip(position, steps, axes, positions, strict=True):
        place = p * axis.stride + k * axis.dilation - axis.before
        where.append(place)
        if axis.before > 0:
            limits.append(place >= 0)
        if (count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation - axis.before >= axis.held:
            limits.append(place < axis.held)
    value = a(n, *where, channel)
    return tirx.if_then_else(tirx.all(*limits), value, tirx.const(fill, a.dtype)) if limits else value
