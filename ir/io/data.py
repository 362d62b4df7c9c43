"""Data for a model: streams of samples from npz files, and seeded random ones."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir

from mc_opt.ir.errors import DataError
from mc_opt.ir.io.npz import SAVE, Header, count, file_digest, open_arrays, read_headers, walk_rows
from mc_opt.ir.io.shapes import describe, example_shapes, varied_shapes

LABEL = "label"
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
        row: a sample by its number, without states; None when they can only be walked.
        fingerprint: what tells these samples from others; empty when nothing does.
    """

    walk: Callable[[], Iterator[Sample]]
    size: int
    labelled: bool = False
    states: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: str = ""
    row: Callable[[int], Sample] | None = None
    fingerprint: str = ""

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
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder holds no .npz file, expected one at least; {SAVE}")
    headers = [read_headers(file) for file in files]
    for file, arrays in zip(files, headers, strict=True):
        check_arrays(file, arrays, model, states)
    given = [LABEL in a and LABEL not in {v.name for v in model.graph.inputs} for a in headers]
    if len(set(given)) > 1:
        raise DataError(
            f"{path}: {files[given.index(False)].name} has no array {LABEL!r}, other files do; give all or none"
        )
    sample = functools.partial(as_sample, model=model, states=states)

    def walk() -> Iterator[Sample]:
        for file, arrays in zip(files, headers, strict=True):
            for i, rows in enumerate(walk_rows(file, arrays)):
                plain = sample(rows)
                yield plain if i else Sample({**plain.inputs, **_zeros(model, states, plain.inputs)}, plain.label)

    opened = open_arrays(files, headers)
    ends = list(itertools.accumulate(count(a) for a in headers))

    def row(index: int) -> Sample:
        number = bisect.bisect_right(ends, index)
        at = index - ends[number]  # from the file's end, as a list counts
        return sample({name: array[at] for name, array in opened(number).items()})

    digest = "".join(file_digest(file, arrays) for file, arrays in zip(files, headers, strict=True))
    return Data(walk, ends[-1], given[0], states, str(path), row, digest)


def as_sample(rows: Mapping[str, npt.NDArray[Any]], model: onnx_ir.Model, states: Mapping[str, str]) -> Sample:
    """One entry of arrays that `check_arrays` let through, in the shapes of the model's inputs; without states."""
    inputs = [v for v in model.graph.inputs if v.name not in states.values()]
    label = rows.get(LABEL) if LABEL not in {v.name for v in inputs} else None
    return Sample({str(v.name): _shaped(rows[str(v.name)], v) for v in inputs}, label)


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

    def row(index: int) -> Sample:
        rng = np.random.default_rng((seed, index))
        return Sample({str(v.name): draw(rng) for v, draw in drawn[index % len(drawn)]})

    def walk() -> Iterator[Sample]:
        for i in range(n):
            inputs = row(i).inputs
            yield Sample(inputs if i else {**inputs, **_zeros(model, states, inputs)})

    return Data(walk, n, states=states, origin=f"seed {seed}", row=row, fingerprint=f"seed {seed}, {n} samples")


def check_arrays(
    where: str | Path, headers: Mapping[str, Header], model: onnx_ir.Model, states: Mapping[str, str]
) -> None:
    """Refuse arrays, one an input and perhaps a label, whose first axes count samples, that do not fit a model.

    Args:
        where: where they come from, for the error.
        headers: the arrays by name.
        model: the model.
        states: recurrent states, output name to input name, which need no array.

    Raises:
        DataError: names, shapes or types do not fit, or the arrays do not count the same samples.
    """
    inputs = [v for v in model.graph.inputs if v.name not in states.values()]
    expected = ", ".join(f"{v.name} {describe(v)}" for v in inputs)
    for name in headers:
        if name in states.values():
            raise DataError(f"{where}: array {name!r} is a recurrent state, which starts at zero; leave the array out")
        if name != LABEL and name not in {v.name for v in inputs}:
            raise DataError(f"{where}: array {name!r} is no input of the model, expected {expected}; rename or drop it")
    for value in inputs:
        if value.name not in headers:
            hint = "; a recurrent state is given by --state output=input" if not states else ""
            raise DataError(f"{where}: no array for input {value.name!r}, expected {expected}{hint}")
        _check_array(f"{where}: array {value.name!r}", value, headers[str(value.name)])
    counts = {name: h.shape[0] if h.shape else 0 for name, h in headers.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where}: first axes count {listed}, expected one number of samples from 1 in every array")


def _check_array(where: str, value: onnx_ir.Value, header: Header) -> None:
    if value.dtype is None or not isinstance(value.type, onnx_ir.TensorType):
        raise DataError(f"{where}: input {value.name!r} is no tensor, which no array can be; capture another interface")
    if header.dtype != value.dtype.numpy():
        raise DataError(
            f"{where} is {header}, expected {value.dtype.numpy()} for {describe(value)}; convert it with astype"
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
        raise DataError(f"{where} is {header}, expected [{','.join(wanted)}] for input {describe(value)}; reshape it")


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
    for node, slot in readers_of(value):
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


def readers_of(value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
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
