"""Which sizes of a model's inputs a target may leave open: the batch and the length of a sequence.

An open size is the batch when it is the first axis of an input, and a sequence when it is the second axis of an
input of rank 2 or 3; a dimension of the same name is the same size wherever it stands. Any other open size, such as
the height and width of pictures, is refused.
"""

from __future__ import annotations

import onnx_ir

from mc_opt.ir import shape_advice, type_text
from mc_opt.targets._base import TargetError

# What exporters write for "not known": two of them need not be equal.
_ANONYMOUS = {None, "", "?", "-1", "None"}


def open_shapes(model: onnx_ir.Model, target: str = "x86") -> list[tuple[int | str, ...]]:
    """The shapes of the inputs, open dimensions by name.

    Raises:
        TargetError: a size is open that kernels need to know; the text begins with `target`.
    """
    named = [_named(value, len(model.graph.inputs)) for value in model.graph.inputs]
    allowed = {d for shape in named for axis, d in enumerate(shape) if isinstance(d, str) and _may(axis, len(shape))}
    for value, shape in zip(model.graph.inputs, named, strict=True):
        for axis, d in enumerate(shape):
            if isinstance(d, str) and d not in allowed:
                raise TargetError(
                    f"{target}: input {value.name!r} has the symbolic shape {type_text(value)}, and only a batch (axis"
                    f" 0) or a sequence (axis 1 of rank 2 or 3) may stay open, not axis {axis}; add for example"
                    f" {shape_advice(model)}"
                )
    return named


def _may(axis: int, rank: int) -> bool:
    return axis == 0 or (axis == 1 and rank in (2, 3))


def _named(value: onnx_ir.Value, inputs: int) -> tuple[int | str, ...]:
    if value.shape is None:
        raise TargetError(
            f"input {value.name!r} has no shape, not even a rank; add for example --shape {value.name}=1x3"
        )
    prefix = "" if inputs == 1 else f"{value.name}."
    result: list[int | str] = []
    for axis, d in enumerate(value.shape):
        if isinstance(d, int):
            result.append(d)
        elif d.value in _ANONYMOUS:
            word = {0: "batch", 1: "sequence"}.get(axis, f"axis{axis}")
            result.append(f"{prefix}{word}")
        else:
            result.append(str(d.value))
    return tuple(result)
