"""Every op of the dialect in numpy, written without its body: what its body, torch and artefacts are held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from mc_opt import ir
from mc_opt.ir.op import Example, Op
from mc_opt.ir.ops import (
    add_sparse,
    cached_attention,
    euclid_conv,
    euclid_conv_integer,
    euclid_linear,
    euclid_linear_integer,
    fake_euclid_conv,
    fake_euclid_linear,
    fake_lookup,
    fake_prox,
    fake_shift,
    fake_sparse_shift,
    fake_swish_sign,
    fake_threshold,
    kron_linear,
    lookup,
    sekron_conv,
    sparse,
)
from tests.ir._levels_in_numpy import cut_below_threshold, draw_to_levels, swish_to_levels


def expected(op: Op, example: Example) -> np.ndarray:
    """The op in numpy, written without its body."""
    match op:
        case lookup.Lookup():
            return ir.decode(*example.inputs, **example.attributes)
        case add_sparse.AddSparse():
            w, indices, values = example.inputs
            total = w.copy().reshape(-1)
            np.add.at(total, indices, values)
            return total.reshape(w.shape)
        case _ if op.name == "FakeMask":
            return masked(example)
        case sparse.Sparse():
            return sparse.unpack(*example.inputs, example.attributes["shape"])
        case fake_lookup.FakeLookup():
            return round_to_codebook(example)
        case fake_shift.FakeShift() | fake_sparse_shift.FakeSparseShift():
            return signed_powers(op, example)
        case fake_prox.FakeProx():
            return draw_to_levels(example)
        case fake_swish_sign.FakeSwishSign():
            return swish_to_levels(example)
        case fake_threshold.FakeThreshold():
            return cut_below_threshold(example)
        case sekron_conv.SeKronConv():
            return convolve(example)
        case euclid_conv.EuclidConv() | fake_euclid_conv.FakeEuclidConv():
            return convolve_distances(op, example)
        case euclid_linear.EuclidLinear() | fake_euclid_linear.FakeEuclidLinear():
            return distances(op, example)
        case euclid_conv_integer.EuclidConvInteger():
            return convolve_squares(example)
        case euclid_linear_integer.EuclidLinearInteger():
            x, w = (a.astype(np.int64) for a in example.inputs)
            squares = np.square(x[..., None, :] - (w if example.attributes["transB"] else w.T))
            return -squares.sum(-1).astype(np.int32)
        case kron_linear.KronLinear():
            x, bias, *factors = example.inputs
            w = ir.kron_weight(factors, factors[0].ndim - 2).astype(float)
            return (x.astype(float) @ w.T + (0 if bias is None else bias)).astype(x.dtype)
        case cached_attention.CachedAttention():
            return attend(example)
    raise AssertionError(f"write {op.name} in numpy here")


def attend(example: Example) -> np.ndarray:
    """Attention token by token, on the part of the cache that the token sees."""
    *given, positions = example.inputs
    q, keys, values = (a.astype(float) for a in given)
    result = np.empty_like(q)
    for b, h, t in np.ndindex(*q.shape[:3]):
        group, seen = h * keys.shape[1] // q.shape[1], int(positions[t]) + 1
        scores = np.exp(keys[b, group, :seen] @ q[b, h, t] / np.sqrt(q.shape[3]))
        result[b, h, t] = scores @ values[b, group, :seen] / scores.sum()
    return result.astype(example.inputs[0].dtype)


def convolve(example: Example) -> np.ndarray:
    """The dense convolution, tap by tap."""
    x, bias, *factors = example.inputs
    w = ir.kron_weight(factors, factors[0].ndim - 2 - len(example.attributes["strides"])).astype(float)
    return sum_windows(example, x, w, bias, lambda block, patch: np.einsum("fc,nc...->nf...", block, patch))


def convolve_distances(op: Op, example: Example) -> np.ndarray:
    """S_λ of every window, term by term: (1 − λ)·x·w − λ·½(x − w)² is x·w − λ·½(x² + w²)."""
    named = dict(zip(op.formal(4), example.inputs, strict=False))
    share = float(named.get("strength", np.float32(1)))

    def term(block: np.ndarray, patch: np.ndarray) -> np.ndarray:
        w = block.reshape(1, *block.shape, *[1] * (patch.ndim - 2))
        return ((1 - share) * patch[:, None] * w - share / 2 * (patch[:, None] - w) ** 2).sum(2)

    return sum_windows(example, named["x"], named["w"].astype(float), named.get("bias"), term)


def convolve_squares(example: Example) -> np.ndarray:
    """−Σ (x − w)², each square from a table of |x − w|."""
    table = np.arange(256) ** 2

    def term(block: np.ndarray, patch: np.ndarray) -> np.ndarray:
        w = block.reshape(1, *block.shape, *[1] * (patch.ndim - 2))
        return -table[np.abs(patch[:, None] - w).astype(int)].sum(2)

    x, w = example.inputs
    return sum_windows(example, x.astype(np.int32), w.astype(float), None, term)


def distances(op: Op, example: Example) -> np.ndarray:
    named = dict(zip(op.formal(4), example.inputs, strict=False))
    share = float(named.get("strength", np.float32(1)))
    w = named["w"].astype(float) if example.attributes["transB"] else named["w"].astype(float).T
    x = named["x"].astype(float)[..., None, :]
    y = ((1 - share) * x * w - share / 2 * (x - w) ** 2).sum(-1)
    return (y if named.get("bias") is None else y + named["bias"]).astype(named["x"].dtype)


def sum_windows(
    example: Example,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    term: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Sum over the taps what `term` makes of w[:, :, tap] and of what each window of x sees there."""
    strides, dilations, pads = (example.attributes[n] for n in ("strides", "dilations", "pads"))
    n, group = len(strides), example.attributes["group"]
    spaces = [(pads[a], pads[n + a]) for a in range(n)]
    padded = np.pad(x.astype(float), [(0, 0), (0, 0), *spaces])
    taps = list(itertools.product(*(range(k) for k in w.shape[2:])))
    free = [s - d * (k - 1) - 1 for s, d, k in zip(padded.shape[2:], dilations, w.shape[2:], strict=True)]
    counts = [f // s + 1 for f, s in zip(free, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *counts))
    rows, columns = w.shape[0] // group, w.shape[1]
    for tap in taps:
        places = zip(tap, dilations, strides, counts, strict=True)
        where = tuple(slice(t * d, t * d + s * (c - 1) + 1, s) for t, d, s, c in places)
        for g in range(group):
            mine = padded[:, g * columns : (g + 1) * columns][(slice(None), slice(None), *where)]
            block = w[(slice(g * rows, (g + 1) * rows), slice(None), *tap)]
            y[:, g * rows : (g + 1) * rows] += term(block, mine)
    if bias is not None:
        y += bias.reshape(-1, *[1] * n)
    return y.astype(x.dtype)


def masked(example: Example) -> np.ndarray:
    x, theta, threshold, _, index = (*example.inputs, None)[:5]
    axis, least = example.attributes["axis"], example.attributes["least"]
    live = (theta > threshold) | (least and theta == theta.max())
    y = x.copy()
    for place in np.ndindex(x.shape):
        k = place if theta.ndim > 1 else place[axis] if index is None else index[place[axis]]
        if theta.size == 1:
            k = 0
        y[place] *= 1 if np.isscalar(k) and k < 0 else live[k]
    return y


def round_to_codebook(example: Example) -> np.ndarray:
    w, codebook, scale = (*example.inputs, None)[:3]
    axes, size = example.attributes.get("axes", (0,)), example.attributes.get("group_size", 0)
    matrix = ir.canonical(w, axes)
    rows, columns = matrix.shape
    y = np.empty_like(matrix)
    books = codebook.reshape((1, 1, -1)) if codebook.ndim == 1 else codebook
    factors = np.ones((1, 1), np.float32) if scale is None else scale
    for r in range(rows):
        for c in range(columns):
            g = c // size if size else 0
            book = books[r % books.shape[0], g % books.shape[1]]
            s = factors[r % factors.shape[0], g % factors.shape[1]]
            y[r, c] = book[ir.nearest_codes(matrix[r, c] / s, book)] * s
    return ir.restore(y, w.shape, axes)


def signed_powers(op: Op, example: Example) -> np.ndarray:
    given = dict(zip(op.formal(len(example.inputs)), example.inputs, strict=True))
    sign, scale, gain = given.pop("sign"), given.pop("scale"), given.pop("gain")
    alive = given.pop("value", np.ones_like(sign)) > 0
    exponent = np.zeros(sign.shape)
    for step in given.values():
        exponent = np.where(step > 0, exponent + 1, 0)
    return scale_rows(np.where(sign >= 0, 1, -1) * alive * 2**exponent, scale * gain, example)


def scale_rows(levels: np.ndarray, factor: np.ndarray, example: Example) -> np.ndarray:
    axes, size = example.attributes.get("axes", (0,)), example.attributes.get("group_size", 0)
    matrix = ir.canonical(levels, axes)
    columns = np.arange(matrix.shape[1]) // size if size and factor.shape[1] > 1 else np.zeros(matrix.shape[1], int)
    return ir.restore(matrix * factor[:, columns], levels.shape, axes).astype(np.float32)
