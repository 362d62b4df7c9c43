"""The demo: a CNN for handwritten digits through `sekron,denseshift{bits=4}` with training, judged on held-out digits.

It trains on the 1,347 digits that scikit-learn brings and that are not held out, each also moved by one pixel, builds
the result for x86 and ARM, and once more as a C library. Run it with `make demo`. It writes to out/, and ends with exit
code 1 when the result loses more than a point of accuracy, takes more than a sixth of the bytes, or an artefact
disagrees with the ONNX file.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mc_opt
from mc_opt import ir
from mc_opt.ir import Session

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import split

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = HERE / "digits.onnx"
DATA = HERE / "digits-heldout.npz"
TRAIN = ROOT / "out" / "digits-train.npz"
PASSES = "sekron,denseshift{bits=4}"
TRAINING = "--joint --parameters all --loss labels,output --epochs 8 --batch-size 64 --lr 3e-3 --threads 1"
POINT = 0.01
SHARE = 1 / 6

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Row:
    """One way to run the model: its logits f32[n, 10], the time of a digit, and the bytes it takes on disk."""

    name: str
    logits: np.ndarray
    microseconds: float | None
    files: tuple[Path, ...]

    def accuracy(self, labels: np.ndarray) -> float:
        """The share of digits whose largest logit is the label."""
        return float((self.logits.argmax(1) == labels).mean())


def training_data() -> None:
    """Write the digits that are not held out, each in its place and moved by a pixel in eight directions."""
    images, _, labels, _ = split()
    wide = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    moved = [wide[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    TRAIN.parent.mkdir(exist_ok=True)
    with ir.staged_files(TRAIN.parent) as stage, (stage / TRAIN.name).open("wb") as file:
        np.savez(file, image=np.concatenate(moved), label=np.tile(labels, len(moved)))


def call(*arguments: Path | str) -> None:
    """Call the command line as a user would, and show the call."""
    program = Path(sys.executable).parent / "mc-opt"
    words = [str(a.relative_to(ROOT)) if isinstance(a, Path) else a for a in arguments]
    print(f"\n$ mc-opt {shlex.join(words)}", flush=True)
    done = subprocess.run([program, *words], check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why


def measure(name: str, run: Run, images: np.ndarray, files: tuple[Path, ...]) -> Row:
    """Run every digit on its own, as a device would, and take the median time."""
    logits, times = [], []
    for image in images:
        started = time.perf_counter()
        logits.append(run({"image": image[None]})["logits"][0])
        times.append(time.perf_counter() - started)
    return Row(name, np.array(logits), 1e6 * float(np.median(times)), files)


def static_library(model: Path, images: np.ndarray) -> Row:
    """The same model as a C library: built, linked into a small program without any runtime, and run."""
    out = ROOT / "out" / "digits-static"
    call(model, "--target", "x86{form=static}", "-o", out)
    folder = out / "x86"
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "digits"
        compiler = [sys.executable, "-m", "ziglang", "cc", "-O2"]
        sources = ["-I", str(folder), str(HERE / "main.c"), str(folder / "libmodel.a"), "-lm", "-o", str(program)]
        subprocess.run([*compiler, *sources], check=True)
        done = subprocess.run([program], input=images.tobytes(), capture_output=True, check=True)
        size = program.stat().st_size / 1000
    print(f"\nmain.c with libmodel.a: a program of {size:.0f} kB that needs the C library alone")
    logits = np.frombuffer(done.stdout, np.float32).reshape(len(images), 10)
    return Row("4 bits, C library", logits, float(done.stderr), (folder / "libmodel.a",))


def main() -> int:
    """Compress, run every form on the held-out digits, print the table, and judge."""
    started = time.perf_counter()
    data = np.load(DATA)
    images, labels = data["image"], data["label"]
    print(f"{MODEL.relative_to(ROOT)}: a CNN with BatchNorm, judged on {len(labels)} held-out digits")
    out = ROOT / "out" / "digits"
    training_data()
    train = ["--train", TRAIN, *TRAINING.split()]
    call(MODEL, "--passes", PASSES, *train, "--target", "onnx,x86,arm", "--data", DATA, "-o", out)
    artefact = mc_opt.load(out, target="x86")
    rows = [
        measure("float, ONNX Runtime", Session(MODEL).run, images, (MODEL,)),
        measure("4 bits, ONNX Runtime", Session(out / "model.onnx").run, images, (out / "model.onnx",)),
        measure(
            "4 bits, x86 artefact", artefact.run, images, (out / "x86" / "model.so", out / "x86" / "constants.bin")
        ),
        static_library(out / "model.onnx", images),
    ]
    report(rows, labels, out)
    failed = judge(rows, labels, out)
    print(f"\n{time.perf_counter() - started:.0f} s in all; the results are in {out.relative_to(ROOT)}")
    return 1 if failed else 0


def report(rows: list[Row], labels: np.ndarray, out: Path) -> None:
    """Accuracy, size, time and drift of every form; the time of every pass."""
    reference = rows[0].logits.astype(np.float64)
    print(f"\n{'':28}{'accuracy':>9}{'file':>12}{'a digit':>11}{'SQNR':>10}{'max/spread':>12}{'same digit':>12}")
    for row in rows:
        size = sum(f.stat().st_size for f in row.files) / 1000
        time_text = "-" if row.microseconds is None else f"{row.microseconds:.0f} µs"
        difference = row.logits - reference
        power = (difference**2).sum()
        sqnr = f"{10 * np.log10((reference**2).sum() / power):.1f} dB" if power else "-"
        spread = np.abs(difference).max() / np.ptp(reference)
        same = (row.logits.argmax(1) == reference.argmax(1)).mean()
        print(f"{row.name:28}{row.accuracy(labels):>9.2%}{size:>9.1f} kB", end="")
        print(f"{time_text:>11}{sqnr:>10}{spread:>12.4f}{same:>12.2%}")
    timings = json.loads((out / "timings.json").read_text())
    before, after = weight_bytes(out)
    print(f"\nweights {before / 1000:.1f} kB -> {after / 1000:.1f} kB, scales and codebook included")
    print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in timings["stages"].items()))


def weight_bytes(out: Path) -> tuple[int, int]:
    """What the weights took, and what they take, all constants counted."""
    facts = json.loads((out / "report.json").read_text())
    return facts["before"]["weight_bytes"], facts["after"]["weight_bytes"]


def judge(rows: list[Row], labels: np.ndarray, out: Path) -> bool:
    """Print what must hold, and whether it does."""
    before, after = weight_bytes(out)
    lossless, exported = rows[0].accuracy(labels), rows[1].logits
    bound = 1e-4 * float(np.ptp(exported))
    verdicts = [
        (f"{row.name}: within 1 point of float", bool(row.accuracy(labels) >= lossless - POINT)) for row in rows[1:]
    ] + [
        (f"{row.name}: equals the ONNX file within 1e-4 of its range", np.abs(row.logits - exported).max() <= bound)
        for row in rows[2:]
    ]
    verdicts.append(("weights: at most 1/6 of their bytes", after <= SHARE * before))
    print()
    for text, holds in verdicts:
        print(f"{'ok    ' if holds else 'FAILED'} {text}")
    return not all(holds for _, holds in verdicts)


if __name__ == "__main__":
    sys.exit(main())
