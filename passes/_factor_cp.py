"""Canonical polyadic form of a blocked weight by alternating least squares from several starts.

    T[b_1, .., b_S] ≈ Σ_r A_1[r, b_1] A_2[r, b_2] .. A_S[r, b_S]

The best form is not a projection and the problem has many minima: a few starts race for some sweeps, the best goes on.
Every third sweep is followed by a step along the way that the last ones took, kept when the error falls.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import numpy as np

from mc_opt.passes._factor_chain import unfold

_STARTS = 10
_RACE = 12  # sweeps before the best starts are chosen
_FINAL = 3  # starts that go on
_SWEEPS = 250  # of each of them, at most
_FEWEST = 10  # sweeps where even these take long
_RIDGE = 1e-11  # of the mean diagonal: keeps the normal equations of nearly parallel terms solvable
_GAIN = 1e-6  # a sweep that lowers the squared error by less is the last
_SINGLE = 1 << 24  # products of a sweep from which the large ones are summed in float32
# Seconds of a sweep: its calls, a multiplication in its products and in its equations.
_SWEEP, _PRODUCT, _SOLVE = 3e-4, 1.4e-11, 6e-11


def cp(tensor: np.ndarray, rank: int, *, rng: np.random.Generator, effort: float = 1.0) -> list[np.ndarray]:
    """Cores [rank, |b_k|]. tensor: [|b_1|, .., |b_S|]. The terms' norms are shared evenly by the factors.

    `effort` is about the seconds to spend, by an estimate that knows no clock: fewer starts and sweeps for more work.
    """
    budget = max(_FEWEST, int(effort / sweep_cost(tensor.shape, rank)))
    starts = max(1, min(_STARTS, budget // (4 * _RACE)))
    problem = _Problem(tensor, rank)
    race = [
        problem.descend(_start(tensor, rank, rng, leading=number == 0), sweeps=min(_RACE, budget))
        for number in range(starts)
    ]
    race.sort(key=lambda found: found[1])
    final = max(1, min(_FINAL, starts // 2))
    sweeps = min(_SWEEPS, (budget - starts * _RACE) // final)
    if sweeps > 0:
        race = [problem.descend(cores, sweeps=sweeps) for cores, _ in race[:final]]
    cores, _ = min(race, key=lambda found: found[1])
    return _even(cores)


def sweep_cost(shape: Sequence[int], rank: int) -> float:
    """About the seconds of one sweep."""
    return _SWEEP + 4 * _PRODUCT * float(np.prod(shape)) * rank + _SOLVE * len(shape) * rank**3


def _start(tensor: np.ndarray, rank: int, rng: np.random.Generator, *, leading: bool) -> list[np.ndarray]:
    """Random cores; with `leading` the singular vectors of each axis come first."""
    cores = []
    for axis, size in enumerate(tensor.shape):
        core = rng.standard_normal((rank, size)) / np.sqrt(size)
        if leading:
            matrix = unfold(tensor, axis)
            _, vectors = np.linalg.eigh(matrix @ matrix.T)
            count = min(rank, size)
            core[:count] = vectors[:, ::-1][:, :count].T
        cores.append(core)
    return cores


class _Problem:
    """One tensor and rank: what all sweeps share."""

    def __init__(self, tensor: np.ndarray, rank: int) -> None:
        self.power = float(np.vdot(tensor, tensor))
        self.large = int(np.argmax(tensor.shape))
        self.others = [k for k in range(tensor.ndim) if k != self.large]
        self.rest = [tensor.shape[k] for k in self.others]
        self.type = np.float32 if tensor.size * rank > _SINGLE else np.float64
        self.matrix: np.ndarray = np.ascontiguousarray(unfold(tensor, self.large), self.type)

    def descend(self, cores: list[np.ndarray], *, sweeps: int) -> tuple[list[np.ndarray], float]:
        """Sweeps of least squares; the cores and the squared error, which never rises."""
        cores, lost = self.sweep(cores)
        before = cores
        for number in range(1, sweeps):
            if number % 3 == 0:
                length = (number + 1) ** (1 / len(cores))
                ahead = [old + (new - old) * length for old, new in zip(before, cores, strict=True)]
                trial, found = self.sweep(ahead)
                if found < lost:
                    before, cores, lost = cores, trial, found
                    continue
            trial, found = self.sweep(cores)
            if found > lost:
                break
            done = lost - found < _GAIN * found
            before, cores, lost = cores, trial, found
            if done:
                break
        return cores, lost

    def sweep(self, cores: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
        """Fit every core once, the largest last; the squared error of the result.

        Two products need the whole tensor: one with the largest core, one with all others.
        """
        cores, rank = _even(cores), len(cores[0])
        grams = [core @ core.T for core in cores]
        typed: list[np.ndarray] = [core.astype(self.type) for core in cores]
        partial = (typed[self.large] @ self.matrix).reshape(rank, *self.rest)
        for place, k in enumerate(self.others):
            reduced = partial
            for axis in range(len(self.others) - 1, -1, -1):
                if axis != place:
                    reduced = _weigh(reduced, typed[self.others[axis]], axis + 1)
            cores[k] = _solve(grams, k, reduced.astype(np.float64))
            grams[k] = cores[k] @ cores[k].T
            typed[k] = cores[k].astype(self.type)
        product = functools.reduce(_khatri_rao, [typed[k] for k in self.others])
        right = (product @ self.matrix.T).astype(np.float64)
        cores[self.large] = _solve(grams, self.large, right)
        grams[self.large] = cores[self.large] @ cores[self.large].T
        lost = self.power - 2 * float(np.vdot(right, cores[self.large]))
        return cores, max(lost + float(functools.reduce(operator.mul, grams).sum()), 0.0)


def _weigh(partial: np.ndarray, core: np.ndarray, axis: int) -> np.ndarray:
    """Sum the products with one core over its axis, for each term. partial: [rank, .., |b|, ..]; core: [rank, |b|]."""
    rank, size = core.shape
    flat = partial.reshape(rank, math.prod(partial.shape[1:axis]), size, -1)
    if flat.shape[3] == 1:
        summed: np.ndarray = np.matmul(flat[..., 0], core[:, :, None])
    else:
        summed = np.matmul(core[:, None, None, :], flat)
    summed = summed.reshape(*partial.shape[:axis], *partial.shape[axis + 1 :])
    return summed


def _khatri_rao(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = a[:, :, None] * b[:, None, :]
    return product.reshape(len(a), -1)


def _solve(grams: Sequence[np.ndarray], k: int, right: np.ndarray) -> np.ndarray:
    """The core that minimises the error with the others given."""
    matrix = functools.reduce(operator.mul, [g for j, g in enumerate(grams) if j != k])
    matrix = matrix + np.eye(len(matrix)) * (_RIDGE * np.trace(matrix) / len(matrix) + np.finfo(float).tiny)
    solved: np.ndarray = np.linalg.solve(matrix, right)
    return solved


def _even(cores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each term's norm shared evenly by its factors."""
    norms = np.stack([np.linalg.norm(core, axis=1) for core in cores])
    alive = (norms > 0).all(axis=0)
    safe = np.where(alive, norms, 1)
    scale = np.where(alive, np.exp(np.log(safe).mean(axis=0)) / safe, 0)
    return [core * s[:, None] for core, s in zip(cores, scale, strict=True)]
