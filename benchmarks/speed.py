"""Time of an x86 artefact beside ONNX Runtime fp32 on the same machine, interleaved, one thread.

    python -m benchmarks.speed                                  ResNet-18 and MiniLM (sequence 64)
    python -m benchmarks.speed --model resnet18 --passes fold-batch-norm,denseshift
    python -m benchmarks.speed --model path/to/model.onnx --rounds 40

Each round runs A B B A, so that a drift of the machine hits both alike. Only the ratio of the medians, taken in one
run, means something on a shared machine. MiniLM needs the public models (`--public`) and transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Feed = Mapping[str, np.ndarray]


def source_of(name: str, public: Path | None, folder: Path) -> Path:
    """The ONNX file of a model: a path, or one that is captured here."""
    if name.endswith(".onnx"):
        return Path(name)
    import mc_opt

    if name == "resnet18":
        import torch

        from benchmarks.resnet18 import resnet18

        model = mc_opt.capture(resnet18(), (torch.zeros(1, 3, 224, 224),))
    else:
        from tests.models._fetch import fetch_public
        from tests.models.catalogue import minilm

        model = minilm(public or fetch_public(), 64)
    mc_opt.save_model(model, folder / name)
    return folder / name / "model.onnx"


def seeded_feed(session: Any) -> dict[str, np.ndarray]:
    """Standard normal floats; integers below 1000, ones for masks."""
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        if "float" in given.type:
            feed[given.name] = rng.standard_normal(given.shape).astype(np.float32)
        elif "mask" in given.name:
            feed[given.name] = np.ones(given.shape, np.int64)
        else:
            feed[given.name] = rng.integers(0, 1000, given.shape).astype(np.int64)
    return feed


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Times of both in rounds of A B B A, after one call of each."""
    ours()
    theirs()
    a: list[float] = []
    b: list[float] = []
    for _ in range(rounds):
        a.append(timed(ours))
        b += [timed(theirs), timed(theirs)]
        a.append(timed(ours))
    return a, b


def quartiles(values: list[float]) -> str:
    """Median and the quartiles around it."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:8.2f} ms [{low:.2f}, {high:.2f}]"


def measure(source: Path, passes: str, target: str, rounds: int, folder: Path) -> None:
    """Build one model and print its line."""
    import onnxruntime

    import mc_opt

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    model, _ = mc_opt.compress(mc_opt.load_model(source), passes, check="structure")
    mc_opt.build(model, target, folder, check="structure")
    seconds = time.perf_counter() - start
    artefact = mc_opt.load(folder)
    feed = seeded_feed(session)
    wanted, got = session.run(None, dict(feed)), artefact.run(feed)
    differences = [float(np.abs(a - b).max() / np.ptp(a)) for a, b in zip(wanted, got.values(), strict=True)]
    ours, theirs = interleaved(lambda: artefact.run(feed), lambda: session.run(None, dict(feed)), rounds)
    size = (folder / "x86" / "model.so").stat().st_size
    print(f"  artefact      {quartiles(ours)}")
    print(f"  ONNX Runtime  {quartiles(theirs)}")
    print(f"  ratio {np.median(ours) / np.median(theirs):.2f} (of the fastest {min(ours) / min(theirs):.2f})", end="; ")
    print(f"difference / range {max(differences):.1e}; model.so {size / 1e6:.1f} MB; built in {seconds:.1f} s")


def main() -> None:
    """Parse the command line and measure."""
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="resnet18, minilm or an ONNX file; may be repeated")
    parser.add_argument("--passes", default="fold-constants,fold-batch-norm")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--public", type=Path, help="folder of the public models")
    arguments = parser.parse_args()
    for name in arguments.model or ["resnet18", "minilm"]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source = source_of(name, arguments.public, folder)
            print(f"{name}: {arguments.passes} -> {arguments.target}")
            measure(source, arguments.passes, arguments.target, arguments.rounds, folder / "out")


if __name__ == "__main__":
    main()
