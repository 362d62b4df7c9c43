"""Compute now what does not depend on the input: constants, static shapes, If with a known condition; exact.

    f(c₁, …, cₙ) ↦ c,   Shape(x) ↦ c where x is static,   If(true, a, b) ↦ a,   Identity(x) ↦ x

Then everything goes that nothing uses. BatchNormalization and our decode ops stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir

from mc_opt.passes._base import Context, Pass
from mc_opt.passes._fold import Folding


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold what is constant, and remove what nothing uses.

    limit: MiB that one fold may read and make; a larger one is left alone, with the reason.
    """

    family: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    limit: int = 64

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Fold until nothing changes."""
        return Folding(model, ctx, self.limit << 20, self.declines).run()
