"""LSTM, GRU and RNN: the inputs of all steps in one matrix product, then one kernel that runs through time.

    G = X Wᵀ + b            [steps · batch, gates · hidden]
    step: gates = G_t + h_(t-1) Rᵀ, activations and state on vectors of hidden units

Columns are ordered [tile, gate, lane], so that one pass over R ends with all gates of a vector of hidden
units in registers. A direction's states are a sequence [steps + 1, batch, hidden], the initial one first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import (
    _cells,
    _cells_shared,
    _cells_time,
    _choice,
    _decode,
    _lookup_tile,
    _loops,
    _packed,
    _split,
    _tile,
    _weights,
    lookup_gemv,
)
from mc_opt.targets.kernels._cells_product import Dense, Packed
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._loops import Buffer
from mc_opt.targets.kernels._tile import Tile
from mc_opt.targets.kernels.gemm import product

# Nanoseconds of a step that threads share: at its end they wait for each other about a quarter of a microsecond.
_SHORTEST_STEP = 1500
_DEFAULT = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def recurrent(e: Emitter, node: onnx_ir.Node) -> None:
    """LSTM, GRU or RNN; forward, reverse and bidirectional."""
    inputs = [*node.inputs, *[None] * 8]
    x, w, r, bias, lengths, initial_h, initial_c, peephole = inputs[:8]
    assert x is not None and w is not None and r is not None
    kind = node.op_type
    if kind != "LSTM":
        initial_c = peephole = None
    steps, batch, _ = e.shape(x)
    hidden = e.shape(r)[2]
    _refuse(e, node, lengths, peephole, (steps, batch))
    direction = str(e.attribute(node, "direction", "forward"))
    given = tuple(str(a) for a in e.attribute(node, "activations", ()))
    per = len(_DEFAULT[kind])
    directions = [False, True] if direction == "bidirectional" else [direction == "reverse"]
    biases = None if bias is None else e.constant(bias)
    states = []
    for d, reverse in enumerate(directions):
        names = given[d * per : (d + 1) * per] or _DEFAULT[kind]
        cell = _cells.Cell(
            kind=kind,
            steps=steps,
            batch=batch,
            hidden=hidden,
            lanes=e.machine.lanes,
            sums=e.machine.registers // 2,
            reverse=reverse,
            direction=d,
            activations=tuple(_activation(node, name) for name in names),
            clip=float(e.attribute(node, "clip", 0.0)),
            linear=bool(e.attribute(node, "linear_before_reset", 0)),
        )
        cell = dataclasses.replace(cell, threads=_threads(cell, e.machine))
        states.append(_direction(e, cell, x, w, r, biases, initial_h, initial_c))
    e.note_kernel(f"{kind} {node.name}: {dims.text(steps)} steps, {hidden} hidden units")
    _finish(e, node, states, directions, (steps, batch, hidden))


def _threads(cell: _cells.Cell, machine: Machine) -> int:
    """How many threads share a step, which has to be long enough for them to wait for each other at its end."""
    step = dims.nominal(cell.batch) * cell.width * cell.hidden * cell.gates / _split.WEIGHTS
    if step < _SHORTEST_STEP or cell.tiles < machine.threads:
        return 1
    return _split.threads(dims.nominal(cell.steps) * step, machine)


def _refuse(
    e: Emitter,
    node: onnx_ir.Node,
    lengths: onnx_ir.Value | None,
    peephole: onnx_ir.Value | None,
    size: tuple[Dim, Dim],
) -> None:
    """Refuse by name what no kernel does."""
    steps, _ = size
    where = f"{node.op_type} {node.name!r}"
    if lengths is not None:
        array = e.constant(lengths)
        if array is None or not isinstance(steps, int) or not np.all(array == steps):
            raise TargetError(
                f"{where}: sequence_lens is given; expected none, or all {dims.text(steps)}; pad the sequences alike"
            )
    if peephole is not None and (e.constant(peephole) is None or np.any(e.constant(peephole))):
        raise TargetError(f"{where}: peephole weights are given; expected none; build --target onnx")
    if e.attribute(node, "layout", 0):
        raise TargetError(f"{where}: layout=1 (batch first); expected 0; put a Transpose before and after it")
    if e.attribute(node, "input_forget", 0):
        raise TargetError(f"{where}: input_forget=1; expected 0; build --target onnx")
    r = node.inputs[2]
    assert r is not None
    most = _cells_shared.most_hidden(node.op_type, e.machine)
    if e.machine.kind == "cuda" and e.shape(r)[2] > most:
        raise TargetError(
            f"{where}: {e.shape(r)[2]} hidden units; expected at most {most}, whose state threads can share; "
            "build --target onnx"
        )
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    if bias is not None and e.constant(bias) is None:
        raise TargetError(f"{where}: the bias {bias.name!r} is computed by the model; run fold-constants first")


def _activation(node: onnx_ir.Node, name: str) -> _cells.Activation:
    if name not in _cells.ACTIVATIONS:
        known = ", ".join(_cells.ACTIVATIONS)
        raise TargetError(f"{node.op_type} {node.name!r}: activation {name!r}; expected one of {known}")
    return _cells.ACTIVATIONS[name]


def _direction(
    e: Emitter,
    cell: _cells.Cell,
    x: onnx_ir.Value,
    w: onnx_ir.Value,
    r: onnx_ir.Value,
    bias: np.ndarray | None,
    initial_h: onnx_ir.Value | None,
    initial_c: onnx_ir.Value | None,
) -> list[relax.Expr]:
    """Run one direction; returns its states [steps + 1, batch, width], and an LSTM's last cell [batch, width]."""
    rows = dims.product([cell.steps, cell.batch])
    source = e.reshape(e.plain(x), (rows, e.shape(x)[2]))
    added, separate = _biases(cell, bias)
    inputs = _inputs(e, cell, source, w, None if added is None else e.weight(added))
    tiles = _looked_up(e, cell, r)
    matrix = _state_weight(e, cell, r, rows) if tiles is None else _codes(e, tiles)
    arguments = [inputs, *matrix, _initial(e, cell, initial_h)]
    if cell.kind == "LSTM":
        arguments.append(_initial(e, cell, initial_c))
    if cell.kind == "GRU" and cell.linear:
        arguments.append(e.weight(separate))
    own, gates = _inside(cell, rows)
    shapes: list[_loops.Argument] = [((gates, *dims.sizes(inputs)[1:]), "float32")]
    for argument in arguments[1:]:
        seen = [own.batch if not isinstance(s, int) else s for s in dims.sizes(argument)]
        shapes.append((seen, str(argument.ty.dtype)))
    function = _loops.kernel([*shapes, *_results(own, e.machine)], _body(own, e.machine, tiles))
    return list(e.call(function, arguments, _results(cell, e.machine), name=cell.kind.lower()))


