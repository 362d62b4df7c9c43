"""What a model is: the graph and its dialect, models in and out, and two ways to run one (lazy: PEP 562)."""

# ruff: noqa: F401  (the imports are for type checkers; _EXPORTS says the same to Python)
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mc_opt.ir.changes import Change, Detail, Diff, Rename
    from mc_opt.ir.difference import diff, own_origin
    from mc_opt.ir.errors import DataError, IRError, LimitError, OptionError, UnsupportedError
    from mc_opt.ir.history import Origin, Touched, add_history, read_history
    from mc_opt.ir.io.atomic import FolderError, staged_files, staged_folder, write_bytes, write_text
    from mc_opt.ir.io.axes import batch_axes
    from mc_opt.ir.io.capture import capture, from_torch
    from mc_opt.ir.io.causal import MAX_LENGTH, capture_causal_lm, from_transformers
    from mc_opt.ir.io.data import (
        LABEL,
        Data,
        Sample,
        as_sample,
        check_arrays,
        check_states,
        load_data,
        seeded_data,
    )
    from mc_opt.ir.io.factory import call_factory, find_factory, first_line
    from mc_opt.ir.io.load import load_model
    from mc_opt.ir.io.npz import Header
    from mc_opt.ir.io.read import Source, read_model
    from mc_opt.ir.io.save import SavedModel, save_model
    from mc_opt.ir.io.shapes import fix_shapes, format_shape, infer_shapes, parse_shape, shape_advice
    from mc_opt.ir.io.states import TOKENIZER, TOKENIZER_FILE, end_tokens, states_of, tokenizer_beside
    from mc_opt.ir.io.weightless import weightless
    from mc_opt.ir.op import Example, Op, Work, add_functions, find_op, node, op_names
    from mc_opt.ir.ops._euclid_integer import MOST_TERMS, accumulator_bits
    from mc_opt.ir.ops._kron import (
        Chain,
        Stage,
        dense_work,
        factored_work,
        kron_weight,
        stage_multiplications,
        stage_positions,
    )
    from mc_opt.ir.ops._packing import Geometry, canonical, pack_codes, restore, unpack_codes
    from mc_opt.ir.ops.fake_lookup import nearest_codes
    from mc_opt.ir.ops.fake_threshold import threshold
    from mc_opt.ir.ops.lookup import decode
    from mc_opt.ir.ops.sekron_conv import stage_windows
    from mc_opt.ir.ops.sparse import pack_sparse
    from mc_opt.ir.options import Spec, fields_of, make, parse_specs, to_spec, unknown
    from mc_opt.ir.patterns import Rule, apply_rules
    from mc_opt.ir.rewrite import free_name, initializer, provenance, replace_node, replace_weight
    from mc_opt.ir.run.drift import Drift, DriftMeter, OutputDrift, Verdict, accuracy, is_right, judge
    from mc_opt.ir.run.interp import interpret, learned
    from mc_opt.ir.run.module import names, run_module, state_to_model
    from mc_opt.ir.run.ort import Session, compare, exactness, noise, run_data
    from mc_opt.ir.run.standard.dtypes import from_array, to_array, torch_type
    from mc_opt.ir.run.stream import Stream, written_in_place
    from mc_opt.ir.run.values import largest_values, value_drift
    from mc_opt.ir.sites import CAST_GROWTH, GROWTH, Skip, WeightSite, layer_of, matches, names_of, weight_sites
    from mc_opt.ir.storage import LayerChange, Storage, Stored, storage_of
    from mc_opt.ir.text import digest, nodes_text, to_text, type_text
    from mc_opt.ir.verifier import verify
    from mc_opt.ir.views import (
        after,
        before,
        components,
        cycles,
        downstream,
        find_cycle,
        graph_of,
        label,
        longest_path,
        path_between,
        subgraphs,
        title_of,
        titles_of,
        upstream,
        users,
    )

