"""Half of the filters of EfficientNet-lite0: smaller as predicted, equal to the masked model on real photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pruning import DENSE, EQUAL, PRUNE, difference, multiply_adds
from mc_opt import passes
from mc_opt.passes._channels_cost import cost_of
from mc_opt.passes.prune import Prune
from mc_opt.targets import find_target
from tests.models.catalogue import MODELS
from tests.passes.masked import masked

pytestmark = pytest.mark.models


def test_half_the_filters_go(public: Callable[..., Path]) -> None:
    net = next(model for model in MODELS if model.name == "efficientnet-lite0")
    root = public(*net.packages)
    context = passes.Context(check="structure")
    dense = passes.run(net.source(root), passes.Pipeline.parse(DENSE), context).model
    pipeline = passes.Pipeline.parse(PRUNE)
    small = passes.run(dense, pipeline, context).model
    step = pipeline.passes[0]
    assert isinstance(step, Prune)
    channels, groups, removed = step.plan(dense, passes.Context())
    assert all(removed[list(group.units)].mean() == 0.5 for group in groups)
    price = find_target("x86").price
    assert cost_of(dense, channels, "params", price).of(1.0 - removed) == passes.size_of(small).parameters
    assert cost_of(dense, channels, "macs", price).of(1.0 - removed) == multiply_adds(small)
    samples = [dict(inputs) for sequence in net.sequences(root) for inputs in sequence]
    worst, _ = difference(masked(dense, removed), small, samples)
    assert worst <= EQUAL
    assert np.isfinite(worst)
