"""What `mc-opt bench` times: models in ONNX Runtime and the artefacts of output folders, all fed the same samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir

from mc_opt import ir, targets
from mc_opt.tools.driver import MODEL

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Contender:
    """Something that runs a model: its name, how, and the inputs that it takes."""

    name: str
    run: Callable[[Feed], Mapping[str, np.ndarray]]
    inputs: frozenset[str]

    def fed(self, samples: Sequence[Feed]) -> Callable[[], object]:
        """A call that runs the next sample."""
        own = itertools.cycle([self.takes(sample) for sample in samples])
        return lambda: self.run(next(own))

    def takes(self, sample: Feed) -> Feed:
        """The part of a sample that it has inputs for."""
        return {name: array for name, array in sample.items() if name in self.inputs}


def contenders(paths: Sequence[Path], *, threads: int) -> tuple[list[Contender], list[str]]:
    """Everything that can run: each model in ONNX Runtime, each artefact; and lines on what cannot run here.

    Raises:
        IRError: a model is missing or ONNX Runtime refuses it.
    """
    found: list[Contender] = []
    notes: list[str] = []
    for path in paths:
        file = path / MODEL if path.is_dir() else path
        session = ir.Session(file, threads=threads)
        known = frozenset(spec.name for spec in session.inputs)
        found.append(Contender(f"{path} in ONNX Runtime", session.run, known))
        for manifest in sorted(path.glob("*/manifest.json")) if path.is_dir() else ():
            target = manifest.parent.name
            try:
                artefact = targets.load_artefact(path, target, threads=threads)
            except ir.IRError as error:
                notes.append(f"{path}: artefact {target} is not run: {error}")
                continue
            if artefact.threads != threads:
                notes.append(f"{path}: artefact {target} was built for one thread, and runs on one")
            names = frozenset(port.name for port in artefact.inputs)
            found.append(Contender(f"{path} as {target} artefact", artefact.run, names))
    return found, notes


def samples_for(
    models: Sequence[onnx_ir.Model], data: Path | None, *, states: Mapping[str, str], seed: int, count: int
) -> list[dict[str, np.ndarray]]:
    """Samples that fit all models: real ones, or seeded ones in the shapes that the last model fixes; states are zero.

    Raises:
        DataError: the data does not fit, or is empty.
    """
    first, last = models[0], models[-1]
    found: list[dict[str, np.ndarray]] = []
    if data is not None:
        stream = ir.load_data(data, first, states=states)
        found = [dict(sample.inputs) for sample in itertools.islice(stream, count)]
        if not found:
            raise ir.DataError(f"{data}: no samples, expected at least one")
    else:
        drawn = [ir.seeded_data(model, 1, seed, states=states) for model in (first, last)]
        found = [{k: v for stream in drawn for sample in stream for k, v in sample.inputs.items()}]
    for sample in found:
        for name in states.values():
            value = next(v for v in last.graph.inputs if v.name == name)
            assert value.dtype is not None
            sample.setdefault(
                name, np.zeros([d if isinstance(d, int) else 1 for d in value.shape or ()], value.dtype.numpy())
            )
    return found