def _inputs(e: Emitter, cell: _cells.Cell, source: relax.Expr, w: onnx_ir.Value, bias: relax.Expr | None) -> relax.Expr:
    """G: source [rows, k] times W, plus the bias; its kernel decodes a packed W by itself where it can."""
    columns, rows = cell.width * cell.gates, dims.sizes(source)[0]
    if isinstance(rows, int) and e.machine.kind != "cuda":
        made = _looked_up_inputs(e, cell, source, w, bias)
        if made is not None:
            return made
    tile, _ = _tiles(cell, rows, e.machine)
    weight: relax.Expr | _packed.Packed | None = None
    if isinstance(rows, int) and _decode.terms(e, w) and _packed.takes(e, _decode.terms(e, w)):
        weight = _packed.arranged(e, w, functools.partial(_pack, cell, columns=tile.columns))
        if weight is not None:
            e.note_kernel(f"lookup product: {weight.stored}, {_choice.by(*dims.sizes(source))} x {columns}")
    weight = _ordered(e, cell, w, tile.columns) if weight is None else weight
    return product(e, source, weight, bias, tile=tile, columns=columns, name="gates")


def _looked_up_inputs(
    e: Emitter, cell: _cells.Cell, source: relax.Expr, w: onnx_ir.Value, bias: relax.Expr | None
) -> relax.Expr | None:
    """G of few rows, by products that decode codes in registers; None for many, and where there are none for W."""
    terms = _decode.terms(e, w)
    columns = cell.width * cell.gates
    if not terms or math.prod(dims.sizes(source)[:-1]) > lookup_gemv.MOST_ROWS[e.machine.kind]:
        return None

    def matrix(array: np.ndarray) -> np.ndarray:
        return _rows(cell, array).T

    parts: list[relax.Expr] = []
    for term in terms:
        part = lookup_gemv.of_matrix(e, source, term, matrix, None if parts else bias, columns=columns)
        if part is None:
            return None
        parts.append(part)
    _weights.note_float32(e, w)
    return functools.reduce(functools.partial(_decode.added, e), parts)


