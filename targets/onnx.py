"""The target `onnx`: the model file itself, which stock ONNX Runtime runs; nothing else is built."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mc_opt.targets._base import Price, Target


@dataclasses.dataclass(frozen=True)
class Onnx(Target):
    """Write model.onnx only, for ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    makes_artefact: ClassVar[bool] = False
    # ONNX Runtime decodes constants when it loads: a lookup costs nothing at run time, a product what it did.
    price: ClassVar[Price] = Price(mul=0.0125, add=0.0, shift=0.0125, xnor=0.0125, lookup=0.0, bytes=0.06)
