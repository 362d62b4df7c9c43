"""Codes in bytes and weights as matrices: the storage geometry that the decode ops share.

Codes of `bits` bits stand in one little-endian bit stream: bit `j` of the stream is bit `j % 8` of
byte `j // 8`, and code `i` takes bits `i·bits` to `(i+1)·bits − 1`. The stream is padded with zero
codes to a whole unit of 8 codes, which takes `bits` bytes at every width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body

UNIT = 8
# Rows are handled in blocks of about this many elements, so that temporaries stay small beside a large weight.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Geometry:
    """How a weight of `shape` becomes a matrix of rows and groups: [R, K], K cut into G groups of g (the last may be
    short).

    The rows are the positions along `axes`, in that order; the columns those along the other axes.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    group_size: int = 0

    @property
    def perm(self) -> tuple[int, ...]:
        """The transposition that brings the row axes to the front."""
        return self.axes + tuple(a for a in range(len(self.shape)) if a not in self.axes)

    @property
    def inverse(self) -> tuple[int, ...]:
        """The transposition that brings them back."""
        return tuple(self.perm.index(a) for a in range(len(self.shape)))

    @property
    def is_transposed(self) -> bool:
        """Whether the weight's own order differs from the matrix's."""
        return self.perm != tuple(range(len(self.shape)))

    @property
    def rows(self) -> int:
        """R."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def columns(self) -> int:
        """K."""
        return math.prod(d for a, d in enumerate(self.shape) if a not in self.axes)

    @property
    def count(self) -> int:
        """R·K."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """g: columns of a group."""
        return min(self.group_size, self.columns) or self.columns

    @property
    def groups(self) -> int:
        """G = ⌈K/g⌉."""
        return -(-self.columns // self.size)

    @property
    def is_even(self) -> bool:
        """Whether the last group is as long as the others."""
        return self.columns % self.size == 0

    def check(self, where: str) -> None:
        """Check that the attributes make sense together.

        Raises:
            IRError: naming `where`.
        """
        if not self.shape or min(self.shape) < 1:
            raise IRError(f"{where} shape is {list(self.shape)}, expected dimensions of at least 1; leave it dense")
        if len(set(self.axes)) != len(self.axes) or any(not 0 <= a < len(self.shape) for a in self.axes):
            raise IRError(
                f"{where} axes are {list(self.axes)}, expected different axes of shape {list(self.shape)}; "
                "give the row axes, each once, counted from 0"
            )
        if self.group_size < 0:
            raise IRError(f"{where} group_size is {self.group_size}, expected 0 (one group a row) or more; correct it")


def canonical(w: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """w: any shape -> [R, K], rows along `axes`; a view where numpy can give one."""
    geometry = Geometry(w.shape, tuple(axes))
    return w.transpose(geometry.perm).reshape(geometry.rows, geometry.columns)


def restore(matrix: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """matrix: [R, K] -> `shape`, the inverse of `canonical`."""
    geometry = Geometry(tuple(shape), tuple(axes))
    return matrix.reshape([geometry.shape[a] for a in geometry.perm]).transpose(geometry.inverse)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of the packed stream of `count` codes."""
    return -(-count // UNIT) * bits


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes: uint8, any shape, each below 2^bits -> packed stream: uint8 [⌈n/8⌉·bits], in C order."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    units = -(-flat.size // UNIT)
    if flat.size % UNIT:
        flat = np.concatenate([flat, np.zeros(units * UNIT - flat.size, np.uint8)])
    if bits == 8:
        return flat.copy()
    packed = np.zeros((units, bits), np.uint8)
    fields = flat.reshape(units, UNIT)
    for i, byte, offset in _fields(bits):
        packed[:, byte] |= fields[:, i] << np.uint8(offset)
        if offset + bits > 8:
            packed[:, byte + 1] |= fields[:, i] >> np.uint8(8 - offset)
    return packed.reshape(-1)


def unpack_codes(packed: np.ndarray, bits: int, count: int, *, start: int = 0) -> np.ndarray:
    """packed: uint8 stream -> codes `start` to `start + count`: uint8 [count]; only their bytes are read."""
    packed = np.asarray(packed).reshape(-1)
    if bits == 8:
        return packed[start : start + count].copy()
    first, last = start // UNIT, -(-(start + count) // UNIT)
    units = packed[first * bits : last * bits].reshape(last - first, bits)
    codes = np.empty((last - first, UNIT), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for i, byte, offset in _fields(bits):
        codes[:, i] = units[:, byte] >> np.uint8(offset)
        if offset + bits > 8:
            codes[:, i] |= units[:, byte + 1] << np.uint8(8 - offset)
    codes &= mask
    begin = start - first * UNIT
    return codes.reshape(-1)[begin : begin + count]


def _fields(bits: int) -> Iterator[tuple[int, int, int]]:
    """For each of the 8 codes of a unit: its number, its first byte, and its bit there."""
    for i in range(UNIT):
        yield i, i * bits // 8, i * bits % 8


def unpack_fields(op: Body, packed: onnx_ir.Value, bits: int) -> onnx_ir.Value:
    """packed: uint8 stream -> codes: uint8 [whole units, flat], in standard ops and one byte a code throughout."""
    if bits == 8:
        return packed
    mask = op.constant([(1 << bits) - 1], np.uint8)
    if 8 % bits == 0:
        shifts = op.constant(range(0, 8, bits), np.uint8)
        fields = op.BitShift(op.Unsqueeze(packed, op.constant([1])), shifts, direction="RIGHT")
        return op.Reshape(op.BitwiseAnd(fields, mask), op.constant([-1]))
    units = op.Reshape(packed, op.constant([-1, bits]))
    _, byte, offset = zip(*_fields(bits), strict=True)
    # A code that does not reach into the next byte takes bits of it above its own: the mask removes them. A shift
    # by 8 is undefined, and 7 also lands above, for bits < 8.
    low = op.BitShift(op.Gather(units, op.constant(byte), axis=1), op.constant(offset, np.uint8), direction="RIGHT")
    after = op.Gather(units, op.constant([min(b + 1, bits - 1) for b in byte]), axis=1)
    high = op.BitShift(after, op.constant([min(8 - o, 7) for o in offset], np.uint8), direction="LEFT")
    return op.Reshape(op.BitwiseAnd(op.BitwiseOr(low, high), mask), op.constant([-1]))


def row_blocks(geometry: Geometry) -> Iterator[slice]:
    """The rows of the matrix in blocks of about a million elements."""
    step = max(1, _BLOCK // max(1, geometry.columns))
    for start in range(0, geometry.rows, step):
        yield slice(start, min(start + step, geometry.rows))