def _looked_up(e: Emitter, cell: _cells.Cell, r: onnx_ir.Value) -> Tiles | None:
    """R in codes that its kernel looks up at each step; None where it is not packed, or decoded before all steps."""
    terms = _decode.terms(e, r)
    if not terms or e.machine.kind != "x86":
        return None
    where = f"{cell.kind}: the recurrent weight {r.name!r} is decoded at each call"
    if len(terms) > 1:
        e.note_fallback(f"{where}: it is a sum of codes")
        return None
    pack = functools.partial(_pack, cell, columns=cell.gates * cell.lanes)
    tiles = _decode.arrange(terms[0], pack, e.machine, by_word=True)
    if tiles is None or not tiles.form.is_vectorised(e.machine):
        e.note_fallback(f"{where}: its codes are not in an order, or of a codebook, that a step could look up")
        return None
    if not _cells_time.looks_up(cell, tiles, e.machine):
        e.note_kernel(f"{cell.kind}: {tiles.bits} bits, decoded once for {dims.text(cell.steps)} steps")
        return None
    e.note_kernel(f"{cell.kind}: {tiles.bits} bits, looked up at each step")
    _weights.note_float32(e, r)
    return tiles


def _codes(e: Emitter, tiles: Tiles) -> list[relax.Expr]:
    return [e.weight(array) for array in _lookup_tile.arrays(tiles, is_in_a_row=True)]


def _state_weight(e: Emitter, cell: _cells.Cell, r: onnx_ir.Value, rows: Dim) -> list[relax.Expr]:
    return [_ordered(e, cell, r, _tiles(cell, rows, e.machine)[1])]


def _inside(cell: _cells.Cell, rows: Dim) -> tuple[_cells.Cell, Dim]:
    """The cell as its kernel sees it, and the rows of G: open sizes are variables that buffers bind."""
    gates, batch = _loops.inside((rows, cell.batch))
    steps = cell.steps if isinstance(cell.steps, int) else tirx.floordiv(gates, batch)
    return dataclasses.replace(cell, steps=steps, batch=batch), gates


def _results(cell: _cells.Cell, machine: Machine) -> list[_loops.Argument]:
    """The states of all steps, and what a cell keeps beside them."""
    state = (cell.batch, cell.width)
    outputs: list[_loops.Argument] = [((cell.steps + 1, *state), "float32")]
    if cell.kind == "LSTM":
        outputs.append((state, "float32"))
    if cell.kind == "GRU" and not cell.linear and machine.kind != "cuda":
        outputs += [(state, "float32")] * 2
    return outputs


