"""Kronecker factors of a weight as arrays: the blocked tensor that every structure factorises, and the exact error.

The factor shapes [F_k, C_k, K_k1, ..] cut each axis of a weight into S digits, factor 1's the slowest. Brought
together factor by factor they make the blocked tensor T[b_1, .., b_S] with b_k = (f_k, c_k, t_k). It holds the
weight's own numbers, so errors are the same, and a sum of Kronecker products of W is a sum of outer products of T:
a matrix factorisation at S = 2, and any tensor decomposition of T above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mc_opt import ir

Structure = Literal["gkpd", "sekron", "tt", "tucker", "cp"]
Shape = tuple[int, ...]

_PIECE = 1 << 23  # elements of a weight that are compared at a time: bounds the float64 copies


@dataclass(frozen=True)
class Factors:
    """Factors of a weight, factor 1 first: arrays [R_1|1, .., R_m|1, F_k, C_k, K_k1, ..]."""

    structure: Structure
    arrays: tuple[np.ndarray, ...]
    ranks: int

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays' shapes, rank axes included."""
        return tuple(array.shape for array in self.arrays)

    @property
    def parameters(self) -> int:
        """Elements of all factors."""
        return sum(array.size for array in self.arrays)

    def astype(self, dtype: np.dtype) -> Factors:
        """The factors in another type."""
        return Factors(self.structure, tuple(np.ascontiguousarray(a, dtype) for a in self.arrays), self.ranks)


def block(weight: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The blocked tensor of a weight: [|b_1|, .., |b_S|] in float64.

    weight: [F, C, K_1, ..]; shapes: [F_k, C_k, K_k1, ..] of each factor, whose products are the weight's.
    """
    digits = [shape[axis] for axis in range(weight.ndim) for shape in shapes]
    order = [axis * len(shapes) + k for k in range(len(shapes)) for axis in range(weight.ndim)]
    tensor = weight.reshape(digits).transpose(order).reshape([math.prod(shape) for shape in shapes])
    return np.ascontiguousarray(tensor, np.float64)


def assemble(structure: Structure, cores: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Factors:
    """Factors from cores of the blocked tensor: core k [R_1|1, .., |b_k|] takes the shape of its block."""
    ranks = cores[0].ndim - 1
    arrays = tuple(core.reshape(*core.shape[:-1], *shape) for core, shape in zip(cores, shapes, strict=True))
    return Factors(structure, arrays, ranks)


def relative_error(weight: np.ndarray, factors: Factors) -> float:
    """‖W − Ŵ‖/‖W‖ of the factors as they are stored, by reconstruction in float64; 0 for a weight of zeros.

    A large weight is compared in pieces along factor 1's output digit.
    """
    first, ranks = factors.arrays[0].astype(np.float64), factors.ranks
    rest = [array.astype(np.float64) for array in factors.arrays[1:]]
    blocks = first.shape[ranks]
    rows = weight.shape[0] // blocks
    step = max(1, _PIECE // max(1, weight.size // blocks))
    wrong = total = 0.0
    for start in range(0, blocks, step):
        part = first[(slice(None),) * ranks + (slice(start, start + step),)]
        exact = weight[start * rows : (start + step) * rows].astype(np.float64)
        difference = exact - ir.kron_weight([part, *rest], ranks)
        wrong += float(np.vdot(difference, difference))
        total += float(np.vdot(exact, exact))
    return math.sqrt(wrong / total) if total else 0.0


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """√σ and 1/√σ of singular values, the latter 0 where σ is none, to share them between two neighbours."""
    root = np.sqrt(np.maximum(values, 0))
    floor = 1e-14 * root.max(initial=0)
    return root, np.divide(1.0, root, out=np.zeros_like(root), where=root > floor)
