"""Time of an x86 artefact beside ONNX Runtime fp32 on the same machine, interleaved, one thread.

    python -m benchmarks.speed                                  ResNet-18 and MiniLM (sequence 64)
    python -m benchmarks.speed --model resnet18 --passes fold-batch-norm,denseshift
    python -m benchmarks.speed --model path/to/model.onnx --rounds 40

Each round runs A B B A in batches, as `mc-opt bench` does, so that a drift of the machine hits both alike. Only the
ratio, taken in one run, means something on a shared machine. MiniLM needs the public models (`--public`) and
transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mc_opt.tools import _timing


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
    runs = {"artefact": lambda: artefact.run(feed), "ONNX Runtime": lambda: session.run(None, dict(feed))}
    times = _timing.interleave(runs, rounds=rounds)
    ratio = _timing.ratio(times["artefact"], times["ONNX Runtime"])
    size = (folder / "x86" / "model.so").stat().st_size
    for name, series in times.items():
        print(f"  {name:12}  {_timing.spread_text(series)}")
    print(f"  ratio {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", end="; ")
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
