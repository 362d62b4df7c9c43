"""Packed weights decoded two to a word, where the lower half of all entries is zero: half of the bytes of float32.

    word = entry(code of row 2k) >> 16  |  entry(code of row 2k + 1)

A shift or a mask makes float32 of either. Entries are so short when they are powers of two, or integers of up to 8
bits, times a step that the scales take over.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _loops, _pshufb
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._table import Table

_BITS, _UPPER = 16, -(1 << 16)


def short(weight: LookupWeight) -> LookupWeight | None:
    """The same weight with entries whose lower half is zero, and a scale a row; None where that cannot be."""
    if weight.offset is not None or weight.codebook.size != weight.codebook.shape[-1]:
        return None
    scale = np.ones((1, 1), np.float32) if weight.scale is None else weight.scale
    found = _pshufb.short(weight.codebook) if weight.codebook.dtype == np.float32 else None
    if found is None or scale.shape[1] != 1:
        return None
    entries, step = found
    return dataclasses.replace(weight, codebook=entries, scale=scale.astype(np.float32) * (step or np.float32(1)))


def takes(tiles: Tiles, machine: Machine) -> bool:
    """Whether words hold pairs of codes, whose entries come as they are."""
    return tiles.per % 2 == 0 and not tiles.form.is_even and tiles.form.is_vectorised(machine)


def decoded(e: Emitter, tiles: Tiles) -> relax.Expr:
    """A weight [t, K, c] of `short` -> int32 [t, ceil(K / 2), c], by a kernel in front of each call; not scaled."""
    arrays = [tiles.words, tiles.codebook]
    count, columns = tiles.shape[0], tiles.shape[-1]
    out = ((count, -(-tiles.depth // 2), columns), "int32")
    body = functools.partial(_body, tiles, e.machine)
    function = _loops.kernel([*[(a.shape, str(a.dtype)) for a in arrays], out], body)
    e.note_kernel(f"decode: {tiles.bits} bits, {'x'.join(map(str, tiles.shape))}, two in a word")
    return e.call(function, [e.weight(a) for a in arrays], [out], name="decode")[0]


def _body(tiles: Tiles, machine: Machine, words: Buffer, codebook: Buffer, out: Buffer) -> None:
    lanes, per, depth, columns = tiles.lanes, tiles.per, tiles.depth, tiles.shape[-1]
    form = dataclasses.replace(tiles.form, has_scale=False)
    table = Table(form, machine, codebook, [])
    whole, unsigned = f"int32x{lanes}", f"uint32x{lanes}"

    def pairs(t: Expr, v: Expr, w: Expr, number: int) -> None:
        word = _loops.load(words, t, v, w, 0, lanes=lanes)
        for j in range(0, number, 2):
            low = tirx.reinterpret(unsigned, table.value(word, j, t, v, 0))
            pair = tirx.reinterpret(whole, T.shift_right(low, _loops.splat(_BITS, lanes, "uint32")))
            if j + 1 < number:
                pair = T.bitwise_or(pair, tirx.reinterpret(whole, table.value(word, j + 1, t, v, 0)))
            _loops.store(out, pair, t, w * (per // 2) + j // 2, v * lanes, lanes=lanes)

    work = tiles.shape[0] * depth * columns
    with _loops.each(tiles.shape[0], machine, work=work) as t, T.serial(0, columns // lanes) as v:
        if depth // per:
            with T.serial(0, depth // per) as w:
                pairs(t, v, w, per)
        if depth % per:
            pairs(t, v, tirx.const(depth // per, "int32"), depth % per)


def parts(word: Expr, lanes: int) -> tuple[Expr, Expr]:
    """What a vector of words stands for: float32 of the even row and of the odd one behind it."""
    kind = f"float32x{lanes}"
    even = T.shift_left(word, _loops.splat(_BITS, lanes, "int32"))
    odd = T.bitwise_and(word, _loops.splat(_UPPER, lanes, "int32"))
    return tirx.reinterpret(kind, even), tirx.reinterpret(kind, odd)
