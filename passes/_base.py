"""What every pass builds on: the base class, the context that a run hands it, and the error of a pass that failed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._store import Store

if TYPE_CHECKING:
    from mc_opt.passes._training import Training, TrainingReport
    from mc_opt.targets import Target

Check = Literal["full", "structure"]
"""How much a run checks: `full` runs the models in ONNX Runtime, `structure` reads no weights."""

MEMORY_LIMIT = 4 << 30
"""The default memory limit: a fixed number, so that what a run checks does not depend on the machine."""


class PassError(Exception):
    """A pass failed, or what it made is wrong.

    Attributes:
        pass_name: the pass.
        node: the node, value or layer where it went wrong; empty if it is not one place.
        problem: what was wrong, what was expected, what to do.
        before: the passes that had run.
        last_good: the model before the failing pass; set by `run`.
    """

    def __init__(self, pass_name: str, node: str, problem: str, before: tuple[str, ...] = ()) -> None:
        where = f"{pass_name}: {node}" if node else pass_name
        after = f" (after {', '.join(before)})" if before else ""
        super().__init__(f"{where}: {problem}{after}")
        self.pass_name = pass_name
        self.node = node
        self.problem = problem
        self.before = before
        self.last_good: onnx_ir.Model | None = None


@dataclass
class Log:
    """What one pass said about its work.

    Attributes:
        notes: (layer, remark).
        skips: layer to the reason why it was left alone.
        warnings: what the user must know about the pass's result.
        rules: the rule behind what it did to a ("node", name) or a ("value", name).
        rule: the rule of everything else.
        training: what it was trained by; None where it was not.
    """

    notes: list[tuple[str, str]] = field(default_factory=list)
    skips: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rules: dict[tuple[str, str], str] = field(default_factory=dict)
    rule: str = ""
    training: TrainingReport | None = None


@dataclass(frozen=True)
class Context:
    """What a pass may know and use beside the model.

    Attributes:
        target: where the model will run; None when that is open.
        data: real inputs (a re-iterable stream of samples); None when there are none.
        states: recurrent states of random inputs, output name to input name; real data brings its own.
        reference: the model as it came in, before its shapes were fixed; `run` takes its input where none is given.
        seed: of every random choice: `np.random.default_rng(ctx.seed)`.
        memory_limit: bytes; checks that would need more are skipped, with a line in the report.
        allow_scripts: whether a recipe may run Python files.
        check: how much the run checks.
        store: where `keep` puts big tensors.
        training: how trainable passes are trained; None converts them at once.
        fixed: values of inputs that passes of the run make constant.
        dry_run: passes change the model so that layers and bytes can be counted; nothing is trained.
        on_progress: told (done, total, what); for people, never needed for the result.
        log: notes and skips of the running pass; `run` gives each pass its own.
    """

    target: Target | None = None
    data: ir.Data | None = None
    states: Mapping[str, str] = field(default_factory=dict)
    reference: onnx_ir.Model | None = None
    seed: int = 0
    memory_limit: int = MEMORY_LIMIT
    allow_scripts: bool = False
    check: Check = "full"
    store: Store = field(default_factory=Store)
    training: Training | None = None
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    dry_run: bool = False
    on_progress: Callable[[int, int, str], None] | None = None
    log: Log = field(default_factory=Log)

    def weight(self, value: onnx_ir.Value) -> np.ndarray:
        """The constant of an initialiser, shaped as the value; read-only, memory-mapped when it lies in a file.

        Slices of a mapped weight are read from the file as they are touched: take blocks of a big one.
        """
        if value.const_value is None:
            raise ir.IRError(f"{value.name}: is computed, a weight was expected; run fold-constants first")
        array = value.const_value.numpy()
        view: np.ndarray = array.view()
        view.flags.writeable = False
        return view

    def rows(self, value: onnx_ir.Value, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) along the first axis of an initialiser; only these are read from a file."""
        rows: np.ndarray = self.weight(value)[start:stop]
        return rows

    def keep(self, array: np.ndarray, name: str) -> onnx_ir.TensorProtocol:
        """A tensor of `array` for the model; above 1 MiB a memory-mapped file holds it instead of memory."""
        return self.store.keep(array, name)

    def note(self, layer: str, text: str) -> None:
        """Put a remark about a layer (or "" for the whole model) into the report."""
        self.log.notes.append((layer, text))

    def warn(self, text: str) -> None:
        """Put a warning about the pass's result into the report; the command line prints it."""
        self.log.warnings.append(text)

    def skip(self, layer: str, skip: ir.Skip) -> None:
        """Say why a layer is left alone; the first reason for a layer stays."""
        self.log.skips.setdefault(layer, skip.reason)

    def did(self, rule: str, *things: onnx_ir.Node | onnx_ir.Value) -> None:
        """Say by which rule nodes and constants are about to be removed or changed; without any, all else is.

        Nodes that a pass signs (`ir.provenance`), and what such changes entail, need no word.
        """
        if not things:
            self.log.rule = rule
        for thing in things:
            match thing:
                case onnx_ir.Node():
                    name = ("node", ir.title_of(thing))
                case _:
                    name = ("value", str(thing.name))
            self.log.rules.setdefault(name, rule)  # what was fixed first and then found unused went for the first

    def progress(self, done: int, total: int, what: str) -> None:
        """Tell the user how far the pass is."""
        if self.on_progress is not None:
            self.on_progress(done, total, what)


