"""The terms of a training loss: their options, and what each makes of a model when it is bound to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from mc_opt import ir
from mc_opt.passes import _train_measures as measures
from mc_opt.passes._train_graph import (
    Reading,
    attention_scores,
    is_float,
    may_equal,
    reading,
    shared_values,
    sizes,
    telling_values,
)


@dataclass(frozen=True)
class Task:
    """What a loss is bound to: the trained model, the model it came from, and the label of one sample."""

    model: onnx_ir.Model
    reference: onnx_ir.Model | None
    label: np.ndarray | None

    @property
    def original(self) -> onnx_ir.Model:
        """The model whose graph says what outputs mean: the one that no pass has changed, where it is there."""
        return self.model if self.reference is None else self.reference

    def outputs(self) -> dict[str, onnx_ir.Value]:
        """The float outputs of the original by name.

        Raises:
            OptionError: when there are none.
        """
        found = {str(v.name): v for v in self.original.graph.outputs if is_float(v)}
        if not found:
            raise ir.OptionError("the model has no output of floating point, so nothing can be trained by its outputs")
        return found


@dataclass(frozen=True)
class Batch:
    """What a step computed: outputs and taps of both models by name, labels [n, ...], and the inputs by name."""

    student: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] | None
    label: Tensor | None
    inputs: Mapping[str, Tensor]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A value of both models."""
        if self.reference is None or name not in self.reference or name not in self.student:
            raise ir.DataError(f"{name}: the loss compares this value, and one of the two models has not computed it")
        student, reference = self.student[name], self.reference[name].detach()
        if student.shape != reference.shape:
            raise ir.DataError(
                f"{name}: shape {list(student.shape)}, expected {list(reference.shape)} as in the original; "
                "leave it out of the loss"
            )
        return student, reference

    def labels(self) -> Tensor:
        """The labels of the batch."""
        if self.label is None:
            raise ir.DataError("the loss compares with labels, and this batch has none")
        return self.label


Value = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Bound:
    """A term bound to a model: what it gives for a batch, one number a sample, and the inner values that it needs.

    Attributes:
        value: the first.
        taps: the second.
        classes: how many classes labels may name; None where they name none, or that is open.
        output: the output that has these classes.
    """

    value: Value
    taps: tuple[str, ...] = ()
    classes: int | None = None
    output: str = ""


@dataclass(frozen=True)
class Term:
    """A term of the loss: its options, the text of `name{option=value}`."""

    needs_reference: ClassVar[bool] = False

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight}: expected a number from 0 on")

    @property
    def needs_labels(self) -> bool:
        """Whether the data must have labels."""
        return False

    def bind(self, task: Task) -> Bound:
        """Decide by the graph what the term compares."""
        raise TypeError(f"{type(self).__name__} is a term without bind()")


@dataclass(frozen=True)
class Output(Term):
    """Distillation: the outputs are to be those of the original model.

    Options:
        weight: of this term in the sum.
        kind: kl (T²·KL of the softmax at temperature T; Hinton et al., arXiv 1503.02531), mse, relative (mse over
            the mean square of the original's output), or auto: kl for scores of classes, mse for all else. Scores are
            a linear layer's results, at least two a row, without a bounded function after it; give kind=mse for a
            regression or an embedding that ends so.
        temperature: T.
        outputs: globs of output names; the mean over these counts.
        mask: the input [n, s] that is 0 at padded tokens, which then do not count; auto takes the only input with
            mask (and without pad) in its name, none has none.
    """

    kind: Literal["auto", "kl", "mse", "relative"] = "auto"
    temperature: float = 1.0
    outputs: tuple[str, ...] = ("*",)
    mask: str = "auto"

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: expected a number above 0")

    def bind(self, task: Task) -> Bound:
        """Choose a measure for each output."""
        known = task.outputs()
        ours = {v.name: v for v in task.model.graph.outputs}
        names = _chosen("output", "output", self.outputs, tuple(known))
        for name in names:
            if name not in ours or not may_equal(sizes(known[name]), sizes(ours[name])):
                has = ir.type_text(ours[name]) if name in ours else "missing"
                raise ir.DataError(
                    f"output {name!r}: {has}, expected {ir.type_text(known[name])} as in the original; "
                    "choose others by loss output{outputs=...}"
                )
        mask = mask_input(task.model, self.mask)
        return Bound(mean_of([self._value(name, reading(known[name]), mask) for name in names]))

    def _value(self, name: str, read: Reading, mask: str | None) -> Value:
        kind = self.kind if self.kind != "auto" else "mse" if read.meaning == "values" else "kl"

        def value(batch: Batch) -> Tensor:
            student, reference = batch.pair(name)
            keep = measures.tokens_kept(batch.inputs[mask] if mask else None, student)
            if kind != "kl":
                error = measures.square_error if kind == "mse" else measures.relative_error
                return error(student, reference, keep)
            axis, temperature = read.axis, self.temperature
            ours, theirs = (measures.log_scores(x, read.meaning, axis, temperature) for x in (student, reference))
            return temperature**2 * measures.divergence(ours, theirs, axis, keep)

        return value


