"""Products of a few rows with one packed weight beside ONNX Runtime: `python -m benchmarks._speed_gemv REQUEST`.

y [rows, outputs] = x [rows, inputs] · W; every contender has the weight that the 4-bit codes decode to, but the 2-bit
ones and what ONNX Runtime quantises again. Prints JSON as benchmarks/_speed_cell.py does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _speed_forms as forms
from benchmarks import _speed_machine as machine
from benchmarks import _speed_table as tables
from mc_opt.targets._machine import Activations
from mc_opt.tools import _timing

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 16, 64)
FLOAT, NIBBLES, NIBBLES_INT8, INT8 = "fp32", "MatMulNBits", "MatMulNBits int8", "dynamic int8"
LARGE_BLOCKS = "MatMulNBits int8, blocks of 128"
FOUR, GROUPED, TWO = "4 bits", "4 bits, groups of 64", "2 bits"
FOUR_INT8, GROUPED_INT8, TWO_INT8 = (f"{name}, int8" for name in (FOUR, GROUPED, TWO))
# The processor that artefacts are built for unless the command names one.
_NATIVE = "native"
# Bits, rows of a group (0 for all of a column), and what becomes of the activations.
PACKED: dict[str, tuple[int, int, Activations]] = {
    **{FOUR: (4, 0, "float32"), GROUPED: (4, 64, "float32"), TWO: (2, 0, "float32")},
    **{FOUR_INT8: (4, 0, "int8"), GROUPED_INT8: (4, 64, "int8"), TWO_INT8: (2, 0, "int8")},
}
# MatMulNBits' forms: accuracy level (4 rounds activations to 8 bits) and rows of a block.
_NIBBLES: dict[str, tuple[int | None, int]] = {NIBBLES: (None, 32), NIBBLES_INT8: (4, 32), LARGE_BLOCKS: (4, 128)}
# What must be so many times faster than what, by the number of rows; aims after the slash of the issue.
_BARS: dict[int, tuple[tuple[str, str, float, float], ...]] = {
    1: (
        *((FOUR, FLOAT, 5.5, 7.0), (FOUR, NIBBLES, 2.3, 3.0)),
        *((FOUR_INT8, NIBBLES_INT8, 1.2, 1.5), (FOUR_INT8, LARGE_BLOCKS, 1.2, 1.5)),
        *((TWO, FOUR, 1.0, 1.0), (TWO_INT8, FOUR_INT8, 1.3, 1.3)),
    ),
    # Within 1.3 times of the time of int8.
    16: ((FOUR, FLOAT, 1.0, 1.0), (FOUR_INT8, INT8, 0.77, 0.77)),
    64: ((FOUR, FLOAT, 1.0, 1.0), (FOUR_INT8, INT8, 0.77, 0.77)),
}


@dataclass(frozen=True)
class Request:
    """One product: its extents, the threads and the rounds of the interleaved run, and what it is built for."""

    outputs: int
    inputs: int
    rows: int
    threads: int
    rounds: int
    cache: str
    cpu: str

    def text(self) -> str:
        """The argument of the process that measures it."""
        return json.dumps(asdict(self))


def measure(request: Request, tell: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Times of every contender, and how near its limit the 4-bit kernel is."""
    folder = Path(request.cache) / f"gemv-{request.outputs}x{request.inputs}-{request.rows}-{request.cpu}"
    folder.mkdir(parents=True, exist_ok=True)
    limits = machine.measure(request.threads, Path(request.cache))
    rng = np.random.default_rng(0)
    sample = {"x": rng.standard_normal((request.rows, request.inputs)).astype(np.float32)}
    runs: dict[str, forms.Opened] = {}
    for name in PACKED:
        tell(0, 0, f"build {name}")
        runs[name] = _packed(request, folder, name, sample)
    tell(0, 0, "ONNX Runtime's forms")
    runs |= _others(request, folder, sample)
    wanted = runs[FLOAT].outputs()[0]
    differences = {name: float(np.abs(r.outputs()[0] - wanted).max() / np.ptp(wanted)) for name, r in runs.items()}
    calls = {name: opened.run for name, opened in runs.items()}

    def settle(name: str) -> None:
        time.sleep(0.01 if request.threads > 1 else 0.0)
        calls[name]()

    series = _timing.interleave(calls, rounds=request.rounds, before=settle, progress=tell)
    shares = {}
    if request.threads == 1 and request.rows == 1 and request.cpu == _NATIVE:
        from benchmarks import _speed_kernels as kernels

        for name in PACKED:
            tell(0, 0, f"kernel of {name}")
            place = _place(folder, name)
            found = kernels.profile(place / "source.onnx", "", place, sample, limits, activations=PACKED[name][2])
            main = next(kernel for kernel in found["kernels"] if "share" in kernel)
            shares[name] = {key: main[key] for key in ("ms", "share", "bound", "constants")}
    return {
        **asdict(request),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "load": os.getloadavg()[0],
        "machine": limits.to_json(),
        "contenders": {
            name: {"ms": list(found.milliseconds), "detail": "", "difference": differences[name]}
            for name, found in series.items()
        },
        "shares": shares,
    }


