"""What changes a model: one pass, one file; the files with a leading underscore are the machinery of the pipeline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mc_opt.passes._base import MEMORY_LIMIT, Check, Context, Pass, PassError, name_of
    from mc_opt.passes._find import find_pass, options_of, pass_names
    from mc_opt.passes._held_out import held_out_samples
    from mc_opt.passes._instrument import Instrument
    from mc_opt.passes._pipeline import Result, dry_run, run
    from mc_opt.passes._report import (
        SCHEMA_VERSION,
        File,
        LayerReport,
        PassReport,
        Report,
        Size,
        TargetReport,
        TunedKernel,
        TuningReport,
        Unchecked,
        json_text,
    )
    from mc_opt.passes._size import elements_of, size_of, weights
    from mc_opt.passes._spec import (
        Pipeline,
        Recipe,
        RecipeError,
        Step,
        quoting_hint,
    )
    from mc_opt.passes._store import Store
    from mc_opt.passes._trainable import TrainablePass, is_main_process
    from mc_opt.passes._training import Epoch, Training, TrainingReport

_EXPORTS = {
    "MEMORY_LIMIT": "_base",
    "Check": "_base",
    "Context": "_base",
    "Pass": "_base",
    "name_of": "_base",
    "PassError": "_base",
    "Instrument": "_instrument",
    "Result": "_pipeline",
    "dry_run": "_pipeline",
    "run": "_pipeline",
    "SCHEMA_VERSION": "_report",
    "LayerReport": "_report",
    "File": "_report",
    "PassReport": "_report",
    "Report": "_report",
    "Size": "_report",
    "TargetReport": "_report",
    "TunedKernel": "_report",
    "TuningReport": "_report",
    "Unchecked": "_report",
    "json_text": "_report",
    "elements_of": "_size",
    "size_of": "_size",
    "weights": "_size",
    "Pipeline": "_spec",
    "Recipe": "_spec",
    "RecipeError": "_spec",
    "Step": "_spec",
    "find_pass": "_find",
    "options_of": "_find",
    "pass_names": "_find",
    "quoting_hint": "_spec",
    "Store": "_store",
    "TrainablePass": "_trainable",
    "is_main_process": "_trainable",
    "Epoch": "_training",
    "held_out_samples": "_held_out",
    "Training": "_training",
    "TrainingReport": "_training",
}

__all__ = [
    "MEMORY_LIMIT",
    "SCHEMA_VERSION",
    "Check",
    "Context",
    "Epoch",
    "File",
    "Instrument",
    "LayerReport",
    "Pass",
    "PassError",
    "PassReport",
    "Pipeline",
    "Recipe",
    "RecipeError",
    "Report",
    "Result",
    "Size",
    "Step",
    "Store",
    "TargetReport",
    "TrainablePass",
    "Training",
    "TrainingReport",
    "TunedKernel",
    "TuningReport",
    "Unchecked",
    "dry_run",
    "elements_of",
    "find_pass",
    "held_out_samples",
    "is_main_process",
    "json_text",
    "name_of",
    "options_of",
    "pass_names",
    "quoting_hint",
    "run",
    "size_of",
    "weights",
]


def __getattr__(name: str) -> Any:  # PEP 562: importing the room loads no onnx and no pass
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
