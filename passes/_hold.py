"""What the model that a pass made is held to: it verifies, its outputs stay, and no op of ours is lost."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Check, Pass, PassError
from mc_opt.passes._size import values_by_name

_OURS = "mc_opt"


def hold(step: Pass, old: onnx_ir.Model, new: onnx_ir.Model, before: tuple[str, ...], check: Check) -> None:
    """Hold what a pass made to what every model must be.

    Args:
        step: the pass.
        old: the model before it.
        new: the model that it made; gets the functions of our ops.
        before: the passes that had run.
        check: how much is verified.

    Raises:
        PassError: the model is wrong, its outputs changed, or an op of ours was lost.
    """
    try:
        ir.add_functions(new)
        ir.verify(new, level=check)
    except ir.IRError as error:
        raise PassError(step.name, "", f"made a wrong model: {error}", before) from error
    for was, now in zip(_interface(old), _interface(new), strict=True):
        if was != now:
            raise PassError(step.name, "", f"changed the outputs: they were {was}, now {now}", before)
    if not step.allows_losing_our_ops and (lost := _lost(old, new)):
        raise PassError(
            step.name,
            lost,
            "an op of mc_opt was lost though its result is used: it was folded or inlined; run the foreign pass "
            "with inline=False and without folding mc_opt nodes",
            before,
        )


def _interface(model: onnx_ir.Model) -> tuple[list[str], list[str]]:
    outputs = model.graph.outputs
    return [str(v.name) for v in outputs], [str(v.dtype) for v in outputs]


def _lost(old: onnx_ir.Model, new: onnx_ir.Model) -> str | None:
    """The name of a node of ours that is gone while something computed from it is still there; None if all is well.

    A node whose every consumer is gone too was dead, as in a branch of an If that is never taken.
    """
    present = values_by_name(new)
    for graph in old.graphs():
        for node in graph:
            if node.domain == _OURS and any(_folded(value, present) for value in node.outputs):
                return str(node.name)
    return None


def _folded(value: onnx_ir.Value, present: Mapping[str, onnx_ir.Value]) -> bool:
    """Whether a result of ours is there without an op of ours, or is gone while something computed from it is not."""
    open_values, seen = [value], {value}
    while open_values:
        current = open_values.pop()
        now = present.get(str(current.name))
        if now is not None:
            producer = now.producer()
            if producer is None or producer.domain != _OURS:
                return True
            continue
        reached = {out for node in current.consumers() for out in node.outputs} - seen
        seen |= reached
        open_values += reached
    return False