Overrides = tuple[tuple[str, Mapping[str, Any]], ...]
"""Glob of layer names to options, in the recipe's order."""


@dataclass(frozen=True)
class Pass:
    """One rewrite of a model: a frozen dataclass in a file of its own, whose name is the pass's name.

    Fields are options and the docstring is the help text. `run` edits the clone that it is given.

    Attributes:
        family: the heading under which `mc-opt passes` lists it.
        exact: promises that the numbers do not change; the pipeline holds it to that.
        idempotent: a second run right after the first changes nothing.
        allows_losing_our_ops: the pass may remove ops of the `mc_opt` domain whose results are still used.
    """

    family: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    allows_losing_our_ops: ClassVar[bool] = False
    _overrides: ClassVar[Overrides] = ()  # shadowed on the instances that `with_overrides` makes

    layers: tuple[str, ...] = field(default=("*",), kw_only=True)
    skip: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def name(self) -> str:
        """The name on the command line: the module's file name with dashes."""
        return name_of(type(self))

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """A pass from its options as text; a pass whose options are not fields (`specialize`) overrides this.

        Raises:
            OptionError: for an unknown option or a value that does not fit.
        """
        return ir.make(cls, ir.Spec(name_of(cls), dict(options)))

    def options(self) -> dict[str, str]:
        """The options that differ from their defaults, as text: what `from_options` takes."""
        texts = ir.to_spec(self.name, self).options
        shared = {key: texts.pop(key) for key in ("layers", "skip") if key in texts}
        return texts | shared  # a pass's own options first

    def __str__(self) -> str:
        return str(ir.Spec(self.name, self.options()))

    def fixes(self, model: onnx_ir.Model) -> Mapping[str, np.ndarray]:
        """Inputs of `model` that this pass makes constant: checks feed the models before it with these values."""
        return {}

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Edit `model` in place; return the number of rewrites (0: nothing was changed)."""
        raise TypeError(f"{type(self).__name__} is a pass without run()")

    def declines(self, layer: str) -> ir.Skip | None:
        """Why the options `layers` and `skip` leave this layer out; None if they take it."""
        if not ir.matches(layer, self.layers):
            return ir.Skip(f"layers={','.join(self.layers)} does not name it")
        if ir.matches(layer, self.skip):
            return ir.Skip(f"skip={','.join(self.skip)} names it")
        return None

    def at(self, layer: str) -> Self:
        """This pass with the options that the recipe's overrides give to one layer; a later override wins."""
        changes: dict[str, Any] = {}
        for glob, options in self._overrides:
            if ir.matches(layer, (glob,)):
                changes.update(options)
        return dataclasses.replace(self, **changes) if changes else self

    def with_overrides(self, overrides: Overrides) -> Self:
        """This pass with per-layer options for `at`."""
        carrier = copy.copy(self)
        object.__setattr__(carrier, "_overrides", overrides)  # not a field: it is no option of the text form
        return carrier


def name_of(kind: type[Pass]) -> str:
    """The name of a pass class: the file name of its module with dashes."""
    return kind.__module__.rpartition(".")[2].replace("_", "-")
