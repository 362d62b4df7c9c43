"""How a cell reads a recurrent weight in codes, by predicted time: looked up at each step, or decoded before all."""

from __future__ import annotations

from typing import Literal

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _cells_product
from mc_opt.targets.kernels._cells import Cell
from mc_opt.targets.kernels._decode import Tiles

# Vector instructions that decode and multiply, in a nanosecond: AVX-512 has two ports for them, AVX2 three. These and
# the numbers below were measured on a Sapphire Rapids, in cells of 48 to 512 hidden units.
_INSTRUCTIONS = {16: 6.0, 8: 8.0}
# Nanoseconds of a vector of sums that are looked up, for its beginning and end.
_BEGUN = 8
# Bytes of weights in a nanosecond that a step reads from the second-level cache, and from what lies behind it.
_NEAR, _FAR = 150, 27
# Weights in a nanosecond that a kernel decodes to memory, two to a word and as float32.
_IN_HALVES, _IN_FLOATS = 20, 8

Way = Literal["looked up", "halves", "dense"]


def fastest(cell: Cell, tiles: Tiles, machine: Machine, *, has_halves: bool) -> Way:
    """What is predicted to take the least time for all steps of a call.

    Looking up at each of them; decoding once, two weights to a word where that can be; or to float32.
    """
    steps, batch = (dims.nominal(n) for n in (cell.steps, cell.batch))
    weights = cell.gates * cell.width * cell.hidden
    vectors, rate = weights / cell.lanes, _INSTRUCTIONS[cell.lanes]
    blocks = -(-batch // _cells_product.most_rows(cell.gates, machine)) if isinstance(cell.batch, int) else batch
    begun = batch * cell.tiles * cell.gates * _BEGUN
    instructions = tiles.form.instructions(machine)
    found: dict[Way, float] = {"looked up": steps * (begun + vectors * (blocks * instructions + batch) / rate)}
    # Bytes that a step reads, instructions that it takes for a vector of weights, and how fast these are decoded.
    ways: list[tuple[Way, int, int, int]] = [
        ("halves", 2 * weights, 2, _IN_HALVES),
        ("dense", 4 * weights, 1, _IN_FLOATS),
    ]
    for way, size, count, decoded in ways if has_halves else ways[1:]:
        near = 0.0 if size <= machine.l1 else size / _NEAR
        first = near if size <= machine.l2 else size / _FAR
        # The rows of a batch behind the first find a tile in the first-level cache, where it fits.
        again = near if size / cell.tiles > machine.l1 else 0.0
        shared = _cells_product.sharing_rows(cell.gates, cell.sums) if way == "dense" else 1
        blocks = -(-batch // shared) if isinstance(cell.batch, int) else batch
        used = vectors * count * batch / blocks / rate
        found[way] = weights / decoded + steps * (max(first, used) + (blocks - 1) * max(again, used))
    return min(found, key=lambda way: found[way])
