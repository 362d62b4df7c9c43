"""The target `x86`: 64-bit x86 processors with AVX2 or AVX-512, as a TVM module or as a static library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir

from mc_opt.targets import _installed, _machine, _native, _tune
from mc_opt.targets._base import Built, Price, Progress, Target
from mc_opt.targets._machine import Activations, Machine
from mc_opt.targets._refusal import check, check_nodes

if TYPE_CHECKING:
    from mc_opt.targets._tile_table import Section, TileTable
    from mc_opt.targets._vm import Artefact


@dataclasses.dataclass(frozen=True)
class X86(Target):
    """Native code for 64-bit x86.

    cpu is the processor to build for: native (this one), a level of the x86-64 ABI, or a family by LLVM's name; later
    ones run what was built for an earlier one. threads is the number of threads that large kernels are split for; with
    2 or more, whoever loads the artefact may choose another number.
    form=vm makes model.so for TVM's runtime, form=static makes libmodel.a and model.h, which need no runtime and run in
    the caller's thread. prefix starts their names, so that two static models fit in one program. activations=int8
    rounds what is multiplied with packed weights to 8 bits, each row by its own scale: faster, with an error of its own
    that the report shows; for processors with AVX-512 VNNI, many rows at a time in the tiles of AMX.
    """

    name: ClassVar[str] = "x86"
    # Nanoseconds a unit on one core: benchmarks/price.py on an Intel Xeon (sapphirerapids, AVX-512). A fused
    # multiply-add is one product and one sum, half of its 0.0108 each; it is taken off shift's and lookup's loops;
    # call is an estimate, traffic is fitted to the layers of benchmarks/kron_speed.py, dense and factored.
    price: ClassVar[Price] = Price(
        mul=0.0054, add=0.0054, shift=0.019, xnor=0.0008, lookup=0.031, bytes=0.05, lanes=16, call=400, traffic=0.05
    )

    cpu: Literal[
        "native",
        "x86-64-v3",
        "x86-64-v4",
        "haswell",
        "skylake-avx512",
        "cascadelake",
        "icelake-server",
        "sapphirerapids",
        "znver3",
        "znver4",
    ] = "native"
    threads: int = 1
    form: Literal["vm", "static"] = "vm"
    prefix: str = "model"
    activations: Activations = "float32"

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        _native.check_options(threads=self.threads, form=self.form, prefix=self.prefix)

    @property
    def exact(self) -> bool:
        """Whether activations stay as they are."""
        return self.activations == "float32"

    def machine(self) -> Machine:
        """The processor to build for, `native` looked up."""
        if self.cpu == "native":
            machine = _machine.native(threads=self.threads)
        else:
            machine = _machine.named(self.cpu, threads=self.threads)
        return dataclasses.replace(machine, activations=self.activations)

    def resolved(self) -> str:
        """The target with its processor's name and features spelled out."""
        return _native.resolved(self.machine(), form=self.form, prefix=self.prefix)

    def check(self, model: onnx_ir.Model) -> None:
        """Refuse open sizes but for the batch and sequences, inputs of unknown types, and a machine without TVM.

        Raises:
            TargetError: naming the input or the package, and what to do.
        """
        check(model, self.name, form=self.form)
        _installed.check_compiler()

    def check_nodes(self, model: onnx_ir.Model) -> None:
        """Refuse control flow that the passes left.

        Raises:
            TargetError: naming the node, and what to do.
        """
        check_nodes(model, self.name)

    def check_tuning(self) -> None:
        """Refuse to measure tiles for another processor than this one.

        Raises:
            OptionError: naming the target, and what to do.
        """
        _tune.check_here(self.machine())

    def section(self, table: TileTable) -> Section:
        """What a table of measured tiles says of this processor and this version."""
        return table.section(self.machine())

    def tune(
        self, model: onnx_ir.Model, table: TileTable, *, keep: Callable[[TileTable], None], progress: Progress
    ) -> TileTable:
        """Measure the tiles of a model's kernels that a table does not have; returns the table with them."""
        return _tune.tune(model, self.machine(), table, keep=keep, progress=progress)

    def compile(
        self, model: onnx_ir.Model, folder: Path, progress: Progress, *, tiles: Mapping[str, str] | None = None
    ) -> Built:
        """Build the artefact into `folder`, which exists and is empty."""
        return _native.compile_model(
            model, folder, self.machine(), form=self.form, prefix=self.prefix, progress=progress, tiles=tiles
        )

    def load(self, folder: Path) -> Artefact | None:
        """What was built into `folder`; None for another processor's, and for form=static."""
        return _native.load(folder)
