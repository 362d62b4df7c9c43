"""Power-of-two codes with a zero: the codebook of S3, and the best scale of each row by the exact error of a grid."""

from __future__ import annotations

import numpy as np

from mc_opt.passes._shift import ShiftCodes

_CANDIDATES = 16  # scales an octave
_OCTAVES = 4  # the largest level is searched from the row's maximum · 4/3 down over so many octaves
_SWEEPS = 3  # alternations of codes and scales after the search
_BLOCK = 1 << 20  # weights in work at a time


def magnitudes(bits: int) -> np.ndarray:
    """0 and the levels 2^k, k = 0 .. 2^(bits-1)-2: [2^(bits-1)] float32."""
    return np.append(np.float32(0), np.exp2(np.arange((1 << (bits - 1)) - 1, dtype=np.float32)))


def codebook(bits: int) -> np.ndarray:
    """The 2^bits - 1 levels, those above 0 first, then those below; 0 stands once, in front: float32."""
    levels = magnitudes(bits)
    return np.concatenate([levels, -levels[1:]])


def codes_of(magnitude: np.ndarray, negative: np.ndarray, bits: int) -> np.ndarray:
    """The codes of indices into `magnitudes`; a 0 has no sign. Both of one shape; -> uint8."""
    below = negative & (magnitude > 0)
    return magnitude.astype(np.uint8) + np.uint8((1 << (bits - 1)) - 1) * below.astype(np.uint8)


def decode(fitted: ShiftCodes, bits: int, *, group_size: int) -> np.ndarray:
    """[rows, cols] float32."""
    cols = fitted.codes.shape[1]
    scale = np.repeat(fitted.scales.astype(np.float32), group_size or max(cols, 1), axis=1)[:, :cols]
    decoded: np.ndarray = codebook(bits)[fitted.codes] * scale
    return decoded


def fit(w: np.ndarray, bits: int, *, group_size: int) -> ShiftCodes:
    """The nearest codes for the best scales: least squares, group by group.

    w: [rows, cols]. A group is `group_size` neighbours in a row, the last may be shorter; 0 makes a row one group.
    """
    rows, cols = w.shape
    length = group_size or max(cols, 1)
    codes = np.empty((rows, cols), np.uint8)
    scales = np.empty((rows, -(-cols // length)), w.dtype)
    whole = cols // length * length
    if whole:  # the groups of equal length in one go, as rows of their own
        full = _fit_rows(w[:, :whole].reshape(-1, length), bits)
        codes[:, :whole], scales[:, : whole // length] = (part.reshape(rows, -1) for part in full)
    if whole < cols:
        codes[:, whole:], scales[:, -1] = _fit_rows(w[:, whole:], bits)
    return ShiftCodes(codes, scales)


def _fit_rows(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """w: [groups, n] -> codes [groups, n] and scales [groups], a block of groups at a time."""
    codes, scales = np.empty(w.shape, np.uint8), np.empty(len(w), w.dtype)
    step = max(1, _BLOCK // max(w.shape[1], _CANDIDATES * _OCTAVES << (bits - 1)))
    for start in range(0, len(w), step):
        block = slice(start, start + step)
        # A power of two brings each row's maximum to [1, 2): exact, and the search needs no range of its own.
        x = w[block].astype(np.float64 if w.dtype == np.float64 else np.float32)
        _, exponent = np.frexp(np.abs(x).max(axis=1))
        size = np.ldexp(np.abs(x), 1 - exponent[:, None]).astype(np.float32)
        with np.errstate(under="ignore", over="ignore"):
            scales[block] = np.ldexp(_search(size, bits), exponent - 1).astype(w.dtype)
        stored = np.ldexp(scales[block].astype(np.float64), 1 - exponent)
        codes[block] = codes_of(_nearest(size, stored, bits), np.signbit(x), bits)
    return codes, scales


def _thresholds(bits: int) -> np.ndarray:
    levels = magnitudes(bits)
    middle: np.ndarray = (levels[1:] + levels[:-1]) / 2
    return middle


def _nearest(size: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The indices of the nearest magnitudes; at a middle the lower one. size: [groups, n], scale: [groups]."""
    x = size / np.where(scale > 0, scale, np.inf).astype(np.float32)[:, None]
    return np.searchsorted(_thresholds(bits), x, side="left")


def _search(size: np.ndarray, bits: int) -> np.ndarray:
    """The scale of each row: the best of a grid, then alternating least squares.

    With the sizes sorted and summed up, the squared error of nearest codes Σ(|x| - s·c)² = Σx² - 2s·Σ|x|c + s²·Σc²
    takes a look-up for each level and scale; at its best s it is Σx² - (Σ|x|c)²/Σc². size: [groups, n] with row
    maxima in [1, 2) or 0 -> [groups] float64.
    """
    groups, n = size.shape
    levels = magnitudes(bits).astype(np.float64)
    top = np.exp2(np.arange(_OCTAVES * _CANDIDATES) / -_CANDIDATES) * 8 / 3
    bounds = np.minimum((top / levels[-1])[:, None] * _thresholds(bits), 3.0)  # [scales, levels]
    ascending = np.sort(size, axis=1).astype(np.float64)
    sums = np.pad(np.cumsum(ascending, axis=1), ((0, 0), (1, 0)))
    # One search for all rows: row r is moved by 4r, out of the reach of the others.
    row = np.arange(groups)[:, None, None]
    place = np.searchsorted((ascending + 4 * row[:, 0]).ravel(), bounds + 4 * row, side="right") - n * row
    total = sums[:, -1:, None] - np.take_along_axis(sums, place.reshape(groups, -1), axis=1).reshape(place.shape)
    cross = total @ np.diff(levels)
    square = (n - place) @ np.diff(levels**2)
    gain = np.divide(cross**2, square, out=np.zeros_like(cross), where=square > 0)
    best = np.argmax(gain, axis=1)[:, None]
    scale: np.ndarray = _ratio(*(np.take_along_axis(part, best, axis=1)[:, 0] for part in (cross, square)))
    for _ in range(_SWEEPS):
        chosen = levels[_nearest(size, scale, bits)]
        scale = _ratio(np.einsum("gn,gn->g", size, chosen), np.einsum("gn,gn->g", chosen, chosen))
    return scale


def _ratio(cross: np.ndarray, square: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(cross, square, out=np.zeros_like(cross, np.float64), where=square > 0)
    return ratio
