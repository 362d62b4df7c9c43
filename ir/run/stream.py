"""A model with states, run step by step in ONNX Runtime: the states stay where they are and are written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

from mc_opt.ir.errors import IRError
from mc_opt.ir.run.ort import InputSpec, Session


class Stream:
    """Steps of one sequence; the states begin with zeros, and neither enter nor leave by `run`.

    A state that one ScatterND alone reads is one buffer, input and output at once; any other has two that take turns.
    """

    def __init__(self, session: Session, states: Mapping[str, str], *, in_place: frozenset[str] = frozenset()) -> None:
        """Take over a session.

        Args:
            session: the model.
            states: output name to input name.
            in_place: the inputs that may be written where they lie, as `written_in_place` finds them.
        """
        self._session = session
        self._states = dict(states)
        given = {spec.name: spec for spec in session.inputs}
        counts = {name: 1 if name in in_place else 2 for name in states.values()}
        self._held = {name: [_zeros(given[name]) for _ in range(count)] for name, count in counts.items()}
        self._outputs = [name for name in session.output_names if name not in states]
        self._binding = session.binding()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one step, without the states.

        Raises:
            IRError: ONNX Runtime fails while it runs.
        """
        binding = self._binding
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for out, into in self._states.items():
            buffers = self._held[into]
            binding.bind_ortvalue_input(into, buffers[0])
            binding.bind_ortvalue_output(out, buffers[-1])
            buffers.reverse()
        for name in self._outputs:
            binding.bind_output(name)
        values = self._session.run_bound(binding)
        found = dict(zip([*self._states, *self._outputs], values, strict=True))
        return {name: found[name].numpy() for name in self._outputs}


def written_in_place(model: onnx_ir.Model, states: Mapping[str, str]) -> frozenset[str]:
    """The state inputs that one ScatterND reads, whose result is the state's output: it may write over them."""
    outputs = {value.name: value for value in model.graph.outputs}
    writers = {}
    for value in model.graph.inputs:
        uses = list(value.uses())
        if len(uses) == 1 and uses[0].node.op_type == "ScatterND" and uses[0].idx == 0:
            writers[value.name] = uses[0].node.outputs[0]
    return frozenset(into for out, into in states.items() if into in writers and outputs.get(out) is writers[into])


def _zeros(spec: InputSpec) -> Any:
    shape = [d for d in spec.shape or () if isinstance(d, int)]
    if spec.shape is None or len(shape) < len(spec.shape):
        raise IRError(f"state {spec.name!r}: its shape is {spec.shape}, expected a fixed one; give --shape")
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype))
