"""Layers with half the multiplications beside the dense layers, on x86: measured, interleaved, and predicted.

    python -m benchmarks.kron_speed                     every layer of the list, one thread
    python -m benchmarks.kron_speed --only resnet18 --structure pass
    python -m benchmarks.kron_speed --held-out

A layer is measured as copies side by side on one input, with a weight each, so that the call and the change of layout
at the model's border weigh little; results are added up, of convolutions to the mean of each channel. Each layer comes
as `sekron{flops=0.5}` makes it of seeded normal weights (whose spectrum is flat, so that the structure is chosen by its
size and time), and in other structures beside it, of the largest rank that leaves at most half of the dense
multiplications. The speed-up is dense over factored in one interleaved run, as `mc-opt bench` measures it, of the
processor's time: other work on the machine takes turns. `--held-out` takes layers of other sizes, to which nothing of
the kernels or prices was fitted.
Predicted times are those of `targets.predicted_time`.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from mc_opt import ir, passes, targets
from mc_opt.tools import _timing

COPIES = 4
FASTER = 1.3
CLOSE = 1.5
PLANNED = "the pass"

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A dense layer: `size` is the side of the input, or the rows of a linear layer, whose kernel is 0."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    size: int
    stride: int = 1

    @property
    def positions(self) -> int:
        """Output positions."""
        return (self.size // self.stride) ** 2 if self.kernel else self.size

    @property
    def dense(self) -> tuple[int, ...]:
        """The weight's shape."""
        return (self.outputs, self.inputs, *[self.kernel] * (2 if self.kernel else 0))


LAYERS = (
    Layer("resnet18 layer1", 64, 64, 3, 56),
    Layer("resnet18 layer2", 128, 128, 3, 28),
    Layer("resnet18 layer3.0", 128, 256, 3, 28, 2),
    Layer("resnet18 layer3", 256, 256, 3, 14),
    Layer("resnet18 layer4", 512, 512, 3, 7),
    Layer("resnet50 layer1 reduce", 256, 64, 1, 56),
    Layer("resnet50 layer1 expand", 64, 256, 1, 56),
    Layer("resnet50 layer2 reduce", 512, 128, 1, 28),
    Layer("resnet50 layer3 expand", 256, 1024, 1, 14),
    Layer("resnet50 layer4 reduce", 2048, 512, 1, 7),
    Layer("efficientnet-lite0 expand", 112, 672, 1, 14),
    Layer("efficientnet-lite0 project", 672, 112, 1, 14),
    Layer("efficientnet-lite0 head", 320, 1280, 1, 7),
    Layer("pp-ocr det neck", 96, 24, 3, 80),
    Layer("pp-ocr det backbone", 192, 192, 1, 40),
    Layer("pp-ocr rec backbone", 480, 480, 1, 12),
    Layer("bert attention, 64 rows", 768, 768, 0, 64),
    Layer("bert attention, 256 rows", 768, 768, 0, 256),
    Layer("bert feed-forward, 64 rows", 768, 3072, 0, 64),
    Layer("bert feed-forward, 128 rows", 3072, 768, 0, 128),
    Layer("bert feed-forward, 256 rows", 768, 3072, 0, 256),
    Layer("minilm feed-forward, 128 rows", 384, 1536, 0, 128),
)

# Other sizes than those of the list, small and large, even and odd.
HELD_OUT = (
    Layer("48 to 96, 40 x 40", 48, 96, 3, 40),
    Layer("96 to 96, 20 x 20", 96, 96, 3, 20),
    Layer("80 to 80, 32 x 32", 80, 80, 3, 32),
    Layer("128 to 128, 56 x 56", 128, 128, 3, 56),
    Layer("512 to 256, 14 x 14, strided", 512, 256, 3, 14, 2),
    Layer("160 to 320, 28 x 28", 160, 320, 1, 28),
    Layer("320 to 160, 20 x 20", 320, 160, 1, 20),
    Layer("24 to 144, 56 x 56", 24, 144, 1, 56),
    Layer("768 to 192, 14 x 14", 768, 192, 1, 14),
    Layer("40 to 240, 28 x 28", 40, 240, 1, 28),
    Layer("512 to 512, 32 rows", 512, 512, 0, 32),
    Layer("1024 to 4096, 128 rows", 1024, 4096, 0, 128),
    Layer("640 to 2560, 96 rows", 640, 2560, 0, 96),
    Layer("384 to 384, 200 rows", 384, 384, 0, 200),
    Layer("4096 to 1024, 16 rows", 4096, 1024, 0, 16),
)


