"""Steps of one sequence of an artefact with states, which stay in the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mc_opt.ir import DataError
from mc_opt.targets import _prompt
from mc_opt.targets._vm import check_inputs

if TYPE_CHECKING:
    from mc_opt.targets._vm import Artefact


class Stream:
    """Steps of one sequence; the states begin with zeros, and neither enter nor leave by `run`.

    A state that the kernels write in place is one tensor, input and output at once. A language model that was built for
    prompts takes any number of tokens a step.
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
        # Those of what reads a prompt, which has no other outputs.
        self._moving_read = [(k, into) for k, (_, into) in enumerate(self._moving)]
        self._tensors: list[Any] = [None] * len(artefact.inputs)
        for _, k in self._moving:
            port = artefact.inputs[k]
            shape = tuple(d for d in port.shape if isinstance(d, int))  # a cache has a fixed one
            self._tensors[k] = artefact.place(np.zeros(shape, port.dtype))
        caches = [port.shape for port in artefact.inputs if port.name in states.values()]
        self._room = min(int(shape[2]) for shape in caches) if artefact.manifest.prompt else 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one step, without the states.

        Raises:
            DataError: an input is missing, unknown, or has another shape or type.
        """
        if self._artefact.manifest.prompt:
            inputs = self._read(inputs)
        self._place(check_inputs(self._given, inputs, self._artefact.manifest.limits))
        results, outputs = self._artefact.call(self._tensors, self._outputs)
        self._moving = self._moved(self._moving, results)
        return outputs

    def _read(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Let all tokens but the last go into the caches; the inputs of the last."""
        ids, position = (np.asarray(inputs.get(name)) for name in (_prompt.IDS, _prompt.POSITION))
        if ids.ndim != 2 or ids.shape[1] < 1 or position.shape != (1,):
            return inputs  # which will be refused
        first, count = int(position[0]), ids.shape[1]
        if first < 0 or first + count > self._room:
            raise DataError(
                f"input {_prompt.POSITION!r}: {count} tokens from position {first} on, expected to end within the"
                f" {self._room} positions of the cache; build with a larger one"
            )
        if count == 1:
            return inputs
        check_inputs(self._given, {**inputs, _prompt.IDS: ids[:, :1]})
        chunk = self._artefact.manifest.prompt
        done = 0
        for taken in _prompt.pieces(count - 1, chunk, self._room - first):
            padded = np.zeros((1, chunk if taken > 1 else 1), ids.dtype)
            padded[0, :taken] = ids[0, done : done + taken]
            self._place([{_prompt.IDS: padded, _prompt.POSITION: position + done}[port.name] for port in self._given])
            if taken > 1:
                self._moving_read = self._moved(self._moving_read, self._artefact.read(self._tensors))
            else:
                self._moving = self._moved(self._moving, self._artefact.call(self._tensors, ())[0])
            done += taken
        return {_prompt.IDS: ids[:, done:], _prompt.POSITION: position + done}

    def _place(self, arrays: Sequence[np.ndarray]) -> None:
        for k, array in zip(self._at, arrays, strict=True):
            self._tensors[k] = self._artefact.place(array)

    def _moved(self, moving: Sequence[tuple[int, int]], results: Sequence[Any]) -> list[tuple[int, int]]:
        """Keep the states that are tensors of their own; which ones they are.

        What was written in place always will be: to look at each of a language model's caches takes as long as a
        kernel.
        """
        new = [(out, into) for out, into in moving if not results[out].same_as(self._tensors[into])]
        for out, into in new:
            self._tensors[into] = results[out]
        return new
