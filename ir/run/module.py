"""A model that the interpreter made into a torch module: its names, a run by ONNX names, its weights back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from mc_opt.ir.errors import DataError, IRError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Names:
    """How a GraphModule's names belong to the model's.

    Attributes:
        inputs: ONNX input name to the parameter of the module's forward.
        tensors: torch name of a parameter or buffer to the initialiser's ONNX name.
        outputs: ONNX output names, in the order of the tuple that forward returns.
        taps: names of other values that forward returns after the outputs.
    """

    inputs: dict[str, str]
    tensors: dict[str, str]
    outputs: tuple[str, ...]
    taps: tuple[str, ...] = ()


def names(module: torch.fx.GraphModule) -> Names:
    """The names that `interpret` recorded; copies of the module keep them."""
    found = module.meta["onnx"]
    assert isinstance(found, Names)
    return found


def run_module(
    module: torch.fx.GraphModule, inputs: Mapping[str, torch.Tensor | np.ndarray]
) -> dict[str, torch.Tensor]:
    """Run an interpreted model on tensors or arrays by ONNX name; outputs and taps by ONNX name, in the model's order.

    Raises:
        DataError: when a name is missing or unknown.
    """
    import torch  # late: whoever has a module has torch loaded

    known = names(module)
    for name in [*known.inputs, *inputs]:
        if name not in inputs or name not in known.inputs:
            problem = "missing" if name not in inputs else "unknown"
            raise DataError(f"input {name!r}: {problem}; expected {', '.join(known.inputs)}")
    feeds = {known.inputs[name]: torch.as_tensor(value) for name, value in inputs.items()}
    return dict(zip((*known.outputs, *known.taps), module(**feeds), strict=True))


def state_to_model(module: torch.fx.GraphModule, model: onnx_ir.Model) -> int:
    """Write the module's floating-point tensors back into `model`'s initialisers of the same names.

    These are its parameters, and buffers that training moves, as the statistics of a BatchNormalization are. Only
    initialisers whose numbers differ are replaced, so that untouched weights stay memory-mapped and shared.

    Returns:
        The number of initialisers replaced.

    Raises:
        IRError: when a tensor's initialiser is missing in the model or has another shape.
    """
    import torch  # late: whoever has a module has torch loaded

    from mc_opt.ir.run.standard.dtypes import to_array, to_torch

    initialisers = {name: value for graph in model.graphs() for name, value in graph.initializers.items()}
    known = names(module).tensors
    count = 0
    for torch_name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if torch_name not in known or not parameter.is_floating_point():
            continue
        name = known[torch_name]
        old = initialisers[name].const_value if name in initialisers else None
        if old is None:
            raise IRError(f"{name}: the module has this tensor, the model has no such initialiser")
        before = to_torch(old)
        tensor = parameter.detach().cpu().to(before.dtype)  # training keeps half precision in fp32
        new = to_array(tensor)
        if new.shape != tuple(old.shape.numpy()):
            raise IRError(
                f"{name}: the module's tensor has shape {new.shape}, the initialiser {tuple(old.shape.numpy())}"
            )
        if torch.equal(tensor, before):
            continue
        initialisers[name].const_value = onnx_ir.Tensor(new, dtype=old.dtype, name=name)
        count += 1
    return count
