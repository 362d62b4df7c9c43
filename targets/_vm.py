"""Artefacts on disk: checked against the machine, loaded into TVM's virtual machine, and run."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mc_opt.ir import DataError, IRError
from mc_opt.targets import _call, _gpu, _installed, _machine, _manifest, _prompt, _runtime
from mc_opt.targets._manifest import Manifest, Port, names_of

if TYPE_CHECKING:
    from mc_opt.targets._stream import Stream

# What a library with loops for several threads asks of TVM: of short kernels, and for one thread, there are none.
_LOOPS = b"TVMBackendParallelLaunch"
# As many as a target may be built for.
_MOST_THREADS = 256


class Artefact:
    """A built model, ready to run. Loading one executes native code: load only what you trust."""

    def __init__(self, folder: Path, manifest: Manifest, constants: np.ndarray, threads: int) -> None:
        """Load model.so; `load_artefact` is the door that checks first."""
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self._lock = threading.Lock()
        is_open = bool(names_of([p.shape for p in manifest.inputs]))
        self._machine = _machine_of(folder / "model.so", manifest, constants, threads=threads, is_open=is_open)
        if manifest.prompt and isinstance(self._machine, _runtime.Processor):
            self._machine.add(_prompt.NAME)
        self._fast: _call.Run | None = None
        if not is_open and isinstance(self._machine, _runtime.Processor):
            self._fast = self._machine.repeated(manifest.inputs, [port.name for port in manifest.outputs])

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Names, shapes and types of the inputs, in the model's order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Names, shapes and types of the outputs, in the model's order."""
        return self.manifest.outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs for one set of inputs, in the model's order; safe to call from several threads.

        Large inputs are read where they are: nobody may write to them meanwhile.

        Raises:
            DataError: an input is missing, unknown, or has another shape or type.
        """
        with self._lock:  # the virtual machine keeps its frames, and reuses its buffers, between calls
            if self._fast is not None and (found := self._fast(inputs)) is not None:
                return found
            arrays = check_inputs(self.manifest.inputs, inputs, self.manifest.limits)
            results = self._machine.run([self._machine.borrow(array) for array in arrays])
            return {port.name: result for port, result in zip(self.manifest.outputs, results, strict=True)}

    def stream(self) -> Stream:
        """The steps of a new sequence, for a model with states."""
        from mc_opt.targets._stream import Stream  # which checks inputs by this file

        return Stream(self)

    def place(self, array: np.ndarray) -> Any:
        """A copy of an array as a tensor in the machine's memory."""
        return self._machine.place(array)

    def call(
        self, tensors: Sequence[Any], wanted: Sequence[tuple[int, str]]
    ) -> tuple[Sequence[Any], dict[str, np.ndarray]]:
        """Run on tensors in the order of the inputs: all outputs as tensors, and some, by number and name, as arrays.

        States among the tensors may be written; they are what the states among the outputs then are.
        """
        with self._lock:
            results = self._machine.call(tensors)
            return results, {name: self._machine.fetch(results[k]) for k, name in wanted}

    def read(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Let the second function of a language model read `manifest.prompt` tokens: its outputs are the states."""
        assert isinstance(self._machine, _runtime.Processor)  # a GPU's artefact has no such function
        with self._lock:
            return self._machine.call(tensors, second=True)


def _machine_of(
    path: Path, manifest: Manifest, constants: np.ndarray, *, threads: int, is_open: bool
) -> _runtime.Processor | _gpu.OnGpu:
    """The library at `path`, loaded."""
    try:
        if manifest.kind == "cuda":
            return _gpu.OnGpu(path, manifest, pooled=not is_open)
        # TVM's pool keeps a buffer of every size that ever was: with open dimensions it would grow with each new one.
        used = threads if manifest.threads > 1 and _LOOPS in path.read_bytes() else None
        return _runtime.Processor(path, constants, threads=used, pooled=not is_open)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise IRError(f"{path}: cannot be loaded: {line}; build the artefact again") from error


def check_inputs(
    ports: tuple[Port, ...], inputs: Mapping[str, np.ndarray], limits: Mapping[str, int] | None = None
) -> list[np.ndarray]:
    """The arrays in the order of `ports`.

    Args:
        ports: the inputs.
        inputs: their arrays by name.
        limits: the largest sizes of open dimensions.

    Raises:
        DataError: an input is missing, unknown, or has another shape or type; or an open dimension has two sizes, or
            one that the model does not take.
    """
    known = {p.name for p in ports}
    for name in inputs:
        if name not in known:
            raise DataError(f"input {name!r}: the model has no such input (known: {', '.join(sorted(known))})")
    arrays = []
    sizes: dict[str, tuple[int, str]] = {}
    for port in ports:
        if port.name not in inputs:
            raise DataError(f"input {port.name!r}: missing; expected {port.dtype}{list(port.shape)}")
        array = np.asarray(inputs[port.name])
        if array.shape != port.shape:  # so is every open shape
            _check_shape(port, array.shape, sizes, limits or {})
        if array.dtype != port.dtype:
            raise DataError(f"input {port.name!r}: is {array.dtype}, expected {port.dtype}; convert it with .astype")
        arrays.append(array)
    return arrays


def _check_shape(
    port: Port, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]], limits: Mapping[str, int]
) -> None:
    if not _fits(shape, port.shape):
        wanted = ", ".join(map(str, port.shape))
        is_open = any(isinstance(d, str) for d in port.shape)
        advice = "a name stands for any size" if is_open else "build again with another --shape"
        raise DataError(
            f"input {port.name!r}: has shape {list(shape)}, expected [{wanted}];"
            f" a target's kernels are built for one shape: {advice}"
        )
    _check_sizes(port, shape, sizes, limits)


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(d, str) or n == d for n, d in zip(shape, expected, strict=True)
    )


def _check_sizes(
    port: Port, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]], limits: Mapping[str, int]
) -> None:
    """Hold the open dimensions of one input to those of the inputs before it, which `sizes` keeps."""
    for size, name in zip(shape, port.shape, strict=True):
        if not isinstance(name, str):
            continue
        if size < 1:
            raise DataError(f"input {port.name!r}: its dimension {name!r} is {size}; expected 1 or more")
        if size > limits.get(name, size):
            raise DataError(
                f"input {port.name!r}: its dimension {name!r} is {size}, and the model takes at most {limits[name]};"
                " cut it to that"
            )
        known, other = sizes.setdefault(name, (size, port.name))
        if known != size:
            raise DataError(
                f"input {port.name!r}: its dimension {name!r} is {size}, but {known} in input {other!r};"
                " a dimension has one size"
            )


def load_artefact(folder: str | Path, target: str | None = None, *, threads: int | None = None) -> Artefact:
    """Load what was built into `folder`: a target's own folder, or the output folder that holds it.

    Args:
        folder: the folder.
        target: which target to take; the default is the first that this machine runs.
        threads: how many run the loops that were built for several (`x86{threads=2}`); the default is what it was
            built for. What was built for one has no such loops, and runs on one.

    Raises:
        IRError: nothing there was built for this machine, a file was changed, or another version built it.
        ValueError: the number of threads is none.
    """
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= _MOST_THREADS):
        raise ValueError(f"threads={threads!r}: expected a whole number, 1 to {_MOST_THREADS}")
    folder = Path(folder)
    if (folder / _manifest.NAME).is_file() and (target is None or folder.name == target):
        return _load(folder, threads)
    built = sorted(p.parent for p in folder.glob(f"*/{_manifest.NAME}"))
    names = ", ".join(p.name for p in built) or "none"
    if target is not None:
        if folder / target not in built:
            raise IRError(f"{folder}: target {target!r} was not built (built: {names})")
        return _load(folder / target, threads)
    if not built:
        raise IRError(f"{folder}: holds no built target; build one with --target x86")
    reasons = []
    for place in built:
        reason = unfit(_manifest.read(place))
        if reason is None:
            return _load(place, threads)
        reasons.append(f"{place.name}: {reason}")
    raise IRError(f"{folder}: nothing here runs on this machine; {'; '.join(reasons)}")


# What runs on every machine that a target serves.
_EVERYWHERE = {"x86": "x86{cpu=x86-64-v3}", "arm": "arm{cpu=cortex-a53}"}


def unfit(manifest: Manifest) -> str | None:
    """Why this machine cannot run an artefact; None when it can."""
    if manifest.kind == "cuda":
        return _gpu.unfit(manifest)
    architecture = _machine.ARCHITECTURES.get(manifest.kind)
    if architecture is None:
        return f"built for {manifest.kind}, which has no loader here"
    if manifest.form != "vm":
        return f"its form is {manifest.form}: link libmodel.a into a program"
    if platform.machine() != architecture:
        return (
            f"built for {architecture} ({manifest.cpu}), this machine is {platform.machine()}; copy the folder to such"
            " a machine and load it there, or build its runner.cc"
        )
    absent = _machine.missing(manifest.features)
    if absent:
        return (
            f"built for {manifest.cpu}, this processor ({_machine.processor()}) lacks {', '.join(absent)};"
            f" build with {_EVERYWHERE[manifest.kind]}"
        )
    return None


def _load(folder: Path, threads: int | None) -> Artefact:
    manifest = _manifest.read(folder)
    reason = unfit(manifest)
    if reason is not None:
        raise IRError(f"{folder}: cannot run here: {reason}")
    here = _installed.tvm_version()
    if manifest.tvm != here:
        raise IRError(
            f"{folder}: built with TVM {manifest.tvm}, this is {here}; build it again, or install that version"
        )
    path = folder / "model.so"
    if not path.is_file():
        raise IRError(f"{path}: missing; build the artefact again")
    if _manifest.sha256(path) != manifest.files.get("model.so"):
        raise _changed(path)
    count = manifest.threads if threads is None or manifest.threads == 1 else threads
    return Artefact(folder, manifest, _constants(folder, manifest), count)


def _constants(folder: Path, manifest: Manifest) -> np.ndarray:
    """What main is given beside its inputs, checked in the memory that it is used from."""
    if manifest.kind == "cuda":  # they are in the library, and go to the GPU's memory from there
        return np.empty(0, np.uint8)
    path = folder / _manifest.CONSTANTS
    if not path.is_file():
        raise IRError(f"{path}: missing; build the artefact again")
    constants = _runtime.read(path)
    if hashlib.sha256(constants.data).hexdigest() != manifest.files.get(_manifest.CONSTANTS):
        raise _changed(path)
    return constants


def _changed(path: Path) -> IRError:
    return IRError(f"{path}: differs from the file that was built (SHA-256); build the artefact again")
