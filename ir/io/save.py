"""Writing ONNX files: atomic, streamed, hashed on the way out, and read back before they count as written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError, LimitError
from mc_opt.ir.io.atomic import staged_files
from mc_opt.ir.io.direct import write_blocks
from mc_opt.ir.io.read import read_model
from mc_opt.ir.io.weightless import graphs, walk

Reload = Literal["full", "structure"]
INLINE_LIMIT = 64 << 20
"""A model whose weights take less than this is one file; the weights of a larger one go to `.data`."""
_EXTERNAL_FROM = 16 << 10
# A page: ONNX Runtime and we map the file, and a mapped weight should start on a page of its own.
_ALIGNMENT = 4096
_PROTO_LIMIT = (2 << 30) - 1
_BLOCK = 4 << 20


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What was written: for every file its path, size and SHA-256, the model first."""

    paths: tuple[Path, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]


def save_model(
    model: onnx_ir.Model,
    target: str | os.PathLike[str],
    *,
    name: str = "model.onnx",
    reload: Reload = "full",
    progress: Callable[[int, int], None] | None = None,
) -> SavedModel:
    """Write the model to the folder `target`, or to `target` itself when that ends in `.onnx`.

    Weights of 64 MiB and more in total go to `<name>.data`, one at a time, straight from their memory maps;
    the model may have been loaded from the very files that it replaces. The data file is renamed into place
    before the model. For two files that must change together use `staged_folder`.

    Args:
        model: the model; it is not changed.
        target: a folder, made when missing, or a path that ends in `.onnx`.
        name: the file's name in the folder.
        reload: what is compared with the file that was written: `"structure"` its graph, names, types and where
            its weights lie, `"full"` the weights too.
        progress: called with the bytes of weights written and to write.

    Raises:
        IRError: what was read back is not what was written.
        LimitError: the disk is full; nothing is left behind.
        FolderError: the folder cannot be written.
    """
    path = Path(target) if Path(target).suffix == ".onnx" else Path(target, name)
    bare = model.clone()
    total = sum(t.nbytes for t in _tensors(bare))
    places = _place(bare, path.name + ".data") if total >= INLINE_LIMIT else []
    proto = onnx_ir.to_proto(bare)
    size = proto.ByteSize()
    if size > _PROTO_LIMIT:
        raise IRError(
            f"{path}: the graph without its weights takes {size} bytes, which one protobuf cannot hold; "
            "expected large constants as initialisers; run fold-constants first"
        )
    data = proto.SerializeToString(deterministic=True)
    del proto
    data_path = path.with_name(path.name + ".data")
    written = [(path, len(data), hashlib.sha256(data).hexdigest())]
    with staged_files(path.parent, last=path.name) as stage:
        _check_space(path, stage, len(data) + sum(p.tensor.nbytes for p in places))
        (stage / path.name).write_bytes(data)
        del data
        if places:
            written.append((data_path, *_write_data(stage / data_path.name, places, progress)))
        _compare(path, bare, model, read_model(stage / path.name, hashes=False), reload)
    paths, sizes, digests = zip(*written, strict=True)
    return SavedModel(paths, sizes, digests)


@dataclasses.dataclass(frozen=True)
class _Place:
    tensor: onnx_ir.TensorProtocol
    offset: int


