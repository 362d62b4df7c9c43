"""Model to Relax: one table of handlers a family of ops, merged here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mc_opt.targets._relax.emitter import Handler


def handlers() -> dict[tuple[str, str], Handler]:
    """(domain, op type) to handler, from every file of this folder and of `targets/kernels` that has a table.

    A file names its table `HANDLERS`; a key "Conv" is ONNX's op, a key "mc_opt.Lookup" one of ours.
    """
    table: dict[tuple[str, str], Handler] = {}
    for package in ("mc_opt.targets._relax", "mc_opt.targets.kernels"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            loaded = importlib.import_module(f"{package}.{module.name}")
            for name, handler in getattr(loaded, "HANDLERS", {}).items():
                domain, _, op_type = name.rpartition(".")
                assert (domain, op_type) not in table, f"{name} has two handlers; one is in {loaded.__name__}"
                table[domain, op_type] = handler
    return table
