"""Instruments: objects that look at the model before and after each pass and add columns to its report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Pass
from mc_opt.passes._size import size_of


class Instrument(Protocol):
    """Something that watches a run."""

    def before(self, step: Pass, model: onnx_ir.Model) -> None:
        """Called with the model that the pass is about to get a clone of."""

    def after(self, step: Pass, old: onnx_ir.Model, new: onnx_ir.Model) -> Mapping[str, Any]:
        """Called after the pass and its verification; the columns go into the pass's report (no times there)."""


class Timing:
    """Seconds of each pass; they go to `timings.json`, never into the report."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._start = 0.0

    def before(self, step: Pass, model: onnx_ir.Model) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, step: Pass, old: onnx_ir.Model, new: onnx_ir.Model) -> Mapping[str, Any]:
        """Stop the clock."""
        self.seconds.append((step.name, time.perf_counter() - self._start))
        return {}

    def add(self, seconds: float) -> None:
        """Count these for the last pass too: a training that it shared with those before it."""
        name, own = self.seconds[-1]
        self.seconds[-1] = (name, own + seconds)


class Bytes:
    """Parameters, stored bytes and nodes before and after."""

    def before(self, step: Pass, model: onnx_ir.Model) -> None:
        """Nothing: `after` sees both models."""

    def after(self, step: Pass, old: onnx_ir.Model, new: onnx_ir.Model) -> Mapping[str, Any]:
        """Measure both models."""
        a, b = size_of(old), size_of(new)
        return {
            "parameters_before": a.parameters,
            "parameters_after": b.parameters,
            "weight_bytes_before": a.weight_bytes,
            "weight_bytes_after": b.weight_bytes,
            "nodes_before": a.nodes,
            "nodes_after": b.nodes,
        }


class Dump:
    """The model as text after each pass: `000_input.txt`, `001_fold-constants.txt`, ..."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def before(self, step: Pass, model: onnx_ir.Model) -> None:
        """Write the model as it came in, before the first pass."""
        if not self._count:
            self.write("input", model)

    def after(self, step: Pass, old: onnx_ir.Model, new: onnx_ir.Model) -> Mapping[str, Any]:
        """Write what the pass made."""
        self.write(step.name, new)
        return {}

    def write(self, name: str, model: onnx_ir.Model) -> None:
        """Write one text with the next number."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ir.write_text(self._folder / f"{self._count:03d}_{name}.txt", ir.to_text(model))
        self._count += 1
