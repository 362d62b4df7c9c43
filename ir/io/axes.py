"""Which axis of each input of a model counts samples, so that several run at once."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from mc_opt.ir.io.data import readers_of

_RECURRENT = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
_RECURRENT_AXIS = 1  # of initial states, [directions, batch, hidden]


def batch_axes(model: onnx_ir.Model, states: Mapping[str, str]) -> dict[str, int | None] | None:
    """The axis of each input that counts samples; None for a scalar, which all samples of a batch share.

    An input counts samples along its first axis where that is open or 1. A recurrent state counts them along the
    axis with the name that an input's first axis has, else where the recurrent op that reads it does, else along their
    first axis of 1.
    That the model computes each sample as if it were alone is not looked at.

    Args:
        model: the model.
        states: recurrent states, output name to input name.

    Returns:
        Axes by input name; None when an input has a fixed number there, so that samples run one by one.
    """
    inputs = [v for v in model.graph.inputs if v.name not in states.values()]
    names = {v.shape[0].value for v in inputs if v.shape and not isinstance(v.shape[0], int)} - {None}
    axes: dict[str, int | None] = {}
    for value in model.graph.inputs:
        dims = None if value.shape is None else value.shape.dims
        axis = 0 if value.name not in states.values() else _state_axis(value, names)
        if dims is not None and not dims:
            axes[str(value.name)] = None
        elif dims is None or _is_open(dims[axis]):
            axes[str(value.name)] = axis
        else:
            return None
    return axes


def _state_axis(value: onnx_ir.Value, names: set[str | None]) -> int:
    dims = () if value.shape is None else value.shape.dims
    named = [i for i, d in enumerate(dims) if not isinstance(d, int) and d.value in names]
    if named:
        return named[0]
    recurrent = any(slot in _RECURRENT.get(node.op_type, ()) for node, slot in readers_of(value))
    if recurrent and len(dims) > _RECURRENT_AXIS:
        return _RECURRENT_AXIS
    return next((i for i, d in enumerate(dims) if _is_open(d)), 0)


def _is_open(dim: int | onnx_ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) or dim == 1
