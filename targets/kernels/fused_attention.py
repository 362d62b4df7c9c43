"""Attention of whole sequences: the scores of a tile of query rows stay in the cache between the two products.

    y[m] = Σ_n e^(a_mn - h_m) v[n] / Σ_n e^(a_mn - h_m),   a_mn = s q[m]·k[n] + mask[m, n],   h_m = max_n a_mn

It stands in the model as MatMul, Mul or Div by a number, Add of the mask, Softmax, MatMul; the last one is where the
chain is found, and what the ones before it had emitted is then dead. Keys and values that groups of heads share are
read where they are, not repeated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import onnx_ir
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _loops, _math, _tile, gemm
from mc_opt.targets.kernels._loops import Buffer, Expr

_LOWEST = -3.4028234663852886e38
# Fewer query rows than this leave the processor waiting for single sums; products of their own do better.
_FEWEST_ROWS = 4


@dataclasses.dataclass(frozen=True)
class _Chain:
    """What the nodes of one attention compute from: `scale` q·k + mask; `shared` heads read the same keys."""

    q: onnx_ir.Value
    k: onnx_ir.Value
    k_transposed: bool
    v: onnx_ir.Value
    mask: onnx_ir.Value | None
    scale: float
    shared: int


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Rows of a tile, and the vectors of the two products: (columns of a tile, lanes)."""

    rows: int
    keys: tuple[int, int]
    values: tuple[int, int]


def matmul(e: Emitter, node: onnx_ir.Node) -> None:
    """MatMul: the end of an attention, or a product of its own."""
    chain = None if e.machine.kind == "cuda" else _find(e, node)
    if chain is None:
        gemm.matmul(e, node)
        return
    _emit(e, node, chain)


# the chain


def _find(e: Emitter, node: onnx_ir.Node) -> _Chain | None:
    """The attention that ends with this MatMul, when a kernel takes its shapes."""
    weights, v = node.inputs
    softmax = _made_by(weights, "Softmax")
    if softmax is None or v is None or len(e.shape(v)) < 3:
        return None
    scores = softmax.inputs[0]
    if scores is None or int(e.attribute(softmax, "axis", -1)) not in (-1, len(e.shape(scores)) - 1):
        return None
    found = _product_before(e, scores)
    mask: onnx_ir.Value | None = None
    added = _made_by(scores, "Add")
    if found is None and added is not None:
        left, right = added.inputs
        found, mask = _product_before(e, left), right
        if found is None:
            found, mask = _product_before(e, right), left
    if found is None:
        return None
    (q, k), scale = found[0].inputs, found[1]
    assert q is not None and k is not None
    chain = _grouped(e, _Chain(q=q, k=k, k_transposed=False, v=v, mask=mask, scale=scale, shared=1))
    return chain if _fits(e, chain) else None


