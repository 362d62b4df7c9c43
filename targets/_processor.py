"""What the targets x86 and arm share: the checks, the build, its tiles and the loading of native code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from mc_opt.targets import _installed, _native, _tune
from mc_opt.targets._base import Built, Progress, Target
from mc_opt.targets._machine import Machine
from mc_opt.targets._refusal import check, check_nodes

if TYPE_CHECKING:
    from mc_opt.targets._tile_table import Section, TileTable
    from mc_opt.targets._vm import Artefact


class ProcessorTarget(Target):
    """Native code for a processor; a subclass has the options below as fields, in its own order."""

    threads: int
    form: str
    prefix: str

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        _native.check_options(threads=self.threads, form=self.form, prefix=self.prefix)

    def machine(self) -> Machine:
        """The processor to build for."""
        raise NotImplementedError(self.name)

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
