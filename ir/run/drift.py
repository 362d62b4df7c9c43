"""How far two runs are apart: per-output figures, accumulated sample by sample, and the verdict of an exact pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mc_opt.ir.errors import DataError

EXACT_SHARE = 1e-5
"""Share of the output's range by which an exact pass may move it: an fp32 sum in another order moves less."""

NOISE_FACTOR = 3.0
"""An exact pass may also move an output by this many times the model's own noise in ONNX Runtime."""


@dataclasses.dataclass(frozen=True)
class OutputDrift:
    """The difference of one output between a reference and another model, over all samples.

    Attributes:
        name: The output's name.
        elements: Number of compared elements.
        sqnr_db: 10·log10(Σ reference² / Σ (reference − other)²) over finite elements; None when either sum is 0.
        max_abs: max |reference − other| over elements that are finite in both.
        spread: max − min of the reference's finite elements over all samples.
        relative: max_abs / spread; 0 when nothing differs, None when something differs and the spread is 0.
        top1: Share of rows whose largest element stands at the same place; None when the last axis does not look
            like classes (not floating point, or fewer than 2 entries).
        nonfinite_reference: Elements of the reference that are NaN or infinite.
        nonfinite_other: Elements of the other that are NaN or infinite.
        unmatched: Elements that cannot be subtracted and are not the same: one is NaN or infinite and the other
            differs, or text that differs.
    """

    name: str
    elements: int
    sqnr_db: float | None
    max_abs: float
    spread: float
    relative: float | None
    top1: float | None
    nonfinite_reference: int
    nonfinite_other: int
    unmatched: int

    @property
    def equal(self) -> bool:
        """Whether no element differs (NaN equals NaN)."""
        return self.max_abs == 0 and self.unmatched == 0


@dataclasses.dataclass(frozen=True)
class Drift:
    """The difference of all outputs between a reference and another model; `outputs` in the reference's order.

    Attributes:
        samples: How many were compared.
        outputs: The figures of each output.
        accuracy_reference: Share of samples in which the largest entry of the reference's first output is the
            label; None without labels, or when that output does not hold one row of classes.
        accuracy_other: The same of the other model.
    """

    samples: int
    outputs: tuple[OutputDrift, ...]
    accuracy_reference: float | None = None
    accuracy_other: float | None = None

    @property
    def equal(self) -> bool:
        """Whether no element of any output differs."""
        return all(o.equal for o in self.outputs)

    @property
    def sqnr_db(self) -> float | None:
        """The smallest SQNR of the outputs that have one."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)

    @property
    def max_abs(self) -> float:
        """The largest difference of any output."""
        return max((o.max_abs for o in self.outputs), default=0.0)

    @property
    def relative(self) -> float | None:
        """The largest difference over spread; None when an output without spread differs."""
        shares = [o.relative for o in self.outputs]
        return None if None in shares else max((s for s in shares if s is not None), default=0.0)

    @property
    def top1(self) -> float | None:
        """The smallest top-1 agreement of the outputs that have one."""
        return min((o.top1 for o in self.outputs if o.top1 is not None), default=None)

    @property
    def unmatched(self) -> int:
        """Elements of all outputs that are NaN or infinite on one side only."""
        return sum(o.unmatched for o in self.outputs)

    def output(self, name: str) -> OutputDrift:
        """The figures of the output `name`."""
        return next(o for o in self.outputs if o.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; no NaN and no infinity."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class OutputVerdict:
    """Whether one output kept its numbers: ok = max_abs ≤ tolerance and nothing is unmatched.

    Attributes:
        name: The output's name.
        ok: Whether the output stayed within its tolerance.
        max_abs: max |reference − other| over all samples.
        tolerance: max(share × spread, 3 × noise).
        noise: r, the reference's own max difference in ONNX Runtime with graph optimisation off and on.
        spread: max − min of the reference over all samples.
        unmatched: Elements that are NaN or infinite on one side only.
    """

    name: str
    ok: bool
    max_abs: float
    tolerance: float
    noise: float
    spread: float
    unmatched: int

    def __str__(self) -> str:
        text = (
            f"{self.name}: max |a-b| {self.max_abs:.3g}, tolerance {self.tolerance:.3g} "
            f"(range {self.spread:.3g}, r {self.noise:.3g})"
        )
        if self.unmatched:
            text += f", {self.unmatched} elements NaN or infinite on one side only"
        return text


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether every output kept its numbers."""

    ok: bool
    samples: int
    outputs: tuple[OutputVerdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "; ".join(f"{'ok' if o.ok else 'FAILED'} {o}" for o in self.outputs)


def judge(drift: Drift, noise: Drift, *, share: float = EXACT_SHARE) -> Verdict:
    """Hold `drift` to max(share × range, 3 × r), with r from `noise`, output by output."""
    verdicts = []
    for output in drift.outputs:
        r = noise.output(output.name).max_abs
        tolerance = max(share * output.spread, NOISE_FACTOR * r)
        verdicts.append(
            OutputVerdict(
                name=output.name,
                ok=output.max_abs <= tolerance and output.unmatched == 0,
                max_abs=output.max_abs,
                tolerance=tolerance,
                noise=r,
                spread=output.spread,
                unmatched=output.unmatched,
            )
        )
    return Verdict(ok=all(v.ok for v in verdicts), samples=drift.samples, outputs=tuple(verdicts))


class DriftMeter:
    """Accumulates the figures of `Drift` one sample at a time, so that no output is kept."""

    def __init__(self) -> None:
        self._samples = 0
        self._outputs: dict[str, _Sums] = {}
        self._right: tuple[list[bool | None], list[bool | None]] = ([], [])

    def add(
        self, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], label: np.ndarray | None = None
    ) -> None:
        """Take in the outputs of one sample, and its label when there is one.

        Raises:
            DataError: when an output is missing in `other` or has another shape.
        """
        for name, expected in reference.items():
            if name not in other:
                raise DataError(f"output {name!r}: missing in the other model, which has {', '.join(other)}")
            actual = np.asarray(other[name])
            expected = np.asarray(expected)
            if actual.shape != expected.shape:
                raise DataError(f"output {name!r}: shape {actual.shape}, expected {expected.shape} as in the reference")
            self._outputs.setdefault(name, _Sums()).add(expected, actual)
        self._samples += 1
        for outputs, right in zip((reference, other), self._right, strict=True):
            right.append(is_right(outputs, label))

    def result(self) -> Drift:
        """The figures over all samples so far."""
        outputs = tuple(sums.result(name) for name, sums in self._outputs.items())
        return Drift(self._samples, outputs, *(accuracy(right) for right in self._right))


