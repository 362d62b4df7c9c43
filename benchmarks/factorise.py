"""Errors of `sekron` beside TensorLy's CP, Tucker and tensor train, at equal or fewer parameters, layer by layer.

    pip install tensorly                           the extra `benchmarks`
    python -m benchmarks.factorise                 every layer; continues where it was stopped
    python -m benchmarks.factorise --only ppocr-cls digits --rows /tmp/rows.json

Layers: the convolutions with taps and more than one channel a group of PP-OCR det and cls, silero (16 kHz) and the
demo's CNN, and the pointwise ones of 50,000 weights or more of EfficientNet-lite0. TensorLy gets each weight as it is
(a pointwise one as a matrix) and finds the ranks of about a half, a quarter and an eighth of the numbers itself; what
it then stores is counted by us, CP's weights not counted. CP and Tucker have five starts (the singular vectors and
four random ones), a train, which has no starts, the orders (F, C, K..), (F, K.., C), (C, F, K..), (C, K.., F) and
(K.., F, C); the best counts. sekron then gets as many numbers as TensorLy took, and no limit of time. "split" is
sekron with forms alone that divide an axis between factors, which none of the three can say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import threadpoolctl

from mc_opt import ir, passes, targets
from mc_opt.passes import _plan
from mc_opt.passes._plan_form import STRUCTURES
from mc_opt.passes._plan_time import Place
from tests.models._fetch import fetch_public
from tests.models.catalogue import MODELS

RATIOS = (0.5, 0.25, 0.125)
METHODS = ("cp", "tucker", "tt")
STARTS = 5
TIE = 1e-6  # relative
LARGE = 50_000  # weights of a pointwise convolution
EFFORT = 20.0
SOURCES = ("ppocr-det", "ppocr-cls", "silero-16k-op15", "digits", "efficientnet-lite0")
RESULTS = Path(__file__).parent / "results" / "factorise.md"


def layers(source: str, root: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The layers of a model that count: name and weight."""
    for site in ir.weight_sites(_model(source, root)):
        if not isinstance(site, ir.WeightSite) or site.kind != "Conv" or site.shape[1] == 1:
            continue
        pointwise = math.prod(site.shape[2:]) == 1
        if pointwise != (source == "efficientnet-lite0") or (pointwise and math.prod(site.shape) < LARGE):
            continue
        yield site.layer, np.array(site.tensor.numpy(), np.float64)


def _model(source: str, root: Path) -> onnx_ir.Model:
    if source == "digits":
        return ir.load_model(Path(__file__).parents[1] / "examples" / "digits" / "digits.onnx")
    public = next(model for model in MODELS if model.name == source)
    found = public.source(root)
    loaded: onnx_ir.Model = found if isinstance(found, onnx_ir.Model) else ir.load_model(found)
    spec = f"specialize{{{public.specialize}}}," if public.specialize else ""
    return passes.run(loaded, passes.Pipeline.parse(spec + "fold-constants"), passes.Context(check="structure")).model


def tensorly_best(weight: np.ndarray, method: str, ratio: float) -> tuple[int, float]:
    """TensorLy's least error at a size of its own choice, and the numbers that it takes."""
    import tensorly
    from tensorly import cp_tensor, tt_tensor, tucker_tensor
    from tensorly.decomposition import parafac, tensor_train, tucker

    tensor = weight.reshape([size for size in weight.shape if size > 1])

    def of_cp(seed: int) -> tuple[int, np.ndarray]:
        rank = max(1, cp_tensor.validate_cp_rank(tensor.shape, ratio))
        init = "random" if seed else "svd"
        found = parafac(tensor, rank, n_iter_max=200, init=init, random_state=seed, tol=1e-8)
        return sum(f.size for f in found.factors), tensorly.cp_to_tensor(found)

    def of_tucker(seed: int) -> tuple[int, np.ndarray]:
        ranks = [max(1, r) for r in tucker_tensor.validate_tucker_rank(tensor.shape, ratio)]
        init = "random" if seed else "svd"
        found = tucker(tensor, ranks, n_iter_max=200, init=init, random_state=seed, tol=1e-8)
        return found.core.size + sum(f.size for f in found.factors), tensorly.tucker_to_tensor(found)

    def of_train(order: tuple[int, ...]) -> tuple[int, np.ndarray]:
        turned = tensor.transpose(order)
        found = tensor_train(turned, [max(1, r) for r in tt_tensor.validate_tt_rank(turned.shape, ratio)])
        return sum(f.size for f in found.factors), tensorly.tt_to_tensor(found).transpose(np.argsort(order))

    axes = tuple(range(tensor.ndim))
    taps = axes[2:]
    orders = sorted({axes, (0, *taps, 1), (1, 0, *taps), (1, *taps, 0), (*taps, 0, 1)})
    starts: dict[str, list[Callable[[], tuple[int, np.ndarray]]]] = {
        "cp": [lambda seed=seed: of_cp(seed) for seed in range(STARTS)],
        "tucker": [lambda seed=seed: of_tucker(seed) for seed in range(STARTS)],
        "tt": [lambda order=order: of_train(order) for order in orders],
    }
    found = []
    for start in starts[method]:
        count, made = start()
        found.append((count, float(np.linalg.norm(tensor - made) / np.linalg.norm(tensor))))
    return min(found, key=lambda pair: pair[1])


