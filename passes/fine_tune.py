"""Train a model as it stands: after passes that are not trained themselves, or on data of its own.

Which of its weights, and by which loss, the options of the training say; stored forms such as Lookup stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._trainable import TrainablePass


@dataclass(frozen=True)
class FineTune(TrainablePass):
    """Train the floating-point weights, biases and norms that the model has; needs training data.

    layers, skip: globs of the names of what is trained.
    """

    family: ClassVar[str] = "train"
    needs_training: ClassVar[bool] = True

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Nothing but a look at what there is to train."""
        return len(self.parameters(model))

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Nothing: the weights are stored as they are trained."""
        return 0

    def without_training(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Nothing, with a warning."""
        ctx.warn("there is no training data; give some by --train")
        return 0

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """What torch can learn of the model, chosen by `layers` and `skip`."""
        return tuple(name for name in ir.learned(model) if self.declines(name) is None)
