"""Room 2: where a model runs; every name is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mc_opt.targets._base import (
        Built,
        Price,
        Target,
        TargetError,
        cost,
        find_target,
        parse_target,
        parse_targets,
        target_names,
    )
    from mc_opt.targets._gpu import cuda_tools
    from mc_opt.targets._tile_table import Section, TileTable
    from mc_opt.targets._time import predicted_time
    from mc_opt.targets._vm import Artefact, load_artefact

_EXPORTS = {
    "Artefact": "_vm",
    "Built": "_base",
    "Price": "_base",
    "Section": "_tile_table",
    "Target": "_base",
    "TargetError": "_base",
    "TileTable": "_tile_table",
    "cost": "_base",
    "cuda_tools": "_gpu",
    "find_target": "_base",
    "load_artefact": "_vm",
    "parse_target": "_base",
    "parse_targets": "_base",
    "predicted_time": "_time",
    "target_names": "_base",
}

__all__ = [
    "Artefact",
    "Built",
    "Price",
    "Section",
    "Target",
    "TargetError",
    "TileTable",
    "cost",
    "cuda_tools",
    "find_target",
    "load_artefact",
    "parse_target",
    "parse_targets",
    "predicted_time",
    "target_names",
]


def __getattr__(name: str) -> Any:  # PEP 562: naming a target must not import TVM
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
