"""Packed weights that a kernel decodes by itself, a tile at a time, into memory that stays in its caches.

Before fusion the decode is a stage of the kernel's tensor expression: what it means, and what runs where no loops are
written. The stage's annotation says how the codes stand, so that the loops that are written after fusion find words,
codebook and factors in it, and decode what they need where they need it.

    Σ_k x[k] · s[o] · codebook[code[o, k]] = s[o] · Σ_k x[k] · codebook[code[o, k]]

A scale for each output multiplies the sums, not the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _choice, _decode, _loops, _weights
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._expressions import is_load, walk
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._table import Form, Table

# The name of the block annotation.
_ANNOTATION = "mc_decode"
_NUMBERS = len(dataclasses.fields(Form))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight [t, *inner, c] in codes, as the sum of terms in one order.

    Attributes:
        terms: the terms, of codes of one width.
        factor: what each output's sum is multiplied by, [t · c]; None where the weights are scaled already.
        stored: how they are stored, in words: `4 bits, groups of 64`.
    """

    terms: tuple[Tiles, ...]
    factor: np.ndarray | None
    stored: str

    def arguments(self, e: Emitter) -> list[relax.Expr]:
        """What the stage is given: the arrays of each term, then the factor."""
        arrays = [a for tiles in self.terms for a in _decode.arrays_of(tiles)]
        return [e.weight(a) for a in [*arrays, *([] if self.factor is None else [self.factor])]]

    def stage(self, tensors: Sequence[te.Tensor]) -> tuple[te.Tensor, te.Tensor | None, Sequence[te.Tensor]]:
        """The weight decoded, the factor, and the tensors that are not theirs."""
        values, rest = [], list(tensors)
        for tiles in self.terms:
            count = len(_decode.arrays_of(tiles))
            values.append(_decode.element_of(tiles, rest[:count]))
            rest = rest[count:]
        factor = None if self.factor is None else rest.pop(0)

        def element(*i: Expr) -> Expr:
            total = values[0](*i)
            for value in values[1:]:
                total = total + value(*i)
            return total

        numbers = [int(n) for tiles in self.terms for n in dataclasses.astuple(tiles.form)]
        return te.compute(self.terms[0].shape, element, name="decode", attrs={_ANNOTATION: numbers}), factor, rest


def takes(e: Emitter, terms: Sequence[LookupWeight]) -> bool:
    """Whether kernels decode the sum of packed weights by themselves; a GPU's do so in expressions."""
    return e.machine.kind != "cuda" and len({term.bits for term in terms}) == 1


def arranged(
    e: Emitter, value: onnx_ir.Value, pack: Callable[[np.ndarray], np.ndarray], *, told: bool = False
) -> Packed | None:
    """A weight that `takes` takes, in the order that `pack` gives a dense one; None where its codes do not allow it.

    `told` says that the report knows already that 8-bit activations are not for this weight.
    """
    lookups = _decode.terms(e, value)
    terms = [tiles for tiles in (_decode.arrange(lookup, pack, e.machine) for lookup in lookups) if tiles is not None]
    if len(terms) < len(lookups):
        return None
    if not told:
        _weights.note_float32(e, value)
    first, *others = terms
    stored = described(lookups)
    if others or first.scale is None or first.offset is not None or first.group is not None:
        return Packed(tuple(terms), None, stored)
    return Packed((dataclasses.replace(first, scale=None),), np.ascontiguousarray(first.scale.reshape(-1)), stored)


def described(terms: Sequence[LookupWeight]) -> str:
    """How the sum of packed weights is stored, in words."""
    return " + ".join(map(_described, terms))


def _described(term: LookupWeight) -> str:
    parts = [f"{term.bits} bits"]
    if term.group_size:
        parts.append(f"groups of {term.group_size}")
    if term.codebook.ndim > 1:
        parts.append(f"codebooks {_choice.by(*term.codebook.shape)}")
    return ", ".join([*parts, *(["offsets"] if term.offset is not None else [])])


