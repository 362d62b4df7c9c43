"""Singular values of a blocked weight and the factors that come from them: sums of Kronecker products, and nested ones.

    gkpd     T ≈ Σ_r a_r b_rᵀ                                           (the best of its rank: Eckart and Young)
    sekron   T ≈ Σ_r1 a_r1 ⊗ (Σ_r2 a_r1r2 ⊗ ( .. ⊗ a_r1..rS-1))         (truncated level by level, then refined)

Everything goes through the Gram matrix of the smaller side, so that a table of 30522 x 384 costs an eigenproblem of
384. T is projected on eigenvectors, never divided by singular values: the projection is exact to float64 whatever the
small eigenvalues are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mc_opt.passes._factor import spread

_EXACT = 3072  # the side up to which the eigenproblem is solved in full
_OVERSAMPLE = 16
_POWER = 3  # iterations of the randomised range finder


def gram(matrix: np.ndarray) -> np.ndarray:
    """MMᵀ or MᵀM, of the smaller side. matrix: [a, b] -> [min(a, b), min(a, b)]."""
    product: np.ndarray = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return product


def spectrum(matrix: np.ndarray) -> np.ndarray:
    """The squared singular values, largest first: [min(a, b)]."""
    values: np.ndarray = np.maximum(np.linalg.eigvalsh(gram(matrix))[::-1], 0)
    return values


def tails(squares: np.ndarray) -> np.ndarray:
    """What is lost at each rank: entry r is Σ_{i>r} σ_i², r = 0 .. n: [n + 1]."""
    lost = np.zeros(len(squares) + 1)
    lost[:-1] = np.cumsum(squares[::-1])[::-1]
    return lost


def basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` leading left singular vectors: [a, rank], orthonormal.

    matrix: [a, b] with a <= b, or any: a tall one is taken by the Gram matrix of its columns.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    side = min(matrix.shape)
    if side > _EXACT and rank < side // 4:
        return _range(matrix, rank)
    _, vectors = np.linalg.eigh(gram(matrix))
    leading = vectors[:, ::-1][:, :rank]
    if not tall:
        return np.ascontiguousarray(leading)
    orthonormal: np.ndarray = np.linalg.qr(matrix @ leading)[0]
    return orthonormal


def _range(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The same by a randomised range finder with power iterations."""
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _OVERSAMPLE))
    found = np.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER):
        found = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ found)[0])[0]
    inner = found.T @ matrix
    _, vectors = np.linalg.eigh(inner @ inner.T)
    leading: np.ndarray = found @ vectors[:, ::-1][:, :rank]
    return leading


def gkpd(tensor: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best sum of `rank` outer products, singular values shared evenly. tensor: [a, b] -> [rank, a], [rank, b]."""
    if tensor.shape[0] > tensor.shape[1]:
        right, left = gkpd(tensor.T, rank)
        return left, right
    left = basis(tensor, min(rank, len(tensor))).T
    right = left @ tensor
    root, inverse = spread(np.linalg.norm(right, axis=1))
    return left * root[:, None], right * inverse[:, None]


def nested(tensor: np.ndarray, ranks: Sequence[int], *, sweeps: int = 0) -> list[np.ndarray]:
    """Free SeKron factors: core k is [R_1, .., R_min(k, S-1), 1, .., |b_k|].

    tensor: [|b_1|, .., |b_S|]; ranks: R_1 .. R_{S-1}. A sweep takes each term of the outermost sum in turn and fits
    it to what the others leave; the result of a sweep is kept while the error falls.
    """
    cores = _descend(tensor, ranks)
    best = _lost(tensor, cores)
    for _ in range(sweeps):
        trial = _sweep(tensor, [core.copy() for core in cores], ranks)
        lost = _lost(tensor, trial)
        if not lost < best * (1 - 1e-4):
            return trial if lost < best else cores
        cores, best = trial, lost
    return cores


def _descend(tensor: np.ndarray, ranks: Sequence[int]) -> list[np.ndarray]:
    """The recursive SVD: the right vectors, times their singular values, are factorised in turn."""
    left, right = gkpd(tensor.reshape(tensor.shape[0], -1), ranks[0])
    if tensor.ndim == 2:
        return [left, right]
    children = [_descend(child.reshape(tensor.shape[1:]), ranks[1:]) for child in right]
    below = [np.stack(parts) for parts in zip(*children, strict=True)]
    first = left.reshape(len(left), *[1] * (tensor.ndim - 2), tensor.shape[0])
    return _even([first, *below])


def _even(cores: list[np.ndarray]) -> list[np.ndarray]:
    """Share the norm of each term of the outermost sum evenly among its factors."""
    axes = [tuple(range(1, core.ndim)) for core in cores]
    norms = np.stack([np.sqrt(np.square(core).mean(axis=a)) for core, a in zip(cores, axes, strict=True)])
    mean = np.exp(np.log(np.where(norms > 0, norms, 1)).mean(axis=0))
    scale = np.where((norms > 0).all(axis=0), mean / np.where(norms > 0, norms, 1), 1)
    return [core * s.reshape(-1, *[1] * (core.ndim - 1)) for core, s in zip(cores, scale, strict=True)]


def expand(cores: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor of free SeKron cores: [|b_1|, .., |b_S|]."""
    rank, size = cores[0].shape[0], cores[0].shape[-1]
    left = cores[0].reshape(rank, size)
    terms = cores[1] if len(cores) == 2 else np.stack([expand([core[r] for core in cores[1:]]) for r in range(rank)])
    product: np.ndarray = (left.T @ terms.reshape(rank, -1)).reshape(size, *terms.shape[1:])
    return product


def _lost(tensor: np.ndarray, cores: Sequence[np.ndarray]) -> float:
    return float(np.square(tensor - expand(cores)).sum())


def _sweep(tensor: np.ndarray, cores: list[np.ndarray], ranks: Sequence[int]) -> list[np.ndarray]:
    if tensor.ndim == 2:  # the SVD is the best already
        return cores
    rest = (tensor - expand(cores)).reshape(tensor.shape[0], -1)
    for r in range(len(cores[0])):
        vector = cores[0][r].reshape(-1)
        norm = math.sqrt(float(vector @ vector))
        if not norm:
            continue
        child = expand([core[r] for core in cores[1:]]).reshape(-1)
        rest += np.outer(vector, child)
        fitted = _descend((vector @ rest / norm**2).reshape(tensor.shape[1:]), ranks[1:])
        child = expand(fitted).reshape(-1)
        power = float(child @ child)
        vector = rest @ child / power if power else vector
        rest -= np.outer(vector, child)
        cores[0][r] = vector.reshape(cores[0][r].shape)
        for core, part in zip(cores[1:], fitted, strict=True):
            core[r] = part
    return _even(cores)
