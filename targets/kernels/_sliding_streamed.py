"""Convolutions of few positions with a weight in codes: each vector is decoded in registers, for all positions at once.

Where a weight is used once or twice, to write it to memory first and read it again would take longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._dense_parts import Panel
from mc_opt.targets.kernels._expressions import Expr
from mc_opt.targets.kernels._nest import Registers, Span
from mc_opt.targets.kernels._packed import Decoder

if TYPE_CHECKING:
    from mc_opt.targets.kernels._sliding_dense import Dense

# Vector instructions that it takes to write a decoded vector and to read it again.
_MEMORY = 2.0
# Registers for the codebook, and for what is decoded, beside the sums.
_OTHERS = 6
# Codes of so many channels to one that fills up are stored at most.
_MOST_FILLING = 8


def takes(dense: Dense, images: Any, rows: Sequence[Span], across: Sequence[Span], held: int) -> bool:
    """Whether decoding a panel of `held` vectors anew for each tile takes less time, and registers hold the sums."""
    if dense.decoder is None or not isinstance(images, int):
        return False
    if dense.stored % dense.decoder.per and any(k > 1 for k in dense.taps):
        return False  # words begin inside of taps
    tiles = images * sum(row.count for row in rows) * sum(span.count for span in across)
    positions = max(row.size for row in rows) * max(span.size for span in across)
    for extent in dense.leading:
        tiles *= extent
    fits = positions * held <= dense.machine.registers - _OTHERS
    return fits and (tiles - 1) * dense.decoder.instructions <= _MEMORY


def unit(bits: int, channels: int, positions: int, machine: Machine) -> int:
    """What to fill the channels of a tap up to a multiple of: to whole words, for few positions and at little cost."""
    per = 32 // bits
    missing = -channels % per
    return per if positions <= machine.registers and _MOST_FILLING * missing <= channels else 1


def multiply(
    dense: Dense,
    decoder: Decoder,
    sums: Sequence[Registers],
    panel: Panel,
    kept: Callable[[Expr, Expr], list[Any]],
) -> None:
    """Add all steps of a panel to the sums of a tile; kept(position, channel): the axes that stay."""
    vector, held = dense.window.vector, panel.held
    inputs, per = dense.sums.inputs, decoder.per

    def word(taps: Sequence[Expr], first: Expr, count: int) -> None:
        """The steps of `count` channels of a tap, from `first` on, which begins a word."""
        step = dense.number_of([*taps, first])
        for j in range(count):
            weight = _loops.registers(held, vector, dense.dtype)
            for v in range(held):
                _loops.store(weight, decoder.value(panel.number, v, step, j), v * vector, lanes=vector)
            for acc in sums:
                with dense.unrolled(acc.count, held, vector) as (k, v, lane):
                    axes = kept(acc.first + k, panel.number * dense.window.columns + v * vector + lane)
                    read = dense.weight, weight[v * vector + lane]
                    dense.add(acc.buffer, (k * held + v) * vector + lane, axes, [*taps, first + j], read)

    with ExitStack() as stack:
        taps = [stack.enter_context(dense.serial(k)) if k > 1 else dense.index(0) for k in dense.taps]
        if inputs // per:
            with dense.serial(inputs // per) as number:
                word(taps, number * per, per)
        if inputs % per:
            word(taps, dense.index(inputs // per * per), inputs % per)
