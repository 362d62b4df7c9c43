"""The function that runs an artefact of fixed sizes, written for it: a step of Python for each tensor, and no loops.

Behind kernels that have emptied the caches every step of Python waits for memory: looking up an attribute, or calling a
function more, takes as long there as some thousand multiplications. Of a model's names the text has none: they are
values that it refers to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray] | None]


class Slot:
    """Memory of an output: the tensors that main is given of it, and the arrays that callers see."""

    __slots__ = ("arrays", "lent", "tensors")

    def __init__(self, tensors: list[Any], arrays: list[np.ndarray], lent: np.ndarray | None) -> None:
        """Tensors and arrays of the memory; `lent` is the array behind what is handed out, or None if copies are."""
        self.tensors, self.arrays, self.lent = tensors, arrays, lent

    def taken(self, k: int) -> np.ndarray:
        """An output, which a later run does not overwrite."""
        array = self.arrays[k]
        # Views of a view refer to the last array behind them, whose memory is a buffer: that is this one.
        return array.copy() if self.lent is None else self.lent.reshape(array.shape)


_EXAMPLE = Slot([], [], np.empty(1))
# What `getrefcount` says of the array of a slot of which no caller has a view.
UNSEEN = sys.getrefcount(_EXAMPLE.lent)


@dataclass(frozen=True)
class Input:
    """What an input must be, and the place that it is copied to, as an array and as a tensor, if it is copied."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]
    place: tuple[np.ndarray, Any] | None


def function(
    main: Callable[..., Any],
    inputs: Sequence[Input],
    borrow: Callable[[np.ndarray], Any],
    memories: Sequence[Any],
    written: Sequence[tuple[int, int]],
    outputs: Sequence[tuple[str, tuple[int, int]]],
    *,
    behind: Sequence[Any],
) -> Run:
    """A function that gives the outputs for inputs that fit at first sight; None for all others.

    Args:
        main: takes the inputs, the memory of outputs, and what stands behind.
        inputs: in main's order.
        borrow: makes tensors of the inputs that are not copied.
        memories: of outputs, by number; `_runtime.Memory`.
        written: the number of a memory, and which of its tensors, for each argument behind the inputs.
        outputs: names, and the number of a memory and which of its arrays.
        behind: main's last arguments.
    """
    names: dict[str, Any] = {"main": main, "borrow": borrow, "ndarray": np.ndarray}
    names |= {"getrefcount": sys.getrefcount, "unseen": UNSEEN}
    names |= {f"behind{k}": value for k, value in enumerate(behind)}
    lines, tensors = _taking(inputs, names)
    slots = [memory.idle() for memory in memories]
    for k, (memory, slot) in enumerate(zip(memories, slots, strict=True)):
        if slot.lent is None:
            names[f"slot{k}"] = slot
        else:
            names |= {f"first{k}": slot, f"memory{k}": memory}
            lines.append(f"slot{k} = first{k} if getrefcount(first{k}.lent) == unseen else memory{k}.idle()")
    tensors += [f"slot{number}.tensors[{k}]" for number, k in written]
    lines.append(f"main({', '.join([*tensors, *(f'behind{k}' for k in range(len(behind)))])})")
    found = []
    for n, (name, (number, k)) in enumerate(outputs):
        names |= {f"output{n}": name, f"extents{n}": slots[number].arrays[k].shape}
        array = f"arrays[{k}].copy()" if slots[number].lent is None else f"lent.reshape(extents{n})"
        found.append(f"output{n}: slot{number}.{array}")
    lines.append(f"return {{{', '.join(found)}}}")
    text = "\n".join(["def run(inputs):", *(f"    {line}" for line in lines)])
    exec(compile(text, __file__, "exec"), names)
    run: Run = names["run"]
    return run


def _taking(inputs: Sequence[Input], names: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The lines that refuse inputs or copy them, and the expressions of their tensors; `names` gets their values."""
    lines, copies, tensors = [f"if len(inputs) != {len(inputs)}:", "    return None"], [], []
    for k, port in enumerate(inputs):
        names |= {f"name{k}": port.name, f"shape{k}": port.shape, f"dtype{k}": port.dtype}
        lines += [
            f"input{k} = inputs.get(name{k})",
            f"if type(input{k}) is not ndarray or input{k}.shape != shape{k} or input{k}.dtype is not dtype{k}:",
            "    return None",
        ]
        if port.place is None:
            tensors.append(f"borrow(input{k})")
        else:
            names[f"place{k}"], names[f"tensor{k}"] = port.place
            copies.append(f"place{k}[...] = input{k}")
            tensors.append(f"tensor{k}")
    return [*lines, *copies], tensors  # nothing is copied before all inputs are known to fit