def _tiles(cell: _cells.Cell, rows: Dim, machine: Machine) -> tuple[Tile, int]:
    """The tile of the product with W, and the columns of R's."""
    if machine.kind == "cuda":  # neighbouring threads have neighbouring columns of R
        return _tile.choose(1, rows, cell.width * cell.gates, machine), cell.width * cell.gates
    limit = max(1, (machine.registers - 4) // cell.gates)
    wide = _tile.whole(dims.factor(rows), limit)
    if isinstance(rows, int):
        wide = min(range(1, min(rows, limit) + 1), key=lambda v: (-(-rows // v) * (v + 2), -v))
    tile = Tile(1, wide, cell.gates * cell.lanes, cell.lanes)
    return tile, tile.columns


def _body(cell: _cells.Cell, machine: Machine, tiles: Tiles | None) -> Callable[..., None]:
    if machine.kind == "cuda":
        in_threads = {"LSTM": _cells_shared.lstm, "GRU": _cells_shared.gru, "RNN": _cells_shared.rnn}
        return functools.partial(in_threads[cell.kind], cell, machine)
    write = {"LSTM": _cells.lstm, "GRU": _cells.gru, "RNN": _cells.rnn}[cell.kind]

    def body(g: Buffer, *rest: Buffer) -> None:
        if tiles is None:
            write(cell, Dense(cell.hidden, cell.lanes, cell.sums, rest[0]), g, *rest[1:])
            return
        count = len(_decode.arrays_of(tiles))
        write(cell, Packed(tiles, machine, *rest[:count]), g, *rest[count:])

    return body


def _ordered(e: Emitter, cell: _cells.Cell, weight: onnx_ir.Value, columns: int) -> relax.Expr:
    """A weight dense in the order of `_pack`: while building, or by a kernel in front of each call."""
    packed = _weights.packed(e, weight, functools.partial(_pack, cell, columns=columns))
    return _pack_computed(e, cell, weight, columns) if packed is None else packed


def _pack_computed(e: Emitter, cell: _cells.Cell, weight: onnx_ir.Value, columns: int) -> relax.Expr:
    """What `_pack` makes, of a weight that kernels make first, such as the sum of two Lookups."""
    block = cell.gates * cell.lanes

    def fill(a: te.Tensor) -> te.Tensor:
        def element(tile: Any, k: Any, column: Any) -> Any:
            row = tile * columns + column
            unit = row // block * cell.lanes + row % cell.lanes
            value = a(cell.direction, row % block // cell.lanes * cell.hidden + unit, k)
            if cell.width == cell.hidden:
                return value
            return tirx.if_then_else(unit < cell.hidden, value, tirx.const(0, a.dtype))

        return te.compute((cell.width * cell.gates // columns, a.shape[2], columns), element, name="pack")

    return e.moved(fill, e.plain(weight), name="pack")


def _pack(cell: _cells.Cell, weight: np.ndarray, *, columns: int) -> np.ndarray:
    """weight: [directions, gates · hidden, k] -> [n / columns, k, columns], the n rows ordered [tile, gate, lane]."""
    rows = _rows(cell, weight)
    return np.ascontiguousarray(rows.reshape(-1, columns, rows.shape[-1]).transpose(0, 2, 1))


def _rows(cell: _cells.Cell, weight: np.ndarray) -> np.ndarray:
    """weight: [directions, gates · hidden, k] -> [n, k], ordered [tile, gate, lane]."""
    matrix = weight[cell.direction].reshape(cell.gates, cell.hidden, -1)
    full = _weights.pad_to(matrix, 1, cell.lanes).reshape(cell.gates, cell.tiles, cell.lanes, -1)
    return full.transpose(1, 0, 2, 3).reshape(-1, full.shape[-1])


def _biases(cell: _cells.Cell, bias: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
    """bias: [directions, 2 · gates · hidden] -> (what G contains [columns] or None, GRU's inner bias [width])."""
    inner = np.zeros(cell.width, np.float32)
    if bias is None:
        return None, inner
    of_input, of_state = bias[cell.direction].reshape(2, cell.gates, cell.hidden).astype(np.float32)
    total = of_input + of_state
    if cell.kind == "GRU" and cell.linear:
        total[2] = of_input[2]
        inner[: cell.hidden] = of_state[2]
    full = _weights.pad_to(total, 1, cell.lanes).reshape(cell.gates, cell.tiles, cell.lanes)
    return np.ascontiguousarray(full.transpose(1, 0, 2).reshape(-1)), inner


def _initial(e: Emitter, cell: _cells.Cell, value: onnx_ir.Value | None) -> relax.Expr:
    """An initial state [directions, batch, hidden] as [batch, width]."""
    if value is None and not isinstance(cell.batch, int):
        zero = tirx.const(0, "float32")
        return e.te(lambda: te.compute((cell.batch, cell.width), lambda *_: zero, name="zeros"), name="zeros")
    array = np.zeros((1, cell.batch, cell.hidden), np.float32) if value is None else e.constant(value)
    d = 0 if value is None else cell.direction
    if array is not None:
        return e.weight(_weights.pad_to(np.ascontiguousarray(array[d]), 1, cell.lanes))
    assert value is not None

    def fill(a: te.Tensor) -> te.Tensor:
        def element(b: Any, i: Any) -> Any:
            if cell.width == cell.hidden:
                return a(d, b, i)
            return tirx.if_then_else(i < cell.hidden, a(d, b, i), tirx.const(0, a.dtype))

        return te.compute((cell.batch, cell.width), element, name="state")

    return e.te(fill, e.plain(value), name="state")


def _finish(
    e: Emitter,
    node: onnx_ir.Node,
    states: Sequence[Sequence[relax.Expr]],
    reverse: Sequence[bool],
    size: tuple[Dim, Dim, int],
) -> None:
    """Y [steps, directions, batch, hidden], Y_h and Y_c [directions, batch, hidden] from the directions' states."""
    steps, batch, hidden = size
    count = len(states)

    def of_direction(d: Any, values: Sequence[Any]) -> Any:
        return values[0] if count == 1 else tirx.if_then_else(d == 0, values[0], values[1])

    def sequence(*runs: te.Tensor) -> te.Tensor:
        def element(t: Any, d: Any, b: Any, i: Any) -> Any:
            values = [run(steps - t if back else t + 1, b, i) for run, back in zip(runs, reverse, strict=True)]
            return of_direction(d, values)

        return te.compute((steps, count, batch, hidden), element, name="sequence")

    def last(*runs: te.Tensor) -> te.Tensor:
        return te.compute(
            (count, batch, hidden), lambda d, b, i: of_direction(d, [run(steps, b, i) for run in runs]), name="last"
        )

    def cells(*runs: te.Tensor) -> te.Tensor:
        return te.compute(
            (count, batch, hidden), lambda d, b, i: of_direction(d, [run(b, i) for run in runs]), name="cells"
        )

    hidden_states = [s[0] for s in states]
    made = [(sequence, hidden_states), (last, hidden_states), (cells, [s[-1] for s in states])]
    for value, (fn, arguments) in zip(node.outputs, made, strict=False):
        if value.name:
            e.set(value, e.te(fn, *arguments, name="states"))


HANDLERS: dict[str, Handler] = {"LSTM": recurrent, "GRU": recurrent, "RNN": recurrent}
