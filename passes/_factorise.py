"""What `sekron` and `kron` share: collect the weights, factorise them in parallel, put the factors in their place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir
from threadpoolctl import threadpool_limits

from mc_opt import ir
from mc_opt.passes import _factor_graph
from mc_opt.passes._base import Context, Pass
from mc_opt.passes._factor_sites import FactorSite, factor_site
from mc_opt.passes._plan import Asked, Chosen, choose

_LARGE = 1 << 26  # elements of a weight from which layers are taken one at a time: a few float64 copies each
_CHECKED = 1 << 22  # elements that are looked at for NaN at a time


def factorise(step: Pass, model: onnx_ir.Model, ctx: Context, asked: Callable[[str], Asked]) -> int:
    """Replace every weight that gains by its factors; the number of weights.

    Args:
        step: the pass, for its name and its `layers` and `skip`.
        model: edited in place.
        ctx: the context of the run.
        asked: what is wanted of a layer.
    """
    taken = list(_taken(step, model, ctx))
    count = 0
    for place, chosen in zip(taken, _choose_all(taken, ctx, asked), strict=True):
        if isinstance(chosen, ir.Skip):
            ctx.skip(place.site.layer, chosen)
            continue
        count += 1
        factors = chosen.factors
        rule = f"{factors.structure} {len(factors.arrays)} factors"
        _factor_graph.replace(place, factors, ctx, by=(step.name, rule))
        ctx.note(place.site.layer, _note(chosen, place.site))
    if count:
        ir.add_functions(model)
    return count


def _taken(step: Pass, model: onnx_ir.Model, ctx: Context) -> Iterator[FactorSite]:
    for found in ir.weight_sites(model):
        layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
        place = step.declines(layer) or _judged(site, ctx)
        if isinstance(place, ir.Skip):
            ctx.skip(layer, place)
        else:
            yield place


def _judged(site: ir.WeightSite | ir.Skip, ctx: Context) -> FactorSite | ir.Skip:
    place = factor_site(site) if isinstance(site, ir.WeightSite) else site
    if isinstance(place, FactorSite) and not _is_finite(ctx.weight(place.site.value)):
        return ir.Skip("it holds NaN or infinite values; repair the weight")
    return place


def _is_finite(weight: np.ndarray) -> bool:
    rows = max(1, _CHECKED // max(1, weight[:1].size))
    return all(
        bool(np.isfinite(weight[start : start + rows].astype(np.float32)).all())
        for start in range(0, len(weight), rows)
    )


def _choose_all(taken: Sequence[FactorSite], ctx: Context, asked: Callable[[str], Asked]) -> Iterator[Chosen | ir.Skip]:
    """The choice for each layer, in order. Every layer has one thread, so the number of workers changes no result."""

    def one(place: FactorSite) -> Chosen | ir.Skip:
        return choose(place.layer(ctx), asked(place.site.layer), seed=ctx.seed)

    large = any(np.prod(place.site.shape) > _LARGE for place in taken)
    workers = 1 if large else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # The costly ones first, so that none is left running alone at the end.
        order = sorted(range(len(taken)), key=lambda i: -int(np.prod(taken[i].site.shape)))
        waiting = {i: pool.submit(one, taken[i]) for i in order}
        for done, i in enumerate(order):
            ctx.progress(done, len(taken), taken[i].site.layer)
            waiting[i].result()
    return (waiting[i].result() for i in range(len(taken)))


def _note(chosen: Chosen, site: ir.WeightSite) -> str:
    candidate = chosen.candidate
    times = f", predicted {candidate.nanoseconds / 1e3:.1f} us, dense {chosen.dense_nanoseconds / 1e3:.1f} us"
    return (
        f"{candidate}: {int(np.prod(site.shape))} -> {chosen.factors.parameters} parameters, relative error "
        f"{candidate.error:.4f}{'' if site.kind == 'Gather' else times}"
    )