def _made_by(value: onnx_ir.Value | None, *kinds: str) -> onnx_ir.Node | None:
    """The node of one of these kinds that makes a value for nobody but its one reader."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    node = value.producer()
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def _product_before(e: Emitter, value: onnx_ir.Value | None) -> tuple[onnx_ir.Node, float] | None:
    """The MatMul that a value comes from, and the number that it is multiplied by."""
    scaled = _made_by(value, "Mul", "Div")
    factor = None if scaled is None else e.constant(scaled.inputs[1])
    if scaled is None or factor is None or factor.size != 1:
        product, number = _made_by(value, "MatMul"), 1.0
    else:
        number = float(factor.reshape(-1)[0])
        number = number if scaled.op_type == "Mul" else 1.0 / number
        product = _made_by(scaled.inputs[0], "MatMul")
    return None if product is None else (product, number)


def _grouped(e: Emitter, chain: _Chain) -> _Chain:
    """The chain on keys and values before they were repeated for the heads that share them."""
    transpose = _made_by(chain.k, "Transpose")
    keys = None if transpose is None else transpose.inputs[0]
    if keys is None or transpose is None or tuple(e.attribute(transpose, "perm", ())) != (0, 1, 3, 2):
        return chain
    k, v = _unrepeated(e, keys), _unrepeated(e, chain.v)
    if k is None or v is None or k[1] != v[1]:
        return chain
    return dataclasses.replace(chain, k=k[0], k_transposed=True, v=v[0], shared=k[1])


def _unrepeated(e: Emitter, value: onnx_ir.Value) -> tuple[onnx_ir.Value, int] | None:
    """[b, h, n, d] and r, when `value` [b, h·r, n, d] is each head r times: Unsqueeze, Expand and Reshape."""
    reshape = _made_by(value, "Reshape")
    expand = None if reshape is None else _made_by(reshape.inputs[0], "Expand")
    unsqueeze = None if expand is None else _made_by(expand.inputs[0], "Unsqueeze")
    if expand is None or unsqueeze is None or unsqueeze.inputs[0] is None:
        return None
    source = unsqueeze.inputs[0]
    whole, wide, narrow = e.shape(value), e.shape(expand.outputs[0]), e.shape(source)
    if len(narrow) != 4 or len(wide) != 5 or not isinstance(wide[2], int):
        return None
    batch, heads, length, size = narrow
    repeated = (batch, dims.product([heads, wide[2]]), length, size)
    if not dims.same_shape(wide, (batch, heads, wide[2], length, size)) or not dims.same_shape(whole, repeated):
        return None
    return source, wide[2]


def _sizes(e: Emitter, chain: _Chain) -> tuple[tuple[Dim, ...], Dim, Dim, Dim, Dim]:
    """The leading axes of q, then query rows, keys, size of a key, size of a value."""
    *lead, rows, size = e.shape(chain.q)
    return tuple(lead), rows, e.shape(chain.v)[-2], size, e.shape(chain.v)[-1]


def _fits(e: Emitter, chain: _Chain) -> bool:
    lead, rows, length, size, width = _sizes(e, chain)
    if not lead or not dims.is_static((*lead[1:], size, width)) or (isinstance(rows, int) and rows < _FEWEST_ROWS):
        return False
    if 0 in (*lead, rows, length, size, width) or any(e.dtype(x) != "float32" for x in (chain.q, chain.k, chain.v)):
        return False
    shared = (*lead[:-1], dims.divide(lead[-1], chain.shared))
    keys = (*shared, length, size) if chain.k_transposed else (*shared, size, length)
    if not dims.same_shape(e.shape(chain.k), keys) or not dims.same_shape(e.shape(chain.v)[:-2], shared):
        return False
    if chain.mask is None:
        return True
    mask, full = e.shape(chain.mask), (*lead, rows, length)
    if e.dtype(chain.mask) != "float32" or not 1 <= len(mask) <= len(full) or not dims.same(mask[-1], length):
        return False
    return all(dims.same(a, 1) or dims.same(a, b) for a, b in zip(mask, full[len(full) - len(mask) :], strict=True))


# the kernel


def _emit(e: Emitter, node: onnx_ir.Node, chain: _Chain) -> None:
    lead, rows, length, size, width = _sizes(e, chain)
    outer = dims.product(lead)
    inner = dims.product((*lead[:-1], dims.divide(lead[-1], chain.shared)))
    tiling = _tiling(rows, length, width, e.machine)
    q = e.reshape(e.plain(chain.q), (outer, rows, size))
    k = gemm.pack_dynamic(e, e.plain(chain.k), tiling.keys[0], transposed=chain.k_transposed)
    v = gemm.pack_dynamic(e, e.plain(chain.v), tiling.values[0])
    k, v = e.reshape(k, (inner, *dims.sizes(k)[-3:])), e.reshape(v, (inner, *dims.sizes(v)[-3:]))
    arguments: list[relax.Expr] = [q, k, v]
    if chain.mask is not None:
        mask = e.shape(chain.mask)
        arguments.append(e.reshape(e.plain(chain.mask), (1,) * (len(lead) + 2 - len(mask)) + tuple(mask)))
    shapes = [_loops.inside(dims.sizes(a)) for a in arguments]
    result = (*shapes[0][:2], width)
    body = functools.partial(_body, tiling, shapes, lead[1:], width, chain, e.machine)
    function = _loops.kernel([(s, "float32") for s in (*shapes, result)], body)
    y = e.call(function, arguments, [((outer, rows, width), "float32")], name="attention")[0]
    e.note_kernel(f"attention {node.name}: {'x'.join(map(dims.text, lead))} heads, values of {width}")
    e.set(node.outputs[0], e.reshape(y, (*lead, rows, width)))


def _tiling(rows: Dim, length: Dim, width: int, machine: Machine) -> _Tiling:
    """Two vectors of columns and as many rows as registers hold, with few rows computed in vain."""
    keys = _tile.vector_width(length if isinstance(length, int) else machine.lanes, machine)
    values = _tile.vector_width(width, machine)
    most = (machine.registers - 4) // 2
    if not isinstance(rows, int) or not isinstance(length, int):
        most = min(most, 8)  # rows are addressed one by one, and more addresses than this do not stay in registers
    chosen = most
    if isinstance(rows, int):  # a tile reads keys and values once, which counts as one row more
        chosen = min(range(1, min(most, rows) + 1), key=lambda n: (-(-rows // n) * (n + 1), -n))
    return _Tiling(chosen, (2 * keys, keys), (2 * values if width > values else values, values))


def _body(
    tiling: _Tiling,
    shapes: Sequence[Sequence[Dim]],
    heads: Sequence[int],
    width: int,
    chain: _Chain,
    machine: Machine,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    *rest: Buffer,
) -> None:
    (outer, rows, size), (_, key_tiles, _, key_columns), (_, _, length, _) = shapes[:3]
    mask, y = (rest[0] if len(rest) > 1 else None), rest[-1]
    lanes = tiling.keys[1]
    tiles = dims.tiles(rows, tiling.rows)
    pitch = key_tiles * key_columns
    with _loops.each(outer * tiles, machine, work=2 * outer * rows * length * (size + width)) as number:
        head, first = number // tiles, number % tiles * tiling.rows
        queries = T.sblock_alloc_buffer((tiling.rows * size,), "float32")
        scores = T.sblock_alloc_buffer((tiling.rows * pitch,), "float32")
        highest, total = _loops.registers(tiling.rows, 1), _loops.registers(tiling.rows, 1)

        def row(r: Expr) -> Expr:
            # Rows beyond the end are the last one again, computed and written with the same result.
            return first + r if dims.factor(rows) % tiling.rows == 0 else tirx.min(first + r, rows - 1)

        def scaled(r: Expr, i: Expr, wide: int) -> None:
            value = _loops.load(q, head, row(r), i, lanes=wide) * _loops.splat(chain.scale, wide)
            _loops.store(queries, value, r * size + i, lanes=wide)

        with T.serial(0, tiling.rows) as r:
            _loops.map_row(functools.partial(scaled, r), size, lanes=machine.lanes)
        shared = head // chain.shared if chain.shared > 1 else head
        with T.serial(0, key_tiles) as t:
            sums = _product(tiling.rows, tiling.keys, size, (queries, size), (k, shared, t))
            for r, held in enumerate(sums):
                for c in range(0, tiling.keys[0], lanes):
                    place = r * pitch + t * key_columns + c
                    _loops.store(scores, _loops.load(held, c, lanes=lanes), place, lanes=lanes)
        with T.serial(0, tiling.rows) as r:
            at = None if mask is None else (mask, _mask_index(head, row(r), heads, shapes[3]))
            T.buffer_store(highest, _masked_maximum(scores, r * pitch, length, lanes, at), [r])
        with T.serial(0, tiling.rows) as r:
            T.buffer_store(total, _exponentials(scores, r * pitch, length, lanes, highest[r]), [r])
        columns, vector = tiling.values
        for t in range(-(-width // columns)):
            sums = _product(tiling.rows, tiling.values, length, (scores, pitch), (v, shared, t))
            for r, held in enumerate(sums):
                for start, count, wide in _loops.split(min(columns, width - t * columns), vector):
                    for c in range(start, start + count * wide, wide):
                        mean = _loops.load(held, c, lanes=wide) / _loops.splat(total[r], wide)
                        _loops.store(y, mean, head, row(r), t * columns + c, lanes=wide)


def _mask_index(head: Expr, row: Expr, heads: Sequence[int], shape: Sequence[Dim]) -> list[Expr]:
    """Where the mask's row for one query row of one head is; `heads` are the leading axes of q but the first."""
    index = [row]
    for extent in reversed(heads):
        index.append(head % extent)
        head = head // extent
    index.append(head)
    return [0 if dims.same(n, 1) else i for i, n in zip(reversed(index), shape[:-1], strict=True)]


