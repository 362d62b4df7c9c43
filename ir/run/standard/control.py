"""Modules that stand for control flow and for functions with a gradient of their own in an fx graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Call(torch.nn.Module):  # type: ignore[misc]  # torch is untyped to the checker
    """A function of tensors as a module, so that a closure can stand in an fx graph."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Call the function."""
        return self._function(*inputs)


class Branches(torch.nn.Module):  # type: ignore[misc]  # torch is untyped to the checker
    """The two branches of an If; the one that the condition picks is run on the values that it captured."""

    def __init__(self, then: torch.fx.GraphModule, otherwise: torch.fx.GraphModule) -> None:
        super().__init__()
        self.then = then
        self.otherwise = otherwise

    def forward(
        self, condition: torch.Tensor, then: tuple[torch.Tensor, ...], otherwise: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one branch."""
        result: tuple[torch.Tensor, ...] = self.then(*then) if bool(condition) else self.otherwise(*otherwise)
        return result
