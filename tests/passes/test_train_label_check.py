"""Labels are held to the classes of the output before anything is trained, and the sample is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.passes import _train
from tests.passes.test_train import patterns, trained


def spoiled(path: Path) -> dict[str, np.ndarray]:
    """The samples, of which number 60 is of a class too many: NET has four."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays["label"][60] = 4
    return arrays


@pytest.mark.parametrize("kind", ["file", "arrays", "batches", "held out"])
def test_a_class_too_many_is_told_before_the_first_step(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = spoiled(good := patterns(tmp_path))
    np.savez(tmp_path / "bad.npz", **arrays)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, 64, 16):
            yield {name: array[start : start + 16] for name, array in arrays.items()}

    given: dict[str, tuple[Any, dict[str, Any], str]] = {
        "file": (tmp_path / "bad.npz", {}, "bad.npz: sample 60"),
        "arrays": (arrays, {}, "dict: sample 60"),
        "batches": (batches, {}, "batches: batch 3"),
        "held out": (good, {"held_out": tmp_path / "bad.npz"}, "bad.npz: sample 60"),
    }
    data, options, where = given[kind]
    monkeypatch.setattr(_train._Fit, "run", lambda fitting: None)  # no step, no judgement
    text = f"{re.escape(where)}: label 4, expected a class below 4, as the output 'y' has; correct the labels"
    with pytest.raises(ir.DataError, match=text):
        trained("fine-tune", data, **options)
    trained("fine-tune", data, loss="output", **options)  # which asks nothing of labels
