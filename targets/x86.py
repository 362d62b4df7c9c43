"""The target `x86`: 64-bit x86 processors with AVX2 or AVX-512, as a TVM module or as a static library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir

import mc_opt
from mc_opt.targets import _c_source, _installed, _machine, _manifest, _process
from mc_opt.targets._base import Built, Price, Progress, Target
from mc_opt.targets._machine import Machine
from mc_opt.targets._manifest import Port
from mc_opt.targets._refusal import check, check_nodes
from mc_opt.targets._runner import runner


@dataclasses.dataclass(frozen=True)
class X86(Target):
    """Native code for 64-bit x86.

    cpu is the processor to build for: native (this one) or a level of the x86-64 ABI. threads is the number of
    threads that large kernels are split for. form=vm makes model.so for TVM's runtime, form=static makes
    libmodel.a and model.h, which need no runtime and run in the caller's thread. prefix starts their names, so that
    two static models fit in one program.
    """

    name: ClassVar[str] = "x86"
    # Nanoseconds a unit on one core: benchmarks/price.py on an Intel Xeon (sapphirerapids, AVX-512). A fused
    # multiply-add is one product and one sum, half of its 0.0108 each; it is taken off shift's and lookup's loops.
    price: ClassVar[Price] = Price(mul=0.0054, add=0.0054, shift=0.019, xnor=0.0008, lookup=0.031, bytes=0.05)

    cpu: Literal["native", "x86-64-v3", "x86-64-v4"] = "native"
    threads: int = 1
    form: Literal["vm", "static"] = "vm"
    prefix: str = "model"

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        if not 1 <= self.threads <= 256:
            raise ValueError(f"threads={self.threads}: expected 1 to 256")
        if self.form == "static" and self.threads != 1:
            raise ValueError(f"threads={self.threads}: form=static runs in the caller's thread; leave threads=1")
        if not _c_source.is_prefix(self.prefix):
            raise ValueError(f"prefix={self.prefix}: expected a name in C: letters, digits and _, a letter first")
        if self.form == "vm" and self.prefix != "model":
            raise ValueError(f"prefix={self.prefix}: names the files of form=static; form=vm has none")

    def machine(self) -> Machine:
        """The processor to build for, `native` looked up."""
        if self.cpu == "native":
            return _machine.native(threads=self.threads)
        return _machine.named(self.cpu, threads=self.threads)

    def resolved(self) -> str:
        """The target with its processor's name and features spelled out."""
        machine = self.machine()
        features = ",".join(f"+{f}" for f in machine.features)
        prefix = "" if self.form == "vm" else f" prefix={self.prefix}"
        return f"x86{{cpu={machine.cpu} features={features} threads={self.threads} form={self.form}{prefix}}}"

    def check(self, model: onnx_ir.Model) -> None:
        """Refuse symbolic shapes and inputs of unknown types, and a machine without TVM.

        Raises:
            TargetError: naming the input or the package, and what to do.
        """
        check(model, self.name)
        _installed.check_compiler()

    def check_nodes(self, model: onnx_ir.Model) -> None:
        """Refuse control flow that the passes left.

        Raises:
            TargetError: naming the node, and what to do.
        """
        check_nodes(model, self.name)

    def compile(self, model: onnx_ir.Model, folder: Path, progress: Progress) -> Built:
        """Build the artefact into `folder`, which exists and is empty."""
        self.check(model)
        self.check_nodes(model)
        machine = self.machine()
        answer = _process.build(model, folder, machine, form=self.form, prefix=self.prefix, progress=progress)
        inputs = _inputs(model)
        outputs = tuple(Port(n, tuple(shape), dtype) for n, shape, dtype in answer["outputs"])
        if self.form == "vm":
            (folder / "runner.cc").write_text(runner(inputs, outputs), encoding="utf-8")
        files = {p.name: _manifest.sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
        manifest = _manifest.Manifest(
            schema_version=_manifest.SCHEMA_VERSION,
            mc_opt=mc_opt.__version__,
            tvm=_installed.tvm_version(),
            target=self.resolved(),
            kind=self.name,
            form=self.form,
            cpu=machine.cpu,
            features=machine.features,
            threads=self.threads,
            inputs=inputs,
            outputs=outputs,
            kernels=tuple(answer["kernels"]),
            fallbacks=tuple(answer["fallbacks"]),
            files=files,
        )
        (folder / _manifest.NAME).write_text(manifest.text(), encoding="utf-8")
        return Built(
            folder=folder,
            files=files,
            resolved=manifest.target,
            kernels=manifest.kernels,
            fallbacks=manifest.fallbacks,
            seconds=answer["seconds"],
        )


def _inputs(model: onnx_ir.Model) -> tuple[Port, ...]:
    ports = []
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None and value.dtype is not None  # check() saw to it
        shape = tuple(int(d) for d in value.shape if isinstance(d, int))
        ports.append(Port(value.name, shape, str(np.dtype(value.dtype.numpy()))))
    return tuple(ports)
