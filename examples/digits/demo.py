"""The demo: the digits CNN through `fold-batch-norm,denseshift{bits=4}` to ONNX and x86, judged on held-out digits.

Run it with `make demo`. It writes to out/digits and out/digits-static, and ends with exit code 1 when 4 bits lose
more than a point of accuracy or the artefact disagrees with the ONNX file.
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
from mc_opt.ir import Session

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = HERE / "digits.onnx"
DATA = HERE / "digits-heldout.npz"
PASSES = "fold-batch-norm,denseshift{bits=4}"
POINT = 0.01

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


def compress(target: str, out: Path) -> None:
    """Call the command line as a user would, and show the call."""
    program = Path(sys.executable).parent / "mc-opt"
    arguments = [MODEL, "--passes", PASSES, "--target", target, "--data", DATA, "-o", out]
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


def static_library(images: np.ndarray) -> Row:
    """The same model as a C library: built, linked into a small program without any runtime, and run."""
    out = ROOT / "out" / "digits-static"
    compress("x86{form=static}", out)
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
    compress("onnx,x86", out)
    artefact = mc_opt.load(out, target="x86")
    rows = [
        measure("float, ONNX Runtime", Session(MODEL).run, images, (MODEL,)),
        measure("4 bits, ONNX Runtime", Session(out / "model.onnx").run, images, (out / "model.onnx",)),
        measure("4 bits, x86 artefact", artefact.run, images, (out / "x86" / "model.so",)),
        static_library(images),
    ]
    report(rows, labels, out)
    failed = judge(rows, labels)
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
    facts = json.loads((out / "report.json").read_text())
    timings = json.loads((out / "timings.json").read_text())
    before, after = (facts[key]["weight_bytes"] / 1000 for key in ("before", "after"))
    print(f"\nweights {before:.1f} kB -> {after:.1f} kB", end="")
    rewritten = [layer for layer in facts["layers"] if layer["rewritten_by"] == "denseshift"]
    share = sum(layer["bytes_after"] for layer in rewritten) / sum(layer["bytes_before"] for layer in rewritten)
    print(
        f"; the {len(rewritten)} layers that denseshift rewrote take {share:.3f} of fp32, scales and codebook included"
    )
    print("seconds: " + ", ".join(f"{p['name']} {p['seconds']:.3f}" for p in timings["passes"]), end="")
    print("".join(f", {name} {seconds:.1f}" for name, seconds in timings["stages"].items() if name.startswith("build")))


def judge(rows: list[Row], labels: np.ndarray) -> bool:
    """Print what must hold, and whether it does."""
    lossless, exported = rows[0].accuracy(labels), rows[1].logits
    bound = 1e-4 * float(np.ptp(exported))
    verdicts = [
        (f"{row.name}: within 1 point of float", row.accuracy(labels) >= lossless - POINT) for row in rows[1:]
    ] + [
        (f"{row.name}: equals the ONNX file within 1e-4 of its range", np.abs(row.logits - exported).max() <= bound)
        for row in rows[2:]
    ]
    print()
    for text, holds in verdicts:
        print(f"{'ok    ' if holds else 'FAILED'} {text}")
    return not all(holds for _, holds in verdicts)


if __name__ == "__main__":
    sys.exit(main())
