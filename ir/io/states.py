"""What a model says of itself in its metadata: the states that a caller carries, and where a text ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir

from mc_opt.ir.errors import IRError

STATES = "mc_opt.states"
"""Metadata of a model: its recurrent states, output name to input name, as JSON."""
END = "mc_opt.end_tokens"
"""Metadata of a causal language model: the tokens after which a text is complete, as JSON."""
TOKENIZER = "mc_opt.tokenizer"
"""In `meta` of a model that was captured: the text of its tokenizer.json."""
TOKENIZER_FILE = "tokenizer.json"
"""The file beside model.onnx that holds the tokenizer."""


def states_of(model: onnx_ir.Model) -> dict[str, str]:
    """The recurrent states that a model names in its metadata, output name to input name; none for most models.

    Raises:
        IRError: the metadata is no such table.
    """
    return {str(output): str(given) for output, given in _read(model, STATES, dict).items()}


def end_tokens(model: onnx_ir.Model) -> tuple[int, ...]:
    """The tokens after which the text of a causal language model is complete.

    Raises:
        IRError: the metadata is no list of numbers.
    """
    found = _read(model, END, list)
    if not all(type(token) is int for token in found):
        raise _unfit(END, list)
    return tuple(found)


def _read(model: onnx_ir.Model, key: str, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """The value of a key; a model from elsewhere may hold anything there."""
    text = model.metadata_props.get(key)
    if text is None:
        return kind()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unfit(key, kind) from error
    if not isinstance(found, kind):
        raise _unfit(key, kind)
    return found


def _unfit(key: str, kind: type) -> IRError:
    expected = "a JSON object of names" if kind is dict else "a JSON list of whole numbers"
    return IRError(f"metadata {key}: it cannot be read, expected {expected}; remove it from the model's metadata")


def tokenizer_beside(path: Path, model: onnx_ir.Model) -> str | None:
    """The text of the tokenizer that lies beside the file of a causal language model; None when there is none.

    Raises:
        IRError: the file is a link out of the model's folder, or is no text.
    """
    file = path.parent / TOKENIZER_FILE
    if END not in model.metadata_props or not file.is_file():
        return None
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise IRError(f"{file}: it leads out of the model's folder, expected a file in it; copy the tokenizer there")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IRError(f"{file}: it is no UTF-8 text, expected a tokenizer as JSON; save it again") from error
