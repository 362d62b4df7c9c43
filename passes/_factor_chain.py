"""Tensor trains and Tucker forms of a blocked weight: truncated SVDs first, then alternating least squares.

    tt       T[b_1, .., b_S] ≈ Σ_r A_1[b_1, r_1] A_2[r_1, b_2, r_2] .. A_S[r_{S-1}, b_S]
    tucker   T[b_1, .., b_S] ≈ Σ_r G[r_1, .., r_S] U_1[b_1, r_1] .. U_S[b_S, r_S], any U_k the identity

Both are trees of factors: with every other factor orthonormal the best choice of one is a projection, so a sweep
never raises the error. At the end the singular values of each bond are shared evenly by the two factors it joins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mc_opt.passes._factor import spread
from mc_opt.passes._factor_svd import basis

_GAIN = 1e-4  # a sweep that lowers the squared error by less is the last


def train(tensor: np.ndarray, ranks: Sequence[int], *, sweeps: int = 0) -> list[np.ndarray]:
    """Tensor-train cores of rank r_1 .. r_{S-1}: core k is [1.., r_{k-1}, r_k, 1.., |b_k|], S-1 rank axes.

    A rank that is above what the tensor can have is lowered to that.
    """
    cores = _truncated(tensor, ranks)
    power = float(np.square(tensor).sum())
    best = math.inf
    for _ in range(sweeps):
        kept = _sweep(tensor, cores)
        if not power - kept < best * (1 - _GAIN):
            break
        best = power - kept
    return [_as_core(core, k, len(cores)) for k, core in enumerate(_balanced(cores))]


def _truncated(tensor: np.ndarray, ranks: Sequence[int]) -> list[np.ndarray]:
    """TT-SVD: [r_{k-1}, |b_k|, r_k], every core but the last left-orthonormal."""
    cores, rest, before = [], tensor, 1
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        matrix = rest.reshape(before * size, -1)
        left = basis(matrix, min(rank, *matrix.shape))
        cores.append(left.reshape(before, size, -1))
        rest, before = left.T @ matrix, left.shape[1]
    return [*cores, rest.reshape(before, tensor.shape[-1], 1)]


def _sweep(tensor: np.ndarray, cores: list[np.ndarray]) -> float:
    """Fit every core once, last to first and back; what the last fit keeps of the tensor's power."""
    for k in range(len(cores) - 1, 0, -1):  # right-orthonormal, so that the first fit is a projection
        r, size, s = cores[k].shape
        q, factor = np.linalg.qr(cores[k].reshape(r, size * s).T)
        cores[k] = q.T.reshape(-1, size, s)
        cores[k - 1] = np.tensordot(cores[k - 1], factor.T, 1)
    rest, kept = tensor.reshape(1, *tensor.shape), 0.0
    for k in range(len(cores)):
        fitted = rest
        for core in reversed(cores[k + 1 :]):
            tail = core.reshape(core.shape[0], -1)
            fitted = fitted.reshape(-1, tail.shape[1]) @ tail.T
        cores[k] = fitted.reshape(cores[k].shape)
        if k == len(cores) - 1:
            kept = float(np.square(cores[k]).sum())
            break
        r, size, s = cores[k].shape
        q, factor = np.linalg.qr(cores[k].reshape(r * size, s))
        cores[k] = q.reshape(r, size, -1)
        cores[k + 1] = np.tensordot(factor, cores[k + 1], 1)
        rest = q.T @ rest.reshape(r * size, -1)
    return kept


def _balanced(cores: list[np.ndarray]) -> list[np.ndarray]:
    """The same train, each bond's singular values shared by its two cores."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        r, size, s = cores[k].shape
        q, factor = np.linalg.qr(cores[k].reshape(r, size * s).T)
        cores[k] = q.T.reshape(-1, size, s)
        cores[k - 1] = np.tensordot(cores[k - 1], factor.T, 1)
    before = np.ones(1)
    for k in range(len(cores) - 1):
        r, size, s = cores[k].shape
        u, sigma, v = np.linalg.svd(cores[k].reshape(r * size, s), full_matrices=False)
        root, inverse = spread(sigma)
        cores[k] = u.reshape(r, size, -1) * before[:, None, None] * root
        cores[k + 1] = np.tensordot(sigma[:, None] * v, cores[k + 1], 1)
        before = inverse
    cores[-1] = cores[-1] * before[:, None, None]
    return cores


def _as_core(core: np.ndarray, k: int, count: int) -> np.ndarray:
    """[r_{k-1}, |b_k|, r_k] -> [1.., r_{k-1}, r_k, 1.., |b_k|]; the ends carry one rank."""
    axes = [1] * (count - 1)
    if k > 0:
        axes[k - 1] = core.shape[0]
    if k < count - 1:
        axes[k] = core.shape[2]
    return core.transpose(0, 2, 1).reshape(*axes, core.shape[1])


def project(tensor: np.ndarray, bases: Sequence[np.ndarray | None]) -> np.ndarray:
    """T ×_k U_kᵀ over the axes that have a basis U_k: [|b_k|, r_k]."""
    for axis, vectors in enumerate(bases):
        if vectors is not None:
            tensor = np.moveaxis(np.tensordot(vectors, tensor, ([0], [axis])), 0, axis)
    return tensor


def unfold(tensor: np.ndarray, axis: int) -> np.ndarray:
    """The matrix of one axis against all others: [|b_k|, rest]."""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def tucker(
    tensor: np.ndarray, ranks: Sequence[int | None], *, sweeps: int = 0
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """The core [r_1|(|b_1|), ..] and the bases [|b_k|, r_k] of a Tucker form; None among the ranks keeps an axis whole.

    The start is the truncated higher-order SVD, a sweep fits each basis to the others (HOOI).
    """
    bases = [None if rank is None else basis(unfold(tensor, k), rank) for k, rank in enumerate(ranks)]
    power, best = float(np.square(tensor).sum()), math.inf
    for _ in range(sweeps):
        for axis, rank in enumerate(ranks):
            if rank is not None:
                others = [None if k == axis else vectors for k, vectors in enumerate(bases)]
                _, vectors = np.linalg.eigh(_rows_gram(unfold(project(tensor, others), axis)))
                bases[axis] = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
        lost = power - float(np.square(project(tensor, bases)).sum())
        if not lost < best * (1 - _GAIN):
            break
        best = lost
    return _shared(project(tensor, bases), bases)


def _rows_gram(matrix: np.ndarray) -> np.ndarray:
    product: np.ndarray = matrix @ matrix.T
    return product


def _shared(core: np.ndarray, bases: list[np.ndarray | None]) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """The same form, with the core's singular values along each axis shared with that axis's basis."""
    turns = [
        None if vectors is None else np.linalg.eigh(_rows_gram(unfold(core, axis)))[1]
        for axis, vectors in enumerate(bases)
    ]
    core = project(core, turns)  # all-orthogonal: its slices along each axis are orthogonal to each other
    roots = [spread(np.linalg.norm(unfold(core, axis), axis=1)) for axis in range(core.ndim)]
    shared: list[np.ndarray | None] = []
    for axis, (vectors, turn, (root, inverse)) in enumerate(zip(bases, turns, roots, strict=True)):
        if vectors is None or turn is None:
            shared.append(None)
            continue
        core = core * inverse.reshape([-1 if k == axis else 1 for k in range(core.ndim)])
        shared.append(vectors @ turn * root)
    return core, shared
