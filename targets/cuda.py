"""The target `cuda`: NVIDIA GPUs from sm_75 on, as a TVM module whose kernels are compiled while building."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir

from mc_opt.targets import _cuda, _installed, _machine, _native
from mc_opt.targets._base import Built, Price, Progress, Target
from mc_opt.targets._cuda import Code
from mc_opt.targets._machine import Machine
from mc_opt.targets._refusal import check, check_nodes

if TYPE_CHECKING:
    from mc_opt.targets._vm import Artefact


@dataclasses.dataclass(frozen=True)
class Cuda(Target):
    """Kernels for NVIDIA GPUs under 64-bit Linux, built on any machine: no GPU is needed.

    arch is the architecture to build for (sm_80 is the A100). code is what the artefact holds: cubin, machine code
    for GPUs of the same generation; ptx, which the driver compiles for this GPU or a later one when the artefact is
    loaded; fatbin, both; source, CUDA C++ that is compiled at loading by NVRTC. auto is fatbin where nvcc is there,
    cubin where NVRTC is, and source where neither is.
    """

    name: ClassVar[str] = "cuda"
    # Nanoseconds a unit on a whole A100 (sm_80), derived from its data sheet, never measured: 19.5 Tflop/s in float32
    # are 9.75e12 multiply-adds a second, half of each for the product and half for the sum; integer shifts at half the
    # rate of float; population counts at a quarter, 32 products each; a lookup is a shift, a mask and a read of the
    # codebook; 1555 GB/s from memory, which is read again after a kernel wrote it. A launch is taken for 2 µs.
    price: ClassVar[Price] = Price(
        mul=5.1e-5,
        add=5.1e-5,
        shift=1.0e-4,
        xnor=6.4e-6,
        lookup=3.1e-4,
        bytes=6.4e-4,
        call=2000.0,
        traffic=1.3e-3,
    )

    arch: Literal[
        "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"
    ] = "sm_80"
    code: Literal["auto", "ptx", "cubin", "fatbin", "source"] = "auto"

    def machine(self) -> Machine:
        """The GPU to build for."""
        return _machine.cuda(self.arch)

    def form(self) -> Code:
        """What the artefact holds, `auto` looked up."""
        return _cuda.best_code() if self.code == "auto" else self.code

    def resolved(self) -> str:
        """The target with the form of its code spelled out."""
        return _native.resolved(self.machine(), form=self.form(), prefix="")

    def check(self, model: onnx_ir.Model) -> None:
        """Refuse open sizes but for the batch and sequences, inputs of unknown types, and a machine without a compiler.

        Raises:
            TargetError: naming the input or the package, and what to do.
        """
        check(model, self.name)
        _installed.check_compiler()
        _cuda.check(self.form())

    def check_nodes(self, model: onnx_ir.Model) -> None:
        """Refuse control flow that the passes left.

        Raises:
            TargetError: naming the node, and what to do.
        """
        check_nodes(model, self.name)

    def compile(
        self, model: onnx_ir.Model, folder: Path, progress: Progress, *, tiles: Mapping[str, str] | None = None
    ) -> Built:
        """Build the artefact into `folder`, which exists and is empty; a GPU's kernels have one tile a shape."""
        _cuda.check(self.form())
        return _native.compile_model(model, folder, self.machine(), form=self.form(), prefix="model", progress=progress)

    def load(self, folder: Path) -> Artefact | None:
        """What was built into `folder`; None without a GPU that runs it."""
        return _native.load(folder)
