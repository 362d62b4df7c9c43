"""Element types of ONNX and torch, and integer types that torch can store but hardly compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import torch

from mc_opt.ir.errors import IRError

TORCH_TYPES: dict[onnx_ir.DataType, torch.dtype] = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.DOUBLE: torch.float64,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
    onnx_ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx_ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    onnx_ir.DataType.BOOL: torch.bool,
    onnx_ir.DataType.INT8: torch.int8,
    onnx_ir.DataType.INT16: torch.int16,
    onnx_ir.DataType.INT32: torch.int32,
    onnx_ir.DataType.INT64: torch.int64,
    onnx_ir.DataType.UINT8: torch.uint8,
    onnx_ir.DataType.UINT16: torch.uint16,
    onnx_ir.DataType.UINT32: torch.uint32,
    onnx_ir.DataType.UINT64: torch.uint64,
    # torch has no narrower integers: one value a byte.
    onnx_ir.DataType.UINT4: torch.uint8,
    onnx_ir.DataType.UINT2: torch.uint8,
    onnx_ir.DataType.INT4: torch.int8,
    onnx_ir.DataType.INT2: torch.int8,
}

# numpy knows these only through ml_dtypes, torch only by their bits.
_BITS = {
    torch.bfloat16: (np.int16, torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (np.uint8, torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (np.uint8, torch.uint8, ml_dtypes.float8_e5m2),
}

_STORED_ONLY = (torch.uint16, torch.uint32, torch.uint64)


def torch_type(code: int) -> torch.dtype:
    """The torch type of an ONNX element type code.

    Raises:
        IRError: when torch has no such type.
    """
    data_type = onnx_ir.DataType(code)
    if data_type not in TORCH_TYPES:
        known = ", ".join(t.name for t in TORCH_TYPES)
        raise IRError(f"element type {data_type.name}: torch has none, expected one of {known}; cast it in the model")
    return TORCH_TYPES[data_type]


def to_torch(tensor: onnx_ir.TensorProtocol) -> torch.Tensor:
    """A torch copy of an ONNX tensor."""
    return from_array(np.array(tensor.numpy()), torch_type(tensor.dtype))


def from_array(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The torch tensor of the type that belongs to the array's, on the same memory where both have the type."""
    if dtype in _BITS:
        return torch.from_numpy(array.view(_BITS[dtype][0])).view(dtype)
    if array.dtype.kind == "V":  # ml_dtypes' 2 and 4 bit integers
        array = array.astype(np.int8 if dtype is torch.int8 else np.uint8)
    return torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A numpy copy of a torch tensor."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _BITS:
        _, bits, numpy_type = _BITS[tensor.dtype]
        return np.array(tensor.view(bits).numpy()).view(numpy_type)
    return np.array(tensor.numpy())


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x`, as int64 when it is of an unsigned type that torch only stores (uint16, uint32, uint64)."""
    return x.to(torch.int64) if x.dtype in _STORED_ONLY else x


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` computed in int64 when its first input is uint16, uint32 or uint64; the result wraps around."""

    # Not functools.wraps: with the name of a torch function torch.fx would print, and run, that function itself.
    def compute(x: Any, *rest: Any, **attributes: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype not in _STORED_ONLY:
            return function(x, *rest, **attributes)
        inputs = [wide(y) if isinstance(y, torch.Tensor) else y for y in rest]
        result = function(wide(x), *inputs, **attributes)
        return result if result.dtype is torch.bool else result.to(x.dtype)

    compute.__name__ = f"widened_{function.__name__}"
    compute.__wrapped__ = function  # type: ignore[attr-defined]  # its signature checks attributes
    return compute


def ints(value: torch.Tensor | list[int] | tuple[int, ...] | None) -> list[int] | None:
    """A list of ints from an input tensor or an attribute; None stays None."""
    if value is None:
        return None
    return [int(v) for v in (value.reshape(-1).tolist() if isinstance(value, torch.Tensor) else value)]
