"""TVM's elementary functions, lowered to our vector polynomials as late as possible.

Until the last pass an `exp` is one opaque node, so that simplifiers and inlining see small trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from mc_opt.targets.kernels import _math

_RULES: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": _math.exp,
    "tirx.erf": _math.erf,
    "tirx.log": _math.log,
    "tirx.sigmoid": _math.sigmoid,
    "tirx.tanh": _math.tanh,
}


def register() -> None:
    """Make LLVM code use our functions for float32; for the whole process, so only a build's own process does it."""
    for name, function in _RULES.items():
        tirx.register_intrin_lowering(name, target="llvm", f=_rule(function), level=99)


def _rule(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda call: function(call.args[0]) if str(call.ty).startswith("float32") else call
