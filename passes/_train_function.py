"""The term of a training loss that a user wrote: a function of a Python file, or one that was handed over."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mc_opt import ir
from mc_opt.passes._train_terms import Batch, Bound, Task, Term

Criterion = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor | None], Tensor]


@dataclass(frozen=True)
class Function(Term):
    """A function (student, reference, label) -> tensor of a Python file, which runs with your rights.

    student and reference map the names of the outputs to tensors, label is a tensor or None; the result is one number,
    or one a sample.

    Options:
        weight: of this term in the sum.
        file: the file and the function, as in loss.py:name.
    """

    file: str = ""

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.file.rpartition(":")):
            raise ValueError(f"file={self.file}: expected a file and a function, as in file=loss.py:name")

    def bind(self, task: Task) -> Bound:
        """Run the file and take its function."""
        path, _, name = self.file.rpartition(":")
        return Bound(_guarded(_load(path, name), f"{Path(path).name}:{name}", path))

    @property
    def digest(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(_source(self.file.rpartition(":")[0])).hexdigest()


@dataclass(frozen=True)
class Handed(Term):
    """A function (student, reference, label) -> tensor that the caller handed over."""

    criterion: Criterion | None = None

    needs_reference: ClassVar[bool] = True

    def bind(self, task: Task) -> Bound:
        """Take the function as it is."""
        assert self.criterion is not None
        return Bound(_guarded(self.criterion, title_of(self.criterion), None))


def title_of(criterion: Criterion | None) -> str:
    """A function's name, or that of its type where it has none: the same in every run."""
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def _source(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ir.OptionError(
            f"function: file={path} cannot be read: {error.strerror}; name a Python file, relative to the folder that "
            "mc-opt runs in"
        ) from error


def _load(path: str, name: str) -> Criterion:
    source = _source(path)
    space: dict[str, Any] = {"__name__": "mc_opt_loss", "__file__": path}
    problem = None
    try:
        exec(compile(source, path, "exec"), space)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # any fault of the file is told with its place
        problem = f"function: {_place(error, path)}: {type(error).__name__}: {error}"
    if problem is not None:
        raise ir.OptionError(problem)
    function = space.get(name)
    if not callable(function):
        known = [n for n, value in space.items() if callable(value) and not n.startswith("_")]
        raise ir.OptionError(f"function: {path}: {ir.unknown('function', name, known)}")
    criterion: Criterion = function
    return criterion


def _guarded(criterion: Criterion, title: str, path: str | None) -> Callable[[Batch], Tensor]:
    """The function, its faults told as one line and its result checked."""

    def value(batch: Batch) -> Tensor:
        problem = None
        try:
            result: object = criterion(batch.student, batch.reference or {}, batch.label)
        except (MemoryError, torch.OutOfMemoryError, ir.IRError):
            raise
        except Exception as error:
            result = None
            problem = f"loss function {title}: {_place(error, path)}: {type(error).__name__}: {error}"
        if problem is None and not (isinstance(result, Tensor) and result.is_floating_point() and result.ndim < 2):
            shape = f"of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            problem = (
                f"loss function {title}: it gave a {shape}, expected a float tensor of one number, or one a sample"
            )
        if problem is not None:
            raise ir.DataError(problem)
        assert isinstance(result, Tensor)
        return result.float()

    return value


def _place(error: BaseException, path: str | None) -> str:
    """The last line that was running in the file (anywhere without one), as file:line."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if path in (None, f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(path)
