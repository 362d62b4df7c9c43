"""A store for big new tensors: memory-mapped files, so that anonymous memory stays bounded."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir

from mc_opt.ir import LimitError

SPILL_ABOVE = 1 << 20
"""Tensors of more bytes than this go to a file."""

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Store:
    """Where big tensors of a run live: unnamed files in `folder` (the system's folder for temporary files if None).

    A file is unlinked while it is open: the mapping holds it, so it lives exactly as long as the tensor
    and nothing is left behind, not even by a killed process. `folder` should be on a disk: pages of a
    file in a tmpfs are memory.
    """

    folder: Path | None = None

    def keep(self, array: np.ndarray, name: str) -> onnx_ir.TensorProtocol:
        """A read-only tensor of the values of `array` (any shape): memory-mapped above 1 MiB, else copied.

        Raises:
            LimitError: when the disk is full.
        """
        if array.nbytes <= SPILL_ABOVE:
            small = np.array(array, order="C")
            small.flags.writeable = False
            return onnx_ir.Tensor(small, name=name)
        return onnx_ir.Tensor(self._map(array, name), name=name)

    def _map(self, array: np.ndarray, name: str) -> np.ndarray:
        flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                raw = flat.view(np.uint8)
                for start in range(0, raw.size, _BLOCK):
                    file.write(raw[start : start + _BLOCK].data)
                file.flush()
                mapped = np.memmap(file, dtype=np.uint8, mode="r")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = os.fspath(self.folder or tempfile.gettempdir())
            raise LimitError(
                f"{name}: no space for {array.nbytes} bytes in {where}; free space there or set another TMPDIR"
            ) from error
        # A plain array over the map: numpy would carry the memmap class into every result computed from it.
        plain: np.ndarray = np.asarray(mapped).view(array.dtype).reshape(array.shape)
        return plain
