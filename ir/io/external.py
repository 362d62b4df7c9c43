"""External data of ONNX files: where it may lie, and tensors that are views of the memory-mapped file."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx_ir

from mc_opt.ir.errors import IRError

_BLOCK = 1 << 22


class ExternalFiles:
    """The external data files of one model, each mapped once and checked before it is opened."""

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        self._maps: dict[str, mmap.mmap | bytes] = {}

    def tensor(self, proto: onnx.TensorProto) -> onnx_ir.TensorProtocol:
        """The tensor of `proto`, a read-only view of its file.

        The map outlives the file's name: replacing the file on disk does not change the tensor.

        Raises:
            IRError: a location outside the model's folder, a file that is missing or too short, or a length
                that does not fit the shape.
        """
        entries = {e.key: e.value for e in proto.external_data}
        where = f"{self.model_path}: weight {proto.name!r}"
        location = entries.get("location", "")
        data = self._maps.get(location)
        if data is None:
            data = self._maps[location] = self._open(location, where)
        offset, length = _number(entries, "offset", where), _number(entries, "length", where)
        expected = nbytes(proto)
        if length not in (0, expected):
            raise IRError(
                f"{where}: {length} bytes of external data in {location!r}, expected {expected} for "
                f"{describe(proto)}; export the model again"
            )
        if offset + expected > len(data):
            raise IRError(
                f"{where}: external data file {location!r} has {len(data)} bytes, expected at least "
                f"{offset + expected}; the file is cut short or belongs to another model: copy it again"
            )
        return view(proto, memoryview(data)[offset : offset + expected])

    def facts(self) -> tuple[tuple[str, int, str], ...]:
        """Location, size and SHA-256 of every file, in order of name."""
        return tuple((name, len(data), sha256(data)) for name, data in sorted(self._maps.items()))

    def _open(self, location: str, where: str) -> mmap.mmap | bytes:
        folder = self.model_path.parent
        path = folder / location
        if not location:
            raise IRError(f"{where}: its external data names no file; export the model again")
        if "\0" in location or os.path.isabs(location) or "\\" in location or ".." in Path(location).parts:
            raise IRError(
                f"{where}: external data {location!r} lies outside the model's folder; expected a relative path "
                "below it; move the file beside the model and save the model again"
            )
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise IRError(f"{where}: external data file {str(path)!r} is missing; copy it beside the model") from error
        if not real.is_relative_to(folder.resolve()):
            raise IRError(
                f"{where}: external data {location!r} is a link to {str(real)!r}, outside the model's folder; "
                "copy the file beside the model instead of linking it"
            )
        try:
            # Asked before it is opened: opening a named pipe waits for a writer.
            if not stat.S_ISREG(real.stat().st_mode):
                raise IRError(f"{where}: external data {location!r} is not a regular file; expected a data file")
            with open(real, "rb") as file:
                # An empty file cannot be mapped.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        except OSError as error:
            raise IRError(f"{where}: external data file {str(path)!r} cannot be read ({error.strerror})") from error


def view(proto: onnx.TensorProto, data: memoryview | bytes) -> onnx_ir.TensorProtocol:
    """A tensor over `data`, ONNX's little-endian bytes of `proto`, without a copy."""
    dtype, shape = onnx_ir.DataType(proto.data_type), onnx_ir.Shape(tuple(proto.dims), frozen=True)
    name, doc_string = proto.name or None, proto.doc_string or None
    metadata = {e.key: e.value for e in proto.metadata_props} or None
    if dtype.bitwidth < 8:
        packed = np.frombuffer(data, np.uint8)
        return onnx_ir.PackedTensor(
            packed, dtype, shape=shape, name=name, doc_string=doc_string, metadata_props=metadata
        )
    array = np.frombuffer(data, dtype.numpy().newbyteorder("<"))
    if not array.flags.aligned:
        array = array.copy()  # BLAS and the runtimes want aligned weights
        array.flags.writeable = False
    return onnx_ir.Tensor(
        array.reshape(tuple(proto.dims)), dtype, shape=shape, name=name, doc_string=doc_string, metadata_props=metadata
    )


def nbytes(proto: onnx.TensorProto) -> int:
    """The bytes that the elements of `proto` take as raw data."""
    count: int = math.prod(proto.dims)
    return math.ceil(count * onnx_ir.DataType(proto.data_type).bitwidth / 8)


def describe(proto: onnx.TensorProto) -> str:
    """Type and shape, as in `FLOAT[64,3,3,3]`."""
    return f"{onnx.TensorProto.DataType.Name(proto.data_type)}[{','.join(map(str, proto.dims))}]"


def sha256(data: mmap.mmap | memoryview | bytes) -> str:
    """The SHA-256 of `data` in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with memoryview(data) as whole:
        for start in range(0, len(whole), _BLOCK):
            digest.update(whole[start : start + _BLOCK])
    return digest.hexdigest()


def _number(entries: dict[str, str], key: str, where: str) -> int:
    text = entries.get(key, "0") or "0"
    if not text.isascii() or not text.isdigit():
        raise IRError(f"{where}: {key} of its external data is {text!r}, expected a whole number from 0")
    return int(text)
