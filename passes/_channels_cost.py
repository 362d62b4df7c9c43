"""What a model costs as a function of the channels that stay: parameters, multiply-adds, or time on a target.

    cost(m) = Σ_t c_t · Π_a (n_a + Σ_u k_au · m_u)

A term t is a constant or the product of a node; its axes a hold n_a positions that stay and k_au of unit u, of which
the share m_u stays. Removing outputs of one layer and inputs of the next multiplies, which the products say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir

from mc_opt import targets
from mc_opt.passes._channels import STAYS, Channels
from mc_opt.passes._channels_axes import dims_of, integer

Budget = Literal["count", "params", "macs", "time"]

_Axes = list[tuple[onnx_ir.Value, int]]


@dataclass(frozen=True)
class Cost:
    """The terms of a cost.

    Attributes:
        coefficients: by term.
        axes: by term, the numbers of its axes.
        fixed: by axis, the positions that always stay.
        counts: by axis, units and how many positions each has.
    """

    coefficients: np.ndarray
    axes: tuple[tuple[int, ...], ...]
    fixed: np.ndarray
    counts: tuple[tuple[np.ndarray, np.ndarray], ...]

    def of(self, kept: Any) -> Any:
        """The cost when the share kept[u] of unit u stays; kept: [count], an array or a tensor, whose kind it has."""
        lengths = [
            fixed + (kept[units] * _like(kept, counts)).sum()
            for fixed, (units, counts) in zip(self.fixed.tolist(), self.counts, strict=True)
        ]
        total: Any = 0.0
        for coefficient, axes in zip(self.coefficients.tolist(), self.axes, strict=True):
            total = total + coefficient * math.prod((lengths[a] for a in axes), start=1.0)
        return total


def _like(kept: Any, counts: np.ndarray) -> Any:
    return counts if isinstance(kept, np.ndarray) else kept.new_tensor(counts)


def cost_of(model: onnx_ir.Model, channels: Channels, budget: Budget, price: targets.Price) -> Cost:
    """The terms of one cost of a model.

    The count is that of the units. Parameters are the elements of all floating-point constants. Multiply-adds are
    those of convolutions, products and cells; open sizes count 1. Time is that of these layers by
    `targets.predicted_time`, as a time for each of a layer's multiply-adds, which then scale; what stands between the
    layers is not counted.
    """
    if budget == "count":
        return linear([(1.0, np.arange(channels.count))])
    made = _Terms(channels)
    if budget == "params":
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None and value.const_value.dtype.is_floating_point():
                    made.add(1.0, [(value, k) for k in range(len(dims_of(value)))])
    else:
        for node in model.graph:
            for weight, axes in _products(node):
                made.add(_nanoseconds(node, weight, price) if budget == "time" else 1.0, axes)
    return made.result()


def linear(prices: Iterable[tuple[float, np.ndarray]], rest: float = 0.0) -> Cost:
    """A sum over units: each price is that of every one of its units; the rest stays."""
    found = list(prices)
    counts = tuple((units, np.ones(len(units))) for _, units in found)
    coefficients = np.array([rest, *(price for price, _ in found)])
    return Cost(coefficients, ((), *((k,) for k in range(len(found)))), np.zeros(len(found)), counts)


def work_of(node: onnx_ir.Node, budget: Literal["macs", "time"], price: targets.Price) -> float:
    """The multiply-adds of a node, or their nanoseconds."""
    total = 0.0
    for weight, axes in _products(node):
        sizes = (dims_of(value)[axis] for value, axis in axes)
        count = math.prod(size if isinstance(size, int) else 1 for size in sizes)
        total += count * (_nanoseconds(node, weight, price) if budget == "time" else 1.0)
    return total


class _Terms:
    """Terms in the making; equal axes are counted once."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._numbers: dict[bytes, int] = {}
        self._coefficients: list[float] = []
        self._terms: list[tuple[int, ...]] = []
        self._fixed: list[int] = []
        self._counts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, coefficient: float, axes: _Axes) -> None:
        found: list[int] = []
        for value, axis in axes:
            dim = dims_of(value)[axis]
            units = self._channels.units.get(value, (None,) * (axis + 1))[axis]
            if units is None:
                coefficient *= dim if isinstance(dim, int) else 1
            else:
                found.append(self._axis(units))
        self._coefficients.append(coefficient)
        self._terms.append(tuple(found))

    def _axis(self, units: np.ndarray) -> int:
        number = self._numbers.setdefault(units.tobytes(), len(self._fixed))
        if number == len(self._fixed):
            self._counts.append(np.unique(units[units != STAYS], return_counts=True))
            self._fixed.append(int((units == STAYS).sum()))
        return number

    def result(self) -> Cost:
        return Cost(np.array(self._coefficients), tuple(self._terms), np.array(self._fixed), tuple(self._counts))


def _products(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, _Axes]]:
    """The weights of a node (or what stands for one), each with the axes whose sizes multiply to its multiply-adds."""
    if node.domain not in ("", "ai.onnx"):
        return
    match node.op_type:
        case "Conv":
            w = _input(node, 1)
            yield w, [*_all(node.outputs[0]), *_all(w)[1:]]
        case "ConvTranspose":
            w, x = _input(node, 1), _input(node, 0)
            yield w, [*_all(x), *_all(w)[1:]]
        case "MatMul":
            a = _input(node, 0)
            yield _input(node, 1), [*_all(node.outputs[0]), (a, len(dims_of(a)) - 1)]
        case "Gemm":
            a = _input(node, 0)
            yield _input(node, 1), [*_all(node.outputs[0]), (a, 0 if integer(node, "transA") else 1)]
        case "LSTM" | "GRU" | "RNN":
            x = _input(node, 0)
            for w in (_input(node, 1), _input(node, 2)):
                yield w, [*_all(x)[:2], *_all(w)]


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _all(value: onnx_ir.Value) -> _Axes:
    return [(value, k) for k in range(len(dims_of(value)))]


def _nanoseconds(node: onnx_ir.Node, w: onnx_ir.Value, price: targets.Price) -> float:
    """The time of one multiply-add of a layer."""
    dims = [d if isinstance(d, int) else 1 for d in dims_of(w)]
    whole = [d if isinstance(d, int) else 1 for d in dims_of(node.outputs[0])]
    match node.op_type:
        case "Conv" | "ConvTranspose":
            shape, outputs = dims, whole[0] * math.prod(whole[2:])
        case "MatMul" | "Gemm":
            inner = math.prod(dims) // max(whole[-1], 1)
            shape, outputs = [whole[-1], max(inner, 1)], math.prod(whole[:-1])
        case _:
            x = [d if isinstance(d, int) else 1 for d in dims_of(_input(node, 0))]
            shape, outputs = dims[-2:], x[0] * x[1]
    group = integer(node, "group", 1)
    nanoseconds = targets.predicted_time([shape], outputs=outputs, group=group, price=price)
    return nanoseconds / max(math.prod(shape) * outputs, 1)
