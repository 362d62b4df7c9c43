"""The target `arm`: 64-bit ARM processors with NEON under Linux, as a TVM module or as a static library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir

from mc_opt.targets import _installed, _machine, _native, _tune
from mc_opt.targets._base import Built, Price, Progress, Target
from mc_opt.targets._machine import Machine
from mc_opt.targets._refusal import check, check_nodes

if TYPE_CHECKING:
    from mc_opt.targets._tile_table import Section, TileTable
    from mc_opt.targets._vm import Artefact


@dataclasses.dataclass(frozen=True)
class Arm(Target):
    """Native code for 64-bit ARM under Linux, built on any machine.

    cpu is the processor to build for; later ones run what was built for cortex-a53 and cortex-a72. threads is the
    number of threads that large kernels are split for; with 2 or more, whoever loads the artefact may choose another
    number. form=vm makes model.so for TVM's runtime, form=static makes libmodel.a and model.h, which need no runtime
    and run in the caller's thread. prefix starts their names, so that two static models fit in one program.
    """

    name: ClassVar[str] = "arm"
    # Nanoseconds a unit on one core, derived and not measured: the loops of benchmarks/price.py on a Cortex-A72 at
    # 1.5 GHz, their micro-operations as LLVM's AArch64SchedA57.td counts them (two vector pipes; a 128-bit fmla takes
    # both once, tbl 3 slots, trn 1); bytes from 5.5 GB/s, STREAM's copy on a Raspberry Pi 4;
    # call and traffic are x86's, four times as slow.
    price: ClassVar[Price] = Price(
        mul=0.083, add=0.083, shift=0.33, xnor=0.016, lookup=0.45, bytes=0.18, lanes=4, call=1600, traffic=0.2
    )

    cpu: Literal["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-n2", "neoverse-v1"] = "cortex-a72"
    threads: int = 1
    form: Literal["vm", "static"] = "vm"
    prefix: str = "model"

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        _native.check_options(threads=self.threads, form=self.form, prefix=self.prefix)

    def machine(self) -> Machine:
        """The processor to build for."""
        return _machine.named(self.cpu, threads=self.threads)

    def resolved(self) -> str:
        """The target with its processor's features spelled out."""
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
