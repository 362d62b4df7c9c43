"""ONNX Runtime as the judge of numerics: run models on streams of samples, compare them, measure noise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir

from mc_opt.ir.errors import DataError, IRError
from mc_opt.ir.run.drift import EXACT_SHARE, Drift, DriftMeter, OutputDrift, OutputVerdict, Verdict, judge

# ONNX Runtime's wheels keep a device id and send usage to their maker unless this is set before they load.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

__all__ = [
    "Drift",
    "DriftMeter",
    "InputSpec",
    "OutputDrift",
    "OutputVerdict",
    "Session",
    "Verdict",
    "compare",
    "exactness",
    "noise",
    "run_data",
]

LARGEST_PROTO = 3 << 29
"""Weight bytes above which a model is run from a temporary file: protobuf ends at 2 GiB and copies before that."""

_FATAL = 4
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z])")

_NUMPY_TYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "bool": "bool",
    "string": "str",
} | {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class _Sample(Protocol):
    @property
    def inputs(self) -> Mapping[str, np.ndarray]: ...


Samples: TypeAlias = Iterable[Mapping[str, np.ndarray] | _Sample]
"""A stream of samples: each a mapping from input name to array, or an object whose `inputs` is one."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What one input takes: numpy's name of the type, and the shape with names or None where it is open."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape) if self.shape is not None else ''}"