def _product(
    rows: int,
    columns: tuple[int, int],
    steps: Dim,
    left: tuple[Buffer, Dim],
    right: tuple[Buffer, Expr, Expr],
) -> list[Buffer]:
    """Σ_i left[r, i] · right[outer, tile, i], a buffer of registers for every row r."""
    wide, lanes = columns
    sums = [_loops.registers(wide // lanes, lanes) for _ in range(rows)]
    for held in sums:
        for c in range(0, wide, lanes):
            _loops.store(held, _loops.splat(0.0, lanes), c, lanes=lanes)
    (source, pitch), (packed, outer, tile) = left, right
    with T.serial(0, steps) as i:
        for r, held in enumerate(sums):
            for c in range(0, wide, lanes):
                term = _loops.splat(source[r * pitch + i], lanes) * _loops.load(packed, outer, tile, i, c, lanes=lanes)
                _loops.store(held, _loops.load(held, c, lanes=lanes) + term, c, lanes=lanes)
    return sums


def _masked_maximum(
    scores: Buffer, start: Expr, length: Dim, lanes: int, mask: tuple[Buffer, list[Expr]] | None
) -> Expr:
    """Add the mask to a row of scores, end its last vector with what weighs nothing, and return its maximum."""
    held = _loops.registers(1, lanes)
    _loops.store(held, _loops.splat(_LOWEST, lanes), 0, lanes=lanes)

    def masked(i: Expr, wide: int) -> Expr:
        if mask is not None:
            added = _loops.load(scores, start + i, lanes=wide) + _loops.load(mask[0], *mask[1], i, lanes=wide)
            _loops.store(scores, added, start + i, lanes=wide)
        return _loops.load(scores, start + i, lanes=wide)

    def keep(value: Expr) -> None:
        _loops.store(held, tirx.max(_loops.load(held, 0, lanes=lanes), value), 0, lanes=lanes)

    whole = length // lanes
    if not dims.same(whole, 0):
        with T.serial(0, whole) as i:
            keep(masked(i * lanes, lanes))
    if dims.factor(length) % lanes:
        end = dims.tiles(length, lanes) * lanes
        if mask is not None:
            with T.serial(0, length - whole * lanes) as i:
                masked(whole * lanes + i, 1)
        with T.serial(0, end - length) as i:
            T.buffer_store(scores, tirx.const(float("-inf"), "float32"), [start + length + i])
        keep(_loops.load(scores, start + end - lanes, lanes=lanes))
    return _fold(_loops.load(held, 0, lanes=lanes), lanes, tirx.max)


def _exponentials(scores: Buffer, start: Expr, length: Dim, lanes: int, highest: Expr) -> Expr:
    """Replace a row of scores by e^(score - highest), and return their sum."""
    held = _loops.registers(1, lanes)
    _loops.store(held, _loops.splat(0.0, lanes), 0, lanes=lanes)
    with T.serial(0, dims.tiles(length, lanes)) as i:
        shifted = _loops.load(scores, start + i * lanes, lanes=lanes) - _loops.splat(highest, lanes)
        value = _math.exp_not_positive(shifted)
        _loops.store(scores, value, start + i * lanes, lanes=lanes)
        value = _loops.load(held, 0, lanes=lanes) + _loops.load(scores, start + i * lanes, lanes=lanes)
        _loops.store(held, value, 0, lanes=lanes)
    return _fold(_loops.load(held, 0, lanes=lanes), lanes, _add)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _fold(x: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """One value of a vector's lanes, halves combined: a loop over them would wait for each."""
    while lanes > 1:
        lanes //= 2
        name = tirx.Var("x", str(x.ty))
        low, high = (tirx.Shuffle([name], list(range(start, start + lanes))) for start in (0, lanes))
        x = tirx.Let(name, x, combine(low, high))
    return x


HANDLERS: dict[str, Handler] = {"MatMul": matmul}
