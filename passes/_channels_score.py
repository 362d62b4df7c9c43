"""How much a channel matters: by its weights, by BatchNormalization, or by what it is on real data."""

from __future__ import annotations

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._channels import STAYS, Channels
from mc_opt.passes._channels_axes import array_type


def by_weights(channels: Channels, ctx: Context, *, power: int) -> np.ndarray:
    """[count] The mean |w|^power of the weights that make a unit, each weight matrix relative to its own mean."""
    scores = np.zeros(channels.count)
    for place in dict.fromkeys((p.value, p.axis) for p in channels.makers):
        value, axis = place
        units = channels.units[value][axis]
        if units is not None:
            w = np.abs(_array(value, ctx).astype(np.float32)) ** power
            rows = w.mean(axis=tuple(k for k in range(w.ndim) if k != axis))
            _collect(scores, units, rows / (rows.mean() or 1.0))
    return scores


def by_batch_norm(channels: Channels, model: onnx_ir.Model, ctx: Context) -> np.ndarray:
    """[count] The sum of |γ| of the BatchNormalizations of a unit; 0 for a unit without any."""
    scores = np.zeros(channels.count)
    for node in model.graph:
        gamma = node.inputs[1] if node.op_type == "BatchNormalization" and node.domain == "" else None
        units = channels.units[gamma][0] if gamma is not None and array_type(gamma) is not None else None
        if gamma is not None and units is not None:
            _collect(scores, units, np.abs(_array(gamma, ctx).astype(np.float32)))
    return scores


def by_activation(channels: Channels, model: onnx_ir.Model, ctx: Context, data: ir.Data) -> np.ndarray:
    """[count] The mean |x| of a unit where it is summed over, relative to the mean of its layer's units."""
    places = {
        (str(place.value.name), place.axis): units
        for place in channels.sums
        if (units := channels.at(place)) is not None and array_type(place.value) is None
    }
    shown = model.clone()
    inner = {str(value.name): value for node in shown.graph for value in node.outputs}
    known = {value.name for value in shown.graph.outputs}
    names = dict.fromkeys(name for name, _ in places if name in inner and name not in known)
    shown.graph.outputs.extend(inner[name] for name in names)
    totals = {place: np.zeros(len(units)) for place, units in places.items()}
    for outputs in ir.run_data(ir.Session(shown), data):
        for (name, axis), total in totals.items():
            x = np.abs(outputs[name].astype(np.float32))
            total += x.mean(axis=tuple(k for k in range(x.ndim) if k != axis))
    scores = np.zeros(channels.count)
    for place, total in totals.items():
        _collect(scores, places[place], total / (total.mean() or 1.0))
    return scores


def normalised(scores: np.ndarray, channels: Channels) -> np.ndarray:
    """The scores of each group divided by their mean, so that groups can be compared."""
    scaled = scores.copy()
    for group in channels.groups:
        units = list(group.units)
        if units:
            scaled[units] /= scores[units].mean() or 1.0
    return scaled


def _collect(scores: np.ndarray, units: np.ndarray, values: np.ndarray) -> None:
    own = units != STAYS
    np.add.at(scores, units[own], values[own])


def _array(value: onnx_ir.Value, ctx: Context) -> np.ndarray:
    tensor = array_type(value)
    assert tensor is not None
    return ctx.weight(value) if value.const_value is not None else tensor.numpy()
