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
        self._states = artefact.manifest.states
        held = set(self._states.values())
        self._given = tuple(port for port in artefact.inputs if port.name not in held)
        self._held: dict[str, Any] = {}
        for port in artefact.inputs:
            if port.name in held:
                shape = tuple(d for d in port.shape if isinstance(d, int))  # a cache has a fixed one
                self._held[port.name] = artefact.place(np.zeros(shape, port.dtype))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one step, without the states.

        Raises:
            DataError: an input is missing, unknown, or has another shape or type.
        """
        arrays = check_inputs(self._given, inputs, self._artefact.manifest.limits)
        placed = {p.name: self._artefact.place(a) for p, a in zip(self._given, arrays, strict=True)}
        found, outputs = self._artefact.call({**placed, **self._held}, keep=self._states)
        self._held = {self._states[name]: tensor for name, tensor in found.items()}
        return outputs
