"""Whether each step looks its recurrent weight up, or all of them read what a kernel has decoded before: by time."""

from __future__ import annotations

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _cells_product
from mc_opt.targets.kernels._cells import Cell
from mc_opt.targets.kernels._decode import Tiles

# Vector instructions that decode and multiply, in a nanosecond: AVX-512 has two ports for them, AVX2 three. These and
# the numbers below hold a cell's activations; measured on a Sapphire Rapids.
_INSTRUCTIONS = {16: 4.0, 8: 6.0}
# Nanoseconds of a vector of sums that are looked up, for its beginning and end.
_BEGUN = 12
# Bytes of weights in a nanosecond that a step reads from the second-level cache, and from what lies behind it.
_NEAR, _FAR = 90, 27
# Weights that a kernel decodes to memory in a nanosecond.
_DECODED = 8


def looks_up(cell: Cell, tiles: Tiles, machine: Machine) -> bool:
    """Whether looking up at each step is predicted to take less time than decoding once and reading float32."""
    steps, batch = (dims.nominal(n) for n in (cell.steps, cell.batch))
    weights = cell.gates * cell.width * cell.hidden
    vectors, rate = weights / cell.lanes, _INSTRUCTIONS[cell.lanes]
    blocks = -(-batch // _cells_product.most_rows(cell.gates, machine)) if isinstance(cell.batch, int) else batch
    begun = batch * cell.tiles * cell.gates * _BEGUN
    looked_up = begun + vectors * (blocks * tiles.form.instructions(machine) + batch) / rate
    size, used = 4 * weights, vectors / rate
    near = 0.0 if size <= machine.l1 else size / _NEAR
    first = near if size <= machine.l2 else size / _FAR
    # The rows of a batch behind the first find a tile in the first-level cache, where it fits.
    again = near if size / cell.tiles > machine.l1 else 0.0
    dense = max(first, used) + (batch - 1) * max(again, used)
    return steps * looked_up <= weights / _DECODED + steps * dense
