"""The predicted time of a layer, dense and factored, on the target that the model is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mc_opt import ir, targets
from mc_opt.passes._factor import Shape
from mc_opt.passes._plan_form import Form


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
    return factored_time(place, [shape], 0)


def factored_time(place: Place, shapes: Sequence[Shape], ranks: int) -> float:
    """Nanoseconds of a chain of factors."""
    time: float = targets.predicted_time(
        shapes,
        ranks,
        outputs=place.outputs,
        inputs=place.inputs,
        group=place.group,
        itemsize=place.itemsize,
        price=place.price,
    )
    return time


def stage_loads(place: Place, form: Form) -> tuple[float, ...]:
    """Multiplications of each factor's stage at rank one."""
    count = len(form.carriers)
    shapes = form.shapes([1] * count)
    loads: tuple[float, ...] = ir.stage_multiplications(
        shapes, count, outputs=place.outputs, inputs=place.inputs, group=place.group
    )
    return loads


def most_multiplications(place: Place, form: Form, limit: float) -> float:
    """The multiplications that a time leaves room for at most: with full vectors and nothing handed on."""
    return max(0.0, limit - place.price.call * len(form.blocks)) / (place.price.mul + place.price.add)
