"""`--from-transformers` and `run --generate`: from a folder of save_pretrained to text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests._language_model import greedy, save_tiny, tiny_llama
from tests.tools.conftest import Ran

pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.ci]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a tiny model, and what transformers adds to "hello"."""
    folder = tmp_path_factory.mktemp("tiny")
    module = tiny_llama()
    tokenizer = save_tiny(module, folder)
    prompt = tokenizer.encode("hello").ids
    return folder, tokenizer.decode([*prompt, *greedy(module, prompt, 12)])[5:]


def test_onnx(mc_opt: Callable[..., Ran], saved: tuple[Path, str], tmp_path: Path) -> None:
    folder, wanted = saved
    made = mc_opt("--from-transformers", folder, "--max-length", "24", "-o", tmp_path / "out")
    assert made.code == 0, made.err
    ran = mc_opt("run", tmp_path / "out", "--generate", "hello", "--tokens", "12")
    assert (ran.code, ran.out) == (0, wanted + "\n")
    assert "ONNX Runtime: 5 tokens read in" in ran.err
    again = mc_opt("run", tmp_path / "out/model.onnx", "--generate", "hello", "--tokens", "12", "--json")
    assert json.loads(again.out)["text"] == wanted
    # Beyond the cache there is no room: it ends after as many tokens as fit.
    full = mc_opt("run", tmp_path / "out", "--generate", "hello", "--tokens", "99", "--json")
    assert len(json.loads(full.out)["tokens"]) <= 20
    drawn = [
        mc_opt("run", tmp_path / "out", "--generate", "hello", "--temperature", "2", "--seed", seed, "--json").out
        for seed in (1, 1, 2)
    ]
    texts = [json.loads(text)["text"] for text in drawn]
    assert texts[0] == texts[1] != texts[2]
    again = mc_opt(tmp_path / "out/model.onnx", "--passes", "denseshift", "-o", tmp_path / "small")
    assert again.code == 0, again.err
    assert (tmp_path / "small/tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()


@pytest.mark.tvm
@pytest.mark.zig
def test_artefact(mc_opt: Callable[..., Ran], saved: tuple[Path, str], tmp_path: Path) -> None:
    folder, wanted = saved
    out = tmp_path / "out"
    words = ("--max-length", "24", "--target", "x86", "-o", out)
    made = mc_opt("--from-transformers", folder, *words)
    assert made.code == 0, made.err
    manifest = json.loads((out / "x86/manifest.json").read_text())
    assert manifest["states"]["present.0.key"] == "past.0.key"
    ran = mc_opt("run", out, "--generate", "hello", "--tokens", "12", "--json")
    answer: dict[str, Any] = json.loads(ran.out)
    assert answer["text"] == wanted
    assert answer["run_by"].startswith("x86{")
    # A prompt that goes in at once, as long as the cache but for the token that is asked for.
    assert manifest["prompt"] == 24
    texts = [
        json.loads(mc_opt("run", out, "--generate", "once upon a time, hello", "--tokens", "2", "--json", *more).out)
        for more in ((), ("--target", "onnx"))
    ]
    assert texts[0]["text"] == texts[1]["text"] and texts[0]["prompt_tokens"] == 23


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from-transformers", "nowhere", "-o", "out"), "expected a folder of save_pretrained or a .gguf file"),
        (("model.onnx", "--max-length", "9", "-o", "out"), "--max-length is the size of the cache"),
        (("--from-transformers", "a", "--from-torch", "b:c", "-o", "out"), "were both given; give one model"),
        (("run", "model.onnx", "--tokens", "3"), "belong to --generate"),
        (("run", "model.onnx", "--generate", "a", "--data", "x.npz"), "--generate makes its own inputs"),
    ],
)
def test_refusals(mc_opt: Callable[..., Ran], words: tuple[str, ...], message: str) -> None:
    ran = mc_opt(*words)
    assert ran.code != 0
    assert message in ran.error


def test_no_language_model(mc_opt: Callable[..., Ran], mlp: Path) -> None:
    assert "is no language model with a cache" in mc_opt("run", mlp, "--generate", "a").error