def _tensors(model: onnx_ir.Model) -> Iterator[onnx_ir.TensorProtocol]:
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _place(bare: onnx_ir.Model, location: str) -> list[_Place]:
    """Replace the larger tensors of `bare` by references into the data file; what goes where in it."""
    places: dict[int, _Place] = {}  # a tensor that two values share is stored once
    end = 0
    for graph in graphs(bare):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == onnx_ir.DataType.STRING or tensor.nbytes < _EXTERNAL_FROM:
                continue
            if id(tensor) not in places:
                offset = -(-end // _ALIGNMENT) * _ALIGNMENT
                places[id(tensor)] = _Place(tensor, offset)
                end = offset + tensor.nbytes
            value.const_value = onnx_ir.ExternalTensor(
                location,
                places[id(tensor)].offset,
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
    return list(places.values())


def _write_data(path: Path, places: list[_Place], progress: Callable[[int, int], None] | None) -> tuple[int, str]:
    """Write the tensors at their places; the size and the SHA-256 of the file."""
    total = places[-1].offset + places[-1].tensor.nbytes
    return write_blocks(path, _laid_out(places), progress=None if progress is None else lambda n: progress(n, total))


def _laid_out(places: list[_Place]) -> Iterator[memoryview]:
    end = 0
    for place in places:
        yield memoryview(bytes(place.offset - end))
        yield from _blocks(place.tensor)
        end = place.offset + place.tensor.nbytes


def _blocks(tensor: onnx_ir.TensorProtocol) -> Iterator[memoryview]:
    """The little-endian bytes of a tensor, in blocks, without a copy where the tensor is an array."""
    raw: Any = tensor.raw if isinstance(tensor, (onnx_ir.Tensor, onnx_ir.PackedTensor)) else None
    plain = isinstance(raw, np.ndarray) and raw.flags.c_contiguous and raw.nbytes == tensor.nbytes
    if plain and raw.dtype.byteorder in "<|=":
        data = memoryview(raw.reshape(-1).view(np.uint8))
    else:
        data = memoryview(tensor.tobytes())
    if len(data) != tensor.nbytes:
        raise IRError(f"weight {tensor.name!r}: {len(data)} bytes of data, expected {tensor.nbytes} for {tensor.dtype}")
    for start in range(0, len(data), _BLOCK):
        yield data[start : start + _BLOCK]


def _check_space(path: Path, stage: Path, needed: int) -> None:
    free = shutil.disk_usage(stage).free
    if free < needed:
        raise LimitError(
            f"{path}: needs {needed} bytes, the disk has {free} left; nothing was written; free some space, or "
            "write to another disk"
        )


def _compare(path: Path, bare: onnx_ir.Model, model: onnx_ir.Model, read: onnx_ir.Model, reload: Reload) -> None:
    """Refuse a file that does not read back as the model that was written."""
    for written, back in zip(_facts(bare), _facts(read), strict=False):
        if written != back:
            raise IRError(f"{path}: reads back as {back}, expected {written}; nothing was written; report this bug")
    match reload:
        case "structure":
            return
        case "full":
            pass
        case _:
            assert_never(reload)
    for graph, twin in zip(graphs(model), graphs(read), strict=True):
        for name, value in graph.initializers.items():
            mine, theirs = value.const_value, twin.initializers[name].const_value
            if mine is not None and theirs is not None and not _same(mine, theirs):
                raise IRError(f"{path}: weight {name!r} reads back different; nothing was written; check the disk")


def _same(a: onnx_ir.TensorProtocol, b: onnx_ir.TensorProtocol) -> bool:
    if a.dtype == onnx_ir.DataType.STRING:
        return bool(np.array_equal(a.numpy(), b.numpy()))
    return all(
        np.array_equal(np.frombuffer(x, np.uint8), np.frombuffer(y, np.uint8))
        for x, y in zip(_blocks(a), _blocks(b), strict=True)
    )


def _facts(model: onnx_ir.Model) -> Iterator[tuple[object, ...]]:
    """Everything about a model but its weights' data, as comparable rows."""
    yield "model", model.ir_version, dict(model.opset_imports), dict(model.metadata_props), model.doc_string or None
    yield "functions", [(f.identifier(), len(f.graph)) for f in model.functions.values()]
    for way, graph in walk(model.graph):
        yield "graph", way, graph.name or None, len(graph), len(graph.initializers)
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            for value in values:
                yield kind, value.name, value.type, value.shape
        for name, value in graph.initializers.items():
            tensor = value.const_value
            yield "weight", name, None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        for node in graph:
            # An input or output that is left out at the end is not written.
            inputs = " ".join(v.name or "" if v is not None else "" for v in node.inputs).rstrip()
            outputs = " ".join(v.name or "" for v in node.outputs).rstrip()
            yield "node", node.name or None, node.domain, node.op_type, inputs, outputs
