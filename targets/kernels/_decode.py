"""Packed weights to dense ones at run time, in the order in which their consumer reads them.

The artefact holds codes. While building, they are put into the consumer's order (its own packing,
applied to the codes), then packed again so that one vector of words holds the codes of as many
vectors of weights as fit. Products, convolutions and cells of few steps decode them as they multiply (`_packed`,
`lookup_gemv`, `_cells_product`); for what does not, depthwise layers and cells of many steps among them, a kernel
decodes them into a planned buffer in front of each use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.ir import canonical, restore, unpack_codes
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _loops, _pshufb, _table, _tbl
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._table import Form, Table

Pack = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A weight in a consumer's order: dense [t, *inner, c], whose codes are packed as below; K = Π inner.

    Attributes:
        shape: (t, *inner, c).
        words: int32 [t, c / lanes, ceil(K / per), lanes]: code j of a word is row (word · per + j); or their bytes in
            the order of `_pshufb`.
        codebook: shared: [n] filled up to 2^bits and repeated up to whole registers, so that a permutation by a
            lane's low bits finds it whatever stands above them; of 1 or 2 bits with AVX-512 a register for each code
            of four bits, so that it finds them all by one index; or what `_tbl.tables` or `_pshufb.tables` makes of
            it; or one a group: [t, c, G, n], flat; or [1], the code of zero of entries in even steps, whose step is in
            the scale.
        scale: None, or [t, G, c].
        offset: None, or [t, G, c].
        group: int32 [K], the group of each row; None when there is one group.
        bits: width of a code.
        entries: 0 for a shared codebook, else the size n of each.
        step: what the scales have in them: of entries in even steps, or of short ones; else None.
        is_in_bytes: whether codebook and words are those of `_pshufb`.
    """

    shape: tuple[int, ...]
    words: np.ndarray
    codebook: np.ndarray
    scale: np.ndarray | None
    offset: np.ndarray | None
    group: np.ndarray | None
    bits: int
    entries: int
    step: np.float32 | None
    is_in_bytes: bool = False

    @property
    def per(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def depth(self) -> int:
        """K, the rows of a tile."""
        return math.prod(self.shape[1:-1])

    @property
    def lanes(self) -> int:
        """Lanes of a vector of words."""
        return int(self.words.shape[-1])

    @property
    def form(self) -> Form:
        """What loops over it depend on."""
        tables = self.codebook.dtype == np.int8
        return Form(
            bits=self.bits,
            lanes=self.lanes,
            columns=self.shape[-1],
            entries=self.entries,
            groups=1 if self.group is None else int(self.group.max()) + 1,
            has_scale=self.scale is not None,
            has_offset=self.offset is not None,
            is_short=tables and not self.is_in_bytes and _tbl.is_short(self.codebook),
            is_even=self.step is not None and not self.is_in_bytes,
            is_in_bytes=self.is_in_bytes,
        )


def terms(e: Emitter, value: onnx_ir.Value | None) -> tuple[LookupWeight, ...]:
    """The packed weights of one shape whose sum a value is, as shift codes of two terms; none of any other value."""
    lookup = e.lookup(value)
    if lookup is not None:
        return (lookup,)
    node = None if value is None else value.producer()
    if node is None or node.domain or node.op_type != "Add":
        return ()
    parts = [terms(e, v) for v in node.inputs]
    found = tuple(lookup for part in parts for lookup in part)
    return found if all(parts) and len({lookup.shape for lookup in found}) == 1 else ()


def added(e: Emitter, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """The sum of two values of one shape."""
    return e.te(lambda x, y: te.compute(x.shape, lambda *i: x(*i) + y(*i), name="added"), a, b, name="added")


def codes_of(weight: LookupWeight) -> np.ndarray:
    """The codes in the weight's own shape, uint8."""
    rows = math.prod(weight.shape[a] for a in weight.axes)
    columns = math.prod(weight.shape) // max(rows, 1)
    flat = unpack_codes(weight.codes, weight.bits, rows * columns)
    return restore(flat.reshape(rows, columns), weight.shape, weight.axes)


def arrange(weight: LookupWeight, pack: Pack, machine: Machine, *, by_word: bool = False) -> Tiles | None:
    """The weight in the order that `pack` gives a dense one; `by_word` for a consumer that decodes words as a whole.

    None when a column of a tile is not one row of the weight, or the rows of a tile are not in one group each:
    then a consumer decodes the weight in its own shape.
    """
    if weight.codebook.dtype != np.float32:
        return None
    codes = pack(codes_of(weight))
    tiles, *inner, columns = codes.shape
    depth = math.prod(inner)
    lanes = math.gcd(columns, machine.lanes)
    words = _words(codes.reshape(tiles, depth, columns), weight.bits, lanes)
    shared = weight.codebook.size == weight.codebook.shape[-1]
    in_bytes = by_word and shared and _table.takes_pshufb(weight.bits, lanes, machine)
    short = _pshufb.tables(weight.codebook) if in_bytes else None
    even = _table.even(weight.codebook, weight.bits, lanes, machine) if shared else None
    book, step = short or even or (None, None)
    if _is_uniform(weight):
        row, group, groups = np.zeros((tiles, columns), np.int32), np.zeros(depth, np.int32), 1
    else:
        found = _structure(weight, pack, (tiles, depth, columns))
        if found is None:
            return None
        row, group = found
        groups = int(group.max()) + 1
    if book is None:
        book = (
            _shared(weight.codebook, weight.bits, lanes, machine)
            if shared
            else _spread_books(weight.codebook, row, groups)
        )
    scale = weight.scale
    if step is not None:
        scale = step * (np.ones((1, 1), np.float32) if scale is None else scale)
    return Tiles(
        shape=codes.shape,
        words=words if short is None else _pshufb.in_order(words),
        codebook=book,
        scale=_spread(scale, row, groups),
        offset=_spread(weight.offset, row, groups),
        group=group if groups > 1 else None,
        bits=weight.bits,
        entries=0 if shared else weight.codebook.shape[-1],
        step=step,
        is_in_bytes=short is not None,
    )


def fits(weight: LookupWeight, pack: Pack) -> bool:
    """Whether `arrange` can give the weight in this order, at any number of columns a tile."""
    if weight.codebook.dtype != np.float32:
        return False
    if _is_uniform(weight):
        return True
    tiles, *inner, columns = pack(np.zeros(weight.shape, np.uint8)).shape
    return _structure(weight, pack, (tiles, math.prod(inner), columns)) is not None


def _is_uniform(weight: LookupWeight) -> bool:
    """One scale, offset and codebook for all."""
    parts = [a for a in (weight.scale, weight.offset, weight.codebook) if a is not None]
    return all(a.size == 1 or a.ndim == 1 or a.shape[:2] == (1, 1) for a in parts)


def _words(codes: np.ndarray, bits: int, lanes: int) -> np.ndarray:
    """codes: [t, K, c] -> int32 [t, c / lanes, ceil(K / per), lanes]."""
    tiles, depth, columns = codes.shape
    per = 32 // bits
    filled = np.zeros((tiles, -(-depth // per) * per, columns), np.uint8)
    filled[:, :depth] = codes
    split = filled.reshape(tiles, -1, per, columns // lanes, lanes)
    words = np.zeros((tiles, split.shape[1], columns // lanes, lanes), np.uint32)
    for j in range(per):
        words |= split[:, :, j].astype(np.uint32) << np.uint32(j * bits)
    return np.ascontiguousarray(words.transpose(0, 2, 1, 3)).view(np.int32)


def _structure(weight: LookupWeight, pack: Pack, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """(row [t, c] of each column, 0 where it is filling; group [K] of each row of the tiles)."""
    matrix = canonical(np.empty(weight.shape, np.uint8), weight.axes)
    rows, columns = matrix.shape
    # Counted from 1, for packing fills up with zeros.
    numbers = np.broadcast_to(np.arange(1, rows + 1, dtype=np.int32)[:, None], (rows, columns))
    row = pack(restore(numbers, weight.shape, weight.axes)).reshape(shape)
    highest = row.max(axis=1)
    if not np.all((row == highest[:, None]) | (row == 0)):
        return None
    size = weight.group_size or columns
    numbers = np.broadcast_to((np.arange(columns, dtype=np.int32) // size + 1)[None], (rows, columns))
    group = pack(restore(np.ascontiguousarray(numbers), weight.shape, weight.axes)).reshape(shape)
    deepest = group.max(axis=(0, 2))
    if not np.all((group == deepest[None, :, None]) | (group == 0)):
        return None
    return np.maximum(highest - 1, 0), np.maximum(deepest - 1, 0).astype(np.int32)


def _spread(value: np.ndarray | None, row: np.ndarray, groups: int) -> np.ndarray | None:
    """value: [R|1, G|1] -> [t, groups, c]."""
    if value is None:
        return None
    value = value.reshape(1, 1) if value.size == 1 else value
    count = int(row.max()) + 1
    full = np.broadcast_to(value.astype(np.float32), (max(value.shape[0], count), groups))
    return np.ascontiguousarray(full[row].transpose(0, 2, 1))


def _shared(codebook: np.ndarray, bits: int, lanes: int, machine: Machine) -> np.ndarray:
    """codebook: n values in any shape -> [max(2^bits, lanes)], or tables; see `Tiles`."""
    if _table.takes_tbl(bits, lanes, machine):
        return _tbl.tables(codebook)
    full = np.zeros(1 << bits, np.float32)
    full[: codebook.size] = codebook.reshape(-1)
    if lanes == _table.WIDE and bits <= 2:
        index = np.arange(_table.WIDE)
        return np.concatenate([full[(index >> at) % (1 << bits)] for at in range(0, 4, bits)])
    return np.tile(full, max(1, lanes >> bits))


def _spread_books(codebook: np.ndarray, row: np.ndarray, groups: int) -> np.ndarray:
    """codebook: [R|1, G|1, n] -> [t, c, groups, n], flat."""
    count = max(int(row.max()) + 1, codebook.shape[0])
    full = np.broadcast_to(codebook, (count, groups, codebook.shape[-1]))
    return np.ascontiguousarray(full[row]).reshape(-1)


def tiled(e: Emitter, weight: LookupWeight, pack: Pack) -> relax.Expr | None:
    """Emit the kernel that decodes a weight into `pack`'s order; None when the order does not allow it."""
    tiles = arrange(weight, pack, e.machine, by_word=True)
    if tiles is None:
        return None
    arrays = arrays_of(tiles)
    if e.machine.kind == "cuda":
        e.note_kernel(f"decode in its consumer: {tiles.bits} bits, {'x'.join(map(str, weight.shape))}")

        def dense(*tensors: te.Tensor) -> te.Tensor:
            return te.compute(tiles.shape, element_of(tiles, tensors), name="decode")

        return e.moved(dense, *[e.weight(a) for a in arrays], name="decode")
    arguments = [(a.shape, str(a.dtype)) for a in arrays]
    body = functools.partial(_decode_body, tiles, e.machine)
    function = _loops.kernel([*arguments, (tiles.shape, "float32")], body)
    e.note_kernel(f"decode: {tiles.bits} bits, {'x'.join(map(str, weight.shape))}")
    return e.call(function, [e.weight(a) for a in arrays], [(tiles.shape, "float32")], name="decode")[0]


def arrays_of(tiles: Tiles) -> list[np.ndarray]:
    """The arrays that a kernel is given, in order."""
    found = (tiles.words, tiles.codebook, tiles.scale, tiles.offset, tiles.group)
    return [a for a in found if a is not None]


def element_of(tiles: Tiles, tensors: Sequence[te.Tensor]) -> Callable[..., Expr]:
    """An element of the weight [t, *inner, c] as an expression of its own, given the tensors of `arrays_of`."""
    words, codebook, *extra = tensors
    scale = extra.pop(0) if tiles.scale is not None else None
    offset = extra.pop(0) if tiles.offset is not None else None
    group = extra.pop(0) if tiles.group is not None else None
    form = tiles.form

    def element(t: Expr, *i: Expr) -> Expr:
        *inner, c = i
        k: Expr = tirx.const(0, "int32")
        for position, extent in zip(inner, tiles.shape[1:-1], strict=True):
            k = k * extent + position
        g = tirx.const(0, "int32") if group is None else group(k)
        word = words(t, c // tiles.lanes, k // tiles.per, c % tiles.lanes)
        code = (word >> (k % tiles.per * tiles.bits)) & tirx.const((1 << tiles.bits) - 1)
        if tiles.entries:
            code = ((t * form.columns + c) * form.groups + g) * tiles.entries + code
        if form.is_even:
            value = code.astype("float32") - codebook(0)
        else:
            value = _tbl.entry(codebook, code) if str(codebook.dtype) == "int8" else codebook(code)
        if scale is not None:
            value = value * scale(t, g, c)
        return value if offset is None else value + offset(t, g, c)

    return element


def _decode_body(tiles: Tiles, machine: Machine, words: Buffer, codebook: Buffer, *rest: Buffer) -> None:
    *extra, dense = rest
    lanes, per, depth = tiles.lanes, tiles.per, tiles.depth
    count, _, columns = tiles.shape[0], depth, tiles.shape[-1]
    table = Table(tiles.form, machine, codebook, extra)

    def rows(t: Expr, v: Expr, w: Expr, number: int) -> None:
        word = _loops.load(words, t, v, w, 0, lanes=lanes)
        for j in range(number):
            k = w * per + j
            value = table.weight(word, j, t, v, k)
            _loops.store(dense, value, t, *_unravel(k, tiles.shape[1:-1]), v * lanes, lanes=lanes)

    with _loops.each(count, machine, work=count * depth * columns) as t, T.serial(0, columns // lanes) as v:
        if depth // per:
            with T.serial(0, depth // per) as w:
                rows(t, v, w, per)
        if depth % per:
            rows(t, v, tirx.const(depth // per, "int32"), depth % per)


def _unravel(k: Expr, extents: tuple[int, ...]) -> list[Expr]:
    """Row-major indices of element k in a box."""
    index: list[Expr] = []
    for extent in reversed(extents[1:]):
        index.insert(0, tirx.floormod(k, extent))
        k = tirx.floordiv(k, extent)
    return [k, *index]


def operands(
    tiles: Tiles, machine: Machine, codebook: Buffer, rest: Sequence[Buffer], *, has_bias: bool
) -> tuple[Table, Buffer | None, Buffer]:
    """What a product's kernel is given behind its words: the codebook with its factors, the bias and the output."""
    *factors, out = rest
    bias = factors.pop() if has_bias else None
    return Table(tiles.form, machine, codebook, factors), bias, out


def run_of(tiles: Tiles, word: int) -> int:
    """Rows of a group where each is one run of whole words of so many rows, the last may be short; else 0."""
    if tiles.group is None:
        return 0
    size = int(np.count_nonzero(tiles.group == tiles.group[0]))
    runs = np.arange(tiles.depth, dtype=np.int32) // size
    return size if size % word == 0 and np.array_equal(tiles.group, runs) else 0
