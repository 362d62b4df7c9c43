"""A pass for tests: multiplies weights by a factor, or does harm on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import Context, Pass


@dataclass(frozen=True)
class Toy(Pass):
    """Multiply weights by ratio."""

    family: ClassVar[str] = "test"
    harm: ClassVar[Callable[[onnx_ir.Model], None] | None] = None

    bits: int = 4
    ratio: float = 0.5
    mode: Literal["fast", "good"] = "fast"
    deep: bool = False
    script: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: expected 1 to 8")

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Multiply every weight that is taken."""
        count = 0
        for site in ir.weight_sites(model):
            if not isinstance(site, ir.WeightSite):
                ctx.skip(*site)
                continue
            if declined := self.declines(site.layer):
                ctx.skip(site.layer, declined)
                continue
            ratio = self.at(site.layer).ratio
            array = (ctx.weight(site.value) * ratio).astype(np.float32)
            site.value.const_value = ctx.keep(array, str(site.value.name))
            ctx.note(site.layer, f"times {ratio}")
            count += 1
        if self.harm is not None:
            type(self).harm(model)
            count += 1
        return count


def but(harm: Callable[[onnx_ir.Model], None] | None = None, **attributes: object) -> Toy:
    """A toy that takes no layer and does `harm` to the model, with other class attributes."""
    kind = type("Toy", (Toy,), {"harm": harm and staticmethod(harm), "__module__": Toy.__module__, **attributes})
    return kind(layers=())