@dataclass(frozen=True)
class Layers(Term):
    """Intermediate-layer distillation: values inside the model are to be those of the original, matched by name.

    Each value counts by its squared error over the mean square of the original's, so that none outweighs the others
    by its scale (ours; KroneckerBERT, arXiv 2109.06243, sums plain squared errors). Attention scores that a mask
    rules out do not count.

    Options:
        weight: of this term in the sum.
        values: globs of value names. Without any: attention scores before the softmax, what embeddings give, and the
            last normalisation of each block; in models that have no attention and no normalisation, the outputs of
            all layers with weights.
        kind: mse; kl compares attention by the KL of its softmax instead, as KnGPT2 does; auto is mse.
        mask: as of the term output.
    """

    values: tuple[str, ...] = ()
    kind: Literal["auto", "mse", "kl"] = "auto"
    mask: str = "auto"

    needs_reference: ClassVar[bool] = True

    def taps(self, task: Task) -> tuple[str, ...]:
        """The values to compare.

        Raises:
            OptionError: when there are none, or a glob matches none.
        """
        if task.reference is None:
            return ()
        shared = shared_values(task.model, task.reference)
        if self.values:
            return _chosen("layers", "value of both models", self.values, shared)
        among = set(shared)
        found = tuple(name for name in telling_values(task.reference) if name in among)
        if not found:
            raise ir.OptionError(
                "layers: the two models share none of the values that are compared by default; name some by "
                f"values=, as of {', '.join(shared[:10]) or 'none: they share no value'}"
            )
        return found

    def bind(self, task: Task) -> Bound:
        """Find the values."""
        names = self.taps(task)
        attention = attention_scores(task.original)
        mask = mask_input(task.model, self.mask)
        return Bound(mean_of([self._value(name, attention.get(name), mask) for name in names]), names)

    def _value(self, name: str, axis: int | None, mask: str | None) -> Value:
        def value(batch: Batch) -> Tensor:
            student, reference = batch.pair(name)
            tokens = batch.inputs[mask] if mask else None
            if axis is None:
                return measures.relative_error(student, reference, measures.tokens_kept(tokens, student))
            queries = measures.tokens_kept(tokens, student, -2 if axis % student.ndim == student.ndim - 1 else -1)
            if self.kind == "kl":
                ours, theirs = (measures.log_scores(x, "logits", axis) for x in (student, reference))
                return measures.divergence(ours, theirs, axis, queries)
            seen = measures.seen_scores(reference, axis)
            return measures.relative_error(student, reference, seen if queries is None else seen & queries)

        return value


def mean_of(values: Sequence[Value]) -> Value:
    """The mean of several values, which may have different numbers of samples."""
    return lambda batch: torch.stack([value(batch).mean() for value in values]).mean()


def _chosen(term: str, kind: str, globs: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names that match; each glob must match one.

    Raises:
        OptionError: listing known names.
    """
    for glob in globs or ("*",):
        if not any(ir.matches(name, (glob,)) for name in known):
            raise ir.OptionError(f"{term}: {ir.unknown(kind, glob, known)}")
    return tuple(name for name in known if ir.matches(name, globs or ("*",)))


def mask_input(model: onnx_ir.Model, name: str) -> str | None:
    """The name of the input [n, s] that is 0 at padding, for the option `mask`."""
    inputs = tuple(str(v.name) for v in model.graph.inputs)
    if name == "none":
        return None
    if name != "auto":
        if name not in inputs:
            raise ir.OptionError(f"mask={name}: {ir.unknown('input', name, inputs)}, or none, or auto")
        return name
    masks = [
        str(v.name)
        for v in model.graph.inputs
        if "mask" in str(v.name).lower() and "pad" not in str(v.name).lower() and len(sizes(v) or ()) == 2
    ]
    return masks[0] if len(masks) == 1 else None
