"""What a model says of itself in its metadata: the states that a caller carries, and where a text ends."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir

STATES = "mc_opt.states"
"""Metadata of a model: its recurrent states, output name to input name, as JSON."""
END = "mc_opt.end_tokens"
"""Metadata of a causal language model: the tokens after which a text is complete, as JSON."""
TOKENIZER = "mc_opt.tokenizer"
"""In `meta` of a model that was captured: the text of its tokenizer.json."""
TOKENIZER_FILE = "tokenizer.json"
"""The file beside model.onnx that holds the tokenizer."""


def states_of(model: onnx_ir.Model) -> dict[str, str]:
    """The recurrent states that a model names in its metadata, output name to input name; none for most models."""
    text = model.metadata_props.get(STATES)
    return {} if text is None else {str(k): str(v) for k, v in json.loads(text).items()}


def end_tokens(model: onnx_ir.Model) -> tuple[int, ...]:
    """The tokens after which the text of a causal language model is complete."""
    return tuple(int(token) for token in json.loads(model.metadata_props.get(END, "[]")))


def tokenizer_beside(path: Path, model: onnx_ir.Model) -> str | None:
    """The text of the tokenizer that lies beside the file of a causal language model; None when there is none."""
    file = path.parent / TOKENIZER_FILE
    return file.read_text(encoding="utf-8") if END in model.metadata_props and file.is_file() else None
