"""Fix an input to a value and fold what follows from it; exact for that value.

f(x, sr) ↦ f₁₆₀₀₀(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context, Pass
from mc_opt.passes._fold import Folding

_LIMIT = 64 << 20
_WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Specialize(Pass):
    """Fix inputs, specialize{sr=16000}: they leave the model's inputs, and what follows is folded.

    An option is the name of an input and its value: a number for a scalar, numbers with commas for one axis.
    """

    family: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False  # the input is gone after the first run, so that a second has nothing to fix

    values: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Every option is the name of an input."""
        if not options:
            raise ir.OptionError("specialize: name an input and its value, as in specialize{sr=16000}")
        return cls(tuple(options.items()))

    def options(self) -> dict[str, str]:
        """Input name to value, as text."""
        return dict(self.values)

    def fixes(self, model: onnx_ir.Model) -> Mapping[str, np.ndarray]:
        """The values, for the inputs that the model has."""
        inputs = {value.name: value for value in model.graph.inputs}
        return {name: self._parse(inputs[name], text) for name, text in self.values if name in inputs}

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Turn the inputs into constants of their names, and fold."""
        inputs = {value.name: value for value in model.graph.inputs}
        for name, text in self.values:
            if name not in inputs:
                raise ir.OptionError(f"{self.name}: {ir.unknown('input', name, [str(n) for n in inputs])}")
            value, array = inputs[name], self._parse(inputs[name], text)
            ctx.did("fixed input", value)
            model.graph.inputs.remove(value)
            value.const_value = ctx.keep(array, name)
            value.shape = onnx_ir.Shape(array.shape)
            model.graph.register_initializer(value)
        return len(self.values) + Folding(model, ctx, _LIMIT, self.declines).run()

    def _parse(self, value: onnx_ir.Value, text: str) -> np.ndarray:
        name, dtype = str(value.name), value.dtype
        if dtype is None or dtype == onnx_ir.DataType.STRING:
            raise ir.OptionError(f"{self.name}: {name}: its type is {dtype}, expected numbers or true and false")
        try:
            numbers = [_number(word, dtype) for word in text.split(",")]
            with np.errstate(over="raise"):
                array = np.array(numbers, dtype.numpy())
        except (ValueError, OverflowError, FloatingPointError) as error:
            raise ir.OptionError(
                f"{self.name}: {name}: {text!r} does not fit its type {dtype.name}: {error}"
            ) from error
        dims = [d if isinstance(d, int) else None for d in value.shape] if value.shape is not None else None
        rank = len(dims) if dims is not None else (0 if len(numbers) == 1 else 1)
        if len(numbers) == 1 and rank != 1 and all(d in (1, None) for d in dims or []):
            return array.reshape((1,) * rank)
        if rank != 1 or (dims is not None and dims[0] not in (None, len(numbers))):
            raise ir.OptionError(f"{self.name}: {name}: {len(numbers)} numbers were given, its shape is {value.shape}")
        return array


def _number(word: str, dtype: onnx_ir.DataType) -> Any:
    if dtype == onnx_ir.DataType.BOOL:
        if word.lower() not in _WORDS:
            raise ValueError("write true or false")
        return _WORDS[word.lower()]
    return float(word) if dtype.is_floating_point() else int(word)
