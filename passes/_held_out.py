"""The samples that a training holds out: which they are, and those of files, which a run without data is judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._training import Training

_JUDGED = 64
"""Samples that drift is measured on: each runs alone, in three models, after every pass."""


def divide(numbers: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of samples to train on, and about `share` of all, at least one, held out; both rising."""
    held = min(max(round(len(numbers) * share), 1), len(numbers) - 1)
    order = np.random.default_rng(seed).permutation(numbers)
    return np.sort(order[held:]), np.sort(order[:held])


def is_divided(size: int, share: float) -> bool:
    """Whether so many samples are enough for a share of them to be held out."""
    return int(size * share) >= 1


def held_out_samples(
    training: Training | None, model: onnx_ir.Model, *, seed: int, states: Mapping[str, str]
) -> ir.Data | None:
    """The first of the held-out samples, where they are in files.

    None without a training, with recurrent states, which a training does not feed back, and where samples are not to
    be had without torch.

    Raises:
        DataError: they do not fit the model.
    """
    if training is None or states:
        return None
    place = training.data if training.held_out is None else training.held_out
    if not isinstance(place, str | Path) or not Path(place).exists():
        return None
    data = ir.load_data(place, model)
    numbers = np.arange(data.size)
    if training.held_out is None:
        if not is_divided(data.size, training.holdout):
            return None
        _, numbers = divide(numbers, training.holdout, seed)
    row = data.row
    if row is None:
        return None
    chosen = numbers[:_JUDGED].tolist()
    return dataclasses.replace(data, walk=lambda: map(row, chosen), size=len(chosen), row=None, fingerprint="")
