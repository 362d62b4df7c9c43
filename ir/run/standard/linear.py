"""Matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's attribute name
    transB: int = 0,  # noqa: N803 - ONNX's attribute name
) -> torch.Tensor:
    y = (a.T if transA else a) @ (b.T if transB else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def _einsum(*inputs: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation.replace(" ", ""), *inputs)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": torch.matmul,
}
