"""Which epoch a training keeps, and when it ends: what it is judged by, and an interrupt at its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.passes import _train
from tests._harness import to_bytes
from tests.passes.test_train import ATTENTION, NET, patterns, report_of, trained

LANGUAGE = ATTENTION.replace("float[8,3] head_w", "float[8,11] head_w").replace("[N,5,3] y", "[N,5,11] y")


def towards_zero(student: Mapping[str, Any], reference: Any, label: Any) -> Any:
    return student["y"].square().mean()


def test_the_original_is_no_aim_where_labels_or_a_function_say_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words, numbers = tmp_path / "words.npz", tmp_path / "numbers.npz"
    np.savez(words, ids=(np.arange(5) + rng.integers(0, 11, (64, 1))) % 11)
    x = rng.standard_normal((64, 1, 6, 6)).astype(np.float32)
    np.savez(numbers, x=x, label=x.mean((1, 2, 3))[:, None] * np.ones(4, np.float32))
    for data, text, loss in (
        (words, LANGUAGE, "labels{kind=next-token}"),
        (numbers, NET, "labels"),
        (numbers, NET, towards_zero),
    ):
        told = report_of(trained("fine-tune", data, text, loss=loss, epochs=6, lr=0.02, patience=2)[1])
        losses = [told.start.held_out if told.start else None, *(epoch.held_out for epoch in told.epochs)]
        assert told.metric != "accuracy" and told.best == int(np.argmin(np.array(losses, float))) > 0, loss


def test_patience_needs_held_out_samples(tmp_path: Path) -> None:
    for count, options in ((64, {"holdout": 0.0}), (9, {"holdout": 0.1})):
        with pytest.raises(ir.OptionError, match=f"patience=2: no sample of {count} is held out"):
            trained("fine-tune", patterns(tmp_path, count), patience=2, **options)


def test_an_interrupt_while_the_last_epoch_is_judged_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder, judged = patterns(tmp_path), tmp_path / "state", _train._Fit._judged

    def interrupted(fitting: Any, **arguments: Any) -> Any:
        if fitting.position.step == fitting.total:
            os.kill(os.getpid(), signal.SIGINT)
        return judged(fitting, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_train._Fit, "_judged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained("fine-tune", data, checkpoint=folder, checkpoint_every=1e9)
    again, _ = trained("fine-tune", data, checkpoint=folder)
    assert to_bytes(again) == to_bytes(trained("fine-tune", data)[0])
