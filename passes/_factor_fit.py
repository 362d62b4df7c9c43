"""Factors of a weight in one form at given ranks: the one place that knows which method serves which structure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mc_opt.passes import _factor_chain, _factor_cp, _factor_svd
from mc_opt.passes._factor import Factors, assemble, block
from mc_opt.passes._plan_form import Form

_SWEEPS = {"tt": 8, "tucker": 8, "sekron": 6}


def fit(
    weight: np.ndarray, form: Form, ranks: Sequence[int], *, rng: np.random.Generator, effort: float = 1.0
) -> Factors:
    """Factors [R_1|1, .., F_k, C_k, K_k1, ..] in float64. weight: [F, C, K_1, ..], finite.

    A rank above what a form can use is lowered; every form is refined by least squares where that can help.
    `effort` is about the seconds that a form with many minima may take.
    """
    if form.structure == "tucker":
        return _tucker(weight, form, ranks)
    tensor = block(weight, form.blocks)
    if len(form.blocks) == 2:  # every structure is a matrix factorisation then, and the SVD the best of them
        return assemble(form.structure, _factor_svd.gkpd(tensor, ranks[0]), form.blocks)
    match form.structure:
        case "sekron":
            cores = _factor_svd.nested(tensor, ranks, sweeps=_SWEEPS["sekron"])
        case "tt":
            cores = _factor_chain.train(tensor, ranks, sweeps=_SWEEPS["tt"])
        case "cp":
            cores = _factor_cp.cp(tensor, ranks[0], rng=rng, effort=effort)
        case _:
            raise AssertionError(f"{form.structure} has two factors")
    return assemble(form.structure, cores, form.blocks)


def _tucker(weight: np.ndarray, form: Form, ranks: Sequence[int]) -> Factors:
    wanted: list[int | None] = [None] * weight.ndim
    for j, rank in enumerate(ranks):
        wanted[form.axis(form.mode(j))] = rank
    core, bases = _factor_chain.tucker(weight.astype(np.float64), wanted, sweeps=_SWEEPS["tucker"])
    used = [core.shape[form.axis(form.mode(j))] for j in range(len(ranks))]
    arrays: list[np.ndarray] = [core] * len(form.blocks)
    for j, rank in enumerate(used):
        vectors = bases[form.axis(form.mode(j))]
        assert vectors is not None
        alone = [rank if i == j else 1 for i in range(len(ranks))]
        arrays[form.mode(j)] = vectors.T.reshape(*alone, *form.blocks[form.mode(j)])
    order = [form.axis(form.mode(j)) for j in range(len(ranks))]
    arrays[form.core] = np.moveaxis(core, order, range(len(order))).reshape(*used, *form.blocks[form.core])
    return Factors("tucker", tuple(arrays), len(ranks))
