"""Data for a model: streams of samples from npz files, and seeded random ones."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir

from mc_opt.ir.errors import DataError
from mc_opt.ir.io.shapes import describe, example_shapes, varied_shapes

LABEL = "label"
_SAVE = "save it with numpy.savez"
# A sequence of integers runs through these on its way to a table without changing its numbers.
_CARRIERS = {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_CARRIERS_FIRST = {"Expand", "Reshape", "Slice", "Squeeze", "Unsqueeze"}
_INT_BOUND = 2


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run of a model: its inputs by name, and the label when there is one."""

    inputs: Mapping[str, npt.NDArray[Any]]
    label: npt.NDArray[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """A stream of samples that can be walked as often as one likes; nothing is kept in memory.

    A recurrent state is among the inputs of the first sample of a sequence (zeros) and of no other: whoever
    runs the samples feeds it back.

    Attributes:
        walk: starts a walk.
        size: the number of samples.
        labelled: whether every sample has a label.
        states: recurrent states, output name to input name.
        origin: where the samples come from, for people.
    """

    walk: Callable[[], Iterator[Sample]]
    size: int
    labelled: bool = False
    states: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: str = ""

    def __iter__(self) -> Iterator[Sample]:
        return self.walk()

    def __len__(self) -> int:
        return self.size


def load_data(path: str | Path, model: onnx_ir.Model, states: Mapping[str, str] | None = None) -> Data:
    """The samples of an npz file, or of a folder of them in order of name, checked against the model's inputs.

    The file has one array an input, whose first axis counts the samples; a sample gets a first axis of 1 where
    the input has one dimension more than the rest of the array. An array `label` is optional. Arrays are
    read a sample at a time.

    Args:
        path: the file or folder.
        model: the model.
        states: recurrent states, output name to input name: they need no array, start at zero in every file
            and are fed back.

    Raises:
        DataError: names, shapes or types do not fit the model, or a file cannot be read.
    """
    path, states = Path(path), dict(states or {})
    check_states(model, states)
    inputs = [v for v in model.graph.inputs if v.name not in states.values()]
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder holds no .npz file, expected one at least; {_SAVE}")
    arrays = [_check_file(file, inputs, states) for file in files]
    labelled = [LABEL in a and LABEL not in {v.name for v in inputs} for a in arrays]
    if len(set(labelled)) > 1:
        raise DataError(
            f"{path}: {files[labelled.index(False)].name} has no array {LABEL!r}, other files do; give all or none"
        )

    def walk() -> Iterator[Sample]:
        for file, headers in zip(files, arrays, strict=True):
            first = True
            for rows in _rows(file, headers):
                label = rows.pop(LABEL, None) if labelled[0] else None
                sample = {str(v.name): _shaped(rows[str(v.name)], v) for v in inputs}
                if first:
                    sample |= _zeros(model, states, sample)
                yield Sample(sample, label)
                first = False

    size = sum(_count(a) for a in arrays)
    return Data(walk, size, labelled[0], states, str(path))


def seeded_data(
    model: onnx_ir.Model,
    n: int = 8,
    seed: int = 0,
    *,
    states: Mapping[str, str] | None = None,
    sizes: Literal["one", "several"] = "one",
) -> Data:
    """`n` random samples: normal floats, both booleans, and integers that index what they are used to index.

    Open dimensions get the numbers of `example_shapes`, with `sizes="several"` those of `varied_shapes`; a model with
    states, which keep their shape, gets one size all the same.

    Raises:
        DataError: an input is not a tensor of numbers.
    """
    states = dict(states or {})
    check_states(model, states)
    shapes = varied_shapes(model) if sizes == "several" and not states else [example_shapes(model)]
    inputs = [v for v in model.graph.inputs if v.name not in states.values()]
    drawn = [[(v, _draw(v, shape)) for v in inputs] for shape in shapes]

    def walk() -> Iterator[Sample]:
        for i in range(n):
            rng = np.random.default_rng((seed, i))
            sample = {str(v.name): draw(rng) for v, draw in drawn[i % len(drawn)]}
            yield Sample(sample | (_zeros(model, states, sample) if i == 0 else {}))

    return Data(walk, n, states=states, origin=f"seed {seed}")


@dataclasses.dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def _check_file(path: Path, inputs: list[onnx_ir.Value], states: Mapping[str, str]) -> dict[str, _Header]:
    headers = _headers(path)
    expected = ", ".join(f"{v.name} {describe(v)}" for v in inputs)
    for name in headers:
        if name in states.values():
            raise DataError(f"{path}: array {name!r} is a recurrent state, which starts at zero; leave the array out")
        if name != LABEL and name not in {v.name for v in inputs}:
            raise DataError(f"{path}: array {name!r} is no input of the model, expected {expected}; rename or drop it")
    for value in inputs:
        if value.name not in headers:
            hint = "; a recurrent state is given by --state output=input" if not states else ""
            raise DataError(f"{path}: no array for input {value.name!r}, expected {expected}{hint}")
        _check_array(path, value, headers[str(value.name)])
    counts = {name: h.shape[0] if h.shape else 0 for name, h in headers.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{path}: first axes count {listed}, expected one number of samples from 1 in every array")
    return headers


def _check_array(path: Path, value: onnx_ir.Value, header: _Header) -> None:
    where = f"{path}: array {value.name!r}"
    given = f"{header.dtype}[{','.join(map(str, header.shape))}]"
    if value.dtype is None or not isinstance(value.type, onnx_ir.TensorType):
        raise DataError(f"{where}: input {value.name!r} is no tensor, which no array can be; capture another interface")
    if header.dtype != value.dtype.numpy():
        raise DataError(
            f"{where} is {given}, expected {value.dtype.numpy()} for {describe(value)}; convert it with astype"
        )
    if value.shape is None:
        return
    rank = len(value.shape)
    row = header.shape[1:] if len(header.shape) == rank + 1 else (1, *header.shape[1:])
    fits = len(row) == rank and all(not isinstance(d, int) or d == r for d, r in zip(value.shape, row, strict=True))
    if not header.shape or not fits:
        wanted = ["samples", *(str(d) for d in value.shape)]
        if rank and value.shape[0] == 1:
            wanted = ["samples", *(str(d) for d in value.shape[1:])]
        raise DataError(f"{where} is {given}, expected [{','.join(wanted)}] for input {describe(value)}; reshape it")


def _headers(path: Path) -> dict[str, _Header]:
    """Type and shape of every array of an npz file; the data stays unread."""
    if path.suffix != ".npz" and path.is_file():
        raise DataError(f"{path}: is no .npz file, expected one or a folder of them; {_SAVE}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".npy")]
            headers = {}
            for name in names:
                with archive.open(name) as file:
                    headers[name.removesuffix(".npy")] = _header(file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder, expected an .npz file; check the path") from error
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an .npz file ({error}); {_SAVE} again") from error
    for name, header in headers.items():
        if header.dtype.hasobject:
            raise DataError(f"{path}: array {name!r} holds Python objects, which are never loaded; save numbers")
    return headers


def _header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    match version:
        case (1, 0):
            return _Header(*_order(np.lib.format.read_array_header_1_0(file)))
        case (2, 0):
            return _Header(*_order(np.lib.format.read_array_header_2_0(file)))
        case _:
            raise ValueError(f"npy format {version} is not one of numbers")


def _order(header: tuple[Any, ...]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    shape, fortran, dtype = header
    return tuple(shape), dtype, bool(fortran)


def _count(headers: Mapping[str, _Header]) -> int:
    return next(h.shape[0] for h in headers.values())


def _rows(path: Path, headers: Mapping[str, _Header]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The entries of all arrays along their first axis, side by side."""
    try:
        with zipfile.ZipFile(path) as archive:
            walks = {name: _array_rows(archive, name, header) for name, header in headers.items()}
            for _ in range(_count(headers)):
                yield {name: next(walk) for name, walk in walks.items()}
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); {_SAVE} again") from error


def _array_rows(archive: zipfile.ZipFile, name: str, header: _Header) -> Iterator[npt.NDArray[Any]]:
    shape = header.shape[1:]
    with archive.open(f"{name}.npy") as file:
        if header.fortran:  # its rows are not together in the file
            yield from np.lib.format.read_array(file, allow_pickle=False)
            return
        _header(file)
        length = math.prod(shape) * header.dtype.itemsize
        for _ in range(header.shape[0]):
            data = file.read(length)
            if len(data) != length:
                raise EOFError(f"array {name!r} ends early")
            yield np.frombuffer(data, header.dtype).reshape(shape)


def _shaped(row: npt.NDArray[Any], value: onnx_ir.Value) -> npt.NDArray[Any]:
    return row[None] if value.shape is not None and row.ndim == len(value.shape) - 1 else row


def check_states(model: onnx_ir.Model, states: Mapping[str, str]) -> None:
    """Refuse recurrent states, output name to input name, that the model does not have.

    Raises:
        DataError: the model has no such output or input.
    """
    outputs, inputs = {v.name: v for v in model.graph.outputs}, {v.name: v for v in model.graph.inputs}
    for source, target in states.items():
        for kind, name, known in (("output", source, outputs), ("input", target, inputs)):
            if name not in known:
                listed = ", ".join(str(k) for k in known)
                raise DataError(
                    f"--state {source}={target}: the model has no {kind} {name!r}, expected one of {listed}"
                )


def _zeros(
    model: onnx_ir.Model, states: Mapping[str, str], sample: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The states that a sequence starts with; an open dimension takes its number from the sample, or else 1."""
    numbers: dict[str | None, int] = {}
    for value in model.graph.inputs:
        if value.name is not None and value.name in sample and value.shape is not None:
            names = (None if isinstance(d, int) else d.value for d in value.shape)
            numbers.update({n: size for n, size in zip(names, sample[value.name].shape, strict=True) if n})
    zeros = {}
    for value in model.graph.inputs:
        if value.name not in states.values():
            continue
        if value.shape is None or value.dtype is None:
            raise DataError(f"--state: input {value.name!r} has no shape; fix it with --shape {value.name}=...")
        shape = [d if isinstance(d, int) else numbers.get(d.value, 1) for d in value.shape]
        zeros[str(value.name)] = np.zeros(shape, value.dtype.numpy())
    return zeros


def _draw(
    value: onnx_ir.Value, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[np.random.Generator], npt.NDArray[Any]]:
    """How to draw a random array for an input."""
    dtype = value.dtype
    if dtype is None or value.shape is None or dtype == onnx_ir.DataType.STRING:
        raise DataError(f"input {value.name!r} is {describe(value)}, which cannot be drawn at random; give --data")
    shape = shapes.get(str(value.name)) or tuple(d for d in value.shape if isinstance(d, int))
    if dtype.is_floating_point():
        return lambda rng: np.asarray(rng.standard_normal(shape)).astype(dtype.numpy())
    if dtype == onnx_ir.DataType.BOOL:
        return lambda rng: np.asarray(rng.integers(0, 2, shape)).astype(bool)
    if "mask" in str(value.name).lower():
        return lambda rng: np.ones(shape, dtype.numpy())
    choices = _choices(value)
    return lambda rng: np.asarray(rng.choice(choices, shape)).astype(dtype.numpy())


def _choices(value: onnx_ir.Value) -> range | list[int]:
    """The numbers that an integer input is made for: rows of the tables that it indexes, or what it is compared to."""
    rows: list[int] = []
    compared: set[int] = set()
    for node, slot in _readers(value):
        table = node.inputs[0]
        if node.op_type == "Gather" and slot == 1 and table is not None and table.shape is not None:
            length = table.shape[node.attributes["axis"].as_int() if "axis" in node.attributes else 0]
            rows += [length] if isinstance(length, int) else []
        elif node.op_type == "OneHot" and slot == 0:
            rows += [int(n) for n in _constant(node.inputs[1])]
        elif node.op_type == "Equal":
            compared.update(int(n) for n in _constant(node.inputs[1 - slot]))
    if rows:
        return range(max(1, min(rows)))
    # A sequence compared with one number looks for padding; with many, it is made one-hot.
    scalar = value.shape is not None and not len(value.shape)
    return sorted(compared) if compared and (scalar or len(compared) > 1) else range(_INT_BOUND)


def _readers(value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
    """The nodes that read the value, directly or behind ops that only carry it."""
    seen: set[onnx_ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for use in current.uses():
            yield use.node, use.idx
            carried = use.node.op_type in _CARRIERS and (use.idx == 0 or use.node.op_type not in _CARRIERS_FIRST)
            if carried:
                waiting.extend(use.node.outputs)


def _constant(value: onnx_ir.Value | None) -> list[Any]:
    tensor = onnx_ir.convenience.get_const_tensor(value) if value is not None else None
    return [] if tensor is None else list(tensor.numpy().reshape(-1).tolist())
