"""Peak memory of a fresh process that runs one contender: `python -m benchmarks._speed_memory NAME REQUEST`.

The peak is VmHWM, what `ru_maxrss` would be but for the parent's own peak, which a child inherits there. It is that of
the whole process, Python and the packages that it imports included; "imported" is what was resident before the model.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks import _speed_forms as forms
from mc_opt.targets import _runtime

_RUNS = 3


def megabytes(key: str) -> float:
    """A line of /proc/self/status, in 1e6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def main() -> None:
    """Print {"peak": .., "imported": ..} of one contender, in megabytes."""
    name, request = sys.argv[1], forms.Request(**json.loads(sys.argv[2]))
    match name.split()[0]:
        case "ONNX":
            importlib.import_module("onnxruntime")
        case "torch":
            importlib.import_module("torch")
        case "mc-opt":
            _runtime.load()
    imported = megabytes("VmRSS")
    opened = forms.open_form(name, request)
    for _ in range(_RUNS):
        opened.run()
    print(json.dumps({"peak": megabytes("VmHWM"), "imported": imported}))


if __name__ == "__main__":
    main()
