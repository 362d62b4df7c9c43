"""The predicted time of a layer, dense and factored, on the target that the model is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mc_opt import ir, targets
from mc_opt.passes._factor import Shape

_CALL = 400.0  # nanoseconds of a kernel beside its work
_TRAFFIC = 0.02  # nanoseconds to write and read back a byte of what a stage hands to the next


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        outputs: output positions: batch x output pixels; of a matrix product its rows.
        inputs: input positions.
        group: groups of a convolution.
        itemsize: bytes of an element.
        price: of the target.
    """

    outputs: int
    inputs: int
    group: int
    itemsize: int
    price: targets.Price


def dense_time(place: Place, shape: Shape) -> float:
    """Nanoseconds of the layer as it is."""
    work = ir.dense_work(shape, outputs=place.outputs, itemsize=place.itemsize)
    return targets.cost(work, place.price) + _CALL


def factored_time(place: Place, shapes: Sequence[Shape], ranks: int) -> float:
    """Nanoseconds of a chain of factors."""
    work = factored_work(place, shapes, ranks)
    return targets.cost(work, place.price) + _CALL * len(shapes)


def factored_work(place: Place, shapes: Sequence[Shape], ranks: int) -> ir.Work:
    """The work of a chain of factors."""
    work: ir.Work = ir.factored_work(
        shapes, ranks, outputs=place.outputs, inputs=place.inputs, group=place.group, itemsize=place.itemsize
    )
    return work
