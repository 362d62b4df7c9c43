"""Steps of one sequence of an artefact with states, which stay in the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mc_opt.targets._vm import check_inputs

if TYPE_CHECKING:
    from mc_opt.targets._vm import Artefact


class Stream:
    """Steps of one sequence; the states begin with zeros, and neither enter nor leave by `run`.

    A state that the kernels write in place is one tensor, input and output at once.
    """

    def __init__(self, artefact: Artefact) -> None:
        """Begin a sequence."""
        self._artefact = artefact
        states = artefact.manifest.states
        places = {port.name: k for k, port in enumerate(artefact.inputs)}
        self._given = tuple(port for port in artefact.inputs if port.name not in states.values())
        self._at = [places[port.name] for port in self._given]
        self._outputs = [(k, port.name) for k, port in enumerate(artefact.outputs) if port.name not in states]
        # States that are other tensors after a step: (output, input).
        self._moving = [(k, places[states[p.name]]) for k, p in enumerate(artefact.outputs) if p.name in states]
        self._tensors: list[Any] = [None] * len(artefact.inputs)
        for _, k in self._moving:
            port = artefact.inputs[k]
            shape = tuple(d for d in port.shape if isinstance(d, int))  # a cache has a fixed one
            self._tensors[k] = artefact.place(np.zeros(shape, port.dtype))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one step, without the states.

        Raises:
            DataError: an input is missing, unknown, or has another shape or type.
        """
        arrays = check_inputs(self._given, inputs, self._artefact.manifest.limits)
        for k, array in zip(self._at, arrays, strict=True):
            self._tensors[k] = self._artefact.place(array)
        results, outputs = self._artefact.call(self._tensors, self._outputs)
        # What was written in place always will be: to look at each of a language model's caches takes as long as a
        # kernel.
        self._moving = [(out, into) for out, into in self._moving if not results[out].same_as(self._tensors[into])]
        for out, into in self._moving:
            self._tensors[into] = results[out]
        return outputs
