"""TVM's runtime by itself: no compiler, no Python package `tvm`, no torch; they take nine tenths of a small process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import mmap
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mc_opt.targets import _call
from mc_opt.targets._call import UNSEEN, Input, Run, Slot
from mc_opt.targets._manifest import Port
from mc_opt.targets._pools import POOLS

# Bytes up to which outputs are copied, and inputs; memories of a larger output that are kept for later runs.
_TINY, _SMALL, _KEPT = 1 << 12, 1 << 16, 3
# What `_direct` calls its function.
_DIRECT = "direct"
# TVM's kernels load whole vectors from the beginning of a tensor.
_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20
_CPU, _NAIVE, _POOLED = 1, 1, 2


class Processor:
    """TVM's virtual machine on the processor, with a library that mc-opt built and its constants."""

    def __init__(self, path: Path, constants: np.ndarray, *, threads: int | None, pooled: bool) -> None:
        """Load a library.

        Args:
            path: the library.
            constants: the bytes that its function `constants` tells the meaning of; aligned.
            threads: how many run its parallel loops; None when it has none.
            pooled: whether memory of a run is kept for the next.
        """
        self._ffi = load()
        self._threads = threads
        library = open_library(path)
        self._machine = library["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED if pooled else _NAIVE)
        self._constants = constants
        # Main without the machine, if the library has it, and what it takes behind the outputs.
        self._main: Callable[..., Any]
        self._blocks: tuple[Any, ...]
        self._main, self._blocks = self._direct(library) or (self._bound("main", ""), ())
        self._second: Any = None
        written, outputs = (self._machine[table]() for table in ("written", "outputs"))
        self._memories = memories(self._ffi, written, outputs)
        # Which memory each argument behind the inputs is a view of, and each output, and which of its views.
        self._written, self._outputs = views_of(written), views_of(outputs)

    def add(self, name: str) -> None:
        """Load a second function of the library, which has the inputs of `main` and shares its constants."""
        self._second = self._bound(name, f"{name}_")

    def _direct(self, library: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        """Main as one function of machine code, with the constants and a workspace."""
        if not library.implements_function(_DIRECT, query_imports=True):
            return None
        blocks = self._constants, memory(_extent(self._machine["places"]()))
        function = self._pooled(library.get_function(_DIRECT, query_imports=True))
        return function, tuple(map(self._ffi.from_dlpack, blocks))

    def _bound(self, name: str, prefix: str) -> Callable[..., Any]:
        """A function with its last arguments."""
        places = self._machine[f"{prefix}places"]()
        held = [
            *_views(self._machine[f"{prefix}constants"](), self._constants),
            *_views(places, memory(_extent(places))),
        ]
        self._machine["save_function"](name, f"{prefix}bound", 1, *(self._ffi.from_dlpack(array) for array in held))
        return self._pooled(self._machine[f"{prefix}bound"])

    def _pooled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose parallel loops, if there are any, run on as many threads as were asked for."""
        return function if self._threads is None else POOLS.bound(self._ffi, self._threads, function)

    def run(self, tensors: Sequence[Any]) -> list[np.ndarray]:
        """The outputs of main as arrays, for tensors in the order of the inputs; one call at a time."""
        if not self._outputs:
            return [self.fetch(result) for result in self.call(tensors)]
        slots = [memory.idle() for memory in self._memories]
        self._main(*tensors, *[slots[number].tensors[k] for number, k in self._written], *self._blocks)
        return [slots[number].taken(k) for number, k in self._outputs]

    def repeated(self, inputs: Sequence[Port], names: Sequence[str]) -> Run | None:
        """`run` for inputs of fixed sizes, with the outputs by name; None where main returns tensors of its own."""
        if not self._outputs:
            return None
        return _call.function(
            self._main,
            [Input(p.name, p.shape, np.dtype(p.dtype), self._place_of(p)) for p in inputs],
            self.borrow,
            self._memories,
            self._written,
            list(zip(names, self._outputs, strict=True)),
            behind=self._blocks,
        )

    def call(self, tensors: Sequence[Any], *, second: bool = False) -> Sequence[Any]:
        """The outputs of main, or of the second function, as tensors; one call at a time."""
        if self._outputs and not second:
            return [self.place(output) for output in self.run(tensors)]
        found: Sequence[Any] = (self._second if second else self._main)(*tensors)
        return found

    def instrument(self, function: Any) -> None:
        """Let `function(function, name, is before, result, *arguments)` be called around every call of a run."""
        self._main, self._blocks = self._bound("main", ""), ()
        self._machine["set_instrument"](function)

    def place(self, array: np.ndarray) -> Any:
        """A copy of an array as a tensor."""
        copy = aligned(array.shape, array.dtype)
        np.copyto(copy, array)
        return self.tensor(copy)

    def borrow(self, array: np.ndarray) -> Any:
        """A tensor in the memory of an array that is large and fit for it, else of a copy."""
        flags = array.flags
        fits = flags.c_contiguous and flags.aligned and flags.writeable  # tvm_ffi takes no other
        return self.tensor(array) if self._borrows(array.nbytes) and fits else self.place(array)

    def _place_of(self, port: Port) -> tuple[np.ndarray, Any] | None:
        """Where an input of fixed size is copied to, as an array and as a tensor; nowhere when it is borrowed."""
        array = aligned(port.shape, np.dtype(port.dtype))
        return None if self._borrows(array.nbytes) else (array, self.tensor(array))

    def _borrows(self, size: int) -> bool:
        """Whether an input of so many bytes is read where it is: kernels take it anywhere if they take outputs."""
        return bool(self._outputs) and size > _SMALL

    def tensor(self, memory: np.ndarray) -> Any:
        """A tensor in the memory of an array."""
        return self._ffi.from_dlpack(memory)

    def fetch(self, tensor: Any) -> np.ndarray:
        """A copy of a tensor as an array; the memory of the tensor goes back to the virtual machine."""
        return np.array(np.from_dlpack(tensor))


class Memory:
    """Memory for an output, handed out without a copy where it is large, and used again when nobody refers to it.

    A copy would take as long as a small kernel: memory that is new to a process is brought in page by page, and what
    the kernels have driven out of the caches comes back by the line.
    """

    def __init__(self, ffi: Any, written: Sequence[Any], outputs: Sequence[Any]) -> None:
        """The rows of what main writes, and of what callers see."""
        self._ffi = ffi
        self._written, self._outputs = ([(kind, shape, (0,)) for kind, shape, _ in rows] for rows in (written, outputs))
        self._size = _extent([*self._written, *self._outputs])
        # Callers who write to an output do not expect another to change.
        self._is_lent = self._size > _TINY and len(self._outputs) == 1
        self._slots = [self._made()]

    def idle(self) -> Slot:
        """Memory that no array of a caller refers to; always the same where callers get copies."""
        for slot in self._slots:
            if slot.lent is None or sys.getrefcount(slot.lent) == UNSEEN:
                return slot
        slot = self._made()
        if len(self._slots) < _KEPT:
            self._slots.append(slot)
        return slot

    def _made(self) -> Slot:
        room = memory(self._size)
        tensors = [self._ffi.from_dlpack(array) for array in _views(self._written, room)]
        arrays = list(_views(self._outputs, room))
        lent = np.frombuffer(room.data, arrays[0].dtype, arrays[0].size) if self._is_lent else None
        return Slot(tensors, arrays, lent)


def memories(ffi: Any, written: Sequence[Any], outputs: Sequence[Any]) -> list[Memory]:
    """Memory for the outputs, by number."""
    tables = written, outputs
    numbers = sorted({number for _, _, (number,) in outputs})
    return [Memory(ffi, *([row for row in rows if row[2][0] == number] for rows in tables)) for number in numbers]


def views_of(rows: Sequence[Any]) -> list[tuple[int, int]]:
    """Of rows of (type, shape, number) the numbers, and how many rows of that number are before each."""
    numbers = [int(number) for _, _, (number,) in rows]
    return [(number, numbers[:k].count(number)) for k, number in enumerate(numbers)]


def load() -> Any:
    """The package tvm_ffi, with TVM's runtime loaded behind it."""
    with _hidden("torch"):
        ffi = importlib.import_module("tvm_ffi")
    found = importlib.util.find_spec("tvm")
    assert found is not None and found.submodule_search_locations  # whoever asks has its version
    place = Path(found.submodule_search_locations[0], "lib", "libtvm_runtime.so")
    ctypes.CDLL(str(place), mode=ctypes.RTLD_GLOBAL)
    return ffi


def open_library(path: Path) -> Any:
    """The library at `path` as it is now: the loader knows libraries by name, and would give an earlier build."""
    with tempfile.TemporaryDirectory(prefix="mc-opt-") as folder:
        link = Path(folder, "model.so")
        link.symlink_to(path.resolve())
        # tvm's own would follow the link first. A module that nobody holds any more goes, with what it made.
        return load().load_module(link, keep_module_alive=False)


def aligned(shape: Sequence[Any], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory for an array, aligned as TVM asks it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def read(path: Path) -> np.ndarray:
    """The bytes of a file, [n], in memory of its own: a mapped file would stand in pages of the usual size."""
    size = path.stat().st_size
    room = memory(size)
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < size and (count := file.readinto(room[done:].data)):
            done += count
    return room[:done]


def memory(size: int) -> np.ndarray:
    """Aligned memory, [size] bytes, in huge pages where it fills some: there are fewer addresses to translate.

    That is worth 3 to 7 % of the time of weights beyond the caches, and about 1 % of a convolutional network's.
    """
    if size < _HUGE_PAGE:
        return aligned((size,), np.dtype(np.uint8))
    block = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(block, np.uint8)
    start = -room.ctypes.data % _HUGE_PAGE
    return room[start : start + size]


def _views(rows: Sequence[Any], room: np.ndarray) -> Iterator[np.ndarray]:
    """The arrays in `room` that rows of (type, shape, offset) tell of."""
    for kind, shape, (offset,) in rows:
        dtype = np.dtype(str(kind))
        yield room[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(tuple(shape))


def _extent(rows: Sequence[Any]) -> int:
    """The bytes that rows take."""
    return max((offset + math.prod(shape) * np.dtype(str(kind)).itemsize for kind, shape, (offset,) in rows), default=0)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """What this thread imports does not find a package, unless it is there already.

    tvm_ffi imports torch wherever it is installed, for its tensors: seconds and 200 MB, for which we have no use.
    """
    if package in sys.modules:
        yield
        return
    finder = _Without(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Without:
    """An importer that finds nothing, and keeps those behind it from finding one package for one thread."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._thread = threading.get_ident()

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> None:
        """Refuse the package; leave all others to the next importer."""
        if name == self._package and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
