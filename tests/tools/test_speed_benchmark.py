"""The statistics, verdicts and tables of benchmarks/speed.py, and how it finds the loops of machine code."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks import _speed_ports as ports
from benchmarks import _speed_table as table
from benchmarks._speed_decode import Bound
from benchmarks._speed_forms import COMPRESSED, DENSE, FLOAT, SERIAL
from benchmarks._speed_machine import Limits
from mc_opt.tools._timing import Ratio, Series

LIMITS = Limits("a processor", (100.0, 160.0), {1: (150.0, 300.0), 16: (25.0, 40.0), 256: (12.0, 13.0)})


def cell(model: str, threads: int, **milliseconds: list[float]) -> dict[str, Any]:
    names = {"float": FLOAT, "dense": DENSE, "packed": COMPRESSED, "serial": SERIAL}
    entries = {names[k]: {"ms": ms, "detail": "", "difference": 1e-7} for k, ms in milliseconds.items()}
    kernels = {
        DENSE: {
            "ms": 1.0,
            "ports": True,
            "kernels": [
                {"name": "conv", "calls": 2, "ms": 0.8, "share": 0.5, "bound": "ports"}
                | {"flops": 4e7, "constants": 1e6, "activations": 1e6},
                {"name": "vm.builtin.alloc_tensor", "calls": 9, "ms": 0.1},
            ],
        }
    }
    return {
        "model": model,
        "threads": threads,
        "machine": LIMITS.to_json(),
        "contenders": entries,
        "reasons": {},
        "kernels": kernels if threads == 1 else {},
    }


def test_the_geometric_mean_is_of_the_medians() -> None:
    pairs = [(Series("a", (2.0,) * 8, 1), Series("b", (1.0,) * 8, 1)), (Series("a", (1.0,) * 8, 1),) * 2]
    mean = table.geometric_mean(pairs)
    assert mean.value == pytest.approx(2**0.5) and mean.low == pytest.approx(mean.high)


def test_the_geometric_mean_has_an_interval_from_all_models() -> None:
    noisy = Series("a", (1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.1, 1.0), 1)
    still = Series("b", (1.0,) * 8, 1)
    mean = table.geometric_mean([(noisy, still), (still, still)])
    assert mean.low < mean.value < mean.high
    assert mean.high / mean.low < (one := table.geometric_mean([(noisy, still)])).high / one.low


@pytest.mark.parametrize(
    ("found", "at_least", "said"),
    [
        (Ratio(0.9, 0.88, 0.92), False, "met"),
        (Ratio(1.1, 1.08, 1.12), False, "missed"),
        (Ratio(0.9, 0.80, 1.00), False, "not decided"),  # half of 0.2 is more than 5 % of 0.9
        (Ratio(0.9, 0.88, 0.92), True, "missed"),
        (Ratio(1.1, 1.08, 1.12), True, "met"),
    ],
)
def test_a_verdict_needs_a_narrow_interval(found: Ratio, at_least: bool, said: str) -> None:
    assert table.verdict(found, 1.0, at_least=at_least) == said


def test_the_gain_of_threads_is_beside_the_machines_own() -> None:
    found = table.gain(cell("m", 2, float=[2.0] * 6, dense=[1.0] * 6, serial=[1.6] * 6))
    assert found is not None and found.value == pytest.approx(1.0)
    assert table.gain(cell("m", 2, float=[2.0] * 6, dense=[1.0] * 6)) is None


def test_the_bandwidth_is_that_of_the_smallest_block_that_holds_it() -> None:
    assert [LIMITS.bandwidth(size) for size in (1000, 1 << 20, 2 << 20, 1 << 30)] == [150.0, 150.0, 25.0, 12.0]
    slower = Limits("a processor", (90.0, 170.0), dict.fromkeys(LIMITS.read, (9.0, 9.0)))
    assert LIMITS.best(slower) == Limits("a processor", (100.0, 170.0), LIMITS.read)
    assert LIMITS.bandwidth(1000, threads=2) == 300 and Limits.from_json(LIMITS.to_json()) == LIMITS


def test_the_document_says_ratios_verdicts_and_what_is_missing() -> None:
    cells = [
        cell("one", 1, float=[1.0] * 6, dense=[1.1] * 6, packed=[0.5] * 6),
        cell("two", 1, float=[1.0] * 6, dense=[1.4] * 6, packed=[0.5] * 6),
        cell("one", 2, float=[0.6] * 6, dense=[0.8] * 6, serial=[1.1] * 6),
    ]
    cells[0]["contenders"]["another"] = {"ms": [1.5] * 6, "detail": "", "difference": 0.1}
    for name, peak in ((FLOAT, 100.0), (COMPRESSED, 45.0)):
        cells[1]["contenders"][name]["memory"] = {"peak": peak, "imported": 1.0}
    cells[0]["contenders"][DENSE]["memory"] = {"peak": 120.4, "imported": 80.2}
    cells[1]["reasons"] = {"torch": "RuntimeError: no"}
    text = table.document(cells, aims={"one": 1.1, "two": None}, shares={"two": (0.6, 0.4)}, intro=["Where."])
    for line in (
        "- mc-opt dense, 1 thread, geometric mean of 2 models: 1.24 [1.24, 1.24];"
        " at most 1.05: missed; aim 0.85: missed",
        "- mc-opt dense, 1 thread, worst model: two 1.40 [1.40, 1.40]; at most 1.3: missed",
        "- mc-opt compressed, 1 thread, geometric mean of 2 models: 0.50 [0.50, 0.50]",
        "- one, 2 threads: 1.38 times faster than 1 thread, 0.86 [0.86, 0.86] of the machine's own 1.60;"
        " at least 0.85: met",
        "- two, 1 thread: mc-opt compressed takes 0.50 [0.50, 0.50] of ONNX Runtime fp32's time; at most 0.60: met;"
        " 0.45 of its peak memory, at most 0.40: missed",
        "- one, 1 thread: mc-opt compressed is 3.00 [3.00, 3.00] times as fast as another",
        "| one | 1 ms [1, 1] | — | — | 1.10 [1.10, 1.10] | 0.50 [0.50, 0.50] | 1.3 met, 1.1 met |",
        "| one | 1 | mc-opt dense | 1.1 ms [1.1, 1.1] | 1.0e-07 | 120 | 80 |",
        "- two, 1 thread: torch: RuntimeError: no",
        "**one, mc-opt dense**: 1.00 ms a run; kernels 0.90 ms at 50% of their limits; 0.10 ms of these in the virtual"
        " machine's own calls.",
        "| conv | 2 | 0.800 | 100 | 5.0 | 50% of ports |",
    ):
        assert line in text.splitlines(), line


CODE = """
0000000000001000 <__tvm_ffi_conv>:
    1000:\tcmp    $0x4,%edx
    1003:\tjmp    2000 <__tvm_ffi_conv+0x1000>
    2000:\txor    %eax,%eax
    2002:\tvmovups (%rdi),%zmm1
    2008:\tvfmadd231ps (%rsi){1to16},%zmm1,%zmm2
    200e:\tvfmadd231ps 0x4(%rsi){1to16},%zmm1,%zmm3        # 3000 <constant>
    2014:\tjne    2002 <__tvm_ffi_conv+0x1002>
    2016:\tcmp    %rcx,%rdx
    2019:\tjb     2000 <__tvm_ffi_conv+0x1000>
    201b:\tret
