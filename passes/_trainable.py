"""The base of passes that are trained: `prepare` inserts training forms, `convert` stores what they became."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context, Pass, PassError

if TYPE_CHECKING:
    import torch

    Penalty = Callable[[Mapping[str, torch.Tensor], float], torch.Tensor]

_PASS = "mc_opt.pass"


@dataclass(frozen=True)
class TrainablePass(Pass):
    """A pass whose result is trained where the run has training data, and made at once where it has none.

    The training itself is `_train.fit`, the same for all; a pass only says what is trained, what it adds to the loss
    and which numbers change on the way.

    Attributes:
        needs_training: without training data the pass does nothing.
    """

    needs_training: ClassVar[bool] = False

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Edit `model` in place: put training forms where stored forms will be; the number of layers taken.

        Every node of a form is signed with the pass (`ir.provenance`, which `ir.replace_weight` does).
        """
        raise TypeError(f"{type(self).__name__} is a trainable pass without prepare()")

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Edit `model` in place: replace every training form of this pass by its stored form; how many there were."""
        raise TypeError(f"{type(self).__name__} is a trainable pass without convert()")

    def without_training(self, model: onnx_ir.Model, ctx: Context) -> int:
        """The pass in a run that trains nothing: the stored forms of what `prepare` starts from."""
        prepared = self.prepare(model, ctx)
        if prepared:
            ir.add_functions(model)
            self.convert(model, ctx)
        return prepared

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """The initialisers of a prepared model that this pass trains: by default those that its forms learn."""
        found: dict[str, None] = {}
        for node in forms(model, self.name):
            for index, value in enumerate(node.inputs):
                if value is not None and value.is_initializer() and ir.find_op(node.op_type).learns(node, index):
                    found[str(value.name)] = None
        return tuple(found)

    def settings(self, model: onnx_ir.Model, progress: float) -> Mapping[str, float]:
        """Initialisers of one number that change on the way, and their values at this share of the training.

        Args:
            model: the prepared model.
            progress: from 0 at the first step to 1 at the last one and after it, when the forms are judged and
                converted.
        """
        return {}

    def penalty(self, model: onnx_ir.Model) -> Penalty | None:
        """What the pass adds to the loss: a function of the model's parameters by name and of the progress."""
        return None

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Prepare, train and convert; without training data, convert at once."""
        if ctx.training is None:
            return self.without_training(model, ctx)
        prepared = self.prepare(model, ctx)
        if prepared:
            ir.add_functions(model)
            train(model, (self,), ctx)
            self.convert(model, ctx)
            hold_converted(model, self)
        return prepared


def train(model: onnx_ir.Model, steps: Sequence[TrainablePass], ctx: Context) -> int:
    """Train what `steps` prepared in `model`, in place; how many passes that were.

    Raises:
        OptionError: what training needs is not installed.
    """
    try:
        from mc_opt.passes import _train  # torch is an extra
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "accelerate", "safetensors"):
            raise
        raise ir.OptionError(f"training needs {error.name}: pip install 'mc-opt[train]'") from error
    _train.fit(model, steps, ctx)
    return len(steps)


def is_main_process() -> bool:
    """Whether this process tells and writes what was trained: the only one, or the first of several, after training."""
    from torch import distributed

    several = distributed.is_available() and distributed.is_initialized()
    return not several or bool(distributed.get_rank() == 0)


def forms(model: onnx_ir.Model, pass_name: str) -> Iterator[onnx_ir.Node]:
    """The training forms that a pass put into a model, in graph order."""
    for node in model.graph.all_nodes():
        ours = node.domain == "mc_opt" and ir.find_op(node.op_type).training_form
        if ours and node.metadata_props.get(_PASS) == pass_name:
            yield node


def hold_converted(model: onnx_ir.Model, step: Pass) -> None:
    """Refuse a model in which a pass left a training form.

    Raises:
        PassError: naming the form.
    """
    left = next(forms(model, step.name), None)
    if left is not None:
        raise PassError(step.name, ir.title_of(left), f"{left.op_type} is a training form and was not converted")