# A module must not carry the name of something exported here: importing it would put the module in the
# export's place (hence verifier.verify).
_EXPORTS = {
    "Change": "changes",
    "Detail": "changes",
    "Diff": "changes",
    "Rename": "changes",
    "diff": "difference",
    "own_origin": "difference",
    "DataError": "errors",
    "IRError": "errors",
    "LimitError": "errors",
    "UnsupportedError": "errors",
    "OptionError": "errors",
    "FolderError": "io.atomic",
    "Origin": "history",
    "Touched": "history",
    "add_history": "history",
    "read_history": "history",
    "staged_files": "io.atomic",
    "staged_folder": "io.atomic",
    "write_bytes": "io.atomic",
    "write_text": "io.atomic",
    "capture": "io.capture",
    "from_torch": "io.capture",
    "MAX_LENGTH": "io.causal",
    "TOKENIZER": "io.states",
    "TOKENIZER_FILE": "io.states",
    "capture_causal_lm": "io.causal",
    "end_tokens": "io.states",
    "from_transformers": "io.causal",
    "states_of": "io.states",
    "tokenizer_beside": "io.states",
    "Stream": "run.stream",
    "written_in_place": "run.stream",
    "batch_axes": "io.axes",
    "LABEL": "io.data",
    "Data": "io.data",
    "Sample": "io.data",
    "as_sample": "io.data",
    "check_arrays": "io.data",
    "check_states": "io.data",
    "load_data": "io.data",
    "seeded_data": "io.data",
    "call_factory": "io.factory",
    "find_factory": "io.factory",
    "first_line": "io.factory",
    "load_model": "io.load",
    "Header": "io.npz",
    "Source": "io.read",
    "read_model": "io.read",
    "SavedModel": "io.save",
    "save_model": "io.save",
    "fix_shapes": "io.shapes",
    "format_shape": "io.shapes",
    "infer_shapes": "io.shapes",
    "parse_shape": "io.shapes",
    "shape_advice": "io.shapes",
    "weightless": "io.weightless",
    "Example": "op",
    "Op": "op",
    "Work": "op",
    "add_functions": "op",
    "find_op": "op",
    "node": "op",
    "op_names": "op",
    "MOST_TERMS": "ops._euclid_integer",
    "accumulator_bits": "ops._euclid_integer",
    "Chain": "ops._kron",
    "Stage": "ops._kron",
    "dense_work": "ops._kron",
    "factored_work": "ops._kron",
    "stage_multiplications": "ops._kron",
    "kron_weight": "ops._kron",
    "stage_positions": "ops._kron",
    "stage_windows": "ops.sekron_conv",
    "pack_sparse": "ops.sparse",
    "Geometry": "ops._packing",
    "canonical": "ops._packing",
    "pack_codes": "ops._packing",
    "restore": "ops._packing",
    "unpack_codes": "ops._packing",
    "nearest_codes": "ops.fake_lookup",
    "threshold": "ops.fake_threshold",
    "decode": "ops.lookup",
    "Spec": "options",
    "fields_of": "options",
    "make": "options",
    "parse_specs": "options",
    "to_spec": "options",
    "unknown": "options",
    "Rule": "patterns",
    "apply_rules": "patterns",
    "CAST_GROWTH": "sites",
    "GROWTH": "sites",
    "Skip": "sites",
    "WeightSite": "sites",
    "free_name": "rewrite",
    "names_of": "sites",
    "initializer": "rewrite",
    "layer_of": "sites",
    "matches": "sites",
    "provenance": "rewrite",
    "replace_node": "rewrite",
    "replace_weight": "rewrite",
    "weight_sites": "sites",
    "interpret": "run.interp",
    "learned": "run.interp",
    "names": "run.module",
    "run_module": "run.module",
    "state_to_model": "run.module",
    "accuracy": "run.drift",
    "is_right": "run.drift",
    "Drift": "run.drift",
    "DriftMeter": "run.drift",
    "OutputDrift": "run.drift",
    "Session": "run.ort",
    "Verdict": "run.drift",
    "compare": "run.ort",
    "exactness": "run.ort",
    "judge": "run.drift",
    "noise": "run.ort",
    "run_data": "run.ort",
    "from_array": "run.standard.dtypes",
    "to_array": "run.standard.dtypes",
    "torch_type": "run.standard.dtypes",
    "largest_values": "run.values",
    "value_drift": "run.values",
    "LayerChange": "storage",
    "Storage": "storage",
    "Stored": "storage",
    "storage_of": "storage",
    "digest": "text",
    "nodes_text": "text",
    "to_text": "text",
    "type_text": "text",
    "verify": "verifier",
    "after": "views",
    "before": "views",
    "components": "views",
    "cycles": "views",
    "downstream": "views",
    "find_cycle": "views",
    "graph_of": "views",
    "label": "views",
    "longest_path": "views",
    "path_between": "views",
    "subgraphs": "views",
    "title_of": "views",
    "titles_of": "views",
    "upstream": "views",
    "users": "views",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
