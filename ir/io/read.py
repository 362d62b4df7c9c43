"""Reading an ONNX file as it is: parsed, its names and data checked, its weights mapped or read-only."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.io.external import ExternalFiles, describe, nbytes, sha256, view
from mc_opt.ir.io.order import check_names, sort, subgraphs
from mc_opt.ir.io.weightless import graphs

SOURCE = "mc_opt.source"
_PROTO_LIMIT = 2**31 - 1
_FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive, such as torch.save writes; capture the module with mc_opt.capture"),
    (0, b"\x80\x02", "a pickle, which is never loaded; capture the module with mc_opt.capture"),
    (0, b"\x89HDF", "an HDF5 file; convert it with tf2onnx"),
    (0, b"GGUF", "a GGUF file; export the model to ONNX"),
    (4, b"ORTM", "an ONNX Runtime .ort file; pass the .onnx file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite file; convert it with tf2onnx"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from, for the report: the facts of the file before anything was changed."""

    path: str
    bytes: int
    sha256: str
    opset: int | None
    ir_version: int
    external: tuple[tuple[str, int, str], ...] = ()
    """Location, size and SHA-256 of every external data file."""


def read_model(path: Path, *, hashes: bool = True) -> onnx_ir.Model:
    """Read an ONNX file as it is: its own opset, its own constants; only names and external data are checked.

    `model.meta["mc_opt.source"]` holds the `Source`, unless `hashes` is off.
    """
    proto, digest, size = _parse(path, hashes=hashes)
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
    if not 3 <= proto.ir_version <= onnx.IR_VERSION:
        raise IRError(
            f"{path}: IR version {proto.ir_version}, the installed onnx {onnx.__version__} reads 3 to "
            f"{onnx.IR_VERSION}; " + ("upgrade onnx" if proto.ir_version > 3 else "export the model again")
        )
    if not opsets:
        raise IRError(f"{path}: names no opset; expected one opset import at least; export the model again")
    ordered = check_names(proto.graph, frozenset(), str(path))
    files = ExternalFiles(path)
    tensors = _take_tensors(proto, files)
    try:
        model = onnx_ir.from_proto(proto)
    except Exception as error:  # onnx_ir wraps whatever it met in chains of RuntimeErrors
        raise IRError(f"{path}: {_innermost(error)}; export the model again without it") from error
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports.update(opsets)
    _put_tensors(model, tensors)
    _drop_initializer_inputs(model)
    _forget_negative_dimensions(model)
    if not ordered:
        sort(model, path)
    if hashes:
        model.meta[SOURCE] = Source(str(path), size, digest, opsets.get(""), proto.ir_version, files.facts())
    return model


def _parse(path: Path, *, hashes: bool) -> tuple[onnx.ModelProto, str, int]:
    """The file's proto, its SHA-256 and its size."""
    if path.is_dir():
        raise IRError(f"{path}: is a folder, expected an ONNX file; name the .onnx file in it")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise IRError(f"{path}: is empty, expected an ONNX file; export or copy the model again")
            if size > _PROTO_LIMIT:
                raise IRError(
                    f"{path}: {size} bytes in one protobuf, which ends at 2 GiB; save the model with external data"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _decode(path, data), sha256(data) if hashes else "", size
    except FileNotFoundError as error:
        raise IRError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise IRError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _decode(path: Path, data: mmap.mmap) -> onnx.ModelProto:
    for offset, magic, what in _FOREIGN:
        if data[offset : offset + len(magic)] == magic:
            raise IRError(f"{path}: is not an ONNX file but {what}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data[:])
    except google.protobuf.message.DecodeError as error:
        raise IRError(f"{path}: {_unreadable(data)}; export or copy the model again") from error
    # Almost any bytes decode as some protobuf message: a model has a graph that computes something.
    if not proto.HasField("graph") or not (proto.graph.output or proto.graph.node):
        raise IRError(f"{path}: holds no ONNX graph ({len(data)} bytes); expected an ONNX model; check the file")
    if not proto.graph.output:
        raise IRError(f"{path}: its graph has no output, expected one at least; export the model again")
    return proto


def _unreadable(data: mmap.mmap) -> str:
    head = data[:512]
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head) and head.isascii():
        return f"is a text file that begins {head[:20].decode()!r}, expected a binary ONNX file"
    return f"cannot be read as an ONNX file: its {len(data)} bytes are cut short, damaged or of another format"


def _take_tensors(proto: onnx.ModelProto, files: ExternalFiles) -> dict[str, onnx_ir.TensorProtocol]:
    """Take every tensor out of the proto, so that nothing keeps the file's bytes alive; stubs stay, with keys."""
    _densify(proto.graph)
    tensors: dict[str, onnx_ir.TensorProtocol] = {}
    nodes = [proto.graph.node, *(f.node for f in proto.functions)]
    for tensor in [*proto.graph.initializer, *(t for n in nodes for t in _node_tensors(n))]:
        key = f"mc_opt.tensor:{len(tensors)}"
        tensors[key] = _tensor(tensor, files)
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        if tensor.data_type == onnx.TensorProto.STRING:
            continue  # onnx_ir copies strings by itself
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=key)
        tensor.data_location = onnx.TensorProto.EXTERNAL
    return tensors


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name:
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            _densify(graph)
            yield from graph.initializer
            yield from _node_tensors(graph.node)


