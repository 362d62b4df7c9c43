"""ResNet-18 and MiniLM, plain and compressed, through NVIDIA's assembler; nothing here is executed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

import mc_opt
from mc_opt.targets import _cuda

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.tvm, pytest.mark.zig, pytest.mark.torch]

MODELS = ("resnet18", "minilm")
RECIPES = ("fold-batch-norm", "fold-batch-norm,denseshift", "fold-batch-norm,sekron,denseshift")


@functools.cache
def _compressed(name: str, recipe: str) -> Any:
    from benchmarks.cuda import MODELS as SOURCES

    return mc_opt.compress(SOURCES[name](), recipe, target="cuda")[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_is_assembled_and_none_is_executed(name: str, recipe: str, arch: str, tmp_path: Path) -> None:
    if _cuda.nvcc() is None:
        pytest.skip("nvcc is not here: no kernel was assembled")
    from benchmarks.cuda import assemble

    kernels, _, _ = assemble(_compressed(name, recipe), arch, tmp_path)
    assert kernels >= 15
