"""Capturing language models: the same logits as transformers, step by step on a cache that stays in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir
from tests._language_model import greedy, save_tiny, tiny_llama

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.ci]


@pytest.fixture(scope="module")
def made() -> tuple[Any, onnx_ir.Model]:
    module = tiny_llama()
    return module, ir.capture_causal_lm(module, max_length=24)


def test_interface(made: tuple[Any, onnx_ir.Model]) -> None:
    _, model = made
    ir.verify(model)
    states = ir.states_of(model)
    assert [v.name for v in model.graph.inputs] == ["input_ids", "position", *states.values()]
    assert [v.name for v in model.graph.outputs] == ["logits", *states]
    assert states["present.1.value"] == "past.1.value"
    assert tuple(model.graph.inputs[2].shape) == (1, 2, 24, 16)
    assert ir.end_tokens(model) == (255,)
    assert ir.written_in_place(model, states) == set(states.values())


def test_embedding_and_head_are_one_weight(made: tuple[Any, onnx_ir.Model]) -> None:
    _, model = made
    sites = {s.name: s for s in ir.weight_sites(model) if isinstance(s, ir.WeightSite)}
    assert sorted(node.op_type for node, _ in sites["lm_head.weight"].consumers) == ["Gather", "Gemm"]
    assert len(sites) == 2 * 7 + 1


@pytest.mark.parametrize("in_place", [True, False])
def test_greedy_text_is_that_of_transformers(made: tuple[Any, onnx_ir.Model], in_place: bool) -> None:
    module, model = made
    states, prompt = ir.states_of(model), [5, 250, 17, 3]
    written = ir.written_in_place(model, states) if in_place else frozenset[str]()
    steps = ir.Stream(ir.Session(model), states, in_place=written)
    tokens, position, found = prompt, 0, []
    for _ in range(12):
        outputs = steps.run({"input_ids": np.array([tokens]), "position": np.array([position])})
        assert list(outputs) == ["logits"]
        position += len(tokens)
        tokens = [int(outputs["logits"][0].argmax())]
        found += tokens
    assert found == greedy(module, prompt, 12)


def test_the_module_stays_as_it_was(made: tuple[Any, onnx_ir.Model]) -> None:
    module, _ = made
    assert module.config._attn_implementation == "sdpa"


def test_metadata_outlives_a_file_and_passes(made: tuple[Any, onnx_ir.Model], tmp_path: Any) -> None:
    import mc_opt

    _, model = made
    small, _ = mc_opt.compress(model, "denseshift{bits=4 group_size=16 skip=}")
    ir.save_model(small, tmp_path / "model.onnx")
    again = ir.load_model(tmp_path / "model.onnx")
    assert ir.states_of(again) == ir.states_of(model)
    assert json.loads(again.metadata_props["mc_opt.end_tokens"]) == [255]


def test_too_long_a_cache_is_refused() -> None:
    with pytest.raises(ir.OptionError, match="max_length 65: expected 2 to 64"):
        ir.capture_causal_lm(tiny_llama(), max_length=65)


def test_another_architecture_is_refused_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that scales its logits, as some architectures' do, is not what was captured."""
    module = tiny_llama(num_hidden_layers=1)
    forward = module.forward

    def scaled(*args: Any, **options: Any) -> Any:
        found = forward(*args, **options)
        found.logits = found.logits * 0.5
        return found

    monkeypatch.setattr(module, "forward", scaled)
    with pytest.raises(ir.IRError, match=r"its logits are .* of their range off, expected 1e-04 at most"):
        ir.capture_causal_lm(module, max_length=16)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    module = tiny_llama(num_hidden_layers=1)
    save_tiny(module, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ir.IRError, match="transformers cannot load it"):
        ir.from_transformers(tmp_path, max_length=16)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ir.IRError, match="transformers cannot load it"):
        ir.from_transformers(tmp_path, max_length=16)
    assert not (tmp_path / "ran").exists()