class Session:
    """One model in ONNX Runtime on the CPU.

    Raises:
        IRError: when ONNX Runtime refuses the model.
    """

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]

    def __init__(self, model: onnx_ir.Model | str | pathlib.Path, *, optimise: bool = True, threads: int = 1) -> None:
        onnxruntime.set_default_logger_severity(_FATAL)
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        with _source(model) as source:
            try:
                self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own exceptions share no base class
                raise IRError(f"{_title(model)}: ONNX Runtime refuses the model: {_line(error)}") from error
        self.inputs = tuple(_input_spec(value) for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs, in the model's order.

        Raises:
            DataError: when names, types or fixed dimensions of `inputs` do not fit the model.
            IRError: when ONNX Runtime fails while it runs.
        """
        self._check(inputs)
        feeds = {name: np.asarray(array) for name, array in inputs.items()}
        try:
            outputs = self._session.run(None, feeds)
        except Exception as error:
            raise IRError(f"ONNX Runtime failed to run the model: {_line(error)}") from error
        return dict(zip(self.output_names, outputs, strict=True))

    def binding(self) -> Any:
        """A binding of buffers to the model's inputs and outputs, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> list[Any]:
        """Run on what `binding` binds; its outputs in the order in which they were bound.

        Raises:
            IRError: when ONNX Runtime fails while it runs.
        """
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise IRError(f"ONNX Runtime failed to run the model: {_line(error)}") from error
        outputs: list[Any] = binding.get_outputs()
        return outputs

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        expected = ", ".join(str(spec) for spec in self.inputs)
        known = {spec.name for spec in self.inputs}
        for name in inputs:
            if name not in known:
                raise DataError(f"input {name!r}: the model has no such input, expected {expected}")
        for spec in self.inputs:
            if spec.name not in inputs:
                raise DataError(f"input {spec.name!r}: missing in the data, expected {expected}")
            _check_array(spec, np.asarray(inputs[spec.name]))


def run_data(
    session: Session, data: Samples, states: Mapping[str, str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs for each sample of `data`, one at a time.

    Args:
        session: The model.
        data: Mappings from input name to array, or objects with such a mapping as `inputs`.
        states: Recurrent states, output name to input name; by default those that `data` names. A sample that has the
            state itself starts a new sequence with it; otherwise the state is what the step before put out, and zeros
            before the first step.
    """
    states = dict(getattr(data, "states", {}) if states is None else states)
    _check_states(session, states)
    carried: dict[str, np.ndarray] = {}
    for sample in data:
        inputs = carried | dict(sample if isinstance(sample, Mapping) else sample.inputs)
        for spec in session.inputs:
            if spec.name in states.values() and spec.name not in inputs:
                inputs[spec.name] = _zeros(spec, session.inputs, inputs)
        outputs = session.run(inputs)
        carried = {target: outputs[source] for source, target in states.items()}
        yield outputs


def compare(
    reference: Session | onnx_ir.Model | str | pathlib.Path,
    other: Session | onnx_ir.Model | str | pathlib.Path,
    data: Samples,
    *,
    states: Mapping[str, str] | None = None,
) -> Drift:
    """The drift of `other` against `reference` over `data`; each model carries its own states.

    Raises:
        DataError: when `data` is empty or does not fit, or the models' outputs differ in name or shape.
    """
    reference, other = _session(reference), _session(other)
    meter = DriftMeter()
    # Walks over a re-iterable stream, side by side: nothing is kept.
    for sample, a, b in zip(data, run_data(reference, data, states), run_data(other, data, states), strict=True):
        meter.add(a, b, getattr(sample, "label", None))
    drift = meter.result()
    if not drift.samples:
        raise DataError("data: no samples, expected at least one; give a file with a first axis of 1 or more")
    return drift


def noise(
    model: onnx_ir.Model | str | pathlib.Path, data: Samples, *, states: Mapping[str, str] | None = None
) -> Drift:
    """The model's own difference in ONNX Runtime between graph optimisation off (the reference) and on.

    Its `max_abs` is r, the part of any difference that says nothing about a pass.
    """
    return compare(Session(model, optimise=False), Session(model), data, states=states)


def exactness(
    reference: onnx_ir.Model | str | pathlib.Path,
    other: Session | onnx_ir.Model | str | pathlib.Path,
    data: Samples,
    *,
    states: Mapping[str, str] | None = None,
    own_noise: Drift | None = None,
    share: float = EXACT_SHARE,
) -> Verdict:
    """Whether `other` keeps the numbers of `reference`: max |a−b| ≤ max(share × range, 3 × r) for every output.

    Args:
        reference: The original model; range = max − min of its output over all samples.
        other: The model that has to equal it.
        data: The samples.
        states: Recurrent states, as in `run_data`.
        own_noise: `noise(reference, data)` when it is known already; r comes from it.
        share: The share of the range.
    """
    own_noise = own_noise or noise(reference, data, states=states)
    return judge(compare(reference, other, data, states=states), own_noise, share=share)


def _session(model: Session | onnx_ir.Model | str | pathlib.Path) -> Session:
    return model if isinstance(model, Session) else Session(model)


@contextlib.contextmanager
def _source(model: onnx_ir.Model | str | pathlib.Path) -> Iterator[str | bytes]:
    """What an InferenceSession opens: a path, or the bytes of a small model."""
    if not isinstance(model, onnx_ir.Model):
        yield str(model)
        return
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= LARGEST_PROTO:
        yield _serialised(model)
        return
    from mc_opt.ir.io.save import save_model  # late: saving is needed for large models alone

    with tempfile.TemporaryDirectory(prefix="mc-opt-") as folder:
        # ONNX Runtime keeps what it has mapped, so the folder may go as soon as the session stands.
        path = pathlib.Path(folder) / "model.onnx"
        save_model(model, path, reload="structure")
        yield str(path)


def _serialised(model: onnx_ir.Model) -> bytes:
    """The whole model as bytes, with the weights that stand in other files inside."""
    model = model.clone()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                tensor = value.const_value
                value.const_value = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def _input_spec(value: Any) -> InputSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return InputSpec(value.name, _NUMPY_TYPES.get(kind, kind), tuple(value.shape))


def _check_array(spec: InputSpec, array: np.ndarray) -> None:
    dtype = "str" if array.dtype.kind in "UO" else array.dtype.name
    if dtype != spec.dtype:
        raise DataError(f"input {spec.name!r}: type {dtype}, expected {spec.dtype}; convert the array")
    if spec.shape is None:
        return
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(dim, int) or dim < 0 or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise DataError(f"input {spec.name!r}: shape {list(array.shape)}, expected {list(spec.shape)}")


def _check_states(session: Session, states: Mapping[str, str]) -> None:
    inputs = [spec.name for spec in session.inputs]
    for source, target in states.items():
        if source not in session.output_names:
            known = ", ".join(session.output_names)
            raise DataError(f"state {source}={target}: the model has no output {source!r}, its outputs are {known}")
        if target not in inputs:
            known = ", ".join(inputs)
            raise DataError(f"state {source}={target}: the model has no input {target!r}, its inputs are {known}")


def _zeros(spec: InputSpec, specs: Iterable[InputSpec], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A first state; open dimensions that another input has by name follow it, others are 1 (a batch of one)."""
    sizes: dict[str, int] = {}
    for other in specs:
        if other.name in inputs and other.shape is not None:
            given = np.shape(inputs[other.name])
            sizes |= {dim: size for dim, size in zip(other.shape, given, strict=False) if isinstance(dim, str)}
    shape = [
        dim if isinstance(dim, int) and dim >= 0 else sizes.get(dim, 1) if isinstance(dim, str) else 1
        for dim in spec.shape or ()
    ]
    return np.zeros(shape, np.dtype(spec.dtype))


def _title(model: onnx_ir.Model | str | pathlib.Path) -> str:
    return model.graph.name or "model" if isinstance(model, onnx_ir.Model) else str(model)


def _line(error: Exception) -> str:
    """ONNX Runtime's message as one line, without its prefix `[ONNXRuntimeError] : 10 : INVALID_GRAPH : `.

    The place in its C++ source goes too: `/onnxruntime_src/onnxruntime/core/graph/model.cc:256 Model(...) `.
    """
    text = _SOURCE.sub("", " ".join(str(error).split()))
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
