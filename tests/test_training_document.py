"""The loop that docs/training.md teaches works as it stands there, and the document names every option."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, passes

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.ci
def test_a_loop_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "docs/training.md", "exec"), {})
    with np.load("examples/digits/digits-heldout.npz") as held_out:
        session = ir.Session(Path("out/small.onnx"))
        scores = [next(iter(session.run({"image": image[None]}).values())) for image in held_out["image"]]
        accuracy = (np.concatenate(scores).argmax(1) == held_out["label"]).mean()
    assert accuracy > 0.97  # 99.56 % before
    assert Path("out/small.onnx").stat().st_size < 50_000  # 162.6 kB before


def test_its_recipe_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    recipe = passes.Recipe.parse(text)
    assert recipe.training is not None and recipe.training.parameters == ("forms", "*.bias")
    assert [str(p) for p in recipe.pipeline.passes] == ["denseshift{bits=3}"]


@pytest.mark.torch
def test_it_names_every_term_of_a_loss() -> None:
    pytest.importorskip("torch")
    from mc_opt.passes._train_loss import TERMS

    table = re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE)
    assert set(TERMS) <= set(table)
