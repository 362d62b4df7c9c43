"""Kernels that take their callers' memory: its vectors lie anywhere, where those of TVM's own memory begin a line."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from mc_opt.targets._relax.subnormals import rebuilt

# Numbers of the arguments of a kernel that lie anywhere.
ANYWHERE = "mc_opt.anywhere"
_ALIGNMENT = "storage_alignment"


def loosened(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A lowered kernel of tensors with the arguments that `ANYWHERE` names aligned as their elements are."""
    anywhere = [int(k) for k in function.attrs.get(ANYWHERE, [])]
    if not anywhere:
        return function
    seen: list[Any] = []

    def entered(statement: Any) -> Any:
        if isinstance(statement, tirx.AttrStmt) and statement.attr_key == _ALIGNMENT:
            seen.append(statement.node)  # one for each argument, in their order
            value = tvm.tirx.IntImm("int32", 1) if len(seen) - 1 in anywhere else statement.value
            return tirx.AttrStmt(statement.node, _ALIGNMENT, value, entered(statement.body))
        return rebuilt(statement, entered)

    return function.with_body(entered(function.body))