def structures(layer: Layer) -> Iterator[tuple[str, Callable[[int], tuple[Shapes, int]]]]:
    """Name, and the factors' shapes and number of rank axes for a rank."""
    m, n, k = layer.outputs, layer.inputs, layer.kernel
    one, taps = (1,) * (2 if k else 0), (k,) * (2 if k else 0)
    yield "low rank", lambda r: ([(r, m, 1, *one), (r, 1, n, *taps)], 1)
    if k > 1:
        yield "tucker", lambda r: ([(1, r, m, 1, *one), (r, r, 1, 1, *taps), (r, 1, 1, n, *one)], 2)
    yield "kronecker 4x1", lambda r: ([(r, m // 4, 1, *one), (r, 4, n, *taps)], 1)
    yield "kronecker 1x4", lambda r: ([(r, m, 4, *one), (r, 1, n // 4, *taps)], 1)
    yield "kronecker 4x4", lambda r: ([(r, m // 4, 4, *one), (r, 4, n // 4, *taps)], 1)


def multiplications(layer: Layer, shapes: Shapes, ranks: int) -> float:
    """Those of the chain over those of the dense layer."""
    work = ir.factored_work(shapes, ranks, outputs=layer.positions, inputs=places(layer))
    return work.mul / ir.dense_work(layer.dense, outputs=layer.positions).mul


def places(layer: Layer) -> int:
    """Input positions."""
    return layer.size**2 if layer.kernel else layer.size


def planned(layer: Layer, target: targets.Target) -> tuple[Shapes, int] | None:
    """What the pass makes of the layer, the factors' shapes and the number of rank axes; None where it declines."""
    model = model_of(layer, None, copies=1)
    result = passes.run(model, passes.Pipeline.parse("sekron{flops=0.5}"), passes.Context(target=target))
    for node in result.model.graph:
        if node.op_type in ("SeKronConv", "KronLinear"):
            shapes = [tuple(int(d) for d in v.shape) for v in node.inputs[2:] if v is not None and v.shape is not None]
            return shapes, len(shapes[0]) - (4 if layer.kernel else 2)
    return None


def candidates(layer: Layer, target: targets.Target) -> Iterator[tuple[str, Shapes, int]]:
    """What the pass chooses, then every structure at the largest rank with at most half of the multiplications."""
    found = planned(layer, target)
    if found is not None:
        yield PLANNED, *found
    for name, make in structures(layer):
        rank = 1
        if multiplications(layer, *make(rank)) > 0.5:
            continue
        while multiplications(layer, *make(rank + 1)) <= 0.5:
            rank += 1
        # Ranks of whole vectors, where there are many; a pass rounds so as well.
        rank -= rank % 8 if rank > 32 else 0
        yield name, *make(rank)


def model_of(layer: Layer, shapes: Shapes | None, *, copies: int = COPIES) -> onnx_ir.Model:
    """Copies of the layer on one input, added up; `shapes` are the factors', None for the dense layer."""
    rng = np.random.default_rng(0)
    n = 2 if layer.kernel else 0
    pad, stride = layer.kernel // 2, layer.stride
    size = (layer.size,) * 2 if n else (layer.size,)
    given = (1, layer.inputs, *size) if n else (*size, layer.inputs)
    out = (layer.size // stride,) * 2 if n else size
    made = (1, layer.outputs, *out) if n else (*out, layer.outputs)
    x, total = _value("x", given), None
    nodes, constants = [], []
    for copy in range(copies):
        arrays = [rng.standard_normal(s) for s in (shapes or [layer.dense if n else layer.dense[::-1]])]
        weights = [_value(f"w{copy}.{k}", a.shape, (a / a.size**0.5).astype(np.float32)) for k, a in enumerate(arrays)]
        window = {"strides": [stride] * n, "dilations": [1] * n, "pads": [pad] * 2 * n} if n else {}
        y = _value(f"y{copy}", made)
        if shapes is None:
            node = onnx_ir.node("Conv" if n else "MatMul", [x, *weights], window, outputs=[y], name=f"n{copy}")
        else:
            window |= {"group": 1} if n else {}
            op_type = "SeKronConv" if n else "KronLinear"
            node = ir.node(op_type, [x, None, *weights], window, name=f"n{copy}", output=f"y{copy}")
        nodes.append(node)
        constants += weights
        if total is None:
            total = node.outputs[0]
            continue
        nodes.append(onnx_ir.node("Add", [node.outputs[0], total], outputs=[_value(f"t{copy}", made)], name=f"a{copy}"))
        total = nodes[-1].outputs[0]
    assert total is not None
    if n:
        end = _value("mean", (1, layer.outputs, 1, 1))
        nodes.append(onnx_ir.node("GlobalAveragePool", [total], outputs=[end], name="mean"))
        total = end
    graph = onnx_ir.Graph([x], [total], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    model = onnx_ir.Model(graph, ir_version=10)
    ir.add_functions(model)
    return model


def _value(name: str, shape: tuple[int, ...], array: np.ndarray | None = None) -> onnx_ir.Value:
    return onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        shape=onnx_ir.Shape(shape),
        const_value=None if array is None else onnx_ir.tensor(array),
    )


def compiled(model: onnx_ir.Model, target: targets.Target, folder: Path) -> Any:
    """The artefact."""
    folder.mkdir()
    target.compile(model, folder, lambda *_: None)
    return targets.load_artefact(folder)


@dataclass(frozen=True)
class Result:
    """One structure of a layer; times are microseconds of one copy."""

    layer: str
    structure: str
    share: float
    speedup: float
    measured: tuple[float, float]
    predicted: tuple[float, float]
    shapes: str


def measure(layer: Layer, target: targets.Target, rounds: int, only: str) -> Iterator[Result]:
    """The structures of a layer whose names contain `only` beside the dense one."""
    found = {name: (shapes, ranks) for name, shapes, ranks in candidates(layer, target) if only in name}
    if not found:
        print(f"{layer.name:31}declined")
        return
    models: dict[str, Shapes | None] = {"dense": None, **{name: shapes for name, (shapes, _) in found.items()}}
    shape = (1, layer.inputs, layer.size, layer.size) if layer.kernel else (layer.size, layer.inputs)
    x: np.ndarray = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        runs: dict[str, Callable[[], object]] = {}
        for number, (name, shapes) in enumerate(models.items()):
            artefact = compiled(model_of(layer, shapes), target, Path(scratch) / str(number))
            runs[name] = functools.partial(artefact.run, {"x": x})
        times = _timing.interleave(runs, rounds=rounds, batch=0.01, clock=time.process_time)
    dense = predicted(layer, [layer.dense], 0, target)
    for name, (shapes, ranks) in found.items():
        yield Result(
            layer.name,
            name,
            multiplications(layer, shapes, ranks),
            _timing.ratio(times["dense"], times[name]).value,
            (times["dense"].median * 1e3 / COPIES, times[name].median * 1e3 / COPIES),
            (dense, predicted(layer, shapes, ranks, target)),
            " ".join("x".join(map(str, shape)) for shape in shapes),
        )


def predicted(layer: Layer, shapes: Shapes, ranks: int, target: targets.Target) -> float:
    """Microseconds."""
    return 1e-3 * float(
        targets.predicted_time(shapes, ranks, outputs=layer.positions, inputs=places(layer), price=target.price)
    )


def line(r: Result) -> str:
    """A result as text; speed-ups and times measured, then predicted."""
    expected = r.predicted[0] / r.predicted[1]
    return (
        f"{r.layer:31}{r.structure:15}{r.share:5.2f}{r.speedup:10.2f}{expected:10.2f}"
        f"{r.measured[0]:10.1f}{r.measured[1]:10.1f}{r.predicted[1]:10.1f}  {r.shapes}"
    )


def summary(results: list[Result]) -> None:
    """How many keep the two bounds; a machine that others share runs slower by the factor of its dense layers."""
    dense = {r.layer: r.measured[0] / r.predicted[0] for r in results}
    scale = statistics.median(dense.values())
    for title, some in ((PLANNED, [r for r in results if r.structure == PLANNED]), ("all structures", results)):
        fast = sum(r.speedup >= FASTER for r in some)
        close = [sum(_off(r, by) <= CLOSE for r in some) for by in (1.0, scale)]
        print(f"{title}: faster on {sum(r.speedup > 1 for r in some)}, {FASTER} times on {fast} of {len(some)}")
        print(f"  time within {CLOSE} of the predicted: {close[0]}; of {scale:.2f} times the predicted: {close[1]}")
    near = sum(max(q, 1 / q) <= CLOSE for q in dense.values())
    print(f"dense layers: {scale:.2f} times the predicted in the middle, within {CLOSE} of it: {near} of {len(dense)}")


def _off(r: Result, scale: float) -> float:
    ratio = r.measured[1] / (scale * r.predicted[1])
    return max(ratio, 1 / ratio)


def main() -> None:
    """Parse the command line and measure."""
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--structure", default="", help="only structures whose name contains this")
    parser.add_argument("--held-out", action="store_true", help="layers of other sizes in place of the list")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    target = targets.parse_target(arguments.target)
    results: list[Result] = []
    words = ("speed-up", "predicted", "dense us", "us", "predicted")
    print(f"{'layer':31}{'structure':15}{'mul':>5}{''.join(f'{word:>10}' for word in words)}  factors")
    for layer in HELD_OUT if arguments.held_out else LAYERS:
        for result in (
            measure(layer, target, arguments.rounds, arguments.structure) if arguments.only in layer.name else ()
        ):
            results.append(result)
            print(line(result), flush=True)
    summary(results)


if __name__ == "__main__":
    main()
