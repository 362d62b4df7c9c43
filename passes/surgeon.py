"""Run a script that edits the model as an onnx_graphsurgeon graph.

edit(graph: onnx_graphsurgeon.Graph) -> onnx_graphsurgeon.Graph
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context, Pass, PassError


@dataclass(frozen=True)
class Surgeon(Pass):
    """Run the function edit(graph) of a Python file on the model, as an onnx_graphsurgeon Graph.

    The file runs with your rights, so it needs --allow-scripts. Weights are read when the script asks for
    their values; functions of the model stay as they are and are not shown to the script.
    """

    family: ClassVar[str] = "surgery"
    idempotent: ClassVar[bool] = False  # the script does what it does: adding a node adds another one each time
    allows_losing_our_ops: ClassVar[bool] = True  # a script may remove what it wants

    script: str = ""

    def __post_init__(self) -> None:
        if not self.script:
            raise ValueError("script= is missing; name a Python file with a function edit(graph)")

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Hand the graph to the script and take back what it returns."""
        if not ctx.allow_scripts:
            raise ir.OptionError(
                f"surgeon: {self.script} is Python code that would run with your rights; "
                "read it, then allow it by --allow-scripts"
            )
        source = self._read()
        ctx.note("", f"{self.script}: sha256 {hashlib.sha256(source).hexdigest()}")
        # Late: importing the package takes a moment, and listing the passes imports this file.
        import onnx_graphsurgeon as gs

        from mc_opt.passes._gs import Surgery

        before = _signature(model)
        surgery = Surgery(model.clone())
        with contextlib.redirect_stdout(sys.stderr):  # what a script prints is not our data
            edited = self._call(self._load(source), surgery.graph)
        if not isinstance(edited, gs.Graph):
            raise PassError(
                self.name,
                self.script,
                f"edit() returned {type(edited).__name__}, expected the graph; end it with return",
            )
        try:
            made = surgery.close(edited)
        except ir.IRError as error:
            raise PassError(self.name, self.script, str(error)) from error
        changed = _difference(before, _signature(made))
        if not changed:
            return 0
        _check_interface(made, self)
        ctx.did(f"edit() of {Path(self.script).name}")
        model.graph = made.graph
        ir.add_functions(model)
        ir.infer_shapes(model)
        return changed

    def _read(self) -> bytes:
        try:
            return Path(self.script).read_bytes()
        except OSError as error:
            raise ir.OptionError(
                f"surgeon: script={self.script} cannot be read: {error.strerror}; name a Python file, "
                "relative to the folder that mc-opt runs in"
            ) from error

    def _load(self, source: bytes) -> Callable[[Any], Any]:
        space: dict[str, Any] = {"__name__": "mc_opt_surgeon", "__file__": self.script}
        self._guard(lambda: exec(compile(source, self.script, "exec"), space))
        edit = space.get("edit")
        if not callable(edit):
            raise PassError(self.name, self.script, "it has no function edit(graph); define one that returns the graph")
        function: Callable[[Any], Any] = edit
        return function

    def _call(self, edit: Callable[[Any], Any], graph: Any) -> Any:
        return self._guard(lambda: edit(graph))

    def _guard(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # any fault of the script is told with its place
            problem = PassError(self.name, _place(error, self.script), f"{type(error).__name__}: {error}")
        # Not from the error: a Python error behind a PassError counts as a mistake of ours.
        raise problem


def _place(error: BaseException, script: str) -> str:
    """The last line of the script that was running, as file:line."""
    if isinstance(error, SyntaxError) and error.filename == script:
        return f"{script}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
    return f"{script}:{lines[-1]}" if lines else script


def _signature(model: onnx_ir.Model) -> dict[str, object]:
    """What a model computes, by output and weight name: enough to see what a script changed."""
    found: dict[str, object] = {"": tuple((str(v.name), v.dtype, str(v.shape)) for v in _interface(model.graph))}
    for number, graph in enumerate(model.graphs()):
        for value in graph.initializers.values():
            found[f"{number}:{value.name}"] = value.const_value
        for node in graph:
            outputs = tuple(o.name for o in node.outputs)
            inputs = tuple(v.name if v is not None else None for v in node.inputs)
            plain = {a.name: str(a) for a in node.attributes.values() if a.type != onnx_ir.AttributeType.GRAPH}
            found[f"{number}:{outputs}"] = (node.domain, node.op_type, inputs, sorted(plain.items()))
    return found


def _interface(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [*graph.inputs, *graph.outputs]


def _difference(before: dict[str, object], after: dict[str, object]) -> int:
    changed = [k for k in before.keys() & after.keys() if not _equal(before[k], after[k])]
    return len(changed) + len(before.keys() ^ after.keys())


def _equal(old: object, new: object) -> bool:
    if isinstance(old, onnx_ir.TensorProtocol) and isinstance(new, onnx_ir.TensorProtocol):
        return old is new or (old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes())
    return old == new


def _check_interface(model: onnx_ir.Model, step: Surgeon) -> None:
    for value in _interface(model.graph):
        if value.dtype is None or value.shape is None:
            raise PassError(
                step.name, str(value.name), "the script left an input or output without type or shape; set it"
            )
    for value in model.graph.outputs:
        if value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
            raise PassError(step.name, str(value.name), "the script left an output that no node makes; connect it")