def is_stage(block: Any) -> bool:
    """Whether a block decodes a weight for the kernel that it is in."""
    return _ANNOTATION in block.annotations


class Decoder:
    """Writes the loops of a stage."""

    def __init__(self, block: Any, machine: Machine) -> None:
        numbers = [int(n) for n in block.annotations[_ANNOTATION]]
        forms = [_form(numbers[k : k + _NUMBERS]) for k in range(0, len(numbers), _NUMBERS)]
        self.weight = block.body.buffer
        self.per, self._lanes, self._columns = forms[0].per, forms[0].lanes, forms[0].columns
        self.instructions = sum(form.instructions(machine) for form in forms)  # to decode a vector in registers
        self._terms: list[tuple[Buffer, Table]] = []
        value = block.body.value
        for form in reversed(forms[1:]):
            self._terms.insert(0, _term(value.b, form, machine))
            value = value.a
        self._terms.insert(0, _term(value, forms[0], machine))

    def decode(
        self, dense: Buffer, row: Expr | int, panel: Expr, first: Expr | int, count: int, *, held: int, unit: int
    ) -> None:
        """Decode `count` rows of a panel, from `first` on, a multiple of `unit`: `held` vectors of each.

        dense: [rows · columns], written from `row` on.
        """
        per = self.per
        if unit % per:
            with T.serial(0, count) as i:
                k = first + i
                shift = (k % per * self._terms[0][1].form.bits).astype("int32")
                self._rows(dense, row + i, panel, k, range(1), held, lambda word: self._shifted(word, shift))
            return
        if count // per:
            with T.serial(0, count // per) as i:
                self._rows(dense, row + i * per, panel, first + i * per, range(per), held)
        if count % per:
            done = count // per * per
            self._rows(dense, row + done, panel, first + done, range(count % per), held)

    def value(self, panel: Expr, v: int, first: Expr, code: int) -> Expr:
        """Vector v of row `first` + `code` of a panel, where row `first` begins a word."""
        total: Expr | None = None
        for words, table in self._terms:
            word = _loops.load(words, panel, v, first // self.per, 0, lanes=self._lanes)
            part = table.weight(word, code, panel, v, first + code)
            total = part if total is None else total + part
        return total

    def _shifted(self, word: Expr, shift: Expr) -> Expr:
        return T.shift_right(word, _loops.splat(shift, self._lanes, "int32"))

    def _rows(
        self,
        dense: Buffer,
        row: Expr | int,
        panel: Expr,
        k: Expr | int,
        codes: range,
        held: int,
        ready: Callable[[Expr], Expr] = lambda word: word,
    ) -> None:
        """The rows of the weight that are `codes` of the word of row k."""
        lanes = self._lanes
        for v in range(held):
            words = [ready(_loops.load(words, panel, v, k // self.per, 0, lanes=lanes)) for words, _ in self._terms]
            for j in codes:
                parts = [t.weight(w, j, panel, v, k + j) for w, (_, t) in zip(words, self._terms, strict=True)]
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
                _loops.store(dense, total, (row + j) * self._columns + v * lanes, lanes=lanes)


def _form(numbers: Sequence[int]) -> Form:
    bits, lanes, columns, entries, groups, *flags = numbers
    return Form(bits, lanes, columns, entries, groups, *(bool(flag) for flag in flags))


def _term(value: Expr, form: Form, machine: Machine) -> tuple[Buffer, Table]:
    """The words and the table of the expression that `_decode.element_of` makes of a form."""
    loads = [x for x in walk(value) if is_load(x)]
    scale = offset = None
    if form.has_offset:
        value, offset = value.a, value.b.source
    if form.has_scale:
        value, scale = value.a, value.b.source
    codebook = next(x.source for x in walk(value.b if form.is_even else value) if is_load(x))
    words = next(x.source for x in loads if len(x.indices) == 4)
    group = next((x.source for x in loads if len(x.indices) == 1 and not x.source.same_as(codebook)), None)
    return words, Table(form, machine, codebook, [b for b in (scale, offset, group) if b is not None])
