"""One small model through the kernels in this process, beside ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import tvm
from onnx import parser, shape_inference
from tvm import relax

from mc_opt import ir
from mc_opt.targets import _machine
from mc_opt.targets._build import _linker, _pipeline, fuse, llvm_target
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import intrinsics, lower
from mc_opt.targets.kernels import _join, _schedule
from tests import _qemu

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
RNG_SCALE = 0.3
# What `check` builds for unless it is told of another than this one; tests of another processor set it.
CPU = "native"


@functools.cache
def machine(cpu: str = "native") -> Machine:
    """This processor, or one by its name; `cuda` stands for a GPU's kernels with loops in the place of threads."""
    if cpu == "cuda":
        return _machine.cuda(_machine.HOST)
    return _machine.native() if cpu == "native" else _machine.named(cpu)


@functools.cache
def _register() -> None:
    intrinsics.register()


def model(text: str, weights: Arrays | None = None) -> onnx.ModelProto:
    """A model from ONNX's text syntax, its weights added."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21, "mc_opt": 1]> {text}')
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def build(proto: onnx.ModelProto, target: Machine) -> tuple[relax.VirtualMachine, tvm.IRModule, list[str]]:
    """The model compiled and loaded; its scheduled module and the notes of its schedules."""
    executable, module, notes = compiled(proto, target)
    return relax.VirtualMachine(executable, tvm.cpu()), module, notes


def lowered_model(proto: onnx.ModelProto, target: Machine, tiles: Mapping[str, str] | None = None) -> lower.Lowered:
    """The model as Relax, with the tiles that a table chose."""
    return lower.lower(onnx_ir.from_proto(proto), target, lambda *_: None, tiles=tiles)


def compiled(
    proto: onnx.ModelProto, target: Machine, tiles: Mapping[str, str] | None = None
) -> tuple[tvm.relax.VMExecutable, tvm.IRModule, list[str]]:
    """The model compiled; its scheduled module and the notes of its schedules."""
    _register()
    lowered = lowered_model(proto, target, tiles)
    processor = machine() if target.kind == "cuda" else target
    with llvm_target(processor) as llvm:
        module = fuse(lowered.module)
        if target.kind != "cuda":
            module, _ = _join.join(module, processor)
        module, notes = _schedule.schedule(module, processor)
        executable = tvm.compile(module, target=llvm, relax_pipeline=_pipeline(), tir_pipeline=intrinsics.PIPELINE)
    return executable, module, [*lowered.fallbacks, *notes]


@contextmanager
def running(proto: onnx.ModelProto, target: Machine) -> Iterator[tuple[Run, list[str]]]:
    """The model as a function, and the notes of its schedules; ARM code runs under qemu."""
    if target.kind != "arm":
        loaded, _, notes = build(proto, target)
        yield lambda arrays: [t.numpy() for t in loaded["main"](*map(tvm.runtime.tensor, arrays))], notes
        return
    with tempfile.TemporaryDirectory() as place:
        path, notes = library(proto, target, Path(place))
        with _qemu.library(path, cpu=target.cpu) as call:
            yield call, notes


def library(proto: onnx.ModelProto, target: Machine, folder: Path) -> tuple[Path, list[str]]:
    """The model as model.so in `folder`, and the notes of its schedules."""
    executable, _, notes = compiled(proto, target)
    executable.export_library(str(folder / "model.so"), fcompile=_linker(), workspace_dir=str(folder))
    return folder / "model.so", notes


def feeds(proto: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Seeded values for the inputs, whose open dimensions have the given sizes."""
    rng = np.random.default_rng(1)
    result = {}
    for value in proto.graph.input:
        shape = [(sizes or {}).get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        floating = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        result[value.name] = (
            rng.standard_normal(shape).astype(np.float32) if floating else rng.integers(0, 3, shape).astype(np.int64)
        )
    return result


def reference(proto: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    """ONNX Runtime's outputs."""
    whole = onnx_ir.from_proto(shape_inference.infer_shapes(proto))
    ir.add_functions(whole)
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(whole).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(inputs)))


def check(
    text: str,
    weights: Arrays | None = None,
    *,
    cpu: str = "native",
    quiet: bool = True,
    sizes: Iterable[Mapping[str, int]] = ({},),
    threads: int = 1,
) -> None:
    """Kernels and ONNX Runtime agree within 1e-5 of the largest output: float32 sums in another order.

    One build runs with all `sizes` of the open dimensions.
    """
    proto = model(text, weights)
    with running(proto, dataclasses.replace(machine(CPU if cpu == "native" else cpu), threads=threads)) as (run, notes):
        for size in sizes:
            compare(proto, run, feeds(proto, size))
    if quiet:
        assert notes == [], notes


def compare(proto: onnx.ModelProto, run: Run, inputs: Arrays) -> None:
    """What was built gives ONNX Runtime's outputs."""
    wanted = reference(proto, inputs)
    got = run(list(inputs.values()))
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        assert a.shape == b.shape
        assert not np.isnan(b).any()
        if a.size:
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-3)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded weights."""
    return (np.random.default_rng(seed).standard_normal(shape) * RNG_SCALE).astype(np.float32)
