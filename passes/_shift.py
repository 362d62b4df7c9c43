"""Zero-free power-of-two codes of a weight matrix: the codebook, the scale search, row sums, the sum of two codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Rounding = Literal["nearest", "log2"]

# |w|/s lies between two levels 2^k and 2^(k+1): the factor of 2^k from which the upper one is taken.
_THRESHOLD: dict[Rounding, float] = {"nearest": 1.5, "log2": 2**0.5}
_BINS = 16  # bins of the search an octave
_OCTAVES = 4  # the largest level is searched from the row's maximum · 4/3 down over so many octaves
_SWEEPS = 3  # alternations of codes and scales after the search
_BLOCK = 1 << 20  # weights in work at a time: bounds the temporaries to about 50 MB


@dataclass(frozen=True)
class ShiftCodes:
    """ŵ = codebook[codes] · scale, group by group.

    Attributes:
        codes: [rows, cols] uint8.
        scales: [rows, groups] of the weight's type.
    """

    codes: np.ndarray
    scales: np.ndarray


def shift_codebook(bits: int) -> np.ndarray:
    """The 2^bits levels ±2^k, k = 0 .. 2^(bits-1)-1, in the order of the codes [sign | exponent]: [2^bits] float32."""
    levels = np.exp2(np.arange(1 << (bits - 1), dtype=np.float32))
    return np.concatenate([levels, -levels])


def fit(
    w: np.ndarray, bits: int, *, group_size: int, terms: int, rounding: Rounding, balance: float = 0.0
) -> tuple[ShiftCodes, ...]:
    """Codes and scales, one `ShiftCodes` a term, with Σ_t codebook[codes_t]·scale_t ≈ w in least squares.

    w: [rows, cols]. A group is `group_size` neighbours in a row, the last may be shorter; 0 makes a row one group.
    `balance` > 0 lowers ‖e‖² + balance·(Σe)² instead, e the errors of a group, so that what its inputs have in common
    passes as through w; for one term and nearest rounding.
    """
    if balance and (terms > 1 or rounding != "nearest"):
        raise ValueError(
            f"balance={balance} with terms={terms} rounding={rounding}: only terms=1 rounding=nearest has it"
        )
    rows, cols = w.shape
    starts = range(0, cols, group_size or max(cols, 1))
    whole = cols // group_size * group_size if group_size else cols
    codes = np.empty((terms, rows, cols), np.uint8)
    scales = np.empty((terms, rows, len(starts)), w.dtype)
    if whole:  # the groups of equal length in one go, as rows of their own
        length = group_size or cols
        full_codes, full_scales = _fit_rows(w[:, :whole].reshape(-1, length), bits, terms, rounding, balance, w.dtype)
        codes[:, :, :whole] = full_codes.reshape(terms, rows, whole)
        scales[:, :, : whole // length] = full_scales.reshape(terms, rows, -1)
    if whole < cols:
        codes[:, :, whole:], scales[:, :, -1] = _fit_rows(w[:, whole:], bits, terms, rounding, balance, w.dtype)
    return tuple(ShiftCodes(codes[t], scales[t]) for t in range(terms))


def decode(fitted: tuple[ShiftCodes, ...], bits: int, *, group_size: int) -> np.ndarray:
    """The sum of the terms in float32: [rows, cols]."""
    book = shift_codebook(bits)
    total = np.zeros(fitted[0].codes.shape, np.float32)
    for term in fitted:
        cols = term.codes.shape[1]
        scale = np.repeat(term.scales.astype(np.float32), group_size or max(cols, 1), axis=1)[:, :cols]
        total += book[term.codes] * scale
    return total


def _fit_rows(
    w: np.ndarray, bits: int, terms: int, rounding: Rounding, balance: float, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """w: [groups, n] -> codes [terms, groups, n] and scales [terms, groups], a block of groups at a time."""
    groups, n = w.shape
    codes = np.empty((terms, groups, n), np.uint8)
    scales = np.empty((terms, groups), dtype)
    for block in _blocks(groups, n):
        # A power of two brings each row's maximum to [1, 2): exact, and the search needs no range of its own.
        x = w[block].astype(np.float64 if w.dtype == np.float64 else np.float32)
        _, exponent = np.frexp(np.abs(x).max(axis=1, initial=0))
        x = np.ldexp(x, 1 - exponent[:, None]).astype(np.float32)
        found = _search(x, bits, rounding)[None, :]
        if balance:
            scales[0, block], codes[0, block] = _balance(x, found[0], exponent, bits, balance, dtype)
            continue
        scales[:, block], codes[:, block] = _store(x, found, exponent, bits, rounding, dtype)
        if terms == 1:
            continue
        sums, sum_codes = _store(x, _refine_sum(x, bits, rounding, found[0]), exponent, bits, rounding, dtype)
        single = _error(x, scales[:1, block], codes[:1, block], exponent, bits)
        better = _error(x, sums, sum_codes, exponent, bits) < single
        # Where the second term gains nothing its scale is 0, so that a sum is never worse than its first term.
        scales[:, block] = np.where(better, sums, np.stack([scales[0, block], np.zeros_like(scales[0, block])]))
        codes[:, block] = np.where(better[:, None], sum_codes, codes[:, block])
    return codes, scales


def _store(
    x: np.ndarray, scales: np.ndarray, exponent: np.ndarray, bits: int, rounding: Rounding, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The scales as stored, in the weight's range and type, and the codes that belong to these."""
    with np.errstate(under="ignore", over="ignore"):
        stored = np.ldexp(scales.astype(np.float64), exponent - 1).astype(dtype)
    return stored, _codes_of_sum(x, _normal(stored, exponent), bits, rounding)