def is_right(outputs: Mapping[str, np.ndarray], label: np.ndarray | None) -> bool | None:
    """Whether the largest entry of the first output is the label; None when there is no label or no row of classes."""
    if label is None or np.size(label) != 1 or np.asarray(label).dtype.kind not in "biu" or not outputs:
        return None
    first = np.asarray(next(iter(outputs.values())))
    if first.size < 2 or first.size != first.shape[-1] or not _is_number(first):
        return None
    return int(first.argmax()) == int(np.reshape(label, ()))


def accuracy(right: Sequence[bool | None]) -> float | None:
    """The share of samples that are right; None when one of them, or all, cannot be judged."""
    judged = [r for r in right if r is not None]
    return sum(judged) / len(judged) if judged and len(judged) == len(right) else None


class _Sums:
    """Running sums of one output."""

    def __init__(self) -> None:
        self.elements = self.rows = self.same_rows = 0
        self.nonfinite_reference = self.nonfinite_other = self.unmatched = 0
        self.signal = self.noise = self.max_abs = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        self.elements += reference.size
        if not _is_number(reference) or not _is_number(other):
            self.unmatched += int((reference != other).sum())
            return
        if reference.ndim and reference.shape[-1] > 1 and reference.size and not _is_whole(reference):
            same = reference.argmax(-1) == other.argmax(-1)
            self.rows += same.size
            self.same_rows += int(same.sum())
        self._add_numbers(reference.astype(np.float64), other.astype(np.float64))

    def _add_numbers(self, a: np.ndarray, b: np.ndarray) -> None:
        finite_a, finite_b = np.isfinite(a), np.isfinite(b)
        both = finite_a & finite_b
        same_nonfinite = ~finite_a & ((a == b) | (np.isnan(a) & np.isnan(b)))
        self.nonfinite_reference += int((~finite_a).sum())
        self.nonfinite_other += int((~finite_b).sum())
        self.unmatched += int((~both & ~same_nonfinite).sum())
        if finite_a.any():
            self.low = min(self.low, float(a[finite_a].min()))
            self.high = max(self.high, float(a[finite_a].max()))
        if both.any():
            difference = a[both] - b[both]
            self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
            self.signal += float(np.square(a[both]).sum())
            self.noise += float(np.square(difference).sum())

    def result(self, name: str) -> OutputDrift:
        spread = self.high - self.low if self.high >= self.low else 0.0
        return OutputDrift(
            name=name,
            elements=self.elements,
            sqnr_db=10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None,
            max_abs=self.max_abs,
            spread=spread,
            relative=0.0 if self.max_abs == 0 else self.max_abs / spread if spread > 0 else None,
            top1=self.same_rows / self.rows if self.rows else None,
            nonfinite_reference=self.nonfinite_reference,
            nonfinite_other=self.nonfinite_other,
            unmatched=self.unmatched,
        )


def _is_whole(array: np.ndarray) -> bool:
    return array.dtype.kind in "biu"


def _is_number(array: np.ndarray) -> bool:
    # ml_dtypes' bfloat16 and float8 have kind "V" but convert to float64.
    return array.dtype.kind in "biufV"