def _densify(graph: onnx.GraphProto) -> None:
    """Write sparse initialisers, which hardly any tool reads, as dense ones."""
    for sparse in graph.sparse_initializer:
        values = onnx.numpy_helper.to_array(sparse.values)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _tensor(proto: onnx.TensorProto, files: ExternalFiles) -> onnx_ir.TensorProtocol:
    where = f"{files.model_path}: weight {proto.name!r}"
    if proto.data_type not in onnx.TensorProto.DataType.values() or not proto.data_type:
        raise IRError(f"{where}: type {proto.data_type} is unknown to onnx {onnx.__version__}; upgrade onnx")
    if any(d < 0 for d in proto.dims):
        raise IRError(f"{where}: shape {list(proto.dims)} has a negative length; export the model again")
    if proto.data_type == onnx.TensorProto.STRING:
        return onnx_ir.StringTensor(list(proto.string_data), shape=onnx_ir.Shape(proto.dims), name=proto.name)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return files.tensor(proto)
    data = proto.raw_data if proto.HasField("raw_data") else onnx_ir.TensorProtoTensor(proto).tobytes()
    if len(data) != nbytes(proto):
        raise IRError(
            f"{where}: {len(data)} bytes of data, expected {nbytes(proto)} for {describe(proto)}; "
            "the file is damaged: export or copy the model again"
        )
    return view(proto, data)


def _put_tensors(model: onnx_ir.Model, tensors: Mapping[str, onnx_ir.TensorProtocol]) -> None:
    def real(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
        return tensors[str(tensor.location)] if isinstance(tensor, onnx_ir.ExternalTensor) else tensor

    everything = [*graphs(model), *(f.graph for f in model.functions.values())]
    for graph in everything:
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = real(value.const_value)
    for node in (n for graph in everything[:1] + everything[-len(model.functions) :] for n in graph.all_nodes()):
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                node.attributes[name] = onnx_ir.AttrTensor(name, real(attribute.as_tensor()))
            elif attribute.type == onnx_ir.AttributeType.TENSORS:
                node.attributes[name] = onnx_ir.AttrTensors(name, [real(t) for t in attribute.as_tensors()])


def _drop_initializer_inputs(model: onnx_ir.Model) -> None:
    """An input with an initialiser is a weight with a default, as IR 3 wrote every weight."""
    for graph in graphs(model):
        kept = [value for value in graph.inputs if not value.is_initializer()]
        if len(kept) != len(graph.inputs):
            graph.inputs.clear()
            graph.inputs.extend(kept)


def _forget_negative_dimensions(model: onnx_ir.Model) -> None:
    """Some exporters write -1 for a dimension that is not known."""
    for graph in graphs(model):
        for value in [*graph.inputs, *graph.outputs, *(o for node in graph for o in node.outputs)]:
            if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
                value.shape = onnx_ir.Shape([None if isinstance(d, int) and d < 0 else d for d in value.shape])


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
