"""What training minimises: a weighted sum of terms, read from text and bound to a model, and the figure to judge by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from mc_opt import ir
from mc_opt.passes import _train_measures as measures
from mc_opt.passes._train_function import Criterion, Function, Handed, title_of
from mc_opt.passes._train_graph import reading, sizes
from mc_opt.passes._train_label_check import Largest
from mc_opt.passes._train_labels import Labels, as_classes, class_axis, main_output
from mc_opt.passes._train_terms import Batch, Bound, Layers, Output, Task, Term, mask_input

TERMS: dict[str, type[Term]] = {"output": Output, "layers": Layers, "labels": Labels, "function": Function}

Metric = Literal["accuracy", "agreement", "sqnr_db"]

_LIMIT_DB = 300.0  # of an SQNR without noise: a report holds no infinity


@dataclass(frozen=True)
class Figure:
    """Sums from which a metric follows, so that those of several batches or processes can be added.

    Attributes:
        total: rows that are right, or that agree; for sqnr_db Σ reference².
        count: rows; for sqnr_db Σ (reference − student)².
    """

    total: Tensor
    count: Tensor

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms; `bind` makes it fit a model."""

    terms: tuple[Term, ...] = (Output(),)

    @classmethod
    def parse(cls, text: str, *, allow_scripts: bool = False) -> Loss:
        """Read terms as in `output,layers{weight=0.5 values=*scores*},labels{kind=ctc}`.

        Raises:
            OptionError: for malformed text, an unknown term or option, a value that does not fit, or a Python file
                where none is allowed.
        """
        specs = ir.parse_specs(text)
        if not specs:
            raise ir.OptionError(f"the loss is empty; name terms of {', '.join(TERMS)}")
        for spec in specs:
            if spec.name not in TERMS:
                raise ir.OptionError(f"loss: {ir.unknown('term', spec.name, TERMS)}")
            if TERMS[spec.name] is Function and not allow_scripts:
                raise ir.OptionError(
                    f"loss: {spec.options.get('file', 'function')} is Python code that would run with your rights; "
                    "read it, then allow it by --allow-scripts"
                )
        return cls(tuple(ir.make(TERMS[spec.name], spec) for spec in specs))

    @classmethod
    def of(cls, loss: str | Criterion, *, allow_scripts: bool = False) -> Loss:
        """The loss of a text, or of a function (student, reference, label) -> tensor."""
        if isinstance(loss, str):
            return cls.parse(loss, allow_scripts=allow_scripts)
        return cls((Handed(criterion=loss),))

    def __str__(self) -> str:
        """The text that `parse` reads back; a function that was handed over is named only."""
        return ",".join(_text(term) for term in self.terms)

    @property
    def fingerprint(self) -> str:
        """The text, and the content of the files whose functions it runs."""
        return " ".join([str(self), *(term.digest for term in self.terms if isinstance(term, Function))])

    @property
    def needs_labels(self) -> bool:
        """Whether a term compares with labels."""
        return any(term.needs_labels for term in self.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares with the original model."""
        return any(term.needs_reference for term in self.terms)

    def taps(self, model: onnx_ir.Model, reference: onnx_ir.Model) -> tuple[str, ...]:
        """The inner values that terms compare, by name; both models have them in the same shape."""
        task = Task(model, reference, None)
        layers = (term for term in self.terms if isinstance(term, Layers))
        return tuple(dict.fromkeys(name for term in layers for name in term.taps(task)))

    def bind(self, model: onnx_ir.Model, reference: onnx_ir.Model | None, label: np.ndarray | None) -> BoundLoss:
        """Decide by the graphs what each term compares.

        Args:
            model: the model to train, with its training forms.
            reference: the model that it came from.
            label: that of one sample, for its type; None when the data has no labels.

        Raises:
            DataError: labels are missing or do not fit, or an output has another shape than the original's.
            OptionError: no output, value or input of the name that a term asks for.
        """
        if self.needs_labels and label is None:
            raise ir.DataError(
                f"the loss {self} needs labels and the data has none; add an array 'label', or train by loss output, "
                "which needs none"
            )
        if self.needs_reference and reference is None:
            raise ir.OptionError(f"the loss {self} compares with the original model, and there is none")
        task = Task(model, reference, label)
        names = _titles(self.terms)
        bound = {name: term.bind(task) for name, term in zip(names, self.terms, strict=True)}
        weights = {name: term.weight for name, term in zip(names, self.terms, strict=True)}
        named = next((term.output for term in self.terms if isinstance(term, Labels) and term.output), "")
        output = main_output(task, named)
        metric = _metric(self.terms, task, output)
        return BoundLoss(
            bound,
            weights,
            self.needs_reference,
            metric,
            metric == "accuracy" or all(isinstance(term, Output | Layers) for term in self.terms),
            output=str(output.name),
            axis=class_axis(output, reading(output)),
            mask=mask_input(model, "auto"),
        )


@dataclass(frozen=True)
class BoundLoss:
    """A loss that knows its model: called with each batch.

    Attributes:
        terms: by name, in order.
        weights: of the terms.
        needs_reference: whether the loss needs the original's outputs and taps.
        metric: what `figure` measures; larger is better. accuracy: the share of rows whose largest score is the
            label's; agreement: the share whose largest is the original's; sqnr_db: of the output.
        metric_is_the_aim: whether a better metric is a better epoch. Being like the original is no aim where labels of
            sequences or of numbers, or a function, say what the outputs should be: there a lower loss is better.
        output: the output that is measured.
        axis: its axis that counts the classes.
        mask: the input that is 0 at tokens that do not count.
    """

    terms: Mapping[str, Bound]
    weights: Mapping[str, float]
    needs_reference: bool
    metric: Metric
    metric_is_the_aim: bool
    output: str
    axis: int
    mask: str | None

    @property
    def taps(self) -> tuple[str, ...]:
        """The inner values that the loss needs of both models."""
        return tuple(dict.fromkeys(name for term in self.terms.values() for name in term.taps))

    def hold_classes(self, largest: Largest | None) -> None:
        """Refuse data with a class that no output has.

        Raises:
            DataError: naming the sample.
        """
        for term in self.terms.values():
            if largest is not None and term.classes is not None and largest.value >= term.classes:
                raise ir.DataError(
                    f"{largest.where}: label {largest.value}, expected a class below {term.classes}, as the output "
                    f"{term.output!r} has; correct the labels, or name another output by labels{{output=...}}"
                )

    @property
    def figure_needs_reference(self) -> bool:
        """Whether `figure` needs the original's outputs."""
        return self.metric != "accuracy"

    def __call__(
        self,
        student: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
        label: Tensor | None,
        inputs: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The value of each term, before its weight: a mean over the batch, in fp32.

        Args:
            student: outputs and taps of the trained model by ONNX name.
            reference: the same of the original.
            label: [n, ...].
            inputs: of the model, by ONNX name.

        Raises:
            DataError: something is missing or has a shape that does not fit.
        """
        batch = Batch(student, reference, label, inputs)
        with _full_precision(student):
            return {name: term.value(batch).float().mean() for name, term in self.terms.items()}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum()

    def figure(
        self,
        student: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
        label: Tensor | None,
        inputs: Mapping[str, Tensor],
    ) -> Figure:
        """The sums of a batch for `metric`; padded tokens and labels do not count."""
        batch = Batch({name: value.detach() for name, value in student.items()}, reference, label, inputs)
        if self.metric == "accuracy":
            scores = batch.student[self.output]
            classes = as_classes(batch.labels(), scores, self.axis, self.output)
            return _share(scores.argmax(self.axis) == classes, classes >= 0)
        ours, theirs = batch.pair(self.output)
        kept = measures.tokens_kept(inputs[self.mask] if self.mask else None, ours)
        keep = torch.ones_like(ours, dtype=torch.bool) if kept is None else kept.expand_as(ours)
        if self.metric == "agreement":
            return _share(ours.argmax(self.axis) == theirs.argmax(self.axis), keep.select(self.axis, 0))
        signal = torch.where(keep, theirs.double(), 0)
        noise = torch.where(keep, ours.double(), 0) - signal
        return Figure(signal.square().sum(), noise.square().sum())

    def score(self, figure: Figure) -> float:
        """The metric that follows from sums."""
        total, count = float(figure.total), float(figure.count)
        if self.metric != "sqnr_db":
            return total / count if count else 0.0
        if not (math.isfinite(total) and math.isfinite(count)):
            return -_LIMIT_DB
        if not (total and count):
            return _LIMIT_DB if not count else -_LIMIT_DB
        return min(max(10 * math.log10(total / count), -_LIMIT_DB), _LIMIT_DB)


def _share(right: Tensor, keep: Tensor) -> Figure:
    return Figure((right & keep).sum().double(), keep.sum().double())


def _metric(terms: tuple[Term, ...], task: Task, output: onnx_ir.Value) -> Metric:
    """accuracy where a label is one class a row, agreement where there are scores, else the SQNR."""
    read, shape = reading(output), sizes(output)
    sequences = any(isinstance(term, Labels) and term.kind in ("ctc", "next-token") for term in terms)
    if task.label is not None and task.label.dtype.kind in "biu" and shape and not sequences:
        axis = class_axis(output, read)
        # The first axis counts samples, and a label is one sample's.
        rows = [size for a, size in enumerate(shape) if a not in (0, axis)]
        fits = None in rows or math.prod(r for r in rows if r is not None) == task.label.size
        if axis > 0 and shape[axis] not in (0, 1) and fits:
            return "accuracy"
    return "sqnr_db" if read.meaning == "values" else "agreement"


def _titles(terms: tuple[Term, ...]) -> list[str]:
    """A name for each term: its own, with a number where it comes again."""
    names: list[str] = []
    for term in terms:
        name = _name(term)
        again = sum(_name(t) == name for t in terms[: len(names)])
        names.append(f"{name}.{again + 1}" if again else name)
    return names


def _name(term: Term) -> str:
    return next((name for name, kind in TERMS.items() if kind is type(term)), "function")


def _text(term: Term) -> str:
    if isinstance(term, Handed):
        return f"function {title_of(term.criterion)}"
    return str(ir.to_spec(_name(term), term))


@contextlib.contextmanager
def _full_precision(values: Mapping[str, Tensor]) -> Iterator[None]:
    """No autocast: losses are sums of many small numbers."""
    device = next((value.device.type for value in values.values()), "cpu")
    with torch.autocast(device, enabled=False):
        yield
