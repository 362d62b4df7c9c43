"""Memory and time on a model far larger than a protobuf may be: a chain of MatMul layers, 2.5 GiB of external data.

    python -m benchmarks.big_model

Generates the model (weights <= 180 MB each), runs `mc-opt --check structure --target onnx` with `fold-constants` and
with `denseshift`, and prints the seconds and the peak of RssAnon + RssShmem summed over the process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

GIB = 2**30
WIDTH, HEIGHT = 4096, 10880  # 4096 x 10880 floats = 178 MB, below the 180 MB of the largest tensor


def generate(folder: Path, total: int) -> Path:
    """Write `big.onnx` and `big.data`: seeded MatMul layers [4096, 10880] and back, `total` bytes or a little more."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    layer_bytes = WIDTH * HEIGHT * 4
    count = -(-total // layer_bytes)
    nodes, initializers = [], []
    value, offset = "x", 0
    with open(folder / "big.data", "wb") as file:
        for index in range(count):
            shape = (WIDTH, HEIGHT) if index % 2 == 0 else (HEIGHT, WIDTH)
            for _ in range(16):
                block = rng.standard_normal((shape[0] // 16, shape[1]), dtype=np.float32) * np.float32(0.02)
                file.write(block.tobytes())
            tensor = onnx.TensorProto(name=f"layer{index}.weight", data_type=onnx.TensorProto.FLOAT, dims=shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, text in (("location", "big.data"), ("offset", str(offset)), ("length", str(layer_bytes))):
                tensor.external_data.add(key=key, value=text)
            initializers.append(tensor)
            output = "y" if index == count - 1 else f"hidden{index}"
            nodes.append(onnx.helper.make_node("MatMul", [value, tensor.name], [output], name=f"layer{index}"))
            value, offset = output, offset + layer_bytes
        file.flush()
        os.fsync(file.fileno())  # the runs shall not wait for the generator's writing
    width = HEIGHT if count % 2 else WIDTH
    graph = onnx.helper.make_graph(
        nodes,
        "big",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", width])],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (folder / "big.onnx").write_bytes(model.SerializeToString())
    return folder / "big.onnx"


def anonymous_bytes(pid: int) -> int:
    """RssAnon + RssShmem of the process and its descendants, in bytes."""
    total, pending = 0, [pid]
    while pending:
        current = pending.pop()
        try:
            status = Path(f"/proc/{current}/status").read_text()
            for task in Path(f"/proc/{current}/task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for row in status.splitlines():
            if row.startswith(("RssAnon:", "RssShmem:")):
                total += int(row.split()[1]) * 1024
    return total


def measure(arguments: list[str]) -> dict[str, float]:
    """Run `mc-opt` with `arguments`: seconds, and the peak of its anonymous memory in GiB (sampled every 5 ms)."""
    mc = str(Path(sys.executable).with_name("mc-opt"))
    start = time.perf_counter()
    process = subprocess.Popen([mc, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"mc-opt {' '.join(arguments)} ended with {process.returncode}: {process.stderr.read()}")
    return {"seconds": round(seconds, 1), "peak_gib": round(peak / GIB, 3)}


def main() -> int:
    """Print both measurements and their limits; exit 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, help="keep the model here, or use the one that is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "model"
        path = folder / "big.onnx"
        if not path.exists():
            path = generate(folder, int(options.gib * GIB))
        largest = WIDTH * HEIGHT * 4 / GIB
        limits = {"fold-constants": (15.0, 0.4), "denseshift": (float("inf"), 2 * largest + 0.5)}
        failed = False
        for passes, (seconds, peak) in limits.items():
            out = Path(scratch) / passes
            got = measure([str(path), "--passes", passes, "--check", "structure", "--target", "onnx", "-o", str(out)])
            met = got["seconds"] <= seconds and got["peak_gib"] <= peak
            failed |= not met
            limit = {"seconds": seconds if seconds < float("inf") else None, "peak_gib": round(peak, 3)}
            print(json.dumps({"passes": passes, **got, "limit": limit, "met": met}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