def ours(weight: np.ndarray, parameters: int, *, split: bool) -> tuple[str, int, float] | None:
    """sekron's factors in at most so many numbers: the form, the numbers, the error; None if there are none."""
    place = Place(1, 1, 1, 8, targets.find_target("x86").price)
    asked = _plan.Asked(
        (parameters + 0.5) / weight.size, structures=STRUCTURES, limit_time=False, split_only=split, effort=EFFORT
    )
    chosen = _plan.choose(_plan.Layer(weight, place), asked, seed=0)
    if isinstance(chosen, ir.Skip):
        return None
    assert chosen.candidate.error is not None
    return str(chosen.candidate), chosen.factors.parameters, chosen.candidate.error


def examine(source: str, layer: str, weight: np.ndarray, method: str, ratio: float) -> dict[str, Any]:
    """One layer, one method of TensorLy, one size."""
    start = time.perf_counter()
    count, theirs = tensorly_best(weight, method, ratio)
    row: dict[str, Any] = {"model": source, "layer": layer, "shape": list(weight.shape), "method": method}
    row |= {"ratio": ratio, "parameters": count, "theirs": theirs, "seconds": time.perf_counter() - start}
    if count >= weight.size:
        return row | {"left": "TensorLy's factors are no smaller than the weight"}
    start = time.perf_counter()
    for name, split in (("ours", False), ("split", True)):
        found = ours(weight, count, split=split)
        assert found is None or found[1] <= count
        row[name] = None if found is None else {"form": found[0], "parameters": found[1], "error": found[2]}
    return row | {"our_seconds": time.perf_counter() - start}


def wins(row: Mapping[str, Any], name: str) -> bool:
    """Whether our error is TensorLy's or less."""
    return row.get(name) is not None and row[name]["error"] <= row["theirs"] * (1 + TIE) + 1e-12


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of the results as Markdown."""
    counted = [row for row in rows if "left" not in row]
    by_layer = itertools.groupby(counted, key=lambda row: (row["model"], row["layer"]))
    whole = {key: [wins(row, "ours") for row in group] for key, group in by_layer}
    lines = [
        "# sekron beside TensorLy",
        "",
        "    python -m benchmarks.factorise",
        "",
        *(__doc__ or "").strip().split("\n\n", 2)[2].splitlines(),
        "",
        f"Of {len(whole)} layers, {sum(all(w) for w in whole.values())} have an error at most TensorLy's (within "
        f"{TIE:g}) against every method at every size; of {len(counted)} comparisons, "
        f"{sum(wins(row, 'ours') for row in counted)} do, {sum(wins(row, 'split') for row in counted)} with split "
        "forms alone.",
        "",
        "| model | method | comparisons | sekron at most | median ratio of errors | split at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for source, method in itertools.product(SOURCES, METHODS):
        own = [row for row in counted if (row["model"], row["method"]) == (source, method) and row["ours"]]
        if own:
            ratio = np.median([row["ours"]["error"] / max(row["theirs"], 1e-12) for row in own])
            won, split = (sum(wins(row, name) for row in own) for name in ("ours", "split"))
            lines.append(f"| {source} | {method} | {len(own)} | {won} | {ratio:.3f} | {split} |")
    lines += ["", "| layer | method | numbers | TensorLy | sekron | form | split | form |", "| --- " * 8 + "|"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        start = (
            f"| {row['model']} {row['layer']} {shape} | {row['method']} | {row['parameters']} | {row['theirs']:.4f} |"
        )
        cells = [row.get(name) for name in ("ours", "split")]
        ends = [f" {c['error']:.4f} | {c['form']} |" if c else f" - | {row.get('left', 'none fits')} |" for c in cells]
        lines.append(start + "".join(ends))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Fill the rows, write the tables; exit 1 when sekron is at most TensorLy on less than 80 % of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=SOURCES, choices=SOURCES)
    parser.add_argument("--rows", type=Path, default=Path(".cache/factorise.json"), help="rows done so far")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    root = fetch_public()
    rows: list[dict[str, Any]] = json.loads(options.rows.read_text()) if options.rows.exists() else []
    done = {(row["model"], row["layer"], row["method"], row["ratio"]) for row in rows}
    asked = [(s, *pair, m, r) for s in options.only for pair in layers(s, root) for m in METHODS for r in RATIOS]
    start, left = time.perf_counter(), sum((s, n, m, r) not in done for s, n, _, m, r in asked)
    print(f"{len(asked)} comparisons, {left} to do", flush=True)
    made = 0
    with threadpoolctl.threadpool_limits(1):
        for source, layer, weight, method, ratio in asked:
            if (source, layer, method, ratio) in done:
                continue
            rows.append(examine(source, layer, weight, method, ratio))
            options.rows.parent.mkdir(parents=True, exist_ok=True)
            ir.write_text(options.rows, json.dumps(rows))
            made += 1
            rest = (time.perf_counter() - start) / made * (left - made)
            verdict = "at most" if wins(rows[-1], "ours") else "MORE" if rows[-1].get("ours") else "-"
            print(
                f"{source} {layer} {method} {ratio}: {rows[-1]['theirs']:.4f} {verdict}; {rest:.0f} s left", flush=True
            )
    order = {(s, n, m, r): i for i, (s, n, _, m, r) in enumerate(asked)}
    rows = sorted((r for r in rows if _key(r) in order), key=lambda r: order[_key(r)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    ir.write_text(options.out, report(rows))
    counted = [row for row in rows if "left" not in row]
    return 0 if sum(wins(row, "ours") for row in counted) >= 0.8 * len(counted) else 1


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, float]:
    return row["model"], row["layer"], row["method"], row["ratio"]


if __name__ == "__main__":
    sys.exit(main())
