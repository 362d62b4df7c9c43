"""npz files: what their arrays are, and their entries along the first axis, in order or by number."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from mc_opt.ir.errors import DataError

SAVE = "save it with numpy.savez"
# A zip member's local header: 26 bytes, the lengths of the name and the extra field (2 bytes each), and these two.
_LOCAL_HEADER = 30
_OPEN_FILES = 64


@dataclasses.dataclass(frozen=True)
class Header:
    """The type and shape of an array; `fortran` when its first axis runs fastest in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def read_headers(path: Path) -> dict[str, Header]:
    """Type and shape of every array of an npz file; the data stays unread.

    Raises:
        DataError: the file cannot be read, or holds Python objects.
    """
    if path.suffix != ".npz" and path.is_file():
        raise DataError(f"{path}: is no .npz file, expected one or a folder of them; {SAVE}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".npy")]
            headers = {}
            for name in names:
                with archive.open(name) as file:
                    headers[name.removesuffix(".npy")] = _header(file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder, expected an .npz file; check the path") from error
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an .npz file ({error}); {SAVE} again") from error
    for name, header in headers.items():
        if header.dtype.hasobject:
            raise DataError(f"{path}: array {name!r} holds Python objects, which are never loaded; save numbers")
    return headers


def _header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    match version:
        case (1, 0):
            return Header(*_order(np.lib.format.read_array_header_1_0(file)))
        case (2, 0):
            return Header(*_order(np.lib.format.read_array_header_2_0(file)))
        case _:
            raise ValueError(f"npy format {version} is not one of numbers")


def _order(header: tuple[Any, ...]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    shape, fortran, dtype = header
    return tuple(shape), dtype, bool(fortran)


def count(headers: Mapping[str, Header]) -> int:
    """The entries of every array along its first axis."""
    return next(h.shape[0] for h in headers.values())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); {SAVE} again") from error


def walk_rows(path: Path, headers: Mapping[str, Header]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The entries of all arrays along their first axis, side by side, read one at a time.

    Raises:
        DataError: the file ends early, or its checksum is wrong.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        walks = {name: _array_rows(archive, name, header) for name, header in headers.items()}
        for _ in range(count(headers)):
            yield {name: next(walk) for name, walk in walks.items()}


def _array_rows(archive: zipfile.ZipFile, name: str, header: Header) -> Iterator[npt.NDArray[Any]]:
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


def open_arrays(
    files: Sequence[Path], headers: Sequence[Mapping[str, Header]]
) -> Callable[[int], dict[str, npt.NDArray[Any]]]:
    """The arrays of each of several npz files, mapped read-only: any entry is there at once and takes no memory.

    What `numpy.savez` stores is mapped where it stands in the file; what `savez_compressed` packs is unpacked once
    into a temporary file without a name. Nothing is opened before the first call.

    Returns:
        The arrays of the file of a number, by name; the call raises a DataError when the file cannot be read.
    """

    @functools.cache
    def unpacked() -> tuple[npt.NDArray[np.uint8], dict[tuple[int, str], int]]:
        with tempfile.TemporaryFile() as file:
            starts = {}
            for number, path in enumerate(files):
                with _readable(path), zipfile.ZipFile(path) as archive:
                    for name in headers[number]:
                        if not _is_stored(archive, name):
                            starts[number, name] = file.tell()
                            with archive.open(f"{name}.npy") as member:
                                shutil.copyfileobj(member, file)
            file.flush()
            return _map(file), starts

    @functools.lru_cache(_OPEN_FILES)
    def arrays(number: int) -> dict[str, npt.NDArray[Any]]:
        path, found = files[number], {}
        with _readable(path), zipfile.ZipFile(path) as archive:
            raw = _map(path)
            for name, header in headers[number].items():
                if _is_stored(archive, name):
                    packed, start = raw, _offset(path, archive.getinfo(f"{name}.npy"))
                else:
                    packed, start = unpacked()[0], unpacked()[1][number, name]
                found[name] = _array_at(packed, start + _header_length(archive, name), header)
        return found

    return arrays


def _is_stored(archive: zipfile.ZipFile, name: str) -> bool:
    return archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED


def _map(file: Path | IO[bytes]) -> npt.NDArray[np.uint8]:
    mapped: Any = np.memmap(file, np.uint8, "r")
    return np.asarray(mapped)  # a plain array over the same map: its entries are taken many times, and faster


def _offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member begins; the lengths in its own header need not be those of the directory."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return member.header_offset + _LOCAL_HEADER + sum(lengths)


def _header_length(archive: zipfile.ZipFile, name: str) -> int:
    with archive.open(f"{name}.npy") as file:
        _header(file)
        return file.tell()


def _array_at(raw: npt.NDArray[np.uint8], start: int, header: Header) -> npt.NDArray[Any]:
    length = math.prod(header.shape) * header.dtype.itemsize
    if start + length > len(raw):
        raise EOFError("an array ends early")
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    return raw[start : start + length].view(header.dtype).reshape(header.shape, order=order)


def file_digest(path: Path, headers: Mapping[str, Header]) -> str:
    """What tells the arrays of an npz file from others: their names, types and shapes, and the zip's checksums."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = [f"{name} {h} {archive.getinfo(f'{name}.npy').CRC:08x}" for name, h in headers.items()]
    return hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest()
