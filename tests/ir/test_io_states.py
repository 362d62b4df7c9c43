"""What a model's metadata says of states and ends of texts, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import pytest

from mc_opt import ir
from tests._harness import model

TEXT = "m (float[1,2] x, float[1,2] h) => (float[1,2] y) { y = Add (x, h) }"


def test_most_models_name_none() -> None:
    assert ir.states_of(model(TEXT)) == {}
    assert ir.end_tokens(model(TEXT)) == ()


def test_what_was_written_is_read() -> None:
    made = model(TEXT)
    made.metadata_props.update({"mc_opt.states": '{"y": "h"}', "mc_opt.end_tokens": "[2, 0]"})
    assert ir.states_of(made) == {"y": "h"}
    assert ir.end_tokens(made) == (2, 0)


@pytest.mark.parametrize("text", ["", "garbage", '["y"]', "3", "[" * 100_000])
def test_states_that_are_no_table_are_refused(text: str) -> None:
    made = model(TEXT)
    made.metadata_props["mc_opt.states"] = text
    with pytest.raises(ir.IRError, match=r"metadata mc_opt.states: it cannot be read, expected a JSON object of names"):
        ir.states_of(made)


@pytest.mark.parametrize("text", ["", "garbage", '{"a": 1}', '["2"]', "[true]", "[null]"])
def test_ends_that_are_no_tokens_are_refused(text: str) -> None:
    made = model(TEXT)
    made.metadata_props["mc_opt.end_tokens"] = text
    with pytest.raises(ir.IRError, match=r"metadata mc_opt.end_tokens: it cannot be read, expected a JSON list"):
        ir.end_tokens(made)


def captured() -> onnx_ir.Model:
    made = model(TEXT)
    made.metadata_props["mc_opt.end_tokens"] = "[]"
    return made


def test_the_tokenizer_beside_a_language_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert ir.tokenizer_beside(tmp_path / "model.onnx", captured()) == "{}"
    assert ir.tokenizer_beside(tmp_path / "model.onnx", model(TEXT)) is None


def test_a_tokenizer_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ir.IRError, match="it leads out of the model's folder"):
        ir.tokenizer_beside(tmp_path / "model" / "model.onnx", captured())


def test_a_tokenizer_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ir.IRError, match="it is no UTF-8 text"):
        ir.tokenizer_beside(tmp_path / "model.onnx", captured())
