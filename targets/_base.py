"""What a target is: options, a price list, and a build that ends in a folder; how targets are found by name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mc_opt import ir
from mc_opt.ir import IRError, OptionError

if TYPE_CHECKING:  # a process that only runs an artefact reads no model
    import onnx_ir

    from mc_opt.targets._tile_table import Section, TileTable
    from mc_opt.targets._vm import Artefact

Progress = Callable[[int, int, str], None]


class TargetError(IRError):
    """A model that a target cannot build; the text names the node or input and what to do."""


@dataclasses.dataclass(frozen=True)
class Price:
    """What one unit of work costs on one core, in nanoseconds.

    Attributes:
        mul: a product, done in whole vectors.
        add: a sum; a fused multiply-add is one of each.
        shift: a shift of an integer.
        xnor: a product of signs.
        lookup: a code's value.
        bytes: a byte read from memory.
        lanes: numbers in a vector.
        call: a kernel, whatever it does.
        traffic: a byte that one kernel writes and the next reads.
        cache: bytes that stay near between kernels, in the second-level cache; 0 where kernels are not joined for it.
    """

    mul: float
    add: float
    shift: float
    xnor: float
    lookup: float
    bytes: float
    lanes: int = 1
    call: float = 0.0
    traffic: float = 0.0
    cache: int = 0


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build wrote.

    Attributes:
        folder: the target's folder.
        files: name to SHA-256, sorted by name.
        resolved: the target's text with everything that was found out at build time.
        kernels: special kernels, one line each.
        fallbacks: nodes that run in a general form, and why.
        seconds: build steps and their times; for timings.json only.
        tiles: the tiles of kernels that have a choice, by the shape that a table calls them by.
    """

    folder: Path
    files: Mapping[str, str]
    resolved: str
    kernels: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tiles: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Target:
    """A place where a model runs; the fields of a subclass are its options."""

    name: ClassVar[str]
    makes_artefact: ClassVar[bool] = True
    price: ClassVar[Price]

    @property
    def exact(self) -> bool:
        """Whether what it builds computes what the model says, but for the order of sums."""
        return True

    def resolved(self) -> str:
        """The target's text after everything that depends on this machine was looked up."""
        return str(self)

    def check(self, model: onnx_ir.Model) -> None:
        """Refuse, before any pass runs, inputs that the build would refuse after all of them.

        Raises:
            TargetError: naming the input, and what to do.
        """

    def check_nodes(self, model: onnx_ir.Model) -> None:
        """Refuse, after the passes and before anything is written, nodes that no kernel can take.

        Raises:
            TargetError: naming the node, and what to do.
        """

    def compile(
        self, model: onnx_ir.Model, folder: Path, progress: Progress, *, tiles: Mapping[str, str] | None = None
    ) -> Built:
        """Build the model into `folder`, which exists and is empty.

        Args:
            model: the model.
            folder: where to.
            progress: told of every step.
            tiles: the tile that each shape takes, by name, as a table of measured ones has it; by rule else.
        """
        raise TypeError(f"{self.name} builds no artefact")

    def load(self, folder: Path) -> Artefact | None:
        """What was built into `folder`, ready to run; None where this machine does not run it."""
        return None

    def check_tuning(self) -> None:
        """Refuse, before any pass runs, to measure tiles for another machine than this one.

        Raises:
            OptionError: naming the target, and what to do.
        """
        raise OptionError(f"{self.name}: --tune measures kernels of x86 and arm; leave it out")

    def section(self, table: TileTable) -> Section:
        """What a table of measured tiles says of this target and this version."""
        raise OptionError(f"{self.name}: a table of tiles is for kernels of x86 and arm; leave it out")

    def tune(
        self, model: onnx_ir.Model, table: TileTable, *, keep: Callable[[TileTable], None], progress: Progress
    ) -> TileTable:
        """Measure the tiles of a model's kernels that a table does not have; returns the table with them.

        Args:
            model: the model.
            table: what is known.
            keep: told of the table after every shape.
            progress: told of every step.
        """
        raise TypeError(f"{self.name} has no tiles to measure")

    def __str__(self) -> str:
        return str(ir.to_spec(self.name, self))


def cost(work: Any, price: Price) -> float:
    """Nanoseconds of some work at a price: Σ count · price, the arithmetic and the memory traffic added up."""
    units = (field.name for field in dataclasses.fields(work))
    return float(sum(getattr(work, unit) * getattr(price, unit) for unit in units))


def target_names() -> tuple[str, ...]:
    """The names of all targets: the files of this folder without a leading underscore."""
    package = importlib.import_module("mc_opt.targets")
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_") and not m.ispkg)
    )


def find_target(name: str) -> type[Target]:
    """The class of a target.

    Raises:
        OptionError: for an unknown name; the known ones are listed.
    """
    if name not in target_names():
        raise OptionError(ir.unknown("target", name, target_names()))
    module = importlib.import_module(f"mc_opt.targets.{name}")
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Target) and item.__module__ == module.__name__:
            return item
    raise AssertionError(f"targets/{name}.py defines no Target")


def parse_targets(text: str) -> list[Target]:
    """The targets of a comma list, `onnx,x86{cpu=x86-64-v3}`.

    Raises:
        OptionError: for a text that cannot be read, an unknown target or an unknown option.
    """
    return [ir.make(find_target(spec.name), spec) for spec in ir.parse_specs(text)]


def parse_target(text: str) -> Target:
    """The one target that a text names."""
    targets = parse_targets(text)
    if len(targets) != 1:
        raise OptionError(f"{text!r}: expected one target, found {len(targets)}")
    return targets[0]
