"""The term of a training loss that compares with labels, and the share of rows that are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from mc_opt import ir
from mc_opt.passes import _train_measures as measures
from mc_opt.passes._train_graph import Reading, may_equal, reading, sizes
from mc_opt.passes._train_terms import Batch, Bound, Task, Term, Value, mask_input

Kind = Literal["cross-entropy", "mse", "ctc", "next-token"]


@dataclass(frozen=True)
class Labels(Term):
    """The output is to be as the labels of the data say.

    Where the output is a softmax already, or the logarithm of one, it is not taken twice. Negative classes are padding
    and do not count.

    Options:
        weight: of this term in the sum.
        kind: cross-entropy (a class a sample, or a class a position), mse, ctc (the classes of a sequence, padded at
            the end with -1), next-token (each token's scores against the token after it; needs no labels); auto is
            cross-entropy for whole numbers, mse for others.
        output: the output to compare; without it the first that holds scores of classes, or else the first.
        input: of next-token: the input that holds the tokens.
        mask: of next-token: the input [n, s] that is 0 at padding; auto takes the only input with mask (and without
            pad) in its name, none has none.
        layout: of ctc: ntc for scores [n, t, c], tnc for [t, n, c].
        blank: of ctc: the class of no symbol.
    """

    kind: Literal["auto", "cross-entropy", "mse", "ctc", "next-token"] = "auto"
    output: str = ""
    input: str = ""
    mask: str = "auto"
    layout: Literal["ntc", "tnc"] = "ntc"
    blank: int = 0

    @property
    def needs_labels(self) -> bool:
        """Whether the data must have labels."""
        return self.kind != "next-token"

    def bind(self, task: Task) -> Bound:
        """Choose the output and the kind."""
        output = main_output(task, self.output)
        read = reading(output)
        kind = self.kind if self.kind != "auto" else _kind(task.label, output, read)
        match kind:
            case "cross-entropy":
                _check_classes(task.label)
                return _of_classes(_cross_entropy(output, read), output, class_axis(output, read))
            case "mse":
                return Bound(_square_error(str(output.name)))
            case "ctc":
                _check_rank(output, 3, "ctc")
                _check_classes(task.label)
                return _of_classes(self._ctc(str(output.name), read), output, 2)
            case "next-token":
                return Bound(self._next_token(task, output, read))

    def _ctc(self, name: str, read: Reading) -> Value:
        samples, layout = (0 if self.layout == "ntc" else 1), self.layout

        def value(batch: Batch) -> Tensor:
            x, label = batch.student[name], batch.labels().long()
            if label.ndim != 2 or label.shape[0] != x.shape[samples]:
                raise ir.DataError(
                    f"label has shape {list(label.shape)}, expected [{x.shape[samples]}, length] for the output "
                    f"{name!r}, {list(x.shape)} in the layout {layout}; pad labels with -1"
                )
            _check_range(label, x.shape[2], name)
            return measures.ctc(measures.log_scores(x, read.meaning, 2), label, layout, self.blank)

        return value

    def _next_token(self, task: Task, output: onnx_ir.Value, read: Reading) -> Value:
        _check_rank(output, 3, "next-token")
        tokens, name = _token_input(task.model, output, self.input), str(output.name)
        mask = mask_input(task.model, self.mask)

        def value(batch: Batch) -> Tensor:
            x, ids = batch.student[name], batch.inputs[tokens]
            if x.shape[:2] != ids.shape:
                raise ir.DataError(
                    f"output {name!r} has shape {list(x.shape)}, expected {list(ids.shape)} first, "
                    f"as the tokens {tokens!r} have; name others by labels{{kind=next-token input=... output=...}}"
                )
            seen = batch.inputs[mask] if mask else None
            seen = seen if seen is not None and seen.shape == ids.shape else None
            return measures.next_token(measures.log_scores(x, read.meaning, 2), ids, seen)

        return value


def _kind(label: np.ndarray | None, output: onnx_ir.Value, read: Reading) -> Kind:
    whole = label is not None and label.dtype.kind in "biu"
    shape = sizes(output)
    classes = shape is not None and len(shape) > 1 and shape[class_axis(output, read)] not in (0, 1)
    return "cross-entropy" if whole and classes else "mse"


def main_output(task: Task, name: str = "") -> onnx_ir.Value:
    """The output `name`, or the first that holds scores of classes, or else the first.

    Raises:
        OptionError: when there is none of that name, or none at all; known ones are listed.
    """
    known = task.outputs()
    if name and name not in known:
        raise ir.OptionError(f"labels: {ir.unknown('output', name, known)}")
    scores = (v for v in known.values() if reading(v).meaning != "values")
    return known[name] if name else next(scores, next(iter(known.values())))


def class_axis(output: onnx_ir.Value, read: Reading) -> int:
    """The axis of an output that counts the classes."""
    return read.axis % max(len(sizes(output) or (0,)), 1)


def _of_classes(value: Value, output: onnx_ir.Value, axis: int) -> Bound:
    shape = sizes(output)
    return Bound(value, classes=shape[axis] if shape is not None else None, output=str(output.name))


def _check_classes(label: np.ndarray | None) -> None:
    if label is None or label.dtype.kind not in "biu":
        kind = "no label" if label is None else f"type {label.dtype}"
        raise ir.DataError(f"label: {kind}, expected whole numbers that name classes; for numbers use kind=mse")


def _check_range(label: Tensor, classes: int, name: str) -> None:
    if label.numel() and int(label.max()) >= classes:
        raise ir.DataError(f"label: {int(label.max())}, expected a class below {classes}, as the output {name!r} has")


def _check_rank(output: onnx_ir.Value, rank: int, kind: str) -> None:
    shape = sizes(output)
    if shape is not None and len(shape) != rank:
        raise ir.OptionError(
            f"labels: kind={kind} needs an output of rank {rank}, and {output.name!r} is {ir.type_text(output)}; "
            "name another by output="
        )


def _token_input(model: onnx_ir.Model, output: onnx_ir.Value, name: str) -> str:
    """The input of whole numbers [n, s] that holds the tokens."""
    shape = sizes(output)
    whole = {
        str(v.name): v
        for v in model.graph.inputs
        if v.dtype is not None and v.dtype.is_integer() and may_equal(sizes(v), shape[:2] if shape else None)
    }
    if name:
        if name not in whole:
            raise ir.OptionError(f"labels: {ir.unknown('input of whole numbers', name, whole)}")
        return name
    likely = [n for n in whole if "mask" not in n.lower()]
    if len(likely) > 1:
        likely = [n for n in likely if n == "input_ids"]
    if len(likely) != 1:
        raise ir.OptionError(
            f"labels: kind=next-token finds no single input of tokens among {', '.join(whole) or 'none'}, which have "
            f"the first two sizes of {output.name!r}; name it by input="
        )
    return likely[0]


def as_classes(label: Tensor, scores: Tensor, axis: int, name: str) -> Tensor:
    """The labels in the shape of the scores without their class axis.

    Raises:
        DataError: when they are not one a row.
    """
    shape = [d for a, d in enumerate(scores.shape) if a != axis % scores.ndim]
    wanted = torch.Size(shape)
    if label.numel() != wanted.numel():
        raise ir.DataError(
            f"label has shape {list(label.shape)}, expected {shape}: one class a row of the output {name!r}, "
            f"{list(scores.shape)}; name another by labels{{output=...}}, or train by labels{{kind=ctc}}"
        )
    return label.reshape(wanted).long()


def _cross_entropy(output: onnx_ir.Value, read: Reading) -> Value:
    name, axis = str(output.name), class_axis(output, read)

    def value(batch: Batch) -> Tensor:
        x = batch.student[name]
        label = as_classes(batch.labels(), x, axis, name)
        _check_range(label, x.shape[axis], name)
        return measures.cross_entropy(measures.log_scores(x, read.meaning, axis).movedim(axis, 1), label)

    return value


def _square_error(name: str) -> Value:
    def value(batch: Batch) -> Tensor:
        x, label = batch.student[name], batch.labels()
        if label.numel() != x.numel():
            raise ir.DataError(
                f"label has shape {list(label.shape)}, expected {list(x.shape)}, as the output {name!r} has"
            )
        return measures.square_error(x, label.reshape(x.shape))

    return value
