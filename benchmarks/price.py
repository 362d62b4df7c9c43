"""Measures what a unit of each kind of work costs on one core of this machine: the numbers of `X86.price`.

    python benchmarks/price.py

Each kind is a loop of TVM's own vector code over data that fits the first-level cache, but for `lookup`, which is the
kernel of a packed weight, and `bytes`, which reads a block from memory.
Prints nanoseconds a unit, best of 20, and the processor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import tvm
from tvm import s_tir, te, tirx

from mc_opt import ir, targets
from mc_opt.targets import _build, _machine

ELEMENTS = 2048
REPEATS = 256
LARGE = 1 << 26


def kernel(kind: str) -> Any:
    """y[i] = Σ_k f(y, x[k], w[i]): `REPEATS` units of work an element."""
    dtype = "float32" if kind in ("mul", "add") else "int32"
    x = te.placeholder((REPEATS,), dtype, name="x")
    w = te.placeholder((ELEMENTS,), dtype, name="w")
    k = te.reduce_axis((0, REPEATS), name="k")
    unit: dict[str, Callable[[Any, Any], Any]] = {
        "mul": lambda a, b: a * b,  # with the sum's addition: one fused multiply-add
        "add": lambda a, b: a + b,
        "shift": lambda a, b: b << (a & 15),
        "xnor": lambda a, b: tirx.popcount(~(a ^ b)),
    }
    y = te.compute((ELEMENTS,), lambda i: te.sum(unit[kind](x[k], w[i]), axis=k), name="y")
    return te.create_prim_func([x, w, y])


def lookup() -> float:
    """Nanoseconds a lookup of the kernel that multiplies a vector by a 4-bit weight, its multiply-add included."""
    rows, columns = 4096, 1024  # 2 MiB of codes: in the second-level cache
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "mc_opt": 1]>
        g (float[1,{columns}] x) => (float[1,{rows}] y) {{
            w = mc_opt.Lookup<bits=4, shape=[{columns}, {rows}], axes=[1], group_size=0>(codes, book, scale)
            y = MatMul(x, w) }}"""
    )
    weights = {
        "codes": ir.pack_codes(rng.integers(0, 16, (rows, columns)).astype(np.uint8), 4),
        "book": rng.standard_normal(16).astype(np.float32),
        "scale": np.ones((rows, 1), np.float32),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    model = onnx_ir.from_proto(proto)
    ir.add_functions(model)
    with tempfile.TemporaryDirectory() as folder:
        targets.parse_target("x86").compile(model, Path(folder), lambda *_: None)
        artefact = targets.load_artefact(Path(folder))
        x = {"x": rng.standard_normal((1, columns)).astype(np.float32)}
        return best(lambda: artefact.run(x)) / (rows * columns) * 1e9


def compiled(function: Any, machine: _machine.Machine) -> Any:
    """The function, eight vectors of elements at a time."""
    schedule = s_tir.Schedule(function)
    block = schedule.get_sblock("y")
    i, k = schedule.get_loops(block)
    outer, middle, inner = schedule.split(i, [None, 8, machine.lanes])
    schedule.reorder(outer, k, middle, inner)
    schedule.unroll(middle)
    schedule.vectorize(inner)
    schedule.decompose_reduction(block, k)
    return tvm.compile(schedule.mod, target=_build.llvm_target(machine))["main"]


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of 20 runs."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def price(function: Any, machine: _machine.Machine) -> float:
    """Nanoseconds a unit."""
    run = compiled(function, machine)
    rng = np.random.default_rng(0)
    types = [p.ty for p in function.params]
    arrays = [tvm.runtime.tensor(rng.integers(1, 9, [int(d) for d in t.shape]).astype(str(t.dtype))) for t in types]
    return best(lambda: run(*arrays)) / (ELEMENTS * REPEATS) * 1e9


def main() -> None:
    machine = _machine.native()
    print(f"{_machine.processor()} as {machine.cpu}, {machine.lanes} lanes, one thread; nanoseconds a unit")
    for kind in ("mul", "add", "shift", "xnor"):
        per_unit = price(kernel(kind), machine)
        # popcount compares 32 pairs of signs in one unit
        print(f"  {kind:7}{per_unit / (32 if kind == 'xnor' else 1):.5f}")
    print(f"  {'lookup':7}{lookup():.5f}")
    block = np.ones(LARGE // 8, np.int64)
    print(f"  {'bytes':7}{best(block.sum) / LARGE * 1e9:.5f}")


if __name__ == "__main__":
    main()
