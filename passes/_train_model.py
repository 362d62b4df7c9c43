"""The modules of a training: the prepared model and the original in torch, and what of them is trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir
import torch

from mc_opt import ir
from mc_opt.passes._base import Context, PassError
from mc_opt.passes._train_batch import Batch, join
from mc_opt.passes._trainable import TrainablePass
from mc_opt.passes._training import Training

_SAME = 1e-3
"""Samples run together and alone differ by less of their range, unless they influence each other."""


@dataclass
class Student:
    """The prepared model in torch.

    Attributes:
        module: the graph; its parameters that are not trained need no gradient.
        steps: the passes whose forms are in it.
        model: the prepared model.
        trained: parameters that are trained, by ONNX name, in the order of the module.
        values: all parameters and floating-point buffers by ONNX name: what penalties see.
        norms: the BatchNormalizations.
        frozen_from: the share of the training from which on they keep their running statistics; above 1 they never do.
    """

    module: torch.fx.GraphModule
    steps: Sequence[TrainablePass]
    model: onnx_ir.Model
    trained: dict[str, torch.nn.Parameter]
    values: dict[str, torch.Tensor]
    norms: tuple[torch.nn.Module, ...]
    frozen_from: float
    _penalties: list[object] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: onnx_ir.Model, steps: Sequence[TrainablePass], training: Training, taps: Sequence[str]
    ) -> Student:
        """Make the module and choose what is trained.

        Raises:
            IRError: an op of the model has no torch meaning.
            OptionError: `parameters` names nothing.
        """
        module = ir.interpret(model, training=True, taps=taps)
        known = ir.names(module).tensors
        parameters = {known[name]: p for name, p in module.named_parameters() if name in known}
        buffers = {known[n]: b for n, b in module.named_buffers() if n in known and b.is_floating_point()}
        chosen = _chosen(model, steps, training.parameters, tuple(parameters))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        norms = tuple(m for m in module.modules() if hasattr(m, "restart") and hasattr(m, "frozen"))
        trained = {name: p for name, p in parameters.items() if name in chosen}
        share = 1.0 if training.batch_norm == "frozen" else training.freeze_statistics
        penalties: list[object] = [step.penalty(model) for step in steps]
        values = parameters | buffers
        return cls(module, steps, model, trained, values, norms, 1 - share if share else math.inf, penalties)

    def set_progress(self, progress: float) -> None:
        """Give every setting its value at this share of the training, and freeze statistics when it is time."""
        for norm in self.norms:
            norm.frozen = progress >= self.frozen_from
        for step in self.steps:
            for name, value in step.settings(self.model, progress).items():
                self.values[name].detach().fill_(value)

    def penalty(self, progress: float) -> torch.Tensor | None:
        """The sum of what the passes add to the loss; None when none does."""
        found = [p(self.values, progress) for p in self._penalties if callable(p)]
        return sum(found[1:], found[0]) if found else None

    @contextlib.contextmanager
    def judged(self, progress: float) -> Iterator[None]:
        """For the block: as the forms will be converted, on running statistics, without gradients."""
        self.module.eval()
        self.set_progress(1.0)
        with torch.no_grad():
            yield
        self.set_progress(progress)
        self.module.train()

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What training moves, by ONNX name: trained parameters, and statistics of BatchNormalizations."""
        moved = {name: p.detach() for name, p in self.trained.items()}
        return moved | {name: v for name, v in self.values.items() if not isinstance(v, torch.nn.Parameter)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        own = self.state
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _chosen(
    model: onnx_ir.Model, steps: Sequence[TrainablePass], wanted: Sequence[str], known: Sequence[str]
) -> frozenset[str]:
    """The names of the parameters to train."""
    chosen: set[str] = set()
    for word in wanted:
        match word:
            case "all":
                found = set(known)
            case "forms":
                found = {name for step in steps for name in step.parameters(model)}
            case glob:
                found = {name for name in known if ir.matches(name, (glob,))}
                if not found:
                    listed = ", ".join(known[:8]) + (", .." if len(known) > 8 else "")
                    raise ir.OptionError(f"parameters={glob}: matches none of the parameters ({listed}), all or forms")
        chosen |= found
    unknown = sorted(chosen - set(known))
    if unknown:
        raise PassError(steps[0].name, unknown[0], "is to be trained and is no parameter of the prepared model")
    return frozenset(chosen)


def teacher_of(model: onnx_ir.Model, taps: Sequence[str], device: torch.device) -> torch.fx.GraphModule:
    """The original in torch, in evaluation mode, without gradients."""
    module: torch.fx.GraphModule = ir.interpret(model, taps=taps).to(device)
    return module.requires_grad_(False).eval()


def run(
    module: torch.nn.Module, known: torch.fx.GraphModule, inputs: Mapping[str, torch.Tensor], ctx: Context
) -> dict[str, torch.Tensor]:
    """Outputs and taps by ONNX name.

    Args:
        module: what is called: the graph itself, or what wraps it for several processes.
        known: the graph, for its names.
        inputs: by ONNX name; those that the graph does not have are left out.
        ctx: for the values of inputs that a pass has made constant.
    """
    names = ir.names(known)
    feeds = {}
    for name, argument in names.inputs.items():
        if name in inputs:
            feeds[argument] = inputs[name]
        elif name in ctx.fixed:
            feeds[argument] = torch.as_tensor(ctx.fixed[name])
        else:
            raise ir.DataError(f"input {name!r}: the data has none, the model needs it; add it to the data")
    return dict(zip((*names.outputs, *names.taps), module(**feeds), strict=True))


def is_batchable(student: Student, samples: Sequence[Batch], device: torch.device, ctx: Context) -> bool:
    """Whether the model gives two samples of equal shapes the same outputs together as alone.

    Args:
        student: the model.
        samples: single ones.
        device: where the model is.
        ctx: for the values of inputs that a pass has made constant.
    """
    first, *others = samples
    shapes = {name: tensor.shape for name, tensor in first.inputs.items()}
    second = next((s for s in others if {n: t.shape for n, t in s.inputs.items()} == shapes), first)
    with student.judged(0.0):
        alone = [run(student.module, student.module, b.to(device).inputs, ctx) for b in (first, second)]
        try:
            both = run(student.module, student.module, join([first, second]).to(device).inputs, ctx)
        except (RuntimeError, IndexError, ValueError, ir.IRError):  # shapes that hold a batch of 1
            return False
    # A value without samples, as a table of positions gives it, is no hindrance; a mean over twice the same sample
    # would look like one.
    return all(
        _is_joined(both[name], alone[0][name], alone[1][name])
        or (second is not first and all(_is_same(both[name], each[name]) for each in alone))
        for name in both
    )


def _is_joined(both: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    if both.dim() != a.dim() or not a.dim():
        return False
    for axis in range(a.dim()):
        if both.shape[axis] == a.shape[axis] + b.shape[axis]:
            joined = torch.cat([a, b], axis)
            if joined.shape == both.shape:
                return _is_same(both, joined)
    return False


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return False
    spread = float((b.max() - b.min()).abs()) or 1.0
    return bool(((b - a).abs().max() <= _SAME * spread).item())
