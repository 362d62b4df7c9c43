"""Packed codes, the matrix of a weight's rows, and the nearest entry of a codebook: each undoes its inverse."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np

from mc_opt import ir


@hypothesis.given(
    bits=st.integers(1, 8),
    codes=st.lists(st.integers(0, 255), max_size=70),
    data=st.data(),
)
def test_unpack_undoes_pack(bits: int, codes: list[int], data: st.DataObject) -> None:
    array = (np.array(codes, np.uint8) & ((1 << bits) - 1)).astype(np.uint8)
    packed = ir.pack_codes(array, bits)
    assert packed.dtype == np.uint8
    assert packed.size == -(-len(codes) // 8) * bits
    assert np.array_equal(ir.unpack_codes(packed, bits, array.size), array)
    start = data.draw(st.integers(0, array.size))
    count = data.draw(st.integers(0, array.size - start))
    assert np.array_equal(ir.unpack_codes(packed, bits, count, start=start), array[start : start + count])


@hypothesis.given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packed_stream_is_little_endian(bits: int, codes: list[int]) -> None:
    array = (np.array(codes, np.uint8) & ((1 << bits) - 1)).astype(np.uint8)
    stream = np.unpackbits(ir.pack_codes(array, bits), bitorder="little")
    fields = stream[: len(codes) * bits].reshape(-1, bits)
    assert np.array_equal((fields * (1 << np.arange(bits))).sum(1), array)
    assert not stream[len(codes) * bits :].any()


@hypothesis.given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_restore_undoes_canonical(shape: list[int], data: st.DataObject) -> None:
    axes = tuple(data.draw(st.permutations(range(len(shape)))))[: data.draw(st.integers(0, len(shape)))]
    w = np.arange(np.prod(shape)).reshape(shape)
    matrix = ir.canonical(w, axes)
    assert matrix.shape == (np.prod([shape[a] for a in axes], initial=1), w.size / matrix.shape[0])
    assert np.array_equal(ir.restore(matrix, shape, axes), w)


@hypothesis.given(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=9), st.floats(-3, 3, width=32))
def test_nearest_code_is_nearest(entries: list[float], x: float) -> None:
    codebook = np.array(entries, np.float32)
    chosen = codebook[ir.nearest_codes(np.float32(x), codebook)]
    distance = np.abs(codebook.astype(float) - x)
    # a midpoint is rounded to float32 once
    assert abs(float(chosen) - x) <= distance.min() + 2.5e-7 * (1 + abs(x))


def test_between_two_entries_the_lower_wins() -> None:
    codebook = np.array([-2, -1, 0, 1], np.float32)
    assert ir.nearest_codes(np.array([-1.5, -0.5, 0.5], np.float32), codebook).tolist() == [0, 1, 2]
