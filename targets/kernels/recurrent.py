"""LSTM, GRU and RNN: the inputs of all steps in one matrix product, then one kernel that runs through time.

    G = X Wᵀ + b            [steps · batch, gates · hidden]
    step: gates = G_t + h_(t-1) Rᵀ, activations and state on vectors of hidden units

Columns are ordered [tile, gate, lane], so that one pass over R ends with all gates of a vector of hidden
units in registers. A direction's states are a sequence [steps + 1, batch, hidden], the initial one first.
"""

from __future__ import annotations

import dataclasses
import functools
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
from mc_opt.targets.kernels import _cells, _cells_shared, _cells_weights, _loops, _split, _tile, _weights
from mc_opt.targets.kernels._cells_weights import State
from mc_opt.targets.kernels._loops import Buffer
from mc_opt.targets.kernels._tile import Tile

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
    tile, of_state = _tiles(cell, rows, e.machine)
    inputs = _cells_weights.inputs(e, cell, source, w, None if added is None else e.weight(added), tile=tile)
    state = _cells_weights.state(e, cell, r, columns=of_state)
    arguments = [inputs, *state.arguments, _initial(e, cell, initial_h)]
    if cell.kind == "LSTM":
        arguments.append(_initial(e, cell, initial_c))
    if cell.kind == "GRU" and cell.linear:
        arguments.append(e.weight(separate))
    own, gates = _inside(cell, rows)
    shapes: list[_loops.Argument] = [((gates, *dims.sizes(inputs)[1:]), "float32")]
    for argument in arguments[1:]:
        seen = [own.batch if not isinstance(s, int) else s for s in dims.sizes(argument)]
        shapes.append((seen, str(argument.ty.dtype)))
    function = _loops.kernel([*shapes, *_results(own, e.machine)], _body(own, e.machine, state))
    return list(e.call(function, arguments, _results(cell, e.machine), name=cell.kind.lower()))


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


def _body(cell: _cells.Cell, machine: Machine, state: State) -> Callable[..., None]:
    if machine.kind == "cuda":
        in_threads = {"LSTM": _cells_shared.lstm, "GRU": _cells_shared.gru, "RNN": _cells_shared.rnn}
        return functools.partial(in_threads[cell.kind], cell, machine)
    write = {"LSTM": _cells.lstm, "GRU": _cells.gru, "RNN": _cells.rnn}[cell.kind]
    count = len(state.arguments)

    def body(g: Buffer, *rest: Buffer) -> None:
        write(cell, state.weight(*rest[:count]), g, *rest[count:])

    return body


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
