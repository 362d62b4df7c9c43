"""mc-opt: a compiler whose optimisations are model-compression methods (the public API)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mc_opt.passes import Training
    from mc_opt.tools._load import load
    from mc_opt.tools.api import (
        build,
        capture,
        capture_causal_lm,
        compress,
        convert,
        diff,
        load_model,
        prepare,
        save_model,
        to_torch,
        weights_from_torch,
    )

_EXPORTS = {
    "Training": "mc_opt.passes",
    "build": "mc_opt.tools.api",
    "capture": "mc_opt.tools.api",
    "capture_causal_lm": "mc_opt.tools.api",
    "compress": "mc_opt.tools.api",
    "convert": "mc_opt.tools.api",
    "diff": "mc_opt.tools.api",
    "load": "mc_opt.tools._load",
    "load_model": "mc_opt.tools.api",
    "prepare": "mc_opt.tools.api",
    "save_model": "mc_opt.tools.api",
    "to_torch": "mc_opt.tools.api",
    "weights_from_torch": "mc_opt.tools.api",
}

__all__ = [
    "Training",
    "__version__",
    "build",
    "capture",
    "capture_causal_lm",
    "compress",
    "convert",
    "diff",
    "load",
    "load_model",
    "prepare",
    "save_model",
    "to_torch",
    "weights_from_torch",
]


def __getattr__(name: str) -> Any:  # PEP 562: `import mc_opt` loads none of the rooms
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