def _codes(request: Request, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [outputs, inputs], a codebook of signed powers of two, and scales [outputs, groups]."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (request.outputs, request.inputs)).astype(np.uint8)
    half = 1 << (bits - 1)
    book = np.array([sign * 2.0**k for sign in (1, -1) for k in range(half)], np.float32)
    groups = request.inputs // group if group else 1
    scales = rng.uniform(0.5, 1.5, (request.outputs, groups)).astype(np.float32)
    return codes, book, scales / np.float32(half * request.inputs**0.5)


def _place(folder: Path, name: str) -> Path:
    """The folder of a contender's artefact."""
    return folder / name.replace(", ", "-").replace(" ", "-")


def _packed(request: Request, folder: Path, name: str, sample: dict[str, np.ndarray]) -> forms.Opened:
    """The artefact of a packed weight."""
    import onnx
    import onnx_ir

    import mc_opt
    from mc_opt import ir

    bits, group, activations = PACKED[name]
    place = _place(folder, name)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "mc_opt": 1]>
        g (float[{request.rows},{request.inputs}] x) => (float[{request.rows},{request.outputs}] y)
        <float[{request.inputs},{request.outputs}] w> {{
            w = mc_opt.Lookup<bits={bits}, shape=[{request.inputs}, {request.outputs}], axes=[1],
                group_size={group}>(codes, book, scale)
            y = MatMul(x, w) }}"""
    )
    codes, book, scale = _codes(request, bits, group)
    weights = {"codes": ir.pack_codes(codes, bits), "book": book, "scale": scale}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    model = onnx_ir.from_proto(proto)
    ir.add_functions(model)
    target = f"x86{{cpu={request.cpu} threads={request.threads} activations={activations}}}"
    mc_opt.build(model, target, place, check="structure")
    mc_opt.save_model(model, place / "source.onnx")
    artefact = mc_opt.load(place)
    return forms.Opened(lambda: artefact.run(sample))


def _others(request: Request, folder: Path, sample: dict[str, np.ndarray]) -> dict[str, forms.Opened]:
    """The decoded 4-bit weight in fp32, and what ONNX Runtime quantises it to."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    codes, book, scale = _codes(request, 4, 0)
    weight = np.ascontiguousarray((book[codes] * scale).T)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[{request.rows},{request.inputs}] x) => (float[{request.rows},{request.outputs}] y) {{
            y = MatMul(x, w) }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save_model(proto, folder / "fp32.onnx")
    paths = {FLOAT: folder / "fp32.onnx"}
    for name, (level, block) in _NIBBLES.items():
        quantizer = MatMulNBitsQuantizer(
            onnx.load_model(folder / "fp32.onnx"), bits=4, block_size=block, is_symmetric=True, accuracy_level=level
        )
        quantizer.process()
        paths[name] = folder / f"{name}.onnx"
        onnx.save_model(quantizer.model.model, paths[name])
    paths[INT8] = folder / "int8.onnx"
    quantize_dynamic(paths[FLOAT], paths[INT8], per_channel=True, weight_type=QuantType.QInt8)
    opened = {name: forms.open_onnx(path, sample, request.threads) for name, path in paths.items()}
    for path in paths.values():  # hundreds of megabytes each, read by now
        path.unlink()
    return opened


def document(cells: Sequence[Mapping[str, Any]]) -> str:
    """The table of all products and what must hold of them."""
    names = (FLOAT, *_NIBBLES, INT8, *PACKED)
    rows, lines = [], []
    for cell in cells:
        title = f"{cell['outputs']}x{cell['inputs']}, {cell['rows']} rows, {tables.counted(cell['threads'])}"
        title += "" if cell["cpu"] == _NATIVE else f", built for {cell['cpu']}"
        medians = [tables.series(cell, name) for name in names]
        # ONNX Runtime takes what this processor has.
        is_judged = cell["threads"] == 1 and cell["cpu"] == _NATIVE
        rows.append([title, *(f"{found.median:.3f}" if found is not None else "—" for found in medians)])
        for ours, theirs, must, aim in _BARS[cell["rows"]] if is_judged else ():
            found = tables.ratio(cell, theirs, ours)
            assert found is not None  # every contender of a cell is there, or the cell failed
            judged = [f"{bar:g} {tables.verdict(found, bar, at_least=True)}" for bar in dict.fromkeys((must, aim))]
            lines.append(
                f"- {title}: {ours} {tables.ratio_text(found)} times faster than {theirs}: {', '.join(judged)}"
            )
        for name, share in cell["shares"].items():
            rate = share["constants"] / share["ms"] / 1e6
            lines.append(
                f"- {title}: {name}: kernel {share['ms']:.3f} ms, {rate:.1f} GB/s of weights,"
                f" {share['share']:.0%} of its limit ({share['bound']})"
            )
    head = ["Milliseconds of a call; ONNX Runtime's forms first, artefacts of packed weights behind them.", ""]
    return "\n".join([*head, *tables.table(("product", *names), rows), "", *lines]) + "\n"


def main() -> None:
    """Measure the product that the first argument describes."""

    def tell(done: int, total: int, what: str) -> None:
        print(json.dumps({"progress": [done, total, what]}), flush=True)

    cell = measure(Request(**json.loads(sys.argv[1])), tell)
    print(json.dumps({"cell": cell}), flush=True)


if __name__ == "__main__":
    main()
