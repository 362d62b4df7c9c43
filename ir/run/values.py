"""Where two models come apart: the drift of every value that both have, not of the outputs alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np
import onnx_ir

from mc_opt.ir.errors import DataError
from mc_opt.ir.io.data import Data, Sample
from mc_opt.ir.run.drift import DriftMeter, OutputDrift
from mc_opt.ir.run.ort import Session, run_data
from mc_opt.ir.sites import FLOATS

_AT_ONCE = 64
"""Values put out by one run, so that a long model does not hold all of them in memory."""


def value_drift(
    a: onnx_ir.Model, b: onnx_ir.Model, data: Data, *, states: Mapping[str, str] | None = None
) -> tuple[OutputDrift, ...]:
    """How far apart each floating-point value is that both models compute under one name, in the order of `a`.

    Both run in ONNX Runtime with these values as outputs. A value whose shapes differ is left out. The figures of a
    value take in those of everything before it.

    Raises:
        DataError: when the data does not fit, or is empty.
    """
    names = [name for name in _computed(a) if name in set(_computed(b))]
    found: dict[str, OutputDrift] = {}
    for start in range(0, max(len(names), 1), _AT_ONCE):
        wanted = names[start : start + _AT_ONCE]
        found |= {drift.name: drift for drift in _measured(a, b, data, wanted, states=states)}
    return tuple(found[name] for name in names if name in found)


def largest_values(model: onnx_ir.Model, data: Iterable[Sample], names: Collection[str]) -> dict[str, float]:
    """max |v| over samples of values that the main graph takes or computes, by name.

    Raises:
        DataError: when the data does not fit, or is empty.
    """
    given = {str(v.name) for v in model.graph.inputs}
    session = _Told(model, [name for name in dict.fromkeys(names) if name not in given])
    found = dict.fromkeys(names, 0.0)
    inputs: dict[str, np.ndarray] = {}
    count = 0
    states = getattr(data, "states", {})
    for outputs in run_data(session, _seen(data, inputs), states):
        count += 1
        shown = inputs | outputs
        found = {name: max(most, float(np.abs(shown[name]).max(initial=0.0))) for name, most in found.items()}
    if not count:
        raise DataError("data: no samples, expected at least one; give a file with a first axis of 1 or more")
    return found


def _seen(data: Iterable[Sample], inputs: dict[str, np.ndarray]) -> Iterator[Sample]:
    """The samples, each one's inputs left where the caller finds them."""
    for sample in data:
        inputs.update(sample.inputs)
        yield sample


def _computed(model: onnx_ir.Model) -> dict[str, None]:
    """The floating-point results of the main graph's nodes that depend on an input."""
    alive: set[onnx_ir.Value] = set(model.graph.inputs)
    names: dict[str, None] = {}
    for node in model.graph:
        if not alive.isdisjoint(_read(node)):
            alive.update(node.outputs)
            names.update((str(v.name), None) for v in node.outputs if v.name and v.dtype in FLOATS)
    return names


def _read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What a node takes, and what the graphs in it take from around it."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH and not attribute.is_ref():
            for inner in attribute.as_graph().all_nodes():
                yield from (v for v in inner.inputs if v is not None)


def _measured(
    a: onnx_ir.Model, b: onnx_ir.Model, data: Data, wanted: list[str], *, states: Mapping[str, str] | None
) -> tuple[OutputDrift, ...]:
    first, second = (_Told(model, wanted) for model in (a, b))
    meter = DriftMeter()
    left_out: set[str] = set()
    count = 0
    for x, y in zip(run_data(first, data, states), run_data(second, data, states), strict=True):
        count += 1
        left_out |= {name for name in wanted if np.shape(x[name]) != np.shape(y[name])}
        meter.add({name: x[name] for name in wanted if name not in left_out}, y)
    if not count:
        raise DataError("data: no samples, expected at least one; give a file with a first axis of 1 or more")
    return tuple(drift for drift in meter.result().outputs if drift.name not in left_out)


class _Told(Session):
    """A session that puts out inner values too, and takes no notice of inputs that the model does not have."""

    def __init__(self, model: onnx_ir.Model, names: list[str]) -> None:
        shown = model.clone()
        outputs = {v.name for v in shown.graph.outputs}
        inner = {str(v.name): v for node in shown.graph for v in node.outputs}
        shown.graph.outputs.extend(inner[name] for name in names if name not in outputs)
        super().__init__(shown)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = {spec.name for spec in self.inputs}
        return super().run({name: array for name, array in inputs.items() if name in known})