def _balance(
    x: np.ndarray, scale: np.ndarray, exponent: np.ndarray, bits: int, weight: float, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The scales as stored and codes of low ‖e‖² + weight·(Σe)², e = x - s·q: descent in codes and scales in turn.

    x: [groups, n], scale: [groups] -> [groups] and [groups, n] uint8.
    """
    columns = np.ascontiguousarray(x.T)
    codes = np.ascontiguousarray(_nearest(x, scale, bits, "nearest").T)
    total = columns.sum(axis=0, dtype=np.float64)
    for _ in range(_SWEEPS):
        with np.errstate(under="ignore", over="ignore"):
            stored = np.ldexp(scale.astype(np.float64), exponent - 1).astype(dtype)
        scale = _normal(stored, exponent)
        _balance_codes(columns, codes, scale, bits, weight)
        q = shift_codebook(bits)[codes]
        sums = q.sum(axis=0, dtype=np.float64)
        cross = np.einsum("ng,ng->g", q, columns, dtype=np.float64) + weight * sums * total
        square = np.einsum("ng,ng->g", q, q, dtype=np.float64) + weight * sums**2
        # A row of zeros keeps its scale of 0, and no scale turns negative: the signs are in the codes.
        scale = np.where((scale > 0) & (cross > 0), cross / square, scale)
    return stored, codes.T


def _balance_codes(columns: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, weight: float) -> None:
    """Each weight's best code in turn, given the errors of the others; the objective never rises.

    ‖e‖² + weight·(Σe)² is least in e_j where that is -weight/(1 + weight)·Σ_{i≠j} e_i, so the code is the nearest to
    x_j + weight/(1 + weight)·Σ_{i≠j} e_i. columns: [n, groups]; codes: [n, groups], edited in place.
    """
    book = shift_codebook(bits)
    share = np.float32(weight / (1 + weight))
    rest = columns - book[codes] * scale
    total = rest.sum(axis=0)
    for j, column in enumerate(columns):
        others = total - rest[j]
        codes[j] = _nearest((column + share * others)[:, None], scale, bits, "nearest")[:, 0]
        total = others + (column - book[codes[j]] * scale)


def _normal(stored: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    normal: np.ndarray = np.ldexp(stored.astype(np.float64), 1 - exponent).astype(np.float32)
    return normal


def _error(x: np.ndarray, stored: np.ndarray, codes: np.ndarray, exponent: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of each row: [groups]."""
    rest = x - np.einsum("tgn,tg->gn", shift_codebook(bits)[codes], _normal(stored, exponent))
    error: np.ndarray = np.einsum("gn,gn->g", rest, rest, dtype=np.float64)
    return error


def _blocks(groups: int, n: int) -> Iterator[slice]:
    bins = _BINS * (_OCTAVES + 8)
    step = max(1, _BLOCK // max(n, bins))
    return (slice(start, start + step) for start in range(0, groups, step))


def _exponents(magnitude: np.ndarray, bits: int, rounding: Rounding) -> np.ndarray:
    """The k of the level that each |w|/s rounds to. magnitude: float32 of any shape."""
    # Adding 2 - threshold to the mantissa carries into the exponent from the threshold on.
    carry = np.uint32(round((2 - _THRESHOLD[rounding]) * 2**23))
    k = ((magnitude.view(np.uint32) + carry) >> np.uint32(23)).astype(np.int16)
    return np.clip(k - 127, 0, (1 << (bits - 1)) - 1)


def _nearest(x: np.ndarray, scale: np.ndarray, bits: int, rounding: Rounding) -> np.ndarray:
    """The codes of x for one scale a row. x: [groups, n], scale: [groups] -> [groups, n] uint8."""
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        k = _exponents(np.abs(x) / divisor, bits, rounding)
    return (k + np.int16(1 << (bits - 1)) * (x < 0)).astype(np.uint8)


def _search(x: np.ndarray, bits: int, rounding: Rounding) -> np.ndarray:
    """The scale of each row: the best of a fine grid, then for nearest-value codes alternating least squares.

    A histogram of |x| over (exponent, top of the mantissa) holds all that the squared error of any scale
    whose thresholds fall on bin edges needs: Σ(|x| - s·2^k)² = Σx² - 2s·Σ|x|2^k + s²·Σ4^k.
    x: [groups, n] float32 with row maxima in [1, 2) or 0 -> [groups] float32.
    """
    groups = x.shape[0]
    magnitude = np.abs(x)
    levels = 1 << (bits - 1)
    octaves = levels - 2 + _OCTAVES
    edges = octaves * _BINS  # the bin edge of value 2, the end of the histogram
    shift = 23 - 4
    bins = (magnitude.view(np.uint32) >> np.uint32(shift)).astype(np.int64) - (128 * _BINS - edges)
    bins = np.clip(bins, 0, edges - 1) + np.arange(groups)[:, None] * edges
    count = np.bincount(bins.ravel(), minlength=groups * edges).reshape(groups, edges)
    total = np.bincount(bins.ravel(), weights=magnitude.ravel(), minlength=groups * edges).reshape(groups, edges)
    del bins
    # tail[:, b] = sum over bins b and above; half an octave of zeros above for thresholds beyond the maximum
    pad = ((0, 0), (0, _BINS // 2))
    tail_count: np.ndarray = np.pad(np.cumsum(count[:, ::-1], axis=1)[:, ::-1], pad).astype(np.float64)
    tail_total: np.ndarray = np.pad(np.cumsum(total[:, ::-1], axis=1)[:, ::-1], pad)

    first = np.arange(1, (_OCTAVES * 2 + 1) * _BINS // 2)  # bin edge of the threshold between levels 0 and 1
    cross: np.ndarray = np.repeat(tail_total[:, :1], first.size, axis=1)  # Σ |x|·2^k
    square: np.ndarray = np.repeat(tail_count[:, :1], first.size, axis=1)  # Σ 4^k
    for k in range(1, levels):
        at = first + (k - 1) * _BINS
        cross += 2.0 ** (k - 1) * tail_total[:, at]
        square += 0.75 * 4.0**k * tail_count[:, at]
    if rounding == "log2":
        scale = _value_at(first, edges) / _THRESHOLD["log2"]
        best = np.argmin(scale**2 * square - 2 * scale * cross, axis=1)
        return np.where(magnitude.max(axis=1, initial=0) > 0, scale[best], 0).astype(np.float32)
    best = np.argmax(cross**2 / square, axis=1)[:, None]
    start = np.take_along_axis(cross, best, 1)[:, 0] / np.take_along_axis(square, best, 1)[:, 0]
    return _alternate(magnitude, start, bits)


def _value_at(edge: np.ndarray, end: int) -> np.ndarray:
    """The magnitude at a bin edge; edge `end` is 2."""
    octave, step = np.divmod(edge - end, _BINS)
    magnitude: np.ndarray = np.ldexp(1 + step / _BINS, octave + 1)
    return magnitude


def _alternate(magnitude: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes for the scales, then the least-squares scales for the codes; the error never rises."""
    levels = np.exp2(np.arange(1 << (bits - 1), dtype=np.float32))
    for _ in range(_SWEEPS):
        chosen = levels[_nearest(magnitude, scale, bits, "nearest")]
        scale = np.einsum("gn,gn->g", magnitude, chosen, dtype=np.float64) / np.einsum(
            "gn,gn->g", chosen, chosen, dtype=np.float64
        )
    return scale.astype(np.float32)


def _codes_of_sum(x: np.ndarray, scales: np.ndarray, bits: int, rounding: Rounding) -> np.ndarray:
    """The codes of each term for given scales, coarse term first. scales: [terms, groups] -> [terms, groups, n]."""
    first = _nearest(x, scales[0], bits, rounding)
    if len(scales) == 1:
        return first[None]
    book = shift_codebook(bits)
    second = _nearest(x - book[first] * scales[0][:, None], scales[1], bits, rounding)
    if rounding == "nearest":
        first, second = _descend(x, scales, first, second, bits)
    return np.stack([first, second])


def _descend(
    x: np.ndarray, scales: np.ndarray, first: np.ndarray, second: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each term's codes in turn, nearest to what the other leaves; the error never rises."""
    book = shift_codebook(bits)
    for _ in range(_SWEEPS):
        first = _nearest(x - book[second] * scales[1][:, None], scales[0], bits, "nearest")
        second = _nearest(x - book[first] * scales[0][:, None], scales[1], bits, "nearest")
    return first, second


def _refine_sum(x: np.ndarray, bits: int, rounding: Rounding, scale: np.ndarray) -> np.ndarray:
    """The two scales of each row: the remainder's own search, then joint least squares. -> [2, groups] float32."""
    book = shift_codebook(bits)
    rest = x - book[_nearest(x, scale, bits, rounding)] * scale[:, None]
    _, exponent = np.frexp(np.abs(rest).max(axis=1, initial=0))
    found = _search(np.ldexp(rest, 1 - exponent[:, None]).astype(np.float32), bits, rounding)
    scales = np.stack([scale, np.ldexp(found, exponent - 1)]).astype(np.float32)
    if rounding == "log2":
        return scales
    for _ in range(_SWEEPS):
        a, b = (book[codes] for codes in _codes_of_sum(x, scales, bits, rounding))
        scales = _solve(x, a, b, scales)
    return scales


def _solve(x: np.ndarray, a: np.ndarray, b: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Per row the s, t ≥ 0 that minimise ‖x - s·a - t·b‖²; rows without a stable solution keep their scales."""

    def dot(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        product: np.ndarray = np.einsum("gn,gn->g", p, q, dtype=np.float64)
        return product

    aa, ab, bb, ax, bx = dot(a, a), dot(a, b), dot(b, b), dot(a, x), dot(b, x)
    determinant = aa * bb - ab * ab
    safe = np.where(determinant > 1e-9 * aa * bb, determinant, 1)
    solved = np.stack([(bb * ax - ab * bx) / safe, (aa * bx - ab * ax) / safe])
    stable = (determinant > 1e-9 * aa * bb) & (solved >= 0).all(axis=0)
    return np.where(stable, solved, scales).astype(np.float32)