"""
SYMBOLS = "0000000000001000 0000000000000008 T __tvm_ffi_conv\n"


def test_the_main_loop_is_found_behind_the_kernels_symbol() -> None:
    ((name, lines),) = ports.functions(CODE, SYMBOLS)
    (loop,) = ports.innermost(lines)
    assert name == "conv" and len(lines) == 10 and len(loop) == 3
    assert ports.flops(loop) == 2 * 16 * 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("vfmadd231ps %ymm1,%ymm2,%ymm3", 16),
        ("vfnmadd213sd (%rax),%xmm1,%xmm0", 2),
        ("vfmadd132pd %zmm1,%zmm2,%zmm3{%k1}", 16),
        ("vaddps %zmm1,%zmm2,%zmm3", 0),
    ],
)
def test_multiply_adds_count_their_lanes(text: str, count: int) -> None:
    assert ports.flops([text]) == count


# What llvm-mca 14 prints of a permutation, a shift and a multiply-add of 512 bits, shortened.
REPORT = """Block RThroughput: 1.0

Resource pressure per iteration:
[0]    [1]    [2]    [3]    [4]    [5]    [6]    [7]    [8]    [9]
 -      -     1.50    -      -      -      -     1.50    -      -

Resource pressure by instruction:
"""


def test_a_loop_takes_as_long_as_its_busiest_port() -> None:
    assert ports.needed(REPORT) == 1.5
    assert ports.needed(REPORT.replace("Block RThroughput: 1.0", "Block RThroughput: 2.0")) == 2.0
    assert ports.needed("error: no assembly instructions found.") == 0


def test_a_state_bound_in_onnx_runtime_stays_there() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1] x, int64[1, 1] at, float[3] old) => (float[1] y, float[3] new)
    { new = ScatterND(old, at, x) y = ReduceSum(new) }"""
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    step = Bound(session, {"new": "old"})
    found = [step({"x": np.array([x], np.float32), "at": np.array([[at]])})[0][0] for x, at in ((1, 0), (2, 1), (5, 1))]
    assert found == [1, 3, 6]
